"""What only a GPU can tell, in stages that each fit a short rental: `python -m benchmarks.gpu --help`."""
