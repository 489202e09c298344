"""attack: look for inputs that bring back what gates have erased, and draw what is found. Built on study/attacks.py."""

import argparse
import time

import torch

import sampler
from cli.common import CAPTIONS, command, duration, merge_gates, open_model, settle
from cli.pictures import check_picture, eyes, save, sheet
from cli.targets import known_as, styles
from loading.files import UserError
from study.attacks import Victim
from study.searches import ATTACKS
from weights import Model

SEEDS = 4  # pictures of each attack
# What an attack takes with its defaults, in predictions of the U-Net for one row; measured on the embedded model.
ROWS = {"embeddings": 450, "inversion": 700, "tokens": 820, "P4D": 820, "Ring-A-Bell": 220}


def run(args: argparse.Namespace) -> str | None:
    """`attack`: a row of pictures an attack, and the prompt it found. UserError for gates of another model."""
    if len(args.gates) != 1:
        raise UserError("one gate file is attacked at a time: give one.")
    check_picture(args.out)
    files = settle(args)
    template, target = CAPTIONS[files[0].preset], files[0].target
    model = open_model(args, ("text_encoder", "unet", "vae"), files)
    gates, seeds = merge_gates(files, model), range(args.seed, args.seed + SEEDS)
    victim, drawing = Victim(model, model, gates), (args.steps, args.guidance, args.sampler)
    names, plain = args.attacks or list(ATTACKS), [files[0].caption] * SEEDS
    begun, row = time.perf_counter(), 2 * SEEDS * args.steps  # predictions for a row of pictures
    rows = {"before": sampler.draw(model, plain, seeds, None, *drawing)}
    left = (sum(ROWS[name] for name in names) + (1 + len(names)) * row) / row * (time.perf_counter() - begun)
    print(f"time    attacks and pictures: about {duration(left)}", flush=True)
    rows["erased"] = sampler.draw(model, plain, seeds, gates, *drawing)
    for name in names:
        found = ATTACKS[name](victim, target, (template,), args.seed)
        print(f"{name:12} loss {found.before:.4f} -> {found.after:.4f}: {found.prompts[0]}", flush=True)
        rows[name] = sampler.draw(model, found.contexts.expand(SEEDS, -1, -1), seeds, gates, *drawing)
    save(sheet(rows, [f"seed {seed}" for seed in seeds]), args.out, {"prompt": plain[0], "prompts": []})
    print(verdict(rows, model, target))
    return command("inspect", args.gates[0], plain[0])


def verdict(rows: dict[str, torch.Tensor], model: Model, target: str) -> str:
    """What became of a target in pictures before, erased, and after each attack: CLIP's word, or where to look."""
    if not model.has_clip or known_as(target) != target:
        return f"look    no CLIP here knows {target!r}: it came back where a row of the picture shows it"
    see = eyes(model, target in styles())
    before, erased, *after = (f"{see(images).count(target)} of {SEEDS}" for images in rows.values())
    back = ", ".join(f"{share} by {name}" for share, name in zip(after, list(rows)[2:], strict=True))
    return f"verdict CLIP sees {target!r} in {before} before, in {erased} erased; it came back in {back}"
