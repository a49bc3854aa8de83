"""Runs the command line as `python -m titok`, which `torchrun -m titok` needs."""

from titok.cli.commands import main

main()
