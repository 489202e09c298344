"""What the notebooks share: a model with its concepts, gates trained on it in seconds, and pictures.

    lab = open_lab("emoji")          # or "sd14", or a folder
    trainer = lab.trainer(first_steps=150)
    pictures = lab.pictures(lab.E_target[None], seeds=[0], gates=trainer.gates)

Letters as in cpe.py: B prompts, T = 77 tokens, d width of a context.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpe  # noqa: E402
import sampler  # noqa: E402
import token_space  # noqa: E402
import weights  # noqa: E402
from loading.prompts import PRESETS  # noqa: E402

# Training steps, as a share of what a notebook asks for: the tests run with fewer, and all that is asserted must hold.
BUDGET = float(os.environ.get("CPE_THEORY_BUDGET", "1"))

STEPS = ("first_steps", "later_steps", "attack_steps")
TEMPLATES = ("{}", "a {}", "{} emoji", "a picture of a {}")

Eraser = Callable[[Tensor, dict[str, Tensor]], dict[str, Tensor]]  # (context, kv) -> kv: gates, or a function


@dataclass
class Lab:
    """A model, what is erased from it, and the concepts that remain."""

    model: weights.Model
    target: str
    surrogate: str
    concepts: list[str]  # those that remain
    recipe: cpe.Recipe

    @cached_property
    def E(self) -> Tensor:
        """Contexts of the bare names of what remains, [concepts, T, d]."""
        return self.model.encode(self.concepts)

    @cached_property
    def E_target(self) -> Tensor:
        """Context of the target's bare name, [T, d]."""
        return self.model.encode([self.target])[0]

    @cached_property
    def E_surrogate(self) -> Tensor:
        """Context of the surrogate, [T, d]."""
        return self.model.encode([self.surrogate])[0]

    @cached_property
    def layers(self) -> cpe.Layers:
        """The frozen projections that training looks through."""
        return cpe.Layers.of(self.model.cross_attention(), token_space.spectral_norm, self.model.tokens)

    @cached_property
    def space(self) -> token_space.TokenSpace:
        """The same as seen from the context."""
        return token_space.TokenSpace(self.layers)

    @property
    def listed(self) -> Tensor:
        """Every other concept: the anchors of training, [concepts / 2, T, d]."""
        return self.E[0::2]

    @property
    def held(self) -> Tensor:
        """The other half, that training never sees, [concepts / 2, T, d]."""
        return self.E[1::2]

    def name_token(self, prompt: str) -> int:
        """Position of a prompt's last token before EOS: it has seen the whole prompt."""
        return len(self.model.tokenizer.ids(prompt))

    def shifts(self) -> Tensor:
        """x = (1 + eta) (E_sur - E_tar) [T, d]: what erasing asks of the bare target's tokens."""
        return (1 + self.recipe.eta) * (self.E_surrogate - self.E_target)

    @cached_property
    def data(self) -> cpe.Data:
        """The target and its surrogate in four templates; every other concept is an anchor."""
        named = [[f.format(name) for f in TEMPLATES] for name in (self.target, self.surrogate)]
        targets, surrogates = map(self.model.encode, named)
        return cpe.Data(targets, surrogates, self.listed.half(), self.model.encode([""]))

    def trainer(self, seed: int = 0, layers: cpe.Layers | None = None, **recipe: float) -> cpe.Trainer:
        """CPE's own trainer on `data`; `recipe` changes entries of the preset (stages, first_steps, ...).

        TypeError for an entry that no recipe has.
        """
        changed = replace(self.recipe, **{"anchors": 8, **recipe})
        steps = {name: max(1, round(BUDGET * getattr(changed, name))) for name in STEPS}
        changed, layers, chance = replace(changed, **steps), layers or self.layers, torch.Generator().manual_seed(seed)
        gates = cpe.ResAG(layers.widths, self.E.shape[-1], changed.r, changed.k, generator=chance)
        return cpe.Trainer(gates, token_space.Losses(layers, self.data, changed.eta), changed, chance)

    def pictures(
        self, contexts: Tensor, seeds: Sequence[int], gates: Eraser | None = None, steps: int = 10, batch: int = 32
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of contexts [B, T, d] by few steps of DPM-Solver++, guidance 4."""
        images = []
        for i in range(0, len(contexts), batch):
            part = contexts[i : i + batch], seeds[i : i + batch]
            *_, latents = sampler.denoise_context(self.model, *part, gates, steps, 4.0, "dpm")
            images.append(sampler.decode(self.model, latents))
        return torch.cat(images)


def open_lab(model: str, target: str = "red heart", surrogate: str | None = None) -> Lab:
    """The laboratory on "emoji", "sd14" or a folder; the embedded model's concepts are names that SD knows too.

    Without a surrogate it is the preset's. UserError as for `weights.load_model`.
    """
    lines = (ROOT / "emoji" / "concepts.txt").read_text(encoding="utf-8").splitlines()
    concepts = [line for line in lines if line and not line.startswith("#") and line != target]
    recipe = PRESETS["emoji" if model == "emoji" else "object"]
    recipe = replace(recipe, surrogate=surrogate or recipe.surrogate)
    return Lab(weights.load_model(model), target, recipe.surrogate, concepts, recipe)


def train(trainer: cpe.Trainer) -> cpe.Trainer:
    """Run a trainer to its end."""
    for _ in trainer:
        pass
    return trainer
