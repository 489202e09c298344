"""The theorems, in both directions: what is optimal is attained, and nothing else does better."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "theory"))
import theorems as th

cases = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal tensors in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def close(a: float, b: float, rel: float = 1e-7) -> bool:
    return math.isclose(a, b, rel_tol=rel, abs_tol=1e-9)


def feasible(Delta: Tensor, E_t: Tensor, noise: Tensor) -> Tensor:
    """Another edit that does the same to the targets, columns of E_t."""
    Q = torch.linalg.qr(E_t)[0]
    return Delta + noise - noise @ Q @ Q.T


# --- T1 ---


@cases
@given(seeds, st.integers(2, 12), st.integers(1, 6))
def test_floor_is_attained_and_not_undercut(seed, d, m):
    X, e, t, noise = draw(seed, (3 * d, d), (d,), (m,), (m, d))
    S = th.second_moment(X)
    best = th.best_edit(S, e, t)
    assert torch.allclose(best @ e, t)
    assert close(th.damage(best, S), th.floor(S, e, t))
    other = feasible(best, e[:, None], noise)
    assert torch.allclose(other @ e, t)
    # Pythagoras: the excess is the damage of the difference, so Delta* is the only one on the floor (S > 0).
    assert close(th.damage(other, S) - th.floor(S, e, t), th.damage(other - best, S), rel=1e-6)
    assert th.damage(other, S) > th.floor(S, e, t)


@cases
@given(seeds, st.integers(3, 10))
def test_floor_on_a_subspace(seed, d):
    X, t, inside, outside = draw(seed, (d - 1, d), (3,), (d - 1,), (d,))
    S = th.second_moment(X)  # of rank d - 1
    e = inside @ X
    assert th.floor(S, e, t) > 0
    assert close(th.damage(th.best_edit(S, e, t), S), th.floor(S, e, t), rel=1e-5)
    assert th.leverage(S, outside) == math.inf
    assert th.floor(S, outside, t) == 0
    best = th.best_edit(S, outside, t)
    assert torch.allclose(best @ outside, t)
    assert th.damage(best, S) < 1e-12 * best.square().sum() * S.trace()


@cases
@given(seeds, st.floats(0.001, 1000))
def test_soft_floor(seed, lam):
    X, e, t, noise = draw(seed, (30, 8), (8,), (4,), (4, 8))
    S = th.second_moment(X)
    best = th.soft_edit(S, e, t, lam)
    assert close(th.soft_loss(best, S, e, t, lam), th.soft_floor(S, e, t, lam))
    assert th.soft_loss(best + 0.01 * noise, S, e, t, lam) > th.soft_floor(S, e, t, lam)
    Delta = best.clone().requires_grad_()
    loss = (Delta @ e - t).square().sum() + lam * ((Delta @ S) * Delta).sum()
    assert torch.autograd.grad(loss, Delta)[0].norm() < 1e-8 * (1 + lam) * t.norm() * e.norm()
    assert close(th.soft_edit(S, e, t, 1e-12).sub(th.best_edit(S, e, t)).norm().item(), 0)


@cases
@given(seeds, st.floats(0, 2))
def test_frontier_bounds_edits_that_erase_only_partly(seed, share):
    X, e, t, Delta = draw(seed, (30, 8), (8,), (4,), (4, 8))
    S = th.second_moment(X)
    error = (Delta @ e - t).norm().item()
    assert th.damage(Delta, S) >= th.frontier(S, e, t, error)
    best = max(1 - share, 0) * th.best_edit(S, e, t)
    assert close(th.damage(best, S), th.frontier(S, e, t, share * t.norm().item()))
    # The floor itself bounds only edits that erase: doing nothing lies under it.
    assert th.damage(0 * Delta, S) < th.floor(S, e, t)


@cases
@given(seeds, st.integers(1, 5))
def test_several_targets(seed, c):
    X, E_t, T, noise = draw(seed, (40, 9), (9, c), (4, c), (4, 9))
    S = th.second_moment(X)
    best = th.best_edit_many(S, E_t, T)
    assert torch.allclose(best @ E_t, T)
    assert close(th.damage(best, S), th.floor_many(S, E_t, T))
    other = feasible(best, E_t, noise)
    assert torch.allclose(other @ E_t, T)
    assert th.damage(other, S) > th.floor_many(S, E_t, T)
    assert th.floor_many(S, E_t, T) >= th.floor(S, E_t[:, 0], T[:, 0]) * (1 - 1e-9)  # more to do, no less damage
    if c == 1:
        assert close(th.floor_many(S, E_t, T), th.floor(S, E_t[:, 0], T[:, 0]))


@cases
@given(seeds, st.integers(1, 12), st.floats(0.01, 100))
def test_several_targets_erased_only_partly(seed, c, lam):
    X, E_t, T, Delta = draw(seed, (40, 9), (9, c), (4, c), (4, 9))  # c > d too: then not all can be erased
    S = th.second_moment(X)

    def error(Delta):
        return ((Delta @ E_t - T).square().sum() / c).item()

    best = th.context_ridge(E_t.T, T.T, X, lam * c / len(X)).T
    lowest = th.soft_floor_many(S, E_t, T, torch.tensor([lam], dtype=S.dtype)).item()
    assert close(error(best) + lam * th.damage(best, S), lowest)
    assert error(best + 0.01 * Delta) + lam * th.damage(best + 0.01 * Delta, S) > lowest
    for edit in (Delta, 0 * Delta, best, best + 0.01 * Delta):
        assert th.damage(edit, S) >= th.frontier_many(S, E_t, T, error(edit)) * (1 - 1e-9)
    assert close(th.frontier_many(S, E_t, T, error(best)), th.damage(best, S), rel=0.01)  # attained, up to the grid
    if c == 1:
        e, t = E_t[:, 0], T[:, 0]
        assert close(th.frontier(S, e, t, error(best) ** 0.5), th.damage(best, S))


def test_floor_by_monte_carlo():
    X, e, t = draw(0, (4000, 6), (6,), (3,))
    S = th.second_moment(X)
    noises = draw(1, *[(3, 6)] * 200)
    edits = [feasible(th.best_edit(S, e, t), e[:, None], scale * n) for scale in (1e-3, 1) for n in noises]
    measured = torch.stack([(X @ Delta.T).square().sum(dim=1).mean() for Delta in edits])
    assert measured.min() >= th.floor(S, e, t)
    assert measured.min() <= 1.001 * th.floor(S, e, t)


# --- T2 ---


@cases
@given(seeds, st.integers(1, 15))
def test_null_space_edit_spares_the_list_only(seed, n):
    d = 16
    X, e, t, fresh = draw(seed, (n, d), (d,), (4,), (200, d))
    Delta = th.listed_edit(X, e, t)
    assert torch.allclose(Delta @ e, t)
    assert (X @ Delta.T).norm() < 1e-6 * Delta.norm() * X.norm()
    S = torch.eye(d, dtype=torch.float64)
    assert th.damage(Delta, S) >= th.floor(S, e, t) * (1 - 1e-9)
    assert (fresh @ Delta.T).norm() > 0
    # It has the least norm of all edits that spare the list.
    constraints = torch.cat([X, e[None]])
    least = torch.linalg.lstsq(constraints, torch.cat([0 * X[:, :4], t[None]]), driver="gelsd").solution.T
    assert n < 4 or torch.allclose(Delta, least, rtol=1e-5, atol=1e-7)


def test_listing_is_enough_when_the_tokens_fill_a_subspace():
    basis, codes, e, t = draw(3, (4, 16), (100, 4), (16,), (5,))
    E = codes @ basis
    Delta = th.listed_edit(E[:4], e, t)  # 4 listed, 96 never seen
    assert (E @ Delta.T).abs().max() < 1e-8


@cases
@given(seeds, st.floats(0.05, 2))
def test_spread_bounds_every_edit(seed, sigma):
    d = 8
    modes, e, t, noise = draw(seed, (3, d), (d,), (3,), (3, d))
    S = th.second_moment(modes) + sigma**2 * torch.eye(d, dtype=torch.float64)
    bound = th.spread_bound(sigma, e, t)
    best = th.best_edit(S, e, t)
    for Delta in (best, feasible(best, e[:, None], noise)):
        assert th.damage(Delta, S) >= bound * (1 - 1e-9)
    alone = sigma**2 * torch.eye(d, dtype=torch.float64)
    assert close(th.floor(alone, e, t), bound)  # equality when the modes are at zero


# --- T3 ---


@cases
@given(seeds, st.floats(0.1, 30))
def test_gate_bounds_and_floor(seed, kappa):
    X, e, t = draw(seed, (20, 30), (30,), (5,))
    v = e - th.hull_point(e, X)
    b, m = th.halfway(v, e, X)
    assert m > 0  # 20 points in 30 dimensions
    bound = th.gate_error_bound(kappa, m, t)
    assert bound <= t.norm().item() * math.exp(-kappa * m) * (1 + 1e-9)
    slack = 1e-9 + 1e-9 * bound
    assert (th.gate(e[None], v, b, kappa, t)[0] - t).norm() <= bound + slack
    assert th.gate(X, v, b, kappa, t).norm(dim=1).max() <= bound + slack


@cases
@given(seeds)
def test_gate_goes_under_the_floor(seed):
    X, e, t = draw(seed, (200, 30), (30,), (5,))
    e = 10 * e  # outside the hull, inside the span
    S = th.second_moment(X)
    v = e - th.hull_point(e, X)
    b, m = th.halfway(v, e, X)
    assert m > 0
    kappa = th.sufficient_kappa(th.leverage(S, e), m)
    gated = th.gate(X, v, b, kappa, t).square().sum(dim=1).mean().item()
    assert gated < th.floor(S, e, t)


@cases
@given(seeds)
def test_no_certificate_inside_the_hull(seed):
    X, weights, directions = draw(seed, (12, 5), (12,), (200, 5))
    e = torch.softmax(weights, dim=0) @ X
    assert all(th.halfway(v, e, X)[1] <= 1e-12 for v in directions)
    # Frank-Wolfe gets there: |p - e|^2 <= 4 diameter^2 / (steps + 2).
    assert (e - th.hull_point(e, X, steps=200)).norm() <= 2 * torch.cdist(X, X).max() / 202**0.5


def test_outside_the_hull_without_a_margin():
    """e_t is outside the hull of infinitely many tokens, but not of its closure: the margin tends to zero."""
    e = torch.zeros(2, dtype=torch.float64)
    margins = []
    for n in (10, 100, 1000):
        others = torch.stack([torch.tensor([1 / i, 0.0], dtype=torch.float64) for i in range(1, n + 1)])
        v = e - th.hull_point(e, others)
        margins.append(th.halfway(v / v.norm(), e, others)[1])
    assert margins == pytest.approx([0.05, 0.005, 0.0005])


@cases
@given(seeds, st.integers(3, 40))
def test_layer_norm_makes_extreme_points(seed, n):
    d = 10
    X, weight, bias = draw(seed, (n, d), (d,), (d,))
    weight = weight.sign() * (weight.abs() + 0.1)
    E = torch.nn.functional.layer_norm(X, (d,), weight, bias, eps=0.0)
    for i in range(n):
        others = torch.cat([E[:i], E[i + 1 :]])
        assert th.halfway(th.ellipsoid_normal(E[i], weight, bias), E[i], others)[1] > 0


def test_layer_norm_needs_a_small_eps():
    """With eps > 0 tokens lie inside the ellipsoid: one of little variance can be the mean of two others."""
    X = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    E = torch.nn.functional.layer_norm(X, (3,), eps=1e-5)
    assert torch.allclose(E[2], E[:2].mean(dim=0))


# --- T4 ---


@cases
@given(seeds, st.sampled_from([1, 2, 4]), st.floats(0.01, 10))
def test_attention_bounds_hold(seed, heads, size):
    q, E, W_k, W_v, W_o, dK, dV = draw(seed, (5, 8), (7, 6), (8, 6), (8, 6), (9, 8), (7, 8), (7, 8))
    K, V, dK, dV = E @ W_k.T, E @ W_v.T, size * dK, size * dV
    out, P = th.attention(q, K, V, W_o, heads)
    by_value = th.attention(q, K, V + dV, W_o, heads)[0] - out
    assert by_value.norm(dim=1).max() <= th.value_bound(dV, W_o)
    by_key = th.attention(q, K + dK, V, W_o, heads)[0] - out
    assert by_key.norm(dim=1).max() <= th.key_bound(q, dK, E, W_v, W_o, heads)
    assert th.softmax_slope(P) <= min(0.5, P.max().item()) + 1e-12


@cases
@given(seeds)
def test_one_over_tokens_holds_where_attention_is_even(seed):
    T = 77
    q, E, W_v, W_o, dK = draw(seed, (5, 8), (T, 6), (8, 6), (9, 8), (T, 8))
    K, V, dK = torch.zeros(T, 8, dtype=torch.float64), E @ W_v.T, 1e-4 * dK
    out, P = th.attention(q, K, V, W_o)
    assert close(th.softmax_slope(P), 1 / T)
    moved = th.attention(q, K + dK, V, W_o)[0] - out
    assert moved.norm(dim=1).max() <= 1.01 * th.key_bound(q, dK, E, W_v, W_o, slope=1 / T)


def test_one_over_tokens_fails_where_attention_is_sharp():
    """Half of the attention on each of two tokens: outputs move up to 77 / 2 times further."""
    T = 77
    one, E = torch.ones(1, 1, dtype=torch.float64), torch.zeros(T, 1, dtype=torch.float64)
    K, dK = torch.full((T, 1), -50.0, dtype=torch.float64), torch.zeros(T, 1, dtype=torch.float64)
    K[:2], E[0], E[1], dK[0], dK[1] = 0, 1, -1, 1e-3, -1e-3
    out, P = th.attention(one, K, E, one)
    assert th.softmax_slope(P) == pytest.approx(0.5)
    moved = (th.attention(one, K + dK, E, one)[0] - out).norm().item()
    assert moved <= th.key_bound(one, dK, E, one, one)
    ratio = moved / th.key_bound(one, dK, E, one, one, slope=1 / T)
    assert ratio == pytest.approx(T / 2, rel=0.01)


def test_product_norm_fails_with_several_heads():
    """Two heads that cancel: W_o W_v = 0, so a_l = 0, and yet the output moves."""
    W_v = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    W_o = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert th.norm2(W_o @ W_v) == 0
    E = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    q, K = torch.ones(1, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    dK = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)  # only the first head's key moves
    out, moved = (th.attention(q, k, E @ W_v.T, W_o, heads=2)[0] for k in (K, K + dK))
    assert (moved - out).norm() > 0.1
    assert (moved - out).norm() <= th.key_bound(q, dK, E, W_v, W_o, heads=2)


@cases
@given(seeds, st.sampled_from([1, 2, 4]), st.floats(0.01, 10))
def test_sharper_attention_bounds_hold(seed, heads, size):
    q, E, W_k, W_v, W_o, dK, dV = draw(seed, (5, 8), (7, 6), (8, 6), (8, 6), (9, 8), (7, 8), (7, 8))
    K, V, dK, dV = E @ W_k.T, E @ W_v.T, size * dK, size * dV
    out, _ = th.attention(q, K, V, W_o, heads)
    by_value = th.attention(q, K, V + dV, W_o, heads)[0] - out
    assert by_value.norm(dim=1).max() <= th.value_bound_by_token(dV, W_o, heads) <= th.value_bound(dV, W_o) + 1e-9
    by_key = th.attention(q, K + dK, V, W_o, heads)[0] - out
    assert by_key.norm(dim=1).max() <= th.key_bound_by_head(q, dK, E, W_v, W_o, heads)
    if heads == 1:
        assert th.key_bound_by_head(q, dK, E, W_v, W_o) <= th.key_bound(q, dK, E, W_v, W_o)


def test_value_bound_is_attained():
    """All attention on the one token that moves, along W_o's leading singular vector."""
    q, W_o = (torch.eye(3, dtype=torch.float64) for _ in range(2))
    W_o[0, 0] = 5.0
    K, V, dV = (torch.zeros(4, 3, dtype=torch.float64) for _ in range(3))
    K[2, 0], dV[2, 0] = 1e3, 0.7
    moved = th.attention(q[:1], K, V + dV, W_o)[0] - th.attention(q[:1], K, V, W_o)[0]
    assert close(moved.norm().item(), th.value_bound(dV, W_o))
    assert close(moved.norm().item(), th.value_bound_by_token(dV, W_o))


