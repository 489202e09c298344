"""Files of many targets, or of many prompts: plain lines, or CSV as the benchmarks have it.

    torchrun --nproc_per_node=2 cpe.py train --targets FILE     # each process takes every second line

RANK and WORLD_SIZE, which clusters set as well, count only if torchrun has started the process.
"""

import argparse
import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from loading.files import UserError


def share(everything: Sequence, args: argparse.Namespace) -> Sequence:
    """What this process works on: all, or one of torchrun's [rank::world_size], on a graphics card of its own."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return everything
    args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
    return everything[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]


@contextmanager
def naming(line: str) -> Iterator[None]:
    """UserError says which line it is of, unless that is ""."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{line}: {error}" if line else str(error)) from error


def read_text(path: Path) -> list[str]:
    """The lines of a text file; UserError when it cannot be read, or is no text in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"the file {path} does not exist: check its name.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8 ({error}): check the file.") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file and their numbers from 1. A line `# ...` is a comment; `#1 dad mug` is an entry.

    UserError as for `read_text`, or when there are no entries.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path), 1) if line.strip()]
    entries = [(number, line) for number, line in lines if line != "#" and not line.startswith(("# ", "##"))]
    if not entries:
        raise UserError(f"{path} has no lines but blank ones and comments (# ...): write one entry a line.")
    if passed := len(lines) - len(entries):
        print(f"passed  {passed} comment line{'s' * (passed > 1)} of {path}")
    return entries


class Drawing(NamedTuple):
    """One picture that a file asks for; None where it leaves that open."""

    prompt: str
    seed: int | None = None
    guidance: float | None = None
    case: str | None = None  # its name in a benchmark


SEED = ("evaluation_seed", "seed", "sd_seed")  # as the benchmarks call them
GUIDANCE = ("evaluation_guidance", "guidance_scale", "guidance", "sd_guidance_scale")


def read_drawings(path: Path) -> list[Drawing]:
    """The prompts of a file: plain lines, or CSV, which has a column `prompt`; other columns are passed aloud.

    So are rows without a prompt, as in the authors' code (I2P has one). UserError as for `read_lines`; for a file
    without prompts, for quotes or commas astray, or for no numbers.
    """
    text = read_text(path)
    columns = next(csv.reader(text), [])
    if path.suffix.lower() != ".csv" and "prompt" not in columns:
        return [Drawing(line) for _, line in read_lines(path)]
    if "prompt" not in columns:
        raise UserError(f"{path} has no column `prompt` (only {', '.join(columns)}): name one so in its first line.")
    if unknown := [name for name in columns if name not in ("prompt", "case_number", *SEED, *GUIDANCE)]:
        print(f"passed  columns {', '.join(unknown)} of {path}")
    reader, drawings = csv.DictReader((line + "\n" for line in text), restval="", strict=True), []
    try:
        for row in reader:
            with naming(f"{path}, line {reader.line_num}"):
                drawings.append(drawing(row, len(columns)))
    except csv.Error as error:
        line = reader.reader.line_num  # the other is that of the last row
        raise UserError(f"{path}, line {line} is no CSV ({error}): check its double quotes.") from error
    if empty := drawings.count(None):
        print(f"passed  {empty} row{'s' * (empty > 1)} of {path} without a prompt")
    if len(drawings) == empty:
        raise UserError(f"{path} has no prompts: fill its column `prompt`.")
    return list(filter(None, drawings))


def drawing(row: dict, columns: int) -> Drawing | None:
    """A row of a CSV file, None without a prompt; UserError for too many fields, or what is no number."""
    if more := row.pop(None, []):
        raise UserError(f"{columns + len(more)} fields for {columns} columns: put what holds a comma in double quotes.")
    row = {name: field.strip() for name, field in row.items()}
    if not row["prompt"]:
        return None
    seed, guidance = (next((row[name] for name in names if row.get(name)), None) for names in (SEED, GUIDANCE))
    said = ", ".join(filter(None, (seed, guidance)))
    try:
        # Seeds with ".0" are common in tables with gaps; by way of a float, large ones would lose digits.
        seed, guidance = seed and int(re.sub(r"\.0*$", "", seed)), guidance and float(guidance)
        if not 0 <= (seed or 0) < 2**63 or not 0 <= (guidance or 0) <= 100:
            raise ValueError("out of range")
    except ValueError as error:
        raise UserError(f"{said}: seeds are whole numbers from 0, guidance scales 0 to 100.") from error
    return Drawing(row["prompt"], seed, guidance, row.get("case_number"))
