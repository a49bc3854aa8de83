"""`python -m titok`."""

from titok.cli import main

main()
