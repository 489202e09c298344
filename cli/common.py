"""What commands share: the model, gate files and what they know, names of files, progress and its time.

A gate file says in its metadata which model it was made for, what it erases, with which preset, and how its model draws
best. No command asks for these again: `settle` fills in what the user left out.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cpe
from loading.files import UserError, check_writable, load_tensors, opened, read_json, read_shapes, shipped
from loading.prompts import PRESETS, normalised, read_prompts
from loading.tokens import vocabulary
from weights import Model, expected_unet, load_model

LARGEST_GATES = 2**26  # numbers in a gate file: a hundred times what the paper's largest recipe makes
NAMED = {"emoji": "the embedded model", "sd14": "Stable Diffusion 1.x"}
# How a model draws and is trained where no defaults.json in its folder says otherwise.
SD_DEFAULTS = {"steps": 50, "guidance": 7.5, "sampler": "ddim", "preset": "celebrity"}

# --- Models ------------------------------------------------------------------------------------------------------


@cache
def is_emoji(model: str) -> bool:
    """Whether --model names the embedded model, or a folder with its vocabulary and U-Net: a copy, or a baked one."""
    folder, ours = Path(os.path.expanduser(model)), shipped("emoji")
    if model == "emoji" or not (folder / "unet").is_dir():
        return model == "emoji"
    try:
        same = vocabulary(folder / "tokenizer") == vocabulary(ours / "tokenizer")
        return same and read_json(folder / "unet/config.json") == read_json(ours / "unet/config.json")
    except UserError:  # what is wrong with it is said when it is opened
        return False


def defaults_of(model: str) -> dict[str, Any]:
    """How a model draws best, and its preset: `defaults.json` in its folder, or Stable Diffusion's."""
    for folder in (Path(os.path.expanduser(model)), *([shipped("emoji")] if is_emoji(model) else [])):
        if (folder / "defaults.json").is_file():
            return SD_DEFAULTS | read_json(folder / "defaults.json")
    return SD_DEFAULTS


def open_model(args: argparse.Namespace, parts: Sequence[str]) -> Model:
    """The model of --model on --device; only the files of `parts` are looked for. UserError as for `load_model`."""
    return load_model(args.model, getattr(torch, getattr(args, "dtype", "float32")), args.device, parts)


def settle(args: argparse.Namespace) -> "list[GateFile]":
    """Fill in --model, --steps, --guidance, --sampler where nobody said them, from the gate files; returns these.

    UserError for a gate file that is damaged, comes twice, or does not fit the model: before a model is downloaded.
    """
    real = [os.path.realpath(path) for path in args.gates]
    if twice := [path for i, path in enumerate(args.gates) if real[i] in real[:i]]:
        raise UserError(f"the gate file {twice[0]} is given twice: give it once.")
    files = [read_gates(path) for path in args.gates]
    models = list(dict.fromkeys(file.model for file in files if file.model))
    drawing = files[0].drawing if files and args.model in (None, files[0].model) else {}
    if args.model is None and len(models) > 1:
        raise UserError(f"these gates are of different models ({', '.join(models)}): give those of one, or --model.")
    if args.model is None and models and models[0] not in NAMED and not os.path.exists(os.path.expanduser(models[0])):
        raise UserError(f"{files[0].path} was trained for {models[0]}, which is not here: say --model and its place.")
    args.model = args.model or next(iter(models), "sd14")
    for name, value in (defaults_of(args.model) | drawing).items():
        if name in ("steps", "guidance", "sampler") and getattr(args, name, 0) is None:  # no preset: files say theirs
            setattr(args, name, value)
    if args.model in NAMED:  # other models' sizes are in their files
        for file in files:
            check_fits(file, sizes_of(expected_unet(args.model)), args.model)
    return files


# --- Gate files --------------------------------------------------------------------------------------------------


