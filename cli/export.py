"""export: a model as one file in the original layout, for ComfyUI, A1111 and others (deploy/export.py).

Gates are no part of a model: `bake` them first, into a folder that is exported here, or straight into one file.
"""

import argparse
import os
from pathlib import Path

import torch

from cli.common import command, open_model
from deploy.export import export
from loading.files import UserError, check_writable


def run(args: argparse.Namespace) -> str | None:
    """`export`. UserError where gates are given, or --out is no name of a new safetensors file."""
    if args.gates or args.texts:
        how = command("bake", *args.gates, "--out", args.out or "erased.safetensors")
        raise UserError(f"export writes a model, and gates are no part of one: {how} writes one without the target.")
    if args.model is None:
        raise UserError("which model? Say --model FOLDER, as `bake` has written it.")
    out = args.out or Path(f"{Path(args.model).name}.safetensors")
    if out.suffix != ".safetensors" or os.path.lexists(out):
        raise UserError(f"--out: {out}: give the name of a new file that ends in .safetensors.")
    check_writable(out)
    model = open_model(args, ("text_encoder", "unet", "vae"))
    export(model, out, torch.float16)
    print(f"wrote   {out} ({out.stat().st_size / 2**20:.0f} MB, float16): text encoder, U-Net and autoencoder")
    return None
