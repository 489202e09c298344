"""Which command, and how it ends. Imports torch only when a command has been chosen and its arguments are in order.

How a command is made, in three places:

    options.py                 its name and what it does in COMMANDS, its arguments in a function that stands in
                               ARGUMENTS; nothing in that file imports torch
    cli/NAME.py                run(args) -> str | None: does the work, prints what it found, and returns the command to
                               give next (made with `common.command`), or None

Whatever the user can mend is a `UserError` (loading/files.py): one line on standard error, and exit code 2. Ctrl-C ends
with 130. A command raises KeyboardInterrupt("how to go on") where something can be gone on with.
"""

import argparse
import difflib
import errno
import importlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress

from cli.options import COMMANDS, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="replace")  # terminals that know fewer letters
    if wrong := check_command(arguments):
        complain(wrong)
        return 2
    args = parse(arguments)
    warnings.formatwarning = lambda message, *_: f"cpe.py: {message}\n"
    try:
        return guarded(args)
    except KeyboardInterrupt as interrupt:
        more = f" ({interrupt})" if str(interrupt) else ""
        complain(f"interrupted; nothing half-written is left{more}", start="\n")
        return 130


def check_command(arguments: Sequence[str]) -> str:
    """What is wrong with the arguments before any command reads them; "" if nothing is."""
    for text in arguments:
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            return f"{text[:80]!r} is not text: it holds bytes that are no letters."
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS or name in ("--help", "-h", "--version"):
        return ""
    near = difflib.get_close_matches(name, COMMANDS, 1)
    return f"there is no command {name!r}: " + (
        f"did you mean {near[0]}?" if near else f"choose among {', '.join(COMMANDS)}."
    )


def guarded(args: argparse.Namespace) -> int:
    """Run a command; what the user can mend becomes one line and exit code 2."""
    from loading.files import UserError

    begun = time.perf_counter()
    try:
        following = importlib.import_module(f"cli.{args.command}").run(args)
        print(f"took    {time.perf_counter() - begun:.1f} s")
        if following:
            print(f"next    {following}")
        if sys.stdout:  # it may have been closed
            sys.stdout.flush()
        return 0
    except UserError as error:
        complain(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            complain(memory_advice(args))
        elif not isinstance(error, OSError):
            raise
        else:
            complain(told_by_system(error))
    return 2


def told_by_system(error: OSError) -> str:
    """What an OSError says: of a file, of a standard output that nobody reads on, or of the system itself."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if error.errno in (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO):
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again as it ends
        return f"standard output cannot be written: {error.strerror}"
    return f"the system refused something: {error.strerror or error}"


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the computer's memory or the graphics card's is too small."""
    said = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in said)


def memory_advice(args: argparse.Namespace) -> str:
    """What to try when there is too little memory, of what this command has not tried yet."""
    ways, device = ["close other programs"], getattr(args, "device", "cpu")
    if getattr(args, "dtype", "") == "float32":
        ways.append("--dtype bfloat16 (half the memory)")
    if len(getattr(args, "prompts", ())) > 1:
        ways.append("fewer prompts at once")
    if device != "cpu":
        ways.append("--device cpu")
    return f"out of memory on {device}. Try: {', '.join(ways)}"


def complain(text: str, start: str = "") -> None:
    """Say what went wrong, on standard error if anybody can read it."""
    with suppress(OSError, ValueError, AttributeError):
        print(f"{start}cpe.py: {text}", file=sys.stderr, flush=True)
