"""What only a GPU can tell, in stages that each fit a short lease: `python -m benchmarks.gpu --help`."""
