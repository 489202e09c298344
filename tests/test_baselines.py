"""The linear erasers: every closed form is the optimum it claims to be, every training lowers its loss."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import normal
from torch import Tensor

import baselines
import cpe
import sampler
import weights
from baselines import ERASERS

TARGETS, SURROGATE, KEPT = ["cat"], "an object", ["a dog", "red apple", "picture of a heart"]
RECIPE = replace(
    cpe.PRESETS["object"], lam=1e2, stages=2, first_steps=10, later_steps=5, attack_steps=3, deltas=2, anchors=4,
    first_lr=1e-2, later_lr=1e-3,
)  # fmt: skip
# What makes the trained erasers quick enough for a test.
QUICK = {
    "lora": {"recipe": RECIPE, "templates": ["{}", "a {}"]},
    "esd": {"steps": 2, "images": 2, "sampling_steps": 2},
    "mace": {"steps": 2, "images": 2, "sampling_steps": 2, "keep": 0.1},
}


@pytest.fixture(scope="module")
def model(tiny_original: Path) -> weights.Model:
    """The tiny model, never changed."""
    return weights.load_model(tiny_original)


def erase(name: str, model: weights.Model, targets: list[str] = TARGETS, seed: int = 0, **options) -> dict[str, Tensor]:
    """An eraser run with what makes it quick."""
    return ERASERS[name](model, targets, SURROGATE, KEPT, seed, **{**QUICK.get(name, {}), **options})


def last_tokens(model: weights.Model, prompts: list[str]) -> Tensor:
    """Embedding [B, d] of the last token before EOS of every prompt; of '' it is BOS."""
    return torch.stack([tail[0] for tail in baselines.tails(model, prompts)])


def assert_minimum(objective: Callable[[Tensor], Tensor], solution: Tensor) -> None:
    """The gradient of an objective vanishes at the solution, and every step away from it is worse."""
    x = solution.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x), x)
    (elsewhere,) = torch.autograd.grad(objective(x + 1), x)
    assert gradient.norm() < 1e-9 * elsewhere.norm()
    for seed in range(5):
        assert objective(solution + 1e-2 * normal(*solution.shape, seed=seed)) > objective(solution)


# --- Every eraser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ERASERS)
def test_edits_cross_attention_only_and_repeatably(name: str, model: weights.Model) -> None:
    before = {key: W.clone() for key, W in model.unet.state_dict().items()}
    edited = erase(name, model, ["cat", "dog"])
    read = {"speed": ("to_v",), "esd": ("to_q", "to_k", "to_v", "to_out")}.get(name, ("to_k", "to_v"))
    assert edited.keys() == {key for key in before if any(f".attn2.{kind}." in key for kind in read)}
    for key, W in edited.items():
        assert (W.shape, W.dtype, W.requires_grad) == (before[key].shape, torch.float32, False)
        assert W.isfinite().all()
    assert any(not torch.equal(W, before[key]) for key, W in edited.items())
    again = erase(name, model, ["cat", "dog"])
    assert all(torch.equal(W, again[key]) for key, W in edited.items())
    # The model itself is left as it was.
    assert all(torch.equal(W, before[key]) for key, W in model.unet.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "esd", "mace"])
def test_training_depends_on_its_seed(name: str, model: weights.Model) -> None:
    first, second = erase(name, model, seed=0), erase(name, model, seed=1)
    assert any(not torch.equal(W, second[key]) for key, W in first.items())


@pytest.mark.parametrize("name", ERASERS)
def test_nothing_to_preserve(name: str, model: weights.Model) -> None:
    edited = ERASERS[name](model, TARGETS, SURROGATE, [], **QUICK.get(name, {}))
    assert all(W.isfinite().all() for W in edited.values())


def test_edited_weights_make_a_plain_unet(model: weights.Model, tmp_path: Path) -> None:
    edited = erase("uce", model)
    weights.save_model(model, tmp_path / "erased", unet=model.unet.state_dict() | edited)
    erased = weights.load_model(tmp_path / "erased")
    assert all(torch.equal(erased.unet.state_dict()[key], W) for key, W in edited.items())


# --- Closed forms ------------------------------------------------------------------------------------------------


def test_refit_is_the_optimum() -> None:
    W, X, Y = normal(5, 8), normal(6, 8, seed=1), normal(6, 5, seed=2)
    V = baselines.refit(W, Y.T @ X, X.T @ X, 0.3)
    assert_minimum(lambda V: (X @ V.T - Y).square().sum() + 0.3 * (V - W).square().sum(), V)


def test_move_is_the_optimum_of_uce() -> None:
    W, C, G, P = normal(5, 8), normal(3, 8, seed=1), normal(3, 8, seed=2), normal(4, 8, seed=3)

    def objective(V: Tensor) -> Tensor:
        erased, kept = C @ V.T - G @ W.T, P @ (V - W).T
        return 2.0 * erased.square().sum() + 0.7 * kept.square().sum() + 0.5 * (V - W).square().sum()

    assert_minimum(objective, baselines.move({"W": W}, C, G, P.T @ P, 0.5, 2.0, 0.7)["W"])


def test_last_tokens_stand_before_eos(model: weights.Model) -> None:
    prompts = ["cat", "a picture of a heart", ""]
    rows = last_tokens(model, prompts)
    ids, E = model.tokenizer(prompts), model.encode(prompts).double()
    for i, row in enumerate(rows):
        first_eos = (ids[i] == model.tokenizer.eos).nonzero()[0].item()
        assert torch.equal(row, E[i, first_eos - 1])


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_uce_moves_the_target_to_the_surrogate_or_beyond(eta: float, model: weights.Model) -> None:
    edited = erase("uce", model, lam=1e-6, eta=eta)
    c, g = last_tokens(model, TARGETS), last_tokens(model, [SURROGATE])
    p = last_tokens(model, KEPT)
    for key, W in baselines.projections(model).items():
        V = edited[key].double()
        torch.testing.assert_close(V @ c.T, W @ (c + (1 + eta) * (g - c)).T, rtol=0, atol=1e-4)
        torch.testing.assert_close(V @ p.T, W @ p.T, rtol=0, atol=1e-4)


def test_uce_with_padding_moves_all_that_has_seen_the_target(model: weights.Model) -> None:
    edited, last = erase("uce", model, padding=True), erase("uce", model)
    C, G = baselines.paired_tails(model, TARGETS, SURROGATE, None, eta=0.0)
    ids = model.tokenizer.ids
    assert len(C) == len(G) == 77 - max(len(ids("cat")), len(ids(SURROGATE)))
    for key, W in baselines.projections(model).items():
        assert (C @ edited[key].double().T - G @ W.T).norm() < (C @ last[key].double().T - G @ W.T).norm()


def test_uce_keeps_what_weighs_enough(model: weights.Model) -> None:
    p = last_tokens(model, KEPT)
    loose, tight = erase("uce", model, s_p=0.0), erase("uce", model, s_p=1e9)
    for key, W in baselines.projections(model).items():
        moved = (p @ (tight[key].double() - W).T).norm()
        assert moved < 1e-5
        assert moved < 0.01 * (p @ (loose[key].double() - W).T).norm()


def test_revival_is_the_optimum() -> None:
    original = {"a": normal(5, 8), "b": normal(6, 8, seed=1)}
    edited = {"a": normal(5, 8, seed=2), "b": normal(6, 8, seed=3)}
    C = normal(4, 8, seed=4)

    def objective(X: Tensor) -> Tensor:
        misfit = sum((X @ edited[key].T - C @ W.T).square().sum() for key, W in original.items())
        return misfit + 0.1 * X.square().sum()

    assert_minimum(objective, baselines.revive(original, edited, C, 0.1))


def test_rece_leaves_less_to_revive_than_uce(model: weights.Model) -> None:
    original = baselines.projections(model)
    C = baselines.encode(model, TARGETS)[0]

    def left(edited: dict[str, Tensor]) -> float:
        """How near the best revival comes to what the target was."""
        edited = {key: W.double() for key, W in edited.items()}
        X = baselines.revive(original, edited, C, 0.1)
        return sum((X @ edited[key].T - C @ W.T).square().sum() for key, W in original.items()).item()

    assert left(erase("rece", model)) > left(erase("uce", model, lam=0.1, s_p=0.1))


def test_rece_without_rounds_is_uce(model: weights.Model) -> None:
    one, other = erase("rece", model, rounds=0), erase("uce", model, lam=0.1, s_p=0.1)
    assert all(torch.equal(W, other[key]) for key, W in one.items())


def test_a_round_of_rece_moves_what_revives_the_target_and_keeps_the_empty_prompt(model: weights.Model) -> None:
    """The target's T tokens C become C + (1 + eta) (G - C); what stays are last tokens, and all tokens of ''."""
    begun, edited = erase("uce", model, lam=0.1, s_p=0.1, eta=0.5), erase("rece", model, rounds=1, eta=0.5)
    C, G, empty = baselines.encode(model, [*TARGETS, SURROGATE, ""])
    goal, P = C + 1.5 * (G - C), torch.cat([last_tokens(model, KEPT), empty])
    W, V = baselines.projections(model), {key: x.double() for key, x in begun.items()}
    I = torch.eye(C.shape[1]).double()
    # C' = C A^T,   A = (rho I + sum V^T V)^-1 (sum V^T W)
    A = torch.linalg.inv(0.1 * I + sum(x.T @ x for x in V.values())) @ sum(V[key].T @ W[key] for key in W)
    found = C @ A.T
    moved = 0.1 * I + goal.T @ found + 0.1 * P.T @ P
    solved = moved @ torch.linalg.inv(0.1 * I + found.T @ found + 0.1 * P.T @ P)
    for key, x in V.items():
        torch.testing.assert_close(edited[key], (x @ solved).float(), rtol=0, atol=1e-4)


