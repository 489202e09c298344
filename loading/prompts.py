"""What a target is trained on: templates and anchor words of a preset, names in all their spellings.

    prompts = read_prompts("celebrity")                                 # prompts/celebrity.txt
    data = prepare(recipe, prompts, ["Brad Pitt"], encode, encode)      # what cpe.Trainer reads

A template is a prompt with one {}, where a name goes: "a portrait of {}"; a frame is a whole sentence with one. Anchors
are what must stay: general words always, those of the domain if they are near the target, and names that share a word
with it ("a red rose" with "red heart"). Or they are whole sentences, as in the public code for explicit content.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

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

SECTIONS = ("templates", "frames", "sentences", "general", "undrawn", "domain")


@dataclass(frozen=True)
class Prompts:
    """The prompts of a preset, from prompts/<preset>.txt and prompts/<preset>-frames.txt."""

    templates: list[str]
    general: list[str]  # anchors for every target
    domain: list[str]  # anchors if they are near the target
    frames: list[str] = field(default_factory=list)  # whole sentences, as people write them
    sentences: list[str] = field(default_factory=list)  # anchors as they are, which take the place of all others
    undrawn: list[str] = field(default_factory=list)  # those of `general` that the model cannot draw
    # Whether parts of a target's name mean other things and must stay: "red" does, but not an artist's surname, nor the
    # "naked" of "naked person": what has that in it ("naked man") is to go as well.
    parts: bool = True
    per_word: int = 4  # prompts of every anchor word; encoding all lines would take longer than training
    spelt: int = 12  # in how many lines a name stands in each of its other spellings

    @property
    def lines(self) -> list[str]:
        """Whatever a name is put into."""
        return [*self.templates, *self.frames]

    def as_published(self) -> "Prompts":
        """As in the public code: templates and names alone, every anchor in all templates."""
        return replace(self, frames=[], parts=False, spelt=0, per_word=len(self.templates))


def read_prompts(preset: str) -> Prompts:
    """The prompts of a preset, with its frames; UserError when a file is missing or spoilt."""
    path = shipped("prompts") / f"{preset}.txt"
    try:
        text = "\n".join([path.read_text(encoding="utf-8"), "[frames]", *sentences(preset, "frames")])
        return replace(parse_prompts(text), parts=preset not in ("style", "emoji-style", "explicit"))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): get the file again") from error
    except ValueError as error:
        raise UserError(f"{path}, or its frames: {error}") from error


def parse_prompts(text: str) -> Prompts:
    """Prompts from a file with the headings [templates], [frames], [sentences], [general], [undrawn], [domain].

    One entry a line; all but [templates] may be missing; lines that begin with # are comments. ValueError for another
    heading, an entry above all headings, no template, or one without its {}.
    """
    sections: dict[str, list[str]] = {f"[{name}]": [] for name in SECTIONS}
    current = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        current = line if line.startswith("[") else current
        if current not in sections:
            raise ValueError(f"{line}: entries must stand under a heading, one of {', '.join(sections)}")
        if line != current:
            sections[current].append(line)
    sections["[general]"] += sections["[undrawn]"]
    prompts = Prompts(**{heading[1:-1]: lines for heading, lines in sections.items()})
    if not prompts.templates or any(line.count("{}") != 1 for line in prompts.lines):
        raise ValueError("[templates] needs at least one line, and each there and in [frames] one {} in it")
    return prompts


def sentences(preset: str, kind: str) -> list[str]:
    """Sentences of prompts/<preset>-<kind>.txt ("frames", "held-out", "strange", ...); [] without such a file."""
    path = shipped("prompts") / f"{preset}-{kind}.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def fill(line: str, name: str) -> str:
    """A template or frame with a name in its {}."""
    return line.replace("{}", name)


def written(line: str, name: str) -> str:
    """`fill`, as people write it: "an owl" where a line has "a {}". (The embedded model has read both.)"""
    vowel = re.match(r"[ai]|e(?!u|we)|o(?!ne\b)|u(?!n[iu]|s)|hour", name, re.IGNORECASE)
    return fill(re.sub(r"\ba \{\}", "an {}", line) if vowel else line, name)


# --- Names -------------------------------------------------------------------------------------------------------


def normalised(name: str) -> str:
    """A name as it is compared: case, accents' spelling, punctuation and spaces play no role; signs (C++, C#) do."""
    signs = ("Sm", "Sc", "So", "Mn", "Mc", "Me")  # of mathematics, currencies, emoji; and marks upon letters
    letters = unicodedata.normalize("NFKC", name).casefold()
    kept = (x if re.match(r"[\w#%&*@]", x) or unicodedata.category(x) in signs else " " for x in letters)
    return " ".join("".join(kept).split())


