"""`python -m titok`."""

from titok.cli.app import main

main()
