"""What commands share: the model, gate files and what they know, names of files, progress and its time.

A gate file says in its metadata which model it was made for, what it erases, with which preset, and how its model draws
best. No command asks for these again: `settle` fills in what the user left out.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cpe
from deploy.targets import Concept, read_concept
from loading.files import UserError, load_tensors, opened, read_json, shipped, write_text
from loading.prompts import PRESETS, normalised, read_prompts, written
from sampler import Schedule, check_steps
from token_space import TokenSpace, spectral_norm
from weights import Model, expected_unet, load_model

NAMED = {"emoji": "the embedded model", "sd14": "Stable Diffusion 1.x"}
# How a model draws and is trained where no defaults.json in its folder says otherwise.
SD_DEFAULTS = {"steps": 50, "guidance": 7.5, "sampler": "ddim", "preset": "celebrity"}
DRAWING = {"steps": int, "guidance": float, "sampler": str}  # what gate files say of it
SHUT = 0.5  # a gate that opens no further, or makes less of its change, erases little
# A plain prompt of what gates of a preset erase.
CAPTIONS = dict.fromkeys(PRESETS, "a picture of {}") | {
    "style": "a painting by {}",
    "object": "a picture of a {}",
    "emoji": "a picture of a {}",
    "emoji-style": "a picture of a robot, {}",
}

# --- Models ------------------------------------------------------------------------------------------------------


@cache
def is_emoji(model: str) -> bool:
    """Whether --model names the embedded model, or a folder with its vocabulary and U-Net: a copy, or a baked one."""
    folder, files = Path(os.path.expanduser(model)), ("tokenizer/vocab.json", "unet/config.json")
    try:
        return model == "emoji" or all(read_json(folder / f) == read_json(shipped("emoji") / f) for f in files)
    except UserError:  # what is wrong with it is said when it is opened
        return False


def defaults_of(model: str) -> dict[str, Any]:
    """How a model draws best, and its preset: `defaults.json` in its folder, or Stable Diffusion's."""
    path = (shipped("emoji") if is_emoji(model) else Path(os.path.expanduser(model))) / "defaults.json"
    return SD_DEFAULTS | (read_json(path) if os.path.isfile(path) else {})


def open_model(args: argparse.Namespace, parts: Sequence[str], files: "Sequence[GateFile]" = ()) -> Model:
    """The model of --model on --device; only the files of `parts` are looked for.

    UserError as for `load_model`, and for gate files that do not fit it.
    """
    model = load_model(args.model, getattr(torch, getattr(args, "dtype", "float32")), args.device, parts)
    for file in files:
        check_fits(file, model.part("unet").empty(), model.name)
        if file.metadata.get("fingerprint", model.fingerprint) != model.fingerprint:
            warnings.warn(f"{file.path} was trained for another model (its text encoder differs)", stacklevel=2)
    return model


def space_of(model: Model) -> TokenSpace:
    """The projections that gates correct, as seen from the context."""
    return TokenSpace(cpe.Layers.of(model.cross_attention(), spectral_norm, model.tokens))


def settle(args: argparse.Namespace) -> "list[GateFile]":
    """Fill in --model, --steps, --guidance, --sampler where nobody said them, from the gate files; returns these.

    UserError for a gate file that is damaged, or does not fit the model, and for steps that the sampler cannot take:
    before a model is downloaded.
    """
    args.gates = list(dict.fromkeys(args.gates))
    files = [read_gates(path) for path in args.gates]
    args.model = args.model or next((file.model for file in files if file.model), "sd14")
    drawing = files[0].drawing if files and args.model == files[0].model else {}
    defaults = defaults_of(args.model) | drawing
    vars(args).update({name: defaults[name] for name in DRAWING if getattr(args, name, 0) is None})
    if "steps" in args:
        try:
            check_steps(Schedule(), args.steps, args.sampler)
        except ValueError as error:
            raise UserError(f"--steps: {error}.") from error
    if args.model in NAMED:  # other models' sizes are in their files
        for file in files:
            check_fits(file, expected_unet(args.model), args.model)
    return files


# --- Gate files --------------------------------------------------------------------------------------------------


@dataclass
class GateFile:
    """A gate file, and what its metadata says; what it leaves open is as the likeliest preset has it."""

    path: Path
    gates: cpe.ResAG
    metadata: dict[str, str]
    model: str | None  # that it was made for
    preset: str
    concept: Concept  # names, surrogate, eta
    drawing: dict[str, Any]  # how its model draws best: steps, guidance, sampler

    @property
    def target(self) -> str:
        """What it erases."""
        return self.concept.names[0]

    @property
    def caption(self) -> str:
        """A plain prompt that names it."""
        return written(CAPTIONS[self.preset], self.target)

    def warn_of_guess(self) -> None:
        """A warning where the preset is only the likeliest: for whoever goes by it, or by the surrogate or eta."""
        if self.metadata.get("preset") != self.preset:
            warnings.warn(f"{self.path} does not say how it was trained: taken for preset {self.preset}", stacklevel=2)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; none if it is not there, or damaged."""
    try:
        with opened(path) as file:
            return file.metadata() or {}
    except UserError:
        return {}


def printable(text: str) -> str:
    """Text without what would move a cursor: no terminal obeys what a file says. Joiners of letters or signs stay."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "?" for c in text)


