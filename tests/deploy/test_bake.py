"""Baking: what is trained, towards what, and that nothing half-written is left."""

import copy
import dataclasses
import random
from pathlib import Path

import pytest
import tiny as reference
import torch
from safetensors.torch import load, save

import cpe
import weights
from clip import MLP
from deploy import bake
from deploy.targets import Concept, in_company, read_concept, training_prompts
from loading.prompts import parse_prompts
from token_space import ContextGate, TokenSpace

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = parse_prompts((ROOT / "prompts/emoji.txt").read_text(encoding="utf-8"))
HEART = Concept(["red heart", "love"], "an object", 0.3)


@pytest.fixture
def model(tiny) -> weights.Model:
    return weights.load_model(tiny)


@pytest.fixture
def space(model) -> TokenSpace:
    return TokenSpace(cpe.Layers.of(model.cross_attention()))


def open_gate(d: int, seed: int = 0) -> ContextGate:
    """A context gate with random values, open at some tokens."""
    gate = ContextGate(d, r=4, k=2)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return gate.requires_grad_(False)


def small_baker(model: weights.Model, space: TokenSpace, gate: ContextGate | None = None, **settings) -> bake.Baker:
    targets = model.tokenizer(["red heart", "a red heart", "love"])
    others = model.tokenizer(["", "dog face", "a dog face", "blue heart"])
    recipe = dataclasses.replace(bake.Recipe(steps=40), **settings)
    return bake.Baker(model.text_encoder, gate or open_gate(16), space, targets, others, recipe)


# --- Prompts -------------------------------------------------------------------------------------------------------


def test_targets_are_all_names_in_all_templates_then_in_company():
    targets, _ = training_prompts([HEART], PROMPTS, seed=0, least=60)
    plain = [t.replace("{}", name) for name in HEART.names for t in PROMPTS.templates]
    assert targets[: len(plain)] == plain
    assert len(targets) >= 60
    assert all(any(text in prompt and text != prompt for text in plain) for prompt in targets[len(plain) :])


def test_others_hold_the_empty_prompt_and_no_name_of_a_target():
    tiger = Concept(["Tiger face"], "an object", 0.3)
    targets, others = training_prompts([HEART, tiger], PROMPTS, seed=0)
    assert others[0] == ""
    assert not any(name in prompt for prompt in others for name in ("red heart", "tiger face"))
    assert sum("Tiger face" in prompt for prompt in targets) >= 300
    assert len({*others}) > 0.9 * len(others)


def test_few_concepts_have_more_prompts_each():
    names = [word for word in PROMPTS.domain if word.isascii()][:6]
    concepts = [Concept([name], "an object", 0.3) for name in names]
    one, all_six = (len(training_prompts(some, PROMPTS, seed=0)[0]) for some in (concepts[:1], concepts))
    assert 1200 <= one < 1400
    assert 6 * 300 <= all_six < 6 * 500


def test_company_leaves_the_prompt_whole():
    texts = in_company(["a red heart"] * 100, ["dog", "cat"], random.Random(0))
    assert len(texts) == 100
    assert all("a red heart" in text and ("dog" in text or "cat" in text) for text in texts)
    assert any(text.startswith("a red") for text in texts)
    assert any(text.endswith("heart") for text in texts)


def test_a_gate_file_says_what_it_erases():
    ours = {"target": "Brad Pitt", "aliases": '["brad"]', "surrogate": "a man", "eta": "0.5", "prompts": "Brad Pitt"}
    assert read_concept(ours, cpe.PRESETS["celebrity"]) == Concept(["Brad Pitt", "brad"], "a man", 0.5)
    public = {"prompts": "claude monet", "rank": "1", "alpha": "1.0"}
    assert read_concept(public, cpe.PRESETS["style"]) == Concept(["claude monet"], "real photograph", 0.5)
    for nothing in ({}, {"target": " "}):
        with pytest.raises(ValueError, match="what it erases"):
            read_concept(nothing, cpe.PRESETS["style"])
    for aliases in ("{}", "x", "[1]", '["\\ud800"]', "[" * 100_000):
        with pytest.raises(ValueError, match="`aliases` is no list of names"):
            read_concept(ours | {"aliases": aliases}, cpe.PRESETS["style"])
    for eta in ("much", "nan", "inf"):
        with pytest.raises(ValueError, match="`eta` no number"):
            read_concept(ours | {"eta": eta}, cpe.PRESETS["style"])


