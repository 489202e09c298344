"""The linear erasers that CPE is compared with: each edits the weights of cross-attention, once and for every prompt.

    edited = uce(model, ["cat"], "an object", ["a dog", "a horse"])     # {"....attn2.to_k.weight": [d_l, d], ...}
    save_model(model, folder, unet=model.unet.state_dict() | edited)    # weights.py: a plain U-Net, any tool opens it

All have one signature, `(model, targets, surrogate, preserved, seed) -> edited weights`: float32 on the CPU, under the
checkpoint keys of the U-Net, only those that changed. Hyper-parameters are keyword-only; defaults are the papers'.
The surrogate is one for all targets, or a list of one each (otherwise ValueError). `preserved` are prompts that must
stay; a target among them is taken out by the caller (`cpe.anchor_words`). What `eta` is of uce, rece, speed and mace,
`beyond` says: it is ours.

    uce     closed form   to_k, to_v   Gandikota et al. 2024 (arXiv 2308.14761)
    rece    closed form   to_k, to_v   Gong et al. 2024 (arXiv 2407.12383)
    speed   closed form   to_v         Li et al. 2025 (arXiv 2503.07392)
    mace    both forms    to_k, to_v   Lu et al. 2024 (arXiv 2403.06135)
    esd     trained       all of attn2 Gandikota et al. 2023 (arXiv 2303.07345), variant x
    lora    trained       to_k, to_v   CPE's own losses without its gates: what the nonlinearity is worth

Letters: W [d_l, d] a projection of the context; E [B, T, d] contexts; rows c of C [n, d] token embeddings to erase,
G [n, d] what they become, P [n', d] those that stay. Closed forms are solved in float64: second moments of tokens
are badly conditioned. Built on cpe, unet, sampler and products.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear as product

import old_cpe as cpe
import sampler
from unet import Attention, UNet

if TYPE_CHECKING:
    from weights import Model

Weights = dict[str, Tensor]  # by checkpoint key

# Where a concept stands when an eraser needs it inside prompts.
TEMPLATES = ("a photo of {}", "{}", "a {}", "a photo of a {}", "a picture of {}", "an image of a {}")

# --- What all share ----------------------------------------------------------------------------------------------


def projections(model: "Model", kinds: Sequence[str] = ("to_k", "to_v")) -> Weights:
    """The matrices W [d_l, d] through which cross-attention reads the prompt, float64."""
    ends = tuple(f".{kind}.weight" for kind in kinds)
    return {key: W.cpu().double() for key, W in model.cross_attention().items() if key.endswith(ends)}


def contexts(model: "Model", prompts: Sequence[str], chunk: int = 256) -> Iterator[tuple[list[str], Tensor]]:
    """Prompts and their contexts [<= chunk, T, d], float64, a chunk at a time: thousands would not fit in memory."""
    for start in range(0, len(prompts), chunk):
        part = list(prompts[start : start + chunk])
        yield part, model.encode(part).cpu().double()


def encode(model: "Model", prompts: Sequence[str]) -> Tensor:
    """Contexts of a few prompts, [B, T, d], float64."""
    return next(contexts(model, prompts, chunk=len(prompts)))[1]


def tails(model: "Model", prompts: Sequence[str]) -> Iterator[Tensor]:
    """Of every prompt, its tokens from the last before EOS to the end of the padding, [<= T, d], float64.

    The text encoder is causal: all of these have seen the whole prompt. Of '' the first is BOS.
    """
    for part, E in contexts(model, prompts):
        for prompt, tokens in zip(part, E, strict=True):
            yield tokens[min(len(model.tokenizer.ids(prompt)), len(tokens) - 2) :]


def refit(W: Tensor, cross: Tensor, gram: Tensor, lam: float) -> Tensor:
    """The V [d_l, d] that minimises sum_i |V x_i - y_i|^2 + lam |V - W|^2.

    It needs only the moments cross = sum y x^T [d_l, d] and gram = sum x x^T [d, d].
    """
    # V = (lam W + sum y x^T) (lam I + sum x x^T)^-1
    H = gram + lam * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(H, lam * W + cross, left=False)


def move(
    weights: Weights, C: Tensor, G: Tensor, kept: Tensor, lam: float, s_e: float = 1.0, s_p: float = 1.0
) -> Weights:
    """Every W so changed that W' c is near W g and W' p near W p: one edit of UCE.

    argmin over V of  s_e sum |V c - W g|^2 + s_p sum |V p - W p|^2 + lam |V - W|^2
    with C, G [n, d] and kept = sum p p^T [d, d].
    """
    # V = (lam W + W (s_e sum g c^T + s_p sum p p^T)) (lam I + s_e sum c c^T + s_p sum p p^T)^-1
    gram, mapped = s_e * C.T @ C + s_p * kept, s_e * G.T @ C + s_p * kept
    return {key: refit(W, W @ mapped, gram, lam) for key, W in weights.items()}


def guides(surrogate: str | Sequence[str], targets: Sequence[str]) -> list[str]:
    """What each target becomes. ValueError unless there is one surrogate, or one for each."""
    names = [surrogate] * len(targets) if isinstance(surrogate, str) else list(surrogate)
    if len(names) != len(targets):
        raise ValueError(f"{len(names)} surrogates for {len(targets)} targets: give one, or one each")
    return names


def beyond(C: Tensor, G: Tensor, eta: float) -> Tensor:
    """What tokens C [n, d] shall become, past those of the surrogate G [n, d] for eta > 0: as of CPE's erase loss.

    In none of the linear erasers' papers, where it is 0.
    """
    # C + (1 + eta) (G - C)
    return G + eta * (G - C) if eta else G


def plain(weights: Weights) -> Weights:
    """Edited weights as they are returned: float32 on the CPU, out of any graph."""
    return {key: W.detach().float().cpu().contiguous() for key, W in weights.items()}


# --- UCE and RECE ------------------------------------------------------------------------------------------------


def uce(
    model: "Model",
    targets: list[str],
    surrogate: str | Sequence[str],
    preserved: list[str],
    seed: int = 0,
    *,
    lam: float = 0.5,
    s_e: float = 1.0,
    s_p: float = 1.0,
    padding: bool = False,
    eta: float = 0.0,
) -> Weights:
    """Unified Concept Editing: the last token of every target is read as the surrogate's. No chance in it.

    With `padding`, so are EOS and all padding after it, and as many tokens of what is preserved stay: the authors'
    first code. It erases more where padding carries the concept, and spoils more.
    """
    end = None if padding else 1
    C, G = paired_tails(model, targets, surrogate, end, eta)
    return plain(move(projections(model), C, G, moment_of_tails(model, preserved, end), lam, s_e, s_p))


def moment_of_tails(model: "Model", prompts: Sequence[str], end: int | None) -> Tensor:
    """sum e e^T [d, d] over the first `end` of the `tails` of prompts, float64."""
    d = model.part("unet").config["cross_attention_dim"]
    rows = (tail[:end] for tail in tails(model, prompts))
    return sum((tail.T @ tail for tail in rows), torch.zeros(d, d, dtype=torch.float64))


def paired_tails(
    model: "Model", targets: Sequence[str], surrogate: str | Sequence[str], end: int | None, eta: float
) -> tuple[Tensor, Tensor]:
    """Tokens C of the targets and what they become, [n, d]: the first `end` of the `tails` of both names, paired."""
    names = guides(surrogate, targets)
    once = list(dict.fromkeys(names))
    known = dict(zip(once, tails(model, once), strict=True))
    both = zip(tails(model, targets), (known[name] for name in names), strict=True)
    pairs = [(tail[: len(guide)][:end], guide[: len(tail)][:end]) for tail, guide in both]
    C, G = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return C, beyond(C, G, eta)


def revive(original: Weights, edited: Weights, C: Tensor, rho: float) -> Tensor:
    """The embeddings C' [n, d] that mean to the edited model what C meant to the original one.

    c' = argmin  sum_l |W_l c' - W_l^o c|^2 + rho |c'|^2,   W_l edited, W_l^o original.
    """
    now = sum(W.T @ W for W in edited.values())
    then = sum(edited[key].T @ W for key, W in original.items())
    # c' = (rho I + sum W^T W)^-1 (sum W^T W^o) c
    return torch.linalg.solve(now + rho * torch.eye(len(now), dtype=now.dtype), then @ C.T).T


def rece(
    model: "Model",
    targets: list[str],
    surrogate: str | Sequence[str],
    preserved: list[str],
    seed: int = 0,
    *,
    rounds: int = 3,
    rho: float = 0.1,
    lam: float = 0.1,
    s_p: float = 0.1,
    padding: bool = False,
    eta: float = 0.0,
) -> Weights:
    """RECE: UCE, then rounds of finding the embeddings that revive the targets and erasing these too. No chance in it.

    A round moves all T tokens of the targets; what stays are the tokens of '' and the last tokens of `preserved`, with
    `padding` (which is as in `uce`) also those that follow.
    The UCE it begins with has lam and s_p of the rounds (UCE's own: 0.5 and 1). With `eta`, rounds go back towards the
    surrogate: what they aim at is read by the model as edited so far. The paper's own surrogate is ' '. For art styles
    it takes rho = 1e-3 and one round.
    """
    original, end = projections(model), None if padding else 1
    kept, empty = moment_of_tails(model, preserved, end), encode(model, [""])[0]
    C, G = paired_tails(model, targets, surrogate, end, eta)
    edited = move(original, C, G, kept, lam, 1.0, s_p)
    kept = kept + empty.T @ empty
    C, G = encode(model, targets).flatten(0, 1), encode(model, guides(surrogate, targets)).flatten(0, 1)
    G = beyond(C, G, eta)
    for _ in range(rounds):
        edited = move(edited, revive(original, edited, C, rho), G, kept, lam, 1.0, s_p)
    return plain(edited)


# --- SPEED -------------------------------------------------------------------------------------------------------


def centroids(x: Tensor, count: int, generator: torch.Generator, rounds: int = 100) -> Tensor:
    """k-means: `count` centres [count, d] of the rows of x [n, d], by Lloyd's algorithm from random rows."""
    centres = x[torch.randperm(len(x), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(dim=1)
        # A centre that no row is nearest to stays where it is.
        groups = [x[nearest == i] for i in range(len(centres))]
        moved = torch.stack([g.mean(0) if len(g) else c for g, c in zip(groups, centres, strict=True)])
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def influential(W: Tensor, kept: Tensor, erase: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """The kept tokens [n, d] that an unconstrained edit `erase` [d_l, d] would move most, and noisy copies of them.

    Noise goes along the input direction that W reads least, so that a copy means the same. SPEED, sections 4.2, 4.3.
    """
    influence = (kept @ erase.T).norm(dim=1)
    kept = kept[influence >= influence.mean()]
    weakest = torch.linalg.eigh(W.T @ W)[1][:, :1]  # v_min [d, 1]
    # n v v^T of a Gaussian n is a number times v
    noise = torch.randn(copies * len(kept), 1, generator=generator, dtype=kept.dtype) @ weakest.T
    noisy = kept.repeat(copies, 1) + noise
    influence = (noisy @ erase.T).norm(dim=1)
    return torch.cat([kept, noisy[influence > influence.mean()]])


def null_edit(
    W: Tensor, A: Tensor, T: Tensor, R: Tensor, C2: Tensor, rho: float = 1.0, mu: float = 0.0, threshold: float = 0.1
) -> Tensor:
    """W' [d_l, d] = W + Delta with Delta blind to the kept tokens R [n, d] and to the rows of C2 [m, d].

    T = mean c c^T, A = mean g c^T [d, d]. Delta = Delta P, P the projector on the eigenvectors of mean r r^T with
    eigenvalue < threshold; among those with Delta c2 = 0 it minimises mean |(W + Delta) c - W g|^2 + rho |Delta|^2.
    """
    values, vectors = torch.linalg.eigh(R.T @ R / len(R))
    U = vectors[:, values < threshold]  # P = U U^T
    # N = P (T P + rho I)^-1 = U (U^T T U + rho I)^-1 U^T
    N = U @ torch.linalg.solve(U.T @ T @ U + rho * torch.eye(U.shape[1], dtype=U.dtype), U.T)
    S = C2 @ N @ C2.T + mu * torch.eye(len(C2), dtype=U.dtype)
    # Delta = W (A - T) P Q M,   P Q M = N - N C2^T (C2 N C2^T + mu I)^-1 C2 N;  pinv: a row of C2 may lie in R's span
    return W + W @ (A - T) @ (N - N @ C2.T @ torch.linalg.pinv(S, hermitian=True) @ C2 @ N)


def speed(
    model: "Model",
    targets: list[str],
    surrogate: str | Sequence[str],
    preserved: list[str],
    seed: int = 0,
    *,
    rho: float = 1.0,
    mu: float = 0.0,
    threshold: float = 0.1,
    augment: int = 10,
    padding: bool = False,
    eta: float = 0.0,
) -> Weights:
    """SPEED: values only, changed in the null space of what must stay. `augment` 0: every preserved prompt, no copies.

    Without preserved prompts the tokens of '' stay, as in the authors' code. `padding` is as in `uce`, not theirs.
    """
    generator, end = torch.Generator().manual_seed(seed), None if padding else 1
    C, G = paired_tails(model, targets, surrogate, end, eta)
    T, A = C.T @ C / len(C), G.T @ C / len(C)
    empty = encode(model, [""])[0]
    C2 = torch.cat([empty[:1], centroids(empty[1:], 3, generator)])
    kept = torch.cat([tail[:end] for tail in tails(model, preserved)]) if preserved else empty[1:]
    edited = {}
    for key, W in projections(model, ["to_v"]).items():
        # the edit that nothing holds back: W (A - T) (T + I)^-1
        erase = torch.linalg.solve(T + torch.eye(len(T), dtype=T.dtype), W @ (A - T), left=False)
        R = influential(W, kept, erase, augment, generator) if augment else kept
        edited[key] = null_edit(W, A, T, R, C2, rho, mu, threshold)
    return plain(edited)


# --- LoRA with CPE's losses --------------------------------------------------------------------------------------


class LoRA(cpe.ResAG):
    """A ResAG without attention and gate: R_l(E) = s E D_l U_l. `w_qs` and `scaler` stay unused.

    Hu et al. 2022 (arXiv 2106.09685).
    """

    def columns(self) -> Tensor:
        """C = D, [N, 1, d, L k]."""
        return self.lora_down.unsqueeze(1)

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Gate 1 [N, B, T] and codes z = s E D [N, B, T, L k], from features E D."""
        return torch.ones_like(features[..., 0]), self.scale.view(-1, 1, 1, 1) * features

    def fold(self, weights: Weights) -> Weights:
        """The projections with the corrections inside, [d_l, d]: W_l + s (D_l U_l)^T."""
        downs = self.lora_down[0].unflatten(-1, (-1, self.k)).unbind(dim=1)  # L times [d, k]
        pairs = zip(self.names, downs, self.ups(), strict=True)
        change = {f"{name}.weight": self.scale[0] * (D @ U[0]).T for name, D, U in pairs}
        return {key: W + change[key].detach().to(W) for key, W in weights.items()}


def lora_trainer(
    model: "Model",
    targets: list[str],
    surrogate: str | Sequence[str],
    preserved: list[str],
    seed: int,
    recipe: cpe.Recipe,
    templates: Sequence[str],
) -> cpe.Trainer:
    """CPE's trainer with a LoRA in place of the gates; one LoRA, of rank k per target, learns all targets together.

    Its rank stops at the width of the context, where a LoRA can be any matrix.
    """
    both = zip(targets, guides(surrogate, targets), strict=True)
    names = [(t.format(name), t.format(guide)) for name, guide in both for t in templates]

    def encode_float(prompts: list[str]) -> Tensor:
        return encode(model, prompts).float()

    data = cpe.Data(
        targets=encode_float([name for name, _ in names]),
        surrogates=encode_float([other for _, other in names]),
        anchors=torch.cat([E.half() for _, E in contexts(model, preserved or [""])]),
        empty=encode_float([""]),
    )
    objective = cpe.Objective({key: W.cpu() for key, W in model.cross_attention().items()}, data.empty.shape[1])
    trainer = cpe.Trainer(objective, data, replace(recipe, margin=0.0), seed)
    d = len(objective.M)
    k = min(recipe.k * len(targets), d)
    # alpha = rank / recipe.k keeps the scale s = 1 / recipe.k of a single target
    loras = LoRA(objective.widths, d, r=1, k=k, alpha=k / recipe.k)
    trainer.gates = trainer.core = loras.initialise(trainer.generator)
    return trainer


def lora(
    model: "Model",
    targets: list[str],
    surrogate: str | Sequence[str],
    preserved: list[str],
    seed: int = 0,
    *,
    recipe: cpe.Recipe = cpe.PRESETS["object"],
    templates: Sequence[str] = TEMPLATES,
) -> Weights:
    """LoRA trained as CPE trains its gates: same losses, anchors, attacks and stages; no gate, no attention.

    What it cannot do that CPE can is due to the missing nonlinearity. The anchors are mixed from `preserved`.
    """
    trainer = lora_trainer(model, targets, surrogate, preserved, seed, recipe, templates)
    for _ in trainer.steps():
        pass
    return plain(trainer.gates.fold(projections(model)))


# --- ESD-x -------------------------------------------------------------------------------------------------------


def predict(unet: UNet, weights: Weights, latents: Tensor, timestep: Tensor | int, context: Tensor) -> Tensor:
    """Noise [B, c, h, w] that the U-Net predicts with some of its weights replaced; differentiable in them.

    From latents [B, c, h, w] at one timestep or [B], under a context [B, T, d].
    """
    kv = {}
    for path, layer in unet.cross_attentions().items():
        kv[f"{path}.to_k"] = product(context, weights.get(f"{path}.to_k.weight", layer.to_k.weight))
        kv[f"{path}.to_v"] = product(context, weights.get(f"{path}.to_v.weight", layer.to_v.weight))
    return functional_call(unet, weights, (latents, timestep, kv))


@torch.no_grad()
def trajectories(
    model: "Model", prompt: str, images: int, steps: int, guidance: float, generator: torch.Generator
) -> Tensor:
    """All x_t on the way from noise to images of a prompt, [steps + 1, images, c, h, w]; the last are the images."""
    c, size = model.unet.config["in_channels"], model.unet.config["sample_size"]
    noise = torch.randn(images, c, size, size, generator=generator).to(model.device, model.dtype)
    prompts = [""] * images * (guidance != 1) + [prompt] * images
    kv = model.unet.keys_values(model.encode(prompts))
    return torch.stack([noise, *sampler.sample(model.unet, model.schedule, noise, kv, steps, guidance)])


def esd_steps(
    model: "Model",
    targets: list[str],
    weights: Weights,
    seed: int,
    steps: int,
    lr: float,
    guidance: float,
    negative: float,
    images: int,
    sampling_steps: int,
) -> Iterator[float]:
    """Train `weights` in place, one loss per step."""
    generator = torch.Generator().manual_seed(seed)
    unet, times = model.unet, model.schedule.timesteps(sampling_steps)
    paths = [trajectories(model, name, images, sampling_steps, guidance, generator) for name in targets]
    named, empty = model.encode(targets), model.encode([""])
    optimizer = torch.optim.Adam([W.requires_grad_() for W in weights.values()], lr=lr)
    for _ in range(steps):
        i, j, s = (torch.randint(n, (1,), generator=generator).item() for n in (len(targets), images, sampling_steps))
        x, t, c = paths[i][s, j : j + 1], times[s], named[i : i + 1]
        with torch.no_grad():
            eps_c, eps_0 = predict(unet, {}, torch.cat([x, x]), t, torch.cat([c, empty])).chunk(2)
            # eps_0 - eta (eps_c - eps_0): as far from the concept as guidance goes towards it
            goal = eps_0 - negative * (eps_c - eps_0)
        loss = F.mse_loss(predict(unet, weights, x, t, c), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def esd(
    model: "Model",
    targets: list[str],
    surrogate: str | Sequence[str],
    preserved: list[str],
    seed: int = 0,
    *,
    steps: int = 200,
    lr: float = 5e-5,
    guidance: float = 3.0,
    negative: float = 1.0,
    images: int = 16,
    sampling_steps: int = 50,
) -> Weights:
    """ESD-x: cross-attention learns to predict, for the target, the noise of its opposite.

    It has no surrogate and no preservation: both are ignored. x_t is drawn from `images` whole trajectories of
    the frozen model per target, made beforehand, not from a new one every step: the same distribution, less work.
    """
    named = model.unet.state_dict().items()
    weights = {key: W.detach().float().clone() for key, W in named if ".attn2." in key}
    for _ in esd_steps(model, targets, weights, seed, steps, lr, guidance, negative, images, sampling_steps):
        pass
    return plain(weights)


# --- MACE --------------------------------------------------------------------------------------------------------


def around(model: "Model", templates: Sequence[str], target: str, surrogate: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens around a concept in each prompt: with the target [n, d], and the same words with the surrogate [n, d].

    The words before it, then all that follows, word by word; the padding is cut where the longer name ends sooner.
    """
    names = (target, surrogate)
    contexts = [encode(model, [template.format(name) for template in templates]) for name in names]
    for template, E_old, E_new in zip(templates, *contexts, strict=True):
        start = span(model, template, target)[0]
        after = [span(model, template, name)[1] for name in names]
        n = len(E_old) - max(after)
        old, new = (torch.cat([E[:start], E[a : a + n]]) for E, a in zip((E_old, E_new), after, strict=True))
        yield old, new


def span(model: "Model", template: str, name: str) -> tuple[int, int]:
    """First token of a name inside a template, counting BOS, and the first one after it."""
    start = 1 + len(model.tokenizer.ids(template.split("{}")[0]))
    return start, start + len(model.tokenizer.ids(name))


def moment(model: "Model", prompts: Sequence[str], d: int) -> Tensor:
    """sum e e^T [d, d] over all tokens of prompts, float64."""
    total = torch.zeros(d, d, dtype=torch.float64)
    for _, E in contexts(model, prompts):
        total += E.flatten(0, 1).T @ E.flatten(0, 1)
    return total


def attention_maps(unet: UNet, weights: Weights, latents: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
    """Attention probabilities [B, heads, N, T] of every cross-attention layer in one pass; differentiable."""
    maps = []

    def record(layer: Attention, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (layer.to_q(inputs[0]), inputs[1]))
        # softmax(q k^T / sqrt(C / heads))
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))

    hooks = [layer.register_forward_pre_hook(record) for layer in unet.cross_attentions().values()]
    try:
        predict(unet, weights, latents, timestep, context)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def resized(maps: Tensor, side: int) -> Tensor:
    """Square maps [B, N] over pixels, at another side: [B, side, side]."""
    square = maps.unflatten(-1, (math.isqrt(maps.shape[-1]), -1)).unsqueeze(1)
    return F.interpolate(square, (side, side), mode="bilinear").squeeze(1)


@torch.no_grad()
def own_masks(
    model: "Model",
    images: Tensor,
    context: Tensor,
    tokens: tuple[int, int],
    times: Sequence[int],
    generator: torch.Generator,
) -> Tensor:
    """Where the concept is in images [B, c, h, w], by the model's own cross-attention: 0 or 1, [B, h, w].

    The attention to the concept's tokens, averaged over layers, heads and noise levels; above the middle of its range.
    `context` [1, T, d]; `tokens` as of `span`; `times` the timesteps of the noise levels.
    """
    side, total = images.shape[-1], 0
    for t in times:
        noise = torch.randn(images.shape, generator=generator).to(images)
        x = model.schedule.add_noise(images, noise, torch.full((len(images),), t))
        for A in attention_maps(model.unet, {}, x, t, context.expand(len(images), -1, -1)):
            total = total + resized(A[..., tokens[0] : tokens[1]].mean(dim=(1, 3)), side)
    low, high = total.amin(dim=(1, 2), keepdim=True), total.amax(dim=(1, 2), keepdim=True)
    return (total > (low + high) / 2).to(images)


def focal(length: int, early: int = 200, late: int = 400, slope: float = 0.05) -> Tensor:
    """MACE's sampling weights of timesteps [length]: those between `early` and `late`, where concepts take shape."""
    t = torch.arange(length)
    # sigmoid(gamma (t - t_1)) - sigmoid(gamma (t - t_2))
    return torch.sigmoid(slope * (t - early)) - torch.sigmoid(slope * (t - late))


def unseeing_steps(
    model: "Model",
    target: str,
    refined: Weights,
    change: dict[str, tuple[Tensor, Tensor]],
    generator: torch.Generator,
    steps: int,
    lr: float,
    images: int,
    sampling_steps: int,
    template: str,
) -> Iterator[float]:
    """Train one concept's rank-1 changes (up [d_l, 1], down [1, d]) in place on top of `refined`; one loss per step.

    loss = sum_l |A_l|^2 over the concept's tokens and the pixels of its mask, a mean over heads and layers.
    """
    prompt, tokens = template.format(target), span(model, template, target)
    context = model.encode([prompt])
    finals = trajectories(model, prompt, images, sampling_steps, 7.5, generator)[-1]
    masks = own_masks(model, finals, context, tokens, (200, 300, 400), generator)
    optimizer = torch.optim.AdamW([W for pair in change.values() for W in pair], lr=lr)
    weights = focal(model.schedule.length)
    for _ in range(steps):
        i = torch.randint(images, (1,), generator=generator).item()
        t = torch.multinomial(weights, 1, generator=generator)
        noise = torch.randn(finals[:1].shape, generator=generator).to(finals)
        x = model.schedule.add_noise(finals[i : i + 1], noise, t)
        # W' + up down
        edited = {key: refined[key] + up @ down for key, (up, down) in change.items()}
        loss = 0
        maps = attention_maps(model.unet, edited, x, t, context)
        for A in maps:
            mask = resized(masks[i : i + 1].flatten(1), math.isqrt(A.shape[2])).flatten()
            inside = A[..., tokens[0] : tokens[1]] * mask[:, None]
            loss = loss + inside.square().sum() / (A.shape[1] * len(maps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def new_change(weights: Weights, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Rank-1 changes that start at zero: up [d_l, 1] of zeros, down [1, d] normal."""
    change = {}
    for key, W in weights.items():
        down = torch.randn(1, W.shape[1], generator=generator).to(W)
        change[key] = (W.new_zeros(len(W), 1).requires_grad_(), down.requires_grad_())
    return change


def mace(
    model: "Model",
    targets: list[str],
    surrogate: str | Sequence[str],
    preserved: list[str],
    seed: int = 0,
    *,
    lam: float = 10.0,
    keep: float = 0.0,
    steps: int = 50,
    lr: float = 1e-5,
    images: int = 8,
    sampling_steps: int = 50,
    templates: Sequence[str] = TEMPLATES,
    eta: float = 0.0,
) -> Weights:
    """MACE: refine the words around the targets, train one rank-1 LoRA per target to look away from it, fuse them all.

    Its pictures are drawn from the first of the templates. Its masks come from the model's own cross-attention maps
    (`own_masks`), not from a segmentation network as in the paper. Defaults are the authors' for objects, which weigh
    `preserved` by keep = 0.
    """
    generator, W = torch.Generator().manual_seed(seed), projections(model)
    d = next(iter(W.values())).shape[1]
    kept = keep * moment(model, preserved, d) if keep else torch.zeros(d, d, dtype=torch.float64)
    both = list(zip(targets, guides(surrogate, targets), strict=True))
    pairs = [(old, beyond(old, new, eta)) for name, guide in both for old, new in around(model, templates, name, guide)]
    gram, cross = kept + sum(old.T @ old for old, _ in pairs), kept + sum(new.T @ old for old, new in pairs)
    # W' = (lam W + sum (W e_new) e_old^T + p M1) (lam I + sum e_old e_old^T + p M2)^-1
    refined = {key: refit(V, V @ cross, gram, lam) for key, V in W.items()}

    base = {key: V.float().to(model.device) for key, V in refined.items()}
    grams, goals = kept.clone(), {key: V @ kept for key, V in W.items()}
    for name in targets:
        change = new_change(base, generator)
        for _ in unseeing_steps(model, name, base, change, generator, steps, lr, images, sampling_steps, templates[0]):
            pass
        seen = moment(model, [template.format(name) for template in templates], d)
        grams += seen
        for key, (up, down) in change.items():
            goals[key] = goals[key] + (refined[key] + (up @ down).detach().cpu().double()) @ seen
    # argmin over V of  sum_i sum_e |V e - (W' + up_i down_i) e|^2 + p sum |V e_p - W e_p|^2 + lam |V - W|^2
    # (the authors' code stays near W' here; on the embedded model that erases less and keeps less)
    return plain({key: refit(V, goals[key], grams, lam) for key, V in W.items()})


# --- The table ---------------------------------------------------------------------------------------------------

Eraser = Callable[..., Weights]  # (model, targets, surrogate, preserved, seed, **hyper-parameters)

ERASERS: dict[str, Eraser] = {"uce": uce, "rece": rece, "speed": speed, "lora": lora, "esd": esd, "mace": mace}
