"""Checking config.json files: the architecture is read from them, never guessed.

    config = check_config(read_json(path), UNet, path)        # UserError names the file and the key
    config = check_schedule(read_json(path), path)

Sizes must be there and sensible; a setting of which only one value is implemented must have it; any other must be known
to change nothing here. settings.json lists both. Where diffusers' pipeline overrules a file, so do we, with a warning.
"""

import json
import math
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from clip import CLIP, TextEncoder
from loading.files import UserError
from sampler import Schedule
from unet import UNet
from vae import VAE

Config = dict[str, Any]

SETTINGS = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))
# Stable Diffusion 1.4's own config.json files, for checkpoints that come as one file without any.
SD14_CONFIGS: dict[str, Config] = SETTINGS["stable diffusion 1.4"]
FIXED: dict[str, dict[str, list]] = SETTINGS["fixed"]  # setting: the values that are implemented; one if it is absent
FIXED["TextEncoder"] = FIXED["CLIP"]  # of each of CLIP's towers
HARMLESS: dict[str, list[str]] = SETTINGS["harmless"]  # of diffusers, of transformers, of other solvers

# Sizes a config.json must state, as positive integers or lists of them, and what they must be divisible by.
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TOWERS = {"text_config": (*TOWER, "vocab_size"), "vision_config": (*TOWER, "image_size", "patch_size")}
BLOCKS = ("in_channels", "out_channels", "layers_per_block", "block_out_channels", "norm_num_groups")
SIZES: dict[type, tuple[str, ...]] = {
    TextEncoder: TOWERS["text_config"],
    UNet: (*BLOCKS, "cross_attention_dim", "sample_size", "attention_head_dim"),
    VAE: (*BLOCKS, "latent_channels"),
    CLIP: ("projection_dim",),
}
DIVISIBLE = {
    "block_out_channels": ("norm_num_groups", "attention_head_dim"),
    "hidden_size": ("num_attention_heads",),
    "image_size": ("patch_size",),
}
OPTIONAL = ("max_position_embeddings", "num_channels")  # sizes that a config may leave out
DEFAULTS: dict[type, Config] = {UNet: {"norm_num_groups": 32}, VAE: {"norm_num_groups": 32}}  # as diffusers' are

# What the config of a scheduler must say, as the defaults of the classes differ, and are not SD's.
NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
# What diffusers' pipeline of Stable Diffusion sets, whatever the file says.
OVERRULED = {"clip_sample": False, "steps_offset": 1}


def check_sizes(config: Config, keys: Sequence[str], path: Path) -> None:
    """UserError unless every key is a sensible size, and widths divide into their heads and groups."""
    for key in (*keys, *(key for key in OPTIONAL if key in config)):
        if key not in config:
            raise UserError(f"{path} does not say {key}: it is not the config.json of this network, or not a whole one")
        value = config[key]
        sizes = value if isinstance(value, list) and key.startswith("block_") else [value]
        limit = 64 if "layers" in key else 1_000_000  # ten times what any model has: building it stays cheap
        if not 0 < len(sizes) <= 8 or any(type(size) is not int or not 0 < size <= limit for size in sizes):
            raise UserError(f"{path}: {key} is {value!r}, where a positive integer is needed: such a model is unknown")
        for divisor in DIVISIBLE.get(key, ()):
            if divisor in keys and type(config.get(divisor)) is int and config[divisor] > 0:
                for size in (size for size in sizes if size % config[divisor]):
                    raise UserError(f"{path}: {key} {size} is not divisible by {divisor} {config[divisor]}")


def differing(config: Config, fixed: dict[str, list]) -> dict[str, tuple[Any, list]]:
    """The settings whose value is none of those in `fixed`: (value, allowed) by name."""
    found = {}
    for key in fixed.keys() & config.keys():
        value, allowed = config[key], fixed[key]
        if value is None and False in allowed:  # as diffusers' converter writes it
            continue
        wrong = [v for v in (value if isinstance(value, list) and value else [value]) if v not in allowed]
        if wrong:
            found[key] = wrong[0], allowed
    return dict(sorted(found.items()))


def check_settings(config: Config, fixed: dict[str, list], known: Collection[str], path: Path) -> None:
    """UserError for a value that is not implemented, and for a key that nobody knows, unless it is null.

    What a newer library has added may change the model.
    """
    for key, (value, allowed) in differing(config, fixed).items():
        only = " or ".join(map(json.dumps, allowed))
        raise UserError(f"{path}: {key} is {json.dumps(value)}, and only {only} is implemented")
    for key, value in config.items():
        if key not in fixed and key not in known and not key.startswith("_") and value is not None:
            raise UserError(f"{path}: {key} is {json.dumps(value)}, a setting that is not implemented")


