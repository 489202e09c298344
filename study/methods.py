"""Every eraser with its settings, as the comparison runs it: (world, scenario, seed) -> an erased model.

Settings (`TUNED`, `MANY`, `CROWD`, `STYLE`) come from benchmarks/tune.py, on targets that no scenario holds.
Built on erasers/, deploy/bake.py, solve.py and cpe.py.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import cpe
import erasers
import solve
import token_space
from deploy import bake
from deploy.targets import Concept, training_prompts
from loading.cache import cache_folder, cached_contexts
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import PRESETS, anchor_prompts, nearest_words, prepare
from study import variants
from study.scenarios import SCENARIOS, Scenario, World
from token_space import context_gate
from weights import Model

# Of measurements, by eraser, else 1: raise it when a change makes cached figures wrong.
VERSIONS = {"cpe": 5, "lora": 4, "mace": 3, "uce": 2, "rece": 2, "speed": 2}


STEPS = ("first_steps", "later_steps", "attack_steps")


def named(parts: list) -> str:
    """A file name for whatever decides what is in the file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


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
    many: bool = False  # whether it differs from another row only where several things are erased


def compared(scenario: Scenario, methods: Sequence[Method]) -> list[Method]:
    """The rows of a scenario's table: the unerased model first."""
    return [NONE, *(method for method in methods if not method.many or len(scenario.targets) > 1)]


def linear(eraser: str) -> Callable[..., Erased]:
    """A builder for one of `erasers.ERASERS`."""

    def build(
        world: World, scenario: Scenario, seed: int, templates: str = "", anchors: bool = False, **settings: Any
    ) -> Erased:
        """The model with edited weights; `settings` are hyper-parameters of the eraser.

        `templates`: what is put into CPE's own prompt templates; "" nothing, "kept" what is preserved, "all" the
        targets, too, "pairs" the surrogate with them. `anchors`: whether nothing is preserved but what CPE's gates have
        as anchors, as LoRA always does; the fewer there are, the more each weighs. LoRA's settings replace
        fields of the preset's recipe; `longer`: how many times its steps.
        """
        if eraser in ("lora", "mace") and templates in ("all", "pairs"):
            raise ValueError(f"{eraser} puts names into sentences itself")
        prompts, targets = world.listed(scenario), [*scenario.targets, *scenario.aliases]
        kept, surrogates = [*prompts.general, *prompts.domain], [PRESETS[scenario.preset].surrogate] * len(targets)
        if templates:
            kept = anchor_prompts(kept, prompts.templates)
        if anchors or eraser == "lora":
            listed, kept = len(kept), anchors_of_gates(world, scenario)
            settings |= {name: settings[name] * listed / len(kept) for name in ("s_p", "keep") if name in settings}
        if templates in ("all", "pairs"):
            targets = filled(prompts.templates, targets)
            bare = [surrogate for surrogate in surrogates for _ in prompts.templates]
            surrogates = filled(prompts.templates, surrogates) if templates == "pairs" else bare
        if eraser == "lora":
            longer, recipe = settings.pop("longer", 1.0), PRESETS[scenario.preset]
            steps = {name: round(longer * getattr(recipe, name)) for name in STEPS}
            settings = {"recipe": dataclasses.replace(recipe, **steps | settings)}
        if eraser in ("lora", "mace"):  # which put names into sentences: into such as the model understands
            settings |= {"templates": prompts.templates}
        if eraser == "mace":
            settings |= {"photo": prompts.templates[0]}
        edited = erasers.ERASERS[eraser](world.model, targets, surrogates, kept, seed, **settings)
        size = sum(W.numel() for W in edited.values())
        if eraser == "lora":  # its factors
            k = settings["recipe"].k * len(targets)
            size = sum(min(k, W.shape[1]) * sum(W.shape) for W in edited.values())
        return Erased(world.model.with_unet(edited), None, size, 4 * size)

    return build