@dataclass
class GateFile:
    """A gate file, and what its metadata says."""

    path: Path
    gates: cpe.ResAG
    metadata: dict[str, str]

    @property
    def target(self) -> str:
        """What it erases; no terminal obeys it."""
        name = self.metadata.get("target") or self.metadata.get("prompts") or self.path.stem
        return "".join(letter if letter.isprintable() else "?" for letter in name)

    @property
    def names(self) -> list[str]:
        """The target and its aliases."""
        return [self.target, *map(str, self.said("aliases", list))]

    @property
    def recipe(self) -> tuple[str, str, float]:
        """The preset, the surrogate, and eta; of a file that does not say so, the likeliest, with a warning."""
        preset = self.metadata.get("preset", "")
        if preset not in PRESETS:
            preset = self.likeliest_preset()
            warnings.warn(f"{self.path} does not say how it was trained: taken for preset {preset}", stacklevel=2)
        eta = self.said("eta", float) or self.said("eta", int) or PRESETS[preset].eta
        return preset, self.metadata.get("surrogate", PRESETS[preset].surrogate), float(eta)

    def likeliest_preset(self) -> str:
        """By the size of its gate, or a name among the artists, as of the authors' own files; else its model's."""
        if (self.gates.w_qs.shape[2], self.gates.k) == (PRESETS["explicit"].r, PRESETS["explicit"].k):
            return "explicit"
        default = defaults_of(self.model or "sd14")["preset"]
        artist = normalised(self.target) in map(normalised, read_prompts("style").domain)
        return "style" if artist and default == "celebrity" else default

    @property
    def model(self) -> str | None:
        """The model it was made for; of a file that does not say so, the known one that it fits."""
        fits = [name for name in NAMED if sizes_of(expected_unet(name)) == sizes(self.gates)]
        return self.metadata.get("model") or next(iter(fits), None)

    @property
    def drawing(self) -> dict[str, Any]:
        """How its model draws best: steps, guidance, sampler."""
        drawing, kinds = self.said("drawing", dict), {"steps": int, "guidance": (int, float), "sampler": str}
        return {name: drawing[name] for name, kind in kinds.items() if isinstance(drawing.get(name), kind)}

    def said(self, name: str, kind: type) -> Any:
        """What the metadata says in JSON; empty where it says nothing, or nothing of that kind."""
        try:
            value = json.loads(self.metadata.get(name, "null"))
        except (ValueError, RecursionError):
            value = None
        return value if isinstance(value, kind) else kind()


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; none if it is not there, or damaged."""
    try:
        with opened(path) as file:
            return file.metadata() or {}
    except UserError:
        return {}


def read_gates(path: Path) -> GateFile:
    """A gate file, checked; UserError where there is none."""
    if not os.path.exists(path):
        first = command("train", "--target", "...")
        raise UserError(f"the gate file {path} does not exist: check its name, or train it first: {first}")
    if (size := sum(map(math.prod, read_shapes(path).values()))) > LARGEST_GATES:  # before memory is taken for them
        raise UserError(f"{path} has {size:,} numbers: that is no gate file, as `train` writes it.")
    tensors, metadata = load_tensors(path)
    try:
        return GateFile(path, cpe.from_tensors(tensors), metadata)
    except ValueError as error:
        raise UserError(f"{path}: {error}. Give a gate file, as `train` writes it.") from error


def merge_gates(files: Sequence[GateFile], model: Model) -> cpe.ResAG:
    """The gates of all files as one module of the model's kind; UserError if they do not fit it."""
    for file in files:
        check_fits(file, sizes_of(model.part("unet").empty()), model.name)
        if file.metadata.get("fingerprint", model.fingerprint) != model.fingerprint:
            warnings.warn(f"{file.path} was trained for another model (its text encoder differs)", stacklevel=2)
    return cpe.merge([file.gates for file in files]).requires_grad_(False).to(model.device, model.dtype)


def sizes(gates: cpe.ResAG) -> tuple[int, dict[str, int]]:
    """The width of the context that gates read, and that of every projection that they correct."""
    return gates.w_qs.shape[1], gates.widths


def sizes_of(unet: torch.nn.Module) -> tuple[int, dict[str, int]]:
    """The sizes of gates that fit a U-Net."""
    layers = unet.cross_attentions()
    widths = {f"{path}.{k}": getattr(a, k).out_features for path, a in layers.items() for k in ("to_k", "to_v")}
    return unet.config["cross_attention_dim"], widths


