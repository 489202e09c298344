"""products.py against torch's own products: values, gradients, and everything that is left to them."""

import products
import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(products.ONEDNN is None, reason="this torch has no oneDNN")
@pytest.mark.parametrize("shape", [(7, 5), (2, 77, 48), (3, 2, 4, 16)])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients_are_those_of_torch(shape, biased, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(9, shape[-1], requires_grad=True)
    bias = torch.randn(9, requires_grad=True) if biased else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    expected = F.linear(x, weight, bias)
    monkeypatch.setattr(F, "linear", None)  # what follows is oneDNN's own work
    found = products.product(x, weight, bias)
    assert close(found, expected)
    outside = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(y, inputs, outside) for y in (found, expected)), strict=True)
    assert all(close(a, b) for a, b in pairs)


def test_views_are_multiplied_as_they_stand():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 11).T, torch.randn(6, 4).T
    assert close(products.product(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_to_torch(dtype):
    x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    assert torch.equal(products.product(x, weight), F.linear(x, weight))


def test_autocast_is_obeyed():
    with torch.autocast("cpu", torch.bfloat16):
        assert products.product(torch.randn(3, 5), torch.randn(2, 5)).dtype == torch.bfloat16


def test_nothing_and_a_single_row_are_multiplied_too():
    weight = torch.randn(2, 5)
    assert products.product(torch.randn(0, 5), weight).shape == (0, 2)
    x = torch.randn(5)
    assert torch.equal(products.product(x, weight), F.linear(x, weight))


def test_shapes_that_do_not_fit_are_an_error_of_torch():
    with pytest.raises(RuntimeError, match="shape"):
        products.product(torch.randn(3, 4), torch.randn(2, 5))


def test_without_onednn_everything_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", None)
    x, weight = torch.randn(3, 5), torch.randn(2, 5)
    assert torch.equal(products.product(x, weight), F.linear(x, weight))


def test_a_layer_has_the_parameters_and_values_of_torch():
    ours, theirs = products.Linear(5, 3), nn.Linear(5, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5)
    assert close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_the_definition(dtype, monkeypatch):
    """Off by no more than rounding the right answer to the precision asked for, and 1e-6."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8).to(dtype) for n in (600, 70, 70))
    scores = q.double() @ k.double().mT / 8**0.5
    expected = torch.softmax(scores, dim=-1) @ v.double()
    monkeypatch.setattr(products, "LONG", 1)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # what follows is our own work
    found = products.attention(q, k, v)
    assert found.dtype == dtype
    rounding = (expected.to(dtype).double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= rounding + 1e-6


@pytest.mark.parametrize("bias", [torch.zeros(2, dtype=torch.float64), torch.zeros(3)])
def test_a_bias_that_does_not_fit_is_an_error_of_torch(bias):
    with pytest.raises(RuntimeError):
        products.product(torch.randn(3, 5), torch.randn(2, 5), bias)


def test_attention_with_gradients_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "LONG", 1)
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    assert torch.equal(products.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert products.attention(q, k, v).requires_grad
