"""The theorems of the gate that is solved for (T6, T7): both regressions, what rank costs, one correction for all."""

import sys
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_theory import cases, close, draw, seeds
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "theory"))
import theorems as th

# --- T6 ---


@cases
@given(seeds, st.integers(1, 4), st.floats(0.001, 100))
def test_one_ridge_serves_every_layer(seed, k, lam):
    z, x, z_a, *layers = draw(seed, (20, k), (20, 7), (30, k), (3, 7), (11, 7), (7, 7))
    U_c = th.context_ridge(z, x, z_a, lam)
    for W, a in zip(layers, (0.01, 1.0, 50.0), strict=True):
        # Independently: least squares of the stacked system, with this layer's weight.
        A = a**0.5 * torch.cat([z, lam**0.5 * z_a])
        B = a**0.5 * torch.cat([x @ W.T, torch.zeros(len(z_a), len(W), dtype=torch.float64)])
        best = torch.linalg.lstsq(A, B).solution
        assert torch.allclose(U_c @ W.T, best, rtol=1e-6, atol=1e-9)
        U = (U_c @ W.T).requires_grad_()
        loss = th.layer_loss(U, W, z, x, z_a, lam)
        gradient = torch.autograd.grad(loss, U)[0]
        assert gradient.norm() < 1e-8 * (1 + lam) * z.square().sum() * x.norm() * W.norm()
        (noise,) = draw(seed + 1, U.shape)
        assert th.layer_loss(U.detach() + 0.01 * noise, W, z, x, z_a, lam) > loss.detach()


# --- T7 ---


def logistic_problem(seed: int) -> tuple:
    """Tokens, their weights, w and rho of a small logistic regression."""
    z, s, z_a, c = draw(seed, (20, 6), (20,), (50, 6), (50,))
    return z, s.abs(), z_a, c.abs(), 3.0, 0.01


@cases
@given(seeds)
def test_the_scaler_has_one_optimum(seed):
    problem = logistic_problem(seed)
    start, other = draw(seed + 1, (7,), (7,))
    best = th.logistic_optimum(torch.zeros(7, dtype=torch.float64), *problem)
    assert torch.allclose(best, th.logistic_optimum(start, *problem), atol=1e-5)  # from wherever one starts
    gradient, hessian = th.logistic_newton(start, *problem)
    y = start.clone().requires_grad_()
    assert torch.allclose(gradient, torch.autograd.grad(th.logistic_loss(y, *problem), y)[0])
    assert torch.allclose(hessian, torch.autograd.functional.hessian(lambda y: th.logistic_loss(y, *problem), start))
    assert torch.linalg.eigvalsh(hessian)[0] > 0
    # it lies above every tangent
    assert th.logistic_loss(other, *problem) >= th.logistic_loss(start, *problem) + gradient @ (other - start) - 1e-9
    assert th.logistic_loss(other, *problem) > th.logistic_loss(best, *problem)


def ridge_problem(seed: int) -> tuple[Tensor, ...]:
    """h, x, h_a of a small ridge regression, and three layers."""
    return draw(seed, (20, 6), (20, 6), (30, 6), (3, 6), (9, 6), (6, 6))


@cases
@given(seeds, st.floats(0.01, 10))
def test_the_correction_is_a_ridge_regression_whatever_the_metric(seed, lam):
    h, x, h_a, *layers = ridge_problem(seed)
    G, C = h.T @ h + lam * h_a.T @ h_a, h.T @ x
    best, (noise,) = torch.linalg.solve(G, C), draw(seed + 1, (6, 6))
    for W in layers:
        M, other = W.T @ W, best + noise
        direct = th.layer_loss(other @ W.T, W, h, x, h_a, lam)
        assert close(direct.item(), ((x @ W.T).square().sum() - th.ridge_gain(other, G, C, M)).item())
        # what another correction loses is its distance to the best one
        lost = th.ridge_gain(best, G, C, M) - th.ridge_gain(other, G, C, M)
        assert close(lost.item(), ((noise.T @ G @ noise) * M).sum().item())
        assert lost > 0


@cases
@given(seeds, st.integers(1, 6))
def test_the_price_of_rank(seed, k):
    h, x, h_a, *layers = ridge_problem(seed)
    G, C, W = h.T @ h + h_a.T @ h_a, h.T @ x, torch.cat(layers)
    gains = th.rank_gains(G, C, W)
    values, Q = torch.linalg.eigh(G)
    half = (Q / values.sqrt()) @ Q.T
    V = torch.linalg.svd(half @ C @ W.T)[2][:k]
    B = torch.linalg.solve(G, C @ W.T) @ V.T @ V @ torch.linalg.pinv(W.T)  # projected upon the first k directions
    assert close(th.ridge_gain(B, G, C, W.T @ W).item(), gains[:k].sum().item())
    D, U = draw(seed + 1, (6, k), (k, 6))
    for other in (D @ U, B + 0.1 * B @ torch.linalg.qr(U.T)[0] @ torch.linalg.qr(U.T)[0].T):  # of rank k, too
        assert th.ridge_gain(other, G, C, W.T @ W) <= gains[:k].sum() + 1e-9
    # layers that each have their own k directions gain no less, and the same where k is no limit
    alone = sum(th.rank_gains(G, C, W)[:k].sum() for W in layers)
    assert alone >= gains[:k].sum() - 1e-9
    assert close(sum(th.rank_gains(G, C, W).sum().item() for W in layers), gains.sum().item())


@cases
@given(seeds)
def test_mixtures_of_anchors_weigh_no_more_than_anchors(seed):
    h, c = draw(seed, (7, 4), (7,))
    c = c.abs() / c.abs().sum()
    # every pair, and Simpson's rule, which is exact for the square of a mixture
    mixed = torch.zeros(4, 4, dtype=h.dtype)
    for alpha, weight in ((0, 1 / 6), (0.5, 4 / 6), (1, 1 / 6)):
        m = alpha * h[:, None] + (1 - alpha) * h
        mixed += weight * torch.einsum("i,j,ijd,ije->de", c, c, m, m)
    found = th.mixture_moment(h, c)
    assert torch.allclose(found, mixed)
    assert torch.linalg.eigvalsh((c[:, None] * h).T @ h - found)[0] > -1e-12
