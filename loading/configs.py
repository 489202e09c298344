"""Checking config.json files: the architecture is read from them, never guessed.

    config = check_config(read_json(path), UNet, path)        # UserError names the file and the key
    config = check_schedule(read_json(path), path)

Sizes must be there and sensible; settings with one implemented value (`FIXED` of a network) must have it; any other
setting must be known to change nothing here. Where diffusers' pipeline overrules a file, so do we, with a warning.
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

# Stable Diffusion 1.4's own config.json files, for checkpoints that come as one file without any.
SD14_CONFIGS: dict[str, Config] = {
    "text_encoder": {
        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 77,
        "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408,
    },
    "unet": {
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "in_channels": 4, "layers_per_block": 2,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
        "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
        "scaling_factor": 0.18215, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler": {
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
    },
}  # fmt: skip

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

# What a config may say that changes nothing here: of diffusers,
DIFFUSERS = {"addition_embed_type_num_heads", "force_upcast", "sample_size", "scaling_factor"}
# and of transformers, whose older versions wrote every setting of every model into each.
TRANSFORMERS = set(
    """
    add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty logit_scale_init_value max_length max_position_embeddings min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type projection_dim pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature text_config text_config_dict tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache vision_config vision_config_dict
    """.split()  # noqa: SIM905
)
HARMLESS = {TextEncoder: TRANSFORMERS, UNet: DIFFUSERS, VAE: DIFFUSERS, CLIP: TRANSFORMERS}

# What the config of a scheduler must say, as the defaults of the classes differ, and are not SD's.
NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
# What else it may say of the noise; a key that is absent has this value.
FIXED_NOISE = {
    "beta_schedule": "scaled_linear", "predict_epsilon": True, "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False, "timestep_type": "discrete", "trained_betas": None, "use_flow_sigmas": False,
    "variance_type": (None, "fixed_large", "fixed_small"),  # not a U-Net that predicts it
}  # fmt: skip
# What diffusers' pipeline of Stable Diffusion sets, whatever the file says.
OVERRULED = {"clip_sample": False, "steps_offset": 1}
# Where steps lie and how they are made: our samplers have their own way, so another value is worth a warning only.
STEPS = {
    "original_inference_steps": None, "sigma_max": None, "sigma_min": None, "thresholding": False,
    "timestep_spacing": ("leading", "linspace"), "use_beta_sigmas": False, "use_exponential_sigmas": False,
    "use_karras_sigmas": False, "use_lu_lambdas": False,
}  # fmt: skip
# What only another solver obeys.
SOLVERS = set(
    """
    algorithm_type clip_sample_range corrector_order denoise_final disable_corrector dynamic_thresholding_ratio
    euler_at_final final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final
    noise_sampler_seed predict_x0 predictor_order sample_max_value set_alpha_to_one shift_terminal skip_prk_steps
    solver_order solver_p solver_type tau_func tensor_format time_shift_type timestep_scaling timestep_values
    use_dynamic_shifting
    """.split()  # noqa: SIM905
)


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


def differing(config: Config, fixed: Config) -> dict[str, tuple[Any, tuple]]:
    """The settings that have another value than the one of `fixed`, or than all of its tuple: (value, allowed)."""
    found = {}
    for key in fixed.keys() & config.keys():
        value, allowed = config[key], fixed[key] if isinstance(fixed[key], tuple) else (fixed[key],)
        if value is None and False in allowed:  # as diffusers' converter writes it
            continue
        wrong = [v for v in (value if isinstance(value, list) and value else [value]) if v not in allowed]
        if wrong:
            found[key] = wrong[0], allowed
    return dict(sorted(found.items()))


def check_settings(config: Config, fixed: Config, known: Collection[str], path: Path) -> None:
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
        check_settings(again | part, CLIP.FIXED, {*sizes, *OPTIONAL, *TRANSFORMERS}, path)


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
    check_settings(config, build.FIXED if build is not CLIP else {}, {*SIZES[build], *HARMLESS[build]}, path)
    return check_levels(config, build, path) if build in (UNet, VAE) else config


def check_schedule(config: Config, path: Path) -> Config:
    """The config of a scheduler as diffusers' pipeline takes it; UserError unless it is of a noise that we have.

    Which solver the file is of does not matter, as we have our own; a warning says where that makes a difference.
    """
    for key in NOISE:
        if key not in config:
            raise UserError(f"{path} does not say {key}: it is not the config of a scheduler, or not a whole one")
    check_settings(config, FIXED_NOISE, {*NOISE, *OVERRULED, *STEPS, *SOLVERS}, path)
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
    for key, (value, allowed) in differing(config, OVERRULED).items():
        said = f"{path}: {key} is {json.dumps(value)}, but {json.dumps(allowed[0])} is used, as in diffusers' pipeline"
        warnings.warn(said, stacklevel=2)
    if other := differing(config, STEPS):
        said = ", ".join(f"{key} {json.dumps(value)}" for key, (value, _) in other.items())
        warnings.warn(f"{path}: {said}: another sampler's way; images are drawn with the --sampler's own", stacklevel=2)
    return config | OVERRULED
