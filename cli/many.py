"""Files of many targets or prompts, one a line, and their division among the processes that torchrun starts.

    torchrun --nproc_per_node=2 cpe.py train --targets FILE     # each process takes every second line

The processes never speak to one another: every line is worked on as if it stood alone. What a cluster's own RANK and
WORLD_SIZE say counts only where torchrun has set its variables, and only for files of lines.
"""

import csv
import io
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from loading.files import UserError

LARGEST = 64 << 20  # bytes of a file of lines


class Process(NamedTuple):
    """Which of the processes that torchrun started this is: `rank` of `size`, and the `local`-th on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def this_process() -> Process:
    """What torchrun's variables say; the only one where torchrun did not start it. UserError for nonsense there."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Process()
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with suppress(ValueError, TypeError):
        process = Process(int(said["RANK"]), int(said["WORLD_SIZE"]), int(said["LOCAL_RANK"]))
        if 0 <= process.rank < process.size and process.local >= 0:
            return process
    words = ", ".join(f"{name}={value}" for name, value in said.items())
    raise UserError(f"{words} in the environment is nothing that torchrun sets: unset them, or start with torchrun.")


def device_of(device: str, process: Process) -> str:
    """The device of a process: on a machine with several graphics cards, its own. UserError if there are too few."""
    if device != "cuda" or not torch.cuda.is_available() or process.size == 1:
        return device
    if process.local >= (cards := torch.cuda.device_count()):
        found = f"{cards} graphics card{'s' * (cards != 1)}"
        raise UserError(f"process {process.local} of this machine finds {found}: start fewer.")
    return f"cuda:{process.local}"


@contextmanager
def stopped_by_torchrun(process: Process) -> Iterator[None]:
    """Ends as after Ctrl-C (KeyboardInterrupt), the state saved, when torchrun stops this process as another failed."""
    if process.size == 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def naming(line: str) -> Iterator[None]:
    """UserError says which line it is of, unless that is ""."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{line}: {error}" if line else str(error)) from error


# --- Lines -------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A text file; UserError when it cannot be read, is no text in UTF-8, or larger than 64 MiB."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:  # or endless, as some devices are
            raise UserError(f"{path} is larger than {LARGEST >> 20} MiB: give a text file, one entry a line.")
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its name.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1} is not text: it holds a NUL.")
    return text


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file and their numbers from 1. A line `# ...` is a comment; `#1 dad mug` is an entry.

    UserError as for `read_text`, or when there are no entries.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1)]
    comments = [number for number, line in lines if line == "#" or line.startswith(("# ", "##", "#!"))]
    lines = [(number, line) for number, line in lines if line and number not in comments]
    if not lines:
        raise UserError(f"{path} has no lines but blank ones and comments (# ...): write one entry a line.")
    if comments:
        print(f"passed  {len(comments)} comment line{'s' * (len(comments) > 1)} of {path}")
    return lines


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


COLUMNS = {
    "seed": ("evaluation_seed", "seed", "sd_seed"),
    "guidance": ("evaluation_guidance", "guidance_scale", "guidance", "sd_guidance_scale"),
    "case": ("case_number",),
}


def read_drawings(path: Path) -> list[Drawing]:
    """The prompts of a file: plain lines, or CSV, which has a column `prompt`; what else there is is passed aloud.

    UserError as for `read_lines` and `read_table`, or for a seed or a guidance scale that is no number.
    """
    text = read_text(path)
    columns = next(csv.reader([text.split("\n", 1)[0]]), [])
    if path.suffix.lower() != ".csv" and "prompt" not in columns:
        return [Drawing(number, line) for number, line in read_lines(path)]
    columns, rows = read_table(path, text)
    used = {name: next((c for c in names if c in columns), None) for name, names in COLUMNS.items()}
    if unknown := [c for c in columns if c and c not in ("prompt", *used.values())]:
        print(f"passed  columns {', '.join(unknown)} of {path}")
    drawings, blank = [], []
    for number, row in rows:
        said = {name: (row.get(column) or "").strip() or None for name, column in used.items() if column}
        with naming(f"{path}, line {number}"):
            if prompt := (row.get("prompt") or "").strip():
                drawings.append(drawing(number, prompt, said))
            else:
                blank.append(number)
    if not drawings:
        raise UserError(f"{path} has no prompts: fill its column `prompt`.")
    if blank:
        more = f" and {len(blank) - 1} more" if len(blank) > 1 else ""
        print(f"passed  line {blank[0]}{more} of {path}: no prompt there")
    return drawings


def read_table(path: Path, text: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV file, and its rows with the number of their last line.

    UserError without a column `prompt`, for quotes that are not closed, or a row of more fields than there are columns.
    """
    reader, rows = csv.DictReader(io.StringIO(text), strict=True), []
    try:
        columns = list(reader.fieldnames or [])
        if "prompt" not in columns:
            raise UserError(
                f"{path} has no column `prompt` (only {', '.join(columns)}): name one so in its first line."
            )
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num} has {len(columns) + len(row[None])} fields for {len(columns)} "
                    f"columns: put what holds a comma in double quotes."
                )
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.reader.line_num} is no CSV ({error}): check its double quotes."
        ) from error
    return columns, rows


def drawing(line: int, prompt: str, said: dict[str, str | None]) -> Drawing:
    """A row of a CSV file; UserError for what is no number."""
    try:
        seed = said.get("seed") and int(re.sub(r"\.0*$", "", said["seed"]))  # as a column with gaps is often written
        guidance = said.get("guidance") and float(said["guidance"])
    except ValueError as error:
        raise UserError(f"{error}: seeds are whole numbers, guidance scales numbers.") from error
    if (seed is not None and not 0 <= seed < 2**63) or (guidance is not None and not 0 <= guidance <= 100):
        raise UserError(f"seed {seed}, guidance {guidance}: seeds are 0 or more, guidance scales up to 100.")
    return Drawing(line, prompt, seed, guidance, said.get("case"))


def share(everything: Sequence, process: Process) -> Sequence:
    """The lines of a process: everything[rank::world_size]."""
    return everything[process.rank :: process.size]
