"""ESD-x: Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023, arXiv 2303.07345), cross-attention.

All weights of attn2 are trained: under the target's name the U-Net learns to predict the noise of its opposite.
Their code writes the goal as eps_c - n (eps_c - eps_0) with negative_guidance n = 2. That is ours,
eps_0 - negative (eps_c - eps_0), with negative = n - 1 = 1. Steps, rate and guidance are theirs, too; bfloat16, the
sampler (PNDM, ours is DDIM) and pictures of 1024 pixels are not taken over.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from erasers.common import Weights, filled, finished, precision, predict, trajectories
from weights import Model


def esd_steps(
    model: Model, targets: list[str], weights: Weights, seed: int, *, steps: int = 200, lr: float = 5e-5,
    guidance: float = 3.0, negative: float = 1.0, images: int = 16, sampling_steps: int = 50,
    templates: Sequence[str] = ("{}",),
) -> Iterator[float]:  # fmt: skip
    """Train `weights` in place, one loss per step. x_t is of `images` trajectories per target, drawn beforehand.

    `templates` are ours: each trajectory has one of them instead of the bare name.
    """
    generator, times = torch.Generator().manual_seed(seed), model.schedule.timesteps(sampling_steps)
    chosen = [templates[j * len(templates) // images] for j in range(images)]
    prompts = [filled(chosen, [name]) for name in targets]
    paths = [trajectories(model, some, sampling_steps, guidance, generator) for some in prompts]
    optimizer = torch.optim.Adam([W.requires_grad_() for W in weights.values()], lr=lr)
    for _ in range(steps):
        i, j, s = (torch.randint(n, (1,), generator=generator).item() for n in (len(targets), images, sampling_steps))
        x, t, both = paths[i][s, j : j + 1], times[s], model.encode([prompts[i][j], ""])
        with torch.no_grad():
            eps_c, eps_0 = predict(model.unet, {}, torch.cat([x, x]), t, both).chunk(2)
            # eps_0 - negative (eps_c - eps_0): as far from the concept as guidance goes towards it
            goal = eps_0 - negative * (eps_c - eps_0)
        loss = F.mse_loss(predict(model.unet, weights, x, t, both[:1]), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def esd(
    model: Model, targets: list[str], surrogate: Any = None, preserved: Any = None, seed: int = 0, **training: Any
) -> Weights:
    """`training`: of `esd_steps`. There is no surrogate and no preservation: both are ignored."""
    named = model.unet.state_dict().items()
    weights = {key: W.detach().to(precision(model), copy=True) for key, W in named if ".attn2." in key}
    list(esd_steps(model, targets, weights, seed, **training))
    return finished(model, weights)
