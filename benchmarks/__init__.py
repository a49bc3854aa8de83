"""Benchmarks: `python -m benchmarks.<name>`; see docs/performance.md."""
