"""Bake: the erasure moves from the gates into the text encoder's own weights, and no add-on is left to delete.

What gates ask of all layers together is nearly another context (`token_space.context_gate`):

    E' = E + (sum_l w_l R_l(E) W_l) M^-1

The text encoder learns to say E' by itself. A hidden unit of an MLP is a gate, too: what it adds, quick_gelu(w . x + b)
times a column of the output layer, is nothing where w . x + b is far below zero. So the few units of the last MLP that
matter least are taken away, the rest made to do without them, and put back as detectors of the target. They alone are
trained, as far as the U-Net sees the difference:

    loss = mean |tower(p) - E'(p)|_M^2 over prompts p of the target  +  keep * mean |tower(p) - E(p)|_M^2 over others

where E is what the tower says without the units. Two things cannot be learnt: the tower is causal, so a token does not
know what comes after it, and a gate does; and it ends in a LayerNorm, whose outputs lie on an ellipsoid.

Shapes: P prompts, T tokens, d width of the context, h hidden units of an MLP, n of them trained, S states.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpe
from clip import MLP, TextEncoder, quick_gelu
from deploy.targets import Concept
from loading.prompts import Encode
from token_space import ContextGate, TokenSpace

# --- The units that are trained ----------------------------------------------------------------------------------


def mean_and_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n] and covariance [n, n] of x [S, n], on the CPU: Apple's graphics cards have no float64."""
    mean = x.mean(dim=0)
    return mean.cpu().double(), ((x - mean).T @ (x - mean) / len(x)).cpu().double()


