"""Matrix products and attention on a CPU, at the speed of the processor; the same to rounding as what torch has.

    y = product(x, weight, bias)      # F.linear(x, weight, bias)
    layer = Linear(768, 3072)         # nn.Linear(768, 3072): the same parameters, under the same names
    y = attention(q, k, v)            # F.scaled_dot_product_attention(q, k, v)

torch gives float32 products to MKL, which on AMD's Zen 5, where this was measured, runs at half its speed. oneDNN,
which torch carries as well and gives convolutions to, does not: here its products are asked for by name. And torch's
kernel for attention takes longer over many tokens than these products and a softmax do. benchmarks/products.py has
the figures. Whatever nothing is gained by, or is not possible, is left to torch.
"""

from itertools import product as pairs

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# oneDNN's product under torch's own name for it; None where torch was built without.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
SMALL = 2**22  # multiplications of a product up to which torch's own way is as fast


def suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN is the better: float32 on the CPU, not small, and nobody asked for another precision.

    Of a product of x [..., n] with a weight [m, n] and a bias [m].
    """
    parts = [part for part in (x, weight, bias) if part is not None]
    floats = all(part.dtype == torch.float32 and part.device.type == "cpu" for part in parts)
    floats = floats and (bias is None or bias.shape == weight.shape[:1])
    large = x.numel() * weight.shape[0] > SMALL
    return floats and large and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")


def dense(x: Tensor) -> Tensor:
    """A matrix whose rows or columns lie side by side, [..., m, n] as it is; oneDNN is slow with any other."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., n] -> [..., m] for a weight [m, n]; without gradients."""
    return ONEDNN(dense(x), dense(weight), bias, "none", [], "")


class Product(torch.autograd.Function):
    """x W^T + b by oneDNN, and its gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., n], weight [m, n], bias [m] or None -> [..., m]."""
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias, from that of the product [..., m]; None for those that need none."""
        x, weight = ctx.saved_tensors
        rows, needed = gradient.flatten(0, -2), ctx.needs_input_grad
        return (
            onednn(gradient, weight.T) if needed[0] else None,  # g W
            onednn(rows.T, x.flatten(0, -2).T) if needed[1] else None,  # g^T x
            rows.sum(dim=0) if needed[2] else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., n] -> [..., m] for a weight [m, n] and a bias [m]: `F.linear`, with its gradients and errors."""
    if ONEDNN is None or not suits(x, weight, bias) or x.dim() < 2 or x.shape[-1] != weight.shape[-1]:
        return F.linear(x, weight, bias)
    return Product.apply(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, [..., n] -> [..., m], by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b, [..., n] -> [..., m]."""
        return product(input, self.weight, self.bias)


LONG = 2**20  # scores of a head from which on torch's own kernel is the slower
CHUNK = 256  # queries at a time: their scores stay in the cache


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt c) v: queries [B, H, N, c] over keys and values [B, H, T, c] -> [B, H, N, c].

    With gradients, on few tokens, on other devices or in other precisions it is torch's own.
    """
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    known = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)
    known = known and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if trained or not known or ONEDNN is None or q.shape[2] * k.shape[2] < LONG:
        return F.scaled_dot_product_attention(q, k, v)
    # In float32 throughout, so that of bfloat16 nothing but the outcome is rounded.
    y, keys, values = torch.empty_like(q), (k.float() * k.shape[-1] ** -0.5).contiguous(), v.float().mT.contiguous()
    for b, h in pairs(range(q.shape[0]), range(q.shape[1])):
        for i in range(0, q.shape[2], CHUNK):
            scores = product(q[b, h, i : i + CHUNK].float(), keys[b, h])
            y[b, h, i : i + CHUNK] = product(torch.softmax(scores, dim=-1), values[b, h])
    return y
