"""With their defaults, erasers are their authors' code: against published.py, plain loops, all in float64."""

import copy
import inspect
from itertools import pairwise

import published
import pytest
import torch
from tiny import normal
from torch import Tensor

import sampler
from erasers import ERASERS, PUBLISHED, mace, speed
from erasers.esd import esd_steps
from weights import Model

ONE = (["cat"], ["an object"])
THREE = (["cat", "red heart", "dog face"], ["an object", " ", "dog"])
KEPT = ["a dog", "red apple", "picture of a heart"]
PHOTOS = ["a photo of {}", "{} on white"]


def distance(model: Model, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Frobenius distance of two edits, as a share of their size; they change the same tensors."""
    W = published.weights_of(model)
    assert ours.keys() == theirs.keys()
    apart = sum((ours[key] - V).square().sum() for key, V in theirs.items())
    return (apart / sum((W[key] - V).square().sum() for key, V in theirs.items())).sqrt().item()


def run(name: str, model: Model, case: tuple[list[str], list[str]], kept: list[str], **settings) -> dict[str, Tensor]:
    """An eraser as published."""
    return ERASERS[name.split(",")[0]](model, *case, kept, 0, **{**PUBLISHED.get(name, {}), **settings})


@pytest.mark.parametrize("kept", [[], KEPT], ids=["alone", "kept"])
@pytest.mark.parametrize("case", [ONE, THREE], ids=["one", "three"])
def test_uce_and_rece(case: tuple, kept: list[str], exact: Model) -> None:
    assert distance(exact, run("uce", exact, case, kept), published.uce(exact, *case, kept)) < 1e-9
    assert distance(exact, run("uce, 2023", exact, case, kept), published.uce_2023(exact, *case, kept)) < 1e-9
    assert distance(exact, run("rece", exact, case, kept), published.rece(exact, *case, kept)) < 1e-7
    theirs = published.rece(exact, *case, kept, rounds=1, rho=1e-3, start=0.1)
    assert distance(exact, run("rece, style", exact, case, kept), theirs) < 1e-6  # sum W^T W is nearly singular


@pytest.mark.parametrize("kept", [[], [f"a {word}" for word in ["dog", "cow", "fox", "owl", "bat", "ant", "bee"]] * 40])
@pytest.mark.parametrize("name", ["speed", "speed, many"])
def test_speed(name: str, kept: list[str], exact: Model) -> None:
    """210 prompts: two chunks. In the tiny model some layers are narrower than the context, some are not."""
    widths = {W.shape[0] < W.shape[1] for W in published.weights_of(exact, ("to_v",)).values()}
    assert widths == {True, False}
    chance = torch.Generator().manual_seed(0)
    empty = exact.encode([""])[0]
    centres = speed.centroids(empty[1:], 3, chance)
    order = torch.randperm(len(kept) or 76, generator=chance)
    # Where '' itself must stay there is no room for an edit, unless little of it counts.
    threshold = 1e-3 if kept else 3.0
    settings = {"rho": 0.05, "prefilter": False} if "many" in name else {}
    noise = lambda n: torch.randn(n, generator=chance, dtype=torch.float64)  # noqa: E731
    theirs = published.speed(exact, *THREE, kept, centres, order, noise, threshold=threshold, **settings)
    assert distance(exact, run(name, exact, THREE, kept, threshold=threshold), theirs) < 1e-6


@pytest.mark.parametrize("kind", ["bird", "ship", "person"])
def test_mace_around_its_training(kind: str, exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refined and fused as theirs, with what training would have found put in its place."""
    W, loras = published.weights_of(exact), {}

    def trained(model: Model, target: str, templates, refined, change, *_, **__) -> list[float]:
        for seed, (key, (up, down)) in enumerate(change.items()):
            loras.setdefault(target, {})[key] = normal(len(W[key]), 1, seed=seed), normal(1, W[key].shape[1], seed=seed)
            with torch.no_grad():
                up.copy_(loras[target][key][0])
                down.copy_(loras[target][key][1])
        return []

    monkeypatch.setattr(mace, "unseeing_steps", trained)
    ours = run(f"mace, {kind}", exact, THREE, KEPT, templates=PHOTOS)
    lam, keep = {"bird": (10, 0), "ship": (1000, 0), "person": (0, 8)}[kind]
    theirs = published.mace(exact, *THREE, KEPT, PHOTOS, lam, keep, loras)
    assert distance(exact, ours, theirs) < 1e-6


# lamb, learning rate, steps, importance sampling, fuse_preserve_scale, preserve_weight
MACE_CONFIGS = {
    "bird": (10, 1e-5, 50, True, 0, 0), "automobile": (100, 1e-5, 50, True, 0, 0), "ship": (1e3, 1e-5, 50, True, 0, 0),
    "person": (0, 1e-4, 50, True, 1e-4, 8e4), "style": (0, 1e-4, 50, True, 1e-4, 8e4),
    "explicit": (0, 1e-5, 120, False, 7e-7, 0),
}  # fmt: skip


def numbers(*functions) -> dict:
    """The defaults of functions."""
    parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("kind", MACE_CONFIGS)
def test_mace_has_the_numbers_of_its_configs(kind: str) -> None:
    """Their caches weigh scale (captions + weight names)."""
    s = numbers(mace.mace, mace.unseeing_steps) | PUBLISHED.get(f"mace, {kind}", {})
    lamb, lr, steps, focal, scale, weight = MACE_CONFIGS[kind]
    assert (s["lam"], s["lr"], s["steps"], s["focal"]) == (lamb, lr, steps, focal)
    assert (s["caption_weight"], s["keep"]) == pytest.approx((scale, scale * weight))
    assert (s["images"], s["sampling_steps"], s["masked"]) == (8, 30, kind != "style")


def test_the_others_have_the_numbers_of_their_command_lines() -> None:
    s = numbers(ERASERS["speed"])  # aug_num, threshold, retain_scale; disable_filter is off
    assert (s["augment"], s["threshold"], s["rho"], s["prefilter"]) == (10, 0.1, 1, True)
    s = numbers(esd_steps)  # iterations, lr, guidance_scale, num_inference_steps; negative_guidance = 2
    assert (s["steps"], s["lr"], s["guidance"], s["sampling_steps"], s["negative"] + 1) == (200, 5e-5, 3, 50, 2)
    s = numbers(ERASERS["rece"])  # train.py: epochs, regular_scale, lamb, preserve_scale
    assert (s["rounds"], s["rho"], s["lam"], s["s_p"]) == (3, 0.1, 0.1, 0.1)
    assert (PUBLISHED["rece, object"], PUBLISHED["rece, style"]["rounds"]) == ({"rounds": 1}, 1)
    kinds = {f"mace, {kind}" for kind in MACE_CONFIGS if kind != "bird"}
    assert PUBLISHED.keys() == {"uce, 2023", "rece, object", "rece, style", "speed, many"} | kinds


def test_mace_pairs_words_by_common_prefix_and_suffix() -> None:
    rows = [[9, 1, 2, 3, 8], [9, 1, 2, 8], [9, 3, 8], [9, 8], [9, 3, 1, 3, 8], [9, 3, 3, 8]]
    for old in rows:
        for new in rows:
            assert mace.shared(old, new, 77) == published.alike(old, new)


def test_mace_training(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps: sum of norms of attention to name, EOS and padding in the mask, clipped to 1, AdamW."""
    finals, mask = normal(2, 4, 4, 4), torch.zeros(2, 4, 4).double()
    mask[:, 1:, :3] = 1
    monkeypatch.setattr(mace, "trajectories", lambda *_: finals[None])
    monkeypatch.setattr(mace, "own_masks", lambda *_: mask)
    base = published.weights_of(exact)
    change = mace.new_change(base, torch.Generator().manual_seed(1))
    for _, down in change.values():
        down.data *= 100  # steep enough to be clipped
    theirs = {key: tuple(x.detach().clone().requires_grad_() for x in pair) for key, pair in change.items()}
    chance, learned = torch.Generator().manual_seed(0), [x for pair in theirs.values() for x in pair]
    optimizer, expected, order = torch.optim.AdamW(learned, lr=0.1), [], []
    t = torch.arange(1000).double()
    focal = 1 / (1 + torch.exp(-0.05 * (t - 200))) - 1 / (1 + torch.exp(-0.05 * (t - 400)))
    for step in range(3):
        order = order or torch.randperm(2, generator=chance).tolist()
        i, j = order.pop(), torch.randint(2, (1,), generator=chance).item()
        time = torch.multinomial(focal.float(), 1, generator=chance)
        noise = torch.randn(1, 4, 4, 4, generator=chance).double()
        a = exact.schedule.alphas_cumprod[time].double()
        x = a**0.5 * finals[i : i + 1] + (1 - a) ** 0.5 * noise
        prompt = PHOTOS[j].replace("{}", "red heart")
        edited = {key: base[key] + up @ down for key, (up, down) in theirs.items()}
        maps = [A[0] for A in mace.attention_maps(exact.unet, edited, x, time, exact.encode([prompt]))]
        words = exact.tokenizer
        loss = published.mace_loss(maps, words([prompt])[0].tolist(), words.ids("red heart"), words.eos, mask[i])
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)  # no attention follows the last V
        norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
        for W, g in zip(learned, gradients, strict=True):
            W.grad = None if g is None else g / max(norm + 1e-6, 1)
        optimizer.step()
        expected.append(loss.item())
        assert step or norm > 1  # there is something to clip
    ours = mace.unseeing_steps(
        exact, "red heart", PHOTOS, base, change, torch.Generator().manual_seed(0), steps=3, lr=0.1, images=2
    )
    assert list(ours) == pytest.approx(expected, rel=1e-6)  # add_noise has its a_t in float32
    for key, pair in change.items():
        torch.testing.assert_close(pair[0] @ pair[1], theirs[key][0] @ theirs[key][1], rtol=1e-4, atol=1e-6)


def test_esd_x_learns_the_opposite_of_the_concept_on_its_guided_trajectory(exact: Model) -> None:
    """|eps(x_t, c) - [eps0_c - 2 (eps0_c - eps0_'')]|^2, x_t from sampling c at guidance 3, t any but the end."""
    trained = {key: 1.1 * W for key, W in exact.unet.state_dict().items() if ".attn2." in key}
    student = copy.deepcopy(exact.unet)
    student.load_state_dict(exact.unet.state_dict() | trained)
    c, empty = exact.encode(["cat"]), exact.encode([""])
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    kv, expected = exact.unet.keys_values(torch.cat([empty, c])), []
    path = [x, *sampler.sample(exact.unet, exact.schedule, x, kv, 2, 3.0)]
    with torch.no_grad():
        for (x_t, _), t in zip(pairwise(path), exact.schedule.timesteps(2), strict=True):
            eps, eps_c, eps_0 = (
                unet(x_t, t, unet.keys_values(E)) for unet, E in ((student, c), (exact.unet, c), (exact.unet, empty))
            )
            expected.append((eps - (eps_c - 2 * (eps_c - eps_0))).square().mean().item())
    losses = list(esd_steps(exact, ["cat"], trained, 0, steps=8, lr=0.0, images=1, sampling_steps=2))
    assert sorted(expected) == pytest.approx([min(losses), max(losses)], rel=1e-9)  # each step draws its t
