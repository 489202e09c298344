"""What a gate does in one prompt: where it opens, how much of its change it makes, and what that means.

`inspect` shows all of it; `generate`, `demo` and `train --report` look before a person wonders at a picture.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cli.common import SHUT, GateFile, space_of
from loading.prompts import normalised, spellings, within
from token_space import TokenSpace
from weights import Model


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
    words = [(normalised(name) or name).split() for name in sorted(names, key=len, reverse=True)]
    forms = [r"\W+".join(map(re.escape, each)) for each in words]
    plain, pattern = unicodedata.normalize("NFC", prompt), rf"(?<!\w)({'|'.join(forms)})(?!\w)"
    return re.sub(pattern, lambda _: file.concept.surrogate, plain, flags=re.IGNORECASE)


def say(files: Sequence[GateFile], prompts: Sequence[str], model: Model) -> None:
    """Print a sentence for every target that a prompt names; where too little of it is erased, at the end."""
    named = [(file, prompt) for prompt in prompts for file in files if with_surrogate(file, prompt) != prompt]
    if named:
        space = space_of(model)
        found = sorted((look(*each, model, space) for each in named), key=lambda opening: opening.fails)
        print("\n".join(opening.sentence() for opening in found))
