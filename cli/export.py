"""export: a model, baked ones above all, as one file in the original layout for other programs (deploy/export.py)."""

import argparse
from pathlib import Path

import torch

from cli.common import command, free, metadata_of, open_model
from deploy.export import export
from loading.files import UserError, check_writable


def run(args: argparse.Namespace) -> None:
    """`export`. UserError where gates are given, or --out is no name of a new safetensors file."""
    if gates := [path for path in args.gates if metadata_of(path).keys() & {"target", "prompts"}]:
        how = command("bake", *gates, "--out", args.out or "erased.safetensors")
        raise UserError(f"export writes a model, and gates are no part of one: {how} writes one without the target.")
    models = [*([args.model] if args.model else []), *args.models, *map(str, args.gates)]
    if len(models) != 1:
        raise UserError(f"one model is exported, not {len(models)}: {command('export', 'models/red-heart')}, say.")
    (args.model,) = models
    out = args.out or free(Path("models") / f"{Path(args.model).stem}-{args.dtype}.safetensors")
    if out.suffix != ".safetensors" or out.exists():
        raise UserError(f"--out: {out}: give the name of a new file that ends in .safetensors.")
    check_writable(out)
    dtype, args.dtype = getattr(torch, args.dtype), "float32"  # that of the file, and that of the model in memory
    export(open_model(args, ("text_encoder", "unet", "vae")), out, dtype)
    size = f"{out.stat().st_size / 2**20:.0f} MB, {str(dtype).removeprefix('torch.')}"
    print(f"wrote   {out} ({size}): text encoder, U-Net and autoencoder")
