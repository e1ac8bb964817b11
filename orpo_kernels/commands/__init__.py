"""The command line, a module a subcommand: each has `add_parser(subparsers)` and `run(args) -> exit code`."""
