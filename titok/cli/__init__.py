"""The command line: `titok ...` and `python -m titok ...`."""