@torch.no_grad()
def spare_units(mlp: MLP, x: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The units that matter least at inputs x [S, d], and an output layer that does without them: [n], [d, h], [d].

    What the spared units P said is regressed on what the others K say, by least squares with a little ridge:

        a_P ~ mean_P + (a_K - mean_K) B,   B = (C_KK + ridge)^-1 C_KP   with the covariance C of activations

    `metric` [d, d] weighs what an MLP says.
    """
    # copied: both are changed below
    weight, bias = (x.detach().to("cpu", torch.float64, copy=True) for x in (mlp.fc2.weight, mlp.fc2.bias))
    mean, C = mean_and_covariance(quick_gelu(mlp.fc1(x)))
    size = ((weight.T @ metric.cpu().double()) * weight.T).sum(dim=1)  # |column|^2 in the metric
    order = (C.diagonal() * size).argsort()
    P, K = order[:count], order[count:]
    ridge = 1e-3 * C.diagonal()[K].mean() * torch.eye(len(K)).to(C)
    B = torch.linalg.solve(C[K][:, K] + ridge, C[K][:, P])
    bias += weight[:, P] @ (mean[P] - B.T @ mean[K])
    weight[:, K] += weight[:, P] @ B.T
    weight[:, P] = 0
    return P.to(x.device), weight.to(x), bias.to(x)


@torch.no_grad()
def detectors(points: Tensor, x: Tensor, shut: float = -3.0, fires: float = 2.0) -> tuple[Tensor, Tensor]:
    """Units that fire at `points` [n, d] and at next to none of the inputs x [S, d]: weights [n, d], biases [n].

    Each reads w = (cov x)^-1 (point - mean x), scaled so that w . x + b is `fires` at its point, and `shut` or less at
    all but a thousandth of x.
    """
    (mean, C), c = mean_and_covariance(x), points.cpu().double()
    w = torch.linalg.solve(C + 1e-2 * C.diagonal().mean() * torch.eye(len(C)).to(C), (c - mean).T).T
    own = (w * c).sum(dim=1)
    highest = (x @ w.T.to(x)).cpu().double().kthvalue(math.ceil(0.999 * len(x)), dim=0).values
    # A point among x itself has no room between: its unit fires nearby, too, and training sees to that.
    middle = w @ mean
    highest = torch.minimum(highest, middle + 0.9 * (own - middle))
    slope = (fires - shut) / (own - highest)
    return (slope[:, None] * w).to(x), (shut - slope * highest).to(x)


# --- Training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the units are trained."""

    units: int = 64  # of the last MLP, for one concept; for n sqrt(n) times as many, but a quarter of all at most
    steps: int = 1000  # for one concept
    more: int = 400  # further steps for each further concept
    lr: float = 1e-2  # falls to zero along a cosine
    keep: float = 30.0  # weight of the prompts that shall stay
    targets: int = 16  # prompts of targets per step
    others: int = 48  # other prompts per step

    def of(self, concepts: int, scale: float = 1.0) -> "Recipe":
        """The recipe for as many concepts, with `scale` times the steps."""
        steps = max(1, round(scale * (self.steps + self.more * (concepts - 1))))
        return replace(self, units=round(self.units * concepts**0.5), steps=steps)


class Frozen(NamedTuple):
    """What the tower makes of prompts without the trained units, [P, T, d] in half precision."""

    hidden: Tensor  # the states that the last MLP reads and adds to
    rest: Tensor  # what the final LayerNorm reads if the units say nothing


class Baker:
    """Trains the units: iterate, stop and go on wherever you like, then take `changed()`.

    What a step reports are shares of the shift that the gates ask for: "missing", how much of it is not there yet on
    prompts of targets, and "moved", how far the others have moved. `targets` [P, T] and `others` [Q, T] are the tokens
    of prompts whose contexts shall become those of `gate`, and shall stay as they are. ValueError as for `teach`.
    """

    def __init__(self, tower: TextEncoder, gate: ContextGate, space: TokenSpace, targets: Tensor, others: Tensor,
                 recipe: Recipe, seed: int = 0):  # fmt: skip
        self.tower, self.recipe, self.space = tower, recipe, space
        self.last, self.norm = tower.text_model.encoder.layers[-1], tower.text_model.final_layer_norm
        self.generator = torch.Generator().manual_seed(seed)
        # How far the longest prompt reaches, and one token of padding beyond.
        self.length = 2 + max((rows != rows[:, -1:]).sum(dim=1).max().item() for rows in (targets, others))
        target_states, other_states = self.hidden_states(targets), self.hidden_states(others)
        self.wanted, shift = self.teach(gate, target_states)
        self.scale = shift.mean()  # of the shift, per token
        x = self.read(other_states[:: max(1, len(other_states) // 256)]).flatten(0, 1)
        g, count = self.norm.weight, min(recipe.units, len(self.last.mlp.fc1.bias) // 4)
        self.free, self.weight, self.bias = spare_units(self.last.mlp, x, g[:, None] * space.M * g, count)
        self.targets, self.others = self.frozen(target_states), self.frozen(other_states)
        # Units begin at tokens of targets, drawn by how much is asked there.
        drawn = torch.multinomial(shift.flatten().cpu(), count, replacement=True, generator=self.generator)
        weight, bias = detectors(self.read(target_states.flatten(0, 1)[drawn.to(x.device)]), x)
        self.units = MLP(x.shape[1], count).to(x)  # hidden units on their own, which say nothing yet
        self.units.fc2.bias = None
        state = {"fc1.weight": weight, "fc1.bias": bias, "fc2.weight": torch.zeros_like(weight.T)}
        self.units.load_state_dict(state)
        self.steps, self.phase, self.step = [recipe.steps], 0, 0
        self.optimizer = torch.optim.Adam(self.units.parameters(), lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        for p in self.units.parameters():  # what Adam makes at its first step: a state always has the same tensors
            moments = {name: torch.zeros_like(p.data) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """What the last MLP adds to, of tokens [P, T]: [P, T, d] in half precision."""
        body, parts = self.tower.text_model, []
        for batch in tokens.split(32):
            hidden = body.embeddings(batch)
            for layer in body.encoder.layers[:-1]:
                hidden = layer(hidden)
            parts.append((hidden + self.last.self_attn(self.last.layer_norm1(hidden))).half())
        return torch.cat(parts)

    @torch.no_grad()
    def read(self, hidden: Tensor) -> Tensor:
        """What the last MLP reads of states [..., d] in half precision."""
        return self.last.layer_norm2(hidden.to(self.space.M))

    @torch.no_grad()
    def teach(self, gate: ContextGate, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What gates make of prompts, [P, T, d] in half precision, and the energy of this shift, [P, T].

        `hidden` are their states [P, T, d] that the last MLP adds to. ValueError if it overflows, or there is none.
        """
        wanted, shift = [], []
        for h in hidden.split(32):
            E = self.norm(h + self.last.mlp(self.read(h)))
            erased = gate(E)
            wanted.append(erased.half())
            shift.append(self.space.energy(erased - E))
        wanted, shift = torch.cat(wanted), torch.cat(shift)
        if not (wanted.isfinite().all().item() and shift.isfinite().all().item()):
            raise ValueError("the corrections of these gates overflow")
        if shift.mean().item() <= 1e-12 * self.space.energy(E).mean().item():  # rounding
            raise ValueError("these gates change nothing on what they should erase")
        return wanted, shift

    @torch.no_grad()
    def frozen(self, hidden: Tensor) -> Frozen:
        """What training reads of the states [P, T, d] that the last MLP adds to."""
        mlp, rest = self.last.mlp, []
        for h in hidden.split(32):  # thousands of prompts: what is kept of each is in half precision
            rest.append((h + F.linear(quick_gelu(mlp.fc1(self.read(h))), self.weight, self.bias)).half())
        return Frozen(hidden, torch.cat(rest))

    def shares_missed(self, rows: Tensor, others: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
        """|tower(p) - wanted(p)|_M^2 over the first `length` tokens of prompts, as shares of the shift: [P], [Q]."""
        hidden, rest = (
            torch.cat([target[rows, :length], other[others, :length]]).to(self.space.M)
            for target, other in zip(self.targets, self.others, strict=True)
        )
        wanted = torch.cat([self.wanted[rows, :length].to(rest), self.norm(rest[len(rows) :])])
        shares = self.space.energy(self.norm(rest + self.units(self.read(hidden))) - wanted).mean(dim=-1) / self.scale
        return shares[: len(rows)], shares[len(rows) :]

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Train to the end: yields the losses of every step.

        FloatingPointError, with the units as they were, when a loss is not finite.
        """
        recipe, sizes = self.recipe, ((self.wanted, self.recipe.targets), (self.others.hidden, self.recipe.others))
        while self.step < recipe.steps:
            rows, others = (torch.randperm(len(x), generator=self.generator)[:count] for x, count in sizes)
            # Padding says nearly the same at every place: one step in four looks at all of it. The tower is causal, so
            # what is cut off changes nothing before it.
            length = None if self.step % 4 == 0 else self.length
            missing, moved = (shares.mean() for shares in self.shares_missed(rows, others, length))
            loss = missing + recipe.keep * moved
            self.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.units.parameters(), 1.0)
            if not (loss + norm).isfinite().item():
                raise FloatingPointError(f"the loss became {loss:g}, its gradient {norm:g}, in step {self.step + 1}")
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.lr * (1 + math.cos(math.pi * self.step / recipe.steps)) / 2
            self.optimizer.step()
            self.step += 1
            yield {"missing": missing.item(), "moved": moved.item()}

    def live(self) -> dict[str, Tensor]:
        """The tensors that training changes, by name; not copies."""
        live = {f"units.{name}": parameter.data for name, parameter in self.units.named_parameters()}
        for i, moments in enumerate(self.optimizer.state.values()):
            live |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        return live

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors for a safetensors file."""
        state = {name: tensor.clone() for name, tensor in self.live().items()}
        return state | {"generator": self.generator.get_state(), "position": torch.tensor(self.step)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state()` was taken; ValueError when it is of another run, or damaged."""
        shapes, mine = ({name: tensor.shape for name, tensor in each.items()} for each in (state, self.state()))
        if shapes != mine or not 0 <= state["position"] <= self.recipe.steps:
            raise ValueError("this state is of another run")
        for name, tensor in self.live().items():
            tensor.copy_(state[name])
        self.generator.set_state(state["generator"])
        self.step = int(state["position"])

    @torch.no_grad()
    def changed(self) -> dict[str, Tensor]:
        """What is new of the last MLP, by name: fc1.weight [m, d], fc1.bias [m], fc2.weight [d, m], fc2.bias [d]."""
        mlp, units, free = self.last.mlp, self.units, self.free
        changed = {
            "fc1.weight": mlp.fc1.weight.index_copy(0, free, units.fc1.weight),
            "fc1.bias": mlp.fc1.bias.index_copy(0, free, units.fc1.bias),
            "fc2.weight": self.weight.index_copy(1, free, units.fc2.weight),
            "fc2.bias": self.bias,
        }
        place = f"text_model.encoder.layers.{len(self.tower.text_model.encoder.layers) - 1}.mlp"
        return {f"{place}.{name}": t.detach() for name, t in changed.items()}


# --- What was lost -----------------------------------------------------------------------------------------------

HELD_OUT = ("the {} here, please", "a {} and a dog")  # templates of no preset


@torch.no_grad()
def token_figures(space: TokenSpace, gates: cpe.ResAG, concept: Concept, words: Sequence[str], encode: Encode,
                  baked: Encode, template: str = HELD_OUT[0]) -> dict[str, dict[str, float]]:  # fmt: skip
    """{"left", "near", "others": {"gates" and "baked"}}, in a template that training never sees.

        left     share of the asked shift of the target that is missing      sum_l w_l |W_l x - R_l|^2 / x M x^T
        near     how far the 10 nearest of `words` move, as a share of it    sum_l w_l |R_l|^2 / x M x^T
        others   the same for the rest of them

    `encode` and `baked` are the text encoder before and after; baked, R_l = W_l (E_baked - E).
    """
    name, surrogate, *texts = (template.replace("{}", word) for word in (concept.names[0], concept.surrogate, *words))
    prompts = [name, *texts]
    E = encode(prompts)
    x = torch.zeros_like(E)
    x[0] = (1 + concept.eta) * (encode([surrogate])[0] - E[0])
    missed = {"gates": space.error(gates, E, x), "baked": space.energy(x - (baked(prompts) - E))}  # [b, T]
    order = (E[1:] - E[0]).flatten(1).norm(dim=1).argsort() + 1
    groups = {"left": [0], "near": order[:10], "others": order[10:]}
    shares = {who: tokens.sum(dim=1) / space.energy(x[0]).sum() for who, tokens in missed.items()}
    return {group: {who: s[rows].mean().item() for who, s in shares.items()} for group, rows in groups.items()}
