"""Benchmarks of titok. Each module at this level is a command: `python -m benchmarks.<name> --help`."""
