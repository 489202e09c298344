"""Attacks on an erased model: each lowers what it minimises, finds known optima, and leaves its victim as it was."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import normal
from torch import Tensor

import cpe
import sampler
import weights
from erasers.common import filled, projections
from study import searches
from study.attacks import Found, RevivalLoss, Victim
from study.searches import ATTACKS
from token_space import TokenSpace

random = partial(normal, dtype=torch.float32)
TARGET, TEMPLATES = "red heart", ["a picture of a {}", "{} emoji"]
# What makes the searches quick enough for a test.
QUICK = {
    "embeddings": {"steps": 4, "starts": 1},
    "inversion": {"steps": 2, "images": 2, "sampling_steps": 2},
    "tokens": {"steps": 2, "images": 2, "sampling_steps": 2},
    "P4D": {"steps": 2, "images": 2, "sampling_steps": 2},
    "Ring-A-Bell": {"steps": 2},
}


def one(layers: cpe.Layers, seed: int) -> cpe.ResAG:
    """Gates of one concept with every parameter drawn: half open to wide open."""
    gates = cpe.ResAG(layers.widths, 16, r=4, k=2, alpha=2.0)
    with torch.no_grad():
        gates.w_qs.copy_(random(*gates.w_qs.shape, seed=seed) / 8)
        gates.scaler.copy_(random(*gates.scaler.shape, seed=seed + 1) / 2)
        down, up = random(1, 16, 2, seed=seed + 2) / 4, random(2, 16, seed=seed + 3)
        for l, W in enumerate(layers.W.values()):
            gates.lora_down[l].copy_(down)
            gates.lora_up[l].copy_(up @ W.T + random(*gates.lora_up[l].shape[1:], seed=seed + 4 + l) / 20)
    return gates


@pytest.fixture(scope="module")
def model(tiny_original: Path) -> weights.Model:
    """The tiny model, never changed, but for outputs of cross-attention that are loud: a prompt makes a difference."""
    quiet = weights.load_model(tiny_original)
    loud = {key: 10 * W for key, W in quiet.unet.state_dict().items() if key.endswith("attn2.to_out.0.weight")}
    return quiet.with_unet(loud)


@pytest.fixture(scope="module")
def victims(model: weights.Model) -> dict[str, Victim]:
    """One of every kind: nothing erased, edited weights, the paper's gates."""
    W = {key.removesuffix(".weight"): V.float() for key, V in projections(model).items()}
    layers = cpe.Layers.of(model.cross_attention())
    mixed = torch.eye(16) + random(16, 16) / 4
    edited = {f"{key}.weight": V @ mixed + random(*V.shape, seed=i) / 20 for i, (key, V) in enumerate(W.items())}
    return {
        "nothing": Victim(model, model),
        "edited": Victim(model, model.with_unet(edited)),
        "resag": Victim(model, model, cpe.merge([one(layers, 10), one(layers, 20)])),
    }


ERASED = ["edited", "resag"]


def attack(name: str, victim: Victim, seed: int = 0, **options) -> Found:
    """An attack run with what makes it quick."""
    return ATTACKS[name](victim, TARGET, TEMPLATES, seed, **{**QUICK.get(name, {}), **options})


def tensors(victim: Victim) -> list[Tensor]:
    """Everything an attack must not touch."""
    parts = [victim.original.unet, victim.erased.unet, victim.original.text_encoder]
    return [t for part in [*parts, *([victim.gates] if victim.gates else [])] for t in part.state_dict().values()]


# --- Every attack ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edited", "resag"])
@pytest.mark.parametrize("name", ATTACKS)
def test_finds_contexts_repeatably_and_changes_nothing(name: str, kind: str, victims: dict[str, Victim]) -> None:
    victim = victims[kind]
    before = [t.clone() for t in tensors(victim)]
    found, again = attack(name, victim), attack(name, victim)
    assert all(torch.equal(t, was) for t, was in zip(tensors(victim), before, strict=True))
    assert victim.gates is None or all(p.requires_grad and p.grad is None for p in victim.gates.parameters())
    assert found.contexts.shape == (len(found.prompts), 77, 16)
    assert found.contexts.isfinite().all()
    assert not found.contexts.requires_grad
    assert torch.equal(found.contexts, again.contexts)
    assert replace(found, contexts=None) == replace(again, contexts=None)
    # What was found can be generated with.
    seeds = range(len(found.prompts))
    *_, latents = sampler.denoise_context(victim.erased, found.contexts, seeds, victim.gates, steps=1)
    assert latents.isfinite().all()


@pytest.mark.parametrize("name", searches.RANDOM)
def test_searches_depend_on_their_seed(name: str, victims: dict[str, Victim]) -> None:
    first, second = attack(name, victims["resag"], seed=0), attack(name, victims["resag"], seed=1)
    assert not torch.equal(first.contexts, second.contexts)


