"""train: a gate file for every target, by steps (cpe.Trainer) or by formula (solve.py).

A file says all that its gates depend on. Whoever asks for the same again is told that it is there; a file of anything
else is never replaced. A check in sentences (check.py) ends the work.
"""

import argparse
import dataclasses
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import cpe
import solve
import token_space
from cli import check, many, report
from cli.common import bar, command, defaults_of, metadata_of, open_model, read_gates, same, slug, space_of
from cli.options import recipe_fields
from cli.runs import Trainer, digest, state_file, train
from cli.targets import Target, names_in, split, target_of
from loading.cache import encoded
from loading.files import UserError, check_writable, save_tensors
from loading.prompts import PRESETS, Prompts, longer_names, read_prompts, to_solve
from weights import Model

# Raise it when the same settings come to give other gates, or states that go on differently: gates of any version can
# be used, only those of this one count as finished.
VERSIONS = {"train": 6, "solve": 6}
STEPS = ("first_steps", "later_steps", "attack_steps")
PAPER = ("literal", "published")  # options: the losses, or the prompts, word for word


def run(args: argparse.Namespace) -> str | None:
    """`train`: one gate file a target. UserError for a target that cannot be erased, or a file that is in the way."""
    args.how = how(args)
    jobs = many.share(jobs_of(args), args)
    for _, out in jobs:  # before a model is downloaded
        check_new(out)
    if not jobs:  # torchrun has more processes than there are targets
        return None
    shop = Workshop(args)
    for number, job in enumerate(bar(jobs, text="all targets", quiet=True), 1):
        finish(shop, *job, f"{number} of {len(jobs)}: " if len(jobs) > 1 else "")
    outs = [out for _, out in jobs[:4]]
    return command("generate", *(read_gates(out).caption for out in outs), *outs, "--before-after")


def how(args: argparse.Namespace) -> str:
    """--how; where nobody said it, by steps if an option of these is given, else as the model's defaults have it."""
    odd = given(args).keys() - {field.name for field in dataclasses.fields(solve.Settings)}
    of_steps = [*sorted(odd), *["steps_scale"] * (args.steps_scale != 1)]
    of_steps += [name for name in PAPER if getattr(args, name)]
    if args.how == "solve" and of_steps:
        raise UserError(f"--{of_steps[0].replace('_', '-')}: of --how train alone, as nothing is trained here.")
    return args.how or ("train" if of_steps else defaults_of(args.model).get("how", "train"))


def given(args: argparse.Namespace) -> dict[str, float]:
    """The numbers of the recipe that were given as options."""
    numbers = {name: getattr(args, f"recipe_{name}") for name, _, _ in recipe_fields()}
    return {name: value for name, value in numbers.items() if value is not None}


def jobs_of(args: argparse.Namespace) -> list[tuple[Target, Path]]:
    """Targets and their gate files to be; UserError for what cannot be erased, or is there twice."""
    asked: dict[str, list[str]] = {}
    for number, text in many.read_lines(args.target_file) if args.target_file else ():
        with many.naming(line := f"{args.target_file}, line {number}"):
            asked[line] = names_in(text, args.preset or defaults_of(args.model)["preset"])
        if asked[line][1:]:
            print(f"erases  {asked[line][0]}, also called {', '.join(asked[line][1:])}")
    asked |= {repr(name): [name, *args.alias] for name in split(args.targets, args.model, args.one_name)}
    if not asked:
        raise UserError('what is to be erased? Give one target or more: train "red heart", or --targets FILE.')
    alone, folder = not args.target_file and len(asked) == 1, args.out or Path("gates")
    if args.alias and not alone:
        raise UserError("--alias goes with one target: in a file for --targets, other names follow after commas.")
    if not alone and (folder.suffix == ".safetensors" or os.path.isfile(folder)):
        raise UserError(f"--out is a folder here, for many gate files: {folder} is not.")
    if args.surrogate and not alone:
        print(f"becomes {args.surrogate!r}: each of the {len(asked)} targets")
    jobs: dict[Path, tuple[Target, str]] = {}
    for line, names in asked.items():
        with many.naming("" if alone else line):
            target = target_of(names, args)
            out = args.out if alone and args.out else folder / f"{slug(target.names[0])}.safetensors"
            if out in jobs:
                raise UserError(f"{names[0]!r} is the same target as {jobs[out][1]}: remove one.")
            jobs[out] = target, line
    return [(target, out) for out, (target, _) in jobs.items()]


def check_new(out: Path) -> None:
    """UserError unless a path can become a gate file, with its state beside it; `is_finished` judges what is there."""
    if out.suffix != ".safetensors" or out.name.endswith(".state.safetensors"):
        raise UserError(f"--out: {out}: give a name that ends in .safetensors, and not in .state.safetensors.")
    if not os.path.isfile(out):
        check_writable(out)
        check_writable(state_file(out))  # its name is longer


