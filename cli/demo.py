"""demo: erase one thing from the embedded model, and look: captions, sentences, two things in one picture, neighbours.

It shows twelve pictures before and after, and counts what CLIP sees in four times as many.
"""

import argparse
from pathlib import Path

import torch

from cli import options, train
from cli.check import of_file
from cli.common import check_out, command, defaults_of, free, is_emoji, merge_gates, numbered, read_gates, slug
from cli.generate import check_sampling, draw, say_openings
from cli.pictures import change, check_picture, grid
from cli.targets import nearest, split, target_of
from loading.files import UserError
from loading.prompts import normalised, read_prompts
from study import evaluate

SEEDS = 4  # pictures of every prompt that are judged


def run(args: argparse.Namespace) -> str | None:
    """`demo`: UserError for a target that is none of the embedded model's things, or as for `train`."""
    args.model = args.model or "emoji"
    if not is_emoji(args.model):
        raise UserError("the demo is of the embedded model: leave --model out.")
    for name, value in defaults_of(args.model).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    names = split(args.targets or ["red heart"], args.model)
    things = {normalised(thing): thing for thing in read_prompts("emoji").domain}
    if len(names) > 1 or normalised(names[0]) not in things:
        raise UserError(f"{', '.join(names)}: the demo erases one thing that the model knows: {command('list')}.")
    target = things[normalised(names[0])]
    out = args.out or Path("images") / f"demo-{slug(target)}.png"
    check_picture(out)
    check_out(out)
    check_sampling(args)
    gate_file, model = train_demo(args, target, out.with_suffix(".safetensors"))
    file = read_gates(gate_file)
    gates = merge_gates([file], model)

    cases = pictures(target, args.model)
    texts = [text for _, text, _ in cases for _ in range(SEEDS)]
    seeds = [args.seed + i for i in range(len(texts))]
    rows = {name: draw(model, texts, seeds, kind, args, name) for name, kind in (("before", None), ("after", gates))}
    print_table(cases, rows, model)
    say_openings(model, gates, [file], [text for group, text, _ in cases if group != "neighbours"])
    out = free(out)
    grid([images[::SEEDS] for images in rows.values()], out, [text for _, text, _ in cases], list(rows))
    print(f"wrote   {out} and {gate_file}")
    return command("inspect", gate_file, cases[3][1])


def train_demo(args: argparse.Namespace, target: str, out: Path) -> tuple[Path, "train.Model"]:
    """The gates of the demo, as `train` makes them; those of an earlier one are used again."""
    asked = options.parse(["train", target, "--model", args.model, "--device", args.device, "--seed", str(args.seed)])
    asked.how = train.how(asked)
    shop = train.Workshop(asked)
    job = train.Job(target_of([target], asked), out, "")
    job.settings = shop.settings(job.target)
    for job.out in numbered(out):
        try:
            train.finish(shop, job)
            return job.out, train.open_model(asked, ("text_encoder", "unet", "vae", "clip"))
        except UserError:
            if not job.out.is_file():  # not one of other settings that is in the way
                raise
    raise AssertionError("numbers do not end")


def pictures(target: str, model: str) -> list[tuple[str, str, str]]:
    """Twelve (group, prompt, the thing in it that is looked for)."""
    things = [thing for thing in nearest(target, model, 9) if normalised(thing) != normalised(target)]
    lines = {
        "captions": ["a picture of a {}", "{} emoji, noto style", "a {} on a blue background"],
        "sentences": of_file("emoji-held-out")[:3],
        "beside another": [line.replace("{other}", things[-1]) for line in of_file("emoji-beside")[:2]],
    }
    cases = [(group, line.replace("{}", target), target) for group, some in lines.items() for line in some]
    near = [("neighbours", f"a picture of a {thing}", thing) for thing in (*things[:3], things[-1])]
    return cases + near


def print_table(cases: list[tuple[str, str, str]], rows: dict[str, torch.Tensor], model: "train.Model") -> None:
    """What CLIP sees: the share of pictures in which the thing is recognised, before and after."""
    concepts = read_prompts("emoji").domain
    features = evaluate.name_features(model.clip, model.tokenizer, concepts)
    seen = {name: evaluate.recognise(model.clip, images, features).tolist() for name, images in rows.items()}
    wanted = [thing for _, _, thing in cases for _ in range(SEEDS)]
    print(f"\n{'recognised by CLIP':24}{'pictures':>9}{'before':>9}{'after':>9}  the pictures")
    for group in dict.fromkeys(group for group, _, _ in cases):
        mine = [i for i in range(len(wanted)) if cases[i // SEEDS][0] == group]
        shares = {name: sum(concepts[found[i]] == wanted[i] for i in mine) / len(mine) for name, found in seen.items()}
        word = change(rows["before"][mine], rows["after"][mine])[1]
        what = "the erased thing" if group != "neighbours" else "themselves"
        print(f"{f'{group}: {what}':32}"[:34] + f"{len(mine):4}{shares['before']:8.0%}{shares['after']:9.0%}  {word}")
