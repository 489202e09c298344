"""What all erasers do: change cross-attention alone, repeatably, each target towards its own surrogate."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cpe
from erasers import ERASERS, beyond, common
from loading.prompts import anchor_prompts
from weights import Model, load_model, save_model

TARGETS, SURROGATE, KEPT = ["cat"], "an object", ["a dog", "red apple", "picture of a heart"]
RECIPE = replace(
    cpe.PRESETS["celebrity"], lam=1e2, stages=2, first_steps=10, later_steps=5, attack_steps=3, deltas=2, anchors=4,
    first_lr=1e-2, later_lr=1e-3,
)  # fmt: skip
QUICK = {  # what makes the trained erasers quick enough for a test
    "lora": {"recipe": RECIPE, "templates": ["{}", "a {}"]},
    "esd": {"steps": 2, "images": 2, "sampling_steps": 2},
    "mace": {"steps": 2, "images": 2, "sampling_steps": 2, "keep": 0.1, "templates": ["a photo of {}", "{}"]},
}
BEYOND = {
    "uce": ["eta", "padding", "sentences"], "rece": ["eta", "padding", "sentences"], "mace": ["eta", "sentences"],
    "speed": ["sentences"], "esd": ["sentences"],
}  # fmt: skip


def erase(name: str, model: Model, targets: list[str] = TARGETS, seed: int = 0, **options) -> dict[str, Tensor]:
    """An eraser run with what makes it quick."""
    surrogate, kept = options.pop("surrogate", SURROGATE), options.pop("kept", KEPT)
    return ERASERS[name](model, targets, surrogate, kept, seed, **{**QUICK.get(name, {}), **options})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two edits are one, to the bit: both come from the same computation."""
    return one.keys() == other.keys() and all(torch.equal(W, other[key]) for key, W in one.items())


@pytest.mark.parametrize("name", ERASERS)
def test_edits_cross_attention_only_and_repeatably(name: str, model: Model) -> None:
    before = {key: W.clone() for key, W in model.unet.state_dict().items()}
    edited = erase(name, model, ["cat", "dog"])
    read = {"speed": ("to_v",), "esd": ("to_q", "to_k", "to_v", "to_out")}.get(name, ("to_k", "to_v"))
    assert edited.keys() == {key for key in before if any(f".attn2.{kind}." in key for kind in read)}
    for key, W in edited.items():
        assert (W.shape, W.dtype, W.requires_grad) == (before[key].shape, torch.float32, False)
        assert W.isfinite().all()
    assert any(not torch.equal(W, before[key]) for key, W in edited.items())
    assert same(edited, erase(name, model, ["cat", "dog"]))
    assert same(before, model.unet.state_dict())  # the model itself is left as it was


@pytest.mark.parametrize("name", ["lora", "esd", "mace"])
def test_training_depends_on_its_seed(name: str, model: Model) -> None:
    assert not same(erase(name, model, seed=0), erase(name, model, seed=1))


@pytest.mark.parametrize("name", ERASERS)
def test_nothing_to_preserve(name: str, model: Model) -> None:
    assert all(W.isfinite().all() for W in erase(name, model, kept=[]).values())


@pytest.mark.parametrize("name", sorted(set(ERASERS) - {"esd"}))
def test_targets_may_have_a_surrogate_each(name: str, model: Model) -> None:
    def erased(surrogate: str | list[str]) -> dict[str, Tensor]:
        return erase(name, model, ["cat", "red heart"], surrogate=surrogate)

    assert same(erased(SURROGATE), erased([SURROGATE, SURROGATE]))
    assert not same(erased(["a dog", "a tree"]), erased(["a tree", "a dog"]))
    with pytest.raises(ValueError, match="1 surrogates for 2 targets"):
        erased([SURROGATE])


def test_edited_weights_make_a_plain_unet(model: Model, tmp_path: Path) -> None:
    edited = erase("uce", model)
    save_model(model.with_unet(edited), tmp_path / "erased")
    erased = load_model(tmp_path / "erased").unet.state_dict()
    assert all(torch.equal(erased[key], W) for key, W in edited.items())


# --- Beyond the papers -------------------------------------------------------------------------------------------

LINES = ["a photo of {}", "my {}"]


def beyond_erase(name: str, model: Model, kept: list[str] = KEPT, **options) -> dict[str, Tensor]:
    """The same with ours on top."""
    return beyond.erase(name, model, TARGETS, SURROGATE, kept, LINES, **{**QUICK.get(name, {}), **options})


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in BEYOND for setting in BEYOND[name]])
def test_what_is_ours_is_off_by_default(name: str, setting: str, model: Model) -> None:
    assert same(erase(name, model), beyond_erase(name, model))
    assert not same(erase(name, model), beyond_erase(name, model, **{setting: 1}))


@pytest.mark.parametrize("name", ["uce", "rece", "speed"])
def test_in_sentences_names_and_what_stays_are_in_the_same_ones(name: str, model: Model) -> None:
    pairs = (common.filled(LINES, names) for names in (TARGETS, [SURROGATE]))
    expected = ERASERS[name](model, *pairs, anchor_prompts(KEPT, LINES))
    assert same(beyond_erase(name, model, sentences=True), expected)


def test_eta_goes_past_the_surrogate(exact: Model) -> None:
    edited = beyond_erase("uce", exact, lam=1e-6, eta=0.5, kept=[])
    C, G = common.pairs(exact, TARGETS, [SURROGATE], "last")
    for key, W in common.projections(exact).items():
        torch.testing.assert_close(C @ edited[key].T, (C + 1.5 * (G - C)) @ W.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "settings"), [("uce", {}), ("rece", {"rounds": 0})])
def test_padding_moves_all_that_has_seen_the_name(name: str, settings: dict, exact: Model) -> None:
    C, G = common.pairs(exact, TARGETS, [SURROGATE], "tail")
    edits = [beyond_erase(name, exact, padding=padding, kept=[], **settings) for padding in (False, True)]
    for key in edits[0]:
        W = common.projections(exact)[key]
        missed = [(C @ edited[key].T - G @ W.T).norm() for edited in edits]
        assert missed[1] <= missed[0] * (1 + 1e-9)


def test_with_padding_rece_starts_as_its_rounds_go_on(exact: Model) -> None:
    edited = beyond_erase("rece", exact, padding=True, rounds=0, lam=0.3, s_p=2.0)
    kept = common.moment(exact, KEPT, "tail") + common.moment(exact, [""], "all")
    expected = common.move(
        common.projections(exact), *common.pairs(exact, TARGETS, [SURROGATE], "tail"), kept, 0.3, 1.0, 2.0
    )
    assert same(edited, expected)
