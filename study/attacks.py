"""Attacks on an erased model: how much of an erased concept somebody who wants it gets back.

    victim = Victim(original, erased=original.with_unet(uce(...)))       # a linear eraser, or
    victim = Victim(original, erased=original, gates=gates)              # CPE
    found = learned_tokens(victim, "cat", ["a picture of a {}"])         # what to generate with
    images = sampler.draw(victim.erased, found.contexts, range(len(found.contexts)), victim.gates)

All have one signature, `(victim, target, templates, seed) -> Found`. They only look for inputs: success is the share of
the images drawn with them that a judge recognises as the target.

    learned_embeddings   embeddings  L-BFGS                keys, values        CPE's own attack, Lee et al. 2025
    textual_inversion    new words   Adam                  noise prediction    CCE, Pham et al. 2024 (arXiv 2308.01508)
    learned_tokens       a prefix    greedy coordinates    noise prediction    UnlearnDiffAtk (arXiv 2310.11868)
    prompting4debugging  a prompt    greedy coordinates    noise prediction    P4D, Chin et al. 2024 (arXiv 2309.06135)
    ring_a_bell          a prompt    greedy coordinates    text encoder alone  Tsai et al. 2024 (arXiv 2310.10012)

They are strong on purpose, all gradients and weights at hand. RECE's own attack, a closed form of the first, is in
theory/5.

Letters: P prompts (one per template), T tokens, d width of the context E [P, T, d], e that of a token's embedding at
the text encoder's input, n words that are learned, S samples (x_t, t, noise) of the target's pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cpe
from erasers.common import filled, projections
from solve import minimise
from token_space import TokenSpace, spectral_norm
from unet import KeysValues
from weights import Model

TEMPLATES = ("a picture of a {}",)


@dataclass(frozen=True)
class Victim:
    """An erased model, and the original that the attacker aims at. ValueError unless both are float32.

    A linear eraser edits weights: `erased` differs from `original`. CPE adds gates: the two are the same.
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
    """What an attack found: one context per template, to generate with."""

    contexts: Tensor  # [P, T, d]
    prompts: list[str]  # as a person would read them; learned words are written as <1>, <2>, ...
    before: float  # the loss of the plain prompts
    after: float  # and of what was found


class RevivalLoss:
    """How far the erased model's keys and values of a context are from the original's of the target, per prompt.

        sum_l w_l |KV_l(E + delta) - W_l E|^2 / sum_l w_l |W_l E|^2        0: all of the concept is back

    KV_l are those of edited weights or of gates, w_l = a_l / (d_l L) the layer weights of `TokenSpace`, E [P, T, d]
    the original's contexts of the target. ESD-x also edits queries and outputs, which this does not see.
    """

    def __init__(self, victim: Victim, E: Tensor):
        self.victim, self.E = victim, E
        original = {key: W.cpu() for key, W in victim.original.cross_attention().items()}
        self.w = TokenSpace(cpe.Layers.of(original, spectral_norm, E.shape[1])).w
        with torch.no_grad():
            self.goal = victim.original.unet.keys_values(E)
        self.energy = self.weighted(self.goal)  # [P]

    def weighted(self, kv: KeysValues) -> Tensor:
        """sum_l w_l |x_l|^2 over tokens and features, [P]."""
        return sum(self.w[name] * x.square().sum(dim=(1, 2)) for name, x in kv.items())

    def __call__(self, context: Tensor) -> Tensor:
        """The loss [P] of contexts [P, T, d], in units of the target's own keys and values."""
        kv = self.victim.keys_values(context)
        return self.weighted({name: kv[name] - goal for name, goal in self.goal.items()}) / self.energy


def whitening(goal: RevivalLoss) -> Tensor:
    """(sum_l w_l V_l^T V_l)^-1/2 [d, d]: how far to go in each direction for the erased weights V to react alike."""
    V = projections(goal.victim.erased)
    metric = sum(w * V[f"{name}.weight"].T @ V[f"{name}.weight"] for name, w in goal.w.items())
    values, vectors = torch.linalg.eigh(metric)
    # Directions that the erased weights hardly read would need endless steps.
    return (vectors * values.clamp(min=1e-6 * values[-1]).rsqrt() @ vectors.T).to(goal.E)


def descend(goal: RevivalLoss, base: Tensor, root: Tensor, steps: int) -> Tensor:
    """Contexts [P, T, d] of lower loss near `base` [P, T, d], by L-BFGS over y with E' = base + y root.

    Of edited weights the loss is |y - y*|^2 + const with the `whitening` as root [d, d]: a round bowl.
    """
    scale = goal.energy.sqrt().view(-1, 1, 1)
    y = torch.zeros_like(base, requires_grad=True)
    minimise([y], lambda: goal(base + scale * (y @ root)).sum(), max_iter=steps, history_size=20)
    return (base + scale * (y @ root)).detach()


def learned_embeddings(
    victim: Victim, target: str, templates: Sequence[str] = TEMPLATES, seed: int = 0, *,
    steps: int = 150, starts: int = 2, noise: float = 1e-3,
) -> Found:  # fmt: skip
    """CPE's own attack: a change delta of every token's embedding that undoes the erasure in keys and values.

        min over delta   sum_l w_l |KV_l(E + delta) - W_l E|^2

    One delta per prompt, the best of `starts` + 1 descents: from delta = 0, and from noise of `noise` |E|_F as in the
    paper. It takes AdamW; L-BFGS also finds the exact optimum of edited weights.
    """
    generator, prompts = torch.Generator().manual_seed(seed), filled(templates, [target])
    E = victim.original.encode(prompts)
    goal = RevivalLoss(victim, E)
    sigma, drawn = noise * E.norm(dim=(1, 2), keepdim=True), torch.randn(starts, *E.shape, generator=generator)
    bases, root = [E, *(E + sigma * one for one in drawn.to(E))], whitening(goal)
    tried = torch.stack([E, *(descend(goal, base, root, steps) for base in bases)])
    with torch.no_grad():
        losses = torch.stack([goal(contexts) for contexts in tried])  # [starts + 2, P]
    lowest, best = losses.min(dim=0)
    contexts = tried[best, torch.arange(len(best))]
    return Found(contexts, [f"<learned> {prompt}" for prompt in prompts], losses[0].mean().item(), lowest.mean().item())