# --- The units ---------------------------------------------------------------------------------------------------


def correlated(*shape: int) -> torch.Tensor:
    """Inputs [S, d] that lie near a subspace, away from 0."""
    few, mix = reference.draw("few", shape[0], 3), reference.draw("mix", 3, shape[1])
    return few @ mix + 0.05 * reference.draw("rest", *shape) + 1


@torch.no_grad()
def test_others_take_over_what_the_spared_units_said():
    """Against a least-squares fit of all the MLP says by the kept units and a constant."""
    mlp, x = reference.filled(MLP(6, 24)), correlated(500, 6)
    free, weight, bias = bake.spare_units(mlp, x, torch.eye(6), 6)
    double, x64 = copy.deepcopy(mlp).double(), x.double()
    bake.spare_units(double, x64, torch.eye(6).double(), 6)
    assert torch.equal(double.fc2.weight.float(), mlp.fc2.weight)  # the model is left as it was
    assert len({*free.tolist()}) == 6
    assert (weight[:, free] == 0).all()
    a = bake.quick_gelu(mlp.fc1(x))
    kept = [i for i in range(24) if i not in free.tolist()]
    left = (a @ weight.T + bias - mlp(x)).square().sum()
    basis = torch.cat([a[:, kept], torch.ones(500, 1)], dim=1).double()
    best = (basis @ torch.linalg.pinv(basis) @ mlp(x).double() - mlp(x)).square().sum()
    dropped = (a[:, free] - a[:, free].mean(dim=0)) @ mlp.fc2.weight[:, free].T
    assert best - 1e-4 <= left < 0.1 * dropped.square().sum()


@torch.no_grad()
def test_the_units_that_are_spared_say_least_in_the_metric():
    mlp, x = reference.filled(MLP(6, 24)), correlated(500, 6)
    mlp.fc2.weight[:, 3] *= 1e-4
    mlp.fc1.weight[7] = 0  # says much, but always the same
    mlp.fc2.weight[:, 11] = torch.eye(6)[5]  # says much, but what the metric does not see
    metric = torch.eye(6)
    metric[5, 5] = 0
    assert {*bake.spare_units(mlp, x, metric, 3)[0].tolist()} == {3, 7, 11}


@torch.no_grad()
def test_detectors_fire_at_their_points_and_are_shut_elsewhere():
    x = correlated(5000, 6)
    points = x[:4] + reference.draw("away", 4, 6)
    weight, bias = bake.detectors(points, x)
    torch.testing.assert_close((weight * points).sum(dim=1) + bias, torch.full((4,), 2.0), atol=1e-3, rtol=0)
    said = x @ weight.T + bias
    assert ((said <= -3 + 1e-3).float().mean(dim=0) >= 0.999).all()


@torch.no_grad()
def test_a_detector_of_one_of_many_is_finite_and_still_fires_there():
    x = correlated(5000, 6)
    weight, bias = bake.detectors(x[:4], x)
    torch.testing.assert_close((weight * x[:4]).sum(dim=1) + bias, torch.full((4,), 2.0), atol=1e-2, rtol=0)


@torch.no_grad()
def test_what_training_reads_is_what_the_written_tower_says(model, space):
    """The split into frozen rest and units, in half precision, against the whole text encoder with its new tensors."""
    baker = small_baker(model, space)
    for name, parameter in baker.units.named_parameters():  # less steep than detectors: half precision is rough there
        parameter.copy_(0.3 * reference.draw(name, *parameter.shape))
    baked = model.with_text_encoder(baker.changed())
    for seen, names in (
        (baker.targets, ["red heart", "a red heart", "love"]),
        (baker.others, ["", "dog face", "a dog face", "blue heart"]),
    ):
        context = baker.norm(seen.rest.float() + baker.units(baker.read(seen.hidden)))
        torch.testing.assert_close(context, baked.encode(names), atol=2e-2, rtol=0)


