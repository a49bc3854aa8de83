"""The command line, `titok COMMAND` or `python -m titok COMMAND`: one module for each command or pair of commands."""
