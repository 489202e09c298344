"""MACE: Mass Concept Erasure in Diffusion Models (Lu et al., CVPR 2024, arXiv 2403.06135).

Refine: the words around a target are read as if the surrogate stood there. Unsee: one rank-1 LoRA per target lowers the
attention that its tokens get where it is in pictures. Fuse: all LoRAs into one weight, in closed form.

The numbers are the authors', which differ by what is erased (published.json); the defaults are those for a bird. Three
things are ours: masks come from the model's own attention (`own_masks`), not from Grounded SAM; latents are trained on
as they were sampled, not after a JPEG file and the VAE; the thirty templates are in our own words.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import erasers.common as common
from erasers.common import Goal, Weights, filled, finished, moment, projections, refit, tokens, trajectories
from unet import Attention, UNet
from weights import Model

Change = dict[str, tuple[Tensor, Tensor]]  # a LoRA of rank 1, by checkpoint key: up [d_l, 1], down [1, d]
TEMPLATES = (
    *(f"{look} {medium} of {{}}" for look in ("a", "a good", "a bright", "a big", "a strange")
      for medium in ("photo", "picture", "painting", "drawing", "film still")),
    "{} in a photo", "{} on a poster", "{} at night", "{} seen from afar", "{} in a magazine",
)  # fmt: skip


def shared(old: Sequence[int], new: Sequence[int], length: int) -> tuple[list[int], list[int]]:
    """Places in two prompts (ids from BOS to EOS) that read alike: common prefix, suffix, and padding to `length`."""
    shorter, padding = min(len(old), len(new)), length - max(len(old), len(new))
    prefix = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    suffix = next((i for i in range(shorter - prefix) if old[-1 - i] != new[-1 - i]), shorter - prefix)
    return tuple([*range(prefix), *range(len(ids) - suffix, len(ids) + padding)] for ids in (old, new))


def around(model: Model, templates: Sequence[str], target: str, surrogate: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens around a concept in each template: with the target [n, d], and those words with the surrogate [n, d]."""
    prompts, words = [filled(templates, [name]) for name in (target, surrogate)], model.tokenizer
    for old, new, E, G in zip(*prompts, *(tokens(model, part, "all") for part in prompts), strict=True):
        i, j = shared(*([words.bos, *words.ids(prompt)[: len(E) - 2], words.eos] for prompt in (old, new)), len(E))
        yield E[i], G[j]


def attention_maps(unet: UNet, weights: Weights, latents: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
    """Attention probabilities [B, heads, N, T] of every cross-attention layer in one pass; differentiable."""
    maps = []

    def record(layer: Attention, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (layer.to_q(inputs[0]), inputs[1]))
        # softmax(q k^T / sqrt(C / heads))
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))

    with ExitStack() as hooks:
        for layer in unet.cross_attentions().values():
            hooks.callback(layer.register_forward_pre_hook(record).remove)
        common.predict(unet, weights, latents, timestep, context)
    return maps


def positions(model: Model, prompt: str, target: str, padding: bool = True) -> Tensor:
    """Which tokens of a prompt are the target's, bool [T]; with `padding`, EOS and all that follows it are, too."""
    ids, name = model.tokenizer([prompt])[0], torch.tensor(model.tokenizer.ids(target))
    found = (ids == model.tokenizer.eos) & padding
    for i in range(len(ids) - len(name) + 1):
        found[i : i + len(name)] |= torch.equal(ids[i : i + len(name)], name)
    return found


