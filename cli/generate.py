"""generate: pictures of prompts, with gates or without, named after their prompts, and never over another file.

Of every prompt that names a target it says how far the gate has opened; those in which it stayed shut stand at the end.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpe
import sampler
from cli import many
from cli.common import (
    GateFile,
    check_out,
    check_prompts,
    command,
    forecast,
    free,
    merge_gates,
    numbered,
    open_model,
    settle,
    slug,
)
from cli.pictures import change, check_picture, drawn_with, grid
from loading.files import UserError
from loading.prompts import spellings, within
from loading.tokens import tokenizer_files
from weights import Model

SHUT = 0.5  # a gate that opens no further erases little


def run(args: argparse.Namespace) -> str | None:
    """`generate`: one picture of a few prompts, or one a prompt of a file."""
    if bool(args.prompts) == bool(args.prompt_file):
        raise UserError("say what to draw: either prompts, or a file of them with --prompts FILE.")
    if args.before_after and not args.gates:
        raise UserError("--before-after compares with gates: give at least one gate file.")
    files = settle(args)
    check_sampling(args)
    return from_file(args, files) if args.prompt_file else together(args, files)


def together(args: argparse.Namespace, files: Sequence[GateFile]) -> str | None:
    """One picture: a column for every prompt; before and after are rows."""
    check_prompts(args.prompts)
    out = args.out or Path("images") / f"{slug(args.prompts[0])}.png"
    check_picture(out)
    check_out(out)
    model, gates = opened(args, files)
    seeds = [args.seed + i for i in range(len(args.prompts))]
    kinds = [None, gates] if args.before_after else [gates]
    rows = [draw(model, args.prompts, seeds, kind, args, "after" if kind else "before") for kind in kinds]
    out = free(out)
    grid(rows, out, args.prompts, ("before", "after") if len(rows) == 2 else ())
    rest = f" to {seeds[-1]}" if len(seeds) > 1 else ""
    how = f"seed{'s' * bool(rest)} {seeds[0]}{rest}, {args.steps} steps, guidance {args.guidance:g}"
    print(f"wrote   {out}: {'above before, below after, ' * (len(rows) == 2)}{how}")
    if len(rows) == 2:
        for prompt, *pair in zip(args.prompts, *rows, strict=True):
            print("change  {1} ({0:.3f} of 2)  {2}".format(*change(*pair), prompt))
    say_openings(model, gates, files, args.prompts)
    return following(args, args.prompts[0])


def following(args: argparse.Namespace, prompt: str) -> str | None:
    """The command that follows; none for a folder, which may be one that `bake` has erased from already."""
    if args.gates:
        return command("inspect", *args.gates, prompt)
    if os.path.isdir(os.path.expanduser(args.model)) and args.model != "emoji":
        return None
    return command("train", "...", *(["--model", args.model] if args.model != "sd14" else []))


def opened(args: argparse.Namespace, files: Sequence[GateFile]) -> tuple[Model, cpe.ResAG | None]:
    """The model and its gates."""
    model = open_model(args, ("text_encoder", "unet", "vae"))
    check_sampling(args, model)
    return model, merge_gates(files, model) if files else None


def check_sampling(args: argparse.Namespace, model: Model | None = None) -> None:
    """UserError for --steps that the --sampler cannot take: of a model, or before one is opened, of those with a name.

    Others' schedules are in their files.
    """
    if model is None and args.model not in ("sd14", "emoji"):
        return
    try:
        sampler.check_steps(model.schedule if model else sampler.Schedule(), args.steps, args.sampler)
    except ValueError as error:
        raise UserError(f"--steps: {error}.") from error


def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int], gates: cpe.ResAG | None,
         args: argparse.Namespace, text: str, guidance: float | None = None) -> Tensor:  # fmt: skip
    """Images [B, 3, H, W] of prompts, with a progress bar; UserError if they are not finite numbers."""
    guidance = args.guidance if guidance is None else guidance
    try:
        return sampler.draw(model, prompts, seeds, gates, args.steps, guidance, args.sampler,
                            progress=partial(forecast, text=text), negative=getattr(args, "negative", ""))  # fmt: skip
    except ValueError as error:
        full = model.dtype == torch.float32
        advice = "the weights or the gates are damaged" if full else "try --dtype float32"
        raise UserError(f"{error}: {advice}.") from error


# --- Openings ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def say_openings(model: Model, gates: cpe.ResAG | None, files: Sequence[GateFile], prompts: Sequence[str]) -> None:
    """Print how far the gate of every target that a prompt names has opened, and where it stayed shut."""
    named = [(i, n) for i, prompt in enumerate(prompts) for n, file in enumerate(files) if names_it(prompt, file)]
    if gates is None or not named:
        return
    shut = []
    for i, n in named:
        widest = gates.gate(model.encode([prompts[i]]))[0][n, 0, 1:].max().item()
        print(f"opened  {widest:.2f}  {files[n].target}: {prompts[i]}")
        if widest < SHUT:
            shut.append(f"{files[n].target!r} in {prompts[i]!r}")
    if shut:
        print(f"SHUT    {len(shut)} of {len(named)}: what follows was probably drawn, not erased")
        for each in shut:
            print(f"        {each}")


def names_it(prompt: str, file: GateFile) -> bool:
    """Whether a prompt has the name of what a gate file erases in it, in any spelling."""
    return any(within(spelling, prompt) for name in file.names for spelling in spellings(name))


# --- generate --prompts ------------------------------------------------------------------------------------------


def from_file(args: argparse.Namespace, files: Sequence[GateFile]) -> str | None:
    """A picture a prompt; what an earlier run with the same settings has drawn stays. UserError names the line."""
    process, folder = many.this_process(), args.out or Path("images") / slug(args.prompt_file.stem)
    if folder.suffix == ".png" or os.path.isfile(folder):
        raise UserError(f"--out is a folder here, for many pictures: {folder} is not.")
    drawings = many.read_drawings(args.prompt_file)
    mine = many.share(list(zip(drawings, picture_names(drawings), strict=True)), process)
    check_out(folder / "0001.png")
    args.device = many.device_of(args.device, process)
    model, gates = opened(args, files)
    kinds, settings, kept = [None, gates] if args.before_after else [gates], drawing(args, model), 0
    with many.stopped_by_torchrun(process):
        for i, (each, name) in enumerate(mine, 1):
            with many.naming(f"{args.prompt_file}, line {each.line} ({each.prompt!r})"):
                seed = args.seed if each.seed is None else each.seed
                guidance = args.guidance if each.guidance is None else each.guidance
                said = settings | {"prompt": each.prompt, "seed": seed, "guidance": guidance}
                said = json.dumps(said, sort_keys=True)
                out = next(p for p in numbered(folder / name) if not os.path.lexists(p) or drawn_with(p) == said)
                if out.exists():
                    kept += 1
                    continue
                # Alone in its batch: what else is in it moves the last bits of an image.
                rows = [draw(model, [each.prompt], [seed], kind, args, f"{i} of {len(mine)}", guidance)
                        for kind in kinds]  # fmt: skip
                # Alone it stands without a heading: other programs judge such folders, and would judge the letters too.
                grid(rows, out, *(([each.prompt], ("before", "after")) if len(rows) == 2 else ((), ())), said)
                moved = "{1} ({0:.3f} of 2), ".format(*change(*(row[0] for row in rows))) if len(rows) == 2 else ""
                print(f"wrote   {out}: {moved}{each.prompt}")
    of_all = f" ({process.rank + 1} of {process.size} processes)" if process.size > 1 else ""
    print(f"drew    {len(mine) - kept} prompts into {folder}, kept {kept}{of_all}")
    say_openings(model, gates, files, [each.prompt for each, _ in mine])
    return following(args, drawings[0].prompt)


def picture_names(drawings: Sequence[many.Drawing]) -> list[str]:
    """File names by which each prompt can be told: 0001-a-picture-of-a-cat.png, ...; of a benchmark, its case."""
    digits = max(4, len(str(len(drawings))))
    return [f"{slug(each.case) if each.case else f'{i:0{digits}}'}-{slug(each.prompt)}.png"
            for i, each in enumerate(drawings, 1)]  # fmt: skip


def drawing(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """All that a picture depends on but its prompt: who has the same settings has the same picture.

    The U-Net and the autoencoder are too large to hash: their files' size and time stand for them.
    """
    drawn = {name: getattr(args, name) for name in ("steps", "sampler", "dtype", "before_after", "negative")}
    files = [os.stat(model.part(name).path) for name in ("unet", "vae")]
    drawn |= {"device": args.device.split(":")[0], "fingerprint": model.fingerprint}
    drawn |= {"files": [[file.st_size, file.st_mtime_ns] for file in files], "schedule": model.schedule.config}
    read = [*tokenizer_files(model.tokenizer_folder), *args.gates]
    return drawn | {"read": [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in read]}
