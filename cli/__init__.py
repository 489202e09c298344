"""The command line: `python cpe.py COMMAND ...`. Everything below it (cpe.py, study/, deploy/) works without it.

main.py finds the command, options.py has the arguments, common.py what commands share; then one file a command.
"""

from cli.main import main

__all__ = ["main"]
