"""What token_space.py promises beyond the losses of test_cpe.py: shares reached, one gate for the context, norms."""

import pytest
import torch
from test_cpe import LAYERS, T, attention, d, data, literal_error, random_gates
from tiny import normal
from torch import Tensor

import cpe
import token_space
from token_space import ContextGate, TokenSpace, context_gate, spectral_norm

E, X = normal(4, T, d, seed=30), normal(4, T, d, seed=31)


def random_context_gate(seed: int, r: int, k: int, scale: float) -> ContextGate:
    """A context gate of one concept with random parameters."""
    context = ContextGate(d, r, k).double()
    with torch.no_grad():
        for i, p in enumerate(context.parameters()):
            p.copy_(0.4 * normal(*p.shape, seed=seed + i))
    context.inner.scale.fill_(scale)
    return context


# --- Errors ------------------------------------------------------------------------------------------------------


def test_the_energy_of_a_shift_is_the_weighted_sum_over_projections():
    a, L = LAYERS.a, len(LAYERS.W)
    expected = sum(a[l] / L * (X @ W.T).square().mean(dim=-1) for l, W in LAYERS.W.items())
    torch.testing.assert_close(TokenSpace(LAYERS).energy(X), expected, rtol=1e-12, atol=0)


def test_the_error_of_merged_gates_is_the_papers():
    """Of several concepts at once, where the losses of training know but one."""
    gates = cpe.merge([random_gates(3, 2, seed=1), random_gates(5, 1, seed=2), random_gates(2, 4, seed=3)])
    expected = cpe.Losses(LAYERS, data(), 0.0).error(gates, E, X)
    fast = token_space.Losses(LAYERS, data(), 0.0)
    assert fast.error(gates, E, X).item() == pytest.approx(expected.item(), rel=1e-12)
    assert TokenSpace(LAYERS).error(gates, E, X).mean().item() == pytest.approx(expected.item(), rel=1e-12)
    i, none = torch.tensor([0]), torch.zeros_like(E)
    assert fast.erasing(gates, i, E, None)["anchor"].item() == pytest.approx(fast.error(gates, E, none).item())


def test_gates_of_another_model_have_no_error_here():
    other = cpe.ResAG({"elsewhere.to_k": 4}, d).double()
    with pytest.raises(KeyError):
        TokenSpace(LAYERS).error(other, E, X)


def test_reached_is_the_share_of_a_shift_that_gates_achieve():
    gates, space = random_gates(3, 2, alpha=0.5), TokenSpace(LAYERS)
    shares = space.reached(gates, E, X)
    for b in range(4):
        asked = sum(LAYERS.a[l] * (X[b] @ W.T).square().mean() for l, W in LAYERS.W.items()) / len(LAYERS.W)
        error = literal_error(gates, E[b : b + 1], X[b : b + 1], alpha=0.5)
        assert shares[b].item() == pytest.approx(1 - (error / asked).item(), rel=1e-10)


def test_reached_is_1_for_all_and_0_for_nothing_done_or_asked():
    context, space = random_context_gate(1, 3, 2, 1.0), TokenSpace(LAYERS)
    gates = context.expand(LAYERS)
    torch.testing.assert_close(space.reached(gates, E, context(E).detach() - E), torch.ones(4).double())
    assert (space.reached(gates, E, torch.zeros_like(E)) == 0).all()
    untrained = cpe.ResAG(LAYERS.widths, d).double()
    assert (space.reached(untrained, E, X) == 0).all()


# --- One gate for the context ------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 3])
def test_a_context_gate_is_the_resag_that_it_expands_to(N):
    context = ContextGate(d, 3, 2, N).double()
    with torch.no_grad():
        for i, p in enumerate(context.parameters()):
            p.copy_(normal(*p.shape, seed=i))
    context.inner.scale.copy_(torch.arange(1, N + 1) / 2)
    residuals = context.expand(LAYERS).residuals(E)
    for l, W in LAYERS.W.items():
        torch.testing.assert_close(residuals[l], (context(E) - E) @ W.T, rtol=1e-10, atol=1e-10)


