"""Concept Pinpoint Eraser (Lee et al., ICLR 2025, arXiv 2506.22806), as the paper writes it.

    kv = unet.keys_values(context)     # keys and values of all cross-attention layers, once per prompt
    kv = gates(context, kv)            # erase: K + R_k(E), V + R_v(E)
    noise = unet(latents, t, kv)       # every denoising step; the U-Net knows nothing of the eraser

The gate learns to turn a target ("Brad Pitt") into a surrogate ("a person"), and to leave anchors, all else, alone.
`train` takes the same losses, faster, from token_space.py; on the embedded model (emoji/) it solves instead: solve.py.

Shapes: N concepts, B prompts, T = 77 tokens, d = 768 width of the context E [B, T, d], a text encoder's output.
L = 32 projections W_l [d_l, d] are to_k and to_v of SD 1.4's 16 cross-attention layers, frozen; k is a residual's rank.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from cli import main

    raise SystemExit(main())

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

# --- 1. The gate (paper, section 4.1) ----------------------------------------------------------------------------


class ResAG(nn.Module):
    """Residual Attention Gates of N concepts, over projections of the `widths` {name of l: d_l}.

        Q = E w_qs                     [T, r]     queries and keys in one; the scale is learnt: no 1/sqrt(r)
        H = softmax(Q Q^T) E           [T, d]     every token looks at every other: no mask
        g = sigmoid(H v)               [T]        how far the gate is open at each token, in (0, 1)
        R_l(E) = s g * (H D_l) U_l     [T, d_l]   low-rank residual of projection l; s = alpha / k, as in LoRA

    w_qs and v, the `scaler`, are shared by all projections: g is computed once per prompt, not once per layer. D_l and
    U_l, `lora_down[l]` and `lora_up[l]`, belong to one. Untrained, attention is even, g = 1/2 and every residual 0.
    """

    def __init__(self, widths: dict[str, int], d: int, r: int = 16, k: int = 1, N: int = 1, alpha: float = 1.0, *,
                 generator: torch.Generator | None = None):  # fmt: skip
        super().__init__()
        self.names, self.widths, self.k = list(widths), dict(widths), k
        draw = partial(nn.init.kaiming_uniform_, a=5**0.5, generator=generator)
        self.w_qs = nn.Parameter(draw(torch.empty(N, d, r)) / d**2)  # near 0, as in the public code: even attention
        self.scaler = nn.Parameter(torch.zeros(N, d, 1))
        self.lora_down = nn.ParameterList(draw(torch.empty(N, d, k)) for _ in widths)
        self.lora_up = nn.ParameterList(torch.zeros(N, k, width) for width in widths.values())
        self.register_buffer("scale", torch.full((N,), alpha / k))

    def gate(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """Gate values g [N, B, T, 1] and mixed contexts H [N, B, T, d] of a context E [B, T, d]."""
        Q = E @ self.w_qs.unsqueeze(1)
        H = torch.softmax(Q @ Q.transpose(-1, -2), dim=-1) @ E
        return torch.sigmoid(H @ self.scaler.unsqueeze(1)), H

    def gated(self, E: Tensor) -> Tensor:
        """s g H [N, B, T, d], for all residuals; at each token the widest open gate acts alone: two would add up."""
        g, H = self.gate(E)
        widest = torch.arange(len(g), device=g.device).view(-1, 1, 1, 1) == g.argmax(dim=0)
        return self.scale.view(-1, 1, 1, 1) * g * widest * H

    def residual(self, l: int, gated: Tensor) -> Tensor:
        """R_l(E) [B, T, d_l] of the l-th projection, from `gated`."""
        return torch.einsum("nbtk,nkw->btw", gated @ self.lora_down[l].unsqueeze(1), self.lora_up[l])

    def residuals(self, E: Tensor) -> dict[str, Tensor]:
        """R_l(E) [B, T, d_l] of all projections, by name, from a context E [B, T, d]."""
        gated = self.gated(E)
        return {name: self.residual(l, gated) for l, name in enumerate(self.names)}

    def forward(self, E: Tensor, kv: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys and values of the erased model, W_l E + R_l(E). KeyError if `kv` lacks a projection."""
        return kv | {name: kv[name] + R for name, R in self.residuals(E).items()}


