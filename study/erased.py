"""The rows of the table: every eraser, with the settings that were found for it, or those its authors published.

    erased = METHODS["uce"].build(world, SCENARIOS["object"], seed=0, **tuned(METHODS["uce"], SCENARIOS["object"]))

Settings (`TUNED`, `MANY`, `CROWD`, `STYLE`) come from benchmarks/tune.py, on targets that no scenario holds.
Built on erasers, solve and variants.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import cpe
import erasers
import solve
from erasers.common import filled
from loading.cache import cache_folder, cached_contexts
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import PRESETS, Prompts, anchor_prompts, nearest_words, prepare
from study import variants
from study.world import Scenario, World
from weights import Model

VERSIONS = {"cpe": 6, "lora": 5, "mace": 3, "rece": 2}  # of measurements, by eraser, else 1: see `compare.key`


@dataclass(frozen=True)
class Erased:
    """An erased model and what it cost: an edited model, or the same one with gates."""

    model: Model
    gates: cpe.ResAG | None
    parameters: int  # that were trained or solved for
    bytes: int  # to ship, float32: gate files, factors of a LoRA, or edited weights
    spared: float = 0.0  # seconds of training that an earlier cell has spent


@dataclass(frozen=True)
class Method:
    """A row of the table: how to erase a scenario, with which hyper-parameters."""

    name: str
    build: Callable[..., Erased]  # (world, scenario, seed, **settings)
    settings: dict = field(default_factory=dict)


# --- Linear erasers ----------------------------------------------------------------------------------------------


def linear(eraser: str) -> Callable[..., Erased]:
    """A builder for one of `erasers.ERASERS`, with help that is in none of their papers."""

    def build(
        world: World, scenario: Scenario, seed: int, templates: str = "", anchors: bool = False, **settings: Any
    ) -> Erased:
        """The model with edited weights; `settings` are hyper-parameters of the eraser.

        `templates`: what is put into CPE's templates and sentences; "" nothing, "kept" what is preserved, "all" the
        targets, too, "pairs" the surrogate with them. `anchors`: whether nothing is preserved but what CPE's gates have
        as anchors, as LoRA always does; the fewer there are, the more each weighs. LoRA's settings replace
        fields of the preset's recipe; `longer`: how many times its steps.
        """
        if eraser in ("lora", "mace") and templates in ("all", "pairs"):
            raise ValueError(f"{eraser} puts names into sentences itself")
        prompts, targets = world.listed(scenario), [*scenario.targets, *scenario.aliases]
        preserved = [*prompts.general, *prompts.domain]
        surrogates = [PRESETS[scenario.preset].surrogate] * len(targets)
        if templates:
            preserved = anchor_prompts(preserved, prompts.templates)
        if anchors or eraser == "lora":
            listed, preserved = len(preserved), anchors_of_gates(world, scenario)
            share = listed / len(preserved)
            settings |= {name: settings[name] * share for name in ("s_p", "keep") if name in settings}
        if templates in ("all", "pairs"):
            bare = [surrogate for surrogate in surrogates for _ in prompts.templates]
            surrogates = filled(prompts.templates, surrogates) if templates == "pairs" else bare
            targets = filled(prompts.templates, targets)
        if eraser == "lora":
            longer, recipe = settings.pop("longer", 1), replace(PRESETS[scenario.preset], **settings)
            steps = ("first_steps", "later_steps", "attack_steps")
            settings = {"recipe": replace(recipe, **{name: int(longer * getattr(recipe, name)) for name in steps})}
        if eraser in ("lora", "mace"):  # which put names into sentences: into such as the model understands
            settings |= {"templates": prompts.templates}
        edited = erasers.ERASERS[eraser](world.model, targets, surrogates, preserved, seed, **settings)
        size = sum(W.numel() for W in edited.values())
        if eraser == "lora":  # its factors
            k = settings["recipe"].k * len(targets)
            size = sum(min(k, W.shape[1]) * sum(W.shape) for W in edited.values())
        return Erased(world.model.with_unet(edited), None, size, 4 * size)

    return build


def published(eraser: str) -> Callable[..., Erased]:
    """A builder for an eraser as its authors publish it: bare names, their settings, and nothing else."""

    def build(world: World, scenario: Scenario, seed: int, **settings: Any) -> Erased:
        """The model with its weights edited; a setting given here goes before the published one."""
        kinds = [f"{eraser}, {'style' if scenario.style else 'object'}"]
        kinds += [f"{eraser}, many"] * (len(scenario.targets) > 1)
        for kind in (eraser, *kinds):
            settings = erasers.PUBLISHED.get(kind, {}) | settings
        prompts, targets = world.listed(scenario), [*scenario.targets, *scenario.aliases]
        surrogate, preserved = PRESETS[scenario.preset].surrogate, [*prompts.general, *prompts.domain]
        edited = erasers.ERASERS[eraser](world.model, targets, surrogate, preserved, seed, **settings)
        size = sum(W.numel() for W in edited.values())
        return Erased(world.model.with_unet(edited), None, size, 4 * size)

    return build


def anchors_of_gates(world: World, scenario: Scenario) -> list[str]:
    """The anchor prompts that CPE's gates of a scenario's targets train on, together."""
    prompts, recipe, words = world.listed(scenario), PRESETS[scenario.preset], []
    for target in scenario.targets:
        asked = recipe, prompts, scenario.names(target), world.model.encode
        words += nearest_words(*asked, lambda texts: cached_contexts(world.model, texts))
    return anchor_prompts([*prompts.general, *dict.fromkeys(words)], prompts.templates)


# --- CPE ---------------------------------------------------------------------------------------------------------


def trained(kind: str) -> Callable[..., Erased]:
    """A builder for CPE: gates trained per target, independently, then merged; `kind` as in `variants.trainer`."""

    def build(world: World, scenario: Scenario, seed: int, **settings: Any) -> Erased:
        """The same model with gates; `settings` replace fields of the preset's recipe."""
        if kind in variants.KINDS and len(scenario.targets) > 1:
            raise UserError(f"gates of kind {kind} cannot be merged: choose a scenario with one target")
        recipe, prompts = replace(PRESETS[scenario.preset], **settings), world.listed(scenario)
        found = [train(world, scenario.names(t), prompts, recipe, kind, seed) for t in scenario.targets]
        return with_gates(world, [gates for gates, _ in found], sum(seconds for _, seconds in found))

    return build


