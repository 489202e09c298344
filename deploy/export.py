"""Export: a model, erased or not, as one file in the original layout, which ComfyUI, A1111 and others open.

export(model, Path("erased.safetensors"))       # baked, or with edited weights: gates are no part of a model
"""

from pathlib import Path

import torch

from loading.files import UserError, save_tensors
from loading.ldm import to_ldm
from weights import Model


def export(model: Model, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write text encoder, U-Net and autoencoder into one file; UserError when a number is too large for `dtype`."""
    tensors = {}
    for part in ("text_encoder", "unet", "vae"):
        for name, tensor in to_ldm(part, model.part(part).config, getattr(model, part).state_dict()).items():
            tensors[name] = tensor.to(dtype)
            if not tensors[name].isfinite().all():
                raise UserError(f"{name} of {model.name} has numbers too large for {dtype}: write a folder instead.")
    save_tensors(path, tensors)
