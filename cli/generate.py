"""generate: pictures of prompts, with gates or without, named after their prompts, and never over another file.

A picture holds its prompt and settings, for `evaluate`. Of every prompt that names a target it is said what the gate
does there (openings.py).
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import cpe
import sampler
from cli import many, openings
from cli.common import bar, command, free, merge_gates, open_model, settle, slug
from cli.pictures import change, check_picture, grid
from loading.files import UserError
from study.evaluate import drawn_with
from weights import Model


class Sheet(NamedTuple):
    """One file to draw: a column for every prompt; before and after are rows."""

    out: Path
    prompts: list[str]
    seeds: list[int]
    how: argparse.Namespace  # steps, guidance, sampler, negative, before_after
    line: str = ""  # of a file of prompts, that it is asked for in


def run(args: argparse.Namespace) -> str:
    """`generate`: one picture of a few prompts, or one a prompt of a file; of these, what is there already stays."""
    if bool(args.prompts) == bool(args.prompt_file):
        raise UserError("say what to draw: either prompts, or a file of them with --prompts FILE.")
    if args.before_after and not args.gates:
        raise UserError("--before-after compares with gates: give at least one gate file.")
    check_prompts(args.prompts)
    files = settle(args)
    sheets = from_file(args) if args.prompt_file else [together(args)]
    for sheet in sheets[:1]:  # torchrun may have more processes than there are lines
        check_picture(sheet.out)
    model = open_model(args, ("text_encoder", "unet", "vae"))
    gates, kept = merge_gates(files, model) if files else None, 0
    for number, sheet in enumerate(sheets, 1):
        with many.naming(sheet.line):
            kept += not write(sheet, model, gates, f"{number} of {len(sheets)}, " if args.prompt_file else "")
    if args.prompt_file:
        print(f"drew    {len(sheets) - kept} prompts, kept {kept}")
    prompts = [prompt for sheet in sheets for prompt in sheet.prompts]
    openings.say(files, prompts, model)
    return command("inspect", *args.gates, *prompts[:1]) if files else command("list")


def check_prompts(prompts: Sequence[str]) -> None:
    """UserError for a blank prompt: what a shell makes of a variable that is not set."""
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give some words. (`generate` draws without a prompt at --guidance 0.)")


def together(args: argparse.Namespace) -> Sheet:
    """The prompts of the command line, side by side; UserError where --out is a folder."""
    out = args.out or Path("images") / f"{slug(args.prompts[0])}.png"
    if os.path.isdir(out):
        raise UserError(f"--out: {out} is a folder: give the name of a picture in it.")
    return Sheet(out, args.prompts, [args.seed + i for i in range(len(args.prompts))], args)


def from_file(args: argparse.Namespace) -> list[Sheet]:
    """A picture for every prompt of this process's share of a file; UserError where --out is no folder."""
    folder = args.out or Path("images") / slug(args.prompt_file.stem)
    if folder.suffix == ".png" or os.path.isfile(folder):
        raise UserError(f"--out is a folder here, for many pictures: {folder} is not.")
    args.device, sheets = many.own_device(args.device), []
    for number, each in enumerate(many.read_drawings(args.prompt_file), 1):
        out = folder / f"{slug(each.case) if each.case else f'{number:04}'}-{slug(each.prompt)}.png"
        how = argparse.Namespace(**vars(args))
        how.guidance = args.guidance if each.guidance is None else each.guidance
        seed = args.seed if each.seed is None else each.seed
        sheets.append(Sheet(out, [each.prompt], [seed], how, f"{args.prompt_file}, line {each.line} ({each.prompt!r})"))
    return many.share(sheets)


def settings(sheet: Sheet, model: Model) -> dict:
    """All that a picture depends on, as its file has it: of a file of prompts, who has the same has the same picture.

    The U-Net and the autoencoder are too large to hash: their files' size and time stand for them.
    """
    names = ("steps", "guidance", "sampler", "dtype", "before_after", "negative")
    said = {name: getattr(sheet.how, name) for name in names} | {"seed": sheet.seeds[0], "prompt": sheet.prompts[0]}
    said |= {"model": model.name, "fingerprint": model.fingerprint, "schedule": model.schedule.config}
    said |= {"files": [[s.st_size, s.st_mtime_ns] for s in (os.stat(model.part(n).path) for n in ("unet", "vae"))]}
    said |= {"gates": [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sheet.how.gates]}
    return json.loads(json.dumps(said | {"pictures": len(sheet.prompts)}))


def write(sheet: Sheet, model: Model, gates: cpe.ResAG | None, text: str) -> bool:
    """Draw a sheet, unless it is of a file and an earlier run with the same settings has; whether it was drawn."""
    said = settings(sheet, model)
    out = free(sheet.out, lambda path: sheet.line and drawn_with(path) == said)
    if os.path.lexists(out):
        return False
    rows = drawn(model, sheet.prompts, sheet.seeds, gates, sheet.how, text)
    # Of a file it stands alone, without a heading: other programs judge such folders, and would judge the letters, too.
    columns = sheet.prompts if len(rows) == 2 or not sheet.line else ()
    grid(list(rows.values()), out, columns, list(rows) if len(rows) == 2 else (), json.dumps(said, sort_keys=True))
    first, last = sheet.seeds[0], sheet.seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    above = "above before, below after, " if len(rows) == 2 else ""
    print(f"wrote   {out}: {above}{seeds}, {sheet.how.steps} steps, guidance {sheet.how.guidance:g}")
    for prompt, *pair in zip(sheet.prompts, *rows.values(), strict=True):
        if len(pair) == 2:
            print(f"change  {change(*pair)}  {prompt}")
    return True


def generate(model: Model, prompts: Sequence[str], seeds: Sequence[int], gates: cpe.ResAG | None,
             args: argparse.Namespace, text: str) -> Tensor:  # fmt: skip
    """Images [B, 3, H, W] of prompts, with a progress bar; UserError for images that are no numbers."""
    try:
        return sampler.draw(model, prompts, seeds, gates, args.steps, args.guidance, args.sampler,
                            progress=partial(bar, text=text), negative=getattr(args, "negative", ""))  # fmt: skip
    except ValueError as error:
        full = model.dtype == torch.float32
        advice = "the weights or the gates are damaged" if full else "try --dtype float32"
        raise UserError(f"{error}: {advice}.") from error


def drawn(model: Model, prompts: Sequence[str], seeds: Sequence[int], gates: cpe.ResAG | None,
          args: argparse.Namespace, text: str) -> dict[str, Tensor]:  # fmt: skip
    """Images by what they are, "before" and "after", or one of them."""
    kinds = {"before": None} if args.before_after or gates is None else {}
    kinds |= {"after": gates} if gates is not None else {}
    return {name: generate(model, prompts, seeds, kind, args, f"{text}{name}") for name, kind in kinds.items()}
