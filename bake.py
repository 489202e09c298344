"""Bake: the erasure moves from the gates into the text encoder's own weights, and no add-on is left to delete.

A gate is not linear in E, so no change of `to_k` and `to_v` does what it does. But every layer is asked for nearly the
same thing, and what all of them together ask for is another context (`Objective.context_gate`):

    E' = E + (sum_l w_l R_l(E) W_l) M^-1

The text encoder is a network: its last layers can learn to say E' by themselves. They are trained here to do so on
prompts of the target, and to say what they always said on all others, as far as the U-Net sees the difference:

    loss = mean |tower(p) - E'(p)|_M^2 over prompts p of the target  +  keep * mean |tower(p) - E(p)|_M^2 over others

Two things cannot be learnt. The tower is causal, so a token does not know what comes after it, and a gate does; and it
ends in a LayerNorm, whose outputs lie on an ellipsoid, and E' need not (`on_ellipsoid`; a Baker's `unreachable`).
Needs torch, cpe.py and the text tower of clip.py; of the U-Net nothing but M.

Shapes: P prompts, T tokens, d width of the context.
"""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import cpe
from clip import TextEncoder
from cpe import ContextGate, Diverged, Objective, Progress, Prompts, ResAG

# --- What is erased, and what stays ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """What one gate file erases, as its metadata says."""

    names: list[str]  # the target, then its aliases
    surrogate: str
    eta: float


def read_concept(metadata: Mapping[str, str], recipe: cpe.Recipe) -> Concept:
    """The concept of a gate file; what its metadata leaves open is as in `recipe`. ValueError if it names no target."""
    target = metadata.get("target") or metadata.get("prompts")
    if not target:
        raise ValueError("its metadata does not say what it erases")
    surrogate, eta = metadata.get("surrogate", recipe.surrogate), metadata.get("eta", recipe.eta)
    try:
        aliases = json.loads(metadata.get("aliases", "[]"))
        known = isinstance(aliases, list) and all(isinstance(alias, str) and alias.encode() for alias in aliases)
    except (ValueError, RecursionError):  # no JSON, or halves of letters
        known = False
    if not known:
        raise ValueError(f"the aliases in its metadata are no list of names: {metadata['aliases'][:80]}")
    return Concept([target, *aliases], surrogate, float(eta))


def in_company(texts: Sequence[str], words: Sequence[str], chance: random.Random) -> list[str]:
    """Every prompt with an anchor word before it, behind it, or both.

    A few templates would be learnt by heart: in all company only the name itself tells a target from others.
    """
    forms = ("{word} {text}", "{text} {word}", "{text} and {word}", "{other}, {text}, {word}")
    return [
        chance.choice(forms).format(text=text, word=chance.choice(words), other=chance.choice(words)) for text in texts
    ]


def training_prompts(
    concepts: Sequence[Concept], prompts: Prompts, seed: int, least: int = 300
) -> tuple[list[str], list[str]]:
    """Prompts of the targets, and others: as they are, then in company.

    Every name in every template, again and again until there are `least` of each concept; anchor words in four
    templates each, and ''. ValueError as of `cpe.anchor_words`.
    """
    chance = random.Random(seed)
    anchors = cpe.anchor_words(prompts, [name for concept in concepts for name in concept.names])
    words = [*anchors.general, *anchors.domain]
    targets = []
    for concept in concepts:
        plain = [t.replace("{}", name) for name in concept.names for t in prompts.templates]
        copies = max(1, math.ceil(least / len(plain)) - 1)
        targets += plain + in_company(plain * copies, words, chance)
    others = ["", *cpe.anchor_prompts(words, prompts.templates)]
    return targets, others + in_company(others, words, chance)


# --- The part of the text tower that is trained ------------------------------------------------------------------


