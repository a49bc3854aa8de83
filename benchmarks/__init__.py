"""Benchmarks of titok. Each module at this level is a command: `python -m benchmarks.<name> --help`."""

from titok.cli.waiting import set_waiting_policy

set_waiting_policy()  # before a command imports PyTorch; the processes of benchmarks are their own
