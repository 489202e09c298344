"""The authors' algorithms as plain loops, in float64: what tests/erasers/test_published.py compares erasers with.

Written from the papers' formulas and the behaviour of the public code. Nothing here uses `erasers`: prompts are encoded
with model.encode, weights are read with model.cross_attention. All return {key: edited W}.
"""

import torch
from torch import Tensor

KNOWN: dict[tuple[int, str], tuple[Tensor, int]] = {}  # contexts, of models that outlive the tests


def weights_of(model, kinds=("to_k", "to_v")) -> dict[str, Tensor]:
    """The projections, float64."""
    found = model.cross_attention(torch.float64)
    return {key: W.clone() for key, W in found.items() if key.split(".")[-2] in kinds}


def read(model, prompt: str) -> tuple[Tensor, int]:
    """The context [77, d] of a prompt, and the place of its last token before EOS."""
    if (id(model), prompt) not in KNOWN:
        ids = model.tokenizer([prompt])[0].tolist()
        KNOWN[id(model), prompt] = model.encode([prompt])[0].double(), ids.index(model.tokenizer.eos) - 1
    return KNOWN[id(model), prompt]


def solve(W: Tensor, lam: float, terms: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """(lam W + sum s v c^T) (lam I + sum s c c^T)^-1 over terms (s, value v, context c)."""
    V, C = (torch.stack([s**0.5 * term[n] for s, *term in terms]) for n in (0, 1))
    return (lam * W + V.T @ C) @ torch.inverse(lam * torch.eye(W.shape[1], dtype=W.dtype) + C.T @ C)


def uce(model, targets, surrogates, preserved, lam=0.5, s_e=1.0, s_p=1.0) -> dict[str, Tensor]:
    """UCE of 2025: the last token of every prompt."""
    edited = {}
    for key, W in weights_of(model).items():
        terms = []
        for target, surrogate in zip(targets, surrogates, strict=True):
            (E, i), (G, j) = read(model, target), read(model, surrogate)
            terms.append((s_e, W @ G[j], E[i]))
        for prompt in preserved:
            P, i = read(model, prompt)
            terms.append((s_p, W @ P[i], P[i]))
        edited[key] = solve(W, lam, terms)
    return edited


def uce_2023(model, targets, surrogates, preserved, lam=0.5, s_p=1.0) -> dict[str, Tensor]:
    """UCE of 2023: from the last token to the end, paired by position; all tokens of '' and what is preserved."""
    edited = {}
    for key, W in weights_of(model).items():
        terms = []
        for target, surrogate in zip(targets, surrogates, strict=True):
            (E, i), (G, j) = read(model, target), read(model, surrogate)
            for step in range(77 - max(i, j)):
                terms.append((1.0, W @ G[j + step], E[i + step]))
        for prompt in ["", *preserved]:
            for p in read(model, prompt)[0]:
                terms.append((s_p, W @ p, p))
        edited[key] = solve(W, lam, terms)
    return edited


def rece(model, targets, surrogates, preserved, rounds=3, rho=0.1, lam=0.1, s_p=0.1, start=1.0) -> dict[str, Tensor]:
    """RECE on top of UCE of 2023. What stays: '' per target (train.py), or '' and the preserved (train_artists.py)."""
    original, edited = weights_of(model), uce_2023(model, targets, surrogates, preserved, s_p=start)
    stays = ["", *preserved] if preserved else [""] * len(targets)
    d = next(iter(original.values())).shape[1]
    for _ in range(rounds):
        now, then = rho * torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        for key, W in edited.items():
            now, then = now + W.T @ W, then + W.T @ original[key]
        revived = [read(model, target)[0] @ (torch.inverse(now) @ then).T for target in targets]
        nexts = {}
        for key, W in edited.items():
            terms = []
            for E, surrogate in zip(revived, surrogates, strict=True):
                terms += [(1.0, W @ g, c) for c, g in zip(E, read(model, surrogate)[0], strict=True)]
            for prompt in stays:
                terms += [(s_p, W @ p, p) for p in read(model, prompt)[0]]
            nexts[key] = solve(W, lam, terms)
        edited = nexts
    return edited


def alike(old: list[int], new: list[int]) -> tuple[list[int], list[int]]:
    """MACE: places of two rows of ids (BOS to EOS) with the same words before and after, then padding to 77."""
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    i, j = len(old), len(new)
    while i > start and j > start and old[i - 1] == new[j - 1]:
        i, j = i - 1, j - 1
    one, other = list(range(start)) + list(range(i, len(old))), list(range(start)) + list(range(j, len(new)))
    while max(one[-1], other[-1]) < 76:
        one.append(one[-1] + 1)
        other.append(other[-1] + 1)
    return one, other


def mace(model, targets, surrogates, preserved, templates, lam, keep, loras) -> dict[str, Tensor]:
    """MACE's two closed forms around LoRAs (up [d_l, 1], down [1, d]) by target and key."""
    final, ids = {}, model.tokenizer.ids
    row = lambda prompt: [model.tokenizer.bos, *ids(prompt), model.tokenizer.eos]  # noqa: E731
    for key, W in weights_of(model).items():
        stays = [(keep, W @ p, p) for prompt in preserved for p in read(model, prompt)[0]]
        terms = list(stays)
        for target, surrogate in zip(targets, surrogates, strict=True):
            for template in templates:
                old, new = template.replace("{}", target), template.replace("{}", surrogate)
                E, G = read(model, old)[0], read(model, new)[0]
                terms += [(1.0, W @ G[j], E[i]) for i, j in zip(*alike(row(old), row(new)), strict=True)]
        refined, terms = solve(W, lam, terms), list(stays)
        for target in targets:
            up, down = loras[target][key]
            for template in templates:
                for e in read(model, template.replace("{}", target))[0]:
                    terms.append((1.0, (refined + up @ down) @ e, e))
        final[key] = solve(refined, lam, terms)
    return final


def mace_loss(maps: list[Tensor], ids: list[int], name: list[int], eos: int, mask: Tensor) -> Tensor:
    """The sum over layers of Frobenius norms of attention [heads, N, 77], inside the mask, to name, EOS and padding."""
    wanted = set()
    for i, token in enumerate(ids):
        if ids[i : i + len(name)] == name:
            wanted |= set(range(i, i + len(name)))
        if token == eos:
            wanted.add(i)
    loss = 0.0
    for A in maps:
        side, squares = int(A.shape[1] ** 0.5), 0.0
        for pixel in range(side * side):
            y, x = (place * mask.shape[0] // side for place in divmod(pixel, side))  # the nearest pixel of the mask
            if mask[y, x] > 0.5:
                for token in wanted:
                    squares = squares + A[:, pixel, token].square().sum()
        loss = loss + squares**0.5
    return loss


def above_mean(rows: list[Tensor], edit: Tensor) -> list[int]:
    """Which rows an edit moves more than the mean."""
    moved = [(edit @ r).norm().item() for r in rows]
    return [i for i, m in enumerate(moved) if m > sum(moved) / len(moved)]


def speed(
    model, targets, surrogates, preserved, centres: Tensor, order: Tensor, noise, copies=10, rho=1.0, threshold=0.1,
    prefilter=True,
) -> dict[str, Tensor]:  # fmt: skip
    """SPEED; chance is given: `centres` of k-means, the `order` of preserved prompts, noise(n) [n] per copied token."""
    edited, I = {}, torch.eye(centres.shape[1], dtype=torch.float64)
    T, A = 0 * I, 0 * I
    for target, surrogate in zip(targets, surrogates, strict=True):
        (E, i), (G, j) = read(model, target), read(model, surrogate)
        T, A = T + torch.outer(E[i], E[i]) / len(targets), A + torch.outer(G[j], E[i]) / len(targets)
    empty = read(model, "")[0]
    K = torch.cat([empty[:1], centres]).T
    rows = [read(model, prompt)[0][read(model, prompt)[1]] for prompt in preserved] if preserved else list(empty[1:])
    rows = [rows[i] for i in order.tolist()]
    for key, W in weights_of(model, ("to_v",)).items():
        free = W @ (A - T) @ torch.inverse(I + T)
        chosen = [rows[i] for i in above_mean(rows, free)] if prefilter else rows
        v = torch.linalg.svd(W, full_matrices=False)[2][-1]  # the last that W has, of min(d_l, d)
        second, count = 0 * I, 0
        for start in range(0, len(chosen), 128):
            chunk = chosen[start : start + 128]
            steps = noise(copies * len(chunk))
            varied = [chunk[n % len(chunk)] + step * v for n, step in enumerate(steps)]
            X = torch.stack(chunk + [varied[i] for i in above_mean(varied, free)])
            second, count = second + X.T @ X, count + len(X)
        U, S, _ = torch.linalg.svd(second / count)
        P = U[:, threshold > S] @ U[:, threshold > S].T
        M = torch.inverse(T @ P + rho * I)
        Q = I - M @ K @ torch.inverse(K.T @ P @ M @ K) @ K.T @ P
        edited[key] = W + W @ (A - T) @ P @ Q @ M
    return edited
