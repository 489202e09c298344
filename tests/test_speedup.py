"""benchmarks/speedup.py against plain torch: the results are the same, and what is not faster is left to torch."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F

from benchmarks import speedup
from clip import TextEncoder
from unet import UNet
from vae import VAE

NEEDS_ONEDNN = pytest.mark.skipif(speedup.ONEDNN is None, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(speedup, "SMALL", 0)
    monkeypatch.setattr(speedup, "LONG", 1)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@NEEDS_ONEDNN
@pytest.mark.parametrize("shape", [(7, 5), (2, 77, 48), (3, 2, 4, 16)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_those_of_torch(shape, biased, monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape), torch.randn(9, shape[-1]), torch.randn(9) if biased else None
    expected = F.linear(x, weight, bias)
    monkeypatch.setattr(F, "linear", None)  # what follows is oneDNN's own work
    assert close(speedup.linear(x, weight, bias), expected)


def test_what_is_trained_is_left_to_torch():
    x, weight = torch.randn(3, 5), torch.randn(2, 5, requires_grad=True)
    expected = torch.autograd.grad(F.linear(x, weight).sum(), weight)[0]
    assert torch.equal(torch.autograd.grad(speedup.linear(x, weight).sum(), weight)[0], expected)


def test_views_are_multiplied_as_they_stand():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 11).T, torch.randn(6, 4).T
    assert close(speedup.linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_and_autocast_are_left_to_torch(dtype):
    x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    assert torch.equal(speedup.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert speedup.linear(torch.randn(3, 5), torch.randn(2, 5)).dtype == torch.bfloat16


def test_nothing_and_a_single_row_are_multiplied_too():
    weight = torch.randn(2, 5)
    assert speedup.linear(torch.randn(0, 5), weight).shape == (0, 2)
    x = torch.randn(5)
    assert torch.equal(speedup.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("bias", [None, torch.zeros(2, dtype=torch.float64), torch.zeros(3)])
def test_what_does_not_fit_is_an_error_of_torch(bias):
    with pytest.raises(RuntimeError):
        speedup.linear(torch.randn(3, 5 if bias is not None else 4), torch.randn(2, 5), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NEEDS_ONEDNN
def test_attention_is_that_of_the_definition(dtype, monkeypatch):
    """Off by no more than rounding the right answer to the precision asked for, and 1e-6."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8).to(dtype) for n in (600, 70, 70))
    scores = q.double() @ k.double().mT / 8**0.5
    expected = torch.softmax(scores, dim=-1) @ v.double()
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # what follows is our own work
    found = speedup.attention(q, k, v)
    assert found.dtype == dtype
    rounding = (expected.to(dtype).double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= rounding + 1e-6


def test_attention_with_gradients_is_left_to_torch():
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    assert torch.equal(speedup.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert speedup.attention(q, k, v).requires_grad


@torch.no_grad()
def test_whole_networks_give_the_same_and_keep_their_names():
    text, unet, vae = TextEncoder(tiny.TEXT), UNet(tiny.UNET), VAE(tiny.VAE)
    latents, context = tiny.draw("latents", 2, 4, 8, 8), tiny.draw("context", 2, 9, 32)
    calls = {
        text: lambda network: network(tiny.tokens(60)),
        unet: lambda network: network(latents, 481, network.keys_values(context)),
        vae: lambda network: network.decode(latents),
    }
    for network, call in calls.items():
        fast = speedup.speed_up(copy.deepcopy(tiny.filled(network)))
        assert any(isinstance(module, speedup.Linear) for module in fast.modules())
        assert any(isinstance(module, speedup.Upsample) for module in fast.modules()) == isinstance(network, VAE)
        assert fast.state_dict().keys() == network.state_dict().keys()
        assert tiny.difference(call(fast), call(network)) <= 2e-5


def test_without_onednn_everything_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(speedup, "ONEDNN", None)
    x, weight = torch.randn(3, 5), torch.randn(2, 5)
    assert torch.equal(speedup.linear(x, weight), F.linear(x, weight))
    q = torch.randn(1, 2, 5, 4)
    assert torch.equal(speedup.attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
