"""The rows of the table: every eraser, with the settings that were found for it, or those its authors published.

    scenario, method = SCENARIOS["object"], METHODS["uce"]
    erased = method.build(world, scenario, seed=0, **settings_of(method, scenario))

Settings (`tuned.json`) come from benchmarks/tune.py, on targets that no scenario holds.
Built on erasers, solve and variants.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import cpe
import erasers
import solve
from erasers.common import filled
from loading.cache import cached_contexts
from loading.files import UserError, shipped
from loading.prompts import PRESETS, anchor_prompts, nearest_words, prepare
from study import variants
from study.world import Scenario, World
from weights import Model


@dataclass(frozen=True)
class Erased:
    """An erased model and what it cost: an edited model, or the same one with gates."""

    model: Model
    gates: cpe.ResAG | None
    parameters: int  # to ship: gates, factors of a LoRA, or edited weights


@dataclass(frozen=True)
class Method:
    """A row of the table: how to erase a scenario, and settings that go before those that were found or published."""

    name: str
    build: Callable[..., Erased]  # (world, scenario, seed, **settings)
    settings: dict = field(default_factory=dict)


# --- Linear erasers ----------------------------------------------------------------------------------------------


def linear(eraser: str) -> Callable[..., Erased]:
    """A builder for one of `erasers.ERASERS`. As its authors publish it, but for the two helps below."""

    def build(
        world: World, scenario: Scenario, seed: int, sentences: bool = False, anchors: bool = False, **settings: Any
    ) -> Erased:
        """The model with edited weights; `settings` are of the eraser, of LoRA fields of the preset's recipe.

        With `sentences` targets, their surrogates and what is preserved stand in CPE's templates and sentences. With
        `anchors` nothing is preserved but the anchors of CPE's gates; the fewer there are, the more each weighs. LoRA,
        which has CPE's losses, has both.
        """
        recipe, prompts, targets = PRESETS[scenario.preset], world.listed(scenario), scenario.names
        preserved, surrogates = [*prompts.general, *prompts.domain], [recipe.surrogate] * len(targets)
        if sentences:
            preserved = anchor_prompts(preserved, prompts.templates)
        if anchors or eraser == "lora":
            listed, preserved = len(preserved), anchors_of_gates(world, scenario)
            share = listed / len(preserved)
            settings |= {name: settings[name] * share for name in ("s_p", "keep") if name in settings}
        if eraser == "lora":
            settings = {"recipe": replace(recipe, **settings), "templates": prompts.templates}
        elif sentences and eraser in ("mace", "esd"):  # which put names into sentences themselves
            settings |= {"templates": prompts.templates}
        elif sentences:
            targets, surrogates = (filled(prompts.templates, names) for names in (targets, surrogates))
        edited = erasers.ERASERS[eraser](world.model, targets, surrogates, preserved, seed, **settings)
        size = sum(W.numel() for W in edited.values())
        if eraser == "lora":
            k = settings["recipe"].k * len(targets)
            size = sum(min(k, W.shape[1]) * sum(W.shape) for W in edited.values())
        return Erased(world.model.with_unet(edited), None, size)

    return build


def anchors_of_gates(world: World, scenario: Scenario) -> list[str]:
    """The anchor prompts that CPE's gates of a scenario's targets train on, together."""
    prompts, recipe, words = world.listed(scenario), PRESETS[scenario.preset], []
    for target in scenario.targets:
        asked = recipe, prompts, scenario.names_of(target), world.model.encode
        words += nearest_words(*asked, lambda texts: cached_contexts(world.model, texts))
    return anchor_prompts([*prompts.general, *dict.fromkeys(words)], prompts.templates)


# --- CPE ---------------------------------------------------------------------------------------------------------


def gated(kind: str) -> Callable[..., Erased]:
    """A builder for CPE: gates of each target by itself, "solved" or trained (`variants.trainer`), then merged."""

    def build(world: World, scenario: Scenario, seed: int, **settings: Any) -> Erased:
        """The same model with gates; `settings` replace `solve.Settings` or fields of the preset's recipe."""
        if kind in variants.GATES and len(scenario.targets) > 1:
            raise UserError(f"gates of kind {kind} cannot be merged: choose a scenario with one target")
        recipe, gates = PRESETS[scenario.preset], []
        recipe = recipe if kind == "solved" else replace(recipe, **settings)
        for target in scenario.targets:
            data = prepare(recipe, world.listed(scenario), scenario.names_of(target), world.model.encode,
                           lambda texts: cached_contexts(world.model, texts))  # fmt: skip
            if kind == "solved":
                gates.append(solved(world, data, solve.Settings(**{"eta": recipe.eta} | settings), seed))
            else:
                trainer = variants.trainer(world.layers, data, recipe, seed, kind)
                list(trainer)
                gates.append(trainer.gates.requires_grad_(False))
        size = sum(p.numel() for each in gates for p in each.parameters())
        return Erased(world.model, gates[0] if len(gates) == 1 else cpe.merge(gates), size)

    return build


def solved(world: World, data: cpe.Data, settings: solve.Settings, seed: int) -> cpe.ResAG:
    """Gates of one target that are solved for (solve.py)."""
    one = solve.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
    solver = solve.Solver(world.space, one, torch.cat([data.anchors.to(data.empty), data.empty]), settings)
    return solver.solve(data.targets, data.surrogates, seed)


# --- The rows ----------------------------------------------------------------------------------------------------

NONE = Method("none", lambda world, scenario, seed: Erased(world.model, None, 0))
LINEAR = ("uce", "rece", "mace", "speed", "esd", "lora")

# What benchmarks/tune.py found best, by method: for one target; and what differs for several, for more than thirty, and
# for a style. Of CPE the recipe is its preset.
TUNED: dict[str, dict[str, dict]] = json.loads((shipped("study") / "tuned.json").read_text(encoding="utf-8"))


def settings_of(method: Method, scenario: Scenario) -> dict:
    """Settings of a method in a scenario: its authors', those found, or for ablations those of what they start from."""
    name, many = method.name.split(",")[0], len(scenario.targets) > 1
    if method.name.endswith("published"):
        kinds = (name, f"{name}, {'style' if scenario.style else 'object'}", f"{name}, many" if many else name)
        found = [erasers.PUBLISHED.get(kind, {}) for kind in kinds]
    else:
        kinds = {"one": True, "many": many, "crowd": len(scenario.targets) > 30, "style": scenario.style}
        found = [TUNED[kind].get(method.name, TUNED[kind].get(name, {})) for kind, holds in kinds.items() if holds]
    return {key: value for part in (*found, method.settings) for key, value in part.items()}


METHODS = {
    method.name: method
    for method in (
        Method("cpe", gated("resag")),
        Method("cpe, solved", gated("solved")),
        *(Method(row, linear(n)) for n in LINEAR[:-1] for row in (n, f"{n}, published")),
        Method("lora", linear("lora")),
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
        *(Method(f"cpe, {kind}", gated(kind)) for kind in (*variants.GATES, "unmixed")),
        *(Method(f"cpe, {n} = {x:g}", gated("resag"), {n: x}) for n, values in STEPS.items() for x in values),
    )
}
