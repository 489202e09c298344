"""The command line: main.py finds a command, options.py has its arguments, common.py what all share; a file each."""

from cli.main import main

__all__ = ["main"]
