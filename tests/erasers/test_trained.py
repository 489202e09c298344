"""The trained erasers: ESD-x and MACE lower their losses and look where they say; LoRA is a ResAG with all open."""

from dataclasses import replace

import pytest
import torch
from test_all import KEPT, RECIPE, SURROGATE, TARGETS, erase
from tiny import normal

import cpe
import token_space
from erasers import common, esd, lora, mace
from weights import Model


def test_predict_is_the_unet(model: Model) -> None:
    E, x = model.encode(TARGETS), normal(1, 4, 4, 4).float()
    expected = model.unet(x, 500, model.unet.keys_values(E))
    torch.testing.assert_close(common.predict(model.unet, {}, x, 500, E), expected)
    edited = erase("uce", model)
    changed = model.with_unet(edited).unet
    other = common.predict(model.unet, edited, x, 500, E)
    torch.testing.assert_close(other, changed(x, 500, changed.keys_values(E)))
    assert not torch.allclose(other, expected)


def test_esd_lowers_its_loss(model: Model) -> None:
    trained = {key: W.clone() for key, W in model.unet.state_dict().items() if ".attn2." in key}
    losses = list(esd.esd_steps(model, TARGETS, trained, 0, steps=24, lr=3e-3, images=1, sampling_steps=2))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_esd_trains_in_the_sentences_that_it_is_given(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, read, encode = [], [], model.encode
    monkeypatch.setattr(
        esd, "trajectories", lambda _, prompts, *__: drawn.append(prompts) or normal(3, 4, 4, 4, 4).float()
    )
    monkeypatch.setattr(model, "encode", lambda prompts: read.append(prompts[0]) or encode(prompts))
    trained = {key: W.clone() for key, W in model.unet.state_dict().items() if ".attn2." in key}
    settings = {"steps": 8, "images": 4, "sampling_steps": 2, "templates": ["a {}", "my {}"]}
    list(esd.esd_steps(model, ["cat"], trained, 0, **settings))
    assert drawn == [["a cat", "a cat", "my cat", "my cat"]]
    assert set(read) == {"a cat", "my cat"}


# --- MACE --------------------------------------------------------------------------------------------------------


def test_attention_maps_are_what_the_unet_attends_to(model: Model) -> None:
    E, x, seen = model.encode(TARGETS), normal(1, 4, 4, 4).float(), {}
    layer = next(iter(model.unet.cross_attentions().values()))
    hook = layer.to_out[0].register_forward_pre_hook(lambda _, inputs: seen.update(y=inputs[0]))
    maps = mace.attention_maps(model.unet, {}, x, 300, E)
    hook.remove()
    V = layer.to_v(E).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    torch.testing.assert_close((maps[0] @ V).transpose(1, 2).flatten(-2), seen["y"], rtol=1e-4, atol=1e-5)
    assert len(maps) == len(model.unet.cross_attentions())


def test_mace_masks_and_loss(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = mace.own_masks(model, normal(3, 4, 4, 4).float(), "a cat", "cat", (200,), generator)
    assert masks.shape == (3, 4, 4)
    assert set(masks.flatten().tolist()) == {0.0, 1.0}
    base = common.finished(model, common.projections(model))
    change = mace.new_change(base, generator)
    settings = {"steps": 24, "lr": 0.05, "images": 1, "sampling_steps": 2, "masked": False}
    losses = list(mace.unseeing_steps(model, "cat", ["a photo of {}"], base, change, generator, **settings))
    assert sum(losses[-6:]) < 0.99 * sum(losses[:6])


def test_masks_are_where_the_model_looks_at_the_target(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    here, prompt = torch.zeros(4, 4), "a photo of red heart"
    here[:2, 1:] = 1
    found = mace.positions(model, prompt, "red heart", padding=False)
    start, count = 1 + len(model.tokenizer.ids("a photo of")), len(model.tokenizer.ids("red heart"))
    assert found.nonzero().flatten().tolist() == list(range(start, start + count))
    maps = [normal(1, 2, 16, 77, seed=seed).float().sigmoid() - here.view(16, 1) for seed in range(3)]
    for A in maps:
        A[..., found] += 2 * here.view(16, 1)
    monkeypatch.setattr(mace, "attention_maps", lambda *_: maps)
    generator = torch.Generator().manual_seed(0)
    mask = mace.own_masks(model, normal(1, 4, 4, 4).float(), prompt, "red heart", (200, 300), generator)
    assert torch.equal(mask[0], here)


def test_mace_says_when_its_equations_have_no_solution(model: Model) -> None:
    with pytest.raises(ValueError, match="with lam = 0"):
        erase("mace", model, lam=0.0, keep=0.0)


def test_mace_has_thirty_templates() -> None:
    assert len(set(mace.TEMPLATES)) == 30
    assert all(template.count("{}") == 1 for template in mace.TEMPLATES)


# --- LoRA --------------------------------------------------------------------------------------------------------


def trainer(model: Model, targets: list[str] = TARGETS, templates: tuple[str, ...] = ("{}",), **fields) -> cpe.Trainer:
    """A short training."""
    return lora.lora_trainer(model, targets, SURROGATE, KEPT, 0, replace(RECIPE, **fields), templates)


def test_lora_lowers_its_loss(model: Model) -> None:
    losses = [step["erase"] for step in trainer(model, lam=1.0, stages=1, first_steps=60)]
    assert losses[-1] < 0.9 * losses[0]


def test_lora_has_rank_k_per_target_and_the_scale_of_one(model: Model) -> None:
    for k, rank in ((3, 6), (10, 16)):  # 16: the width of the context
        gates = trainer(model, ["cat", "dog"], k=k).gates
        assert gates.k == rank
        assert gates.scale.item() == pytest.approx(1 / k)


def test_lora_is_a_gate_with_everything_open_and_folds_into_the_weights(exact: Model) -> None:
    """The paper's losses in full, those of token space, and the folded weights all say the same."""
    W = {key.removesuffix(".weight"): V for key, V in common.projections(exact).items()}
    gates = lora.LoRA({name: len(V) for name, V in W.items()}, 16, 3, 2.0).double()
    with torch.no_grad():
        for i, U in enumerate(gates.lora_up):
            U.copy_(normal(*U.shape, seed=i))
    E, layers = normal(4, 7, 16, seed=2), cpe.Layers.of(exact.cross_attention(torch.float64))
    folded = gates.fold(common.projections(exact))
    kv = gates(E, {name: E @ V.T for name, V in W.items()})
    for name, changed in kv.items():
        torch.testing.assert_close(E @ folded[f"{name}.weight"].T, changed)
    data = cpe.Data(E[:2], E[2:], E, E[:1])
    both = [losses(layers, data, 0.3).erase(gates, torch.arange(2)) for losses in (cpe.Losses, token_space.Losses)]
    torch.testing.assert_close(*both)
