"""compare: one table of every eraser, on the same targets, prompts, seeds and judge. Built on study/."""

import argparse
import json

import torch

from cli.common import bar, command, note, open_model, slug
from cli.pictures import check_picture, save, sheet
from cli.targets import styles, target_of
from loading.files import UserError, check_writable
from loading.prompts import read_prompts
from study import compare as table
from study.erased import METHODS, NONE, PUBLISHED_ROWS, QUICK_ROWS, Method
from study.world import LONG, QUICK, SCENARIOS, Budget, Scenario, World


def run(args: argparse.Namespace) -> str | None:
    """`compare`: what an earlier run has measured is not measured again; says beforehand how long it takes.

    UserError for an eraser, scenario or target that is not known, or an --out that cannot be written.
    """
    check_picture(args.out)
    for path in filter(None, (args.markdown, args.json)):
        check_writable(path)
    scenarios, methods = asked(args)
    world = World(open_model(args, ("text_encoder", "unet", "vae")), args.clip, args.preset)
    budget, columns = (QUICK, table.QUICK_COLUMNS) if args.quick else (Budget(), table.COLUMNS)
    print(table.forecast(world, scenarios, methods, budget, args.seed), flush=True)
    figures, pictures = {}, {}
    try:
        cells = table.run(world, scenarios, methods, budget, args.seed)
        for scenario, method, row, images in bar(cells, len(scenarios) * (1 + len(methods)), "comparing"):
            figures.setdefault(scenario, {})[method] = row
            pictures.setdefault(scenario, []).append(images)
    except FloatingPointError as error:
        raise UserError(f"training diverged ({error}): try another --seed.") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("what is measured is on disk: the same command goes on") from error
    print(table.markdown(figures, columns, most=7))
    for scenario, rows in pictures.items():
        path = args.out if len(pictures) == 1 else args.out.with_stem(f"{args.out.stem}-{slug(scenario)}")
        cases = table.cases(world, scenarios[scenario], budget)
        prompts = [cases[i].prompt for i in table.shown_columns(cases)]
        images = (torch.stack(list(row)).float() / 127.5 - 1 for row in rows)
        page = sheet(dict(zip(figures[scenario], images, strict=True)), prompts)
        save(page, path, {"prompt": prompts[0], "prompts": []})
    note(args.markdown, table.markdown(figures, columns))
    note(args.json, json.dumps({"scenarios": figures, "model": world.fingerprint}, indent=2) + "\n")
    return command("compare") if args.quick else None


def asked(args: argparse.Namespace) -> tuple[dict[str, Scenario], list[Method]]:
    """The scenarios and erasers that `compare` was asked for; UserError for one that is not known."""
    rows = PUBLISHED_ROWS if args.published else QUICK_ROWS if args.quick else METHODS
    names = [name for name in dict.fromkeys(args.eraser or rows) if name != NONE.name]  # it has a row in any case
    if args.preset == "style" or (args.preset != "emoji" and not args.targets):
        raise UserError("--preset goes with targets, and styles are judged on the embedded model alone: emoji-style.")
    scenarios = of_targets(args) if args.targets else SCENARIOS
    for what, known, said in ("eraser", METHODS, names), ("scenario", scenarios, args.scenario):
        if unknown := [name for name in said if name not in known]:
            choices = ", ".join(f'"{name}"' for name in known)
            raise UserError(f"unknown {what} {unknown[0]!r}: choose among {choices}.")
    chosen = list(dict.fromkeys(args.scenario)) or [name for name in scenarios if name not in LONG]
    return {name: scenarios[name] for name in chosen[: 1 if args.quick else None]}, [METHODS[name] for name in names]


def of_targets(args: argparse.Namespace) -> dict[str, Scenario]:
    """A scenario of the targets, read as `train` reads them; UserError for one that CLIP cannot look for."""
    found = [target_of([name], args) for name in args.targets]
    targets, preset = tuple(dict.fromkeys(each.names[0] for each in found)), found[0].preset
    known = styles() if preset.endswith("style") else read_prompts(preset).domain
    if unknown := [name for name in targets if name not in known]:
        raise UserError(f"{unknown[0]!r} is not in prompts/{preset}.txt: CLIP could not look for it.")
    return {", ".join(targets): Scenario(targets, preset)}
