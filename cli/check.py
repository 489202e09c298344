"""check: gates in some hundred sentences, in the text encoder alone, in seconds.

Of every sentence with the target's name in it: the share of the asked shift that the gates make (1: the context of the
surrogate, and a little beyond; 0: nothing). Of sentences without it: how far a gate opens, and how far it moves them,
measured by the same shift. What a picture shows, follows from it but for the U-Net's part: the embedded model draws the
worst sentences without gates, and those in which it shows no target anyway are left out. Built on token_space.py.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import sampler
from cli.common import SHUT, GateFile, command, is_emoji, open_model, settle, space_of
from cli.many import read_lines
from cli.pictures import eyes
from cli.targets import known_as, styles
from loading.cache import cached_contexts
from loading.files import UserError
from loading.prompts import anchor_words, fill, normalised, read_prompts, sentences, spellings, to_solve, within
from solve import READ, stretched
from study.world import QUICK
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


def held_out(preset: str, most: int = 120) -> list[str]:
    """Sentences to check with: held out from all training, else lines that gates are not solved with; spread evenly."""
    prompts = read_prompts(preset)
    given, found = set(to_solve(prompts).lines), sentences(preset, "held-out") + sentences(preset, "strange")
    found = found or [line for line in prompts.lines if line not in given] or prompts.lines
    return found[:: -(-len(found) // most)]


@dataclass
class Found:
    """What gates do: `reached` in sentences with the target, `opened` and `moved` in others."""

    target: str
    sentences: list[str]
    reached: Tensor  # [P]
    others: list[str]
    opened: Tensor  # [Q], the widest opening at any token after the first
    moved: Tensor  # [Q], energy of the change, as a share of the mean asked one
    # Of the worst sentences those in which the model does not draw the target by itself; None: nobody has looked.
    undrawn: list[int] | None = None

    def order(self) -> list[int]:
        """The numbers of the sentences, the worst first, without `undrawn`."""
        return [i for i in self.reached.argsort().tolist() if i not in (self.undrawn or ())]

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
        if shut and self.undrawn is None:
            stays += ", if the model draws it there"
        if self.undrawn:
            stays += f"; in {len(self.undrawn)} more the model itself does not draw it"
        return (
            f"{self.target}: {self.reached.mean():.0%} of the change that erases it, over {len(self.sentences)} "
            f"sentences{stays}; without it, prompts move by {self.moved.mean():.1%}, at most {self.moved.max():.0%}"
        )

    def text(self) -> str:
        """All that `check` prints of one file."""
        lines = [self.in_a_line(), "\nreached  in the worst sentences"]
        lines += [f"{self.reached[i]:7.0%}  {self.sentences[i]}" for i in self.order()[:WORST]]
        if (self.reached >= SHUT).any() and (words := self.shut_words()):
            lines.append(f"\nit stays shut around: {', '.join(words[:20])}{', ...' * (len(words) > 20)}")
        lines.append("\n opened    moved  the widest openings in prompts without it")
        widest = self.opened.argsort(descending=True)[:WORST].tolist()
        return "\n".join(lines + [f"{self.opened[i]:7.2f}  {self.moved[i]:7.1%}  {self.others[i]}" for i in widest])


def undrawn(found: Found, model: Model) -> list[int]:
    """Those of the worst sentences that fall short in which the embedded model draws no target even without gates."""
    worst, target = [i for i in found.order()[:WORST] if found.reached[i] < SHUT], found.target
    prompts = [found.sentences[i] for i in worst for _ in range(2)]
    if not prompts or not known_as(target):
        return []
    images = sampler.draw(model, prompts, range(len(prompts)), None, *QUICK.sampling)
    seen = eyes(model, target in styles())(images)
    return [i for n, i in enumerate(worst) if target not in seen[2 * n : 2 * n + 2]]


@torch.no_grad()
def check(file: GateFile, model: Model, space: TokenSpace, own: Sequence[str] | None = None,
          draws: bool = False) -> Found:  # fmt: skip
    """Try the gates of one file in the sentences of its preset, or in your `own`; `draws` looks for `undrawn` ones."""
    file.warn_of_guess()
    concept, lines = file.concept, list(own or held_out(file.preset))
    sentences = [fill(line, name) for name in concept.names for line in lines]
    read = None if own else READ  # what people write may be longer

    def encode(texts: list[str], encoder: Callable) -> Tensor:
        return stretched(encoder(texts, tokens=read), model.tokens)

    E = encode(sentences, model.encode)
    instead = encode([fill(line, concept.surrogate) for line in lines], partial(cached_contexts, model)).to(E)
    x = (1 + concept.eta) * (instead.repeat(len(concept.names), 1, 1) - E)
    gates = file.gates.to(E)
    reached = torch.cat([space.reached(gates, *parts) for parts in zip(E.split(16), x.split(16), strict=True)])

    others = without(concept.names, file.preset, lines)
    F = encode(others, partial(cached_contexts, model)).to(E).split(16)
    opened = torch.cat([gates.gate(part)[0][:, :, 1:].amax(dim=(0, 2, 3)) for part in F])
    energy = torch.cat([space.error(gates, part, torch.zeros_like(part)).sum(dim=1) for part in F])
    asked = space.energy(x).sum(dim=1).mean().clamp(min=1e-12)
    found = Found(file.target, sentences, reached.cpu(), others, opened.cpu(), (energy / asked).cpu())
    return replace(found, undrawn=undrawn(found, model)) if draws and is_emoji(model.name) else found


def line_for(word: str, line: str) -> str:
    """A sentence in which a word makes sense: a style or a background is nothing that a queen holds in her hands."""
    return {"style": "a robot, {}", "background": "a robot on a {}"}.get(word.split()[-1], line)


def without(names: Sequence[str], preset: str, lines: Sequence[str], most: int = 100) -> list[str]:
    """Prompts without the target: other words of the preset in the same sentences, and parts of the target's name.

    Of a style other styles, each in every sentence.
    """
    prompts = anchor_words(read_prompts(preset), names)
    words = [*prompts.domain, *prompts.general]
    if preset.endswith("style") and (styles := [word for word in words if word.endswith(" style")]):
        filled = [fill(line, style) for style in styles for line in lines][:most]
    else:
        parts = [part for name in names for part in name.split() if len(name.split()) > 1 and len(part) > 2]
        words = [*dict.fromkeys(parts), *words[:: -(-len(words) // most) or 1]][:most]
        filled = [fill(line_for(word, lines[i % len(lines)]), word) for i, word in enumerate(words)]
    spelt = [spelling for name in names for spelling in spellings(name)]
    return ["", *(text for text in filled if not any(within(spelling, text) for spelling in spelt))]
