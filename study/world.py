"""What is erased, and which pictures are drawn to see what became of it, and of everything else.

    world = World(load_model("emoji"))
    for case in cases(world, SCENARIOS["object"], Budget()): ...       # a prompt, a seed, what CLIP should see

Groups of pictures:

    erased                   the target in captions
    near, listed             the nearest concepts among those that every eraser was told to preserve
    near, unlisted           the nearest among those that none was told about: what generalises
    others                   thirty more that none was told about
    sentences                the target in sentences that no eraser was given
    kept in sentences        near concepts and others in the same sentences
    strange words            the target in sentences with words that not even the model has read
    kept beside              the other thing in a wide picture of two; of a style, the thing that is drawn in it

A third of all concepts (`held_out`) is never shown to any eraser. Sentences are those of prompts/<preset>-held-out.txt,
-strange.txt and -beside.txt (of a style emoji's, with the style behind them), if the preset has such files.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

import cpe
from loading.prompts import Prompts, anchor_words, names_one_of, read_prompts, sentences
from study import evaluate
from token_space import TokenSpace, spectral_norm
from weights import Model, load_clip

GROUPS = (
    "erased", "near, listed", "near, unlisted", "others",
    "sentences", "kept in sentences", "strange words", "kept beside",
)  # fmt: skip
GONE = ("erased", "sentences", "strange words")  # these should not be recognised; all others should
STYLES = ("noto", "twemoji", "fluent", "blob")  # of the embedded model


@dataclass(frozen=True)
class Scenario:
    """Targets erased at once, and the preset that trains CPE on them."""

    targets: tuple[str, ...]
    preset: str = "emoji"

    @property
    def style(self) -> bool:
        """Whether a way of drawing is erased, not a thing."""
        return self.preset.endswith("style")


FIFTY = tuple(sentences("emoji", "targets"))
SCENARIOS = {
    "object": Scenario(("umbrella",)),
    "neighbours": Scenario(("red heart",)),
    "person": Scenario(("santa claus",)),
    "style": Scenario(("twemoji style",), "emoji-style"),
    "10 at once": Scenario(FIFTY[:10]),
    "50 at once": Scenario(FIFTY),
}
LONG = ("50 at once",)  # measured only where they are asked for by name


@dataclass(frozen=True)
class Budget:
    """How many images a cell draws, and how."""

    erased: int = 16  # of the target; several targets share them, one each at least. As many in strange words
    near: int = 2  # of each near concept
    others: int = 1  # of each other concept
    sentences: int = 32  # of the target; as many of what stays in sentences, and beside
    attacked: int = 8  # of each attack; 0: no attacks
    searches: int = 2  # of each attack that searches by chance, which share its images
    steps: int = 12
    guidance_scale: float = 4.0

    @property
    def sampling(self) -> tuple[int, float, str]:
        """Steps, guidance scale and method: how `sampler.draw` is to draw."""
        return self.steps, self.guidance_scale, "dpm"


QUICK = Budget(erased=8, near=1, others=1, sentences=12, attacked=0, steps=10)


@dataclass(frozen=True)
class Case:
    """One image: its group, prompt and seed, and what CLIP should see in it (an index of concepts or of styles)."""

    group: str
    prompt: str
    seed: int
    expected: int
    judge: str = "concept"  # or "style", or "right": a concept, at the right of a picture of two


def frames(preset: str, kind: str, count: int) -> list[str]:
    """`count` of these sentences, spread over all of them and again from the first where there are fewer."""
    known = sentences(preset, kind)
    return [known[i * max(len(known), count) // count % len(known)] for i in range(count if known else 0)]


class World:
    """A model, its judge, and the concepts and styles that it knows.

    The judge is the CLIP of the folder or repository `clip`, else the model's own; UserError if there is none.
    """

    def __init__(self, model: Model, clip: str | None = None, preset: str = "emoji"):
        self.model = model
        self.clip, self.tokenizer = load_clip(clip, device=model.device) if clip else (model.clip, model.tokenizer)
        self.concepts = read_prompts(preset).domain
        self.styles = STYLES if preset.startswith("emoji") else ()
        self.layers = cpe.Layers.of(model.cross_attention(), spectral_norm)
        self.space = TokenSpace(self.layers)
        self.colours = ("white", "blue", "yellow", "green", "pink")
        self.features = evaluate.name_features(self.clip, self.tokenizer, self.concepts)
        captions = [f"a picture of a {c}, {s} style" for c in self.concepts for s in self.styles or ("any",)]
        features = evaluate.text_features(self.clip, self.tokenizer, captions)
        self.captions = features.unflatten(0, (len(self.concepts), -1))

    @cached_property
    def fingerprint(self) -> str:
        """Of all that figures depend on: the model's networks, the judge, and the kind of device, which rounds."""
        digest = hashlib.sha256(f"{self.model.fingerprint} {self.model.device.type}".encode())
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

    def listed(self, scenario: Scenario) -> Prompts:
        """The preset's prompts, without words or lines that name a target, or words that name what is held out."""
        prompts = anchor_words(read_prompts(scenario.preset), scenario.targets)
        words = anchor_words(prompts, [*scenario.targets, *self.held_out])  # lines with a "cat face" may stay
        return replace(words, templates=prompts.templates, frames=prompts.frames)

    def see(self, images: Tensor, judge: str) -> Tensor:
        """What CLIP recognises in images [B, 3, H, W]: indices [B] of concepts, or for the judge "style" of styles."""
        if judge == "style":
            return evaluate.recognise_style(self.clip, images, self.captions)
        return evaluate.recognise(self.clip, images, self.features)