@torch.no_grad()
def own_masks(
    model: Model, images: Tensor, prompt: str, target: str, times: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Where the target is in images [B, c, h, w] of a prompt: 0 or 1, [B, h, w].

    It is where the model's own attention to its tokens, summed over layers, heads and `times`, is above half its range.
    """
    context, found = model.encode([prompt]), positions(model, prompt, target, padding=False)
    side, total = images.shape[-1], 0
    for t in times:
        noise = torch.randn(images.shape, generator=generator).to(images)
        x = model.schedule.add_noise(images, noise, torch.full((len(images),), t))
        for A in attention_maps(model.unet, {}, x, t, context.expand(len(images), -1, -1)):
            square = A[..., found].mean(dim=(1, 3)).unflatten(-1, (math.isqrt(A.shape[2]), -1))
            total = total + F.interpolate(square.unsqueeze(1), (side, side), mode="bilinear").squeeze(1)
    low, high = total.amin(dim=(1, 2), keepdim=True), total.amax(dim=(1, 2), keepdim=True)
    return (total > (low + high) / 2).to(images)


def attention_loss(maps: Sequence[Tensor], found: Tensor, mask: Tensor) -> Tensor:
    """sum_l |A_l|: Frobenius norms of maps [1, heads, N, T] over tokens `found` [T] and the pixels of mask [h, w]."""
    loss = 0
    for A in maps:
        side = math.isqrt(A.shape[2])
        inside = F.interpolate(mask[None, None], (side, side), mode="nearest").flatten() > 0.5
        loss = loss + A[:, :, inside][..., found].norm()
    return loss


def new_change(weights: Weights, generator: torch.Generator) -> Change:
    """Rank-1 changes that start at zero: up [d_l, 1] of zeros, down [1, d] normal."""
    down = {key: torch.randn(1, W.shape[1], generator=generator).to(W) for key, W in weights.items()}
    return {key: (W.new_zeros(len(W), 1).requires_grad_(), down[key].requires_grad_()) for key, W in weights.items()}


def unseeing_steps(
    model: Model, target: str, templates: Sequence[str], refined: Weights, change: Change,
    generator: torch.Generator, *, steps: int = 50, lr: float = 1e-5, focal: bool = True, masked: bool = True,
    images: int = 8, sampling_steps: int = 30, photo: str = "a photo of the {}",
) -> Iterator[float]:  # fmt: skip
    """Train one concept's rank-1 changes in place on top of `refined`; one loss per step.

    Every step takes the next of `images` pictures of the prompt `photo`, a random template, and a random timestep: if
    `focal`, from about 200 to 400, where concepts take shape. Without `masked` all pixels count.
    """
    drawn, learned = filled([photo], [target])[0], [W for pair in change.values() for W in pair]
    finals = trajectories(model, [drawn] * images, sampling_steps, 7.5, generator, "dpm")[-1]
    everywhere, noisy = torch.ones_like(finals[:, 0]), (200, 300, 400)
    masks = own_masks(model, finals, drawn, target, noisy, generator) if masked else everywhere
    optimizer, order, t = torch.optim.AdamW(learned, lr=lr), [], torch.arange(model.schedule.length)
    weights = torch.sigmoid(0.05 * (t - 200)) - torch.sigmoid(0.05 * (t - 400)) if focal else torch.ones(len(t))
    for _ in range(steps):
        order = order or torch.randperm(images, generator=generator).tolist()
        i, j = order.pop(), torch.randint(len(templates), (1,), generator=generator).item()
        prompt, t = filled(templates[j : j + 1], [target])[0], torch.multinomial(weights, 1, generator=generator)
        noise = torch.randn(finals[:1].shape, generator=generator).to(finals)
        x = model.schedule.add_noise(finals[i : i + 1], noise, t)
        # W' + up down
        edited = {key: refined[key] + up @ down for key, (up, down) in change.items()}
        maps = attention_maps(model.unet, edited, x, t, model.encode([prompt]))
        loss = attention_loss(maps, positions(model, prompt, target), masks[i])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        yield loss.item()


def fuse(W: Weights, refined: Weights, seen: Iterable[tuple[Weights, Tensor]], kept: Tensor, lam: float) -> Weights:
    """One weight that does on each target's prompts what its own LoRA does: `seen` has (W' + LoRA_i, sum e e^T) each.

    argmin over V of  sum_i sum_e |V e - (W' + LoRA_i) e|^2 + sum_p |V p - W p|^2 + lam |V - W'|^2,  kept = sum p p^T.
    """
    gram, cross = kept.clone(), {key: V @ kept for key, V in W.items()}
    for tuned, moments in seen:
        gram += moments
        cross = {key: Y + tuned[key] @ moments for key, Y in cross.items()}
    return {key: refit(V, cross[key], gram, lam) for key, V in refined.items()}


def mace(
    model: Model, targets: list[str], surrogate: str | Sequence[str], preserved: list[str], seed: int = 0, *,
    lam: float = 10.0, keep: float = 0.0, captions: Sequence[str] = (), caption_weight: float = 0.0,
    templates: Sequence[str] = TEMPLATES, goal: Goal = lambda C, G: G, **training: Any,
) -> Weights:  # fmt: skip
    """Refine, unsee, fuse. All tokens of `preserved` weigh `keep`, those of `captions` (COCO's) `caption_weight`.

    `training`: of `unseeing_steps`; `goal`: see beyond.py. ValueError if lam is 0 and nothing stays: the equations have
    no one solution then.
    """
    if not (lam or (keep and preserved) or (caption_weight and captions)):
        raise ValueError("with lam = 0 MACE needs prompts that stay: `preserved` with `keep`, or captions")
    generator, W = torch.Generator().manual_seed(seed), projections(model)
    kept = keep * moment(model, preserved, "all") + caption_weight * moment(model, captions, "all")
    both = zip(targets, common.one_each(surrogate, targets), strict=True)
    found = [(C, goal(C, G)) for name, guide in both for C, G in around(model, templates, name, guide)]
    gram, cross = kept + sum(C.T @ C for C, _ in found), kept + sum(G.T @ C for C, G in found)
    # W' = (lam W + sum (W e_new) e_old^T + p M1) (lam I + sum e_old e_old^T + p M2)^-1
    refined = {key: refit(V, V @ cross, gram, lam) for key, V in W.items()}
    base = {key: V.to(model.device) for key, V in finished(model, refined).items()}

    def trained() -> Iterator[tuple[Weights, Tensor]]:
        for name in targets:
            change = new_change(base, generator)
            list(unseeing_steps(model, name, templates, base, change, generator, **training))
            tuned = {key: refined[key] + (up @ down).detach().cpu().double() for key, (up, down) in change.items()}
            yield tuned, moment(model, filled(templates, [name]), "all")

    return finished(model, fuse(W, refined, trained(), kept, lam))
