"""train: a gate file for every target, by steps (cpe.Trainer) or by formula (solve.py).

A file says all that its gates depend on. Whoever asks for the same again is told that it is there; a file of anything
else is never replaced. A check in sentences (check.py) ends the work.
"""

import argparse
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpe
import solve
import token_space
from cli import check, many, report
from cli.common import GateFile, bar, check_out, command, defaults_of, is_emoji, metadata_of, open_model, slug
from cli.runs import Run, check_state, going_on, remove_state, state_file
from cli.targets import Target, split, styles, target_of
from loading.cache import cached_contexts
from loading.files import UserError, save_tensors
from loading.prompts import PRESETS, Prompts, normalised, prepare, read_prompts
from weights import Model

# Raise it when the same settings come to give other gates, or states that go on differently: gates of any version can
# be used, only those of this one count as finished.
VERSIONS = {"train": 4, "solve": 2}
STEPS = ("first_steps", "later_steps", "attack_steps")
# What a user would call these settings.
PLAINLY = {"fingerprint": "model", "inputs": "prompts or layers", "version": "version of cpe.py", "lam": "lambda"}
PLAINLY |= {"r": "gate-rank", "k": "rank"} | dict.fromkeys(STEPS, "steps")


def run(args: argparse.Namespace) -> str | None:
    """`train`: one gate file a target. UserError for a target that cannot be erased, or a file that is in the way."""
    args.model = args.model or "sd14"
    args.how = how(args)
    process = many.this_process() if args.target_file else many.Process()
    jobs = many.share(from_file(args) if args.target_file else from_arguments(args), process)
    for job in jobs:  # before a model is downloaded
        with many.naming(job.line):
            check_new(job.out)
    args.device = many.device_of(args.device, process)
    shop = Workshop(args)
    for job in jobs:  # before hours of training
        with many.naming(job.line):
            job.settings = shop.settings(job.target)
            if not is_finished(job):
                check_state(state_file(job.out), args.resume or bool(args.target_file), run_name(job.settings))
    failed = []
    with many.stopped_by_torchrun(process):
        for number, job in enumerate(jobs, 1):
            where = f"{number} of {len(jobs)}: " if len(jobs) > 1 else ""
            with many.naming(job.line):
                try:
                    finish(shop, job, where)
                except Diverged as error:
                    failed.append(f"{job.target.names[0]}: {error}")
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} targets diverged. {' '.join(failed)}")
    return drawing_of(jobs[0].target, args.model, jobs[0].out) if jobs else None


def how(args: argparse.Namespace) -> str:
    """--how; where nobody said it, by steps if an option of these is given, else as the model's defaults have it."""
    solvable = {f"recipe_{field.name}" for field in dataclasses.fields(solve.Settings)}
    given = {name for name, value in vars(args).items() if name.startswith("recipe_") and value is not None}
    of_steps = args.literal or args.resume or args.steps_scale != 1 or given - solvable
    if args.how == "solve" and of_steps:
        odd = [name.removeprefix("recipe_").replace("_", "-") for name in sorted(given - solvable)]
        option = f"--{odd[0]}" if odd else "--literal, --resume, --steps-scale"
        raise UserError(f"{option}: of --how train alone, as nothing is trained here.")
    return args.how or ("train" if of_steps else defaults_of(args.model).get("how", "train"))


class Diverged(UserError):
    """A target whose loss is no number any more; others may go on."""


@dataclass
class Job:
    """One gate file to be made."""

    target: Target
    out: Path
    line: str  # where it was asked for
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def from_arguments(args: argparse.Namespace) -> list[Job]:
    """What the arguments ask for; --out is a folder where there are several."""
    names = split(args.targets, args.model, args.one_name)
    if not names:
        raise UserError('what is to be erased? Give one target or more: train "red heart", or --targets FILE.')
    if len(names) > 1 and args.alias:
        raise UserError("--alias goes with one target: in a file for --targets, other names follow after commas.")
    targets = [target_of([name, *args.alias], args) for name in names]
    if len(targets) == 1:
        return [Job(targets[0], args.out or Path("gates") / f"{slug(targets[0].names[0])}.safetensors", "")]
    return [Job(target, folder_of(args) / f"{slug(target.names[0])}.safetensors", repr(target.names[0]))
            for target in targets]  # fmt: skip


def from_file(args: argparse.Namespace) -> list[Job]:
    """What a file of targets asks for; UserError for a name that cannot be erased, or a target that is there twice."""
    if args.alias or args.targets:
        raise UserError("--targets FILE stands alone: there, other names follow their target after commas.")
    jobs: dict[str, Job] = {}
    for number, text in many.read_lines(args.target_file):
        line = f"{args.target_file}, line {number}"
        with many.naming(line):
            if not all(part.strip() for part in text.split(",")):
                raise UserError("a name is missing before or after a comma.")
            target = target_of(text.split(","), args)
        out = folder_of(args) / f"{slug(target.names[0])}.safetensors"
        key = normalised(target.names[0]) or target.names[0]
        if first := jobs.get(key):
            raise UserError(f"{line} ({target.names[0]!r}) is the same target as {first.line}: remove one.")
        jobs[key] = Job(target, out, f"{line} ({target.names[0]!r})")
    return list(jobs.values())


