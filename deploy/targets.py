"""What gate files erase, and the prompts that baking learns from: those of the targets, and those that must stay."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cpe
from loading.prompts import Prompts, anchor_prompts, anchor_words, fewer, fill, within


@dataclass(frozen=True)
class Concept:
    """What one gate file erases, as its metadata says."""

    names: list[str]  # the target, then its aliases
    surrogate: str
    eta: float


def read_concept(metadata: Mapping[str, str], recipe: cpe.Recipe) -> Concept:
    """The concept of a gate file; what its metadata leaves open is as in `recipe`. ValueError if it names no target."""
    target = metadata.get("target") or metadata.get("prompts")
    if not (target or "").strip():
        raise ValueError("its metadata does not say what it erases")
    try:
        aliases, eta = json.loads(metadata.get("aliases", "[]")), float(metadata.get("eta", recipe.eta))
        if not (isinstance(aliases, list) and all(alias.encode() for alias in aliases) and math.isfinite(eta)):
            raise ValueError
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError("in its metadata `aliases` is no list of names, or `eta` no number") from error
    return Concept([target, *aliases], metadata.get("surrogate", recipe.surrogate), eta)


def in_company(texts: Sequence[str], words: Sequence[str], chance: random.Random) -> list[str]:
    """Every prompt with an anchor word before it, behind it, or both: a few templates would be learnt by heart."""
    forms = ("{word} {text}", "{text} {word}", "{text} and {word}", "{other}, {text}, {word}")
    return [
        chance.choice(forms).format(text=text, word=chance.choice(words), other=chance.choice(words)) for text in texts
    ]


def training_prompts(
    concepts: Sequence[Concept], prompts: Prompts, seed: int, least: int = 300, total: int = 1200
) -> tuple[list[str], list[str]]:
    """Prompts of the targets, and others: as they are, then in company.

    Every name in every template, again and again until there are `least` of each concept and about `total` of all;
    anchor words in four templates each, and '', with three companies. What spells a target by accident is left out of
    the others: "tiger" followed by "face with tears" contains "tiger face". ValueError as for `anchor_words`.
    """
    least = max(least, total // len(concepts))
    chance = random.Random(seed)
    anchors = fewer(anchor_words(prompts, [name for concept in concepts for name in concept.names]))
    words = [*anchors.general, *anchors.domain]
    targets = []
    for concept in concepts:
        plain = [fill(t, name) for name in concept.names for t in anchors.templates]
        copies = max(1, math.ceil(least / len(plain)) - 1)
        targets += plain + in_company(plain * copies, words, chance)
    others = ["", *anchor_prompts(words, anchors.templates)]
    names = [name for concept in concepts for name in concept.names]
    company = in_company(others * 3, words, chance)
    return targets, others + [text for text in company if not any(within(name, text) for name in names)]
