"""Every closed form is the optimum it claims to be: there the gradient vanishes, and every step away is worse."""

from collections.abc import Callable

import torch
from tiny import normal
from torch import Tensor

from erasers import common, mace, rece, speed
from weights import Model


def assert_minimum(objective: Callable[[Tensor], Tensor], solution: Tensor) -> None:
    """The gradient of an objective vanishes at the solution, and every step away from it is worse."""
    x = solution.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x), x)
    (elsewhere,) = torch.autograd.grad(objective(x + 1), x)
    assert gradient.norm() < 1e-9 * elsewhere.norm()
    for seed in range(5):
        assert objective(solution + 1e-2 * normal(*solution.shape, seed=seed)) > objective(solution)


def test_refit() -> None:
    W, X, Y = normal(5, 8), normal(6, 8, seed=1), normal(6, 5, seed=2)
    V = common.refit(W, Y.T @ X, X.T @ X, 0.3)
    assert_minimum(lambda V: (X @ V.T - Y).square().sum() + 0.3 * (V - W).square().sum(), V)


def test_move() -> None:
    W, C, G, P = normal(5, 8), normal(3, 8, seed=1), normal(3, 8, seed=2), normal(4, 8, seed=3)

    def objective(V: Tensor) -> Tensor:
        erased, kept = C @ V.T - G @ W.T, P @ (V - W).T
        return 2.0 * erased.square().sum() + 0.7 * kept.square().sum() + 0.5 * (V - W).square().sum()

    assert_minimum(objective, common.move({"W": W}, C, G, P.T @ P, 0.5, 2.0, 0.7)["W"])


def test_revive() -> None:
    original = {"a": normal(5, 8), "b": normal(6, 8, seed=1)}
    edited = {"a": normal(5, 8, seed=2), "b": normal(6, 8, seed=3)}
    C = normal(4, 8, seed=4)

    def objective(X: Tensor) -> Tensor:
        errors = [(X @ edited[key].T - C @ W.T).square().sum() for key, W in original.items()]
        return sum(errors) + 0.1 * X.square().sum()

    assert_minimum(objective, rece.revive(original, edited, C, 0.1))


def test_fuse() -> None:
    W, refined, one, other = (normal(5, 8, seed=seed) for seed in range(4))
    E, F, P = (normal(3, 8, seed=seed) for seed in range(4, 7))

    def objective(V: Tensor) -> Tensor:
        fit = (E @ (V - one).T).square().sum() + (F @ (V - other).T).square().sum() + (P @ (V - W).T).square().sum()
        return fit + 0.5 * (V - refined).square().sum()

    seen = [({"W": one}, E.T @ E), ({"W": other}, F.T @ F)]
    assert_minimum(objective, mace.fuse({"W": W}, {"W": refined}, seen, P.T @ P, 0.5)["W"])


def speed_parts() -> tuple[Tensor, ...]:
    """W, C, G, R, C2 in 12 dimensions: 2 tokens to erase, 5 that stay, 3 that must stay exactly."""
    return tuple(normal(n, 12, seed=seed) for seed, n in enumerate((6, 2, 2, 5, 3)))


def test_null_edit() -> None:
    W, C, G, R, C2 = speed_parts()
    V = speed.null_edit(W, G.T @ C / 2, C.T @ C / 2, R, C2, rho=0.2, threshold=1e-9)
    torch.testing.assert_close(R @ V.T, R @ W.T, rtol=0, atol=1e-10)  # blind to what stays
    torch.testing.assert_close(C2 @ V.T, C2 @ W.T, rtol=0, atol=1e-10)
    # An orthonormal basis of all that R and C2 are blind to: Delta = Y B for any Y.
    B = torch.linalg.svd(torch.cat([R, C2]))[2][8:]

    def objective(Y: Tensor) -> Tensor:
        return (C @ (W + Y @ B).T - G @ W.T).square().sum() / 2 + 0.2 * Y.square().sum()

    torch.testing.assert_close((V - W) @ B.T @ B, V - W)
    assert_minimum(objective, (V - W) @ B.T)


