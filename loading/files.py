"""Reading and writing files. A file appears whole or not at all; only safetensors are read, never a pickle."""

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent  # the folder of the project


class UserError(Exception):
    """Something the user can mend; the message says what was wrong, where, and what to do next."""


class Unwritten(UserError):
    """A file or folder that could not be written, or a full disk; `error` is what the system said."""

    def __init__(self, path: Path, error: Exception):
        hint = f"{getattr(error, 'strerror', None) or error}: check the folder, or choose another"
        hint = "the disk is full: make room" if disk_full(error) else hint
        super().__init__(f"{path} could not be written: {hint}")
        self.error = error


def disk_full(error: Exception) -> bool:
    """Whether an error says that there is no room left; safetensors says so in words only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def shipped(name: str) -> Path:
    """A folder of this project, such as emoji/ or prompts/; UserError if it is not there."""
    if not (ROOT / name).is_dir():
        raise UserError(f"{ROOT} has no folder {name}/: clone the whole repository, and run it there")
    return ROOT / name


# --- Writing -----------------------------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """A new name in the folder of `path` to write under; UserError if `path` itself can be no name."""
    if path.name in ("", "..") or "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be written: it is no name of a file")
    # The suffix stays last: some writers choose the format by it.
    return path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path` while the block runs; UserError if it cannot be written, or `path` is no file."""
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        if os.path.exists(path) and not os.path.isfile(path):  # nor may a pipe or a device be replaced by a file
            kind = "folder" if os.path.isdir(path) else "device or a pipe"
            raise UserError(f"{path} is a {kind}: give the name of a file")
        yield temporary
    except (OSError, safetensors.SafetensorError) as error:
        raise Unwritten(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well, and else vanishes; UserError for no room."""
    path = Path(path)
    with temporary_file(path) as temporary:
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors lets nobody else read what it writes
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def check_writable(path: str | Path) -> None:
    """UserError if no file can be written at `path`: asked before the work whose result is to go there."""
    path = Path(path)
    path = next((folder for folder in path.parents if os.path.exists(folder)), path.parent) / path.name
    with temporary_file(path), suppress(FileNotFoundError):
        os.lstat(path)  # says whether the name is too long: the temporary one is shorter


def write_text(path: str | Path, text: str) -> None:
    """Write a text file. UserError as for `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. UserError where two names share one tensor, and as for `atomic`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        try:
            # transformers refuses files that do not say which library their tensors are laid out for.
            save_file(plain, temporary, {"format": "pt", **(metadata or {})})
        except RuntimeError as error:
            names = " and ".join(sorted(re.findall("'(.+?)'", str(error)))[:2])
            said = f"{path} could not be written: {names} are one tensor under two names, which no file can hold"
            raise UserError(f"{said}: clone one of them") from error


# --- Reading -----------------------------------------------------------------------------------------------------


def refuse_pickles(path: Path) -> None:
    """UserError for a file that would have to be unpickled: that can run any code its author liked."""
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth", ".pkl"):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened: only .safetensors files are read. Most models "
            "offer one as well; else convert it once, where you trust it, with torch.load(..., weights_only=True) "
            "and safetensors.torch.save_file"
        )


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """An open safetensors file; UserError when it is missing, a pickle, or not whole."""
    refuse_pickles(Path(path))
    if not os.path.isfile(path):  # a pipe would be waited for
        there = "is no file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {there}: check the path, or get the file again")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): give another, or get it again") from error


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. UserError as for `opened`."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: is this a whole model in the diffusers layout?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} could not be read as JSON ({error}): get it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: get it again")
    return value