# --- SPEED -------------------------------------------------------------------------------------------------------


def speed_parts() -> tuple[Tensor, ...]:
    """W, C, G, R, C2 in 12 dimensions: 2 tokens to erase, 5 that stay, 3 that must stay exactly."""
    return tuple(normal(n, 12, seed=seed) for seed, n in enumerate((6, 2, 2, 5, 3)))


def test_null_edit_is_blind_to_what_stays() -> None:
    W, C, G, R, C2 = speed_parts()
    V = baselines.null_edit(W, G.T @ C / 2, C.T @ C / 2, R, C2, threshold=1e-9)
    torch.testing.assert_close(R @ V.T, R @ W.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(C2 @ V.T, C2 @ W.T, rtol=0, atol=1e-10)
    assert (C @ V.T - G @ W.T).norm() < (C @ W.T - G @ W.T).norm()


def test_null_edit_is_the_optimum() -> None:
    W, C, G, R, C2 = speed_parts()
    V = baselines.null_edit(W, G.T @ C / 2, C.T @ C / 2, R, C2, rho=0.2, threshold=1e-9)
    # An orthonormal basis of all that R and C2 are blind to: Delta = Y B for any Y.
    B = torch.linalg.svd(torch.cat([R, C2]))[2][8:]

    def objective(Y: Tensor) -> Tensor:
        return (C @ (W + Y @ B).T - G @ W.T).square().sum() / 2 + 0.2 * Y.square().sum()

    torch.testing.assert_close((V - W) @ B.T @ B, V - W)
    assert_minimum(objective, (V - W) @ B.T)


def test_null_edit_where_all_must_stay() -> None:
    W, C, G, R, _ = speed_parts()
    everything = normal(40, 12, seed=20)
    assert torch.equal(baselines.null_edit(W, G.T @ C, C.T @ C, everything, R), W)
    # Rows of C2 inside R's span make a singular system.
    V = baselines.null_edit(W, G.T @ C, C.T @ C, R, R[:2], threshold=1e-9)
    torch.testing.assert_close(R @ V.T, R @ W.T, rtol=0, atol=1e-9)


def test_speed_keeps_preserved_prompts(model: weights.Model) -> None:
    edited = erase("speed", model, augment=0, threshold=1e-9)
    p = last_tokens(model, [*KEPT, ""])
    c = last_tokens(model, TARGETS)
    for key, W in baselines.projections(model, ["to_v"]).items():
        V = edited[key].double()
        torch.testing.assert_close(p @ V.T, p @ W.T, rtol=0, atol=1e-5)
        assert (c @ (V - W).T).norm() > 1e-3


def test_speed_is_its_formula_in_means_over_tokens(model: weights.Model) -> None:
    targets = ["cat", "red heart"]
    C, G, R = last_tokens(model, targets), last_tokens(model, [SURROGATE] * 2), last_tokens(model, KEPT)
    E = baselines.encode(model, [""])[0]
    C2 = torch.cat([E[:1], baselines.centroids(E[1:], 3, torch.Generator().manual_seed(0))])
    T, A = ((x.T @ C) / 2 for x in (C, C + 1.5 * (G - C)))
    values, vectors = torch.linalg.eigh(R.T @ R / 3)
    threshold = 1.5 * values[-3].item()  # the least of those that are not zero
    U, I = vectors[:, values < threshold], torch.eye(C.shape[1]).double()
    P = U @ U.T
    M = torch.linalg.inv(T @ P + 0.3 * I)
    Q = I - M @ C2.T @ torch.linalg.inv(C2 @ P @ M @ C2.T + 0.2 * torch.eye(4)) @ C2 @ P
    edited = erase("speed", model, targets, augment=0, rho=0.3, mu=0.2, threshold=threshold, eta=0.5)
    for key, W in baselines.projections(model, ["to_v"]).items():
        torch.testing.assert_close(edited[key], (W + W @ (A - T) @ P @ Q @ M).float(), rtol=0, atol=1e-4)


def test_influential_tokens_mean_what_they_meant() -> None:
    W = torch.cat([normal(6, 7), torch.zeros(6, 1, dtype=torch.float64)], dim=1)  # does not read the last coordinate
    kept, erase = normal(10, 8, seed=1), normal(6, 8, seed=2)
    R = baselines.influential(W, kept, erase, 3, torch.Generator().manual_seed(0))
    influence = (kept @ erase.T).norm(dim=1)
    chosen = kept[influence >= influence.mean()]
    assert torch.equal(R[: len(chosen)], chosen)
    assert 0 < len(R) - len(chosen) < 3 * len(chosen)
    assert torch.cdist(R @ W.T, chosen @ W.T).amin(dim=1).max() < 1e-6


def test_centroids_find_clusters() -> None:
    x = torch.cat([normal(10, 2, seed=i) / 100 + offset for i, offset in enumerate((0.0, 5.0, 9.0))])
    centres = baselines.centroids(x, 3, torch.Generator().manual_seed(3)).mean(1).sort().values
    torch.testing.assert_close(centres, torch.tensor([0.0, 5.0, 9.0]).double(), rtol=0, atol=0.05)


# --- Trained erasers ---------------------------------------------------------------------------------------------


def test_lora_lowers_its_loss(model: weights.Model) -> None:
    trainer = baselines.lora_trainer(
        model, TARGETS, SURROGATE, KEPT, 0, replace(RECIPE, lam=1.0, first_steps=60), ["{}"]
    )
    losses = [step.losses["erase"] for step in trainer.steps() if step.stage == 1 and step.kind == "erase"]
    assert losses[-1] < 0.9 * losses[0]


def test_lora_has_rank_k_per_target_and_the_scale_of_one(model: weights.Model) -> None:
    for k, rank in ((3, 6), (10, 16)):  # 16: the width of the context
        lora = baselines.lora_trainer(model, ["cat", "dog"], SURROGATE, KEPT, 0, replace(RECIPE, k=k), ["{}"]).core
        assert lora.k == rank
        assert lora.scale.item() == pytest.approx(1 / k)


def test_folded_lora_is_its_corrections(model: weights.Model) -> None:
    names = {key.removesuffix(".weight"): W for key, W in baselines.projections(model).items()}
    d = next(iter(names.values())).shape[1]
    lora = baselines.LoRA({name: len(W) for name, W in names.items()}, d, r=1, k=3, alpha=2.0).double()
    with torch.no_grad():
        lora.lora_down.copy_(normal(*lora.lora_down.shape))
        lora.lora_up.copy_(normal(*lora.lora_up.shape, seed=1))
        E = normal(2, 7, d, seed=2)
        changed = lora(E, {name: E @ W.T for name, W in names.items()})
    folded = lora.fold(baselines.projections(model))
    for name, expected in changed.items():
        torch.testing.assert_close(E @ folded[f"{name}.weight"].T, expected)


def test_lora_matches_a_gate_held_open(model: weights.Model) -> None:
    """Same losses: an anchor's penalty equals the mean square of what the weights changed, weighted by layer."""
    trainer = baselines.lora_trainer(model, TARGETS, SURROGATE, KEPT, 0, RECIPE, ["{}"])
    objective, lora = trainer.objective, trainer.core
    with torch.no_grad():
        lora.lora_up.copy_(normal(*lora.lora_up.shape))
        E, x = trainer.data.targets, trainer.shifts
        _, z = lora.read(E @ lora.columns())
        loss = cpe.residual(x, objective.energy(x), z, *objective.products(lora)).mean()
    folded = lora.fold(baselines.projections(model))
    written = 0.0
    for name, W in objective.W.items():
        change = folded[f"{name}.weight"].float() - W
        written += objective.a[name] * (x @ W.T - E @ change.T).square().mean() / len(objective.W)
    torch.testing.assert_close(loss, written, rtol=1e-4, atol=0)


def test_esd_lowers_its_loss(model: weights.Model) -> None:
    state = model.unet.state_dict()
    trained = {key: W.clone() for key, W in state.items() if ".attn2." in key}
    losses = list(baselines.esd_steps(model, TARGETS, trained, 0, 24, 3e-3, 3.0, 1.0, images=1, sampling_steps=2))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_esd_learns_the_opposite_of_the_concept_on_its_guided_trajectory(model: weights.Model) -> None:
    """|eps(x_t, c) - [eps0(x_t, '') - 2 (eps0(x_t, c) - eps0(x_t, ''))]|^2, x_t from sampling c at guidance 3."""
    trained = {key: 1.1 * W for key, W in model.unet.state_dict().items() if ".attn2." in key}
    student = copy.deepcopy(model.unet)
    student.load_state_dict(model.unet.state_dict() | trained)
    c, empty = model.encode(TARGETS), model.encode([""])
    x, expected = normal(1, 4, 4, 4, dtype=torch.float32), []
    later = sampler.sample(model.unet, model.schedule, x, model.unet.keys_values(torch.cat([empty, c])), 2, 3.0)
    with torch.no_grad():
        for x_t, t in zip((x, next(later)), model.schedule.timesteps(2), strict=True):
            eps, eps_c, eps_0 = (
                unet(x_t, t, unet.keys_values(E)) for unet, E in ((student, c), (model.unet, c), (model.unet, empty))
            )
            expected.append((eps - (eps_0 - 2 * (eps_c - eps_0))).square().mean().item())
    losses = list(baselines.esd_steps(model, TARGETS, trained, 0, 8, 0.0, 3.0, 2.0, images=1, sampling_steps=2))
    assert (min(losses), max(losses)) == pytest.approx(tuple(sorted(expected)), rel=1e-4)  # each step draws its t


def test_predict_is_the_unet(model: weights.Model) -> None:
    E, x = model.encode(["cat"]), normal(1, 4, 4, 4).float()
    expected = model.unet(x, 500, model.unet.keys_values(E))
    assert torch.equal(baselines.predict(model.unet, {}, x, 500, E), expected)
    edited = erase("uce", model)
    assert not torch.equal(baselines.predict(model.unet, edited, x, 500, E), expected)


def test_targets_may_have_a_surrogate_each(model: weights.Model) -> None:
    targets, becoming = ["cat", "red heart"], ["a dog", "a tree"]
    edited = baselines.uce(model, targets, becoming, [], lam=1e-6)
    W = baselines.projections(model)
    C, G = last_tokens(model, targets), last_tokens(model, becoming)
    for key, V in edited.items():
        torch.testing.assert_close(C.float() @ V.T, (G @ W[key].T).float(), rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="2 surrogates for 1 targets"):
        baselines.uce(model, ["cat"], becoming, [])


@pytest.mark.parametrize("name", sorted(set(ERASERS) - {"esd"}))
def test_which_surrogate_is_whose_matters_to_every_eraser_that_has_one(name: str, model: weights.Model) -> None:
    def erased(surrogate: str | list[str]) -> dict[str, Tensor]:
        return ERASERS[name](model, ["cat", "red heart"], surrogate, KEPT, **QUICK.get(name, {}))

    one, each = erased(SURROGATE), erased([SURROGATE, SURROGATE])
    assert all(torch.equal(W, each[key]) for key, W in one.items())
    first, second = erased(["a dog", "a tree"]), erased(["a tree", "a dog"])
    assert any(not torch.equal(W, second[key]) for key, W in first.items())


def test_rece_and_speed_may_move_padding(model: weights.Model) -> None:
    plain, begun = erase("uce", model, lam=0.1, s_p=0.1, padding=True), erase("rece", model, rounds=0, padding=True)
    assert all(torch.equal(W, begun[key]) for key, W in plain.items())
    E, G = baselines.encode(model, [TARGETS[0], SURROGATE])
    kinds = {padding: erase("speed", model, augment=0, threshold=1e9, rho=1e-6, padding=padding) for padding in (0, 1)}
    for key, W in baselines.projections(model, ["to_v"]).items():
        asked = (G[20:] @ W.T).float()  # all of it padding
        missed = [(E[20:].float() @ edited[key].T - asked).norm() for edited in kinds.values()]
        assert missed[1] < missed[0]


# --- MACE --------------------------------------------------------------------------------------------------------


def test_tokens_around_a_concept(model: weights.Model) -> None:
    ((old, new),) = baselines.around(model, ["a photo of {} on white"], "cat", "red heart")
    E_old, E_new = baselines.encode(model, ["a photo of cat on white", "a photo of red heart on white"])
    ids = model.tokenizer.ids
    start, n_old, n_new = 1 + len(ids("a photo of")), len(ids("cat")), len(ids("red heart"))
    assert baselines.span(model, "a photo of {} on white", "cat") == (start, start + n_old)
    assert len(old) == len(new) == 77 - max(n_old, n_new)
    # one prompt at a time, or two: kernels may round otherwise, by 1e-7; tokens beside these differ by 0.1 and more
    for part, E, n in ((old, E_old, n_old), (new, E_new, n_new)):
        torch.testing.assert_close(part[start:], E[start + n :][: len(part) - start], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(old[:start], new[:start])  # a causal encoder has not seen the concept yet


def test_attention_maps_are_what_the_unet_attends_to(model: weights.Model) -> None:
    E, x = model.encode(["cat"]), normal(1, 4, 4, 4).float()
    seen = {}
    layer = next(iter(model.unet.cross_attentions().values()))
    hook = layer.to_out[0].register_forward_pre_hook(lambda _, inputs: seen.update(y=inputs[0]))
    maps = baselines.attention_maps(model.unet, {}, x, 300, E)
    hook.remove()
    V = layer.to_v(E).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    torch.testing.assert_close((maps[0] @ V).transpose(1, 2).flatten(-2), seen["y"], rtol=1e-4, atol=1e-5)
    assert len(maps) == len(model.unet.cross_attentions())


def test_mace_masks_and_loss(model: weights.Model) -> None:
    generator = torch.Generator().manual_seed(0)
    images = normal(3, 4, 4, 4).float()
    masks = baselines.own_masks(model, images, model.encode(["a cat"]), (2, 3), (200,), generator)
    assert masks.shape == (3, 4, 4)
    assert set(masks.flatten().tolist()) == {0.0, 1.0}
    base = baselines.plain(baselines.projections(model))
    change = baselines.new_change(base, generator)
    losses = list(baselines.unseeing_steps(model, "cat", base, change, generator, 24, 2e-2, 1, 2, "a photo of {}"))
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_mace_lowers_the_attention_to_the_concept_inside_its_mask(
    model: weights.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum of |A|^2 over the concept's tokens and the pixels that look at it most, a mean over heads and layers."""
    here = torch.zeros(4, 4)
    here[:2, 1:] = 1
    start, stop = baselines.span(model, "a photo of {}", "red heart")
    maps = [normal(1, 2, 16, 77, seed=seed).float().sigmoid() - here.view(16, 1) for seed in range(3)]
    for A in maps:
        A[..., start:stop] += 2 * here.view(16, 1)
        A.requires_grad_()
    monkeypatch.setattr(baselines, "attention_maps", lambda *_: maps)
    generator, E = torch.Generator().manual_seed(0), model.encode(["a photo of red heart"])
    mask = baselines.own_masks(model, normal(1, 4, 4, 4).float(), E, (start, stop), (200, 300), generator)
    assert torch.equal(mask[0], here)
    base = baselines.plain(baselines.projections(model))
    change = baselines.new_change(base, generator)
    (loss,) = baselines.unseeing_steps(model, "red heart", base, change, generator, 1, 1e-5, 1, 1, "a photo of {}")
    looked = torch.cat(maps)[:, :, here.flatten() == 1, start:stop].square().sum() / (3 * 2)
    assert loss == pytest.approx(looked.item(), rel=1e-5)


def test_mace_is_its_two_closed_forms_where_its_changes_are_zero(model: weights.Model) -> None:
    edited = erase("mace", model, steps=0, keep=0.3, lam=0.1, templates=["{}"], eta=0.5)
    ((old, new),) = baselines.around(model, ["{}"], "cat", SURROGATE)
    goal = old + 1.5 * (new - old)
    E, P = baselines.encode(model, TARGETS)[0], baselines.encode(model, KEPT).flatten(0, 1)
    near = 0.1 * torch.eye(E.shape[1]).double() + 0.3 * P.T @ P  # lam I + keep sum p p^T
    for key, W in baselines.projections(model).items():
        refined = W @ (near + goal.T @ old) @ torch.linalg.inv(near + old.T @ old)
        fused = (W @ near + refined @ E.T @ E) @ torch.linalg.inv(near + E.T @ E)
        torch.testing.assert_close(edited[key], fused.float(), rtol=0, atol=1e-4)


def test_mace_fuses_one_untrained_concept_into_its_refinement(model: weights.Model) -> None:
    """With lam -> 0 and one LoRA that is still zero, fusion returns the refined weights on the concept's prompts."""
    edited = erase("mace", model, steps=0, keep=0.0, lam=1e-9, templates=["{}"])
    ((old, new),) = baselines.around(model, ["{}"], "cat", SURROGATE)
    gram, cross = old.T @ old, new.T @ old
    E = baselines.encode(model, TARGETS)[0]
    for key, W in baselines.projections(model).items():
        refined = baselines.refit(W, W @ cross, gram, 1e-9)
        torch.testing.assert_close(E @ edited[key].double().T, E @ refined.T, rtol=0, atol=1e-4)


def test_focal_weights_peak_between_their_bounds() -> None:
    p = baselines.focal(1000)
    assert p.argmax().item() == 300
    assert (p >= 0).all()
    assert p[200:401].sum() > 0.8 * p.sum()