def with_gates(world: World, gates: Sequence[cpe.ResAG], spared: float = 0.0) -> Erased:
    """The model with the gates of all targets merged."""
    size = sum(p.numel() for each in gates for p in each.parameters())
    return Erased(world.model, gates[0] if len(gates) == 1 else cpe.merge(gates), size, 4 * size, spared)


def contexts(world: World, names: list[str], prompts: Prompts, recipe: cpe.Recipe) -> cpe.Data:
    """What gates of a target train on, or are solved from."""
    return prepare(recipe, prompts, names, world.model.encode, lambda asked: cached_contexts(world.model, asked))


def train(
    world: World, names: list[str], prompts: Prompts, recipe: cpe.Recipe, kind: str, seed: int
) -> tuple[cpe.ResAG, float]:
    """Gates of one target, from disk where a cell before has trained them; and the seconds that then were not spent."""
    trainer = variants.trainer(world.layers, contexts(world, names, prompts, recipe), recipe, seed, kind)
    gates, parts = trainer.gates, [VERSIONS["cpe"], world.fingerprint, names, asdict(prompts), asdict(recipe)]
    path = cache_folder() / "compare" / f"gates-{digest([*parts, kind, seed])}.safetensors"
    try:
        state, metadata = load_tensors(path)
        seconds = float(metadata["seconds"])
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in gates.state_dict().items()}:
            raise ValueError("tensors of other gates")  # loading these would keep what fits before it raised
        gates.load_state_dict(state)
        return gates.requires_grad_(False), seconds
    except (UserError, KeyError, ValueError):  # not there yet, or damaged
        pass
    begun = time.perf_counter()
    for _ in trainer:
        pass
    save_tensors(path, gates.state_dict(), {"seconds": str(time.perf_counter() - begun)})
    return gates.requires_grad_(False), 0.0


def solved(world: World, scenario: Scenario, seed: int, **settings: Any) -> Erased:
    """The same model with gates that are solved for (solve.py); `settings` are `solve.Settings`."""
    recipe, prompts, gates = PRESETS[scenario.preset], world.listed(scenario), []
    asked = solve.Settings(**({"eta": recipe.eta} | settings))
    one = solve.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
    for target in scenario.targets:
        data = contexts(world, scenario.names(target), prompts, recipe)
        solver = solve.Solver(world.space, one, torch.cat([data.anchors.to(data.empty), data.empty]), asked)
        gates.append(solver.solve(data.targets, data.surrogates, seed))
    return with_gates(world, gates)