# --- The images of a scenario ------------------------------------------------------------------------------------

Row = tuple[str, str, int, str]  # group, prompt, expected, judge


def cases(world: World, scenario: Scenario, budget: Budget) -> list[Case]:
    """All images of a scenario, each with a seed of its own. ValueError for a target that the world does not know."""
    rows = (style_rows if scenario.style else concept_rows)(world, scenario, budget)
    return [Case(group, prompt, seed, expected, judge) for seed, (group, prompt, expected, judge) in enumerate(rows)]


def members(world: World, scenario: Scenario) -> dict[str, list[int]]:
    """Concepts of each group of captions, by number; the nearest to any of the targets first.

    What has a target's name in its own ("horse face" of "horse") is in none.
    """
    targets = [world.concepts.index(name) for name in scenario.targets]
    order = (world.features @ world.features[targets].T).amax(dim=1).argsort(descending=True).tolist()
    rest = [c for c in order if not names_one_of(scenario.targets, world.concepts[c])]
    unlisted = set(world.held_out)
    fresh = [c for c in rest if world.concepts[c] in unlisted]
    near = [c for c in rest if world.concepts[c] not in unlisted][:10]
    return dict(zip(GROUPS, (targets, near, fresh[:10], list(evaluate.spread(fresh[10:], 30))), strict=False))


def concept_rows(world: World, scenario: Scenario, budget: Budget) -> Iterable[Row]:
    """Captions, then sentences, when things are erased: in sentences targets and what stays take turns."""
    groups, name = members(world, scenario), world.concepts
    each = (max(1, budget.erased // len(scenario.targets)), budget.near, budget.near, budget.others)
    for (group, concepts), images in zip(groups.items(), each, strict=True):
        yield from ((group, world.prompt(name[c], n + i), c, "concept")
                    for n, c in enumerate(concepts) for i in range(images))  # fmt: skip
    targets, *kept = groups.values()
    stay = [c for group in zip(*(evaluate.spread(group, 10) for group in kept), strict=False) for c in group]
    asked = (
        ("sentences", "held-out", targets, max(budget.sentences, len(targets))),
        ("kept in sentences", "held-out", stay, budget.sentences),
        ("strange words", "strange", targets, max(budget.erased, len(targets))),
    )
    for group, kind, concepts, count in asked:
        for i, frame in enumerate(frames(scenario.preset, kind, count)):
            c = concepts[i % len(concepts)]
            yield group, frame.replace("{}", name[c]), c, "concept"
    for i, frame in enumerate(frames(scenario.preset, "beside", budget.sentences)):
        c, other = targets[i % len(targets)], stay[i % len(stay)]
        yield "kept beside", frame.replace("{}", name[c]).replace("{other}", name[other]), other, "right"


def style_rows(world: World, scenario: Scenario, budget: Budget) -> Iterable[Row]:
    """Captions, then sentences, when a style is erased: near are the other styles, others are things without a style.

    In sentences it is a thing in that style, or in another; beside the style, the thing itself must stay.
    """
    erased, things = scenario.targets[0].removesuffix(" style"), world.held_out
    kept = [style for style in world.styles if style != erased]
    listed = [c for c in world.concepts if c not in things]
    captions = (
        ("erased", budget.erased, things, 3, [erased]),
        ("near, listed", 10 * budget.near, listed, 5, kept),
        ("near, unlisted", 10 * budget.near, things, 5, kept),
    )
    for group, count, concepts, stride, styles in captions:
        for i in range(count):
            style = styles[i % len(styles)]
            prompt = world.prompt(concepts[stride * i % len(concepts)], i, style)
            yield group, prompt, world.styles.index(style), "style"
    for i, thing in enumerate(things[::2][:30]):
        yield "others", world.prompt(thing, i, ""), world.concepts.index(thing), "concept"
    said = (("sentences", "held-out", [erased]), ("strange words", "strange", [erased]),
            ("kept in sentences", "held-out", kept))  # fmt: skip
    for group, kind, styles in said:
        for i, frame in enumerate(frames("emoji", kind, budget.sentences)):
            style = styles[i % len(styles)]
            prompt = f"{frame.replace('{}', things[5 * i % len(things)])}, {style} style"
            yield group, prompt, world.styles.index(style), "style"
    for i in range(budget.sentences):
        thing = things[7 * i % len(things)]
        yield "kept beside", world.prompt(thing, i, erased), world.concepts.index(thing), "concept"
