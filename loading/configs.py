"""Checking config.json files: the architecture is read from them, never guessed.

Sizes must be there and sensible; a setting of which only some values are implemented must have one of them; any other
must be known to change nothing here. settings.json lists all three. Where diffusers' pipeline overrules a file, so do
we, with a warning.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

from clip import CLIP
from loading.files import UserError
from unet import UNet
from vae import VAE

Config = dict[str, Any]

SETTINGS = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))
# Stable Diffusion 1.4's own config.json files, for checkpoints that come as one file without any.
SD14_CONFIGS: dict[str, Config] = SETTINGS["stable diffusion 1.4"]
SIZES: dict[str, list[str]] = SETTINGS["sizes"]  # what a config must state; lists of them where blocks are meant
FIXED: dict[str, dict[str, list]] = SETTINGS["fixed"]  # setting: the values that are implemented; one if it is absent
HARMLESS: dict[str, list[str]] = SETTINGS["harmless"]
# What diffusers' pipeline of Stable Diffusion sets, whatever the file says.
OVERRULED = {"clip_sample": False, "steps_offset": 1}


def differing(config: Config, fixed: dict[str, list]) -> dict[str, Any]:
    """The settings whose value, or one in whose list, is none of those in `fixed`: that value by name."""
    found = {}
    for key in sorted(fixed.keys() & config.keys()):
        value = config[key]
        if value is None and False in fixed[key]:  # as diffusers' converter writes it
            continue
        for each in value if isinstance(value, list) and value else [value]:
            if each not in fixed[key]:
                found[key] = each
    return found


def check(config: Config, kind: str, library: str, path: Path) -> None:
    """UserError unless all sizes of this kind of network are there, and all other settings known and implemented.

    A setting that nobody knows may be one that a newer `library` has added, and that changes the model.
    """
    for key in SIZES[kind]:
        if key not in config:
            raise UserError(f"{path} does not say {key}: it is not the config.json of this network, or not a whole one")
        value, limit = config[key], 64 if "layers" in key else 1_000_000  # ten times what any model has
        sizes = value if key.startswith("block_") else [value]
        known = isinstance(sizes, list) and 0 < len(sizes) <= 8
        if not known or any(type(size) is not int or not 0 < size <= limit for size in sizes):
            raise UserError(f"{path}: {key} is {json.dumps(value)}, where positive integers are needed: unknown model")
    for key, value in differing(config, FIXED[kind]).items():
        only = " or ".join(map(json.dumps, FIXED[kind][key]))
        raise UserError(f"{path}: {key} is {json.dumps(value)}, and only {only} is implemented")
    known = {*SIZES[kind], *FIXED[kind], *HARMLESS[library]}
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise UserError(f"{path}: {key} is {json.dumps(value)}, a setting that is not implemented")


def check_config(config: Config, build: type, path: Path) -> Config:
    """The config of a network with its defaults filled in; UserError names file and key if we cannot build it."""
    if build is CLIP:
        for tower in ("text_config", "vision_config"):
            part, again = config.get(tower), config.get(f"{tower}_dict") or {}
            if not isinstance(part, dict) or not isinstance(again, dict):
                raise UserError(f"{path} has no {tower}: give the folder of a CLIP model with both towers")
            config = config | {tower: part | again}  # old files say some of it twice; transformers obeys the latter
            check(config[tower], tower, "transformers", path)
    diffusers = build in (UNet, VAE)
    config = {"norm_num_groups": 32} | config if diffusers else config  # diffusers' default
    check(config, build.__name__, "diffusers" if diffusers else "transformers", path)
    size = config.get("sample_size")
    if build is UNet and size < 64 and re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version"))):
        said = f"{path}: sample_size is {size}, of a diffusers before 0.9: images are drawn at 64 x 64 latents"
        warnings.warn(f"{said}, as diffusers does", stacklevel=2)
        return config | {"sample_size": 64}
    return config


def check_agreement(configs: dict[str, Config], name: str) -> None:
    """UserError unless the parts of a model, by their configs, fit together."""
    unet = configs.get("unet")
    for key, other, other_key in (
        ("cross_attention_dim", "text_encoder", "hidden_size"),
        ("in_channels", "vae", "latent_channels"),
        ("out_channels", "vae", "latent_channels"),
    ):
        if unet and other in configs and unet[key] != configs[other][other_key]:
            values = f"{key} is {unet[key]}, {other_key} is {configs[other][other_key]}"
            raise UserError(f"{name}: unet and {other} do not fit together: {values}")


def check_schedule(config: Config, path: Path) -> Config:
    """The config of a scheduler as diffusers' pipeline takes it; UserError unless it is of a noise that we have.

    Which solver the file is of does not matter, as we have our own; a warning says where that makes a difference.
    """
    check({"beta_schedule": "linear"} | config, "scheduler", "solvers", path)  # diffusers' default
    start, end = config.get("beta_start"), config.get("beta_end")
    if any(type(beta) not in (int, float) for beta in (start, end)) or not 0 < start < end < 1:
        raise UserError(f"{path}: beta_start and beta_end are {start!r} and {end!r}, not 0 < start < end < 1")
    ends_clean = str(config.get("_class_name")).startswith(("DDIM", "LCM"))  # where the classes' defaults differ
    for key, value in differing(config, {key: [value] for key, value in OVERRULED.items()}).items():
        used = f"{json.dumps(OVERRULED[key])} is used, as in diffusers' pipeline"
        warnings.warn(f"{path}: {key} is {json.dumps(value)}, but {used}", stacklevel=2)
    if other := differing(config, SETTINGS["steps"]):
        said = ", ".join(f"{key} {json.dumps(value)}" for key, value in other.items())
        warnings.warn(f"{path}: {said}: another sampler's way; images are drawn with the --sampler's own", stacklevel=2)
    return {"set_alpha_to_one": ends_clean} | config | OVERRULED