def folder_of(args: argparse.Namespace) -> Path:
    """The folder for many gate files; UserError for what looks like one of them."""
    folder = args.out or Path("gates")
    if folder.suffix == ".safetensors" or os.path.isfile(folder):
        raise UserError(f"--out is a folder here, for many gate files: {folder} is not.")
    return folder


# --- What all targets of one command share -----------------------------------------------------------------------


class Workshop:
    """The model, opened once, what is read of it, and what is encoded for every target."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.encoded: dict[tuple[str, ...], Tensor] = {}
        self.solvers: dict[tuple, solve.Solver] = {}

    @cached_property
    def model(self) -> Model:
        """The model of --model."""
        return open_model(self.args, ("text_encoder", "unet", *["vae"] * self.args.report))

    @cached_property
    def layers(self) -> cpe.Layers:
        """The projections that the losses look through."""
        return cpe.Layers.of(self.model.cross_attention(), token_space.spectral_norm, self.model.tokens)

    @cached_property
    def space(self) -> token_space.TokenSpace:
        """The same as seen from the context."""
        return token_space.TokenSpace(self.layers)

    def recipe(self, target: Target) -> "cpe.Recipe | solve.Settings":
        """The numbers of a target's preset, and those that were given."""
        given = {k.removeprefix("recipe_"): v for k, v in vars(self.args).items() if k.startswith("recipe_")}
        given = {name: value for name, value in given.items() if value is not None}
        if self.args.how == "solve":
            return solve.Settings(**{"eta": PRESETS[target.preset].eta} | given)
        recipe = replace(PRESETS[target.preset], surrogate=target.surrogate)
        scaled = {name: max(1, round(getattr(recipe, name) * self.args.steps_scale)) for name in STEPS}
        return replace(recipe, **scaled | given)

    def settings(self, target: Target) -> dict[str, Any]:
        """All that the gates of a target depend on: who has the same settings has the same gates, to rounding."""
        args, recipe = self.args, dataclasses.asdict(self.recipe(target))
        said = {"target": target.names[0], "aliases": target.names[1:], "preset": target.preset, "how": args.how}
        said |= {"surrogate": target.surrogate, "seed": args.seed, "version": VERSIONS[args.how]}
        said |= {"literal": True} if args.literal else {}
        inputs = digest(self.prompts(target), self.model.cross_attention())
        return said | {"fingerprint": self.model.fingerprint, "inputs": inputs} | recipe

    def prompts(self, target: Target) -> Prompts:
        """The prompts of a target's preset."""
        return read_prompts(target.preset)

    def anchors(self, wanted: list[str]) -> Tensor:
        """Contexts [A, T, d] in half precision, of the cache; every target asks for the same."""
        key = tuple(wanted)
        if key not in self.encoded:
            self.encoded[key] = cached_contexts(
                self.model, wanted, lambda parts: bar(parts, len(parts), "encoding anchors")
            )
        return self.encoded[key]

    def own(self, wanted: list[str]) -> Tensor:
        """Contexts [P, T, d] of the target's own prompts: from the cache when it is trained again, or goes on."""
        return cached_contexts(self.model, wanted).to(self.model.device, self.model.dtype)

    def data(self, target: Target) -> cpe.Data:
        """Contexts to train on; UserError when no anchor words are left."""
        recipe = replace(PRESETS[target.preset], surrogate=target.surrogate)
        try:
            return prepare(recipe, self.prompts(target), target.names, self.own, self.anchors)
        except ValueError as error:
            raise UserError(f"prompts/{target.preset}.txt: {error}.") from error


