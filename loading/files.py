"""Reading and writing files. A file appears whole or not at all; only safetensors are read, never a pickle.

    save_tensors("x.safetensors", {"weight": W}, {"target": "red heart"})
    tensors, metadata = load_tensors("x.safetensors")

Whatever the user can mend is a `UserError`: one sentence that says what was wrong, which file, and what to do next.
Built on safetensors and torch.
"""

import errno
import json
import os
import secrets
import shutil
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
    """A file or folder that could not be written, and the `error` that says why; also a full disk."""

    def __init__(self, path: Path, error: Exception):
        super().__init__(path, error)
        self.path, self.error = path, error

    def __str__(self) -> str:
        """The sentence."""
        reason = getattr(self.error, "strerror", None) or self.error
        hint = f"{reason}: check the folder, or choose another"
        hint = "the disk is full: make room" if disk_full(self.error) else hint
        return f"{self.path} could not be written: {hint}"


def disk_full(error: Exception) -> bool:
    """Whether an error says that there is no room left; safetensors says so in words only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def first_line(error: BaseException) -> str:
    """What an error says, without the paragraphs that some libraries add."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    """An empty file in the folder of `path` while the block runs; UserError when something there cannot be written."""
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        refuse_special(path)
        yield temporary
    except (OSError, safetensors.SafetensorError) as error:
        raise Unwritten(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to: it takes the place of `path` when the block ends well, and vanishes otherwise.

    UserError when it cannot be written or the disk is full; whatever was at `path` before is then still there.
    """
    path = Path(path)
    with temporary_file(path) as temporary:
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors lets nobody else read what it writes
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def refuse_special(path: Path) -> None:
    """UserError for a folder, and for a device or a pipe: a file in its place would be in everybody's way."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a device or a pipe: give the name of a file")


def check_writable(path: str | Path) -> None:
    """UserError if no file can be written at `path`: asked before the work whose result is to go there.

    Folders that are not there yet are made, and removed again: the work may come to nothing.
    """
    path = Path(path)
    new = [folder for folder in path.parents if not os.path.exists(folder)]  # the innermost first
    try:
        with temporary_file(path), suppress(FileNotFoundError):
            os.lstat(path)  # says whether the name is too long: the temporary one is shorter
    finally:
        for folder in new:
            with suppress(OSError, ValueError):  # it was not made after all, or another run has written there
                folder.rmdir()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one piece, or not at all. UserError as for `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one piece, or not at all; `metadata` maps strings to strings.

    Tensors of any shapes, on any device. ValueError where two names share one tensor, UserError as for `atomic`.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        try:
            # transformers refuses files that do not say which library their tensors are laid out for.
            save_file(plain, temporary, {"format": "pt", **(metadata or {})})
        except RuntimeError as error:
            raise ValueError(f"{path}: two names share one tensor, which a file cannot: clone one of them") from error
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order: the library's own changes at random, and equal files would differ."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # as long as before, but for the spaces that fill it up; the tensors stay where they are
            file.seek(8)
            file.write(text.ljust(size))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file. UserError when the source cannot be read, OSError when the target cannot be written."""
    try:
        source.open("rb").close()
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}): check the folder of the model") from error
    shutil.copyfile(source, target)


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
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; UserError when it is missing, a pickle, not whole, or larger than can be mapped."""
    refuse_pickles(path)
    if not os.path.isfile(path):  # unlike Path.is_file, True or False of any string
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: give a file in it")
        refuse_special(path)
        raise UserError(f"{path} does not exist: check the path, or get the file again")
    try:
        try:
            file = safetensors.safe_open(path, framework="pt")
        except (MemoryError, RuntimeError) as error:  # of safetensors, and of torch, which maps it once more
            advice = "check that it is the right file; if so, close other programs, or raise the limit (ulimit -v)"
            said = f"{path} is larger ({os.path.getsize(path):,} bytes) than the memory that can be mapped here"
            raise UserError(f"{said} ({first_line(error)}): {advice}") from error
        with file:
            yield file
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): give another, or get it again") from error
    except OSError as error:
        raise UserError(f"{path} could not be read: {error}") from error


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. UserError as for `opened`."""
    with opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name, from its header alone. UserError as for `opened`."""
    with opened(Path(path)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


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
