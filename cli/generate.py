"""generate: pictures of prompts, with gates or without, named after their prompts, and never over another file.

A picture holds its prompt and settings, for `evaluate`; of prompts that name a target inspect.py says what gates do.
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
from cli import inspect, many
from cli.common import bar, command, free, merge_gates, open_model, settle, slug
from cli.pictures import change, check_picture, save, sheet
from loading.files import UserError
from study.evaluate import drawn_with
from weights import Model


class Sheet(NamedTuple):
    """One file to draw: a column for every prompt; before and after are rows."""

    out: Path
    prompts: list[str]
    seeds: list[int]
    how: argparse.Namespace  # steps, guidance, sampler, negative, before_after
    of_file: bool = False


def run(args: argparse.Namespace) -> str:
    """`generate`: one picture of a few prompts, or one a prompt of a file; of these, what is there already stays."""
    if bool(args.prompts) == bool(args.prompt_file):
        raise UserError("say what to draw: either prompts, or a file of them with --prompts FILE.")
    if args.before_after and not args.gates:
        raise UserError("--before-after compares with gates: give at least one gate file.")
    files = settle(args)
    sheets = from_file(args) if args.prompt_file else [together(args)]
    for one in sheets[:1]:  # torchrun may have more processes than there are lines
        check_picture(one.out)
    model = open_model(args, ("text_encoder", "unet", "vae"), files)
    try:
        sampler.latent_size(model, args.size)
    except ValueError as error:
        raise UserError(f"--size: {error}.") from error
    gates, kept = merge_gates(files, model) if files else None, 0
    for number, one in enumerate(bar(sheets, text="all prompts", quiet=True), 1):
        kept += not write(one, model, gates, f"{number} of {len(sheets)}, " if one.of_file else "")
    if args.prompt_file:
        print(f"drew    {len(sheets) - kept} prompts, kept {kept}")
    prompts = [prompt for one in sheets for prompt in one.prompts]
    failed = inspect.say(files, prompts, model)
    return command("inspect", *args.gates, *[*failed, *prompts][:1]) if files else command("list")


def together(args: argparse.Namespace) -> Sheet:
    """The prompts of the command line, side by side."""
    out = args.out or Path("images")
    if not out.suffix or os.path.isdir(out):
        out /= f"{slug(args.prompts[0])}.png"
    return Sheet(out, args.prompts, [args.seed + i for i in range(len(args.prompts))], args)


def from_file(args: argparse.Namespace) -> list[Sheet]:
    """A picture for every prompt of this process's share of a file; UserError where --out is no folder."""
    folder = args.out or Path("images") / slug(args.prompt_file.stem)
    if folder.suffix == ".png" or os.path.isfile(folder):
        raise UserError(f"--out is a folder here, for many pictures: {folder} is not.")
    sheets = []
    for number, each in enumerate(many.read_drawings(args.prompt_file), 1):
        out = folder / f"{slug(each.case) if each.case else f'{number:04}'}-{slug(each.prompt)}.png"
        how = argparse.Namespace(**vars(args) | ({} if each.guidance is None else {"guidance": each.guidance}))
        sheets.append(Sheet(out, [each.prompt], [args.seed if each.seed is None else each.seed], how, True))
    return many.share(sheets, args)


def settings(one: Sheet, model: Model) -> dict:
    """All that a picture depends on, as its file has it: of a file of prompts, who has the same has the same picture.

    The U-Net and the autoencoder are too large to hash: their files' size and time stand for them.
    """
    names = ("steps", "guidance", "sampler", "dtype", "before_after", "negative", "size")
    said = {name: getattr(one.how, name) for name in names} | {"seed": one.seeds[0], "prompt": one.prompts[0]}
    said |= {"model": model.name, "fingerprint": model.fingerprint, "schedule": model.schedule.config}
    said |= {"files": [[s.st_size, s.st_mtime_ns] for s in (os.stat(model.part(n).path) for n in ("unet", "vae"))]}
    said |= {"gates": [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in one.how.gates]}
    return json.loads(json.dumps(said | {"prompts": one.prompts}))


def write(one: Sheet, model: Model, gates: cpe.ResAG | None, text: str) -> bool:
    """Draw a sheet, unless it is of a file and an earlier run with the same settings has; whether it was drawn."""
    said = settings(one, model)
    out = free(one.out, lambda path: one.of_file and said.items() <= drawn_with(path).items())
    if os.path.lexists(out):
        return False
    rows = drawn(model, one.prompts, one.seeds, gates, one.how, text)
    # Of a file it stands alone, without a heading: other programs judge such folders, and would judge the letters, too.
    columns = one.prompts if len(rows) == 2 or not one.of_file else ()
    first, last = one.seeds[0], one.seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    above = "above before, below after, " if len(rows) == 2 else ""
    save(sheet(rows, columns), out, said, f": {above}{seeds}, {one.how.steps} steps, guidance {one.how.guidance:g}")
    for prompt, *pair in zip(one.prompts, *rows.values(), strict=True):
        if len(pair) == 2:
            print(f"change  {change(*pair)}  {prompt}")
    return True


def drawn(model: Model, prompts: Sequence[str], seeds: Sequence[int], gates: cpe.ResAG | None,
          args: argparse.Namespace, text: str) -> dict[str, Tensor]:  # fmt: skip
    """Images [B, 3, H, W] of prompts, "before" and "after" or one row without a name, behind a progress bar.

    UserError for images that are no numbers.
    """
    rows = {"before": None, "after": gates} if args.before_after else {"": gates}
    how = {"negative": getattr(args, "negative", ""), "size": getattr(args, "size", None)}
    try:
        return {name: sampler.draw(model, prompts, seeds, kind, args.steps, args.guidance, args.sampler,
                                   progress=partial(bar, text=f"{text}{name}"), **how)
                for name, kind in rows.items()}  # fmt: skip
    except ValueError as error:
        advice = "try --dtype float32" if model.dtype != torch.float32 else "the weights or the gates are damaged"
        raise UserError(f"{error}: {advice}.") from error
