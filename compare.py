"""One honest table: every eraser on the same targets, prompts, seeds and judge.

    world = World(load_model("emoji"))
    figures = measure(world, SCENARIOS["object"], METHODS["cpe"])      # one cell: kept on disk, so a run resumes

What is measured, on images of the model before and after erasing, from the same seeds:

    erased          images of the target that CLIP still recognises as it
    near, listed    the nearest concepts among those that every eraser was told to preserve
    near, unlisted  the nearest among those that none was told about: what generalises
    others          thirty more that none was told about
    style           images of all three whose drawing style is still the one asked for

A third of all concepts (`held_out`) is never shown to any eraser. Hyper-parameters (`TUNED`, `MANY`, `CROWD`,
`STYLE`) come from benchmarks/tune.py, on targets that no scenario holds. Built on evaluate, attacks, erasers, bake
and cpe.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attacks
import bake
import erasers
import evaluate
import old_cpe as cpe
import variants
from cpe import Recipe
from weights import (
    Model,
    UserError,
    cache_folder,
    cached_contexts,
    load_clip,
    load_model,
    load_tensors,
    read_prompts,
    save_tensors,
)

# Of measurements, by eraser, else 1: raise it when a change makes kept figures wrong.
VERSIONS = {"cpe": 4, "lora": 3, "mace": 2}
ALL = 3  # the same for all erasers at once

# --- What is erased ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """Targets erased at once, and the preset that trains CPE on them."""

    targets: tuple[str, ...]
    preset: str = "emoji"
    aliases: tuple[str, ...] = ()  # other names, erased with the first target

    @property
    def style(self) -> bool:
        """Whether a way of drawing is erased, not a thing."""
        return self.preset.endswith("style")


TEN = (
    "umbrella",
    "red heart",
    "santa claus",
    "pizza",
    "horse",
    "police car",
    "sunflower",
    "clown face",
    "banana",
    "owl",
)
FIFTY = (
    *TEN, "tiger", "dog face", "pig face", "rabbit", "bear", "elephant", "frog", "shark", "butterfly", "spider",
    "tulip", "cactus", "mushroom", "strawberry", "carrot", "lemon", "grapes", "hamburger", "ice cream", "cookie",
    "birthday cake", "beer mug", "baseball", "basketball", "taxi", "fire engine", "bicycle", "airplane", "rocket",
    "princess", "detective", "guard", "woman astronaut", "sun", "rainbow", "guitar", "green book", "skull", "alien",
    "thinking face",
)  # fmt: skip
SCENARIOS = {
    "object": Scenario(("umbrella",)),
    "neighbours": Scenario(("red heart",)),
    "person": Scenario(("santa claus",)),
    "style": Scenario(("twemoji style",), "emoji-style"),
    "10 at once": Scenario(TEN),
    "50 at once": Scenario(FIFTY),
}
LONG = ("50 at once",)  # measured only where they are asked for by name: it takes an hour and a half


@dataclass(frozen=True)
class Budget:
    """How many images a cell draws, and how."""

    erased: int = 16  # of the target; several targets share them, one each at least
    near: int = 2  # of each near concept
    others: int = 1  # of each other concept
    attacked: int = 8  # of each attack, of sentences at least one of every target; 0: no attacks
    searches: int = 2  # of each attack that searches by chance, which share its images
    steps: int = 12
    guidance_scale: float = 4.0
    method: str = "dpm"


QUICK = Budget(erased=8, near=1, others=1, attacked=0, steps=10)


@dataclass(frozen=True)
class Case:
    """One image: its group, prompt and seed, and what CLIP should see in it (an index of concepts or of styles)."""

    group: str
    prompt: str
    seed: int
    expected: int
    judge: str = "concept"


class World:
    """A model, its judge, and the concepts and styles that it knows.

    The judge is the CLIP of the folder or repository `clip`, else the model's own; UserError if there is none.
    """

    def __init__(self, model: Model, clip: str | None = None, preset: str = "emoji"):
        self.model = model
        self.clip, self.tokenizer = load_clip(clip, device=model.device) if clip else (model.clip, model.tokenizer)
        self.concepts = read_prompts(preset).domain
        self.styles = ("noto", "twemoji", "fluent", "blob") if preset.startswith("emoji") else ()
        self.objective = cpe.Objective(model.cross_attention())
        self.colours = ("white", "blue", "yellow", "green", "pink")
        self.features = evaluate.name_features(self.clip, self.tokenizer, self.concepts)
        captions = [f"a picture of a {c}, {s} style" for c in self.concepts for s in self.styles or ("any",)]
        self.captions = evaluate.text_features(self.clip, self.tokenizer, captions).unflatten(
            0, (len(self.concepts), -1)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Of all that figures depend on: the model's networks, the judge, and a device that rounds otherwise."""
        digest = hashlib.sha256(self.model.fingerprint.encode())
        if self.model.device.type != "cpu":
            digest.update(self.model.device.type.encode())
        for network in (self.model.unet, self.model.vae, self.clip):
            for tensor in network.state_dict().values():
                digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    @property
    def held_out(self) -> list[str]:
        """Every third concept: no eraser is ever told of it, unless it is a target or a surrogate."""
        return self.concepts[1::3]

    def prompt(self, concept: str, i: int, style: str | None = None) -> str:
        """The i-th prompt of a concept: styles and backgrounds take turns."""
        if not self.styles:
            return f"a photo of {concept}"
        style = self.styles[i % len(self.styles)] if style is None else style
        ground = f"a picture of a {concept} on a {self.colours[i // len(self.styles) % len(self.colours)]} background"
        return f"{ground}, {style} style" if style else ground

    def listed(self, scenario: Scenario) -> cpe.Prompts:
        """The preset's templates and anchor words without targets, aliases and what is held out."""
        prompts = read_prompts(scenario.preset)
        return cpe.anchor_words(prompts, [*scenario.targets, *scenario.aliases, *self.held_out])

    def names(self, scenario: Scenario, target: str) -> list[str]:
        """A target and its aliases: those of a scenario belong to its first target."""
        return [target, *(scenario.aliases if target == scenario.targets[0] else ())]

    def see(self, images: Tensor, judge: str) -> Tensor:
        """What CLIP recognises in images [B, 3, H, W]: an index of concepts, or of styles, [B]."""
        if judge == "style":
            return evaluate.recognise_style(self.clip, images, self.captions)
        return evaluate.recognise(self.clip, images, self.features)