def merge(gates: Sequence[ResAG]) -> ResAG:
    """One module with the concepts of all, smaller r and k padded with zeros; ValueError if their models differ."""
    first, r, k = gates[0], max(g.w_qs.shape[2] for g in gates), max(g.k for g in gates)
    if any((g.widths, g.w_qs.shape[1]) != (first.widths, first.w_qs.shape[1]) for g in gates):
        raise ValueError("gates of different models cannot be merged: their projections differ")
    merged = ResAG(first.widths, first.w_qs.shape[1], r, k, sum(len(g.w_qs) for g in gates)).to(first.w_qs)
    n = 0
    for g in gates:
        for name, tensor in g.state_dict().items():
            part = merged.state_dict()[name][n : n + len(tensor)].zero_()  # a view of what `merged` holds
            part[tuple(slice(size) for size in tensor.shape)] = tensor
        n += len(g.w_qs)
    return merged


# --- 2. The losses (sections 4.2 and 4.3) ------------------------------------------------------------------------


@dataclass
class Layers:
    """What the losses know of the U-Net: frozen projections W_l [d_l, d], the paper's weights a_l of errors there."""

    W: dict[str, Tensor]
    a: dict[str, float]

    @staticmethod
    def of(cross_attention: dict[str, Tensor], norm: Callable | None = None, tokens: int = 77) -> "Layers":
        """From a U-Net's `...attn2.{to_q,to_k,to_v,to_out.0}.weight`, by key; KeyError if one is missing.

        a_l = |W_o|                   of to_v: how far an error of 1 in a value can move attention's output (spectral)
        a_l = |W_o W_v| |W_q| / 77    of to_k: the same of a key, if all 77 tokens are attended to alike (theory/3)
        """
        norm = norm or (lambda matrix: torch.linalg.matrix_norm(matrix, 2))
        W, a = {}, {}
        for path in [key.removesuffix(".to_k.weight") for key in cross_attention if key.endswith(".to_k.weight")]:
            W_q, W_k, W_v, W_o = (cross_attention[f"{path}.{p}.weight"] for p in ("to_q", "to_k", "to_v", "to_out.0"))
            W |= {f"{path}.to_k": W_k, f"{path}.to_v": W_v}
            a |= {f"{path}.to_k": float(norm(W_o @ W_v) * norm(W_q) / tokens), f"{path}.to_v": float(norm(W_o))}
        return Layers(W, a)

    @property
    def widths(self) -> dict[str, int]:
        """The width d_l of every projection, by name: what a ResAG for this model is made with."""
        return {name: len(W) for name, W in self.W.items()}


@dataclass
class Data:
    """Contexts to train on, from loading/prompts.py: target and surrogate in the same P templates, A anchor prompts."""

    targets: Tensor  # [P, T, d]
    surrogates: Tensor  # [P, T, d]
    anchors: Tensor  # [A, T, d], perhaps in half precision
    empty: Tensor  # [1, T, d], of the prompt ''