@cases
@given(seeds, st.sampled_from([1, 2, 4]))
def test_a_shift_of_all_keys_does_nothing(seed, heads):
    q, E, W_v, W_o, shift = draw(seed, (5, 8), (7, 6), (8, 6), (9, 8), (8,))
    K, V = E @ W_v.T, E @ W_v.T
    out, moved = (th.attention(q, k, V, W_o, heads)[0] for k in (K, K + shift))
    assert torch.allclose(out, moved)
    assert th.key_bound_by_head(q, shift.expand(7, 8), E, W_v, W_o, heads) < 1e-9
    assert th.key_bound(q, shift.expand(7, 8), E, W_v, W_o, heads) > 1e-3  # the plain form does not know


# --- T5 ---


@cases
@given(seeds, st.integers(1, 6), st.integers(1, 9))
def test_separated_modes_are_found(seed, count, size):
    noise, centres = draw(seed, (count, size, 5), (count, 5))
    centres = 100 * centres / torch.cdist(centres, centres).add(torch.eye(count) * 1e9).min().clamp_max(1e8)
    X = (centres[:, None] + 1.9 * noise / noise.norm(dim=-1, keepdim=True)).flatten(0, 1)  # of diameter < 4
    labels = th.modes(X, 4.0)
    truth = torch.arange(count).repeat_interleave(size)
    assert torch.equal(labels[:, None] == labels, truth[:, None] == truth)
    heights = th.merge_heights(X)
    for h in (0.5, 2.0, 4.0, 1e4):
        assert len(th.modes(X, h).unique()) == 1 + (heights >= h).sum()