class Tail(nn.Module):
    """The last layers of a text tower and its final LayerNorm, copied: hidden states [P, T, d] -> context [P, T, d].

    ValueError unless the tower has so many `layers`, and they are one or more.
    """

    def __init__(self, tower: TextEncoder, layers: int):
        super().__init__()
        body = tower.text_model
        self.first = len(body.encoder.layers) - layers
        if self.first < 0 or layers < 1:
            raise ValueError(f"of {len(body.encoder.layers)} layers {layers} cannot be trained")
        self.layers = copy.deepcopy(body.encoder.layers[self.first :])
        self.final_layer_norm = copy.deepcopy(body.final_layer_norm)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the whole tower says, from the states [P, T, d] that enter its last layers: [P, T, d]."""
        for layer in self.layers:
            hidden = layer(hidden)
        return self.final_layer_norm(hidden)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, named as in the text encoder."""
        named = {f"text_model.final_layer_norm.{name}": t for name, t in self.final_layer_norm.state_dict().items()}
        for i, layer in enumerate(self.layers, self.first):
            named |= {f"text_model.encoder.layers.{i}.{name}": t for name, t in layer.state_dict().items()}
        return named


def on_ellipsoid(norm: nn.LayerNorm, context: Tensor, M: Tensor) -> Tensor:
    """The context [..., d] that a LayerNorm can say and that comes nearest, in the metric M, to the one given.

    E = g x + b with sum x = 0 and |x|^2 = d. In an eigenbasis, with Lagrange's mu so that the length is right,

        min (x - c)^T B (x - c),   B = diag(g) M diag(g),  c = (E - b) / g    =>    (B + mu) x = B c

    On the CPU: Apple's graphics cards have no float64.
    """
    E, M, g, b = (x.cpu().double() for x in (context, M, norm.weight, norm.bias))
    d = len(M)
    flat = torch.linalg.qr(torch.cat([M.new_ones(d, 1), torch.eye(d).to(M)[:, 1:]], dim=1))[0][:, 1:]  # sum 0
    B = g[:, None] * M * g
    a, Q = torch.linalg.eigh(flat.T @ B @ flat)
    r = ((E - b) / g) @ B @ flat @ Q
    # |r / (a + mu)| falls in mu: halve the interval that holds mu, -a_1 < mu <= |r| / sqrt d - a_1.
    low = -a[0].expand(*r.shape[:-1], 1)
    high = low + r.norm(dim=-1, keepdim=True) / d**0.5
    for _ in range(60):
        mu = (low + high) / 2
        long = (r / (a + mu)).norm(dim=-1, keepdim=True) > d**0.5
        low, high = torch.where(long, mu, low), torch.where(long, high, mu)
    return (g * ((r / (a + high)) @ (flat @ Q).T) + b).to(context)


# --- Training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the last layers are trained."""

    layers: int = 2  # of the text tower, from its end; the final LayerNorm is trained with them
    steps: int = 700  # for one concept
    more: int = 100  # further steps for each further concept
    lr: float = 1.5e-3  # falls to zero along a cosine
    keep: float = 30.0  # weight of the prompts that shall stay
    targets: int = 8  # prompts of targets per step
    others: int = 16  # other prompts per step, half of them drawn by how far they had moved when last seen
    warmup: int = 10

    def of(self, concepts: int, scale: float = 1.0) -> "Recipe":
        """The recipe for as many concepts, with `scale` times the steps."""
        return replace(self, steps=max(1, round(scale * (self.steps + self.more * (concepts - 1)))))