def check_towers(config: Config, path: Path) -> None:
    """UserError unless the config of a CLIP describes two towers that we can build."""
    for tower, sizes in TOWERS.items():
        part, again = config.get(tower), config.get(f"{tower}_dict") or {}  # old files say some of it twice
        if not isinstance(part, dict):
            raise UserError(f"{path} has no {tower}: give the folder of a CLIP model with both towers")
        if not isinstance(again, dict) or any(part.get(key, value) != value for key, value in again.items()):
            raise UserError(f"{path}: {tower}_dict says something else than {tower}: get the file again")
        check_sizes(part, sizes, path)
        check_settings(again | part, FIXED["CLIP"], {*sizes, *OPTIONAL, *HARMLESS["transformers"]}, path)


def check_levels(config: Config, build: type, path: Path) -> Config:
    """The config of a U-Net or an autoencoder; UserError unless its levels fit its widths and its sample_size."""
    lists = [config.get(key) for key in ("block_out_channels", "down_block_types", "up_block_types")]
    if any(not isinstance(each, list) for each in lists) or len({len(each) for each in lists}) > 1:
        raise UserError(f"{path}: block_out_channels, down_block_types, up_block_types must be equally long lists")
    if build is not UNet:
        return config
    size, halvings, width = config["sample_size"], len(lists[0]) - 1, lists[0][0]
    if size % 2**halvings or width % 2:
        odd = f"sample_size {size} cannot be halved {halvings} times, or block_out_channels begins with an odd number"
        raise UserError(f"{path}: {odd}: {width}")
    if size < 64 and re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version"))):
        said = f"{path}: sample_size is {size}, of a diffusers before 0.9: images are drawn at 64 x 64 latents"
        warnings.warn(f"{said}, as diffusers does", stacklevel=2)
        return config | {"sample_size": 64}
    return config


def check_config(config: Config, build: type, path: Path) -> Config:
    """The config of a network with its defaults filled in; UserError names file and key if we cannot build it."""
    if build is CLIP:
        check_towers(config, path)
    config = DEFAULTS.get(build, {}) | config
    check_sizes(config, SIZES[build], path)
    for key in ("scaling_factor", "logit_scale_init_value"):
        if key in config and not (type(config[key]) in (int, float) and 0 < config[key] < math.inf):
            raise UserError(f"{path}: {key} is {config[key]!r}, where a positive number is needed")
    diffusers = build in (UNet, VAE)
    known = {*SIZES[build], *HARMLESS["diffusers" if diffusers else "transformers"]}
    check_settings(config, FIXED[build.__name__] if build is not CLIP else {}, known, path)
    return check_levels(config, build, path) if diffusers else config


def check_agreement(configs: dict[str, Config], name: str) -> None:
    """UserError unless the parts of a model, by their configs, fit together."""
    for one, key, other, other_key in (
        ("unet", "cross_attention_dim", "text_encoder", "hidden_size"),
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "out_channels", "vae", "latent_channels"),
    ):
        if one in configs and other in configs and configs[one][key] != configs[other][other_key]:
            values = f"{key} is {configs[one][key]}, {other_key} is {configs[other][other_key]}"
            raise UserError(f"{name}: {one} and {other} do not fit together: {values}")


def check_schedule(config: Config, path: Path) -> Config:
    """The config of a scheduler as diffusers' pipeline takes it; UserError unless it is of a noise that we have.

    Which solver the file is of does not matter, as we have our own; a warning says where that makes a difference.
    """
    for key in NOISE:
        if key not in config:
            raise UserError(f"{path} does not say {key}: it is not the config of a scheduler, or not a whole one")
    check_settings(config, FIXED["noise"], {*NOISE, *OVERRULED, *FIXED["steps"], *HARMLESS["solvers"]}, path)
    check_sizes(config, ("num_train_timesteps",), path)
    ends_clean = str(config.get("_class_name")).startswith(("DDIM", "LCM"))  # where the classes' defaults differ
    config = OVERRULED | {"set_alpha_to_one": ends_clean} | config
    if type(config["set_alpha_to_one"]) is not bool:
        raise UserError(f"{path}: set_alpha_to_one is {config['set_alpha_to_one']!r}, not true or false")
    betas = (config["beta_start"], config["beta_end"])
    if any(type(beta) not in (int, float) for beta in betas) or not 0 < betas[0] < betas[1] < 1:
        raise UserError(f"{path}: beta_start and beta_end are {betas[0]!r} and {betas[1]!r}, not 0 < start < end < 1")
    alphas = torch.cat([torch.ones(1), Schedule(config).alphas_cumprod])
    if not ((alphas.diff() < 0).all() and alphas[-1] > 0):
        raise UserError(f"{path}: with these betas, a step adds no noise at all, or the last leaves no image at all")
    for key, (value, allowed) in differing(config, {key: [value] for key, value in OVERRULED.items()}).items():
        said = f"{path}: {key} is {json.dumps(value)}, but {json.dumps(allowed[0])} is used, as in diffusers' pipeline"
        warnings.warn(said, stacklevel=2)
    if other := differing(config, FIXED["steps"]):
        said = ", ".join(f"{key} {json.dumps(value)}" for key, (value, _) in other.items())
        warnings.warn(f"{path}: {said}: another sampler's way; images are drawn with the --sampler's own", stacklevel=2)
    return config | OVERRULED
