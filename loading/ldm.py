"""The original layout: a whole model in one file, its tensors named as in the code of Rombach et al. 2022 (LDM).

The original numbers all blocks of one half of the U in a row, and the decoder's levels from the image down.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from loading.configs import SETTINGS

PREFIXES = {
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
# What a one-file checkpoint also holds and inference does not need: the schedule, training's leftovers, the schedule
# once more as k-diffusion wraps it, the words of textual inversion, which no tokenizer here knows.
IGNORED = re.compile(
    r"model_ema\.|first_stage_model\.loss\.|denoiser\.|embedding_manager\.|"
    r"cond_stage_model\.(logit_scale|text_projection|transformer\.(text_model\.)?embeddings\.position_ids|"
    r"transformer\.text_projection)|"
    r"(betas|alphas_cumprod|log_one_minus|sqrt_|posterior_|logvar|lvlb_weights)"
)
NAMES: dict[str, dict[str, str]] = SETTINGS["ldm names"]  # parts of our names, and what stands for them, in turn


def replace_all(name: str, table: Mapping[str, str]) -> str:
    """The name with every entry of the table replaced."""
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def unet_name(name: str, config: dict[str, Any]) -> str:
    """The original layout's name of a U-Net tensor, from diffusers' name and the U-Net's config.json."""
    if ".resnets." in name:
        name = replace_all(name, NAMES["resnet"])
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not match:
        return replace_all(name, NAMES["unet"])
    half, level, kind, layer, rest = match.groups()
    # layers_per_block layers and a change of resolution make a level; going down, conv_in is block 0.
    layers = config["layers_per_block"]
    first = int(level) * (layers + 1) + (half == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # in the block of the last layer, behind its attention if it has one
        slot = 2 if config["up_block_types"][int(level)].startswith("CrossAttn") else 1
        return f"output_blocks.{first + layers}.{slot}.{rest}"
    block = f"{'input' if half == 'down' else 'output'}_blocks.{first + int(layer)}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_name(name: str, config: dict[str, Any]) -> str:
    last = len(config["block_out_channels"]) - 1
    name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up_blocks.{last - int(m[1])}", name)
    return replace_all(name, NAMES["vae"])


def ldm_names(part: str, config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The original name of every tensor of a part, by ours."""
    original = {"unet": unet_name, "vae": vae_name}.get(part, lambda name, _: name)
    return {name: PREFIXES[part] + original(name, config) for name in names}


def to_ldm(part: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of text_encoder, unet or vae as the original layout has them: the VAE's attention as convolutions."""
    names = ldm_names(part, config, tensors)
    convolutions = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
    return {
        names[name]: tensor[:, :, None, None] if convolutions.search(names[name]) else tensor
        for name, tensor in tensors.items()
    }
