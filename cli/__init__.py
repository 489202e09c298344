"""The command line: `python cpe.py COMMAND ...`. Everything below it (cpe.py, study/, deploy/) works without it.

main.py      which command, and how errors end it: the only file that imports inside functions, as torch takes seconds
options.py   the arguments of every command; without torch, so that --help answers at once
common.py    models, gate files and their names, progress
pictures.py  labelled grids of pictures
runs.py      training that can be interrupted, and gone on with bit for bit
train.py many.py generate.py inspect.py check.py demo.py list.py report.py, ...   one file a command
"""

from cli.main import main

__all__ = ["main"]
