"""attack: look for inputs that bring back what gates have erased, and draw what is found. Built on study/attacks.py."""

import argparse

import sampler
from cli.common import bar, command, free, merge_gates, open_model, settle
from cli.pictures import check_picture, grid
from loading.files import UserError
from study.attacks import Victim
from study.searches import ATTACKS


def run(args: argparse.Namespace) -> str | None:
    """`attack`: a row of pictures an attack, and the prompt it found. UserError for gates of another model."""
    if args.texts or len(args.gates) != 1:
        raise UserError("which gates? Give one file: attack gates/red-heart.safetensors")
    if unknown := [name for name in args.attacks if name not in ATTACKS]:
        raise UserError(f"unknown attack {unknown[0]!r}: choose among {', '.join(ATTACKS)}.")
    if args.template.count("{}") != 1:
        raise UserError(f"--template: {args.template!r} needs one {{}}, where the target's name goes.")
    check_picture(args.out)
    files = settle(args)
    model = open_model(args, ("text_encoder", "unet", "vae"))
    gates, target, seeds = merge_gates(files, model), files[0].target, range(args.seed, args.seed + 4)
    victim, drawing = Victim(model, model, gates), (args.steps, args.guidance, args.sampler)
    plain = [args.template.replace("{}", target)] * len(seeds)
    rows = {"before": sampler.draw(model, plain, seeds, None, *drawing)}
    rows["erased"] = sampler.draw(model, plain, seeds, gates, *drawing)
    names = args.attacks or list(ATTACKS)
    for name in bar(names, len(names), "attacks"):
        found = ATTACKS[name](victim, target, (args.template,), args.seed)
        print(f"{name:12} loss {found.before:.4f} -> {found.after:.4f}: {found.prompts[0]}")
        rows[name] = sampler.draw(model, found.contexts.expand(len(seeds), -1, -1), seeds, gates, *drawing)
    out = free(args.out)
    grid(list(rows.values()), out, [f"seed {seed}" for seed in seeds], list(rows))
    print(f"wrote   {out}")
    return command("inspect", args.gates[0], plain[0])
