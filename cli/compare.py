"""compare: every eraser on every scenario, one table (study/compare.py). What is measured is cached; a run resumes."""

import argparse
import json
from pathlib import Path

import torch

from cli.common import bar, check_out, command, free, open_model, slug
from cli.pictures import check_picture, grid
from loading.files import UserError, write_text
from loading.prompts import PRESETS, read_prompts
from study import compare
from study.methods import ABLATION_SCENARIOS, ABLATIONS, METHODS, Method, compared
from study.scenarios import LONG, QUICK, SCENARIOS, Budget, Scenario, World

QUICKLY = ("cpe, solved", "cpe", "uce", "rece", "mace")  # the erasers of --quick
MINUTES = {"quick": 8, "all": 90, "ablations": 60}  # on two idle cores, from an empty cache: an order of magnitude


def run(args: argparse.Namespace) -> str | None:
    """`compare`. UserError for an eraser, scenario or target that is not known, or an --out that cannot be written."""
    check_picture(args.out)
    for option, path in (("--out", args.out), ("--markdown", args.markdown), ("--json", args.json)):
        if path:
            check_out(path, option)
    scenarios, chosen = asked(args)
    args.model = args.model or "emoji"
    world = World(open_model(args, ("text_encoder", "unet", "vae")), args.clip, args.preset)
    kind = "quick" if args.quick else "ablations" if args.ablations else "all"
    if not args.scenario and not args.eraser and not args.targets:
        print(f"time    about {MINUTES[kind]} minutes on two idle cores; what is measured is cached")
    figures, pictures = {}, {}
    total = sum(len(compared(scenario, chosen)) for scenario in scenarios.values())
    cells = compare.run(world, scenarios, chosen, QUICK if args.quick else Budget(), args.seed)
    try:
        for scenario, method, row, images in bar(cells, total, "comparing"):
            figures.setdefault(scenario, {})[method] = row
            pictures.setdefault(scenario, []).append(torch.stack(list(images)).float() / 127.5 - 1)
    except FloatingPointError as error:
        raise UserError(f"{error}: try another --seed.") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("what is measured is cached: the same command goes on") from error
    print(compare.text(figures))
    for scenario, rows in pictures.items():
        path = args.out if len(pictures) == 1 else args.out.with_stem(f"{args.out.stem}-{slug(scenario)}")
        cases = compare.cases(world, scenarios[scenario], QUICK if args.quick else Budget())
        columns = [cases[i].prompt for i in compare.shown_columns(cases)]
        path = free(path)
        grid(rows, path, columns, list(figures[scenario]))
        print(f"wrote   {path}: {scenario}")
    if args.markdown:
        write_text(args.markdown, compare.markdown(figures))
        print(f"wrote   {args.markdown}")
    if args.json:
        write_text(args.json, json.dumps({"scenarios": figures, "model": world.fingerprint}, indent=2) + "\n")
        print(f"wrote   {args.json}")
    return None if args.ablations else command("compare", "--ablations") + f"    # about {MINUTES['ablations']} minutes"


def asked(args: argparse.Namespace) -> tuple[dict[str, Scenario], list[Method]]:
    """The scenarios and erasers that were asked for; UserError for one that is not known."""
    scenarios, methods = SCENARIOS, METHODS
    if args.ablations:
        scenarios, methods = ABLATION_SCENARIOS, METHODS | ABLATIONS
    names = list(dict.fromkeys(args.eraser)) or list(QUICKLY if args.quick else methods)
    if unknown := [name for name in names if name not in methods]:
        raise UserError(f"unknown eraser {unknown[0]!r}: choose among {', '.join(map(repr, methods))}.")
    if args.targets:
        scenarios = own_scenario(args)
    if unknown := [name for name in args.scenario if name not in scenarios]:
        raise UserError(f"unknown scenario {unknown[0]!r}: choose among {', '.join(scenarios)}.")
    wanted = list(dict.fromkeys(args.scenario)) or [name for name in scenarios if name not in LONG]
    chosen = {name: scenarios[name] for name in (wanted[:1] if args.quick else wanted)}
    return chosen, [methods[name] for name in names]


def own_scenario(args: argparse.Namespace) -> dict[str, Scenario]:
    """The scenario of targets that were given; UserError for one that CLIP could not look for."""
    prompts, targets = read_prompts(args.preset), tuple(dict.fromkeys(args.targets))
    styles = [word for word in prompts.general if word.endswith(" style")]
    known = styles if args.preset.endswith("style") else prompts.domain
    if unknown := [name for name in targets if name not in known]:
        raise UserError(f"{unknown[0]!r} is not in {Path('prompts') / args.preset}.txt: CLIP could not look for it.")
    if (surrogate := PRESETS[args.preset].surrogate) in targets:
        raise UserError(f"{surrogate!r} is what targets of --preset {args.preset} become: choose another target.")
    return {", ".join(targets): Scenario(targets, args.preset)}