def test_modes_that_touch_are_one():
    X = torch.arange(10, dtype=torch.float64)[:, None]
    assert len(th.modes(X, 1.01).unique()) == 1
    assert len(th.modes(X, 0.99).unique()) == 10
    assert th.merge_heights(X).tolist() == [1.0] * 9


# --- The adversary ---


@cases
@given(seeds)
def test_a_weight_edit_can_be_undone_by_one_shift(seed):
    W, A, e = draw(seed, (20, 6), (6, 6), (6,))
    edited = W @ (torch.eye(6, dtype=torch.float64) + A)
    delta = th.reviving_shift(edited, W, e)
    assert torch.allclose(edited @ (e + delta), W @ e)


def test_a_singular_edit_cannot_be_undone():
    e = torch.tensor([1.0, 0.0], dtype=torch.float64)
    W, edited = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    delta = th.reviving_shift(edited, W, e)
    assert (edited @ (e + delta) - W @ e).norm() == pytest.approx(1)


@cases
@given(seeds, st.floats(0.1, 20), st.floats(0, 2))
def test_attacks_on_a_plane(seed, kappa, radius):
    X, e, t, W, directions = draw(seed, (20, 30), (30,), (5,), (5, 30), (50, 30))
    v = e - th.hull_point(e, X)
    b, m = th.halfway(v, e, X)
    slope = th.norm2(W)

    def left(delta: Tensor) -> Tensor:
        """|W delta + R(e + delta)| of every row."""
        return (delta @ W.T + th.gate(e + delta, v, b, kappa, t)).norm(dim=1)

    bound = th.attack_floor(kappa, m, v, t, slope, radius)
    worst = torch.cat([directions, -v[None], torch.linalg.svd(W)[2][:1]])
    worst = radius * worst / worst.norm(dim=1, keepdim=True)
    assert left(worst).min() >= bound - 1e-9
    assert close(th.attack_floor(kappa, m, v, t, slope, 0.0), left(0 * worst).max().item())

    closing = th.closing_shift(v, m, beyond=m)
    assert close(closing.norm().item(), 2 * m / v.norm().item())
    assert close((v @ (e + closing) - b).item(), -m)
    assert th.gate((e + closing)[None], v, b, kappa, t).norm() <= th.gate_error_bound(kappa, m, t) * (1 + 1e-6) + 1e-12
    # No shorter shift gets there.
    assert (directions @ v / directions.norm(dim=1)).abs().max() * closing.norm() <= 2 * m + 1e-9