class Workshop:
    """What all targets of one command share: the model, opened once, what is read of it, and encoded for each."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model: Model = open_model(args, ("text_encoder", "unet", *["vae"] * args.report))
        self.space = space_of(self.model)

    def recipe(self, target: Target) -> "cpe.Recipe | solve.Settings":
        """The numbers of a target's preset, and those that were given."""
        if self.args.how == "solve":
            return solve.Settings.of(PRESETS[target.preset], target.preset.endswith("style"), **given(self.args))
        recipe = replace(PRESETS[target.preset], surrogate=target.surrogate)
        scaled = {name: max(1, round(getattr(recipe, name) * self.args.steps_scale)) for name in STEPS}
        return replace(recipe, **scaled | given(self.args))

    def settings(self, target: Target) -> dict[str, str]:
        """All that the gates of a target depend on, as a gate file has it: who has the same has the same gates."""
        said = {"target": target.names[0], "aliases": target.names[1:], "preset": target.preset, "how": self.args.how}
        said |= {name: "true" for name in PAPER if getattr(self.args, name)}
        said |= {"surrogate": target.surrogate, "seed": self.args.seed, "version": VERSIONS[self.args.how]}
        inputs = digest(self.prompts(target), self.model.cross_attention())
        said |= {"fingerprint": self.model.fingerprint, "inputs": inputs} | dataclasses.asdict(self.recipe(target))
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()}

    def prompts(self, target: Target) -> Prompts:
        """The prompts of a target's preset."""
        prompts = read_prompts(target.preset)
        if self.args.how == "solve":
            return to_solve(prompts, target.preset.endswith("style"))
        return prompts.as_published() if self.args.published else prompts

    def data(self, target: Target) -> cpe.Data:
        """Contexts to train on, from the cache where an earlier run left them."""
        recipe = replace(PRESETS[target.preset], surrogate=target.surrogate)
        progress, solving = partial(bar, text="reading prompts"), self.args.how == "solve"
        return encoded(self.model, recipe, self.prompts(target), target.names, solving, progress)


def finish(shop: Workshop, target: Target, out: Path, where: str) -> None:
    """Make the gates of a target, write them, check them in sentences; or say that they are there already."""
    settings, state = shop.settings(target), state_file(out)
    if is_finished(out, settings):
        state.unlink(missing_ok=True)  # of a run that was killed after it had written its gate file
        print(f"kept    {out}: already finished")
        if shop.args.report:
            examine(shop, out)
        return
    if shop.args.how == "solve":
        gates = solved(shop, target)
    else:
        trainer = trainer_of(shop, target)
        train(trainer, state, json.dumps(settings, sort_keys=True), f"{where}training {target.names[0]}")
        gates = trainer.gates
    drawing = {name: defaults_of(shop.args.model)[name] for name in ("steps", "guidance", "sampler")}
    metadata = settings | {"model": shop.args.model, "drawing": json.dumps(drawing)}
    # As the authors' files have it.
    metadata |= {"prompts": target.names[0], "rank": str(gates.k), "alpha": f"{gates.scale[0].item() * gates.k:g}"}
    save_tensors(out, cpe.to_tensors(gates), metadata)
    state.unlink(missing_ok=True)
    size, names = f"{out.stat().st_size / 1024:.0f} KB", ", ".join(target.names)
    print(f"wrote   {out} ({size}): erases {names} from {shop.model.name}")
    if also := longer_names(target.preset, target.names):
        print(f"also    {', '.join(also[:8])}{', ...' * (len(also) > 8)} have its name in theirs, and may go too")
    examine(shop, out)


def examine(shop: Workshop, out: Path) -> None:
    """Check gates in sentences, and write a report of them where one is asked for."""
    file = read_gates(out)
    found = check.check(file, shop.model, shop.space, draws=shop.args.report)
    print(f"check   {found.in_a_line()}")
    if shop.args.report:
        report.write(file, shop.model, shop.space, found, out.with_suffix(".html"), shop.args.seed)


def trainer_of(shop: Workshop, target: Target) -> Trainer:
    """Encode the prompts, measure the layers, and draw gates to begin with."""
    recipe, seed, device, data = shop.recipe(target), shop.args.seed, shop.model.device, shop.data(target)
    chance, layers = torch.Generator().manual_seed(seed), shop.space.layers
    gates = cpe.ResAG(layers.widths, data.targets.shape[2], recipe.r, recipe.k, generator=chance).to(device)
    chance = chance if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    losses = cpe.Losses if shop.args.literal else token_space.Losses
    return Trainer(gates, losses(layers, data, recipe.eta), recipe, chance)


def solved(shop: Workshop, target: Target) -> cpe.ResAG:
    """The gates of a target by formula; UserError where there is no solution, or no text encoder that allows one."""
    one = solve.constant_direction(shop.model.text_encoder.text_model.final_layer_norm)
    if one is None:
        raise UserError(f"{shop.model.name}: its text encoder's final LayerNorm has no bias: give --how train.")
    data = shop.data(target)
    try:
        data = replace(data, anchors=torch.cat([data.anchors, data.empty.to(data.anchors)]))
        solver = solve.Solver(shop.space, one, data.anchors, shop.recipe(target))
        return solver.solve(data.targets, data.surrogates, shop.args.seed)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def is_finished(out: Path, settings: dict[str, str]) -> bool:
    """Whether a gate file of the same settings is there already; UserError for any other file: none is replaced."""
    if not os.path.isfile(out):
        return False
    there, kept = metadata_of(out), settings | {"target": same(settings["target"])}
    found = there | {"target": same(there.get("target", ""))}
    if other := [name for name, value in kept.items() if found.get(name, "").casefold() != value.casefold()]:
        options = {field: option for field, option, _ in recipe_fields()}
        named = ", ".join(options.get(name, name) for name in other[:3])
        what = f"trained with other settings ({named})" if "target" in there else "no finished gate file"
        raise UserError(f"{out} is there already, {what}: choose another --out, or remove it.")
    return True
