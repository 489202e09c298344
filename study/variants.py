"""Other ways in the place of CPE's, trained with the same losses: is it this gate that matters, and this training?

    trainer = variants.trainer(layers, data, recipe, seed, "bias")      # a cpe.Trainer of other gates

    token-wise   g = sigmoid(E v): no attention, each token opens the gate for itself
    bias         g = sigmoid(H v + b): a threshold of its own instead of a logit that must cross zero
    hard         g = 1 where H v >= 0, else 0; gradients pass as if it were the sigmoid
    mlp          R_l = s gelu(E D_l + b_l) U_l: no gate and no attention, a two-layer perceptron
    unmixed      the paper's gate; anchors have noise, but are not mixed in pairs

Each is a `cpe.ResAG` of one concept; letters and shapes as there. They answer questions of the paper's reviewers
(`compare --ablations`); to erase something, use cpe.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpe
import token_space


class TokenWise(cpe.ResAG):
    """A gate without attention: H = E."""

    def __init__(self, *sizes: Any, **more: Any):
        super().__init__(*sizes, **more)
        del self.w_qs  # nothing would train it

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """g = sigmoid(E v) and E."""
        return torch.sigmoid(E @ self.scaler.unsqueeze(1)), E.expand(len(self.scaler), *E.shape)


class Bias(cpe.ResAG):
    """A gate with a bias."""

    def __init__(self, *sizes: Any, **more: Any):
        super().__init__(*sizes, **more)
        self.bias = nn.Parameter(torch.zeros(len(self.scaler), 1, 1, 1))

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """g = sigmoid(H v + b) and H."""
        _, H = super().gate(E)
        return torch.sigmoid(H @ self.scaler.unsqueeze(1) + self.bias), H


class Hard(cpe.ResAG):
    """A gate that is open or shut."""

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """1 where H v >= 0, and H; straight-through: the sigmoid's gradient (Bengio et al. 2013)."""
        soft, H = super().gate(E)
        return soft + ((soft >= 0.5).to(soft) - soft).detach(), H


class MLP(cpe.ResAG):
    """A small perceptron: as many hidden units as corrections have ranks."""

    def __init__(self, *sizes: Any, **more: Any):
        super().__init__(*sizes, **more)
        self.bias = nn.ParameterList(torch.zeros(len(D), 1, 1, self.k) for D in self.lora_down)
        del self.w_qs, self.scaler  # nothing would train them

    def gated(self, E: Tensor) -> Tensor:
        """E: the scale comes after the perceptron."""
        return E.expand(len(self.scale), *E.shape)

    def residual(self, l: int, gated: Tensor) -> Tensor:
        """s gelu(E D_l + b_l) U_l."""
        hidden = F.gelu(gated @ self.lora_down[l].unsqueeze(1) + self.bias[l])
        return (self.scale.view(-1, 1, 1, 1) * hidden @ self.lora_up[l].unsqueeze(1)).sum(dim=0)


class Unmixed(cpe.Trainer):
    """Training with anchors that are not mixed."""

    def draw_anchors(self) -> Tensor:
        """Anchors [n + 1, T, d]: anchor prompts with noise; the last is the empty prompt."""
        data, chance = self.losses.data, {"generator": self.generator, "device": self.generator.device}
        E = data.anchors[torch.randint(len(data.anchors), (self.recipe.anchors,), **chance)].to(data.empty)
        sigma = self.recipe.noise * E.norm(dim=(1, 2), keepdim=True)
        return torch.cat([E + sigma * torch.randn(E.shape, **chance, dtype=E.dtype), data.empty])


GATES = {"token-wise": TokenWise, "bias": Bias, "hard": Hard, "mlp": MLP}


def trainer(layers: cpe.Layers, data: cpe.Data, recipe: cpe.Recipe, seed: int, kind: str = "resag") -> cpe.Trainer:
    """A trainer of the paper's gates ("resag"), of one of `GATES`, or "unmixed", on the device of the data."""
    device, start = data.empty.device, torch.Generator().manual_seed(seed)
    make, train = GATES.get(kind, cpe.ResAG), Unmixed if kind == "unmixed" else cpe.Trainer
    gates = make(layers.widths, data.empty.shape[2], recipe.r, recipe.k, generator=start).to(device)
    chance = start if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    # token space knows residuals (H D_l) U_l only: a perceptron's are none
    losses = cpe.Losses if kind == "mlp" else token_space.Losses
    return train(gates, losses(layers, data, recipe.eta), recipe, chance)