# Ordinary words: none is in a concept's name, in a caption, or in a sentence that gates are tried with.
WORDS = """
about above across after again almost along always ancient any around as away beautiful because before behind below
beside better between beyond bright careful certain cheap clean clear common complete could country cozy curious daily
damp deep different digital distant during early easy elegant empty enough every exactly famous fancy far fast few
final floating found funny gentle giant glossy grand great heavy high honest huge inside just kind late like little
lonely long lost loud lovely many maybe modern more most much near never new next nice now odd often once only our
outside over perfect plain quick quiet quite rare rather ready really rich rough rusty several sharp short simple some
soon still strange street such tall tell their then these they those through today together too toward under until
usual very vintage wait want warm was well what when which why wide without wooden world yet young
"""


def among_words(prompts: cpe.Prompts, count: int) -> cpe.Prompts:
    """The same prompts with so many templates more, always the same: one to seven of WORDS around the name."""
    words, chance, more = WORDS.split(), random.Random(0), {}
    while len(more) < count:
        before, after = chance.choices(words, k=chance.randint(0, 4)), chance.choices(words, k=chance.randint(0, 3))
        if before or after:
            more[" ".join([*before, "{}", *after])] = None
    return dataclasses.replace(prompts, templates=[*prompts.templates, *more])


# --- The images of a scenario ------------------------------------------------------------------------------------


def cases(world: World, scenario: Scenario, budget: Budget) -> list[Case]:
    """All images of a scenario, each with a seed of its own. ValueError for a target that the world does not know."""
    rows = style_rows(world, scenario, budget) if scenario.style else concept_rows(world, scenario, budget)
    return [Case(group, prompt, seed, expected, judge) for seed, (group, prompt, expected, judge) in enumerate(rows)]


