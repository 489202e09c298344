"""inspect: what a gate does in one prompt: where it opens, how much of its change it makes, and what that means."""

import argparse
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cli.check import WORST
from cli.common import SHUT, GateFile, command, open_model, same, settle, space_of
from cli.pictures import LINE, check_picture, save, undrawn
from loading.files import UserError
from loading.prompts import longer_names, spellings, within, written
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
    print("\n0 is shut, 1 open; <end> fills all that is left; of all these it is the widest.")
    print("\n".join(opening.sentence() for opening in found))
    if args.out:
        save(drawing(found), args.out, {"prompt": args.prompts[0], "prompts": []})
    return command("generate", args.prompts[0], *args.gates, "--before-after")


@dataclass(frozen=True)
class Opening:
    """One gate in one prompt: T tokens, how far it opens at each, and the share of its change that it makes."""

    target: str
    prompt: str
    tokens: list[str]
    values: Tensor  # [T]
    share: float | None  # of the change from target to surrogate; None where the prompt names no target
    drawn: bool = True  # False: the model draws no target there even without gates

    @property
    def shut(self) -> bool:
        """Whether the gate opens nowhere; the first token says nothing."""
        return self.values[1:].max().item() < SHUT

    @property
    def fails(self) -> bool:
        """Whether the prompt names the target, and too little of it is erased."""
        return self.share is not None and (self.shut or self.share < SHUT) and self.drawn

    def sentence(self) -> str:
        """What a person should know."""
        at = self.values[1:].argmax().item() + 1
        opens = f"its gate opens to {self.values[at]:.2f} at {self.tokens[at]!r}"
        if self.share is None and self.shut:
            return f"shut    {self.prompt!r} does not name {self.target!r}; {opens} at most: little changes"
        if self.share is None:
            return f"OPENS   {self.prompt!r} does not name {self.target!r}, yet {opens}: the picture may change"
        named = f"{self.prompt!r} names {self.target!r}"
        if not self.drawn:
            return f"undrawn {named}, but the model draws none there even without gates"
        made = f"{max(self.share, 0):.0%} of the change that erases it"
        if self.fails:
            return f"{'SHUT' if self.shut else 'WEAK'}    {named}, but {opens}, and makes only {made}: it may be drawn"
        return f"opens   {named}; {opens}, and makes {made}"


@torch.no_grad()
def look(file: GateFile, prompt: str, model: Model, space: TokenSpace) -> Opening:
    """What the gate of a file does in a prompt, or in what the model reads of it."""
    concept, read = file.concept, read_of(prompt, model)
    instead = with_surrogate(file, read)
    E, S = (model.encode([text]).float() for text in (prompt, read_of(instead, model)))
    gates = file.gates.to(E)
    values, share = gates.gate(E)[0][0, 0, :, 0].cpu(), None
    if instead != read:
        file.warn_of_guess()
        share = space.reached(gates, E, (1 + concept.eta) * (S - E)).item()
    tokens = ["<start>", *model.tokenizer.tokens(prompt)[: len(values) - 2], "<end>"]
    values[len(tokens) - 1] = values[len(tokens) - 1 :].max()  # paddings may differ, where a prompt is about two things
    return Opening(file.target, read, tokens, values[: len(tokens)], share)


def read_of(prompt: str, model: Model) -> str:
    """The whole words of a prompt that fit into the model's tokens, the first and the last of which are no words."""
    starts = [start for start, _ in model.tokenizer.encode(prompt).offsets][model.tokens - 2 :]
    return re.sub(r"\w+$", "", prompt[: starts[0] + 1])[: starts[0]] if starts else prompt


def with_surrogate(file: GateFile, prompt: str) -> str:
    """A prompt with the surrogate in place of what a gate file erases; the prompt itself if it names no such thing.

    "A hot dog" names no dog: where the preset is of things, one whose name has the target's in it is another.
    """
    names = {same(each) for name in file.concept.names for each in spellings(name) if within(each, prompt)}
    if not names:
        return prompt
    longer = longer_names(file.preset, file.concept.names) if file.preset in ("object", "emoji") else []
    others = {same(each) for name in longer for each in spellings(name)}
    # Between its words there may stand anything that is no letter: "red-heart", "Jay Z". Some names are signs alone.
    forms = [r"\W+".join(map(re.escape, name.split())) for name in sorted(names | others, key=len, reverse=True)]
    text = unicodedata.normalize("NFC", prompt).casefold()  # where "straße" is "strasse"; CLIP reads no capitals

    def instead(found: re.Match) -> str:
        return found[0] if same(found[2]) in others else written("a {}" if found[1] else "{}", file.concept.surrogate)

    replaced = re.sub(rf"(?<!\w)(an? )?({'|'.join(forms)})(?!\w)", instead, text)
    return prompt if replaced == text else replaced


def say(files: Sequence[GateFile], prompts: Sequence[str], model: Model) -> list[str]:
    """Print a sentence for every target that a prompt names, the failures last; returns the prompts of these."""
    texts = [read_of(prompt, model) for prompt in prompts]
    named = [(file, text) for text in texts for file in files if with_surrogate(file, text) != text]
    if not named:
        return []
    space = space_of(model)
    found = sorted((look(*each, model, space) for each in named), key=lambda opening: opening.fails)
    for file in files:
        weak = [opening.prompt for opening in found if opening.fails and opening.target == file.target][:WORST]
        never = undrawn(file.target, weak, model)
        found = [replace(each, drawn=False) if (each.target == file.target and each.prompt in never) else each
                 for each in found]  # fmt: skip
    print("\n".join(opening.sentence() for opening in found))
    return [opening.prompt for opening in found if opening.fails]


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