@dataclass
class Losses:
    """The paper's losses, term by term. Each has its x: the erased model shall see E as the original sees E + x.

    W_l E + R_l(E) = W_l (E + x).    i [n]: which templates a step draws; deltas [J, T, d]: adversarial embeddings.
    """

    layers: Layers
    data: Data
    eta: float  # how far beyond the surrogate the target is pushed

    def error(self, gates: ResAG, E: Tensor, x: Tensor) -> Tensor:
        """1/L sum_l a_l mean [W_l x - R_l(E)]^2: how far the gates are from moving contexts E by x [B, T, d]."""
        R = gates.residuals(E)
        terms = [self.layers.a[name] * (x @ W.T - R[name]).square().mean() for name, W in self.layers.W.items()]
        return sum(terms) / len(terms)

    def shift(self, i: Tensor) -> Tensor:
        """x = (1 + eta) (E_sur - E_tar): what erasing adds to the context of the target, [n, T, d]."""
        return (1 + self.eta) * (self.data.surrogates[i] - self.data.targets[i])

    def erase(self, gates: ResAG, i: Tensor) -> Tensor:
        """The target must become its surrogate, and go beyond it by `eta` of the way: E_tar seen as E_tar + x."""
        return self.error(gates, self.data.targets[i], self.shift(i))

    def adversarial(self, gates: ResAG, i: Tensor, deltas: Tensor) -> Tensor:
        """The target under attack must become its surrogate, too: E_tar + delta_j seen as E_tar + x; template i[0]."""
        return self.error(gates, self.data.targets[i[:1]] + deltas, self.shift(i[:1]) - deltas)

    def anchor(self, gates: ResAG, anchors: Tensor) -> Tensor:
        """Whatever should stay must not move: anchors [n, T, d] seen as they are, x = 0."""
        return self.error(gates, anchors, torch.zeros_like(anchors))

    def attack(self, gates: ResAG, i: Tensor, deltas: Tensor) -> Tensor:
        """The attacker's loss, small if a delta brings the target back: E_tar + delta seen as E_tar was, x = -delta."""
        return self.error(gates, self.data.targets[i[:1]] + deltas, -deltas)

    def erasing(self, gates: ResAG, i: Tensor, anchors: Tensor, deltas: Tensor | None) -> dict[str, Tensor]:
        """All losses of one step of erasing, by name; there are no deltas before the first attack."""
        terms = {"erase": self.erase(gates, i), "anchor": self.anchor(gates, anchors)}
        return terms if deltas is None else terms | {"adversarial": self.adversarial(gates, i, deltas)}


# --- 3. Training (algorithm 1) -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of training. The defaults are those of the paper and its public code for celebrities."""

    surrogate: str = "a person"  # what the target becomes
    eta: float = 0.3  # how far beyond it
    lam: float = 1e5  # lambda, the weight of the anchors; 300 to train on the embedded model (why: loading/prompts.py)
    r: int = 16  # width of the gate's attention
    k: int = 1  # rank of a residual
    stages: int = 5  # rounds of erasing; between two of them, a round of attack
    first_steps: int = 1800
    later_steps: int = 450
    attack_steps: int = 450
    deltas: int = 16  # J, adversarial embeddings per attack
    anchors: int = 32  # per step; the empty prompt comes on top
    nearest: int = 50  # domain words nearest to the target that are anchors
    noise: float = 1e-3  # of an anchor's elements, as a share of the anchor's Frobenius norm
    first_lr: float = 3e-4
    later_lr: float = 3e-5
    attack_lr: float = 1e-2
    warmup: int = 5
    attack_warmup: int = 5
    delta_start: float = 0.0  # of a delta's elements at first, as a share of the target's norm; 0: their norm is 1e-6
    templates: int = 1  # per step; more than one is ours
    rise: float = 0.0  # ours: in this share of the first stage lambda grows, as the square of the steps


PRESETS = {
    "celebrity": Recipe(),
    "style": Recipe("real photograph", eta=0.5, lam=1e4, stages=10, anchors=16),
    "explicit": Recipe("a person in modest clothing", eta=3.0, lam=1e4, r=64, k=4, stages=20, first_steps=2400,
                       later_steps=1200, attack_steps=1200, deltas=32, anchors=16, warmup=10),
}  # fmt: skip


