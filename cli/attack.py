"""attack: look for inputs that bring back what gates have erased, and draw what is found. Built on study/attacks.py."""

import argparse
import time

import torch

import sampler
from cli.common import command, free, merge_gates, open_model, settle, spoken
from cli.pictures import check_picture, grid
from loading.files import UserError
from study.attacks import Victim
from study.searches import ATTACKS

SEEDS = 4  # pictures of each attack
# What an attack takes with its defaults, in predictions of the U-Net for one row; measured on the embedded model.
ROWS = {"embeddings": 450, "inversion": 700, "tokens": 820, "P4D": 820, "Ring-A-Bell": 220}


def run(args: argparse.Namespace) -> str | None:
    """`attack`: a row of pictures an attack, and the prompt it found. UserError for gates of another model."""
    if len(args.gates) != 1:
        raise UserError("one gate file is attacked at a time: give one.")
    if unknown := [name for name in args.attacks if name not in ATTACKS]:
        raise UserError(f"unknown attack {unknown[0]!r}: choose among {', '.join(ATTACKS)}.")
    if args.template.count("{}") != 1:
        raise UserError(f"--template: {args.template!r} needs one {{}}, where the target's name goes.")
    check_picture(args.out)
    files = settle(args)
    model = open_model(args, ("text_encoder", "unet", "vae"))
    gates, target, seeds = merge_gates(files, model), files[0].target, range(args.seed, args.seed + SEEDS)
    victim, drawing = Victim(model, model, gates), (args.steps, args.guidance, args.sampler)
    names, plain = args.attacks or list(ATTACKS), [args.template.replace("{}", target)] * SEEDS
    predictions = sum(ROWS[name] for name in names) + (2 + len(names)) * SEEDS * args.steps * 2
    print(f"time    attacks and pictures: about {spoken(predictions * seconds(victim, plain))}", flush=True)
    rows = {"before": sampler.draw(model, plain, seeds, None, *drawing)}
    rows["erased"] = sampler.draw(model, plain, seeds, gates, *drawing)
    for name in names:
        found = ATTACKS[name](victim, target, (args.template,), args.seed)
        print(f"{name:12} loss {found.before:.4f} -> {found.after:.4f}: {found.prompts[0]}", flush=True)
        rows[name] = sampler.draw(model, found.contexts.expand(SEEDS, -1, -1), seeds, gates, *drawing)
    out = free(args.out)
    grid(list(rows.values()), out, [f"seed {seed}" for seed in seeds], list(rows))
    print(f"wrote   {out}")
    return command("inspect", args.gates[0], plain[0])


@torch.no_grad()
def seconds(victim: Victim, prompts: list[str]) -> float:
    """What one prediction of the U-Net takes, measured on some at once, the second time: the first warms up."""
    E, config = victim.original.encode(prompts), victim.original.unet.config
    latents = E.new_zeros(len(E), config["in_channels"], config["sample_size"], config["sample_size"])
    timesteps = torch.full((len(E),), 500, device=E.device)
    for _ in range(2):
        begun = time.perf_counter()
        victim.noise(latents, timesteps, E)
    return (time.perf_counter() - begun) / len(E)
