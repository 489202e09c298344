"""Other nonlinearities in the place of CPE's gate, trained with the same losses: is it this gate that matters?

    gates = KINDS["bias"](layers.widths, d, r, k)       # then cpe.Trainer, with cpe.Losses or token_space.Losses

    token-wise   g = sigmoid(E v): no attention, each token opens the gate for itself
    bias         g = sigmoid(H v + b): a threshold of its own instead of a logit that must cross zero
    hard         g = 1 where H v >= 0, else 0; gradients pass as if it were the sigmoid
    mlp          R_l = s gelu(E D_l + b_l) U_l: no gate and no attention, a two-layer perceptron

Each is a `cpe.ResAG`; letters and shapes as there. They answer a question of the paper's reviewers
(`compare --ablations`); to erase something, use cpe.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpe


class TokenWise(cpe.ResAG):
    """A gate without attention: H = E."""

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """g = sigmoid(E v) [N, B, T, 1], and E itself [N, B, T, d]."""
        H = E.expand(len(self.w_qs), *E.shape)
        return torch.sigmoid(H @ self.scaler.unsqueeze(1)), H


class Bias(cpe.ResAG):
    """A gate with a bias."""

    def __init__(self, *sizes: Any, **more: Any):
        super().__init__(*sizes, **more)
        self.bias = nn.Parameter(torch.zeros(len(self.w_qs), 1, 1, 1))

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """g = sigmoid(H v + b) [N, B, T, 1], and H [N, B, T, d]."""
        _, H = super().gate(E)
        return torch.sigmoid(H @ self.scaler.unsqueeze(1) + self.bias), H


class Hard(cpe.ResAG):
    """A gate that is open or shut."""

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """g = 1 where H v >= 0 [N, B, T, 1], and H; straight-through: the sigmoid's gradient (Bengio et al. 2013)."""
        soft, H = super().gate(E)
        return soft + ((soft >= 0.5).to(soft) - soft).detach(), H


class MLP(cpe.ResAG):
    """A small perceptron for a gate: as many hidden units as residuals have ranks."""

    def __init__(self, *sizes: Any, **more: Any):
        super().__init__(*sizes, **more)
        self.bias = nn.ParameterList(torch.zeros(len(self.w_qs), 1, 1, self.k) for _ in self.names)

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """1 everywhere [N, B, T, 1], and E [N, B, T, d]."""
        H = E.expand(len(self.w_qs), *E.shape)
        return torch.ones_like(H[..., :1]), H

    def residual(self, l: int, gated: Tensor) -> Tensor:
        """gelu(E D_l + b_l) U_l [B, T, d_l]."""
        hidden = F.gelu(gated @ self.lora_down[l].unsqueeze(1) + self.bias[l])
        return torch.einsum("nbtk,nkw->btw", hidden, self.lora_up[l])


KINDS = {"resag": cpe.ResAG, "token-wise": TokenWise, "bias": Bias, "hard": Hard, "mlp": MLP}
LITERAL = (MLP,)  # whose residuals are no product z U, as token_space.py needs it: trained with the literal losses
