"""Files of many targets or prompts, one a line, and their division among the processes that torchrun starts.

    torchrun --nproc_per_node=2 cpe.py train --targets FILE     # each process takes every second line

The processes never speak to one another: every line is worked on as if it stood alone. What a cluster's own RANK and
WORLD_SIZE say counts only where torchrun has set its variables, and only for files of lines.
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from loading.files import UserError


def share(everything: Sequence) -> Sequence:
    """What this of torchrun's processes works on, everything[rank::world_size]; all of it where there is but one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return everything
    return everything[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]


def own_device(kind: str) -> str:
    """The device of this process: each that torchrun started has a graphics card of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ else kind


@contextmanager
def naming(line: str) -> Iterator[None]:
    """UserError says which line it is of, unless that is ""."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{line}: {error}" if line else str(error)) from error


def read_text(path: Path) -> list[str]:
    """The lines of a text file; UserError when it cannot be read, or is no text in UTF-8."""
    if not path.exists():
        raise UserError(f"the file {path} does not exist: check its name.")
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
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


FIELD = re.compile(r'\s*(?:"([^"]*)"|([^,]*?))\s*,')
ENDING = re.compile(r"(jr|sr|ph\.?\s?d|m\.?d|esq|ii|iii|iv)\.?", re.IGNORECASE)  # of a person's name, after a comma


def names_in(line: str) -> list[str]:
    """The names in a line of a targets file: commas part them, but not in double quotes around a whole name.

    UserError where something else may be meant: asked before an hour of training, not after.
    """
    names = [quoted or plain for quoted, plain in FIELD.findall(line + ",")]
    if not all(name.strip() for name in names):
        raise UserError("a name is missing before or after a comma.")
    if any(name.count('"') % 2 for name in names):
        raise UserError("a double quote is not closed.")
    numbers = [name for name in names if re.fullmatch(r"[\d.]+", name)]
    if numbers and len(names) > 1:
        raise UserError(f"{numbers[0]!r} would be erased as a name: leave a column of numbers out of the file.")
    if re.match(r"\d+[.)]\s|[-*•]\s", line):
        raise UserError("it begins as in a list: leave that out. (If it belongs to the name: train it as an argument.)")
    if ending := next((i for i, name in enumerate(names) if i and ENDING.fullmatch(name)), 0):
        whole = ", ".join(names[ending - 1 : ending + 1])
        raise UserError(f'{names[ending]!r} would be erased as a name. If it belongs to the one before: "{whole}".')
    return names


class Drawing(NamedTuple):
    """One picture that a file asks for; None where it leaves that open."""

    line: int
    prompt: str
    seed: int | None = None
    guidance: float | None = None
    case: str | None = None  # its name in a benchmark


# As the benchmarks call them.
SEED = ("evaluation_seed", "seed", "sd_seed")
GUIDANCE = ("evaluation_guidance", "guidance_scale", "guidance", "sd_guidance_scale")


def read_drawings(path: Path) -> list[Drawing]:
    """The prompts of a file: plain lines, or CSV, which has a column `prompt`; what else there is is passed aloud.

    UserError as for `read_lines` and `read_rows`, or for a seed or a guidance scale that is no number.
    """
    text = read_text(path)
    columns = next(csv.reader(text), [])
    if path.suffix.lower() != ".csv" and "prompt" not in columns:
        return [Drawing(number, line) for number, line in read_lines(path)]
    if "prompt" not in columns:
        raise UserError(f"{path} has no column `prompt` (only {', '.join(columns)}): name one so in its first line.")
    if unknown := [name for name in columns if name not in ("prompt", "case_number", *SEED, *GUIDANCE)]:
        print(f"passed  columns {', '.join(unknown)} of {path}")
    rows = read_rows(path, text)
    drawings = [drawing(path, number, row) for number, row in rows if row["prompt"]]
    if not drawings:
        raise UserError(f"{path} has no prompts: fill its column `prompt`.")
    if blank := [number for number, row in rows if not row["prompt"]]:
        more = f" and {len(blank) - 1} more" if len(blank) > 1 else ""
        print(f"passed  line {blank[0]}{more} of {path}: no prompt there")
    return drawings


def read_rows(path: Path, text: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file, each with the number of its last line.

    UserError for quotes that are not closed, or a row of more fields than there are columns.
    """
    reader, rows = csv.DictReader((line + "\n" for line in text), restval="", strict=True), []
    try:
        for row in reader:
            if None in row:
                columns = len(reader.fieldnames)
                fields = f"{columns + len(row[None])} fields for {columns} columns"
                advice = "put what holds a comma in double quotes"
                raise UserError(f"{path}, line {reader.line_num} has {fields}: {advice}.")
            rows.append((reader.line_num, {name: field.strip() for name, field in row.items()}))
    except csv.Error as error:
        line = reader.reader.line_num  # the other is that of the last row
        raise UserError(f"{path}, line {line} is no CSV ({error}): check its double quotes.") from error
    return rows


def drawing(path: Path, line: int, row: dict[str, str]) -> Drawing:
    """A row of a CSV file; UserError for what is no number."""
    seed, guidance = (next((row[name] for name in names if row.get(name)), None) for names in (SEED, GUIDANCE))
    try:
        # Seeds with ".0" are common in tables with gaps; by way of a float, large ones would lose digits.
        seed, guidance = seed and int(re.sub(r"\.0*$", "", seed)), guidance and float(guidance)
        if not 0 <= (seed or 0) < 2**63 or not 0 <= (guidance or 0) <= 100:
            raise ValueError(f"seed {seed}, guidance {guidance}")
    except ValueError as error:
        said = "seeds are whole numbers from 0, guidance scales 0 to 100"
        raise UserError(f"{path}, line {line}: {error}; {said}.") from error
    return Drawing(line, row["prompt"], seed, guidance, row.get("case_number"))
