"""The denoising U-Net of Stable Diffusion 1.x: it reads the prompt only through keys and values given to it.

Built from the `unet/config.json` of a model in the diffusers layout (`UNet2DConditionModel`); attribute names are
the checkpoint's keys. Cross-attention does not project the prompt itself: `keys_values(context)` does so once per
prompt, and every denoising step takes the result. Erasing a concept is a change of that dictionary (see cpe.py);
this file knows nothing of it.

Shapes: B images, c latent channels of side h x w, N = h w pixels, C channels of a block, T = 77 tokens,
d width of the context, e width of the time embedding.
Source: Rombach et al. 2022 (arXiv 2112.10752). GroupNorm eps: 1e-5 in ResNets and at the end, 1e-6 in transformers.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = dict[str, Tensor]  # {"<path of attn2>.to_k" or "....to_v": [B, T, C]}


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with one pixel of zeros around the image."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Sinusoids [B, width] of integer timesteps [B]: cosines first, then sines (flip_sin_to_cos, shift 0).

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, with the timestep for the position.
    """
    half = width // 2
    # f_i = 10000^(-i / half)
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timestep.device) / half)
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids [B, C] of a timestep -> what all ResNets read of it, [B, e]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a shortcut, [B, inputs, h, w] -> [B, outputs, h, w].

    In between, the timestep is added: `time` [B, e] after its SiLU. The autoencoder has these blocks, too, but knows no
    time: there `time_width` e is 0.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, time_width: int = 0, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = conv3(inputs, outputs)
        if time_width:
            self.time_emb_proj = nn.Linear(time_width, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = conv3(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(time)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention of pixels x [B, N, C] over keys and values [B, T, C], projected already -> [B, N, C].

    `source_width` is the width of what to_k and to_v read: C in self-attention, d in cross-attention.
    """

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, source_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_width, channels, bias=False)
        self.to_v = nn.Linear(source_width, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), keys, values))
        # softmax(q k^T / sqrt(C / heads)) v
        return self.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(-2))


class GEGLU(nn.Module):
    """One half times the exact GELU of the other, [B, N, C] -> [B, N, 4C]. Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU, then a linear layer back, [B, N, C] -> [B, N, C]; `net.1` is the original's dropout and holds nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention (attn1), cross-attention (attn2) with its part of `kv`, feed-forward, [B, N, C] -> [B, N, C]."""

    def __init__(self, channels: int, context_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_width, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.path = ""  # where attn2 lies in the U-Net; set there

    def forward(self, x: Tensor, kv: KeysValues) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, self.attn1.to_k(y), self.attn1.to_v(y))
        # The only place where the prompt enters: K' and V' come from outside.
        x = x + self.attn2(self.norm2(x), kv[f"{self.path}.to_k"], kv[f"{self.path}.to_v"])
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """One transformer block over the pixels of a feature map, [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int, config: dict):
        super().__init__()
        self.norm = nn.GroupNorm(config["norm_num_groups"], channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        # SD 1.x configs call the NUMBER of heads attention_head_dim.
        block = TransformerBlock(channels, config["cross_attention_dim"], heads=config["attention_head_dim"])
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, kv: KeysValues) -> Tensor:
        pixels = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        pixels = self.transformer_blocks[0](pixels, kv)
        return x + self.proj_out(pixels.transpose(1, 2).unflatten(2, x.shape[2:]))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a convolution, [B, C, h, w] -> [B, C, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """ResNets, each followed by a transformer where `attentions` exist: one level of the U.

    `inputs` lists the channels that enter each ResNet; in the upward half they include a skip connection.
    """

    def __init__(self, inputs: list[int], outputs: int, config: dict, cross: bool):
        super().__init__()
        groups, time_width = config["norm_num_groups"], 4 * config["block_out_channels"][0]
        self.resnets = nn.ModuleList(ResnetBlock(c, outputs, groups, time_width) for c in inputs)
        if cross:
            self.attentions = nn.ModuleList(Transformer(outputs, config) for _ in inputs)

    def down(self, x: Tensor, time: Tensor, kv: KeysValues, skips: list[Tensor]) -> Tensor:
        """[B, C, h, w] -> [B, outputs, h, w], or half the side; every result on the way is pushed onto `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, kv)
            skips.append(x)
        for downsample in getattr(self, "downsamplers", ()):
            x = downsample(x)
            skips.append(x)
        return x

    def up(self, x: Tensor, time: Tensor, kv: KeysValues, skips: list[Tensor]) -> Tensor:
        """[B, C, h, w] -> [B, outputs, h, w], or twice the side; every ResNet takes one result off `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, kv)
        for upsample in getattr(self, "upsamplers", ()):
            x = upsample(x)
        return x


class MidBlock(nn.Module):
    """ResNet, transformer, ResNet, at the bottom of the U, [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int, config: dict):
        super().__init__()
        groups, time_width = config["norm_num_groups"], 4 * config["block_out_channels"][0]
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, time_width) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(channels, config)])

    def forward(self, x: Tensor, time: Tensor, kv: KeysValues) -> Tensor:
        x = self.resnets[0](x, time)
        return self.resnets[1](self.attentions[0](x, kv), time)


def down_blocks(config: dict) -> nn.ModuleList:
    """The downward half, from the widest image to the deepest block."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    blocks = nn.ModuleList()
    for level, kind in enumerate(config["down_block_types"]):
        outputs = channels[level]
        inputs = [channels[max(level - 1, 0)]] + [outputs] * (layers - 1)
        blocks.append(Block(inputs, outputs, config, cross=kind == "CrossAttnDownBlock2D"))
        if level < len(channels) - 1:
            blocks[-1].downsamplers = nn.ModuleList([nn.Sequential(OrderedDict(conv=conv3(outputs, outputs, 2)))])
    return blocks


def up_blocks(config: dict) -> nn.ModuleList:
    """The upward half; each level has one ResNet more than its counterpart, for the skip of the resampling."""
    channels, layers = config["block_out_channels"][::-1], config["layers_per_block"]
    blocks = nn.ModuleList()
    for level, kind in enumerate(config["up_block_types"]):
        outputs = channels[level]
        below, above = channels[max(level - 1, 0)], channels[min(level + 1, len(channels) - 1)]
        inputs = [below] + [outputs] * layers
        skips = [outputs] * layers + [above]
        joined = [x + skip for x, skip in zip(inputs, skips, strict=True)]
        blocks.append(Block(joined, outputs, config, cross=kind == "CrossAttnUpBlock2D"))
        if level < len(channels) - 1:
            blocks[-1].upsamplers = nn.ModuleList([Upsample(outputs)])
    return blocks


class UNet(nn.Module):
    """UNet2DConditionModel of SD 1.x, from its config.json: predicts the noise in latents [B, c, h, w]."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        channels = config["block_out_channels"]
        self.conv_in = conv3(config["in_channels"], channels[0])
        self.time_embedding = TimeEmbedding(channels[0], 4 * channels[0])
        self.down_blocks = down_blocks(config)
        self.mid_block = MidBlock(channels[-1], config)
        self.up_blocks = up_blocks(config)
        self.conv_norm_out = nn.GroupNorm(config["norm_num_groups"], channels[0], eps=1e-5)
        self.conv_out = conv3(channels[0], config["out_channels"])
        for path, module in self.named_modules():
            if isinstance(module, TransformerBlock):
                module.path = f"{path}.attn2"

    def cross_attentions(self) -> dict[str, Attention]:
        """The cross-attention layers by path ("down_blocks.0.attentions.0.transformer_blocks.0.attn2")."""
        return {m.path: m.attn2 for m in self.modules() if isinstance(m, TransformerBlock)}

    def keys_values(self, context: Tensor) -> KeysValues:
        """What cross-attention sees of a context E [B, T, d]: K = E W_k^T and V = E W_v^T of every layer.

        They depend on neither the image nor the timestep: compute them once per prompt.
        """
        kv = {}
        for path, layer in self.cross_attentions().items():
            kv[f"{path}.to_k"] = layer.to_k(context)
            kv[f"{path}.to_v"] = layer.to_v(context)
        return kv

    def forward(self, latents: Tensor, timestep: Tensor | int, kv: KeysValues) -> Tensor:
        """Noise in latents [B, c, h, w] at timesteps [B], or one, 0..999; KeyError if `kv` lacks a projection."""
        timestep = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        time = timestep_embedding(timestep, self.conv_in.out_channels).to(latents.dtype)
        # Every ResNet reads F.silu(time): applied once here.
        time = F.silu(self.time_embedding(time))

        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x = block.down(x, time, kv, skips)
        x = self.mid_block(x, time, kv)
        for block in self.up_blocks:
            x = block.up(x, time, kv, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
