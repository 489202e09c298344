"""demo: erase one thing from the embedded model, show twelve pictures, count what CLIP sees in four times as many."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import cpe
from cli import inspect, train
from cli.common import command, free, is_emoji, merge_gates, open_model, read_gates, settle, slug
from cli.generate import drawn
from cli.options import parse
from cli.pictures import change, check_picture, eyes, save, sheet
from cli.targets import known_as
from loading.cache import cached_contexts
from loading.files import UserError
from loading.prompts import PRESETS, nearest_words, read_prompts, sentences, written
from weights import Model

SEEDS = 4  # pictures of every prompt that are judged
WIDE = (64, 128)  # height and width of a picture of two things
STAYS = {"neighbours": "themselves", "the other of two": "itself"}


def run(args: argparse.Namespace) -> str | None:
    """`demo`: UserError for a target that is none of the embedded model's things, or as for `train`."""
    if not is_emoji(args.model):
        raise UserError("the demo is of the embedded model: leave --model out.")
    settle(args)
    names = args.targets or ["red heart"]
    target = known_as(names[0])
    if len(names) > 1 or target not in read_prompts("emoji").domain:
        raise UserError(f"{', '.join(names)}: the demo erases one thing that the model knows: {command('list')}.")
    out = args.out or Path("images") / f"demo-{slug(target)}.png"
    check_picture(out)
    path = free(out.with_suffix(".safetensors"))
    same = [f"--{name}={getattr(args, name)}" for name in ("model", "device", "seed")]
    train.run(parse(["train", target, "--out", str(path), *same]))
    file = read_gates(path)
    model = open_model(args, ("text_encoder", "unet", "vae", "clip"), [file])
    gates = merge_gates([file], model)

    cases, pairs = pictures(target, model)
    args.before_after = True
    rows = {name: torch.cat([alone, halves(two)]) for (name, alone), two in zip(
        before_after([text for _, text, _ in cases], model, gates, args, None).items(),
        before_after([text for text, *_ in pairs], model, gates, args, WIDE).values(), strict=True)}  # fmt: skip
    for text, *two in pairs:
        cases += [("of two" if thing == target else "the other of two", text, thing) for thing in two]
    print_table(cases, rows, model)
    prompts = [text for _, text, _ in cases]
    failed = inspect.say([file], list(dict.fromkeys(prompts)), model)
    said = {"model": args.model, "prompt": prompts[0], "prompts": prompts}
    columns = ["" if text in prompts[:i] else text for i, text in enumerate(prompts)]
    save(sheet({name: images[::SEEDS] for name, images in rows.items()}, columns), out, said)
    return command("inspect", file.path, [*failed, cases[3][1]][0])


def before_after(texts: list[str], model: Model, gates: cpe.ResAG, args: argparse.Namespace,
                 size: tuple[int, int] | None) -> dict[str, Tensor]:  # fmt: skip
    """SEEDS images of each prompt, "before" and "after", [SEEDS B, 3, H, W] each: those of one follow one another."""
    many = [text for text in texts for _ in range(SEEDS)]
    args.size = size
    return drawn(model, many, range(args.seed, args.seed + len(many)), gates, args, "")


def halves(images: Tensor) -> Tensor:
    """Of wide pictures [SEEDS B, 3, H, 2W], left and right half: SEEDS of each in turn, [2 SEEDS B, 3, H, W]."""
    return images.unflatten(0, (-1, SEEDS)).unflatten(4, (2, -1)).movedim(4, 1).flatten(0, 2)


def pictures(target: str, model: Model) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Ten (group, prompt, the thing in it that is looked for), and two (prompt, left thing, right thing)."""
    every = replace(PRESETS["emoji"], nearest=1000)
    things = nearest_words(every, read_prompts("emoji"), [target], partial(cached_contexts, model, briefly=True))
    lines = {
        "captions": ["a picture of a {}", "{} emoji, noto style", "a {} on a blue background"],
        "sentences": sentences("emoji", "held-out")[:3],
    }
    cases = [(group, written(line, target), target) for group, some in lines.items() for line in some]
    cases += [("neighbours", written("a picture of a {}", thing), thing) for thing in things[:4]]
    orders = zip(sentences("emoji", "beside"), ((target, things[-1]), (things[-2], target)), strict=False)
    return cases, [(written(written(line, a).replace("{other}", "{}"), b), a, b) for line, (a, b) in orders]


def print_table(cases: list[tuple[str, str, str]], rows: dict[str, Tensor], model: Model) -> None:
    """What CLIP sees: the share of pictures in which the thing is recognised, before and after."""
    seen = list(map(eyes(model), rows.values()))
    wanted = [(group, thing) for group, _, thing in cases for _ in range(SEEDS)]
    print(f"\n{'recognised by CLIP':34}{'before':>8}{'after':>8}  the pictures")
    for group in dict.fromkeys(group for group, _, _ in cases):
        mine = [i for i, (of_group, _) in enumerate(wanted) if of_group == group]
        before, after = (sum(found[i] == wanted[i][1] for i in mine) / len(mine) for found in seen)
        what = f"{group}: {STAYS.get(group, 'the erased thing')}"
        said = change(rows["before"][mine], rows["after"][mine]) if before else "CLIP saw it in none of them before"
        print(f"{what:34}{before:8.0%}{after:8.0%}  {said}")
