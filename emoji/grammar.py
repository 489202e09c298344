"""Sentences about one thing or two: a grammar of some 1,500 ordinary words, read from sentences.txt.

A frame is a sentence with a hole: "a photo of my {} on the beach" (one thing), "{} and {other}" (two), "three {s}"
(several of a kind). `Grammar.frame` draws one, `fill` puts names into it, `Grammar.sentence` does both and says style
and background in one of many wordings. Frames of `prompts/emoji-held-out.txt` and its like are never drawn: the model
is measured on them.
"""

import random
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPTS = HERE.parent / "prompts"
HELD_OUT = ("emoji-held-out.txt", "emoji-strange.txt", "emoji-beside.txt")  # the model never reads these sentences
ALIKE = (
    "grapes",
    "cherries",
    "french fries",
    "two hearts",
    "fish",
    "tropical fish",
    "tennis",
    "bowling",
)  # no other plural
IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "mouse": "mice",
    "wolf": "wolves",
    "leaf": "leaves",
    "glass": "glasses",
    "snowman": "snowmen",
    "tomato": "tomatoes",
}


def parse(text: str) -> dict[str, list[str]]:
    """Parts of a grammar and the wordings of each: [part], then wordings, one a line or several between bars."""
    parts: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("[") and line.endswith("]"):
            wordings = parts.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            wordings += line.split(" | ")
    return parts


def parts_of(wordings: list[str]) -> set[str]:
    """The parts that wordings call."""
    return {part.rstrip("?") for wording in wordings for part in re.findall(r"<([^>]*)>", wording)}


def names() -> list[str]:
    """The things: Unicode CLDR short names, lower-cased, from concepts.txt."""
    lines = (HERE / "concepts.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def frames(file: str | Path) -> list[str]:
    """The sentences of a file in prompts/, one a line, `{}` where the name stands; # begins a comment."""
    lines = (PROMPTS / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def plural_word(word: str) -> str:
    """The plural of one English noun."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


def plural(name: str) -> str:
    """The plural of a name: "crab" -> "crabs", "pile of poo" -> "piles of poo", "woman cook" -> "women cooks"."""
    if name in ALIKE:
        return name
    # What follows one of these words only describes the thing.
    head, mark, rest = re.match(r"(.*?)( (?:of|with|in|blowing|wearing|screaming)\b|$)(.*)", name).groups()
    words = head.split()
    if words[0] in ("man", "woman") and len(words) > 1:
        words[0] = plural_word(words[0])
    words[-1] = plural_word(words[-1])
    return " ".join(words) + mark + rest


def fill(frame: str, name: str, other: str = "", articles: bool = True) -> str:
    """A frame with its names; "a owl" becomes "an owl" where `articles` says so."""
    text = frame.replace("{}", name).replace("{s}", plural(name)).replace("{other}", other)
    return re.sub(r"\ba(?= (?:[aei]|o(?!ne\b)|u(?!n[iu]|s|hd)|8k))", "an", text) if articles else text


def tidy(frame: str) -> str:
    """Spaces and commas as they should be where a part was left out."""
    return re.sub(r"\s+", " ", frame).replace(" ,", ",").strip()


@cache
def finder(names: tuple[str, ...]) -> tuple[re.Pattern, dict[str, str]]:
    """A pattern that finds names and their plurals in a text, and the name of each spelling."""
    spelt = {spelling: name for name in names for spelling in (plural(name), name)}
    longest_first = sorted(spelt, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"), spelt


def mentions(text: str, names: Iterable[str]) -> list[str]:
    """The names that a text holds, singular or plural, in order; of overlapping ones the longest ("cat face")."""
    pattern, spelt = finder(tuple(names))
    return [spelt[match] for match in pattern.findall(text)]


def words(text: str) -> set[str]:
    """The words of a text in lower case, without signs and digits."""
    return set(re.findall(r"[^\W\d_]+", text.lower()))


class Grammar:
    """Sentences drawn at random; `names` are those of all things, so that none is in a sentence by accident."""

    def __init__(self, names: Iterable[str], text: str | None = None, held_out: Iterable[str] | None = None):
        self.names = tuple(names)
        self.parts = parse((HERE / "sentences.txt").read_text(encoding="utf-8") if text is None else text)
        files = [file for file in HELD_OUT if (PROMPTS / file).exists()]
        self.held_out = set(held_out if held_out is not None else (f for file in files for f in frames(file)))

    def vocabulary(self) -> set[str]:
        """Every word that a sentence can hold, without names of things, styles and colours."""
        wordings = [wording for part in self.parts.values() for wording in part]
        plurals = {part for wording in wordings for part in re.findall(r"<([^>?]*)>s", wording)}
        wordings += [f"{wording}s" for part in plurals for wording in self.parts[part]]
        return words(re.sub(r"<[^>]*>|\{[^}]*\}", " ", " ".join(wordings)))

    def expand(self, part: str, chance: random.Random) -> str:
        """One wording of a part, with wordings of its own parts in it."""

        def wording(match: re.Match) -> str:
            name = match[1]
            if name.endswith("?"):
                return self.expand(name[:-1], chance) if chance.random() < 0.5 else ""
            return self.expand(name, chance)

        return re.sub(r"<([^>]*)>", wording, chance.choice(self.parts[part]))

    def frame(self, chance: random.Random, part: str = "sentence") -> str:
        """A frame of a part that is in none of the held-out files."""
        while (frame := tidy(self.expand(part, chance))) in self.held_out:
            pass
        return frame

    def dress(self, text: str, chance: random.Random, style: str = "", colour: str = "") -> str:
        """A sentence that also says style and background, in any order, behind it or before it."""
        said = [self.expand("in style", chance).replace("{style}", style)] * bool(style)
        said += [self.expand("on colour", chance).replace("{colour}", colour)] * bool(colour)
        chance.shuffle(said)
        for wording in said:
            text = f"{wording}, {text}" if chance.random() < 0.12 else text + chance.choice((" ", ", ", ", ")) + wording
        return text

    def sentence(
        self,
        chance: random.Random,
        name: str,
        other: str | None = None,
        count: int = 1,
        style: str = "",
        colour: str = "",
    ) -> str:
        """A sentence about a thing, two things, or `count` of a kind; no other thing is named in it."""
        part = "pair" if other is not None else ("sentence", "twice", "thrice")[count - 1]
        wanted = {name} | ({other} if other is not None else set())
        while True:
            text = fill(self.frame(chance, part), name, other or "", chance.random() < 0.7)
            text = self.dress(text, chance, style, colour) + chance.choice(("", "", "", "", ".", "!"))
            if set(mentions(text, self.names)) == wanted:
                return text.replace("'", "’") if chance.random() < 0.5 else text
