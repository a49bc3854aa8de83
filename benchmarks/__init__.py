"""Benchmarks; run them as `python -m benchmarks.<name>`."""