def filled(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Every name in every template, the first name in all of them first."""
    return [template.replace("{}", name) for name in names for template in templates]


def anchors_of_gates(world: World, scenario: Scenario) -> list[str]:
    """The anchor prompts that CPE's gates of a scenario's targets train on, together."""
    prompts, recipe, words = world.listed(scenario), PRESETS[scenario.preset], []
    for target in scenario.targets:
        asked = recipe, prompts, world.names(scenario, target), world.model.encode
        words += nearest_words(*asked, lambda texts: cached_contexts(world.model, texts))
    return anchor_prompts([*prompts.general, *dict.fromkeys(words)], prompts.templates)


def gated(kind: str) -> Callable[..., Erased]:
    """A builder for CPE: gates of every target on their own, then merged.

    `kind` is "solved", "resag", or another of `variants.KINDS`.
    """

    def build(world: World, scenario: Scenario, seed: int, **settings: Any) -> Erased:
        """The same model with gates; `settings` replace fields of the preset's recipe, or of solve.Settings."""
        gates, seconds = separate_gates(world, scenario, kind, seed, settings)
        size = sum(p.numel() for g in gates for p in g.parameters())
        written = sum(t.numel() for g in gates for t in cpe.to_tensors(g).values())
        return Erased(world.model, gates[0] if len(gates) == 1 else cpe.merge(gates), size, 4 * written, seconds)

    return build


def baked(world: World, scenario: Scenario, seed: int, **settings: Any) -> Erased:
    """CPE's gates distilled into the text encoder (deploy/bake.py): nothing is added to the model."""
    gates, seconds = separate_gates(world, scenario, "resag", seed, settings)
    recipe, prompts = PRESETS[scenario.preset], world.listed(scenario)
    concepts = [Concept(world.names(scenario, t), recipe.surrogate, recipe.eta) for t in scenario.targets]
    texts = training_prompts(concepts, prompts, seed)
    tokens = [world.model.tokenizer(part, world.model.tokens).to(world.model.device) for part in texts]
    gate = context_gate(world.space, cpe.merge(gates))
    recipe = bake.Recipe().of(len(concepts))
    baker = bake.Baker(world.model.text_encoder, gate, world.space, *tokens, recipe, seed)
    for _ in baker:
        pass
    changed = baker.changed()
    size = sum(tensor.numel() for tensor in changed.values())
    return Erased(world.model.with_text_encoder(changed), None, size, 4 * size, seconds)


def separate_gates(
    world: World, scenario: Scenario, kind: str, seed: int, settings: dict
) -> tuple[list[cpe.ResAG], float]:
    """Gates of every target of a scenario, and how many seconds of their making an earlier cell has spent."""
    made = [gates_of(world, scenario, target, kind, seed, settings) for target in scenario.targets]
    return [gates for gates, _ in made], sum(seconds for _, seconds in made)


def gates_of(
    world: World, scenario: Scenario, target: str, kind: str, seed: int, settings: dict
) -> tuple[cpe.ResAG, float]:
    """Gates of one target, from disk where a cell before has made them; and the seconds that then were not spent."""
    prompts, names = world.listed(scenario), world.names(scenario, target)
    recipe = PRESETS[scenario.preset]
    how = solve.Settings(**{"eta": recipe.eta} | settings) if kind == "solved" else replace(recipe, **settings)
    parts = [VERSIONS["cpe"], world.fingerprint, names, dataclasses.asdict(prompts)]
    parts += [dataclasses.asdict(recipe), dataclasses.asdict(how), kind, seed]
    path = cache_folder() / "compare" / f"gates-{named(parts)}.safetensors"
    made = variants.KINDS.get(kind, cpe.ResAG)
    r, k = how.r, how.k
    gates = made(world.layers.widths, len(world.space.M), r, k, generator=torch.Generator().manual_seed(seed))
    try:
        state, metadata = load_tensors(path)
        seconds = float(metadata["seconds"])
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in gates.state_dict().items()}:
            raise ValueError("tensors of other gates")  # loading these would take what fits before it raised
        gates.load_state_dict(state)
        return gates.requires_grad_(False), seconds
    except (UserError, KeyError, ValueError):  # not there yet, or damaged
        pass
    begun = time.perf_counter()
    recipe = how if kind != "solved" else recipe
    data = prepare(recipe, prompts, names, world.model.encode, lambda asked: cached_contexts(world.model, asked))
    if kind == "solved":
        one = solve.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
        anchors = torch.cat([data.anchors.to(data.empty), data.empty])
        gates = solve.Solver(world.space, one, anchors, how).solve(data.targets, data.surrogates, seed)
    else:
        losses = cpe.Losses if made in variants.LITERAL else token_space.Losses
        for _ in cpe.Trainer(
            gates, losses(world.layers, data, recipe.eta), recipe, torch.Generator().manual_seed(seed)
        ):
            pass
    save_tensors(path, gates.state_dict(), {"seconds": str(time.perf_counter() - begun)})
    return gates.requires_grad_(False), 0.0


def untouched(world: World, scenario: Scenario, seed: int) -> Erased:
    """The model as it is."""
    return Erased(world.model, None, 0, 0)


NONE = Method("none", untouched)

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

METHODS = {
    method.name: method
    for method in (
        Method("cpe", gated("resag")),
        Method("cpe, solved", gated("solved")),
        Method("cpe, baked", baked),
        *(Method(name, linear(name)) for name in ("uce", "rece", "mace", "speed", "esd", "lora")),
    )
}

# What reviewers asked: each row changes one thing of CPE (hard and mlp their lambda, too), or gives a linear eraser
# what CPE has.
ABLATIONS = {
    method.name: method
    for method in (
        *(Method(f"{n}, CPE's anchors", linear(n), {"anchors": True}) for n in ("uce", "rece", "mace", "speed")),
        Method("cpe, general anchors only", gated("resag"), {"nearest": 0}),
        *(Method(f"cpe, {kind}", gated(kind)) for kind in list(variants.KINDS)[1:]),
        *(Method(f"cpe, {n} stage{'s' * (n > 1)}", gated("resag"), {"stages": n}) for n in (1, 2, 4)),
        *(Method(f"cpe, k = {k}", gated("resag"), {"k": k}) for k in (1, 2, 4, 8)),
        *(Method(f"cpe, r = {r}", gated("resag"), {"r": r}) for r in (4, 64)),
        *(Method(f"cpe, eta = {eta:g}", gated("resag"), {"eta": eta}) for eta in (0.0, 1.0)),
        *(Method(f"cpe, lambda = {lam:g}", gated("resag"), {"lam": lam}) for lam in (30.0, 3000.0)),
        *(Method(f"cpe, J = {J}", gated("resag"), {"deltas": J}) for J in (1, 64)),
        Method("cpe, anchors without noise", gated("resag"), {"noise": 0.0}),
        Method("cpe, deltas from about 0", gated("resag"), {"delta_start": 0.0}),
    )
}
ABLATION_SCENARIOS = {
    "neighbours": SCENARIOS["neighbours"],
    "shared word": Scenario(("cat face",)),
    "shared colour": Scenario(("red apple",)),
    "part of the name": Scenario(("santa claus",), aliases=("santa",)),
}


def tuned(method: Method, scenario: Scenario) -> dict:
    """Tuned hyper-parameters of a method and its ablations ("uce, CPE's anchors" starts from those of "uce")."""
    count, found = len(scenario.targets), {}
    for table in (TUNED, MANY if count > 1 else {}, CROWD if count > 30 else {}, STYLE if scenario.style else {}):
        found |= table.get(method.name, table.get(method.name.split(",")[0], {}))
    return found
