"""The command line: `python cpe.py COMMAND ...`. Everything below it (cpe.py, study/, deploy/) works without it.

main.py finds the command and says how it ended, options.py has the arguments, common.py what commands share, runs.py
training that can be interrupted; then one file a command, and beside them many.py, openings.py, pictures.py,
report.py, targets.py.
"""

from cli.main import main

__all__ = ["main"]
