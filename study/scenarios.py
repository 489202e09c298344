"""What is erased, from which model, and the pictures that are judged.

    world = World(load_model("emoji"))
    rows = cases(world, SCENARIOS["object"], Budget())

A third of all concepts (`held_out`) is never shown to any eraser, and sentences are of files that none has read. Built
on evaluate.py, token_space.py and loading/.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

import cpe
from loading.files import shipped
from loading.prompts import Prompts, anchor_words, normalised, read_prompts
from study import evaluate
from token_space import TokenSpace, spectral_norm
from weights import Model, load_clip


def sentences(name: str) -> list[str]:
    """The sentences of prompts/<name>.txt, one a line; none where there is no such file."""
    path = shipped("prompts") / f"{name}.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


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
    sentences: int = 16  # of the target in sentences, and of all that should stay in sentences
    strange: int = 8  # of the target among words that nobody has read, and beside another thing
    near: int = 2  # of each near concept
    others: int = 1  # of each other concept
    attacked: int = 8  # of each attack, of sentences at least one of every target; 0: no attacks
    searches: int = 2  # of each attack that searches by chance, which share its images
    steps: int = 12
    guidance_scale: float = 4.0
    method: str = "dpm"


QUICK = Budget(erased=8, near=1, others=1, sentences=12, attacked=0, steps=10)


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
        self.layers = cpe.Layers.of(model.cross_attention(), spectral_norm, model.tokens)
        self.space = TokenSpace(self.layers)
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

    def listed(self, scenario: Scenario) -> Prompts:
        """Templates of the preset, sentences among them, and anchor words: no target is there, and nothing held out."""
        prompts = read_prompts(scenario.preset)
        prompts = dataclasses.replace(prompts, templates=[*prompts.templates, *sentences(f"{scenario.preset}-frames")])
        away = {normalised(name) for name in self.held_out}
        words = {
            name: [w for w in getattr(prompts, name) if normalised(w) not in away] for name in ("general", "domain")
        }
        return anchor_words(dataclasses.replace(prompts, **words), [*scenario.targets, *scenario.aliases])

    def names(self, scenario: Scenario, target: str) -> list[str]:
        """A target and its aliases: those of a scenario belong to its first target."""
        return [target, *(scenario.aliases if target == scenario.targets[0] else ())]

    def see(self, images: Tensor, judge: str) -> Tensor:
        """What CLIP recognises in images [B, 3, H, W]: an index of concepts, or of styles, [B]."""
        if judge == "style":
            return evaluate.recognise_style(self.clip, images, self.captions)
        if judge == "right half":  # what stands there is half as large
            side = images.shape[-1]
            images = F.interpolate(images[..., side // 4 - 2 : side * 3 // 4 + 2, side // 2 - 4 :], (side, side))
        return evaluate.recognise(self.clip, images, self.features)


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
    yield from sentence_rows(world, scenario, budget, targets, [*near[:5], *fresh])


def sentence_rows(
    world: World, scenario: Scenario, budget: Budget, targets: Sequence[int], rest: Sequence[int]
) -> Iterable[tuple[str, str, int, str]]:
    """The same in sentences that no eraser was told of, alone and beside another thing."""
    held_out, strange, beside = (sentences(f"{scenario.preset}-{name}") for name in ("held-out", "strange", "beside"))
    others = evaluate.spread(rest, budget.sentences)
    for group, frames, members, images in (
        ("sentences", held_out, targets, budget.sentences),
        ("strange words", strange, targets, budget.strange),
        ("kept in sentences", held_out[::-1], others, len(others)),
    ):
        for i in range(max(images, len(members)) if frames else 0):
            c = members[i % len(members)]
            yield group, frames[5 * i % len(frames)].replace("{}", world.concepts[c]), c, "concept"
    for i in range(budget.strange if beside else 0):
        c, other = targets[i % len(targets)], others[3 * i % len(others)]
        frame = beside[i % len(beside)].replace("{}", world.concepts[c])
        yield "kept beside", frame.replace("{other}", world.concepts[other]), other, "right half"


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
