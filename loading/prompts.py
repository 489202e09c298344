"""What a target is trained on: templates and anchor words of a preset, names in all their spellings.

    prompts = read_prompts("celebrity")                                 # prompts/celebrity.txt
    data = prepare(recipe, prompts, ["Brad Pitt"], encode, encode)      # what cpe.Trainer reads

A template is a prompt with one {}, where a name goes: "a portrait of {}". A frame is a whole sentence with one, as
people write them. Anchors are what must stay as it is, in the same templates and frames: general words always, those of
the domain if they are near the target, and names that share a word with it ("a red rose" with "red heart").
"""

import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import cpe
from cpe import Data, Recipe
from loading.files import UserError, shipped

# Ours, not the paper's. The embedded model has another scale: at lambda = 1e5 its gates never open. Its surrogate must
# be a thing it can draw: "an object" is six unknown pieces of words to it. And lambda must rise, and a step see several
# templates: with one at a time, and lambda at its full weight at once, the gate is shut on some templates before it has
# learnt to open, and where a sigmoid is shut no gradient opens it again.
EMOJI = Recipe(
    "cloud", eta=0.3, lam=300, k=4, stages=2, first_steps=1000, later_steps=250, attack_steps=100, templates=8,
    first_lr=1.5e-3, later_lr=1e-3, attack_lr=1e-3, rise=0.5, delta_start=1e-3,
)  # fmt: skip
PRESETS = cpe.PRESETS | {
    "object": Recipe("an object"),
    "emoji": EMOJI,
    # A style's shift differs in direction among things: its templates hold every thing that it is trained on, and a
    # step must see many of them.
    "emoji-style": replace(
        EMOJI, surrogate="noto style", eta=1.0, lam=100, first_steps=2000, later_steps=500, templates=24
    ),
}

Encode = Callable[[list[str]], Tensor]  # B prompts -> contexts [B, T, d]

# --- Files of prompts --------------------------------------------------------------------------------------------

SECTIONS = ("templates", "frames", "general", "domain")


@dataclass(frozen=True)
class Prompts:
    """The prompts of a preset, from prompts/<preset>.txt and prompts/<preset>-frames.txt."""

    templates: list[str]
    general: list[str]  # anchors for every target
    domain: list[str]  # anchors if they are near the target
    frames: list[str] = field(default_factory=list)  # whole sentences, as people write them
    parts: bool = True  # whether parts of a target's name mean other things: "red" does, an artist's surname does not

    @property
    def lines(self) -> list[str]:
        """Whatever a name is put into."""
        return [*self.templates, *self.frames]


def read_prompts(preset: str) -> Prompts:
    """The prompts of a preset, with its frames; UserError when a file is missing or spoilt."""
    path, frames = (shipped("prompts") / f"{preset}{kind}.txt" for kind in ("", "-frames"))
    try:
        text = path.read_text(encoding="utf-8")
        if frames.is_file():
            text += "\n[frames]\n" + frames.read_text(encoding="utf-8")
        return replace(parse_prompts(text), parts=not preset.endswith("style"))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): get the file again") from error
    except ValueError as error:
        raise UserError(f"{path} and {frames.name}: {error}") from error


def parse_prompts(text: str) -> Prompts:
    """Prompts from a file with the headings [templates], [frames], [general] and [domain], one entry a line.

    [frames] may be missing; lines that begin with # are comments. ValueError for another heading, an entry above all
    headings, no template, or braces in the wrong place.
    """
    headings = f"{', '.join(f'[{name}]' for name in SECTIONS[:-1])} or [{SECTIONS[-1]}]"
    sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
    current = None
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        if line.startswith("["):
            current = line.removeprefix("[").removesuffix("]")
            if line != f"[{current}]" or current not in sections:
                raise ValueError(f"unknown heading {line}: use {headings}")
        elif current is None:
            raise ValueError(f"entries must stand under a heading: {headings}")
        else:
            sections[current].append(line)
    with_name = sections["templates"] + sections["frames"]
    if not sections["templates"] or any(line.count("{}") + line.count("{s}") != 1 for line in with_name):
        raise ValueError("[templates] needs at least one line, and each there and in [frames] one {} in it, or one {s}")
    words = [*(fill(line, "") for line in with_name), *sections["general"], *sections["domain"]]
    if stray := [word for word in words if set(word) & set("{}")]:  # a slip: "{name}", or a template among the words
        raise ValueError(f"{stray[0]!r} has a brace: only templates and frames have one {{}}, where a word goes")
    return Prompts(**sections)


