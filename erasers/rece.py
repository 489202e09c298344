"""RECE: Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024, arXiv 2407.12383).

UCE leaves embeddings that still mean the target. RECE finds them in closed form, erases them, and repeats. The defaults
are the authors' for explicit words, with ' ' as the surrogate; `erasers.PUBLISHED` has others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasers.common import Goal, Weights, finished, moment, move, one_each, pairs, projections
from weights import Model


def revive(original: Weights, edited: Weights, C: Tensor, rho: float) -> Tensor:
    """The embeddings C' [n, d] that mean to the edited model what C meant to the original one (eq. 9).

    c' = argmin  sum_l |W_l c' - W_l^o c|^2 + rho |c'|^2,   W_l edited, W_l^o original.
    """
    now = sum(W.T @ W for W in edited.values())
    wanted = sum(C @ W.T @ edited[key] for key, W in original.items())
    # c' = (rho I + sum W^T W)^-1 sum W^T W^o c
    return torch.linalg.solve(now + rho * torch.eye(len(now), dtype=now.dtype), wanted.T).T


def rece(
    model: Model, targets: list[str], surrogate: str | Sequence[str], preserved: list[str], seed: int = 0, *,
    rounds: int = 3, rho: float = 0.1, lam: float = 0.1, s_p: float = 0.1, start: tuple[float, float] = (0.5, 1.0),
    which: str = "all", goal: Goal = lambda C, G: G,
) -> Weights:  # fmt: skip
    """UCE's code of 2023, then rounds of finding what revives the targets and erasing that. No chance in it.

    `start`: lam and s_p of the UCE. A round moves all T tokens of each target to the surrogate's, as the model edited
    so far reads them. What stays are all tokens of `preserved` and of ''; without `preserved` the rounds count '' once
    per target, as the authors' train.py does. `which` and `goal`: see beyond.py.
    """
    original, surrogates = projections(model), one_each(surrogate, targets)
    named, empty = moment(model, preserved, which), moment(model, [""], "all")
    C, G = pairs(model, targets, surrogates, "tail")
    edited = move(original, C, goal(C, G), named + empty, start[0], 1.0, start[1])
    C, G = pairs(model, targets, surrogates, "all")
    G, kept = goal(C, G), named + empty * (1 if preserved else len(targets))
    for _ in range(rounds):
        edited = move(edited, revive(original, edited, C, rho), G, kept, lam, 1.0, s_p)
    return finished(model, edited)