def test_null_edit_where_all_must_stay() -> None:
    W, C, G, R, _ = speed_parts()
    torch.testing.assert_close(speed.null_edit(W, G.T @ C, C.T @ C, normal(40, 12, seed=20), R), W)
    # Rows of C2 inside R's span make a singular system.
    V = speed.null_edit(W, G.T @ C, C.T @ C, R, R[:2], threshold=1e-9)
    torch.testing.assert_close(R @ V.T, R @ W.T, rtol=0, atol=1e-9)


def test_copies_of_influential_tokens_mean_what_they_meant() -> None:
    """Noise along the direction that W reads least: in a narrow layer, of those that it reads."""
    kept, edit = normal(10, 8, seed=1), normal(6, 8, seed=2)
    blind = torch.cat([normal(9, 7), torch.zeros(9, 1).double()], dim=1)  # does not read the last coordinate
    for W, shift in ((blind, 0.0), (normal(6, 8), torch.linalg.svdvals(normal(6, 8))[-1].item())):
        R = speed.influential(W, kept, edit, 3, torch.Generator().manual_seed(0))
        chosen = kept[speed.above_mean(kept, edit)]
        assert torch.equal(R[: len(chosen)], chosen)
        assert 0 < len(R) - len(chosen) < 3 * len(chosen)
        moved, size = torch.cdist(R @ W.T, chosen @ W.T).amin(dim=1), torch.cdist(R, chosen).amin(dim=1)
        torch.testing.assert_close(moved, shift * size, rtol=1e-6, atol=1e-6)
    alone = speed.influential(blind, kept[:1], edit, 2, torch.Generator().manual_seed(0))
    assert torch.equal(alone[:1], kept[:1])  # one token is no more than the mean: it stays


def test_centroids_find_clusters() -> None:
    x = torch.cat([normal(10, 2, seed=i) / 100 + offset for i, offset in enumerate((0.0, 5.0, 9.0))])
    centres = speed.centroids(x, 3, torch.Generator().manual_seed(3)).mean(1).sort().values
    torch.testing.assert_close(centres, torch.tensor([0.0, 5.0, 9.0]).double(), rtol=0, atol=0.05)


def test_tokens_of_prompts(exact: Model) -> None:
    prompts = ["cat", "a picture of a heart", "", "cat " * 90]
    with torch.no_grad():
        E = exact.encode(prompts[:3])
    last = [(row == exact.tokenizer.eos).nonzero()[0].item() - 1 for row in exact.tokenizer(prompts[:3])]
    for which, start in (("last", last), ("tail", last), ("words", [1] * 3), ("all", [0] * 3)):
        for i, rows in enumerate(common.tokens(exact, prompts[:3], which)):
            torch.testing.assert_close(rows, E[i, start[i] :][: 1 if which == "last" else 77])
    rows = torch.cat(list(common.tokens(exact, prompts[:3], "tail")))
    torch.testing.assert_close(common.moment(exact, prompts[:3], "tail"), rows.T @ rows)
    assert len(next(common.tokens(exact, ["a dog"], "tail"))) == 77 - len(exact.tokenizer.ids("a dog"))


def test_rece_leaves_less_to_revive_than_uce(exact: Model) -> None:
    original, C = common.projections(exact), exact.encode(["cat"])[0]

    def left(edited: dict[str, Tensor]) -> float:
        """How near the best revival comes to what the target was."""
        X = rece.revive(original, edited, C, 0.1)
        return sum((X @ edited[key].T - C @ W.T).square().sum() for key, W in original.items()).item()

    begun, done = (rece.rece(exact, ["cat"], "an object", ["a dog"], rounds=rounds) for rounds in (0, 3))
    assert left(done) > left(begun)
