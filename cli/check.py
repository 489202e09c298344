"""check: gates in some hundred sentences, in the text encoder alone, in seconds.

Of every sentence with the target's name in it: the share of the asked shift that the gates make (1: the context of the
surrogate, and a little beyond; 0: nothing). Of sentences without it: how far a gate opens, and how far it moves them,
measured by the same shift. Where the embedded model shows no target anyway, a sentence about one thing is left out.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cli.common import SHUT, GateFile, bar, command, is_emoji, open_model, settle, space_of
from cli.many import read_lines
from cli.pictures import undrawn
from loading.cache import cached_contexts
from loading.files import UserError
from loading.prompts import anchor_words, normalised, read_prompts, sentences, spellings, to_solve, within, written
from study.evaluate import spread
from token_space import TokenSpace
from weights import Model

WORST = 8  # how many sentences are printed


def run(args: argparse.Namespace) -> str | None:
    """`check`: what gates do in sentences with their target, and in others. UserError for gates of another model."""
    files = settle(args)
    own = [line for _, line in read_lines(args.sentences)] if args.sentences else None
    if own and (odd := [line for line in own if line.count("{}") != 1]):
        raise UserError(f"{args.sentences}: {odd[0]!r} needs one {{}}, where the target's name goes.")
    model = open_model(args, ("text_encoder", "unet", *["vae"] * is_emoji(args.model)), files)
    space = space_of(model)
    found = [check(file, model, space, own, draws=True) for file in files]
    print("\n\n".join(each.text() for each in found))
    return command("inspect", files[0].path, found[0].sentences[(found[0].order() or [0])[0]])


def held_out(preset: str, most: int = 130) -> list[str]:
    """Sentences to check with, some of two things: held out from training, or lines that gates are not solved with."""
    prompts = read_prompts(preset)
    given, found = set(to_solve(prompts).lines), sentences(preset, "held-out") + sentences(preset, "strange")
    pairs, others = sentences(preset, "beside"), prompts.domain[1::3]  # things that no frame names
    for i, line in enumerate(pairs):  # on the left, on the right, in turn
        swapped = re.sub(r"\{(other)?\}", lambda place: "{}" if place[1] else "{other}", line) if i % 2 else line
        found.append(written(swapped, others[i * len(others) // len(pairs)]).replace("{other}", "{}"))
    found = found or [line for line in prompts.lines if line not in given] or prompts.lines
    return list(spread(found, most))


@dataclass
class Found:
    """What gates do: `reached` in sentences with the target, `opened` and `moved` in others."""

    target: str
    sentences: list[str]
    reached: Tensor  # [P]
    others: list[str]
    opened: Tensor  # [Q], the widest opening at any token after the first
    moved: Tensor  # [Q], energy of the change, as a share of the mean asked one
    undrawn: Sequence[int] = ()  # of the worst sentences those in which the model does not draw the target by itself

    def order(self) -> list[int]:
        """The numbers of the sentences, the worst first, without `undrawn`."""
        return [i for i in self.reached.argsort().tolist() if i not in self.undrawn]

    def shut_words(self) -> list[str]:
        """Words that stand in no sentence where the target goes, and in one where it stays."""
        words: dict[str, list[float]] = {}
        for i in self.order():
            for word in set(normalised(self.sentences[i]).split()) - set(normalised(self.target).split()):
                words.setdefault(word, []).append(self.reached[i].item())
        return sorted((word for word, shares in words.items() if max(shares) < SHUT), key=lambda w: max(words[w]))

    def in_a_line(self) -> str:
        """The least that must be said."""
        shut = sum(self.reached[i].item() < SHUT for i in self.order())
        stays = f"; it may stay in {shut} of them" if shut else ""
        if self.undrawn:
            stays += f"; in {len(self.undrawn)} {'more' if shut else 'of them'} the model itself does not draw it"
        return (
            f"{self.target}: {self.reached.mean():.0%} of the change that erases it, over {len(self.sentences)} "
            f"sentences{stays}; without it, prompts move by {self.moved.mean():.1%}, at most {self.moved.max():.0%}"
        )

    def text(self) -> str:
        """All that `check` prints of one file."""
        lines = [self.in_a_line(), "\nreached  in the worst sentences"]
        lines += [f"{self.reached[i]:7.0%}  {self.sentences[i]}" for i in self.order()[:WORST]]
        if (self.reached >= SHUT).any() and (words := self.shut_words()):
            lines.append(f"\nwords found only where it may stay: {', '.join(words[:20])}{', ...' * (len(words) > 20)}")
        lines.append("\n opened    moved  the widest openings in prompts without it")
        widest = self.opened.argsort(descending=True)[:WORST].tolist()
        return "\n".join(lines + [f"{self.opened[i]:7.2f}  {self.moved[i]:7.1%}  {self.others[i]}" for i in widest])


@torch.no_grad()
def check(file: GateFile, model: Model, space: TokenSpace, own: Sequence[str] | None = None,
          draws: bool = False) -> Found:  # fmt: skip
    """Try the gates of one file in the sentences of its preset, or in your `own`; `draws` looks for `undrawn` ones."""
    file.warn_of_guess()
    concept, lines = file.concept, list(own or held_out(file.preset))
    lines = [line for line in lines if not any(within(name, line) for name in file.concept.names)] or lines
    texts = [written(line, name) for name in concept.names for line in lines]
    others = without(concept.names, file.preset, lines)
    encode = partial(cached_contexts, model, briefly=not sentences(file.preset, "beside"))  # else: of one thing each
    E = encode(texts, partial(bar, text="reading sentences")).to(model.device, model.dtype)
    instead = encode([written(line, concept.surrogate) for line in lines]).to(E)
    x = (1 + concept.eta) * (instead.repeat(len(concept.names), 1, 1) - E)
    gates = file.gates.to(E)
    reached = torch.cat([space.reached(gates, *parts) for parts in zip(E.split(16), x.split(16), strict=True)])

    F = encode(others).to(E).split(16)
    opened = torch.cat([gates.gate(part)[0][:, :, 1:].amax(dim=(0, 2, 3)) for part in F])
    energy = torch.cat([space.error(gates, part, torch.zeros_like(part)).sum(dim=1) for part in F])
    asked = space.energy(x).sum(dim=1).mean().clamp(min=1e-12)
    found = Found(file.target, texts, reached.cpu(), others, opened.cpu(), (energy / asked).cpu())
    worst = [i for i in found.order()[:WORST] if draws and found.reached[i] < SHUT]
    never = undrawn(found.target, [texts[i] for i in worst], model)
    return replace(found, undrawn=[i for i in worst if texts[i] in never])


def without(names: Sequence[str], preset: str, lines: Sequence[str], most: int = 100) -> list[str]:
    """Prompts without the target: parts of its name and other words, of a style other styles, in the same sentences."""
    prompts = anchor_words(read_prompts(preset), names)
    words = [*prompts.domain, *prompts.general]
    if preset.endswith("style") and (styles := [word for word in words if word.endswith(" style")]):
        filled = [written(line, style) for style in styles for line in lines][:most]
    else:
        parts = [part for name in names for part in name.split() if len(name.split()) > 1 and len(part) > 2]
        words = [*dict.fromkeys(parts), *words[:: -(-len(words) // most) or 1]][:most]
        # A style or a background is nothing that a queen holds in her hands.
        odd = {"style": "a robot, {}", "background": "a robot on a {}"}
        filled = [written(odd.get(word.split()[-1], lines[i % len(lines)]), word) for i, word in enumerate(words)]
    spelt = [spelling for name in names for spelling in spellings(name)]
    return ["", *(text for text in filled if not any(within(spelling, text) for spelling in spelt))]