def learning_rate(step: int, steps: int, cycles: int, warmup: int) -> float:
    """The share of the full rate at a step: s / warmup at first, then cosine cycles down to 0 (arXiv 1608.03983)."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return (1 + math.cos(math.pi * (cycles * progress % 1))) / 2


class Trainer:
    """Trains the gates of one concept: iterating makes the steps, and yields the losses of each.

    All chance is the generator's, on the data's device. Between two steps `gates`, `deltas`, `optimizer`, `generator`,
    `phase` and `step` are all there is to remember: a run that is given them back goes on bit for bit.
    """

    def __init__(self, gates: ResAG, losses: Losses, recipe: Recipe, generator: torch.Generator):
        self.gates, self.losses, self.recipe, self.generator = gates, losses, recipe, generator
        self.deltas: Tensor | None = None  # [J, T, d], of the newest attack
        later = [recipe.attack_steps, recipe.later_steps] * (recipe.stages - 1)  # a last attack would teach nobody
        self.steps, self.phase, self.step = [recipe.first_steps, *later], 0, 0  # phases 1, 3, 5, ... are attacks

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Erase, attack, erase, ..., attack, erase. FloatingPointError if a gradient is not finite."""
        while self.phase < len(self.steps):
            if self.step == 0:
                self.begin()
            while self.step < self.steps[self.phase]:
                losses = self.draw_losses()
                self.update(losses["total"])
                self.step += 1
                yield {name: loss.item() for name, loss in losses.items()}
            self.phase, self.step = self.phase + 1, 0

    def begin(self) -> None:
        """A fresh optimiser of the gates, or of deltas, which are drawn as an attack begins; the gates then stay."""
        attack, E = self.phase % 2 == 1, self.losses.data.targets
        if attack and self.step == 0:
            empty = E.new_empty(self.recipe.deltas, *E.shape[1:])
            self.deltas = nn.init.kaiming_uniform_(empty, 5**0.5, generator=self.generator) / E.shape[2] ** 2
            if self.recipe.delta_start:
                self.deltas.normal_(0, self.recipe.delta_start * E[0].norm().item(), generator=self.generator)
        self.gates.requires_grad_(not attack)
        self.deltas = self.deltas if self.deltas is None else self.deltas.detach().requires_grad_(attack)
        learners = [self.deltas] if attack else list(self.gates.parameters())
        self.optimizer = torch.optim.AdamW(learners, weight_decay=0.01, fused=True)

    def draw_losses(self) -> dict[str, Tensor]:
        """The losses of a step, of templates and anchors drawn anew; total = erase + lambda_s anchor + adversarial."""
        recipe, chance, S = self.recipe, self.generator, self.steps[0]
        i = torch.randint(len(self.losses.data.targets), (recipe.templates,), generator=chance, device=chance.device)
        if self.phase % 2:
            return {"total": self.losses.attack(self.gates, i, self.deltas)}
        losses = self.losses.erasing(self.gates, i, self.draw_anchors(), self.deltas)
        # lambda_s = lambda min(1, s / (rise S))^2 at step s = 1, 2, ... of the first stage's S; in later stages lambda
        lam = recipe.lam * (min(1, (self.step + 1) / max(1, recipe.rise * S)) ** 2 if self.phase == 0 else 1)
        return losses | {"total": losses["erase"] + lam * losses["anchor"] + losses.get("adversarial", 0)}

    def update(self, loss: Tensor) -> None:
        """One step of AdamW; the public code rounds its moments to 8 bits, which is not done here."""
        recipe, group, attack = self.recipe, self.optimizer.param_groups[0], self.phase % 2 == 1
        full = recipe.attack_lr if attack else recipe.later_lr if self.phase else recipe.first_lr
        warmup, cycles = recipe.attack_warmup if attack else recipe.warmup, 1 if self.phase else 2
        group["lr"] = full * learning_rate(self.step, self.steps[self.phase], cycles, warmup)
        self.optimizer.zero_grad()
        loss.backward()
        if not nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None]).isfinite():
            raise FloatingPointError(f"the loss became {loss.item()} in phase {self.phase + 1}, step {self.step + 1}")
        self.optimizer.step()

    def draw_anchors(self) -> Tensor:
        """Anchors [n + 1, T, d]: anchor prompts with noise, mixed in pairs; the last is the empty prompt."""
        data, n = self.losses.data, self.recipe.anchors
        chance = {"generator": self.generator, "device": self.generator.device}
        E = data.anchors[torch.randint(len(data.anchors), (2, n), **chance)].to(data.empty)
        beta = torch.rand(n, 1, 1, **chance, dtype=E.dtype)  # Beta(1, 1) is uniform
        sigma = self.recipe.noise * E.norm(dim=(2, 3), keepdim=True)
        # beta (E_1 + n_1) + (1 - beta) (E_2 + n_2): two independent Gaussians make one
        deviation = ((beta * sigma[0]) ** 2 + ((1 - beta) * sigma[1]) ** 2).sqrt()
        mixed = beta * E[0] + (1 - beta) * E[1] + deviation * torch.randn(E.shape[1:], **chance, dtype=E.dtype)
        return torch.cat([mixed, data.empty])


