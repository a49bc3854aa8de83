"""The command line: `titok COMMAND` and `python -m titok COMMAND`. One module for each command or pair of commands."""
