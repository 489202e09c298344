"""From noise to images: the noise schedule, classifier-free guidance, two samplers, and pictures of prompts.

    images = draw(model, ["a cat"], seeds=[0], gates=gates)      # [1, 3, H, W] in [-1, 1]

`sample` and `denoise_context` yield the latents after every step: the caller owns the progress bar, and may stop.
The U-Net is any function `(latents, timestep, kv) -> noise`, so a seeded dummy serves in tests. An eraser is any
function `(context, kv) -> kv`, such as cpe.ResAG: it is applied once, before the first step; samplers know of none.

Shapes: B images, c latent channels of side h x w. Timesteps count 0..999; a_t is alphas_cumprod[t].
Sources: the forward process, Ho et al. 2020 (arXiv 2006.11239); DDIM, Song et al. 2021 (arXiv 2010.02502);
DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095); guidance, Ho & Salimans 2022 (arXiv 2207.12598).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from weights import Model

KeysValues = dict[str, Tensor]
UNetFunction = Callable[[Tensor, int, KeysValues], Tensor]
Predict = Callable[[Tensor, int], Tensor]  # latents at a timestep -> the noise in them
Gates = Callable[[Tensor, KeysValues], KeysValues]


class Schedule:
    """The noise schedule of a model, from its `scheduler/scheduler_config.json` (SD 1.4's values by default)."""

    def __init__(self, config: dict | None = None):
        self.config = config = config or {}
        self.length = config.get("num_train_timesteps", 1000)
        self.offset = config.get("steps_offset", 1)
        self.ends_clean = config.get("set_alpha_to_one", False)  # whether DDIM's last step ends at a = 1, not at a_0
        start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
        # beta_t is linear in its square root; a_t = prod_{s <= t} (1 - beta_s)
        betas = torch.linspace(start**0.5, end**0.5, self.length, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps from noise to image, spaced as diffusers' "leading": 981, 961, ..., 1 for 50 steps."""
        stride = self.length // steps
        return [i * stride + self.offset for i in reversed(range(steps))]

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The forward process: clean latents [B, c, h, w] and noise mixed at timesteps [B]. Ho et al. 2020, eq. 4."""
        a = self.alphas_cumprod.to(latents.device)[timestep].view(-1, 1, 1, 1).to(latents.dtype)
        # x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps
        return a.sqrt() * latents + (1 - a).sqrt() * noise


def guided(unet: UNetFunction, latents: Tensor, timestep: int, kv: KeysValues, guidance_scale: float) -> Tensor:
    """Noise [B, c, h, w] under classifier-free guidance.

    `kv` has 2B rows, the first B of the empty (or negative) prompt; with guidance_scale w = 1 it plays no role: B rows.
    """
    if guidance_scale == 1:
        return unet(latents, timestep, kv)
    uncond, cond = unet(torch.cat([latents, latents]), timestep, kv).chunk(2)  # each latent under two prompts
    # eps = eps_0 + w (eps_c - eps_0)
    return uncond + guidance_scale * (cond - uncond)


def ddim(schedule: Schedule, predict: Predict, latents: Tensor, steps: int) -> Iterator[Tensor]:
    """Deterministic DDIM (eta = 0): yields x_s [B, c, h, w] after each step t -> s. Song et al. 2021, eq. 12."""
    alphas = schedule.alphas_cumprod.to(latents.device)
    last = torch.ones_like(alphas[0]) if schedule.ends_clean else alphas[0]
    stride = schedule.length // steps
    for t in schedule.timesteps(steps):
        a_t, a_s = alphas[t], alphas[t - stride] if t >= stride else last
        noise = predict(latents, t)
        # x_0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t);   x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) eps
        clean = (latents - (1 - a_t).sqrt() * noise) / a_t.sqrt()
        latents = a_s.sqrt() * clean + (1 - a_s).sqrt() * noise
        yield latents


def dpm_solver(schedule: Schedule, predict: Predict, latents: Tensor, steps: int) -> Iterator[Tensor]:
    """DPM-Solver++(2M), midpoint: yields x_s [B, c, h, w] after each step t -> s. Lu et al. 2022, algorithm 2."""
    last = schedule.length - 1
    timesteps = [round(last * i / steps) for i in range(steps, 0, -1)]
    alphas = schedule.alphas_cumprod.double()
    previous_clean, previous_lambda = None, None
    for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
        a_t, sigma_t = alphas[t].sqrt().item(), (1 - alphas[t]).sqrt().item()
        # x_0 = (x_t - sigma_t eps) / alpha_t;   lambda_t = log(alpha_t / sigma_t)
        clean = (latents - sigma_t * predict(latents, t)) / a_t
        lambda_t = math.log(a_t / sigma_t)
        if s is None:  # to sigma = 0, where the update is x_0 itself
            latents = clean
        else:
            a_s, sigma_s = alphas[s].sqrt().item(), (1 - alphas[s]).sqrt().item()
            h = math.log(a_s / sigma_s) - lambda_t
            direction = clean
            if previous_clean is not None:
                # D = x_0 + (x_0 - x_0') / (2 r),   r = (lambda_t - lambda_t') / h
                direction = clean + (clean - previous_clean) * (h / (2 * (lambda_t - previous_lambda)))
            # x_s = (sigma_s / sigma_t) x_t - alpha_s (e^{-h} - 1) D
            latents = sigma_s / sigma_t * latents - a_s * math.expm1(-h) * direction
        previous_clean, previous_lambda = clean, lambda_t
        yield latents


METHODS = {"ddim": ddim, "dpm": dpm_solver}


def check_steps(schedule: Schedule, steps: int, method: str) -> None:
    """ValueError for an unknown method, no steps, or more than half of the timesteps that there are.

    DDIM's strides are whole: 600 of 1000 steps would begin at timestep 600, where pure noise does not belong.
    """
    if method not in METHODS:
        raise ValueError(f"unknown sampler {method!r}: choose one of {', '.join(METHODS)}")
    most = schedule.length // 2
    if not 1 <= steps <= most:
        raise ValueError(f"a picture takes between 1 and {most} steps, not {steps}")


def sample(
    unet: UNetFunction, schedule: Schedule, latents: Tensor, kv: KeysValues,
    steps: int = 50, guidance_scale: float = 7.5, method: str = "ddim",
) -> Iterator[Tensor]:  # fmt: skip
    """Denoise noise [B, c, h, w]: yields the latents after each step. `kv`: see `guided`; errors: `check_steps`."""
    check_steps(schedule, steps, method)
    return METHODS[method](schedule, lambda x, t: guided(unet, x, t, kv, guidance_scale), latents, steps)


# --- Pictures of prompts -----------------------------------------------------------------------------------------


def latent_size(model: "Model", size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width (h, w) of the latents of images of `size` (H, W) pixels; by default the U-Net's own square.

    ValueError unless every level of the autoencoder, and then of the U-Net, can halve both.
    """
    if size is None:
        return model.unet.config["sample_size"], model.unet.config["sample_size"]
    factor, levels = (2 ** (len(blocks) - 1) for blocks in (model.vae.decoder.up_blocks, model.unet.up_blocks))
    if any(side <= 0 or side % (factor * levels) for side in size):
        raise ValueError(f"width and height are multiples of {factor * levels} here, not {size[1]} and {size[0]}")
    return size[0] // factor, size[1] // factor


@torch.no_grad()
def denoise_context(
    model: "Model", context: Tensor, seeds: Sequence[int], gates: Gates | None = None,
    steps: int = 50, guidance_scale: float = 7.5, method: str = "ddim",
    negative: str = "", size: tuple[int, int] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Latents [B, c, h, w] after every step, for a context [B, T, d] and a seed per image; with `gates`, erased.

    Noise is drawn on the CPU, so that a seed gives one picture on every device. To rounding, an image depends on its
    own context and seed alone, whatever else is in the batch. `negative` is what guidance leads away from. ValueError,
    at the first step, unless there are as many seeds as contexts, or as for `latent_size` and `check_steps`.
    """
    if len(seeds) != len(context):
        raise ValueError(f"every image needs a prompt and a seed, not {len(context)} prompts and {len(seeds)} seeds")
    unet = model.unet
    shape = unet.config["in_channels"], *latent_size(model, size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(model.device, model.dtype)
    if guidance_scale != 1:
        context = torch.cat([model.encode([negative]).expand_as(context), context])
    kv = unet.keys_values(context)
    kv = gates(context, kv) if gates is not None else kv
    yield from sample(unet, model.schedule, latents, kv, steps, guidance_scale, method)


@torch.no_grad()
def decode(model: "Model", latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of latents [B, c, h, w] as the U-Net knows them (scaled)."""
    return model.vae.decode(latents / model.vae.scaling_factor).clamp(-1, 1)


def draw(
    model: "Model", prompts: Sequence[str] | Tensor, seeds: Sequence[int], gates: Gates | None = None,
    steps: int = 50, guidance_scale: float = 7.5, method: str = "ddim",
    batch: int | None = None, progress: Callable[[Iterator, int], Any] | None = None,
    negative: str = "", size: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Images [B, 3, H, W] in [-1, 1] of prompts, or of contexts [B, T, d], `batch` at a time.

    Arguments as for `denoise_context`; `progress(steps, total)` wraps the iterator over all steps of all batches.
    ValueError if the images are not finite numbers, or as there.
    """
    batch = batch or (16 if model.unet.config["sample_size"] <= 16 else 1)
    starts = range(0, len(prompts), batch)
    context = prompts if isinstance(prompts, Tensor) else model.encode(prompts)

    def all_steps() -> Iterator[tuple[int, Tensor]]:
        for i in starts:
            part = context[i : i + batch], seeds[i : i + batch]
            for latents in denoise_context(model, *part, gates, steps, guidance_scale, method, negative, size):
                yield i, latents

    latest = dict(progress(all_steps(), len(starts) * steps) if progress else all_steps())
    images = torch.cat([decode(model, latest[i]) for i in starts])
    if not images.isfinite().all():
        raise ValueError("the model's images are not finite numbers")
    return images
