"""inspect: which tokens of a prompt open a gate, how far that changes the prompt, and what it means."""

import argparse
import re

import torch

import cpe
from cli.common import GateFile, check_out, check_prompts, command, free, merge_gates, open_model, settle
from cli.generate import SHUT, names_it
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
        check_out(args.out)
    files = settle(args)
    model = open_model(args, ("text_encoder", "unet"))
    gates = merge_gates(files, model)
    with torch.no_grad():
        E = model.encode([prompt])
        values = gates.gate(E)[0][:, 0, :, 0].float().cpu()  # [N, T]
    tokens = ["<start>", *model.tokenizer.tokens(prompt)[: values.shape[1] - 2], "<end>"]
    names = [file.target for file in files]
    print_columns(tokens, names, values)
    space = TokenSpace(cpe.Layers.of(model.cross_attention(), spectral_norm, model.tokens))
    print(f"\n0 is shut, 1 open; after <end> come {values.shape[1] - len(tokens)} more of it, for padding.")
    for n, file in enumerate(files):
        print(meaning(file.target, values[n], tokens, reached(file, prompt, model, space)))
    if args.out:
        out = free(args.out)
        with atomic(out) as temporary:
            openings(tokens, values[:, : len(tokens)], names).save(temporary, "PNG")
        print(f"wrote   {out}")
    return command("generate", prompt, *args.gates, "--before-after")


def print_columns(tokens: list[str], names: list[str], values: torch.Tensor) -> None:
    """A line a token, a column a gate: a number and a bar."""
    width, widths = max(map(len, tokens)) + 2, [max(16, len(name)) for name in names]
    print(" " * width + "  ".join(f"{name:{n}}" for name, n in zip(names, widths, strict=True)))
    for i, token in enumerate(tokens):
        row = zip(values[:, i].tolist(), widths, strict=True)
        print(f"{token:{width}}" + "  ".join(f"{f'{value:.3f} ' + '█' * round(10 * value):{n}}" for value, n in row))


@torch.no_grad()
def reached(file: GateFile, prompt: str, model: Model, space: TokenSpace) -> float | None:
    """The share of the change from target to surrogate that gates make in a prompt; None if it names no target."""
    names = sorted({each for name in file.names for each in spellings(name)}, key=len, reverse=True)
    _, surrogate, eta = file.recipe
    instead = re.sub("|".join(map(re.escape, names)), lambda _: surrogate, prompt, flags=re.IGNORECASE)
    if not names_it(prompt, file) or instead == prompt:
        return None
    E, S = model.encode([prompt, instead]).float().split(1)
    return space.reached(file.gates.to(E), E, (1 + eta) * (S - E)).item()


def meaning(target: str, values: torch.Tensor, tokens: list[str], share: float | None) -> str:
    """What a person should know of the openings [T] of one gate, and of the `reached` share of its change."""
    at = values[1:].argmax().item() + 1
    where = f"{values[at]:.2f} at {tokens[min(at, len(tokens) - 1)]!r}"
    if share is None and values[at] < SHUT:
        return f"shut    the prompt does not name {target!r}; its gate opens to {where} at most: little changes"
    if share is None:
        return f"OPENS   the prompt does not name {target!r}, yet its gate opens to {where}: the picture may change"
    made = f"{max(share, 0):.0%} of the change that erases it"
    if values[at] < SHUT:
        return f"SHUT    the prompt names {target!r}, but its gate opens to {where} at most ({made}): it may be drawn"
    if share < SHUT:
        return f"WEAK    the prompt names {target!r}; its gate opens to {where}, but makes only {made}: it may be drawn"
    return f"opens   the prompt names {target!r}; its gate opens to {where}, and makes {made}"
