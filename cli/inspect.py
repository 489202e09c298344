"""inspect: which tokens of a prompt open a gate, how far that changes the prompt, and what it means."""

import argparse

from cli.common import command, free, merge_gates, open_model, settle, space_of
from cli.generate import check_prompts
from cli.openings import Opening, look
from cli.pictures import check_picture, sentence
from loading.files import UserError, atomic


def run(args: argparse.Namespace) -> str | None:
    """`inspect`: the gate value of every token of a prompt, one column a gate file."""
    if not args.gates:
        raise UserError('which gates? Give one file or more: inspect gates/red-heart.safetensors "a red heart"')
    if len(args.prompts) != 1:
        raise UserError(f'one prompt is looked at, not {len(args.prompts)}: quote it, as in "a red heart".')
    check_prompts(args.prompts)
    if args.out:
        check_picture(args.out)
    files = settle(args)
    model = open_model(args, ("text_encoder", "unet"))
    merge_gates(files, model)  # UserError where they do not fit
    space = space_of(model)
    found = [look(file, args.prompts[0], model, space) for file in files]
    print_columns(found)
    print("\n0 is shut, 1 open; <end> fills all that is left of the sentence.")
    print("\n".join(opening.sentence() for opening in found))
    if args.out:
        out = free(args.out)
        with atomic(out) as temporary:
            sentence(found).save(temporary, "PNG")
        print(f"wrote   {out}")
    return command("generate", args.prompts[0], *args.gates, "--before-after")


def print_columns(found: list[Opening]) -> None:
    """A line a token, a column a gate: a number and a bar."""
    tokens, widths = found[0].tokens, [max(16, len(opening.target)) for opening in found]
    width = max(map(len, tokens)) + 2
    print(" " * width + "  ".join(f"{opening.target:{n}}" for opening, n in zip(found, widths, strict=True)))
    for i, token in enumerate(tokens):
        row = zip((opening.values[i].item() for opening in found), widths, strict=True)
        print(f"{token:{width}}" + "  ".join(f"{f'{value:.3f} ' + '█' * round(10 * value):{n}}" for value, n in row))
