"""The autoencoder of Stable Diffusion: images to latents an eighth of their side, and back.

Built from the `vae/config.json` of a model in the diffusers layout (`AutoencoderKL`); attribute names are the
checkpoint's keys. Nothing about erasure happens here; read this file last.

Shapes: B images, 3 colour channels in [-1, 1], H x W pixels, c latent channels, h = H/8, w = W/8.
Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import ResnetBlock, Upsample, conv3

EPS = 1e-6  # of every GroupNorm here; torch's default is 1e-5


class Attention(nn.Module):
    """Single-head self-attention: every pixel looks at every other, [B, c, h, w] -> [B, c, h, w]."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)
        # One head, given as a dimension of its own: without it torch falls back to the quadratic-memory kernel.
        q, k, v = (f(y).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](self.attend(q, k, v).squeeze(1))
        return x + y.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """ResNet, attention, ResNet, [B, c, h, w] -> [B, c, h, w]; of both halves, the only block with attention."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, eps=EPS) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Block(nn.Module):
    """`layers` ResNets, then an optional change of resolution (`downsamplers` or `upsamplers`).

    [B, inputs, h, w] -> [B, outputs, h, w], at half or twice the side where there is one.
    """

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int):
        super().__init__()
        widths = [inputs] + [outputs] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, outputs, groups, eps=EPS) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resize in getattr(self, "downsamplers", getattr(self, "upsamplers", ())):
            x = resize(x)
        return x


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> moments [B, 2c, h, w], mean and log-variance, before `quant_conv`."""

    def __init__(self, config: dict):
        super().__init__()
        channels, groups = config["block_out_channels"], config["norm_num_groups"]
        self.conv_in = conv3(config["in_channels"], channels[0])
        widths, layers = pairwise([channels[0], *channels]), config["layers_per_block"]
        self.down_blocks = nn.ModuleList(Block(*width, layers, groups) for width in widths)
        for block, width in zip(self.down_blocks[:-1], channels, strict=False):
            # [B, c, h, w] -> [B, c, h/2, w/2]; the original pads the right and the lower edge only
            halve = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))
            block.downsamplers = nn.ModuleList([nn.Sequential(halve)])
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = conv3(channels[-1], 2 * config["latent_channels"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, c, h, w] after `post_quant_conv` -> images [B, 3, H, W], about [-1, 1]."""

    def __init__(self, config: dict):
        super().__init__()
        channels, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        self.conv_in = conv3(config["latent_channels"], channels[0])
        self.mid_block = MidBlock(channels[0], groups)
        widths, layers = pairwise([channels[0], *channels]), config["layers_per_block"] + 1
        self.up_blocks = nn.ModuleList(Block(*width, layers, groups) for width in widths)
        for block, width in zip(self.up_blocks[:-1], channels, strict=False):
            block.upsamplers = nn.ModuleList([Upsample(width)])
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = conv3(channels[-1], config["out_channels"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL from its config.json. Latents here are unscaled; the U-Net sees them times `scaling_factor`."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.scaling_factor = config.get("scaling_factor", 0.18215)
        latents = config["latent_channels"]
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, c, h, w] of the latents of images [B, 3, H, W] in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, torch.clamp(logvar, -30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1] (not clipped), of unscaled latents [B, c, h, w]."""
        return self.decoder(self.post_quant_conv(latents))