def within(part: str, whole: str) -> bool:
    """Whether the words of one name stand in another, side by side: "Obama" in "Barack Obama"."""
    return f" {normalised(part)} " in f" {normalised(whole)} "


def longer_names(preset: str, names: Sequence[str]) -> list[str]:
    """Other words of the domain that have one of a target's names in theirs: "hot dog" and "dog face" of "dog"."""
    known = set(map(normalised, names))
    words = (word for word in read_prompts(preset).domain if normalised(word) not in known)
    return [word for word in words if any(within(name, word) for name in names)]


def spellings(name: str) -> list[str]:
    """A name as people write it, itself first, each once: other letters are other tokens to a text encoder.

    "red heart": "red hearts", "red heart's", "red heart’s". "blob style": "blob-style", "style of blob", "blob".
    """
    if style := re.fullmatch("(.+) style", name, re.IGNORECASE):
        return [name, f"{style[1]}-style", f"style of {style[1]}", style[1]]
    ends_in_letter = name[-1:].isalpha() and not re.search("['’]s$", name)
    straight = [name, plural_of(name), f"{name}'s"] if ends_in_letter else [name]
    both = [each.replace(*change) for each in straight for change in (("'", "’"), ("’", "'"))]
    return list(dict.fromkeys([*straight, *both]))


def plural_of(name: str) -> str:
    """The regular English plural of a name's last word."""
    if re.search("(s|x|z|ch|sh)$", name, re.IGNORECASE):
        return f"{name}es"
    return re.sub("(?<=[^aeiou])y$", "ie", name) + "s"


# --- Anchors and data --------------------------------------------------------------------------------------------


@cache
def key_words(name: str) -> frozenset[str]:
    """The words of a name, their accents left out: equal for "René Magritte" and "Rene Magritte"."""
    letters = unicodedata.normalize("NFKD", name)
    return frozenset(normalised("".join(letter for letter in letters if not "\u0300" <= letter <= "\u036f")).split())


def names_one_of(names: Sequence[str], word: str) -> bool:
    """Whether a word or name has all words of one of `names`, or none but those of one: "Obama" and "Barack Obama"."""
    key, known = key_words(word), filter(None, map(key_words, names))
    return bool(key) and any(key <= name or name <= key for name in known)


def anchor_words(prompts: Prompts, names: Sequence[str]) -> Prompts:
    """The prompts without anchors and lines that name one of the target's `names`. ValueError if no anchor is left.

    Left in, "Barack Obama" would be the nearest anchor of "Obama", and kept; so would a dog in "a dog sees my {}".
    """
    targets = [words for words in map(key_words, names) if words]
    sentences = [s for s in prompts.sentences if not any(t <= key_words(s) for t in targets)]
    general, domain = ([w for w in words if not names_one_of(names, w)] for words in (prompts.general, prompts.domain))
    if not general and not domain and not sentences:
        raise ValueError("no anchor words are left: [general] and [domain] hold nothing but the target's names")
    lines = prompts.templates, prompts.frames
    templates, frames = ([x for x in part if not any(within(name, x) for name in names)] for part in lines)
    templates = templates or prompts.templates  # all of them name "a picture"
    return replace(prompts, templates=templates, frames=frames, general=general, domain=domain, sentences=sentences)