def fill(line: str, name: str) -> str:
    """A template or frame with a name in its {}, or the plural in its {s}."""
    return line.replace("{}", name).replace("{s}", plural_of(name))


# --- Names -------------------------------------------------------------------------------------------------------


def normalised(name: str) -> str:
    """A name as it is compared: case, accents' spelling, punctuation and spaces play no role; signs (C++, C#) do."""
    letters = unicodedata.normalize("NFKC", name).casefold()

    def counts(letter: str) -> bool:
        return re.match(r"\w", letter) is not None or letter in "#%&*@" or unicodedata.category(letter) in SIGNS

    return " ".join("".join(letter if counts(letter) else " " for letter in letters).split())


SIGNS = ("Sm", "Sc", "So", "Mn", "Mc", "Me")  # of mathematics, currencies, emoji; and marks upon letters


def within(part: str, whole: str) -> bool:
    """Whether the words of one name stand in another, side by side: "Obama" in "Barack Obama"."""
    return f" {normalised(part)} " in f" {normalised(whole)} "


def spellings(name: str) -> list[str]:
    """A name as people write it, itself first: both apostrophes, the plural, the possessive. None of them twice.

    "red heart": "red hearts", "red heart's", "red heart’s". Other letters are other tokens to a text encoder. Of a
    style other wordings, "blob style": "blob-style", "style of blob", "blob".
    """
    if style := re.fullmatch("(.+) style", name, re.IGNORECASE):
        return [name, f"{style[1]}-style", f"style of {style[1]}", style[1]]
    last = name[-1:]
    plural = [] if not last.isalpha() else [plural_of(name)]
    possessive = [f"{name}'s"] if last.isalnum() and not re.search("['’]s$", name) else []
    straight = [name, *plural, *possessive]
    both = [each.replace(*change) for each in straight for change in (("'", "’"), ("’", "'"))]
    return list(dict.fromkeys([*straight, *both]))


def plural_of(name: str) -> str:
    """The regular English plural of a name's last word."""
    if re.search("(s|x|z|ch|sh)$", name, re.IGNORECASE):
        return f"{name}es"
    return re.sub("(?<=[^aeiou])y$", "ie", name) + "s"


# --- Anchors and data --------------------------------------------------------------------------------------------


def anchor_words(prompts: Prompts, names: Sequence[str]) -> Prompts:
    """The prompts without anchors that contain one of the target's `names`, or are contained in one, word by word.

    Left in, "brad pitt" would be the nearest anchor of "Brad Pitt" and, at lambda = 1e5, be kept instead of erased; so
    would "Barack Obama" be of "Obama". ValueError if no anchor is left.
    """

    def apart(words: list[str]) -> list[str]:
        return [word for word in words if not any(within(word, name) or within(name, word) for name in names)]

    general, domain = apart(prompts.general), apart(prompts.domain)
    if not general and not domain:
        raise ValueError("no anchor words are left: [general] and [domain] hold nothing but the target's names")
    return replace(prompts, general=general, domain=domain)


def anchor_prompts(words: Sequence[str], templates: Sequence[str], per_word: int = 4) -> list[str]:
    """`per_word` prompts for every word, with templates drawn by the word itself: the same for every target."""
    drawn = []
    for word in words:
        picks = random.Random(normalised(word)).sample(range(len(templates)), min(per_word, len(templates)))
        drawn += [fill(templates[i], word) for i in picks]
    return drawn