def check_fits(file: GateFile, wanted: tuple[int, dict[str, int]], name: str) -> None:
    """UserError if the gates' projections are not those of the U-Net of the model `name`: says of which they are."""
    (width, corrected), (d, widths) = sizes(file.gates), wanted
    if (width, corrected) == wanted:
        return
    fits = [known for known in NAMED if sizes_of(expected_unet(known)) == (width, corrected)]
    advice = "Use the --model that it was trained for, or train gates for this one"
    if fits:
        advice = f"It fits {NAMED[fits[0]]}: use --model {fits[0]}, or leave --model out"
    raise UserError(
        f"{file.path} is of another model: it corrects {len(corrected)} projections of a context of width {width}, "
        f"{name} has {len(widths)} of width {d}. {advice}."
    )


# --- Names of files ----------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A file name: letters, digits and hyphens, at most 80 bytes, so that it cannot leave its folder.

    Where signs are left out of it, or its end, a digest of the name takes their place: no two names make one file.
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    words = "-".join(re.findall(r"\w+", plain))
    lost = re.sub(r"[\w\s.,'’-]", "", plain) or not words
    if re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", words):  # Windows needs these itself
        words += "-target"
    if lost or len(words.encode()) > 80:
        digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
        words = f"{words.encode()[:71].decode(errors='ignore')}-{digest}".lstrip("-")
    return words


def numbered(path: Path) -> Iterator[Path]:
    """x.png, x-2.png, x-3.png, ..."""
    yield path
    number = 2
    while True:
        yield path.with_stem(f"{path.stem}-{number}")
        number += 1


def free(path: Path) -> Path:
    """The first of the numbered names where nothing is yet."""
    return next(each for each in numbered(path) if not os.path.lexists(each))


def check_out(path: Path, option: str = "--out") -> None:
    """`check_writable`, whose UserError names the option that the path comes from."""
    try:
        check_writable(path)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def check_prompts(prompts: Sequence[str]) -> None:
    """UserError for a blank prompt: what a shell makes of a variable that is not set."""
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give some words. (`generate` draws without a prompt at --guidance 0.)")


def command(*words: object) -> str:
    """A command to copy into a shell: `words` after `python cpe.py`, quoted where they need it."""
    return shlex.join(["python", "cpe.py", *map(str, words)])


# --- Progress ----------------------------------------------------------------------------------------------------


def bar(iterable: Iterable | None, total: int, text: str) -> tqdm:
    """A progress bar on the terminal; None of torchrun's processes but the first shows one."""
    quiet = sys.stderr is None or int(os.environ.get("LOCAL_RANK", "0") or 0) > 0
    often = 0.1 if quiet or sys.stderr.isatty() else 5.0  # a log is not to be filled with it
    return tqdm(iterable, total=total, desc=text, leave=False, mininterval=often, disable=quiet)


def forecast(steps: Iterable, total: int, text: str) -> Iterator:
    """Steps behind a progress bar; how long all of them take is said after the first few."""
    timed = Forecast(total, text)
    for step in bar(steps, total, text):
        timed.step()
        yield step


class Forecast:
    """Says beforehand how long something takes, from its first steps: `step()` after each of them."""

    def __init__(self, steps: int, text: str, after: int = 3, least: float = 10.0):
        self.steps, self.text, self.after, self.least = steps, text, after, least
        self.done, self.begun = -1, 0.0

    def step(self) -> None:
        """Count; the first step, which warms up, is not measured. Silent below `least` seconds in all."""
        self.done += 1
        if self.done == 0:
            self.begun = time.perf_counter()
        elif self.done == self.after:
            seconds = (time.perf_counter() - self.begun) / self.after * self.steps
            if seconds >= self.least:
                tqdm.write(f"time    {self.text}: about {spoken(seconds)} ({self.steps:,} steps)", file=sys.stdout)


def spoken(seconds: float) -> str:
    """A time as people say it: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
