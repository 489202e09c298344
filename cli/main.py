"""Which command, and how it ends. torch takes seconds to import: that waits until the arguments are in order.

A command is a function in options.py, for its arguments, and cli/NAME.py with `run(args)`, which prints what it found
and returns the command to give next, or None. Whatever the user can mend is a `UserError`: one line, and exit code 2.
Ctrl-C ends with 130; a command raises KeyboardInterrupt("how to go on") where something can be gone on with.
"""

import importlib
import os
import sys
import time
import warnings
from collections.abc import Sequence

from cli.options import parse

NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")  # as torch and its libraries say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 2 for what the user can mend, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # terminals that know fewer letters
    args = parse(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = lambda message, *_: f"cpe.py: {message}\n"
    begun = time.perf_counter()
    try:
        following = importlib.import_module(f"cli.{args.command}").run(args)
        following = f"\nnext    {following}" if following else ""
        print(f"took    {time.perf_counter() - begun:.1f} s{following}", flush=True)
        return 0
    except KeyboardInterrupt as interrupt:
        more = f" ({interrupt})" if str(interrupt) else ""
        print(f"\ncpe.py: interrupted; nothing half-written is left{more}", file=sys.stderr)
        return 130
    except Exception as error:
        if (said := sentence(error)) is None:
            raise
        print(f"cpe.py: {said}", file=sys.stderr)
        return 2


def sentence(error: Exception) -> str | None:
    """What to say of an error that a person can mend; None for any other, which is a fault of ours."""
    from loading.files import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY):
        return "out of memory: close other programs, or try fewer prompts at once, --dtype bfloat16, --device cpu"
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again as it ends
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}"
    return None