class Baker:
    """Trains the last layers: iterate over `steps()`, stop and go on wherever you like, then take `tensors()`.

    A seed repeats a run on one machine. What a step reports are shares of the shift that the gates ask for: "missing",
    how much of it is not there yet on prompts of targets, and "moved", how far the others have moved.

    `targets` [P, T] and `others` [Q, T] are the tokens of prompts whose contexts shall become those of `gate`, and
    shall stay as they are. What enters the last layers is computed once, and kept in half precision. ValueError as of
    `Tail`.
    """

    def __init__(
        self,
        tower: TextEncoder,
        gate: ContextGate,
        objective: Objective,
        targets: Tensor,
        others: Tensor,
        recipe: Recipe,
        seed: int = 0,
    ):
        self.tower, self.recipe, self.objective = tower, recipe, objective
        self.tail = Tail(tower, recipe.layers).requires_grad_(True)
        self.generator = torch.Generator().manual_seed(seed)
        self.targets, self.others = self.hidden_states(targets), self.hidden_states(others)
        self.kept = self.contexts(self.others)
        self.errors = torch.ones(len(others))  # of every other prompt, when it was last seen
        self.done, self.optimizer = 0, self.new_optimizer()
        # How far the longest prompt reaches, and one token of padding beyond.
        self.length = 2 + max((rows != rows[:, -1:]).sum(dim=1).max().item() for rows in (targets, others))
        before = self.contexts(self.targets).to(objective.M)
        with torch.no_grad():
            wanted = torch.cat([gate(E) for E in before.split(32)])
            self.scale = objective.energy(wanted - before).mean().clamp(min=1e-30)  # of the shift, per token
            some = wanted[:: max(1, len(wanted) // 32)]
            lost = objective.energy(on_ellipsoid(self.tail.final_layer_norm, some, objective.M) - some)
        self.unreachable = (lost.mean() / self.scale).item()  # share of the shift that leads off the ellipsoid
        self.wanted = wanted.half()

    @property
    def total(self) -> int:
        """Steps from the beginning to the end."""
        return self.recipe.steps

    def new_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser before the first step."""
        return torch.optim.Adam(self.tail.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), fused=True)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """What enters the last layers of tokens [P, T]: [P, T, d] in half precision."""
        body, parts = self.tower.text_model, []
        for batch in tokens.split(32):
            hidden = body.embeddings(batch)
            for layer in body.encoder.layers[: self.tail.first]:
                hidden = layer(hidden)
            parts.append(hidden.half())
        return torch.cat(parts)

    @torch.no_grad()
    def contexts(self, hidden: Tensor) -> Tensor:
        """What the last layers make of hidden states as they are now, [P, T, d] in half precision."""
        return torch.cat([self.tail(batch.to(self.objective.M)).half() for batch in hidden.split(32)])

    def draw(self) -> tuple[Tensor, Tensor]:
        """Rows of a step: prompts of targets [P], and others [Q], half at random and half where errors are large."""
        recipe, generator = self.recipe, self.generator
        rows = torch.randperm(len(self.targets), generator=generator)[: recipe.targets]
        count = min(recipe.others, len(self.others))
        hard = torch.multinomial(self.errors, (count + 1) // 2, generator=generator)
        return rows, torch.cat([hard, torch.randperm(len(self.others), generator=generator)[: count // 2]])

    def misfits(self, rows: Tensor, others: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
        """|tower(p) - wanted(p)|_M^2 over the first `length` tokens of prompts, as shares of the shift: [P], [Q]."""
        hidden = torch.cat([self.targets[rows], self.others[others]])[:, :length].to(self.objective.M)
        wanted = torch.cat([self.wanted[rows], self.kept[others]])[:, :length].to(self.objective.M)
        shares = self.objective.energy(self.tail(hidden) - wanted).mean(dim=-1) / self.scale
        return shares[: len(rows)], shares[len(rows) :]

    def update(self) -> dict[str, float]:
        """One step of the optimiser; Diverged, with the layers as they were, when the loss is not finite."""
        recipe, step = self.recipe, self.done
        rows, others = self.draw()
        # Padding says nearly the same at every place: one step in four looks at all of it. The tower is causal, so
        # what is cut off changes nothing before it.
        missing, moved = self.misfits(rows, others, None if step % 4 == 0 else self.length)
        loss = missing.mean() + recipe.keep * moved.mean()
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss became {loss.item()} in step {step + 1}")
        self.optimizer.zero_grad()
        loss.backward()
        if not math.isfinite(nn.utils.clip_grad_norm_(self.tail.parameters(), 1.0).item()):
            raise Diverged(f"the gradient overflowed in step {step + 1}")
        rise = min(1.0, (step + 1) / (recipe.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * rise * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        self.optimizer.step()
        self.errors[others] = moved.detach().cpu() + 1e-12
        return {"missing": missing.mean().item(), "moved": moved.mean().item()}

    def steps(self) -> Iterator[Progress]:
        """Train to the end, one Progress per step; the state may be saved between any two. Diverged as of `update`."""
        while self.done < self.total:
            losses = self.update()
            self.done += 1
            yield Progress(self.done, self.total, 1, "bake", losses)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors for a safetensors file."""
        state = {f"tail.{name}": t for name, t in self.tail.state_dict().items()} | cpe.moments(self.optimizer)
        state |= {"errors": self.errors, "generator": self.generator.get_state(), "done": torch.tensor(self.done)}
        return {name: t.detach().clone() for name, t in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where `state()` was taken; ValueError when it is of another run, or damaged."""
        try:
            self.tail.load_state_dict({n.removeprefix("tail."): t for n, t in state.items() if n.startswith("tail.")})
            self.done = int(state["done"])
            if not 0 <= self.done <= self.total:
                raise ValueError(f"it has no step {self.done}")
            errors = state["errors"].to(self.errors, copy=True)
            if errors.shape != self.errors.shape or not (errors.isfinite() & (errors > 0)).all():
                raise ValueError("its errors are not those of these prompts")
            self.errors = errors
            self.generator.set_state(state["generator"])
            self.optimizer = self.new_optimizer()
            if self.done:
                cpe.load_moments(self.optimizer, state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"this state is of another run: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """The text encoder's tensors, those that were trained replaced: what `weights.save_model` writes."""
        return self.tower.state_dict() | {name: t.detach() for name, t in self.tail.tensors().items()}


# --- What was lost -----------------------------------------------------------------------------------------------

HELD_OUT = ("the {} here, please", "a {} and a dog")  # templates of no preset
Encode = Callable[[list[str]], Tensor]


@torch.no_grad()
def token_figures(
    objective: Objective,
    gates: ResAG,
    concept: Concept,
    words: Sequence[str],
    encode: Encode,
    baked: Encode,
    template: str = HELD_OUT[0],
) -> dict[str, dict[str, float]]:
    """{"left", "near", "others": {"gates" and "baked"}}, in a template that training never sees.

        left     share of the asked shift of the target that is missing      sum_l w_l |W_l x - R_l|^2 / x M x^T
        near     how far the 10 nearest of `words` move, as a share of it    sum_l w_l |R_l|^2 / x M x^T
        others   the same for the rest of them

    `encode` and `baked` are the text encoder before and after; baked, R_l = W_l (E_baked - E).
    """
    name, surrogate, *texts = (template.replace("{}", word) for word in (concept.names[0], concept.surrogate, *words))
    E = encode([name])
    x = (1 + concept.eta) * (encode([surrogate]) - E)
    energy = objective.energy(x).sum()
    left, R = {}, gates.corrections(E)
    left["gates"] = sum(w * (x @ objective.W[l].T - R[l]).square().sum() for l, w in objective.w.items()) / energy
    left["baked"] = objective.energy(x - (baked([name]) - E)).sum() / energy
    moved: dict[str, list[Tensor]] = {"gates": [], "baked": []}
    distances = []
    for i in range(0, len(texts), 16):
        contexts = encode(texts[i : i + 16])
        distances.append((contexts - E).flatten(1).norm(dim=-1))
        R = gates.corrections(contexts)
        moved["gates"].append(sum(w * R[l].square().sum(dim=(1, 2)) for l, w in objective.w.items()) / energy)
        moved["baked"].append(objective.energy(baked(texts[i : i + 16]) - contexts).sum(dim=-1) / energy)
    order = torch.cat(distances).argsort()
    shares = {kind: torch.cat(parts)[order] for kind, parts in moved.items()}
    return {
        "left": {kind: share.item() for kind, share in left.items()},
        "near": {kind: share[:10].mean().item() for kind, share in shares.items()},
        "others": {kind: share[10:].mean().item() for kind, share in shares.items()},
    }