def relatives(names: Sequence[str], others: Sequence[str], count: int = 8) -> list[str]:
    """Names that share a word with a target of two words, and must stay: its parts, and mixtures with other names.

    "red heart": "red", "heart", "red rose", "broken heart". Where a text encoder is causal, "red" has the same context
    in all that is red: only these teach a gate to wait for the heart. Longer names have none: to a text encoder "face
    with tears" may be the "face with tears of joy", and a gate that must keep it stays shut.
    """
    found, chance = [], random.Random(normalised(names[0]))
    for start, end in (name.split() for name in names if len(name.split()) == 2):
        found += [start, end]
        for other in chance.sample(list(others), min(count, len(others))):
            first, *_, last = *other.split(), other.split()[-1]
            found += [f"{start} {last}", f"{first} {end}"]
    spelt = dict.fromkeys(found)
    whole = [spelling for name in names for spelling in spellings(name)]
    return [each for each in spelt if not any(within(name, each) for name in whole)]


def nearest_words(
    recipe: Recipe, prompts: Prompts, names: Sequence[str], encode: Encode, encode_anchors: Encode
) -> list[str]:
    """The `recipe.nearest` domain words that are anchors of a target, the nearest first; arguments as for `prepare`.

    Nearness is the cosine of the flattened T x d contexts of the bare words.
    """
    words = anchor_words(prompts, names).domain
    if not words:
        return []
    bare, target = encode_anchors(prompts.domain), encode([names[0]])
    candidates = bare[[prompts.domain.index(word) for word in words]].flatten(1).float()
    near = F.cosine_similarity(candidates, target.flatten()[None].float().to(bare.device))
    return [words[i] for i in near.topk(min(recipe.nearest, len(words))).indices.tolist()]


def own_prompts(names: Sequence[str], lines: Sequence[str], surrogate: str, few: int = 12) -> list[tuple[str, str]]:
    """Prompts of a target, each with what shall be drawn instead: every name in every line, and in a `few` of them,
    evenly drawn, its other spellings.
    """
    some, pairs = lines[:: -(-len(lines) // few)], []
    for name in names:
        other = [spelling for spelling in spellings(name) if spelling not in names]
        filled = [(line, name) for line in lines] + [(line, spelling) for spelling in other for line in some]
        pairs += [(fill(line, spelling), fill(line, surrogate)) for line, spelling in filled]
    return pairs


def prepare(recipe: Recipe, prompts: Prompts, names: Sequence[str], encode: Encode, encode_anchors: Encode) -> Data:
    """Encode what training needs: `names` (the target, then its aliases) and the surrogate in every line, anchors.

    `encode` and `encode_anchors` give contexts [B, T, d] of B prompts, perhaps from a cache of contexts rounded to half
    precision. `encode_anchors` may return half precision, and is asked for the same prompts whatever the target.
    ValueError if no anchor is left.
    """
    words, lines = anchor_words(prompts, names), prompts.lines
    own, instead = zip(*own_prompts(names, lines, recipe.surrogate), strict=True)
    different = list(dict.fromkeys(instead))
    targets, surrogates = encode(list(own)), encode_anchors(different)
    surrogates = surrogates[[different.index(prompt) for prompt in instead]]
    # Rounded alike: a token that both share, such as the first, must not seem to differ.
    targets, surrogates = targets.half().to(targets), surrogates.half().to(targets)

    # The same request for every target, so that a cache serves them all; the target's own rows are dropped after.
    per_word = min(4, len(lines))
    general, domain = (encode_anchors(anchor_prompts(w, lines)) for w in (prompts.general, prompts.domain))
    rows = [general.unflatten(0, (-1, per_word))[[prompts.general.index(w) for w in words.general]].flatten(0, 1)]
    if words.domain:
        chosen = nearest_words(recipe, prompts, names, encode, encode_anchors)
        rows.append(domain.unflatten(0, (-1, per_word))[[prompts.domain.index(w) for w in chosen]].flatten(0, 1))
    if prompts.parts and (near := relatives(names, [*words.domain, *words.general])):
        rows.append(encode(anchor_prompts(near, lines)).to(rows[0]))
    return Data(targets, surrogates, torch.cat(rows).half().to(targets.device), encode([""]))
