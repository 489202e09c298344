"""The rows of the table: every eraser, with the settings that were found for it, or those its authors published.

    method.build(world, scenario, seed=0, **settings_of(method, scenario))     # erased: weights edited, or with gates

Settings (`tuned.json`) come from benchmarks/tune.py, on targets that no scenario holds.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import cpe
import erasers
import solve
import token_space
from erasers import beyond
from loading.cache import cached_contexts, encoded
from loading.files import shipped
from loading.prompts import PRESETS, anchor_prompts, nearest_words, to_solve
from study.attacks import Victim
from study.world import Scenario, World


@dataclass(frozen=True)
class Method:
    """A row of the table: how to erase a scenario, and settings that go before those that were found or published."""

    name: str
    build: Callable[..., Victim]  # (world, scenario, seed, **settings)
    settings: dict = field(default_factory=dict)


def linear(eraser: str) -> Callable[..., Victim]:
    """A builder for one of `erasers.ERASERS` but LoRA, as its authors publish it if no setting says otherwise."""

    def build(world: World, scenario: Scenario, seed: int, **settings: Any) -> Victim:
        """The model with edited weights; `settings` are of the eraser, and of beyond.py."""
        prompts, surrogate = world.listed(scenario), PRESETS[scenario.preset].surrogate
        words, targets = [*prompts.general, *prompts.domain], list(scenario.targets)
        edited = beyond.erase(eraser, world.model, targets, surrogate, words, prompts.lines, seed, **settings)
        return Victim(world.model, world.model.with_unet(edited))

    return build


def lora(world: World, scenario: Scenario, seed: int, **settings: Any) -> Victim:
    """A LoRA of all targets with CPE's losses, anchors and sentences; `settings` replace fields of the recipe."""
    recipe, prompts = replace(PRESETS[scenario.preset], **settings), world.listed(scenario)
    given = [*scenario.targets], recipe.surrogate, anchors_of_gates(world, scenario)
    edited = erasers.ERASERS["lora"](world.model, *given, seed, recipe=recipe, templates=prompts.lines)
    return Victim(world.model, world.model.with_unet(edited))


def anchors_of_gates(world: World, scenario: Scenario) -> list[str]:
    """The anchor prompts that CPE's gates of a scenario's targets train on, together."""
    prompts, bare = world.listed(scenario), partial(cached_contexts, world.model, briefly=True)
    near = (nearest_words(PRESETS[scenario.preset], prompts, [target], bare) for target in scenario.targets)
    return anchor_prompts([*prompts.general, *dict.fromkeys(word for words in near for word in words)], prompts.lines)


def gated(make: Callable[..., cpe.ResAG], given: Callable = lambda prompts, style: prompts) -> Callable[..., Victim]:
    """A builder for CPE: gates of each target, by `solved` or `trained`, of the prompts `given` leaves; merged."""

    def build(world: World, scenario: Scenario, seed: int, published: bool = False, **settings: Any) -> Victim:
        """The same model with gates; `settings` are of `make`. `published`: as `as_published` says."""
        preset, gates, prompts = scenario.preset, [], given(world.listed(scenario), scenario.style)
        prompts = prompts.as_published() if published else prompts
        recipe = replace(PRESETS[preset], **{key: x for key, x in settings.items() if key in ("surrogate", "nearest")})
        for target in scenario.targets:
            # what the other gates erase, this one shall leave to them
            known = replace(prompts, general=[*prompts.general, *(name for name in scenario.targets if name != target)])
            data = encoded(world.model, recipe, known, [target], briefly=make is solved)
            gates.append(make(world, data, preset, seed, **settings))
        return Victim(world.model, world.model, cpe.merge(gates))

    return build


def solved(world: World, data: cpe.Data, preset: str, seed: int, **settings: Any) -> cpe.ResAG:
    """Gates of one target that are solved for (solve.py); `settings` replace fields of `solve.Settings`."""
    one = solve.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
    asked = solve.Settings.of(PRESETS[preset], preset.endswith("style"), **settings)
    solver = solve.Solver(world.space, one, torch.cat([data.anchors.to(data.empty), data.empty]), asked)
    return solver.solve(data.targets, data.surrogates, seed)


def trained(
    world: World, data: cpe.Data, preset: str, seed: int, trainer: type[cpe.Trainer] = cpe.Trainer, **settings: Any
) -> cpe.ResAG:
    """Gates of one target, trained; `settings` replace fields of the preset."""
    recipe, start = replace(PRESETS[preset], **settings), torch.Generator().manual_seed(seed)
    device, losses = data.empty.device, token_space.Losses(world.layers, data, recipe.eta)
    gates = cpe.ResAG(world.layers.widths, data.empty.shape[2], recipe.r, recipe.k, generator=start).to(device)
    chance = start if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    list(trainer(gates, losses, recipe, chance))
    return gates.requires_grad_(False)


NONE = Method("none", lambda world, scenario, seed: Victim(world.model, world.model))
LINEAR = ("uce", "rece", "mace", "speed", "esd")
PUBLISHED_ROWS = tuple(row for n in LINEAR for row in (n, f"{n}, published"))

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


CPE = Method("cpe", gated(trained)), Method("cpe, solved", gated(solved, to_solve))
EDITS = (*(Method(row, linear(row.split(",")[0])) for row in PUBLISHED_ROWS), Method("lora", lora))
METHODS = {method.name: method for method in (*CPE, *EDITS)}
QUICK_ROWS = ("cpe", "cpe, solved", "uce", "rece", "mace", "speed")