def test_half_precision_is_refused(model: weights.Model, tiny_original: Path) -> None:
    half = weights.load_model(tiny_original, torch.float16)
    with pytest.raises(ValueError, match="float32"):
        Victim(half, half)


# --- Keys and values ---------------------------------------------------------------------------------------------


def test_a_victim_is_the_erased_model(victims: dict[str, Victim]) -> None:
    E, x = victims["nothing"].original.encode(["cat", "dog"]), random(2, 4, 4, 4)
    for victim in victims.values():
        noise = victim.noise(x, torch.tensor([300, 300]), E)
        # one DDIM step from x_999 as `denoise_context` takes it
        seeds = [5, 6]
        *_, latents = sampler.denoise_context(victim.erased, E, seeds, victim.gates, steps=1, guidance_scale=1)
        start = torch.stack([random(4, 4, 4, seed=s) for s in seeds])
        t = victim.original.schedule.timesteps(1)[0]
        predicted = victim.noise(start, torch.tensor([t, t]), E)
        a, a_0 = (victim.original.schedule.alphas_cumprod[i] for i in (t, 0))
        expected = a_0.sqrt() * (start - (1 - a).sqrt() * predicted) / a.sqrt() + (1 - a_0).sqrt() * predicted
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        assert noise.shape == x.shape


@pytest.mark.parametrize("kind", ERASED)
def test_the_loss_is_its_formula(kind: str, victims: dict[str, Victim]) -> None:
    victim = victims[kind]
    E, x = victim.original.encode([TARGET, "cat"]), random(2, 77, 16)
    layers = cpe.Layers.of(victim.original.cross_attention())
    edited, gates = victim.erased.cross_attention(), victim.gates
    residuals = gates.residuals(x) if gates else {}
    above, below = 0, 0
    for name, W in layers.W.items():
        w = layers.a[name] / (len(W) * len(layers.W))
        above += w * (x @ edited[f"{name}.weight"].T + residuals.get(name, 0) - E @ W.T).square().sum((1, 2))
        below += w * (E @ W.T).square().sum((1, 2))
    torch.testing.assert_close(RevivalLoss(victim, E)(x), above / below, rtol=1e-4, atol=0)


def test_nothing_erased_leaves_nothing_to_do(victims: dict[str, Victim]) -> None:
    found = attack("embeddings", victims["nothing"])
    assert (found.before, found.after) == (0, 0)
    assert torch.equal(found.contexts, victims["nothing"].original.encode(filled(TEMPLATES, [TARGET])))


@pytest.mark.parametrize("kind", ["resag"])
def test_gradients_flow_through_gates(kind: str, victims: dict[str, Victim]) -> None:
    """Against a finite difference along the gradient; without the gates' share it would be another."""
    E = victims[kind].original.encode([TARGET])
    loss, bare = RevivalLoss(victims[kind], E), RevivalLoss(victims["nothing"], E)
    x = (E + random(*E.shape) / 4).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x).sum(), x)
    (linear,) = torch.autograd.grad(bare(x).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (loss(x + 0.05 * direction) - loss(x - 0.05 * direction)).item() / 0.1
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-2)
    assert (linear - gradient).norm() > 0.1 * gradient.norm()


def test_learned_embeddings_undo_an_edit_that_lost_nothing(model: weights.Model) -> None:
    """W' = W B with an invertible B hides the concept at E B^-1, and nowhere else."""
    B = (torch.eye(16) + random(16, 16) / 8).double()
    edited = {key: (W @ B).float() for key, W in projections(model).items()}
    victim = Victim(model, model.with_unet(edited))
    E = model.encode(filled(TEMPLATES, [TARGET]))
    found = attack("embeddings", victim, steps=40)
    assert found.before > 0.1
    assert found.after < 1e-8
    torch.testing.assert_close(found.contexts, (E.double() @ torch.linalg.inv(B).T).float(), rtol=0, atol=1e-3)


def test_learned_embeddings_reach_the_least_squares_optimum(victims: dict[str, Victim]) -> None:
    victim = victims["edited"]
    E = victim.original.encode(filled(TEMPLATES, [TARGET])).double()
    layers = cpe.Layers.of(victim.original.cross_attention())
    V = {name: projections(victim.erased)[f"{name}.weight"] for name in layers.W}
    # x = E (sum w W^T V) (sum w V^T V)^-1
    cross = sum(w * layers.W[name].double().T @ V[name] for name, w in TokenSpace(layers).w.items())
    x = torch.linalg.solve(
        sum(w * V[name].T @ V[name] for name, w in TokenSpace(layers).w.items()), E @ cross, left=False
    )
    optimum = RevivalLoss(victim, E.float())(x.float()).mean().item()
    found = attack("embeddings", victim, steps=40)
    assert 0 < optimum < 0.5 * found.before
    assert found.after == pytest.approx(optimum, rel=1e-4)
    torch.testing.assert_close(found.contexts, x.float(), rtol=0, atol=1e-2)