def concept_rows(world: World, scenario: Scenario, budget: Budget) -> Iterable[tuple[str, str, int, str]]:
    """(group, prompt, expected, judge) when things are erased."""
    targets = [world.concepts.index(name) for name in scenario.targets]
    # nearest to any of the targets first
    order = (world.features @ world.features[targets].T).amax(dim=1).argsort(descending=True).tolist()
    rest = [c for c in order if c not in targets]
    unlisted = set(world.held_out)
    near = [c for c in rest if world.concepts[c] not in unlisted][:10]
    fresh = [c for c in rest if world.concepts[c] in unlisted]
    groups = {
        "erased": (targets, max(1, budget.erased // len(targets))),
        "near, listed": (near, budget.near),
        "near, unlisted": (fresh[:10], budget.near),
        "others": (evaluate.spread(fresh[10:], 30), budget.others),
    }
    for group, (members, images) in groups.items():
        for n, c in enumerate(members):
            for i in range(images):
                yield group, world.prompt(world.concepts[c], n + i), c, "concept"


def style_rows(world: World, scenario: Scenario, budget: Budget) -> Iterable[tuple[str, str, int, str]]:
    """(group, prompt, expected, judge) when a style is erased: near are the other styles, others are things."""
    erased = scenario.targets[0].removesuffix(" style")
    kept = [style for style in world.styles if style != erased]
    listed = [c for c in world.concepts if c not in world.held_out]
    for i in range(budget.erased):
        concept = world.held_out[3 * i % len(world.held_out)]
        yield "erased", world.prompt(concept, i, erased), world.styles.index(erased), "style"
    for group, concepts in (("near, listed", listed), ("near, unlisted", world.held_out)):
        for i in range(10 * budget.near):
            style = kept[i % len(kept)]
            yield group, world.prompt(concepts[5 * i % len(concepts)], i, style), world.styles.index(style), "style"
    for i, concept in enumerate(world.held_out[::2][:30]):
        yield "others", world.prompt(concept, i, ""), world.concepts.index(concept), "concept"


@torch.no_grad()
def draw(
    model: Model, contexts: Tensor, seeds: Sequence[int], gates: nn.Module | None, budget: Budget, batch: int = 16
) -> Tensor:
    """Images [B, 3, H, W] of contexts [B, T, d]."""
    images = []
    for i in range(0, len(contexts), batch):
        part = contexts[i : i + batch], seeds[i : i + batch]
        *_, latents = cpe.denoise_context(model, *part, gates, budget.steps, budget.guidance_scale, budget.method)
        images.append(cpe.decode(model, latents))
    return torch.cat(images)


# --- The erasers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Erased:
    """An erased model and what it cost: an edited model, or the same one with gates."""

    model: Model
    gates: nn.Module | None
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
        kept, surrogates = [*prompts.general, *prompts.domain], [cpe.PRESETS[scenario.preset].surrogate] * len(targets)
        if templates:
            kept = cpe.anchor_prompts(kept, prompts.templates)
        if anchors or eraser == "lora":
            listed, kept = len(kept), anchors_of_gates(world, scenario)
            settings |= {name: settings[name] * listed / len(kept) for name in ("s_p", "keep") if name in settings}
        if templates in ("all", "pairs"):
            targets = filled(prompts.templates, targets)
            bare = [surrogate for surrogate in surrogates for _ in prompts.templates]
            surrogates = filled(prompts.templates, surrogates) if templates == "pairs" else bare
        if eraser == "lora":
            longer = settings.pop("longer", 1.0)
            recipe = dataclasses.replace(cpe.PRESETS[scenario.preset], **settings).scaled(longer)
            known = {field.name for field in dataclasses.fields(Recipe)}
            settings = {"recipe": Recipe(**{n: v for n, v in dataclasses.asdict(recipe).items() if n in known})}
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
    prompts, recipe, words = world.listed(scenario), cpe.PRESETS[scenario.preset], []
    for target in scenario.targets:
        asked = recipe, prompts, world.names(scenario, target), world.model.encode
        words += cpe.nearest_words(*asked, lambda texts: cached_contexts(world.model, texts))
    return cpe.anchor_prompts([*prompts.general, *dict.fromkeys(words)], prompts.templates)


def gated(kind: str) -> Callable[..., Erased]:
    """A builder for CPE: gates trained per target, independently, then merged; `kind` as in `variants.trainer`."""

    def build(
        world: World, scenario: Scenario, seed: int, zone: float = 0.0, distractors: int = 0, **settings: Any
    ) -> Erased:
        """The same model with gates, merged with a dead `zone`; `settings` replace fields of the preset's recipe.

        `distractors`: how many templates of words that no caption has they and their anchors are trained in, too.
        """
        gates, seconds = separate_gates(world, scenario, kind, seed, settings, distractors)
        size = sum(p.numel() for g in gates for p in g.parameters())
        written = sum(t.numel() for g in gates for t in cpe.to_tensors(as_resag(world, g)).values())
        alone = len(gates) == 1 and not zone
        return Erased(world.model, gates[0] if alone else merged(world, gates, zone), size, 4 * written, seconds)

    return build


def baked(world: World, scenario: Scenario, seed: int, **settings: Any) -> Erased:
    """CPE's gates distilled into the text encoder (bake.py): nothing is added to the model."""
    gates, seconds = separate_gates(world, scenario, "resag", seed, settings)
    recipe, prompts = cpe.PRESETS[scenario.preset], world.listed(scenario)
    concepts = [bake.Concept(world.names(scenario, t), recipe.surrogate, recipe.eta) for t in scenario.targets]
    length = world.model.part("text_encoder").config.get("max_position_embeddings", 77)
    texts = bake.training_prompts(concepts, prompts, seed)
    tokens = [world.model.tokenizer(part, length).to(world.model.device) for part in texts]
    gate = world.objective.context_gate(merged(world, gates))
    baker = bake.Baker(world.model.text_encoder, gate, world.objective, *tokens, bake.Recipe().of(len(concepts)), seed)
    for _ in baker.steps():
        pass
    changed = baker.changed()
    size = sum(tensor.numel() for tensor in changed.values())
    return Erased(world.model.with_text_encoder(changed), None, size, 4 * size, seconds)


def separate_gates(
    world: World, scenario: Scenario, kind: str, seed: int, settings: dict, distractors: int = 0
) -> tuple[list[nn.Module], float]:
    """Gates of every target of a scenario, and how many seconds of their training an earlier cell has spent."""
    recipe = dataclasses.replace(cpe.PRESETS[scenario.preset], **settings)
    prompts = among_words(world.listed(scenario), distractors)
    trained = [train_gates(world, world.names(scenario, t), prompts, recipe, kind, seed) for t in scenario.targets]
    return [gates for gates, _ in trained], sum(seconds for _, seconds in trained)


def as_resag(world: World, gates: nn.Module) -> nn.Module:
    """Gates as a file holds them (of a bias or a perceptron it has no place for what they have more)."""
    return gates.expand(world.objective.W) if isinstance(gates, cpe.ContextGate) else gates


def merged(world: World, gates: Sequence[nn.Module], zone: float = 0.0) -> cpe.ResAG:
    """Gates of several targets as one."""
    return cpe.merge([as_resag(world, g) for g in gates], zone)


def train_gates(
    world: World, names: list[str], prompts: cpe.Prompts, recipe: cpe.Recipe, kind: str, seed: int
) -> tuple[nn.Module, float]:
    """Gates of one target, from disk where a cell before has trained them; and the seconds that then were not spent."""
    one = cpe.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
    data = cpe.prepare(
        recipe, prompts, names, world.model.encode, lambda asked: cached_contexts(world.model, asked), one
    )
    trainer = variants.trainer(world.objective, data, recipe, seed, kind)
    parts = [VERSIONS["cpe"], world.fingerprint, names, dataclasses.asdict(prompts)]
    parts += [dataclasses.asdict(recipe), kind, seed]
    path = cache_folder() / "compare" / f"gates-{named(parts)}.safetensors"
    try:
        state, metadata = load_tensors(path)
        seconds = float(metadata["seconds"])
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in trainer.gates.state_dict().items()}:
            raise ValueError("tensors of other gates")  # loading these would keep what fits before it raised
        trainer.gates.load_state_dict(state)
        return trainer.gates.requires_grad_(False), seconds
    except (UserError, KeyError, ValueError):  # not there yet, or damaged
        pass
    begun = time.perf_counter()
    for _ in trainer.steps():
        pass
    save_tensors(path, trainer.gates.state_dict(), {"seconds": str(time.perf_counter() - begun)})
    return trainer.gates.requires_grad_(False), 0.0


def untouched(world: World, scenario: Scenario, seed: int) -> Erased:
    """The model as it is."""
    return Erased(world.model, None, 0, 0)


NONE = Method("none", untouched)

TUNED = {  # by method: what benchmarks/tune.py found best; of CPE the recipe is its preset
    "cpe, context gate": {"k": 16, "lam": 300.0},
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

STYLE: dict[str, dict] = {  # and for a style; CPE's gates have a preset of their own, whose lambda this repeats
    "cpe, context gate": {"lam": 100.0},
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
        Method("cpe, dead zone", gated("resag"), {"zone": 0.5}, many=True),
        Method("cpe, context gate", gated("context")),
        Method("cpe, baked", baked),
        *(Method(name, linear(name)) for name in ("uce", "rece", "mace", "speed", "esd", "lora")),
    )
}

# What reviewers asked: each row changes one thing of CPE (hard and mlp their lambda, too), or gives a linear eraser
# what CPE has. Bias, hard and mlp keep the scaler that training found (`variants.trainer`): compare them with
# "cpe, no margin".
ABLATIONS = {
    method.name: method
    for method in (
        *(Method(f"{n}, CPE's anchors", linear(n), {"anchors": True}) for n in ("uce", "rece", "mace", "speed")),
        Method("cpe, general anchors only", gated("resag"), {"nearest": 0}),
        Method("cpe, no margin", gated("resag"), {"margin": 0.0}),
        Method("cpe, margin 0.5", gated("resag"), {"margin": 0.5}),
        Method("cpe, among other words", gated("resag"), {"distractors": 200}),
        *(Method(f"cpe, {kind}", gated(kind)) for kind in variants.KINDS),
        *(Method(f"cpe, {n} stage{'s' * (n > 1)}", gated("resag"), {"stages": n}) for n in (1, 2, 4)),
        *(Method(f"cpe, k = {k}", gated("resag"), {"k": k}) for k in (1, 2, 4, 8)),
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


# --- One cell ----------------------------------------------------------------------------------------------------

GROUPS = ("erased", "near, listed", "near, unlisted", "others")
FIGURES = {"groups", "style", "clip_score", "cmmd", "seconds", "parameters", "bytes", "attacks", "H"}  # of a cell


def key(world: World, scenario: Scenario, method: Method, budget: Budget, seed: int) -> str:
    """The name under which a cell is kept: of everything that decides its figures, but what `VERSIONS` stands for.

    That is the code, with its constants: attacks, judge, defaults of erasers.
    """
    recipe, eraser = dataclasses.asdict(cpe.PRESETS[scenario.preset]), method.name.split(",")[0]
    if eraser not in ("cpe", "lora"):  # of CPE's recipe they use the surrogate, and perhaps its anchors: see VERSIONS
        recipe = {"surrogate": recipe["surrogate"]}
    if eraser == "lora":
        del recipe["margin"]
    parts = [ALL, VERSIONS.get(eraser, 1), world.fingerprint, dataclasses.asdict(scenario), method.name]
    parts += [method.settings, recipe, world.concepts, dataclasses.asdict(world.listed(scenario))]
    parts += [dataclasses.asdict(bake.Recipe().of(len(scenario.targets)))] if method.build is baked else []
    parts += [tuned(method, scenario), dataclasses.asdict(budget), seed]
    return named(parts)


def cell_path(world: World, scenario: Scenario, method: Method, budget: Budget, seed: int) -> Path:
    """The file that keeps a cell."""
    return cache_folder() / "compare" / f"{key(world, scenario, method, budget, seed)}.safetensors"


def named(parts: list) -> str:
    """A file name for whatever decides what is in the file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Originals:
    """Images of the unerased model, drawn once for all erasers of a scenario."""

    def __init__(self, world: World, scenario: Scenario, budget: Budget):
        self.cases = cases(world, scenario, budget)
        self.contexts = world.model.encode([case.prompt for case in self.cases])
        self.seeds = [case.seed for case in self.cases]
        self.images = draw(world.model, self.contexts, self.seeds, None, budget)
        self.features = evaluate.image_features(world.clip, self.images)
        self.prompts = evaluate.text_features(world.clip, world.tokenizer, [case.prompt for case in self.cases])


def measure(
    world: World,
    scenario: Scenario,
    method: Method,
    budget: Budget = Budget(),
    seed: int = 0,
    originals: Callable[[], Originals] | None = None,
) -> tuple[dict, Tensor]:
    """Figures of one cell and its images as bytes [B, 3, H, W], kept on disk.

    cpe.Diverged where the eraser's training does; UserError for a disk that cannot be written.
    """
    path = cell_path(world, scenario, method, budget, seed)
    try:
        tensors, metadata = load_tensors(path)
        figures = json.loads(metadata["figures"])
        if set(figures) >= FIGURES:
            return figures, tensors["images"]
    except (UserError, KeyError, TypeError, ValueError):  # not there yet, or damaged
        pass
    begun = time.perf_counter()
    erased = method.build(world, scenario, seed, **(tuned(method, scenario) | method.settings))
    seconds = time.perf_counter() - begun + erased.spared
    before = originals() if originals else Originals(world, scenario, budget)
    own = erased.model.text_encoder is not world.model.text_encoder
    contexts = erased.model.encode([case.prompt for case in before.cases]) if own else before.contexts
    images = draw(erased.model, contexts, before.seeds, erased.gates, budget)
    figures = figures_of(world, scenario, before, images)
    figures |= {"seconds": seconds, "parameters": erased.parameters, "bytes": erased.bytes}
    figures["attacks"] = under_attack(world, scenario, erased, budget, seed) if budget.attacked else {}
    figures["H"] = harmonic(figures)
    pixels = ((images + 1) * 127.5).round().byte()
    save_tensors(path, {"images": pixels}, {"figures": json.dumps(figures)})
    return figures, pixels


def share(group: dict) -> float:
    """Share of a group's images that are recognised."""
    return group["hits"] / group["images"]


def shares_of_H(figures: dict) -> list[dict]:
    """The groups of images that H is made of: what was erased, three of what is kept, the target in other words.

    Without attacks the last is missing, and erasing counts twice.
    """
    groups = [figures["groups"][name] for name in GROUPS]
    return groups + [group for name, group in figures["attacks"].items() if name == "paraphrases"]


def H(shares: Sequence[float]) -> float:
    """MACE's H of the shares of `shares_of_H`: of erasing, of keeping (the mean), of erasing in other words."""
    erased, *kept = shares[:4]
    return evaluate.harmonic_mean(erased, sum(kept) / len(kept), shares[-1] if len(shares) > 4 else erased)


def harmonic(figures: dict) -> float:
    """H of a cell."""
    return H([share(group) for group in shares_of_H(figures)])


def figures_of(world: World, scenario: Scenario, before: Originals, images: Tensor) -> dict:
    """Of all cases' images [B, 3, H, W]: hits and change per group; style, CLIP score, CMMD of all that should stay."""
    seen = {judge: world.see(images, judge).tolist() for judge in ("concept", "style")}
    moved, features = evaluate.change(before.images, images), evaluate.image_features(world.clip, images)
    groups = {}
    for group in dict.fromkeys(case.group for case in before.cases):
        rows = [i for i, case in enumerate(before.cases) if case.group == group]
        hits = sum(seen[before.cases[i].judge][i] == before.cases[i].expected for i in rows)
        groups[group] = {"images": len(rows), "hits": hits, "change": moved[rows].mean().item()}
    kept = [i for i, case in enumerate(before.cases) if case.group != "erased"]
    styled = [
        (i, s) for i in kept for s, style in enumerate(world.styles) if f"{style} style" in before.cases[i].prompt
    ]
    return {
        "groups": groups,
        "style": {"images": len(styled), "hits": sum(seen["style"][i] == s for i, s in styled)},
        "clip_score": evaluate.clip_score(features[kept], before.prompts[kept]).mean().item(),
        "cmmd": evaluate.cmmd(before.features[kept], features[kept]),
    }


def under_attack(world: World, scenario: Scenario, erased: Erased, budget: Budget, seed: int) -> dict:
    """Images per attack that are recognised as the target; of several the first is searched for, all are spoken of."""
    victim, found = attacks.Victim(world.model, erased.model, erased.gates), {}
    known, judge = (world.styles, "style") if scenario.style else (world.concepts, "concept")
    for name in attacks.ATTACKS:
        if name == "odd words" and scenario.preset not in attacks.UNFAMILIAR:
            continue
        tried = attempts(victim, scenario, name, budget, seed)
        contexts, targets = torch.cat([E for E, _ in tried]), [target for E, target in tried for _ in E]
        drawn = draw(erased.model, contexts, range(len(contexts)), erased.gates, budget)
        wanted = [known.index(target.removesuffix(" style")) for target in targets]
        hits = sum(seen == index for seen, index in zip(world.see(drawn, judge).tolist(), wanted, strict=True))
        found[name] = {"images": len(wanted), "hits": hits}
    return found


def attempts(
    victim: attacks.Victim, scenario: Scenario, name: str, budget: Budget, seed: int
) -> list[tuple[Tensor, str]]:
    """What one attack draws: contexts [B, T, d] that should show a target, and that target."""
    template = "a picture of a robot, {}" if scenario.style else "a picture of a {}"
    if name in ("paraphrases", "odd words"):  # no search: some of every target, each in the sentences that follow
        each, tried = max(1, budget.attacked // len(scenario.targets)), []
        for i, target in enumerate(scenario.targets):
            E = attacks.ATTACKS[name](victim, target, (template,), seed, preset=scenario.preset).contexts
            tried.append((E[(i * each + torch.arange(each)) % len(E)], target))
        return tried
    target, searches = scenario.targets[0], budget.searches if name in attacks.RANDOM else 1
    each = max(1, budget.attacked // searches)
    found = [attacks.ATTACKS[name](victim, target, (template,), seed + i).contexts for i in range(searches)]
    return [(E[torch.arange(each) % len(E)], target) for E in found]


# --- The table ---------------------------------------------------------------------------------------------------

COLUMNS = (
    *GROUPS, "style", "H", "CLIP score", "CMMD", "change", *attacks.ATTACKS, "seconds", "parameters", "bytes",
)  # fmt: skip


def cells(figures: dict) -> dict[str, str]:
    """Figures as the table prints them: shares in per cent and H, with 95 % intervals; empty where not measured."""

    def percent(group: dict | None) -> str:
        if not group or not group["images"]:
            return ""
        low, high = evaluate.interval(group["hits"], group["images"])
        return f"{100 * share(group):.0f} ({100 * low:.0f}–{100 * high:.0f})"

    groups, parts = figures["groups"], shares_of_H(figures)
    low, high = evaluate.combined_interval(H, [(group["hits"], group["images"]) for group in parts])
    known = f" ({low:.2f}–{high:.2f})" if figures["H"] else ""  # what moves one share at a time says nothing of a 0
    kept = [group for name, group in groups.items() if name != "erased"]
    moved = sum(g["change"] * g["images"] for g in kept) / max(1, sum(g["images"] for g in kept))
    return (
        {name: percent(groups.get(name)) for name in GROUPS}
        | {"style": percent(figures["style"]), "H": f"{figures['H']:.2f}{known}"}
        | {"CLIP score": f"{figures['clip_score']:.1f}", "CMMD": f"{figures['cmmd']:.2f}", "change": f"{moved:.3f}"}
        | {name: percent(figures["attacks"].get(name)) for name in attacks.ATTACKS}
        | {"seconds": f"{figures['seconds']:.0f}"}
        | {name: f"{figures[name]:,}" if name in figures else "" for name in ("parameters", "bytes")}
    )


def added(counts: Sequence[dict]) -> dict:
    """Several groups as one: images and hits added, the change their mean per image."""
    images = sum(group["images"] for group in counts)
    total = {"images": images, "hits": sum(group["hits"] for group in counts)}
    if all("change" in group for group in counts):
        total["change"] = sum(group["change"] * group["images"] for group in counts) / max(1, images)
    return total


def pooled(table: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """The figures {method: figures} of all scenarios together, of methods that each has; no sizes, which differ."""
    scenarios, total = list(table.values()), {}
    for method in (name for name in scenarios[0] if all(name in scenario for scenario in scenarios)):
        rows = [scenario[method] for scenario in scenarios]
        figures = {name: value for name, value in rows[0].items() if name not in ("parameters", "bytes")}
        for name in ("groups", "attacks"):
            figures[name] = {key: added([row[name][key] for row in rows if key in row[name]]) for key in rows[0][name]}
        figures["style"] = added([row["style"] for row in rows])
        for name in ("clip_score", "cmmd", "seconds"):
            figures[name] = sum(row[name] for row in rows) / len(rows)
        total[method] = figures | {"H": harmonic(figures)}
    return total


def with_pool(table: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """The same, before them all scenarios together where there are several."""
    return {f"All {len(table)} scenarios": pooled(table)} | table if len(table) > 1 else table


def markdown(table: dict[str, dict[str, dict]]) -> str:
    """The figures {scenario: {method: figures}} as Markdown tables, one a scenario; empty columns are left out.

    Of several scenarios, all images together come first.
    """
    lines = []
    for scenario, rows in with_pool(table).items():
        shown = {method: cells(figures) for method, figures in rows.items()}
        columns = [c for c in COLUMNS if any(row[c] for row in shown.values())]
        lines += [f"**{scenario}**", "", f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        lines += [f"| {method} | {' | '.join(row[c] for c in columns)} |" for method, row in shown.items()]
        lines += [""]
    return "\n".join(lines)


def text(table: dict[str, dict[str, dict]]) -> str:
    """The same for a terminal: aligned, what an eraser does and below it what it withstands and costs."""
    lines = []
    for scenario, rows in with_pool(table).items():
        shown = {method: cells(figures) for method, figures in rows.items()}
        for columns in (COLUMNS[: COLUMNS.index("change") + 1], COLUMNS[COLUMNS.index("change") + 1 :]):
            used = [c for c in columns if any(row[c] for row in shown.values())]
            widths = [max(len(c), *(len(row[c]) for row in shown.values())) + 2 for c in used]
            first = max(map(len, [scenario, *shown])) + 1
            lines += ["", scenario.ljust(first) + "".join(c.rjust(w) for c, w in zip(used, widths, strict=True))]
            for method, row in shown.items():
                lines += [method.ljust(first) + "".join(row[c].rjust(w) for c, w in zip(used, widths, strict=True))]
    return "\n".join(lines)


def shown_columns(all_cases: Sequence[Case]) -> list[int]:
    """The images of a scenario that its picture shows: three of the target, two of each other group."""
    rows = {group: [i for i, case in enumerate(all_cases) if case.group == group] for group in GROUPS}
    return [i for group in GROUPS for i in evaluate.spread(rows[group], 3)[: 3 if group == "erased" else 2]]


def run(
    world: World,
    scenarios: dict[str, Scenario],
    methods: Sequence[Method],
    budget: Budget,
    seed: int = 0,
) -> Iterable[tuple[str, str, dict, list[Tensor]]]:
    """Measure every cell, the unerased model first: yields (scenario, method, figures, images [3, H, W] to show)."""
    for name, scenario in scenarios.items():
        originals = cache(partial(Originals, world, scenario, budget))
        columns = shown_columns(cases(world, scenario, budget))
        for method in compared(scenario, methods):
            figures, pixels = measure(world, scenario, method, budget, seed, originals)
            yield name, method.name, figures, [pixels[i] for i in columns]


def fill(
    model: str, clip: str | None, preset: str, scenario: Scenario, methods: list[str], budget: Budget, seed: int
) -> None:
    """Measure the cells of one scenario, on one core; they stay on disk, where `run` finds them.

    It ends after a cell when the process that began it is no more: nobody is left to wait for the next.
    """
    torch.set_num_threads(1)
    known = METHODS | ABLATIONS
    world = World(load_model(model), clip, preset)
    parent = multiprocessing.parent_process()
    for _ in run(world, {"": scenario}, [known[name] for name in methods], budget, seed):
        if parent and not parent.is_alive():
            return


@contextmanager
def deaf() -> Iterator[None]:
    """Processes begun in the block do not hear Ctrl-C: who began them hears it, and ends them without a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def side_by_side(
    world: World,
    opened: tuple[str, str | None, str],
    scenarios: dict[str, Scenario],
    methods: Sequence[Method],
    budget: Budget,
    seed: int,
) -> Iterator[int]:
    """Measure scenarios in as many processes as torch has threads: networks this small gain little from threads.

    `opened`: model, CLIP and preset, as `fill` opens the world anew in each process. Yields once a second how many
    cells are on disk. An error in one process is raised here, once those at work have finished their scenario;
    BrokenProcessPool where one was killed.
    """
    cores = min(torch.get_num_threads(), len(scenarios))
    paths = [cell_path(world, s, m, budget, seed) for s in scenarios.values() for m in compared(s, methods)]
    longest_first = sorted(scenarios.values(), key=lambda scenario: -len(scenario.targets))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        with deaf():
            jobs = [pool.submit(fill, *opened, s, [m.name for m in methods], budget, seed) for s in longest_first]
        left = set(jobs)
        try:
            while left:
                done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
                for job in done:
                    job.result()
                yield sum(path.exists() for path in paths)
        except (KeyboardInterrupt, GeneratorExit):
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:  # after an error or Ctrl-C nothing new begins
            pool.shutdown(wait=False, cancel_futures=True)