def read_gates(path: Path) -> GateFile:
    """A gate file, checked; UserError where there is none, or nonsense in it."""
    if not os.path.exists(path):
        raise UserError(f"the gate file {path} does not exist: check its name, or train it first.")
    tensors, said = load_tensors(path)
    metadata = {key: printable(text) for key, text in said.items()}
    try:
        gates = cpe.from_tensors(tensors).requires_grad_(False)
        fits = (name for name in NAMED if sizes_of(expected_unet(name)) == (gates.w_qs.shape[1], gates.widths))
        model = metadata.get("model") or next(fits, None)
        preset, named = metadata.get("preset"), {"prompts": path.stem} | metadata
        if preset not in PRESETS:
            preset = likeliest_preset(gates, read_concept(named, PRESETS["celebrity"]).names[0], model)
        drawing = json.loads(metadata.get("drawing", "{}"))
        drawing = {name: kind(drawing[name]) for name, kind in DRAWING.items() if name in drawing}
        check_steps(Schedule(), *((SD_DEFAULTS | drawing)[name] for name in ("steps", "sampler")))
        return GateFile(path, gates, metadata, model, preset, read_concept(named, PRESETS[preset]), drawing)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {error}. Give a gate file, as `train` writes it.") from error


def likeliest_preset(gates: cpe.ResAG, target: str, model: str | None) -> str:
    """By the size of gates, or an artist's name, all that the authors' own files tell; else the model's."""
    if (gates.w_qs.shape[2], gates.k) == (PRESETS["explicit"].r, PRESETS["explicit"].k):
        return "explicit"
    default = defaults_of(model or "sd14")["preset"]
    artist = default == "celebrity" and normalised(target) in map(normalised, read_prompts("style").domain)
    return "style" if artist else default


def merge_gates(files: Sequence[GateFile], model: Model) -> cpe.ResAG:
    """The gates of all files as one module of the model's kind."""
    return cpe.merge([file.gates for file in files]).requires_grad_(False).to(model.device, model.dtype)


def sizes_of(unet: torch.nn.Module) -> tuple[int, dict[str, int]]:
    """The sizes of gates that fit a U-Net: the width of its context, and that of every projection they correct."""
    layers = unet.cross_attentions()
    widths = {f"{path}.{k}": getattr(a, k).out_features for path, a in layers.items() for k in ("to_k", "to_v")}
    return unet.config["cross_attention_dim"], widths


def check_fits(file: GateFile, unet: torch.nn.Module, name: str) -> None:
    """UserError if gates are not of the size of the model `name` with this U-Net: says of which model they are."""
    width, widths = sizes_of(unet)
    if (file.gates.w_qs.shape[1], file.gates.widths) != (width, widths):
        known = f"It fits {NAMED.get(file.model, file.model)}: use --model {file.model}, or leave --model out"
        advice = known if file.model else "Use the --model that it was trained for, or train gates for this one"
        raise UserError(
            f"{file.path} is of another model: it corrects {len(file.gates.widths)} projections of a context of width "
            f"{file.gates.w_qs.shape[1]}, {name} has {len(widths)} of width {width}. {advice}."
        )


# --- Files ----------------------------------------------------------------------------------------------


def same(name: str) -> str:
    """What two ways to write one name have in common: "Jay-Z" and "jay z", "straße" and "STRASSE"; "!!!" is itself."""
    return normalised(name) or unicodedata.normalize("NFKC", name)


def slug(name: str) -> str:
    """A file name: letters, digits and hyphens, at most 80 bytes, so that it cannot leave its folder.

    A digest takes the place of what is left out: `same` names make one file, and no others do.
    """
    plain = same(name)
    words = "-".join(re.findall(r"\w+", plain))
    lost = re.sub(r"[\w\s]", "", plain) or len(words.encode()) > 80 or not words
    if lost or re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", words):  # which Windows needs itself
        digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
        words = f"{words.encode()[:71].decode(errors='ignore')}-{digest}".lstrip("-")
    return words


def free(path: Path, mine: Callable[[Path], bool] = lambda there: False) -> Path:
    """x.png, x-2.png, x-3.png, ...: the first where nothing is yet, or what is `mine`. Nothing is overwritten."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2)))
    return next(each for each in names if not os.path.lexists(each) or mine(each))


def note(path: Path | None, text: str) -> None:
    """Write a text file, if one was asked for."""
    if path:
        write_text(path, text)
        print(f"wrote   {path}")


def command(*words: object) -> str:
    """A command to copy into a shell: `words` after `python cpe.py`, quoted where they need it."""
    return shlex.join(["python", "cpe.py", *map(str, words)])


# --- Progress ----------------------------------------------------------------------------------------------------


def bar(steps: Iterable, total: int = 0, text: str = "", done: int = 0, quiet: bool = False) -> Iterator:
    """Steps behind a progress bar (`quiet`: without it), `done` of the `total`, those of a list, made before.

    After the first few it is said how long all of them take, unless that is short. One bar for all of torchrun's, none
    for a single step or for nothing.
    """
    often = 0.1 if sys.stderr is None or sys.stderr.isatty() else 5.0  # a log is not to be filled with it
    other = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0"
    quiet, total = quiet or other or sys.stderr is None, total or len(steps)
    with tqdm(steps, text, total, False, initial=done, mininterval=often, disable=quiet or total <= 1) as progress:
        for number, step in enumerate(progress):
            if number == 0:  # it warms up, and is not measured
                begun = time.perf_counter()
            elif number == 3 and (seconds := (time.perf_counter() - begun) / 3 * (total - done)) >= 10:
                tqdm.write(f"time    {text}: about {duration(seconds)} ({total - done:,} steps)", file=sys.stdout)
            yield step


def duration(seconds: float) -> str:
    """A time as people say it; 1 s at least."""
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
