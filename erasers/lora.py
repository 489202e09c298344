"""LoRA with CPE's own losses (Hu et al., ICLR 2022, arXiv 2106.09685): what CPE would be without its gates.

The same losses, anchors, attacks and stages; but R_l(E) = s E D_l U_l is linear, and folds into W_l. What it cannot do
that CPE can is due to the missing nonlinearity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import cpe
import token_space
from erasers.common import Weights, filled, finished, one_each, projections, tokens
from weights import Model


class LoRA(cpe.ResAG):
    """A ResAG of one concept with everything open: no attention, H = E, and no gate, g = 1."""

    def __init__(self, widths: dict[str, int], d: int, k: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__(widths, d, r=1, k=k, alpha=alpha, generator=generator)
        del self.w_qs, self.scaler  # nothing would train them

    def gated(self, E: Tensor) -> Tensor:
        """s E [1, B, T, d]."""
        return self.scale.view(-1, 1, 1, 1) * E

    def fold(self, weights: Weights) -> Weights:
        """The projections with the residuals inside, [d_l, d]: W_l + s (D_l U_l)^T."""
        layers = zip(self.names, self.lora_down, self.lora_up, strict=True)
        change = {f"{name}.weight": self.scale * (D[0] @ U[0]).T for name, D, U in layers}
        return {key: W + change[key].detach().to(W) for key, W in weights.items()}


def lora_trainer(
    model: Model, targets: list[str], surrogate: str | Sequence[str], preserved: list[str], seed: int,
    recipe: cpe.Recipe, templates: Sequence[str],
) -> cpe.Trainer:  # fmt: skip
    """CPE's trainer with one LoRA of all targets in place of gates: its rank is k per target, but at most d."""
    prompts = [filled(templates, names) for names in (targets, one_each(surrogate, targets))]
    named, becoming, empty = (model.encode(part).cpu().float() for part in (*prompts, [""]))
    anchors = torch.stack([E.half() for E in tokens(model, preserved or [""], "all")])
    layers = cpe.Layers.of({key: W.cpu() for key, W in model.cross_attention().items()}, token_space.spectral_norm)
    losses = token_space.Losses(layers, cpe.Data(named, becoming, anchors, empty), recipe.eta)
    generator, d = torch.Generator().manual_seed(seed), empty.shape[2]
    k = min(recipe.k * len(targets), d)
    # alpha = rank / recipe.k keeps the scale s = 1 / recipe.k of a single target
    return cpe.Trainer(LoRA(layers.widths, d, k, k / recipe.k, generator), losses, recipe, generator)


def lora(
    model: Model, targets: list[str], surrogate: str | Sequence[str], preserved: list[str], seed: int = 0, *,
    recipe: cpe.Recipe = cpe.PRESETS["celebrity"], templates: Sequence[str] = ("{}", "a photo of {}"),
) -> Weights:  # fmt: skip
    """A LoRA trained as CPE trains its gates, folded into the weights. The anchors are mixed from `preserved`."""
    trainer = lora_trainer(model, targets, surrogate, preserved, seed, recipe, templates)
    list(trainer)
    return finished(model, trainer.gates.fold(projections(model)))