# --- 4. The gate file, as in the authors' public checkpoints -----------------------------------------------------
# Beside the tensors it holds text, by cli/train.py: target, aliases, surrogate, preset; model, fingerprint (hash of its
# encoder), drawing (steps, guidance, sampler); how: "train" and the fields of Recipe, or "solve" and those of Settings
# in solve.py (bend, floor, rho, ...); seed, version, inputs (hash); prompts, rank, alpha, as the authors' files have.
SHARED = ("attention_module1.w_qs", "attention_module1.w_ks", "gate.scaler")  # w_ks is there, but never used
W_QS, W_KS, SCALER = (f"attention_gate.encoder_layer.slf_attn.{name}.weight" for name in SHARED)


def to_tensors(gates: ResAG) -> dict[str, Tensor]:
    """The tensors of a gate file, float32, shaped as ResAG's parameters with N = 1. ValueError: several concepts."""
    if len(gates.w_qs) != 1:
        raise ValueError(f"a gate file holds one concept, not {len(gates.w_qs)}: write each before merging")
    tensors = {W_QS: gates.w_qs, W_KS: torch.zeros_like(gates.w_qs), SCALER: gates.scaler}
    for name, D, U in zip(gates.names, gates.lora_down, gates.lora_up, strict=True):
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.alpha": gates.scale[0] * gates.k, f"{key}.lora_down.weight": D, f"{key}.lora_up.weight": U}
    return {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}


def from_tensors(tensors: dict[str, Tensor]) -> ResAG:
    """Gates from the tensors of a gate file; ValueError names what is missing, extra, misshapen or not finite."""
    stems = sorted(key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight"))
    ups, alpha = [f"{stem}.lora_up.weight" for stem in stems or ["lora_unet"]], f"{min(stems, default='')}.alpha"
    run = ", but the state of an unfinished run" if "position" in tensors else ""
    for key, axes in ({W_QS: 3} | dict.fromkeys(ups, 3) | {alpha: 0}).items():
        if key not in tensors or tensors[key].ndim != axes or 0 in tensors[key].shape:
            raise ValueError(f"not a gate file{run}: {key} is missing or misshapen")
    widths = {projection(stem): tensors[up].shape[2] for stem, up in zip(stems, ups, strict=True)}
    gates = ResAG(widths, *tensors[W_QS].shape[1:], tensors[ups[0]].shape[1], alpha=tensors[alpha].item())
    expected = to_tensors(gates)
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors or key not in expected:
            raise ValueError(f"not a gate file: {key} is missing or does not belong there")
        found, like = tensors[key], expected[key]
        if found.shape != like.shape or not found.is_floating_point() or not found.isfinite().all():
            raise ValueError(f"{key} holds {found.dtype} {list(found.shape)}, not finite numbers {list(like.shape)}")
        if key.endswith(".alpha") and found != tensors[alpha]:
            raise ValueError(f"{key} is {found.item()}, but {alpha} is {tensors[alpha].item()}")
    state = {"w_qs": tensors[W_QS], "scaler": tensors[SCALER], "scale": gates.scale}
    for l, stem in enumerate(stems):
        state |= {f"lora_{side}.{l}": tensors[f"{stem}.lora_{side}.weight"] for side in ("down", "up")}
    gates.load_state_dict(state)
    return gates


def projection(stem: str) -> str:
    """The U-Net's path of a projection, from its name in a gate file; ValueError if that names none."""
    path = re.sub(r"_(?=\d)|(?<=\d)_|(?<=mid_block)_", ".", stem.removeprefix("lora_unet_"))
    blocks = r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn2\.to_[kv]"
    if not re.fullmatch(blocks, path):
        raise ValueError(f"not a gate file: {stem} names no projection of cross-attention")
    return path
