"""inspect: what a gate does in one prompt: where it opens, how much of its change it makes, and what that means.

`generate`, `demo` and `train --report` look, too, before a person wonders at a picture.
"""

import argparse
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cli.common import SHUT, GateFile, command, open_model, same, settle, space_of
from cli.pictures import LINE, check_picture, save
from loading.files import UserError
from loading.prompts import spellings, within
from token_space import TokenSpace
from weights import Model


def run(args: argparse.Namespace) -> str | None:
    """`inspect`: the gate value of every token of a prompt, one column a gate file."""
    if not args.gates:
        raise UserError('which gates? Give one file or more: inspect gates/red-heart.safetensors "a red heart"')
    if len(args.prompts) != 1:
        raise UserError(f'one prompt is looked at, not {len(args.prompts)}: quote it, as in "a red heart".')
    if args.out:
        check_picture(args.out)
    files = settle(args)
    model = open_model(args, ("text_encoder", "unet"), files)
    space = space_of(model)
    found = [look(file, args.prompts[0], model, space) for file in files]
    print_columns(found)
    print("\n0 is shut, 1 open; <end> fills all that is left of the sentence.")
    print("\n".join(opening.sentence() for opening in found))
    if args.out:
        save(drawing(found), args.out)
    return command("generate", args.prompts[0], *args.gates, "--before-after")


@dataclass(frozen=True)
class Opening:
    """One gate in one prompt: T tokens, how far it opens at each, and the share of its change that it makes."""

    target: str
    prompt: str
    tokens: list[str]
    values: Tensor  # [T]
    share: float | None  # of the change from target to surrogate; None where the prompt names no target

    @property
    def shut(self) -> bool:
        """Whether the gate opens nowhere; the first token says nothing."""
        return self.values[1:].max().item() < SHUT

    @property
    def fails(self) -> bool:
        """Whether the prompt names the target, and too little of it is erased."""
        return self.share is not None and (self.shut or self.share < SHUT)

    def sentence(self) -> str:
        """What a person should know."""
        at = self.values[1:].argmax().item() + 1
        opens = f"its gate opens to {self.values[at]:.2f} at {self.tokens[at]!r}"
        if self.share is None and self.shut:
            return f"shut    {self.prompt!r} does not name {self.target!r}; {opens} at most: little changes"
        if self.share is None:
            return f"OPENS   {self.prompt!r} does not name {self.target!r}, yet {opens}: the picture may change"
        named = f"{self.prompt!r} names {self.target!r}"
        made = f"{max(self.share, 0):.0%} of the change that erases it"
        if self.fails:
            return f"{'SHUT' if self.shut else 'WEAK'}    {named}, but {opens}, and makes only {made}: it may be drawn"
        return f"opens   {named}; {opens}, and makes {made}"


@torch.no_grad()
def look(file: GateFile, prompt: str, model: Model, space: TokenSpace) -> Opening:
    """What the gate of a file does in a prompt."""
    concept, instead = file.concept, with_surrogate(file, prompt)
    E, S = model.encode([prompt, instead]).float().split(1)
    gates = file.gates.to(E)
    values, share = gates.gate(E)[0][0, 0, :, 0].cpu(), None
    if instead != prompt:
        file.warn_of_guess()
        share = space.reached(gates, E, (1 + concept.eta) * (S - E)).item()
    tokens = ["<start>", *model.tokenizer.tokens(prompt)[: len(values) - 2], "<end>"]
    return Opening(file.target, prompt, tokens, values[: len(tokens)], share)


def with_surrogate(file: GateFile, prompt: str) -> str:
    """A prompt with the surrogate in place of what a gate file erases; the prompt itself if it names no such thing."""
    names = {each for name in file.concept.names for each in spellings(name) if within(each, prompt)}
    if not names:
        return prompt
    # Between its words there may stand anything that is no letter: "red-heart", "Jay Z". Some names are signs alone.
    forms = [r"\W+".join(map(re.escape, same(name).split())) for name in sorted(names, key=len, reverse=True)]
    pattern, plain = rf"(?<!\w)({'|'.join(forms)})(?!\w)", unicodedata.normalize("NFC", prompt)
    text = plain if re.search(pattern, plain, re.IGNORECASE) else plain.casefold()  # "straße" is "strasse" only there
    return re.sub(pattern, lambda _: file.concept.surrogate, text, flags=re.IGNORECASE)


def say(files: Sequence[GateFile], prompts: Sequence[str], model: Model) -> None:
    """Print a sentence for every target that a prompt names; where too little of it is erased, at the end."""
    named = [(file, prompt) for prompt in prompts for file in files if with_surrogate(file, prompt) != prompt]
    if named:
        space = space_of(model)
        found = sorted((look(*each, model, space) for each in named), key=lambda opening: opening.fails)
        print("\n".join(opening.sentence() for opening in found))


def print_columns(found: list[Opening]) -> None:
    """A line a token, a column a gate: a number and a bar."""
    width = max(map(len, found[0].tokens)) + 2
    print(" " * width + "  ".join(f"{opening.target[:16]:16}" for opening in found))
    for token, *row in zip(found[0].tokens, *(opening.values.tolist() for opening in found), strict=True):
        print(f"{token:{width}}" + "  ".join(f"{f'{value:.3f} ' + '█' * round(10 * value):16}" for value in row))


def drawing(found: Sequence[Opening]) -> Image.Image:
    """A prompt with the opening of every gate behind its words: white 0, red 1; a row a gate."""
    font, tokens = ImageFont.load_default(), found[0].tokens
    widths = [int(font.getlength(token)) + 10 for token in tokens]
    left = 10 + max(int(font.getlength(opening.target)) for opening in found)
    page = Image.new("RGB", (left + sum(widths), 8 + len(found) * 2 * LINE), "white")
    draw = ImageDraw.Draw(page)
    for row, opening in enumerate(found):
        y, x = 4 + row * 2 * LINE, left
        draw.text((4, y + 4), opening.target, "black", font)
        for token, width, value in zip(tokens, widths, opening.values.tolist(), strict=True):
            shade = round(255 * (1 - value))
            draw.rectangle((x, y, x + width - 2, y + 2 * LINE - 4), fill=(255, shade, shade))
            draw.text((x + 4, y + 4), token, "black", font)
            x += width
    return page.resize((2 * page.width, 2 * page.height), Image.Resampling.LANCZOS)
