"""Attacks that search for words: through the text encoder, and all but the last through the U-Net, too.

textual_inversion learns new words; the others find real ones, which anybody could type. Signature, letters: attacks.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clip import Tokenizer
from erasers.common import filled, trajectories
from study.attacks import TEMPLATES, Found, Victim, learned_embeddings
from weights import Model

# --- Through the text encoder and the U-Net ----------------------------------------------------------------------


def embed(model: Model, template: str, X: Tensor) -> Tensor:
    """Token embeddings [B, T, e]: a template, with the words X [B, n, e] for its {}; ValueError if they do not fit."""
    text, tokenizer = model.text_encoder.text_model.embeddings, model.tokenizer
    left, right = (tokenizer.ids(part) for part in template.split("{}"))
    room = len(text.position_embedding.weight) - len(left) - len(right) - X.shape[1] - 1
    if room < 1:
        raise ValueError(f"{template!r} with {X.shape[1]} learned words is longer than the text encoder reads")
    ids = torch.tensor([tokenizer.bos, *left, *right, *[tokenizer.eos] * room], device=X.device)
    known = text.token_embedding(ids).expand(len(X), -1, -1)
    return torch.cat([known[:, : 1 + len(left)], X, known[:, 1 + len(left) :]], dim=1)


def learned_contexts(model: Model, templates: Sequence[str], X: Tensor) -> Tensor:
    """Contexts [B, P, T, d] of every template with the words X [B, n, e] in it, differentiable in X; see `embed`."""
    text = model.text_encoder.text_model
    embedded = torch.stack([embed(model, template, X) for template in templates], dim=1)
    # `model.encode` without its first lookup
    E = text.encoder(embedded.flatten(0, 1) + text.embeddings.position_embedding.weight)
    return text.final_layer_norm(E).unflatten(0, embedded.shape[:2])


@dataclass(frozen=True)
class Samples:
    """Pictures of the target with known noise in them: x_t and noise [S, c, h, w], timesteps [S]."""

    latents: Tensor
    timesteps: Tensor
    noise: Tensor


def sampled(model: Model, images: Tensor, count: int, generator: torch.Generator) -> Samples:
    """`count` samples of latents `images` [B, c, h, w], one timestep from every `count`-th of the schedule."""
    spread = torch.arange(count) + torch.rand(count, generator=generator)
    timesteps = (spread * model.schedule.length / count).long()
    clean = images[torch.randint(len(images), (count,), generator=generator)]
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    timesteps = timesteps.to(clean.device)
    return Samples(model.schedule.add_noise(clean, noise, timesteps), timesteps, noise)


def noise_loss(victim: Victim, samples: Samples, contexts: Tensor) -> Tensor:
    """mean |eps_erased(x_t, t, E) - eps|^2 of every candidate [B], contexts [B, P, T, d].

    Sample s is read with prompt s mod P. Small where the erased model knows what is in the pictures.
    """
    B, S = len(contexts), len(samples.noise)
    rows = contexts[:, torch.arange(S) % contexts.shape[1]].flatten(0, 1)  # [B S, T, d]
    predicted = victim.noise(samples.latents.repeat(B, 1, 1, 1), samples.timesteps.repeat(B), rows)
    return (predicted.unflatten(0, (B, S)) - samples.noise).square().mean(dim=(1, 2, 3, 4))


def drawn_samples(
    model: Model, prompts: Sequence[str], count: int, images: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Samples]:
    """Latents [>= images, c, h, w] that the original model draws for the prompts, and `count` samples of them."""
    latents = trajectories(model, list(prompts) * -(-images // len(prompts)), steps, 7.5, generator)[-1]
    return latents, sampled(model, latents, count, generator)


def invert(
    victim: Victim, templates: Sequence[str], X: Tensor, images: Tensor, steps: int, samples: int, lr: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Words [1, n, e] trained from X on fresh samples every step, by Adam with a learning rate that falls to zero."""
    X = X.clone().requires_grad_()
    optimizer = torch.optim.Adam([X], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        contexts = learned_contexts(victim.erased, templates, X)
        loss = noise_loss(victim, sampled(victim.original, images, samples, generator), contexts).sum()
        optimizer.zero_grad()
        loss.backward(inputs=[X])
        optimizer.step()
    return X.detach()


def textual_inversion(
    victim: Victim, target: str, templates: Sequence[str] = TEMPLATES, seed: int = 0, *,
    steps: int = 25, samples: int = 4, images: int = 8, lr: float = 0.2, sampling_steps: int = 20,
) -> Found:  # fmt: skip
    """New words in place of the target's name, learned from the original's pictures: as many as the name has tokens.

        min over X   E |eps_erased(x_t, t, clip("a picture of a X")) - eps|^2

    Two descents, from the name itself and from the middle of the vocabulary: an erased name may sit where a gate is
    saturated and its gradient vanishes. The best of both, and of the name, on samples that none was trained on. `lr`
    counts standard deviations of the vocabulary's embeddings, so that it means the same to any text encoder.
    ValueError as for `embed`.
    """
    generator, model = torch.Generator().manual_seed(seed), victim.erased
    prompts = filled(templates, [target])
    drawn, held = drawn_samples(victim.original, prompts, 4 * samples, images, sampling_steps, generator)
    table = model.text_encoder.text_model.embeddings.token_embedding.weight
    name = table[torch.tensor(model.tokenizer.ids(target), device=table.device)][None]
    tried = [name]
    for X in (name, table.mean(dim=0).expand_as(name)):
        tried.append(invert(victim, templates, X, drawn, steps, samples, lr * table.std().item(), generator))
    with torch.no_grad():
        contexts = learned_contexts(model, templates, torch.cat(tried))  # [3, P, T, d]
        losses = torch.cat([noise_loss(victim, held, each[None]) for each in contexts])
    best = losses.argmin().item()
    words = " ".join(f"<{i + 1}>" for i in range(name.shape[1]))
    return Found(contexts[best], filled(templates, [words]) if best else prompts, losses[0].item(), losses[best].item())


# --- Through words -----------------------------------------------------------------------------------------------


def whole_words(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that are words by themselves: typed between spaces, they are read as this one token again."""
    ends = sorted((i, s.removesuffix("</w>")) for s, i in tokenizer.bpe.get_vocab().items() if s.endswith("</w>"))
    return [i for i, word in ends if tokenizer.ids(word) == [i]]


def swaps(
    gradient: Tensor, table: Tensor, words: Tensor, ids: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """`count` neighbours [count, n] of the prefix ids [n]: one token changed, to one that promises a lower loss.

    HotFlip's first order (Ebrahimi et al. 2018, arXiv 1712.06751): with the `gradient` g_i [e] at place i of n, another
    token v changes the loss by g_i (x_v - x_i), x_v a row of the `table` of embeddings. Drawn from the best `count` of
    `words` [V] at every place.
    """
    # promise[i, v] = -g_i x_v; x_i is the same for all v
    promise = -gradient @ table[words].T  # [n, V]
    best = words[promise.topk(min(count, len(words)), dim=1).indices]  # [n, <= count]
    picks = torch.randperm(best.numel(), generator=generator)[:count].to(ids.device)
    place, rank = picks // best.shape[1], picks % best.shape[1]
    neighbours = ids.repeat(len(picks), 1)
    neighbours[torch.arange(len(picks)), place] = best[place, rank]
    return neighbours


def search(
    model: Model, plain: Sequence[str], templates: Sequence[str], loss: Callable[[Tensor], Tensor], length: int,
    steps: int, candidates: int, generator: torch.Generator,
) -> Found:  # fmt: skip
    """`length` words for the {} of templates that make `loss` of contexts [B, P, T, d] -> [B] small.

    Greedy coordinates (as HotFlip's and GCG's): the gradient proposes `candidates` single swaps, the loss itself
    chooses, so that it never rises. Only `whole_words` are tried: a prompt is read as exactly the tokens that were.
    `plain` are the prompts that it is compared with. ValueError as for `embed`.
    """
    table = model.text_encoder.text_model.embeddings.token_embedding.weight
    words = torch.tensor(whole_words(model.tokenizer), device=table.device)
    ids, lowest = words[torch.randint(len(words), (length,), generator=generator).to(words.device)], None
    for _ in range(steps):
        X = table[ids][None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(learned_contexts(model, templates, X)).sum(), X)
        neighbours = torch.cat([ids[None], swaps(gradient[0], table, words, ids, candidates, generator)])
        with torch.no_grad():
            scores = loss(learned_contexts(model, templates, table[neighbours]))
        ids, lowest = neighbours[scores.argmin()], scores.min().item()
    found = filled(templates, [" ".join(model.tokenizer.bpe.id_to_token(i).removesuffix("</w>") for i in ids.tolist())])
    with torch.no_grad():
        return Found(model.encode(found), found, loss(model.encode(list(plain))[None]).item(), lowest)


def by_noise(
    victim: Victim, prompts: Sequence[str], templates: Sequence[str], length: int, seed: int, *,
    predicted: bool = False, steps: int = 15, candidates: int = 8, samples: int = 6, images: int = 8,
    sampling_steps: int = 20,
) -> Found:  # fmt: skip
    """`search` for words with which the erased model tells the noise in the target's pictures, the same few throughout.

    With `predicted` the goal is no true noise but what the original predicts under the target's prompts.
    """
    original, generator = victim.original, torch.Generator().manual_seed(seed)
    _, fixed = drawn_samples(original, prompts, samples, images, sampling_steps, generator)
    if predicted:
        E = original.encode(prompts)[torch.arange(samples) % len(prompts)]
        with torch.no_grad():
            fixed = replace(fixed, noise=Victim(original, original).noise(fixed.latents, fixed.timesteps, E))

    def loss(contexts: Tensor) -> Tensor:
        return noise_loss(victim, fixed, contexts)

    return search(victim.erased, prompts, templates, loss, length, steps, candidates, generator)


def learned_tokens(
    victim: Victim, target: str, templates: Sequence[str] = TEMPLATES, seed: int = 0, *, length: int = 5, **effort: int
) -> Found:
    """UnlearnDiffAtk: a prefix of real words before the prompt, one for all templates. `effort`: of `by_noise`.

        min over w_1 ... w_n   mean over samples of |eps_erased(x_t, t, clip("w_1 ... w_n a picture of a cat")) - eps|^2

    Its projected gradient is replaced by `search`.
    """
    prompts = filled(templates, [target])
    return by_noise(victim, prompts, [f"{{}} {prompt}" for prompt in prompts], length, seed, **effort)


def prompting4debugging(
    victim: Victim, target: str, templates: Sequence[str] = TEMPLATES, seed: int = 0, *, length: int = 8, **effort: int
) -> Found:
    """P4D-N: a prompt with which the erased model predicts what the original does with the target.

        min over w_1 ... w_n   mean |eps_erased(x_t, t, clip("w_1 ... w_n")) - eps_original(x_t, t, clip(target))|^2

    Its projected gradient is replaced by `search`. `effort`: of `by_noise`.
    """
    return by_noise(victim, filled(templates, [target]), ["{}"], length, seed, predicted=True, **effort)


# Pairs of prompts with and without the concept, from which Ring-A-Bell takes its direction.
PAIRS = ("a {}", "a photo of a {}", "a big {}", "{} on a table", "one {} and nothing else", "the {} of my friend")


def ring_a_bell(
    victim: Victim, target: str, templates: Sequence[str] = TEMPLATES, seed: int = 0, *,
    without: str = "thing", strength: float = 3.0, length: int = 8, steps: int = 30, candidates: int = 16,
) -> Found:  # fmt: skip
    """Ring-A-Bell: real words whose context has the concept's direction in it. It never sees the erased U-Net.

        c = mean over pairs of clip(with the concept) - clip(without it)
        min over w_1 ... w_n   |clip("w_1 ... w_n") - (clip(prompt) + strength c)|^2        relative to |clip(prompt)|^2

    The prompts name `without` in place of the target. The authors' genetic search is replaced by `search`.
    """
    generator, model, plain = torch.Generator().manual_seed(seed), victim.original, filled(templates, [without])
    with torch.no_grad():
        direction = (model.encode(filled(PAIRS, [target])) - model.encode(filled(PAIRS, [without]))).mean(dim=0)
        base = model.encode(plain)
    goal = base + strength * direction

    def loss(contexts: Tensor) -> Tensor:
        return (contexts - goal).square().sum(dim=(1, 2, 3)) / base.square().sum()

    found = search(model, plain, ["{}"] * len(templates), loss, length, steps, candidates, generator)
    return replace(found, contexts=victim.erased.encode(found.prompts))


# --- All attacks -------------------------------------------------------------------------------------------------

ATTACKS: dict[str, Callable[..., Found]] = {  # (victim, target, templates, seed, **options)
    "embeddings": learned_embeddings,
    "inversion": textual_inversion,
    "tokens": learned_tokens,
    "P4D": prompting4debugging,
    "Ring-A-Bell": ring_a_bell,
}
RANDOM = ("inversion", "tokens", "P4D", "Ring-A-Bell")  # the seed decides what they find, for all images of one search
