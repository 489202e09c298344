"""Other nonlinearities in the place of CPE's gate, trained with the same losses: is it this gate that matters?

    trainer = variants.trainer(objective, data, recipe, seed, "bias")      # as cpe.Trainer, with other gates

    token-wise   g = sigmoid(E v): no attention, each token opens the gate for itself
    bias         g = sigmoid(H v + b): a threshold of its own instead of a logit that must cross zero
    hard         g = 1 where H v >= 0, else 0; gradients pass as if it were the sigmoid
    mlp          R_l = s gelu(E D_l + b_l) U_l: no gate and no attention, a two-layer perceptron

Each is a `cpe.ResAG` that reads its features in another way; letters and shapes as there. They answer a question of
the paper's reviewers (`compare --ablations`); to erase something, use cpe.py.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import old_cpe as cpe


class TokenWise(cpe.ResAG):
    """A gate without attention: H = E."""

    def attended(self, context: Tensor) -> Tensor:
        """E, [N, B, T, d]."""
        return context.expand(self.concepts, *context.shape)

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Gate g [N, B, T] and codes z = s g E D [N, B, T, L k]."""
        seen = features[..., self.r :]
        g = torch.sigmoid(seen[..., :1])
        return g.squeeze(-1), self.scale.view(-1, 1, 1, 1) * g * seen[..., 1:]


class Bias(cpe.ResAG):
    """A gate with a bias."""

    def __init__(self, *sizes: Any, **more: Any):
        super().__init__(*sizes, **more)
        self.bias = nn.Parameter(torch.zeros(self.concepts, 1, 1, 1))

    def opening(self, logits: Tensor) -> Tensor:
        """sigmoid(H v + b), [N, B, T, 1]."""
        return torch.sigmoid(logits + self.bias)


class Hard(cpe.ResAG):
    """A gate that is open or shut."""

    def opening(self, logits: Tensor) -> Tensor:
        """1 where H v >= 0, [N, B, T, 1]; straight-through: the sigmoid's gradient (Bengio et al. 2013)."""
        soft = torch.sigmoid(logits)
        return soft + ((logits >= 0).to(soft) - soft).detach()


class MLP(cpe.ResAG):
    """A small perceptron for a gate: as many hidden units as corrections have ranks."""

    def __init__(self, *sizes: Any, **more: Any):
        super().__init__(*sizes, **more)
        self.bias = nn.Parameter(torch.zeros(self.concepts, 1, 1, self.lora_down.shape[-1]))

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Gate 1 [N, B, T] and codes z = s gelu(E D + b) [N, B, T, L k]."""
        hidden = F.gelu(features[..., self.r + 1 :] + self.bias)
        return torch.ones_like(features[..., 0]), self.scale.view(-1, 1, 1, 1) * hidden


KINDS = {"token-wise": TokenWise, "bias": Bias, "hard": Hard, "mlp": MLP}


def trainer(objective: cpe.Objective, data: cpe.Data, recipe: cpe.Recipe, seed: int, kind: str) -> cpe.Trainer:
    """A trainer of any kind: "resag" and "context" as in cpe.py, or one of `KINDS`."""
    if kind not in KINDS:
        return cpe.Trainer(objective, data, recipe, seed, kind)
    if kind in ("hard", "mlp", "bias"):  # no sigmoid to sharpen; sharpened, every gate has a bias
        recipe = replace(recipe, margin=0.0)
    made = cpe.Trainer(objective, data, recipe, seed)
    gates = KINDS[kind](objective.widths, len(objective.M), recipe.r, recipe.k)
    made.gates = made.core = gates.initialise(made.generator).to(objective.M.device)
    return made
