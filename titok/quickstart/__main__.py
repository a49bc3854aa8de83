"""Runs the quickstart as `python -m titok.quickstart`."""

from titok.quickstart.run import main

main()
