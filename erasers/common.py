"""What all erasers share: tokens of prompts, the closed form, and the U-Net with some of its weights replaced.

Letters: W [d_l, d] a projection of the context; E [T, d] the context of a prompt; C and G [n, d] tokens to erase and
what they become; p a token that stays. Closed forms are solved in float64: second moments of tokens are badly
conditioned.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

import sampler
from loading.prompts import fill
from unet import UNet
from weights import Model

Weights = dict[str, Tensor]  # by checkpoint key, such as "down_blocks.0....attn2.to_k.weight"
Goal = Callable[[Tensor, Tensor], Tensor]  # (C, G) -> what C become, [n, d] all


def precision(model: Model) -> torch.dtype:
    """The model's, but at least float32: what is trained and returned."""
    return torch.promote_types(model.dtype, torch.float32)


def projections(model: Model, kinds: Sequence[str] = ("to_k", "to_v")) -> Weights:
    """The matrices W [d_l, d] through which cross-attention reads the prompt, float64 on the CPU."""
    ends, found = tuple(f".{kind}.weight" for kind in kinds), model.cross_attention(precision(model))
    return {key: W.cpu().double() for key, W in found.items() if key.endswith(ends)}


def finished(model: Model, weights: Weights) -> Weights:
    """Edited weights as erasers return them: on the CPU, in the `precision` of the model."""
    return {key: W.detach().to("cpu", precision(model)).contiguous() for key, W in weights.items()}


def one_each(surrogate: str | Sequence[str], targets: Sequence[str]) -> list[str]:
    """The surrogate of every target; ValueError unless there is one for all, or one for each."""
    names = [surrogate] * len(targets) if isinstance(surrogate, str) else list(surrogate)
    if len(names) != len(targets):
        raise ValueError(f"{len(names)} surrogates for {len(targets)} targets: give one, or one each")
    return names


def tokens(model: Model, prompts: Sequence[str], which: str, chunk: int = 256) -> Iterator[Tensor]:
    """Some tokens of every prompt, [n, d] each, float64.

    "last": the last one before EOS (of '' it is BOS); "tail": from there to the end of the padding, all of which has
    seen the whole prompt, because the text encoder is causal; "words": all but BOS; "all": all T. KeyError otherwise.
    """
    for start in range(0, len(prompts), chunk):  # thousands would not fit in memory
        part = list(prompts[start : start + chunk])
        for prompt, E in zip(part, model.encode(part).cpu().double(), strict=True):
            last = min(len(model.tokenizer.ids(prompt)), len(E) - 2)
            first, end = {"last": (last, last + 1), "tail": (last, None), "words": (1, None), "all": (0, None)}[which]
            yield E[first:end]


def moment(model: Model, prompts: Sequence[str], which: str) -> Tensor:
    """sum p p^T [d, d] over `tokens` of prompts, float64."""
    d = model.part("unet").config["cross_attention_dim"]
    return sum((rows.T @ rows for rows in tokens(model, prompts, which)), torch.zeros(d, d, dtype=torch.float64))


def pairs(model: Model, targets: Sequence[str], surrogates: Sequence[str], which: str) -> tuple[Tensor, Tensor]:
    """`tokens` C of targets, and G of their surrogates at the same places counted from the first, [n, d]."""
    once = list(dict.fromkeys(surrogates))
    known = dict(zip(once, tokens(model, once, which), strict=True))
    both = zip(tokens(model, targets, which), (known[name] for name in surrogates), strict=True)
    C, G = zip(*((c[: len(g)], g[: len(c)]) for c, g in both), strict=True)
    return torch.cat(C), torch.cat(G)


def filled(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Every name in every template, the first name in all of them first."""
    return [fill(template, name) for name in names for template in templates]


def refit(W: Tensor, cross: Tensor, gram: Tensor, lam: float) -> Tensor:
    """argmin over V of sum |V x - y|^2 + lam |V - W|^2: cross = sum y x^T [d_l, d] and gram = sum x x^T [d, d]."""
    # V = (lam W + sum y x^T) (lam I + sum x x^T)^-1
    H = gram + lam * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(H, lam * W + cross, left=False)


def move(weights: Weights, C: Tensor, G: Tensor, kept: Tensor, lam: float, s_e: float = 1, s_p: float = 1) -> Weights:
    """Every W so changed that W' c is near W g and W' p near W p: one edit of UCE (arXiv 2308.14761, eq. 7).

    argmin over V of  s_e sum |V c - W g|^2 + s_p sum |V p - W p|^2 + lam |V - W|^2
    with C, G [n, d] and kept = sum p p^T [d, d].
    """
    # V = (lam W + W (s_e sum g c^T + s_p sum p p^T)) (lam I + s_e sum c c^T + s_p sum p p^T)^-1
    gram, mapped = s_e * C.T @ C + s_p * kept, s_e * G.T @ C + s_p * kept
    return {key: refit(W, W @ mapped, gram, lam) for key, W in weights.items()}


def predict(unet: UNet, weights: Weights, latents: Tensor, timestep: Tensor | int, context: Tensor) -> Tensor:
    """Noise in latents [B, c, h, w] at one timestep or [B], under contexts [B, T, d]; differentiable in `weights`."""
    names = [f"{path}.{kind}" for path in unet.cross_attentions() for kind in ("to_k", "to_v")]
    own = {f"{name}.weight": unet.get_submodule(name).weight for name in names} | weights
    kv = {name: context @ own[f"{name}.weight"].T for name in names}
    return functional_call(unet, weights, (latents, timestep, kv))


@torch.no_grad()
def trajectories(
    model: Model, prompts: Sequence[str], steps: int, guidance: float, generator: torch.Generator, method: str = "ddim"
) -> Tensor:
    """All x_t on the way from noise to a picture of each prompt, [steps + 1, B, c, h, w]; the last are the pictures."""
    c, size = model.unet.config["in_channels"], model.unet.config["sample_size"]
    noise = torch.randn(len(prompts), c, size, size, generator=generator).to(model.device, model.dtype)
    kv = model.unet.keys_values(model.encode([""] * len(prompts) * (guidance != 1) + list(prompts)))
    return torch.stack([noise, *sampler.sample(model.unet, model.schedule, noise, kv, steps, guidance, method)])