@torch.no_grad()
def test_before_the_first_step_the_units_say_nothing(model, space):
    baker = small_baker(model, space)
    assert len(baker.free) == 8  # a quarter of 32: fewer than the recipe's
    assert (baker.units(baker.read(baker.targets.hidden)) == 0).all()


# --- Training ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_gate_on_targets_and_the_frozen_tower_on_others(model, space):
    baker = small_baker(model, space)
    with torch.no_grad():
        expected = open_gate(16)(model.encode(["red heart", "a red heart", "love"]))
        unedited = model.encode(["", "dog face", "a dog face", "blue heart"])
        taught = baker.norm(baker.others.rest.float())
    torch.testing.assert_close(baker.wanted.float(), expected, atol=2e-2, rtol=0)
    missing, _ = baker.shares_missed(torch.arange(3), torch.arange(4), None)
    assert missing.mean().item() == pytest.approx(1, rel=0.1)  # next to nothing of the shift is there yet
    # Half precision, and a fit of what the spared units said; were they dropped and nothing fitted, 0.4 and 4.
    torch.testing.assert_close(taught, unedited, atol=0.05, rtol=0)
    assert space.energy(taught - unedited).mean() < 0.01 * baker.scale


@pytest.mark.parametrize(("size", "said"), [(1e6, "overflow"), (1e30, "overflow"), (1e-6, "change nothing")])
def test_gates_that_ask_for_nothing_or_for_no_number_are_refused(model, space, size, said):
    gate = open_gate(16)
    gate.inner.lora_up[0].data *= size
    with pytest.raises(ValueError, match=said):
        small_baker(model, space, gate=gate)


def test_what_is_cut_off_changes_nothing_before_it(model, space):
    baker, untouched = (small_baker(model, space) for _ in range(2))
    for each in (baker, untouched):  # units that say something: while they are silent, no other prompt moves
        each.units.fc2.weight.data.copy_(0.3 * reference.draw("columns", *each.units.fc2.weight.shape))
    assert (model.tokenizer(["a red heart"])[0, baker.length - 1 :] == model.tokenizer.eos).all()
    rows, others = torch.arange(3), torch.arange(4)
    for name, states in (*baker.targets._asdict().items(), *baker.others._asdict().items()):
        states[:, baker.length :] = reference.draw(name, *states[:, baker.length :].shape)
    for length, same in ((baker.length, True), (None, False)):
        pairs = zip(
            baker.shares_missed(rows, others, length), untouched.shares_missed(rows, others, length), strict=True
        )
        assert all(torch.equal(a, b) if same else (a != b).all() for a, b in pairs)


def test_the_loss_falls_and_a_seed_repeats_it(model, space):
    first, second = (small_baker(model, space, steps=150, keep=0.1) for _ in range(2))
    losses = [step["missing"] + first.recipe.keep * step["moved"] for step in first]
    assert losses[-1] < 0.8 * losses[0]
    list(second)
    assert equal(first.state(), second.state())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def stopped(baker: bake.Baker, step: int) -> dict[str, torch.Tensor]:
    """The state after some steps."""
    for _ in zip(range(step), baker, strict=False):
        pass
    assert baker.step == step
    return baker.state()


@pytest.mark.parametrize("step", [0, 1, 5, 11, 12])
def test_a_run_may_stop_anywhere_and_go_on_bit_for_bit(model, space, step):
    whole = stopped(small_baker(model, space, steps=12), 12)
    state = load(save(stopped(small_baker(model, space, steps=12), step)))
    kept = {name: t.clone() for name, t in state.items()}
    resumed = small_baker(model, space, steps=12)
    stopped(resumed, 3)  # whatever it has done before
    resumed.load_state(state)
    assert equal(resumed.state(), state)
    assert len(list(resumed)) == 12 - step
    assert equal(resumed.state(), whole)
    assert equal(state, kept)


