"""Which targets a person meant: several in one, a style, a word that the embedded model never saw.

What is recognised is acted on, and said; what could mean two things is refused, with both ways to write it.
"""

import argparse
import difflib
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from cli.common import command, defaults_of, is_emoji, same
from loading.files import UserError
from loading.prompts import PRESETS, normalised, read_prompts

SEVERAL = re.compile(r"\s*(?:[,;&+]|\band\b)\s*")
FIELD = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^,]*?))\s*,')  # of a line in a file: in double quotes, or without
SIGNS = {  # what a field without quotes looks like that is no name, or not one alone
    r"(\d+[.)]\s*\D|[-*•]\s).*|[\d.]+": "has the number or mark of a list: leave that out",
    r"((name|target|concept|artist|celebrity|aliase?|surrogate|prompt|id)s?[ _]?)+": "may head a column: leave it out",
    r".*[\t|].*": "has more than one column: leave names alone, with commas between them",
    r".*\s#(\s|[^\W\d]).*": "ends in a comment: give that a line of its own",
    r"(jr|sr|junior|senior|ph\.?\s?d|m\.?d|esq|ii|iii|iv)\.?": "may be the end of the name before: quote both as one",
    r"['‘’“”„«].*": 'begins with a quote that is not a plain ": write that one',
    r'[^"]*"([^"]*"[^"]*")*[^"]*': "has a double quote that is not closed",
    rf".*\w{SEVERAL.pattern}\w.*": "may be several names: give each a line",
}


@dataclass(frozen=True)
class Target:
    """What one gate file erases, and how."""

    names: list[str]  # the target, then its aliases
    preset: str
    surrogate: str


def split(texts: Sequence[str], model: str, one_name: bool = False) -> list[str]:
    """One name a target: "red heart, umbrella" is two if the model knows both. UserError where it is not clear."""
    names, ours = [], is_emoji(model)
    for text in texts:
        parts = [part for part in SEVERAL.split(text) if part]
        if len(parts) < 2 or one_name or (ours and known_as(text)):
            names.append(text)
            continue
        if ours:  # what it cannot draw is refused, however it is written
            check_known(parts)
        if ours and all(map(known_as, parts)):
            print(f"targets {', '.join(parts)}: {text!r} names {len(parts)} things, each gets a gate of its own")
            names += parts
        else:
            several = " ".join(shlex.quote(part) for part in parts)
            raise UserError(f"{text!r}: one name? Add --one-name. {len(parts)} of them? Write {several} instead.")
    return list({same(name): spaced(name) for name in reversed(names)}.values())[::-1]


def names_in(line: str, preset: str) -> list[str]:
    """The names in a line of a targets file, between commas. In double quotes (there, "" is one) all is a name.

    UserError where something else may be meant, and it is no name of the preset: asked before an hour of training.
    """
    names = []
    for quoted, plain in FIELD.findall(line + ","):
        doubt = next((said for sign, said in SIGNS.items() if re.fullmatch(sign, plain, re.IGNORECASE)), "")
        if doubt and spaced(plain).casefold() not in map(str.casefold, read_prompts(preset).domain):
            whole = f"{names[-1]}, {plain}" if "the name before" in doubt and names else plain
            raise UserError('{!r} {}. If all of it is a name: "{}".'.format(plain, doubt, whole.replace('"', '""')))
        names.append(quoted.replace('""', '"') or plain)
    if not all(map(str.strip, names)):
        raise UserError("a name is missing before or after a comma.")
    return names


def spaced(name: str) -> str:
    """A name with single spaces and composed letters: an accent may be written as one letter or two."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def target_of(names: Sequence[str], args: argparse.Namespace) -> Target:
    """A target with the preset and the surrogate it needs; UserError for a name that cannot be erased."""
    names = list(dict.fromkeys(map(spaced, names)))
    preset = asked = args.preset or defaults_of(args.model)["preset"]
    if is_emoji(args.model):
        style = known_as(names[0]) in styles()  # these have a preset of their own, whichever was asked for
        preset = "emoji-style" if style else "emoji" if preset == "emoji-style" else preset
        if preset != asked:
            print(f"preset  {preset}, as {names[0]!r} is {'a' if style else 'no'} style")
        names[0] = known_as(names[0]) or names[0]
    surrogate = spaced(PRESETS[preset].surrogate if args.surrogate is None else args.surrogate)
    if not surrogate:
        raise UserError("the surrogate is empty: say what the target becomes, or leave --surrogate out.")
    for name in names:
        if not name:
            raise UserError('the target is empty: say what to erase, for example train "Brad Pitt".')
        if same(name) == same(surrogate):
            raise UserError(f"{name!r} is both target and surrogate: choose another target, or --surrogate.")
    if is_emoji(args.model):
        if args.surrogate is None and preset not in ("emoji", "emoji-style"):
            raise UserError(f"--preset {preset} is for Stable Diffusion: give --surrogate, or --preset emoji.")
        check_known([*names, surrogate])
        if (known_as(surrogate) in styles()) != (preset == "emoji-style"):
            kind = "styles become styles, and things become things. Give each kind a command of its own"
            raise UserError(f"--surrogate {surrogate!r} is nothing that {names[0]!r} can become: {kind}.")
    return Target(names, preset, surrogate)


def styles() -> list[str]:
    """The styles that the embedded model knows."""
    return [word for word in read_prompts("emoji").general if word.endswith(" style")]


def known_as(name: str) -> str | None:
    """A thing or a style as the embedded model spells it; None where it knows none of that name."""
    spelt = {style.removesuffix(" style"): style for style in styles()}
    return (spelt | {same(word): word for word in [*read_prompts("emoji").domain, *styles()]}).get(same(name))


def check_known(names: Sequence[str]) -> None:
    """UserError for a name with words that are in none of the embedded model's concepts; offers those like it."""
    prompts = read_prompts("emoji")
    drawn = {*prompts.domain, *prompts.general} - {*prompts.undrawn}
    words = {"and", "&"} | {word for entry in drawn for word in normalised(entry).split()}
    if unknown := [name for name in names if not normalised(name) or not set(normalised(name).split()) <= words]:
        near = ", ".join(alike(unknown[0])) or "nothing with a name like it"
        known = f"It knows {near}; all that it knows: {command('list')}. Real names need --model sd14."
        raise UserError(f"the embedded model cannot draw {unknown[0]!r}. {known}")


def alike(name: str, most: int = 5) -> list[str]:
    """What the embedded model knows whose names share a word with a name, or else are spelt almost like it.

    Its text encoder could not say what is near in meaning: words that are in no name of a thing mean nothing to it.
    """
    known = [*read_prompts("emoji").domain, *styles()]
    words = set(normalised(name).split()) - {"of", "with", "a", "and"}
    shared = [each for each in known if words & set(normalised(each).split())]
    return (shared or difflib.get_close_matches(normalised(name), known, most, 0.75))[:most]