def digest(prompts: Prompts, tensors: dict[str, Tensor]) -> str:
    """16 hexadecimal digits of a preset's prompts and of some weights."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(prompts)).encode())
    for name, weight in tensors.items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


# --- One gate file -----------------------------------------------------------------------------------------------


def finish(shop: Workshop, job: Job, where: str = "") -> None:
    """Make the gates of a job, write them, check them in sentences; or say that they are there already."""
    if is_finished(job):
        print(f"kept    {job.out}: already finished")
        return
    name = run_name(job.settings)
    if shop.args.how == "solve":
        gates, losses = solved(shop, job.target), {}
    else:
        work = Run(trainer_of(shop, job.target), state_file(job.out), name, f"{where}training {job.target.names[0]}")
        try:
            work.train(shop.args.resume or (bool(shop.args.target_file) and work.path.exists()))
        except FloatingPointError as error:
            remove_state(work.path, name)  # it would diverge again
            raise Diverged(f"{error}: try another --seed, or smaller --first-lr and --later-lr.") from error
        gates, losses = work.trainer.gates, work.losses
    write(shop, job, gates, losses)
    names = ", ".join(job.target.names)
    print(f"wrote   {job.out} ({job.out.stat().st_size / 1024:.0f} KB): erases {names} from {shop.model.name}")
    file = GateFile(job.out, gates.requires_grad_(False), metadata_of(job.out))
    found = check.check(file, shop.model, shop.space)
    print(f"check   {found.in_a_line()}")
    if shop.args.report:
        print(f"wrote   {report.write(file, shop.model, found, job.out.with_suffix('.html'), shop.args)}")


def trainer_of(shop: Workshop, target: Target) -> cpe.Trainer:
    """Encode the prompts, measure the layers, and draw gates to begin with."""
    recipe, args, device = shop.recipe(target), shop.args, shop.model.device
    data, kind = shop.data(target), cpe.Losses if args.literal else token_space.Losses
    chance = torch.Generator().manual_seed(args.seed)
    gates = cpe.ResAG(shop.layers.widths, data.targets.shape[2], recipe.r, recipe.k, generator=chance).to(device)
    if device.type != "cpu":
        chance = torch.Generator(device).manual_seed(args.seed)
    return cpe.Trainer(gates, kind(shop.layers, data, recipe.eta), recipe, chance)


def solved(shop: Workshop, target: Target) -> cpe.ResAG:
    """The gates of a target by formula; UserError where there is no solution, or no text encoder that allows one."""
    one = solve.constant_direction(shop.model.text_encoder.text_model.final_layer_norm)
    if one is None:
        raise UserError(f"{shop.model.name}: its text encoder's final LayerNorm has no bias: give --how train.")
    data, settings = shop.data(target), shop.recipe(target)
    try:
        solver = solve.Solver(shop.space, one, torch.cat([data.anchors.to(data.empty), data.empty]), settings)
        return solver.solve(data.targets, data.surrogates, shop.args.seed)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def write(shop: Workshop, job: Job, gates: cpe.ResAG, losses: dict[str, float]) -> None:
    """Write the gate file of a job and remove its state; UserError as for `is_finished`."""
    name, drawing = run_name(job.settings), defaults_of(shop.args.model)
    metadata = {"prompts": job.target.names[0], "rank": str(gates.k), "alpha": f"{(gates.scale[0] * gates.k).item():g}"}
    metadata |= {"model": shop.args.model, "losses": json.dumps(losses)}
    metadata["drawing"] = json.dumps({name: drawing[name] for name in ("steps", "guidance", "sampler")})
    with going_on(state_file(job.out), name):
        is_finished(job)  # another run may have written there meanwhile
        save_tensors(job.out, cpe.to_tensors(gates), metadata | in_metadata(job.settings))
    remove_state(state_file(job.out), name)


def is_finished(job: Job) -> bool:
    """Whether a gate file of the same settings is there already; UserError for any other file: none is replaced.

    Removes the state that is left of a run which was killed after it had written its gate file.
    """
    if not os.path.isfile(job.out):
        return False
    there = metadata_of(job.out)
    other = [key for key, value in in_metadata(job.settings).items() if not same(key, there.get(key), value)]
    if other:
        named = ", ".join(list(dict.fromkeys(PLAINLY.get(key, key) for key in other))[:3])
        how = f"trained with other settings ({named})" if "target" in there else "no finished gate file"
        raise UserError(f"{job.out} is there already, {how}: choose another --out, or remove it.")
    remove_state(state_file(job.out), run_name(job.settings))
    return True


def same(key: str, there: str | None, value: str) -> bool:
    """Whether a setting is the same: of names, capitals and spaces do not count."""
    if key in ("target", "surrogate") and there is not None:
        return (normalised(there) or there) == (normalised(value) or value)
    return there == value


def in_metadata(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as a gate file has them."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def run_name(settings: dict[str, Any]) -> str:
    """Settings as the state of an unfinished run has them."""
    return json.dumps(settings, sort_keys=True)


def check_new(out: Path) -> None:
    """UserError unless a path can become a gate file, with its state in the same folder; before a model is downloaded.

    One that is there is for `is_finished` to judge.
    """
    if out.suffix != ".safetensors" or out.name.endswith(".state.safetensors"):
        raise UserError(f"--out: {out}: give a name that ends in .safetensors, and not in .state.safetensors.")
    if not os.path.isfile(out):
        check_out(out)
        check_out(state_file(out))  # its name is longer


def drawing_of(target: Target, model: str, out: Path) -> str:
    """The command that draws a target, before and after."""
    name = target.names[0]
    prompt = f"a picture of {name}"
    if is_emoji(model):
        prompt = f"a picture of a robot, {name}" if name in styles() else f"a picture of a {name}"
    return command("generate", prompt, out, "--before-after")
