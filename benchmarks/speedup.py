"""What a CPU does faster than plain torch does it: one opt-in for networks that draw, the same to rounding.

    from benchmarks.speedup import speed_up
    speed_up(model.unet)        # in place; then the network is used, saved and edited as before

torch gives float32 products to MKL, which on AMD's Zen 5 runs at half its speed. oneDNN, which torch carries as well
and gives convolutions to, does not: here its products are asked for by name. torch's attention takes longer there over
many pixels than these products and a softmax do. And doubling an image before a convolution is 9/4 of the work that is
needed. On an Intel Xeon a step becomes slower by a sixth: measure first (benchmarks/). Everything works without this.
"""

from itertools import product as pairs

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unet
import vae

# oneDNN's product under torch's own name for it; None where torch was built without.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
SMALL = 2**22  # multiplications of a product up to which torch's own way is as fast
LONG = 2**20  # scores of a head from which on torch's own kernel is the slower
CHUNK = 256  # queries at a time: their scores stay in the cache


def speed_up(network: nn.Module) -> nn.Module:
    """The network itself, its layers computed by what is below: parameters, names and results stay as they are."""
    faster: dict[type, type] = {nn.Linear: Linear}
    if isinstance(network, vae.VAE):  # the U-Net doubles small images of many channels, where it is slower
        faster[unet.Upsample] = Upsample
    for module in network.modules():
        module.__class__ = faster.get(type(module), type(module))
        if isinstance(module, (unet.Attention, vae.Attention)):
            module.attend = attention
    return network


def left_to_torch(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether something stands against oneDNN: gradients, autocast, another precision or device."""
    given = [x for x in tensors if x is not None]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    known = all(x.dtype in dtypes and x.device.type == "cpu" for x in given)
    ready = ONEDNN is not None and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    return trained or not known or not ready


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, [..., n] -> [..., m], by oneDNN where that is faster: large, float32, on the CPU, not trained."""
    fits = x.dim() > 1 and x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    if not fits or x.numel() * weight.shape[0] <= SMALL or left_to_torch(x, weight, bias):
        return F.linear(x, weight, bias)
    # It is slow with scattered rows.
    x, weight = (y if y.is_contiguous() or y.mT.is_contiguous() else y.contiguous() for y in (x, weight))
    return ONEDNN(x, weight, bias, "none", [], "")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt c) v: queries [B, H, N, c] over keys and values [B, H, T, c] -> [B, H, N, c].

    On few tokens, or where `left_to_torch`, it is torch's own.
    """
    if q.shape[2] * k.shape[2] < LONG or left_to_torch(q, k, v, dtypes=(torch.float32, torch.bfloat16)):
        return F.scaled_dot_product_attention(q, k, v)
    # In float32 throughout, so that of bfloat16 nothing but the outcome is rounded.
    y, keys, values = torch.empty_like(q), (k.float() * k.shape[-1] ** -0.5).contiguous(), v.float().mT.contiguous()
    for b, h, i in pairs(range(q.shape[0]), range(q.shape[1]), range(0, q.shape[2], CHUNK)):
        scores = linear(q[b, h, i : i + CHUNK].float(), keys[b, h])
        y[b, h, i : i + CHUNK] = linear(torch.softmax(scores, dim=-1), values[b, h])
    return y


class Linear(nn.Linear):
    """`nn.Linear` by `linear`, [..., n] -> [..., m]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Upsample(unet.Upsample):
    """The same as one transposed convolution with 4/9 of the multiplications, [B, c, h, w] -> [B, c, 2h, 2w].

    In a doubled image every pixel stands four times, so the nine taps of a convolution meet four pixels only: their
    weights, summed, do the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Row i of S: which rows of the 4x4 kernel contain row i of the 3x3 one, W' = S^T W S.
        S = x.new_tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
        weight = (self.conv.weight.transpose(0, 1).flatten(2) @ torch.kron(S, S)).unflatten(-1, (4, 4))
        return F.conv_transpose2d(x, weight, self.conv.bias, stride=2, padding=1)