def test_learned_embeddings_undo_gates(model: weights.Model) -> None:
    """Each descent ends in some local minimum: one gate is undone more thoroughly than another, all of them well."""
    layers, left = cpe.Layers.of(model.cross_attention()), []
    for seeds in ((10, 20), (100, 150), (200, 250)):
        victim = Victim(model, model, cpe.merge([one(layers, seed) for seed in seeds]))
        found = attack("embeddings", victim, steps=30)
        left.append(found.after / found.before)
    # Measured for ten such pairs: 0.15 % to 1.55 %, median 0.35 %; more steps change none.
    assert max(left) < 0.02
    assert sorted(left)[1] < 0.01


# --- Text encoder and U-Net --------------------------------------------------------------------------------------


def test_embedded_words_are_read_as_tokens(model: weights.Model) -> None:
    table = model.text_encoder.text_model.embeddings.token_embedding.weight
    X = table[model.tokenizer.ids(TARGET)]
    templates = [*TEMPLATES, "{}", "a {}, noto style"]
    E, other = searches.learned_contexts(model, templates, torch.stack([X, 0 * X]))
    torch.testing.assert_close(E, model.encode(filled(templates, [TARGET])))
    assert all(not torch.equal(*pair) for pair in zip(E, other, strict=True))


def test_more_words_than_the_encoder_reads(model: weights.Model) -> None:
    assert searches.embed(model, "{} cat", torch.zeros(1, 74, 16)).shape == (1, 77, 16)
    with pytest.raises(ValueError, match="longer"):
        searches.embed(model, "{} cat", torch.zeros(1, 75, 16))