def test_an_untrained_context_gate_changes_nothing_and_answers_in_the_dtype_it_is_asked_in():
    assert torch.equal(ContextGate(d)(E.float()), E.float())
    assert ContextGate(d)(E.half()).dtype == torch.float16


MERGED = [(1, 3, 1, 0.5), (11, 5, 4, 2.5)]  # seed, r, k, scale


@pytest.mark.parametrize("parts", [MERGED[:1], MERGED[1:], MERGED], ids=["k=1", "k=4", "merged"])
def test_context_gate_is_the_inverse_of_expand(parts):
    contexts = [random_context_gate(*part) for part in parts]
    gates = cpe.merge([context.expand(LAYERS) for context in contexts])
    found = context_gate(TokenSpace(LAYERS), gates)
    again = found.expand(LAYERS).residuals(E)
    for l, R in gates.residuals(E).items():
        torch.testing.assert_close(again[l], R, rtol=1e-8, atol=1e-8)
    if len(contexts) == 1:
        torch.testing.assert_close(found(E), contexts[0](E), rtol=1e-8, atol=1e-8)


def test_of_merged_gates_every_concept_has_its_own_rank_and_scale():
    parts = [random_gates(3, 1, seed=1, alpha=1.0), random_gates(3, 4, seed=2, alpha=8.0)]
    space = TokenSpace(LAYERS)
    g = torch.stack([part.gate(E)[0][0] for part in parts])
    alone = [context_gate(space, part)(E) for part in parts]
    expected = torch.where(g[0] > g[1], alone[0], alone[1])
    merged = context_gate(space, cpe.merge(parts))
    torch.testing.assert_close(merged(E), expected, rtol=1e-8, atol=1e-8)
    expanded = merged.expand(LAYERS).residuals(E)
    for l, W in LAYERS.W.items():
        torch.testing.assert_close(expanded[l], (expected - E) @ W.T, rtol=1e-8, atol=1e-8)


def test_context_gate_comes_nearest_to_gates_that_no_context_gate_can_be():
    """The gradient of the error with respect to the change of the context is 0 there."""
    gates, space = random_gates(3, 2), TokenSpace(LAYERS)
    change = (context_gate(space, gates)(E) - E).detach().requires_grad_()

    def slope(change: Tensor) -> Tensor:
        return torch.autograd.grad(space.error(gates, E, change).sum(), change)[0]

    assert space.error(gates, E, change).min() > 0
    assert slope(change).norm() < 1e-10 * slope(torch.zeros_like(change).requires_grad_()).norm()


def test_where_layers_see_few_directions_the_others_are_left_alone():
    narrow = cpe.Layers({l: W for l, W in LAYERS.W.items() if "mid_block" in l and l.endswith("to_k")}, LAYERS.a)
    (W,) = narrow.W.values()
    gates = random_gates(3, 2, widths=narrow.widths)
    change = context_gate(TokenSpace(narrow), gates)(E) - E
    torch.testing.assert_close(change @ W.T, *gates.residuals(E).values(), rtol=1e-8, atol=1e-8)
    unseen = torch.linalg.svd(W).Vh[len(W) :]
    assert (change @ unseen.T).abs().max() < 1e-8 * change.abs().max()


# --- Spectral norms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (40, 40), (200, 50)])
def test_spectral_norm(shape):
    for seed in range(10):
        matrix = normal(*shape, seed=seed)
        assert spectral_norm(matrix) == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-6)
    assert spectral_norm(torch.zeros(shape)) == 0


def test_spectral_norm_of_a_degenerate_pair_and_of_single_precision():
    assert spectral_norm(torch.diag(torch.tensor([3.0, -3.0, 1.0]))) == pytest.approx(3, rel=1e-6)
    matrix = normal(320, 320, dtype=torch.float32)
    assert spectral_norm(matrix) == pytest.approx(torch.linalg.matrix_norm(matrix.double(), 2).item(), rel=1e-6)


def test_layers_may_be_weighed_with_it():
    exact, fast = cpe.Layers.of(attention()).a, cpe.Layers.of(attention(), spectral_norm).a
    assert fast == pytest.approx(exact, rel=1e-5)
