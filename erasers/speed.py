"""SPEED: Scalable, Precise, and Efficient Concept Erasure (Li et al., ICLR 2026, arXiv 2503.07392).

Values only, changed in the null space of what must stay: preserved tokens that matter in the layer, copies of them with
noise that it hardly reads, BOS, and three directions of the empty prompt. The defaults are the authors' for a few
concepts; for ten celebrities and more they take rho = 0.05 and prefilter = False.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasers.common import Weights, finished, one_each, pairs, projections, tokens
from weights import Model


def centroids(x: Tensor, count: int, generator: torch.Generator, rounds: int = 100) -> Tensor:
    """k-means: `count` centres [count, d] of the rows of x [n, d], by Lloyd's algorithm from random rows."""
    centres = x[torch.randperm(len(x), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(dim=1)
        groups = [x[nearest == i] for i in range(len(centres))]
        # A centre that no row is nearest to stays where it is.
        centres = torch.stack([g.mean(0) if len(g) else c for g, c in zip(groups, centres, strict=True)])
    return centres


def above_mean(x: Tensor, edit: Tensor) -> Tensor:
    """Which tokens of x [n, d] an edit [d_l, d] moves more than the mean; all, if none is above it: bool [n]."""
    influence = (x @ edit.T).norm(dim=1)
    above = influence > influence.mean()
    return above if above.any() else torch.ones_like(above)


def influential(
    W: Tensor, kept: Tensor, edit: Tensor, copies: int, generator: torch.Generator, prefilter: bool = True
) -> Tensor:
    """The kept tokens [n, d] that an unconstrained `edit` [d_l, d] would move most, and noisy copies of them.

    Noise goes along the input direction that W reads least, so that a copy means the same. That is the last right
    singular vector: in a layer narrower than the context the least of those that W reads at all. Sections 4.2, 4.3.
    """
    kept = kept[above_mean(kept, edit)] if prefilter else kept
    weakest = torch.linalg.svd(W, full_matrices=False)[2][-1:]  # v_min^T [1, d]
    rows = []
    for chunk in kept.split(128):  # copies are compared with the mean of those in their chunk
        # n v v^T of a Gaussian n is a number times v^T
        noise = torch.randn(copies * len(chunk), 1, generator=generator, dtype=kept.dtype) @ weakest
        noisy = chunk.repeat(copies, 1) + noise
        rows += [chunk, noisy[above_mean(noisy, edit)]]
    return torch.cat(rows)


def null_edit(
    W: Tensor, A: Tensor, T: Tensor, R: Tensor, C2: Tensor, rho: float = 1.0, threshold: float = 0.1
) -> Tensor:
    """W' [d_l, d] = W + Delta with Delta blind to the kept tokens R [n, d] and to the rows of C2 [m, d].

    T = mean c c^T, A = mean g c^T [d, d]. Delta = Delta P, P the projector on the eigenvectors of mean r r^T with
    eigenvalue < threshold; among those with Delta c2 = 0 it minimises mean |(W + Delta) c - W g|^2 + rho |Delta|^2.
    """
    values, vectors = torch.linalg.eigh(R.T @ R / len(R))
    U = vectors[:, values < threshold]  # P = U U^T
    # N = P (T P + rho I)^-1 = U (U^T T U + rho I)^-1 U^T
    N = U @ torch.linalg.solve(U.T @ T @ U + rho * torch.eye(U.shape[1], dtype=U.dtype), U.T)
    S = C2 @ N @ C2.T
    # Delta = W (A - T) P Q M,   P Q M = N - N C2^T (C2 N C2^T)^-1 C2 N;  pinv: a row of C2 may lie in R's span
    return W + W @ (A - T) @ (N - N @ C2.T @ torch.linalg.pinv(S, hermitian=True) @ C2 @ N)


def speed(
    model: Model, targets: list[str], surrogate: str | Sequence[str], preserved: list[str], seed: int = 0, *,
    rho: float = 1.0, threshold: float = 0.1, augment: int = 10, prefilter: bool = True,
) -> Weights:  # fmt: skip
    """The last token of every target is read as the surrogate's; of "nudity" alone, all tokens but BOS, as in theirs.

    `augment` copies of the `preserved` tokens that pass the filter; with 0 all of them stay, and no copies. Without
    preserved prompts the tokens of '' stay. Chance: the copies' noise, and where k-means starts.
    """
    generator, surrogates = torch.Generator().manual_seed(seed), one_each(surrogate, targets)
    C, G = pairs(model, targets, surrogates, "words" if targets == ["nudity"] else "last")
    T, A = C.T @ C / len(targets), G.T @ C / len(targets)
    empty = next(tokens(model, [""], "all"))
    C2 = torch.cat([empty[:1], centroids(empty[1:], 3, generator)])
    kept = torch.cat([*tokens(model, preserved, "last")]) if preserved else empty[1:]
    kept = kept[torch.randperm(len(kept), generator=generator)]
    edited = {}
    for key, W in projections(model, ["to_v"]).items():
        # the edit that nothing holds back: W (A - T) (T + I)^-1
        edit = torch.linalg.solve(T + torch.eye(len(T), dtype=T.dtype), W @ (A - T), left=False)
        R = influential(W, kept, edit, augment, generator, prefilter) if augment else kept
        edited[key] = null_edit(W, A, T, R, C2, rho, threshold)
    return finished(model, edited)