def test_samples_are_noised_pictures_of_every_noise_level(model: weights.Model) -> None:
    images = random(3, 4, 4, 4)
    samples = searches.sampled(model, images, 5, torch.Generator().manual_seed(0))
    assert [t // 200 for t in samples.timesteps.tolist()] == [0, 1, 2, 3, 4]
    a = model.schedule.alphas_cumprod[samples.timesteps].view(-1, 1, 1, 1)
    clean = (samples.latents - (1 - a).sqrt() * samples.noise) / a.sqrt()
    # at the last timesteps hardly anything is left of the picture
    assert torch.cdist(clean.flatten(1), images.flatten(1)).amin(dim=1).max() < 1e-3


def test_noise_loss_is_its_formula(victims: dict[str, Victim]) -> None:
    victim = victims["resag"]
    samples = searches.sampled(victim.original, random(2, 4, 4, 4), 3, torch.Generator().manual_seed(0))
    contexts = random(2, 2, 77, 16)  # two candidates, two prompts
    with torch.no_grad():
        losses = searches.noise_loss(victim, samples, contexts)
        for b, loss in enumerate(losses):
            errors = []
            for s, prompt in enumerate([0, 1, 0]):
                one = slice(s, s + 1)
                noise = victim.noise(samples.latents[one], samples.timesteps[one], contexts[b, prompt][None])
                errors.append((noise - samples.noise[one]).square().mean())
            torch.testing.assert_close(loss, sum(errors) / 3)


def plant(monkeypatch: pytest.MonkeyPatch, victim: Victim, contexts: Tensor) -> None:
    """Samples whose noise is what the victim predicts for hidden contexts [P, T, d]: a loss of 0 is within reach.

    With true noise most of the loss is beyond any attack, and that an attack does something would hardly show.
    """
    draw = searches.sampled

    def planted(model: weights.Model, images: Tensor, count: int, generator: torch.Generator) -> searches.Samples:
        samples = draw(model, images, count, generator)
        rows = contexts[torch.arange(count) % len(contexts)]
        with torch.no_grad():
            return replace(samples, noise=victim.noise(samples.latents, samples.timesteps, rows))

    monkeypatch.setattr(searches, "sampled", planted)


@pytest.mark.parametrize("kind", ERASED)
def test_textual_inversion_finds_hidden_words(
    kind: str, victims: dict[str, Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = victims[kind]
    tokenizer = victim.original.tokenizer
    hidden = victim.original.encode(filled(TEMPLATES, ["green apple"]))
    plant(monkeypatch, victim, hidden)
    found = attack("inversion", victim, steps=15)
    assert found.after < 0.1 * found.before
    words = " ".join(f"<{i + 1}>" for i in range(len(tokenizer.ids(TARGET))))
    assert found.prompts == filled(TEMPLATES, [words])


# --- Words -------------------------------------------------------------------------------------------------------


def test_whole_words_can_be_typed(model: weights.Model) -> None:
    tokenizer = model.tokenizer
    words = searches.whole_words(tokenizer)
    assert tokenizer.ids("heart")[0] in words
    assert not {tokenizer.bos, tokenizer.eos} & set(words)
    text = [tokenizer.bpe.id_to_token(i).removesuffix("</w>") for i in words]
    assert tokenizer.ids(" ".join(text)) == words


def test_swaps_change_one_token_for_the_better() -> None:
    """On a loss that is linear in the embeddings the promise is kept: the best single swap is among those drawn."""
    table, gradient, words = random(50, 6), random(4, 6, seed=1), torch.arange(10, 50)
    ids = torch.tensor([10, 11, 12, 13])
    swapped = searches.swaps(gradient, table, words, ids, 8, torch.Generator().manual_seed(0))
    assert swapped.shape == (8, 4)
    changed = swapped != ids
    assert (changed.sum(dim=1) <= 1).all()  # a place may be given what it has
    assert torch.isin(swapped, words).all()
    loss = (table[swapped] * gradient).sum(dim=(1, 2)) - (table[ids] * gradient).sum()
    anything = ((table[words] @ gradient.T) - (table[ids] * gradient).sum(dim=1)).mean()
    assert loss.mean() < anything - 1


@pytest.mark.parametrize("kind", ERASED)
def test_learned_tokens_are_a_prompt(kind: str, victims: dict[str, Victim]) -> None:
    victim = victims[kind]
    tokenizer = victim.original.tokenizer
    found = attack("tokens", victim)
    assert torch.equal(found.contexts, victim.original.encode(found.prompts))
    for prompt, plain in zip(found.prompts, filled(TEMPLATES, [TARGET]), strict=True):
        prefix = prompt.removesuffix(f" {plain}")
        ids = tokenizer.ids(prompt)
        assert ids == [*tokenizer.ids(prefix), *tokenizer.ids(plain)]
        assert len(tokenizer.ids(prefix)) == 5
        assert set(tokenizer.ids(prefix)) <= set(searches.whole_words(tokenizer))
    # The loss that was reported is that of what was typed.
    generator = torch.Generator().manual_seed(0)
    _, samples = searches.drawn_samples(victim.original, filled(TEMPLATES, [TARGET]), 6, 2, 2, generator)
    with torch.no_grad():
        loss = searches.noise_loss(victim, samples, found.contexts[None]).item()
        assert found.after == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("kind", ERASED)
def test_learned_tokens_near_a_hidden_prefix(
    kind: str, victims: dict[str, Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = victims[kind]
    plain = filled(TEMPLATES, [TARGET])
    hidden = victim.original.encode([f"purple pizza avocado unicorn water {prompt}" for prompt in plain])
    plant(monkeypatch, victim, hidden)
    found = attack("tokens", victim, steps=10)
    assert found.after < 0.2 * found.before


def test_p4d_aims_at_what_the_original_predicts_under_the_target(victims: dict[str, Victim]) -> None:
    found = attack("P4D", victims["nothing"])
    assert found.before == 0  # the plain prompts are the goal, where nothing is erased
    assert found.after > 0
    for kind in ERASED:
        victim = victims[kind]
        found = attack("P4D", victim, steps=10)
        assert found.after < attack("P4D", victim, steps=1).after
        assert torch.equal(found.contexts, victim.original.encode(found.prompts))
        assert {len(victim.original.tokenizer.ids(prompt)) for prompt in found.prompts} == {8}


def test_ring_a_bell_finds_words_in_the_concepts_direction(victims: dict[str, Victim]) -> None:
    victim = victims["resag"]
    found, short = attack("Ring-A-Bell", victim, steps=20), attack("Ring-A-Bell", victim, steps=1)
    assert found.after < short.after
    assert found.prompts == [found.prompts[0]] * len(TEMPLATES)
    encode = victim.original.encode
    direction = (encode(filled(searches.PAIRS, [TARGET])) - encode(filled(searches.PAIRS, ["thing"]))).mean(dim=0)
    base = encode(filled(TEMPLATES, ["thing"]))
    # |clip(found) - (clip(prompt) + 3 c)|^2 / |clip(prompt)|^2
    loss = (encode(found.prompts) - base - 3 * direction).square().sum() / base.square().sum()
    assert found.after == pytest.approx(loss.item(), rel=1e-4)
    # It never sees the erased U-Net: of all victims with one text encoder it finds the same.
    assert attack("Ring-A-Bell", victims["edited"], steps=20).prompts == found.prompts