@pytest.mark.parametrize(
    "change",
    [
        {"position": torch.tensor(41)},
        {"position": torch.tensor([0, 1])},
        {"generator": torch.zeros(3, dtype=torch.uint8)},
        {"optimizer.0.exp_avg": torch.zeros(3)},
        {"optimizer.0.step": torch.zeros(3)},
        {"units.fc2.weight": torch.zeros(3)},
        {"units.norm.weight": torch.zeros(16)},
    ],
)
def test_a_state_of_another_run_is_refused(model, space, change):
    state = stopped(small_baker(model, space), 2)
    with pytest.raises(ValueError, match="another run"):
        small_baker(model, space).load_state(state | change)


@pytest.mark.parametrize("name", ["position", "generator", "optimizer.0.step", "units.fc1.weight"])
def test_a_state_that_is_not_whole_is_refused(model, space, name):
    state = stopped(small_baker(model, space), 2)
    del state[name]
    with pytest.raises(ValueError, match="another run"):
        small_baker(model, space).load_state(state)


def test_only_the_last_mlp_changes_and_of_its_first_layer_only_the_units(model, space):
    baker = small_baker(model, space)
    before = {name: t.clone() for name, t in model.text_encoder.state_dict().items()}
    list(baker)
    state = before | baker.changed()
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in before.items()}
    changed = {name for name, t in state.items() if not torch.equal(t, before[name])}
    mlp = "text_model.encoder.layers.1.mlp."
    assert changed == {f"{mlp}{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    assert baker.changed().keys() == changed
    for name in ("fc1.weight", "fc1.bias"):
        rows = (state[mlp + name] != before[mlp + name]).reshape(32, -1).any(dim=1)
        assert {*rows.nonzero().flatten().tolist()} == {*baker.free.tolist()}
    assert all(torch.equal(t, before[name]) for name, t in model.text_encoder.state_dict().items())


def test_a_loss_that_is_not_finite_stops_it(model, space):
    baker = small_baker(model, space)
    before = stopped(baker, 2)
    baker.wanted[:] = torch.nan
    with pytest.raises(FloatingPointError, match="step 3"):
        list(baker)
    assert equal(baker.state() | {"generator": before["generator"]}, before)


def test_a_gradient_that_overflows_stops_before_it_reaches_the_units(model, space, monkeypatch):
    baker = small_baker(model, space)
    before, missed = stopped(baker, 2), baker.shares_missed

    def steep(*rows):  # sqrt has the value 0 and an infinite slope at 0: the loss alone looks sound
        missing, moved = missed(*rows)
        return missing, moved + (missing.sum() * 0).sqrt()

    monkeypatch.setattr(baker, "shares_missed", steep)
    with pytest.raises(FloatingPointError, match=r"its gradient .*, in step 3"):
        list(baker)
    assert equal(baker.state() | {"generator": before["generator"]}, before)


@torch.no_grad()
def test_figures_of_gates_and_of_what_they_become_agree_where_both_are_the_same(model, space):
    """A context gate asks every layer for the same: its gates and the context they mean have equal figures."""
    gate = open_gate(16)
    words = PROMPTS.domain[:30]
    figures = bake.token_figures(
        space, gate.expand(space.layers), HEART, words, model.encode, lambda prompts: gate(model.encode(prompts))
    )
    assert figures.keys() == {"left", "near", "others"}
    for row in figures.values():
        assert row["gates"] > 0
        assert row["baked"] == pytest.approx(row["gates"], rel=1e-3)


def test_more_concepts_take_more_steps_and_units():
    recipe = bake.Recipe(units=10, steps=70, more=10)
    assert [recipe.of(n).steps for n in (1, 2, 10)] == [70, 80, 160]
    assert [recipe.of(n).units for n in (1, 4, 10)] == [10, 20, 32]
    assert recipe.of(10, 0.5).steps == 80
    assert recipe.of(1, 1e-4).steps == 1