def fewer(prompts: Prompts, most: int = 210) -> Prompts:
    """The prompts with at most `most` words of the domain, evenly spaced: for whoever encodes them all."""
    count = min(most, len(prompts.domain))
    return replace(prompts, domain=[prompts.domain[i * len(prompts.domain) // count] for i in range(count)])


def to_solve(prompts: Prompts, style: bool = False) -> Prompts:
    """What solved gates are given: words for anchors, not sentences, half as many prompts of each, some of many lines.

    Formulas are no better for more (benchmarks/README.md), but for styles: what these add differs from line to line.
    """
    if style or len(prompts.lines) <= 60:
        return replace(prompts, sentences=[], per_word=prompts.per_word if style else 2)
    # drawn: every second one of a file that lists styles in turn would leave out the same ones everywhere
    parts, draw = ((prompts.templates, 2 / 3), (prompts.frames, 2 / 5)), random.Random(0).sample
    templates, frames = (draw(lines, round(share * len(lines))) for lines, share in parts)
    return replace(prompts, templates=templates, frames=frames, sentences=[], per_word=2)


def anchor_prompts(words: Sequence[str], templates: Sequence[str], per_word: int = 4) -> list[str]:
    """`per_word` prompts for every word, in templates drawn by the word itself: alike for all whose lines are alike."""
    drawn = []
    for word in words:
        picks = random.Random(normalised(word)).sample(range(len(templates)), min(per_word, len(templates)))
        drawn += [fill(templates[i], word) for i in picks]
    return drawn


def relatives(names: Sequence[str], others: Sequence[str], count: int = 8) -> list[str]:
    """What shares a word with a target of two words, and must stay: "red heart" has "red", "heart", "red rose".

    A text encoder is causal: "red" has the same context in all that is red, and only these teach a gate to wait for the
    heart. Longer names have none: "face with tears" may be the "face with tears of joy", and the gate would stay shut.
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


def nearest_words(recipe: Recipe, prompts: Prompts, names: Sequence[str], encode: Encode) -> list[str]:
    """The `recipe.nearest` domain words that are anchors of a target, the nearest first (cosine of bare contexts)."""
    words = anchor_words(prompts, names).domain
    # All are asked for, so that a cache serves every target. What follows 16 tokens only repeats them, read briefly.
    bare, target = (encode(list(each))[:, :16].float() for each in (prompts.domain, names[:1]))
    near = F.cosine_similarity(rows_of(bare, prompts.domain, words).flatten(1), target.flatten(1))
    return [words[i] for i in near.topk(min(recipe.nearest, len(words))).indices.tolist()]


def rows_of(contexts: Tensor, words: Sequence[str], kept: Sequence[str]) -> Tensor:
    """The rows of those words that are kept; `contexts` has one row a word, or as many for each."""
    return contexts.unflatten(0, (len(words), -1))[[words.index(word) for word in kept]].flatten(0, 1)


def own_prompts(names: Sequence[str], prompts: Prompts, surrogate: str) -> list[tuple[str, str]]:
    """Prompts of a target, each with what shall be drawn instead: its names in every line, other spellings in some."""
    lines, pairs = prompts.lines, []
    some = lines[:: -(-len(lines) // prompts.spelt)] if prompts.spelt else []
    for name in names:
        other = [spelling for spelling in spellings(name) if spelling not in names]
        filled = [(line, name) for line in lines] + [(line, spelling) for spelling in other for line in some]
        pairs += [(fill(line, spelling), fill(line, surrogate)) for line, spelling in filled]
    return pairs


def prepare(recipe: Recipe, prompts: Prompts, names: Sequence[str], encode: Encode, encode_anchors: Encode,
            encode_bare: Encode | None = None) -> Data:  # fmt: skip
    """Encode what training needs: `names` (the target, then its aliases) and the surrogate in every line, anchors.

    `encode` and `encode_anchors` give contexts [B, T, d] of B prompts, the latter perhaps in half precision, from a
    cache. `encode_bare` those of bare words, of which the nearest are chosen: a few paddings are enough.
    ValueError if no anchor is left.
    """
    words = anchor_words(prompts, names)
    lines, (own, instead) = words.lines, zip(*own_prompts(names, words, recipe.surrogate), strict=True)
    different = list(dict.fromkeys(instead))
    targets, surrogates = encode(list(own)), encode_anchors(different)
    surrogates = surrogates[[different.index(prompt) for prompt in instead]]
    # Rounded alike: a token that both share, such as the first, must not seem to differ.
    targets, surrogates = targets.half().to(targets), surrogates.half().to(targets)

    if words.sentences:
        anchors = rows_of(encode_anchors(prompts.sentences), prompts.sentences, words.sentences)
        return Data(targets, surrogates, anchors.half().to(targets.device), encode([""]))
    rows = []
    if words.general:
        every = anchor_prompts(prompts.general, lines, prompts.per_word)
        rows.append(rows_of(encode_anchors(every), prompts.general, words.general))
    if words.domain:
        chosen = nearest_words(recipe, prompts, names, encode_bare or encode_anchors)
        rows.append(encode_anchors(anchor_prompts(chosen, lines, prompts.per_word)))
    # as many prompts of these either way: fewer of each of more names
    if prompts.parts and (near := relatives(names, [*words.domain, *words.general], 32 // prompts.per_word)):
        rows.append(encode(anchor_prompts(near, lines, prompts.per_word)).to(rows[0]))
    return Data(targets, surrogates, torch.cat(rows).half().to(targets.device), encode([""]))