def digest(parts: list) -> str:
    """A file name for whatever decides what is in the file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


# --- The rows ----------------------------------------------------------------------------------------------------

NONE = Method("none", lambda world, scenario, seed: Erased(world.model, None, 0, 0))
LINEAR = ("uce", "rece", "mace", "speed", "esd", "lora")

TUNED = {  # by method: what benchmarks/tune.py found best; of CPE the recipe is its preset
    "cpe, hard": {"lam": 100.0},
    "cpe, mlp": {"lam": 100.0},
    "uce": {"padding": True, "templates": "pairs", "s_p": 10.0},
    "rece": {"rounds": 1, "templates": "pairs", "padding": True, "s_p": 10.0, "eta": 0.3},
    "speed": {"threshold": 1.0, "templates": "all", "augment": 10},
    "mace": {"lr": 1e-5, "keep": 3.0, "lam": 0.1, "templates": "kept", "images": 4, "sampling_steps": 20},
    "esd": {"lr": 2e-4, "negative": 5.0, "images": 8, "sampling_steps": 20},
    "lora": {"k": 4, "lam": 30.0},
}
MANY: dict[str, dict] = {  # and what differs for several targets at once, of linear erasers; CPE's gates are merged
    "uce": {"s_p": 30.0, "eta": 0.3},
    "rece": {"s_p": 30.0},
    "speed": {"threshold": 0.01, "templates": ""},
    "mace": {"keep": 10.0, "eta": 0.3},
    "esd": {"steps": 400},
    "lora": {"k": 8, "lam": 10.0, "longer": 3.0},
}
CROWD: dict[str, dict] = {  # and for more than thirty, nearer to fifty than to ten: found on fifty
    "uce": {"s_p": 200.0},
    "rece": {"s_p": 100.0},
    "speed": {"threshold": 1.0},
    "mace": {"keep": 30.0},
}
STYLE: dict[str, dict] = {  # and for a style; CPE's gates have a preset of their own
    "uce": {"eta": 1.0},
    "rece": {"s_p": 3.0, "eta": 1.0},
    "speed": {"threshold": 3.0, "eta": 0.0},
    "mace": {"keep": 1.0, "eta": 1.0},
    "esd": {"lr": 5e-4, "steps": 200},
}


def tuned(method: Method, scenario: Scenario) -> dict:
    """Tuned settings of a method and its ablations ("uce, CPE's anchors" starts from "uce"); none of published rows."""
    count, found = len(scenario.targets), {}
    if method.name.endswith("published") or method.name == "cpe, solved":
        return {}
    for table in (TUNED, MANY if count > 1 else {}, CROWD if count > 30 else {}, STYLE if scenario.style else {}):
        found |= table.get(method.name, table.get(method.name.split(",")[0], {}))
    return found


METHODS = {
    method.name: method
    for method in (
        Method("cpe", trained("resag")),
        Method("cpe, solved", solved),
        *(Method(name, linear(name)) for name in LINEAR),
        *(Method(f"{name}, published", published(name)) for name in LINEAR[:-1]),
    )
}
QUICK_ROWS = ("cpe", "cpe, solved", "uce", "rece", "speed")

# What reviewers asked: each row changes one number of CPE (hard and mlp their lambda, too), or gives a linear eraser
# what CPE has.
STEPS = {
    "eta": (0.0, 1.0), "lam": (30.0, 3000.0), "r": (4, 64), "k": (1, 2, 8), "stages": (1, 4), "deltas": (1, 64),
    "noise": (0.0, 1e-2), "delta_start": (0.0,), "rise": (0.0,), "templates": (1,), "nearest": (0,),
}  # fmt: skip
ABLATIONS = {
    method.name: method
    for method in (
        *(Method(f"{n}, CPE's anchors", linear(n), {"anchors": True}) for n in LINEAR[:4]),
        *(Method(f"cpe, {kind}", trained(kind)) for kind in variants.KINDS),
        *(Method(f"cpe, {n} = {x:g}", trained("resag"), {n: x}) for n, values in STEPS.items() for x in values),
    )
}
