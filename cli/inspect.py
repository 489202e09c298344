"""inspect: which tokens of a prompt open a gate, how far that changes the prompt, and what it means."""

import argparse
import re

import torch
from torch import Tensor

import cpe
from cli.common import SHUT, GateFile, command, free, merge_gates, open_model, settle
from cli.generate import check_prompts, names_it
from cli.pictures import check_picture, openings
from loading.files import UserError, atomic
from loading.prompts import spellings
from token_space import TokenSpace, spectral_norm
from weights import Model


def run(args: argparse.Namespace) -> str | None:
    """`inspect`: the gate value of every token of a prompt, one column a gate file."""
    if not args.gates:
        raise UserError('which gates? Give one file or more: inspect gates/red-heart.safetensors "a red heart"')
    if len(args.prompts) != 1:
        raise UserError(f'one prompt is looked at, not {len(args.prompts)}: quote it, as in "a red heart".')
    (prompt,) = args.prompts
    check_prompts([prompt])
    if args.out:
        check_picture(args.out)
    files = settle(args)
    model = open_model(args, ("text_encoder", "unet"))
    gates = merge_gates(files, model)
    tokens, values = opened(gates, model, prompt)
    names = [file.target for file in files]
    print_columns(tokens, names, values)
    space = TokenSpace(cpe.Layers.of(model.cross_attention(), spectral_norm, model.tokens))
    print("\n0 is shut, 1 open; <end> fills all that is left of the sentence.")
    for n, file in enumerate(files):
        print(meaning(file.target, values[n], tokens, reached(file, prompt, model, space)))
    if args.out:
        out = free(args.out)
        with atomic(out) as temporary:
            openings(tokens, values, names).save(temporary, "PNG")
        print(f"wrote   {out}")
    return command("generate", prompt, *args.gates, "--before-after")


@torch.no_grad()
def opened(gates: cpe.ResAG, model: Model, prompt: str) -> tuple[list[str], Tensor]:
    """The tokens of a prompt, and how far every gate opens at each, [N, T]."""
    values = gates.gate(model.encode([prompt]))[0][:, 0, :, 0].float().cpu()
    tokens = ["<start>", *model.tokenizer.tokens(prompt)[: values.shape[1] - 2], "<end>"]
    return tokens, values[:, : len(tokens)]


def print_columns(tokens: list[str], names: list[str], values: Tensor) -> None:
    """A line a token, a column a gate: a number and a bar."""
    width, widths = max(map(len, tokens)) + 2, [max(16, len(name)) for name in names]
    print(" " * width + "  ".join(f"{name:{n}}" for name, n in zip(names, widths, strict=True)))
    for i, token in enumerate(tokens):
        row = zip(values[:, i].tolist(), widths, strict=True)
        print(f"{token:{width}}" + "  ".join(f"{f'{value:.3f} ' + '█' * round(10 * value):{n}}" for value, n in row))


@torch.no_grad()
def reached(file: GateFile, prompt: str, model: Model, space: TokenSpace) -> float | None:
    """The share of the change from target to surrogate that gates make in a prompt; None if it names no target."""
    concept = file.concept
    names = sorted({each for name in concept.names for each in spellings(name)}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    instead = re.sub(pattern, lambda _: concept.surrogate, prompt, flags=re.IGNORECASE)
    if not names_it(prompt, file) or instead == prompt:
        return None
    file.warn_of_guess()
    E, S = model.encode([prompt, instead]).float().split(1)
    return space.reached(file.gates.to(E), E, (1 + concept.eta) * (S - E)).item()


def meaning(target: str, values: Tensor, tokens: list[str], share: float | None) -> str:
    """What a person should know of the openings [T] of one gate, and of the `reached` share of its change."""
    at = values[1:].argmax().item() + 1  # the first token says nothing
    opens, shut = f"its gate opens to {values[at]:.2f} at {tokens[at]!r}", values[at] < SHUT
    if share is None and shut:
        return f"shut    the prompt does not name {target!r}; {opens} at most: little changes"
    if share is None:
        return f"OPENS   the prompt does not name {target!r}, yet {opens}: the picture may change"
    made = f"{max(share, 0):.0%} of the change that erases it"
    if shut or share < SHUT:
        word = "SHUT    " if shut else "WEAK    "
        return f"{word}the prompt names {target!r}, but {opens}, and makes only {made}: it may be drawn"
    return f"opens   the prompt names {target!r}; {opens}, and makes {made}"
