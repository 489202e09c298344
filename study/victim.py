"""An erased model as an attacker sees it, and what an attack finds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cpe
from unet import KeysValues
from weights import Model

TEMPLATES = ("a picture of a {}",)


@dataclass(frozen=True)
class Victim:
    """An erased model, and the original that the attacker aims at. ValueError unless both are float32.

    A linear eraser edits weights: `erased` differs from `original`. CPE adds gates: the two are the same. Words are
    read by the erased model's text encoder, embeddings enter behind it.
    """

    original: Model
    erased: Model
    gates: cpe.ResAG | None = None

    def __post_init__(self) -> None:
        # In half precision small gradients vanish, and with them the attack: a false sense of safety.
        if {self.original.dtype, self.erased.dtype} != {torch.float32}:
            raise ValueError("attacks follow small gradients: load the model in float32")

    def keys_values(self, context: Tensor) -> KeysValues:
        """What the erased cross-attention sees of a context [B, T, d]; differentiable in it."""
        kv = self.erased.unet.keys_values(context)
        return kv if self.gates is None else self.gates(context, kv)

    def noise(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Noise [B, c, h, w] that the erased model predicts in latents at timesteps [B]."""
        return self.erased.unet(latents, timestep, self.keys_values(context))


@dataclass(frozen=True)
class Found:
    """What an attack found: one context per template, to generate with; `before` and `after` is what it minimised.

    `before` is the loss of the plain prompts. The two are None where nothing is minimised.
    """

    contexts: Tensor  # [P, T, d]
    prompts: list[str]  # as a person would read them; learned words are written as <1>, <2>, ...
    before: float | None
    after: float | None
    seconds: float


def fill(templates: Sequence[str], words: str) -> list[str]:
    """The prompts that say `words` where the templates say {}."""
    return [template.replace("{}", words) for template in templates]
