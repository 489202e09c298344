"""demo: erase one thing from the embedded model, show twelve pictures, count what CLIP sees in four times as many."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

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

    cases = pictures(target, model)
    texts = [text for _, text, _ in cases for _ in range(SEEDS)]
    args.before_after = True
    rows = drawn(model, texts, range(args.seed, args.seed + len(texts)), gates, args, "")
    print_table(cases, rows, model)
    prompts = [text for _, text, _ in cases]
    failed = inspect.say([file], prompts, model)
    said = {"model": args.model, "prompt": prompts[0], "prompts": prompts}
    save(sheet({name: images[::SEEDS] for name, images in rows.items()}, prompts), out, said)
    return command("inspect", file.path, [*failed, cases[3][1]][0])


def pictures(target: str, model: Model) -> list[tuple[str, str, str]]:
    """Twelve (group, prompt, the thing in it that is looked for)."""
    every = replace(PRESETS["emoji"], nearest=1000)
    things = nearest_words(every, read_prompts("emoji"), [target], partial(cached_contexts, model))
    beside = [written(line, target).replace("{other}", "{}") for line in sentences("emoji", "beside")[:2]]
    lines = {
        "captions": ["a picture of a {}", "{} emoji, noto style", "a {} on a blue background"],
        "sentences": sentences("emoji", "held-out")[:3],
        "beside another": [written(line, things[-1]) for line in beside],
    }
    cases = [(group, written(line, target), target) for group, some in lines.items() for line in some]
    near = [("neighbours", written("a picture of a {}", thing), thing) for thing in things[:4]]
    return cases + near


def print_table(cases: list[tuple[str, str, str]], rows: dict[str, Tensor], model: Model) -> None:
    """What CLIP sees: the share of pictures in which the thing is recognised, before and after."""
    see = eyes(model)
    seen = [see(images) for images in rows.values()]
    wanted = [(group, thing) for group, _, thing in cases for _ in range(SEEDS)]
    print(f"\n{'recognised by CLIP':34}{'before':>8}{'after':>8}  the pictures")
    for group in dict.fromkeys(group for group, _, _ in cases):
        mine = [i for i, (of_group, _) in enumerate(wanted) if of_group == group]
        before, after = (sum(found[i] == wanted[i][1] for i in mine) / len(mine) for found in seen)
        what = f"{group}: {'themselves' if group == 'neighbours' else 'the erased thing'}"
        said = change(rows["before"][mine], rows["after"][mine]) if before else "CLIP saw it in none of them before"
        print(f"{what:34}{before:8.0%}{after:8.0%}  {said}")
