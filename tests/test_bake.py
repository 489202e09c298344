"""Baking: what is trained, towards what, and that nothing half-written is left."""

import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import tiny as reference
import torch
from safetensors.torch import load, save

import bake
import commands
import compare
import evaluate
import old_cpe as cpe
import weights
from clip import MLP
from loading import files
from old_cpe import ContextGate, Objective

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = cpe.parse_prompts((ROOT / "prompts/emoji.txt").read_text(encoding="utf-8"))
HEART = bake.Concept(["red heart", "love"], "an object", 0.3)


@pytest.fixture
def model(tiny) -> weights.Model:
    return weights.load_model(tiny)


@pytest.fixture
def objective(model) -> Objective:
    return Objective(model.cross_attention())


def open_gate(d: int, seed: int = 0) -> ContextGate:
    """A context gate with random values, open at some tokens."""
    gate = ContextGate(d, r=4, k=2).initialise(torch.Generator())
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return gate.requires_grad_(False)


def small_baker(model: weights.Model, objective: Objective, gate: ContextGate | None = None, **settings) -> bake.Baker:
    targets = model.tokenizer(["red heart", "a red heart", "love"])
    others = model.tokenizer(["", "dog face", "a dog face", "blue heart"])
    recipe = dataclasses.replace(bake.Recipe(steps=40), **settings)
    return bake.Baker(model.text_encoder, gate or open_gate(16), objective, targets, others, recipe)


# --- Prompts -------------------------------------------------------------------------------------------------------


def test_targets_are_all_names_in_all_templates_then_in_company():
    targets, _ = bake.training_prompts([HEART], PROMPTS, seed=0, least=60)
    plain = [t.replace("{}", name) for name in HEART.names for t in PROMPTS.templates]
    assert targets[: len(plain)] == plain
    assert len(targets) >= 60
    assert all(any(text in prompt and text != prompt for text in plain) for prompt in targets[len(plain) :])


def test_others_hold_the_empty_prompt_and_no_name_of_a_target():
    tiger = bake.Concept(["Tiger face"], "an object", 0.3)
    targets, others = bake.training_prompts([HEART, tiger], PROMPTS, seed=0)
    assert others[0] == ""
    assert not any(name in prompt for prompt in others for name in ("red heart", "tiger face"))
    assert sum("Tiger face" in prompt for prompt in targets) >= 300
    assert len({*others}) > 0.9 * len(others)


def test_few_concepts_have_more_prompts_each():
    names = [word for word in PROMPTS.domain if word.isascii()][:6]
    concepts = [bake.Concept([name], "an object", 0.3) for name in names]
    one, all_six = (len(bake.training_prompts(some, PROMPTS, seed=0)[0]) for some in (concepts[:1], concepts))
    assert 1200 <= one < 1400
    assert 6 * 300 <= all_six < 6 * 500


def test_company_leaves_the_prompt_whole():
    texts = bake.in_company(["a red heart"] * 100, ["dog", "cat"], random.Random(0))
    assert len(texts) == 100
    assert all("a red heart" in text and ("dog" in text or "cat" in text) for text in texts)
    assert any(text.startswith("a red") for text in texts)
    assert any(text.endswith("heart") for text in texts)


def test_a_gate_file_says_what_it_erases():
    ours = {"target": "Brad Pitt", "aliases": '["brad"]', "surrogate": "a man", "eta": "0.5", "prompts": "Brad Pitt"}
    assert bake.read_concept(ours, cpe.PRESETS["celebrity"]) == bake.Concept(["Brad Pitt", "brad"], "a man", 0.5)
    public = {"prompts": "claude monet", "rank": "1", "alpha": "1.0"}
    assert bake.read_concept(public, cpe.PRESETS["style"]) == bake.Concept(["claude monet"], "real photograph", 0.5)
    for nothing in ({}, {"target": " "}):
        with pytest.raises(ValueError, match="what it erases"):
            bake.read_concept(nothing, cpe.PRESETS["style"])
    for aliases in ("{}", "x", "[1]", '["\\ud800"]', "[" * 100_000):
        with pytest.raises(ValueError, match="no list of names"):
            bake.read_concept(ours | {"aliases": aliases}, cpe.PRESETS["style"])
    for eta in ("much", "nan", "inf"):
        with pytest.raises(ValueError, match=f"the eta in its metadata is no number: '{eta}'"):
            bake.read_concept(ours | {"eta": eta}, cpe.PRESETS["style"])


# --- The units and the ellipsoid -----------------------------------------------------------------------------------


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
def test_what_training_reads_is_what_the_written_tower_says(model, objective):
    """The split into frozen rest and units, in half precision, against the whole text encoder with its new tensors."""
    baker = small_baker(model, objective)
    for name, parameter in baker.units.named_parameters():  # less steep than detectors: half precision is rough there
        parameter.copy_(0.3 * reference.draw(name, *parameter.shape))
    baked = model.with_text_encoder(baker.changed())
    for seen, names in (
        (baker.targets, ["red heart", "a red heart", "love"]),
        (baker.others, ["", "dog face", "a dog face", "blue heart"]),
    ):
        context = baker.norm(seen.rest.float() + baker.units(seen.inputs.float()))
        torch.testing.assert_close(context, baked.encode(names), atol=2e-2, rtol=0)


@torch.no_grad()
def test_before_the_first_step_the_units_say_nothing(model, objective):
    baker = small_baker(model, objective)
    assert len(baker.free) == 8  # a quarter of 32: fewer than the recipe's
    assert (baker.units(baker.targets.inputs.float()) == 0).all()


@torch.no_grad()
def test_what_a_layer_norm_says_is_left_where_it_is_and_the_rest_moves_as_little_as_can_be():
    """Against projected gradient descent on the ellipsoid, from the same point."""
    norm = reference.filled(torch.nn.LayerNorm(12, eps=0)).double()
    root = reference.draw("root", 12, 12).double()
    M = root @ root.T / 12
    said = norm(reference.draw("x", 5, 12).double())
    torch.testing.assert_close(bake.on_ellipsoid(norm, said, M), said, atol=1e-6, rtol=1e-6)

    asked = said + 0.5 * reference.draw("shift", 5, 12).double()
    nearest = bake.on_ellipsoid(norm, asked, M)

    def distance(E: torch.Tensor) -> torch.Tensor:
        return (((E - asked) @ M) * (E - asked)).sum(dim=-1)

    best = torch.full((5,), torch.inf, dtype=torch.float64)
    for start in range(8):
        x = (asked - norm.bias) / norm.weight + 0.3 * start * reference.draw(f"start {start}", 5, 12).double()
        for _ in range(3000):
            x = torch.nn.functional.layer_norm(x, (12,), eps=0)
            x -= 0.05 * norm.weight * ((norm.weight * x + norm.bias - asked) @ M)
        best = torch.minimum(best, distance(norm.weight * torch.nn.functional.layer_norm(x, (12,), eps=0) + norm.bias))
    torch.testing.assert_close(distance(nearest), best, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(norm((nearest - norm.bias) / norm.weight), nearest, atol=1e-4, rtol=1e-4)


# --- Training ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_gate_on_targets_and_the_frozen_tower_on_others(model, objective):
    baker = small_baker(model, objective)
    with torch.no_grad():
        expected = open_gate(16)(model.encode(["red heart", "a red heart", "love"]))
        unedited = model.encode(["", "dog face", "a dog face", "blue heart"])
        taught = baker.norm(baker.others.rest.float())
    torch.testing.assert_close(baker.wanted.float(), expected, atol=2e-2, rtol=0)
    missing, _ = baker.misfits(torch.arange(3), torch.arange(4), None)
    assert missing.mean().item() == pytest.approx(1, rel=0.1)  # next to nothing of the shift is there yet
    # Half precision, and a fit of what the spared units said; were they dropped and nothing fitted, 0.4 and 4.
    torch.testing.assert_close(taught, unedited, atol=0.05, rtol=0)
    assert objective.energy(taught - unedited).mean() < 0.01 * baker.scale


@pytest.mark.parametrize(("size", "said"), [(1e6, "overflow"), (1e30, "overflow"), (1e-6, "change nothing")])
def test_gates_that_ask_for_nothing_or_for_no_number_are_refused(model, objective, size, said):
    gate = open_gate(16)
    gate.inner.lora_up.data *= size
    with pytest.raises(ValueError, match=said):
        small_baker(model, objective, gate=gate)


def test_what_is_cut_off_changes_nothing_before_it(model, objective):
    baker, untouched = (small_baker(model, objective) for _ in range(2))
    for each in (baker, untouched):  # units that say something: while they are silent, no other prompt moves
        each.units.columns.data.copy_(0.3 * reference.draw("columns", *each.units.columns.shape))
    assert (model.tokenizer(["a red heart"])[0, baker.length - 1 :] == model.tokenizer.eos).all()
    rows, others = torch.arange(3), torch.arange(4)
    for name, states in (*baker.targets._asdict().items(), *baker.others._asdict().items()):
        states[:, baker.length :] = reference.draw(name, *states[:, baker.length :].shape)
    for length, same in ((baker.length, True), (None, False)):
        pairs = zip(baker.misfits(rows, others, length), untouched.misfits(rows, others, length), strict=True)
        assert all(torch.equal(a, b) if same else (a != b).all() for a, b in pairs)


def test_the_loss_falls_and_a_seed_repeats_it(model, objective):
    first, second = (small_baker(model, objective, steps=150, keep=0.1) for _ in range(2))
    losses = [p.losses["missing"] + first.recipe.keep * p.losses["moved"] for p in first.steps()]
    assert losses[-1] < 0.8 * losses[0]
    list(second.steps())
    assert equal(first.state(), second.state())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def stopped(baker: bake.Baker, step: int) -> dict[str, torch.Tensor]:
    """The state after some steps."""
    steps = baker.steps()
    assert [next(steps).step for _ in range(step)] == list(range(1, step + 1))
    return baker.state()


@pytest.mark.parametrize("step", [0, 1, 5, 11, 12])
def test_a_run_may_stop_anywhere_and_go_on_bit_for_bit(model, objective, step):
    whole = stopped(small_baker(model, objective, steps=12), 12)
    state = load(save(stopped(small_baker(model, objective, steps=12), step)))
    kept = {name: t.clone() for name, t in state.items()}
    resumed = small_baker(model, objective, steps=12)
    stopped(resumed, 3)  # whatever it has done before
    resumed.load_state(state)
    assert equal(resumed.state(), state)
    assert [p.step for p in resumed.steps()] == list(range(step + 1, 13))
    assert equal(resumed.state(), whole)
    assert equal(state, kept)


@pytest.mark.parametrize(
    "change",
    [
        {"done": torch.tensor(41)},
        {"done": torch.tensor([0, 1])},
        {"errors": torch.ones(3)},
        {"errors": torch.tensor([1.0, 1.0, -1.0, 1.0])},
        {"errors": torch.tensor([1.0, 1.0, torch.nan, 1.0])},
        {"generator": torch.zeros(3, dtype=torch.uint8)},
        {"optimizer.0.exp_avg": torch.zeros(3)},
        {"optimizer.0.step": torch.zeros(3)},
        {"units.columns": torch.zeros(3)},
        {"units.norm.weight": torch.zeros(16)},
    ],
)
def test_a_state_of_another_run_is_refused(model, objective, change):
    state = stopped(small_baker(model, objective), 2)
    with pytest.raises(ValueError, match="another run"):
        small_baker(model, objective).load_state(state | change)


@pytest.mark.parametrize("name", ["done", "errors", "generator", "optimizer.0.step", "units.weight"])
def test_a_state_that_is_not_whole_is_refused(model, objective, name):
    state = stopped(small_baker(model, objective), 2)
    del state[name]
    with pytest.raises(ValueError, match="another run"):
        small_baker(model, objective).load_state(state)


def test_only_the_last_mlp_changes_and_of_its_first_layer_only_the_units(model, objective):
    baker = small_baker(model, objective)
    before = {name: t.clone() for name, t in model.text_encoder.state_dict().items()}
    list(baker.steps())
    state = baker.tensors()
    assert state.keys() == before.keys()
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in before.items()}
    changed = {name for name, t in state.items() if not torch.equal(t, before[name])}
    mlp = "text_model.encoder.layers.1.mlp."
    assert changed == {f"{mlp}{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    assert baker.changed().keys() == changed
    for name in ("fc1.weight", "fc1.bias"):
        rows = (state[mlp + name] != before[mlp + name]).reshape(32, -1).any(dim=1)
        assert {*rows.nonzero().flatten().tolist()} == {*baker.free.tolist()}
    assert all(torch.equal(t, before[name]) for name, t in model.text_encoder.state_dict().items())


def test_others_that_moved_most_are_drawn_most(model, objective):
    baker = small_baker(model, objective, others=2)
    baker.errors = torch.tensor([1e-9, 1e-9, 1.0, 1e-9])
    assert all(2 in baker.draw()[1] for _ in range(20))


def test_a_loss_that_is_not_finite_stops_it(model, objective):
    baker = small_baker(model, objective)
    before = stopped(baker, 2)
    baker.wanted[:] = torch.nan
    with pytest.raises(cpe.Diverged, match="step 3"):
        list(baker.steps())
    assert equal(baker.state() | {"generator": before["generator"]}, before)


def test_a_gradient_that_overflows_stops_before_it_reaches_the_units(model, objective, monkeypatch):
    baker = small_baker(model, objective)
    before, misfits = stopped(baker, 2), baker.misfits

    def steep(*rows):  # sqrt has the value 0 and an infinite slope at 0: the loss alone looks sound
        missing, moved = misfits(*rows)
        return missing, moved + (missing.sum() * 0).sqrt()

    monkeypatch.setattr(baker, "misfits", steep)
    with pytest.raises(cpe.Diverged, match="gradient overflowed in step 3"):
        list(baker.steps())
    assert equal(baker.state() | {"generator": before["generator"]}, before)


@torch.no_grad()
def test_figures_of_gates_and_of_what_they_become_agree_where_both_are_the_same(model, objective):
    """A context gate asks every layer for the same: its gates and the context they mean have equal figures."""
    gate = open_gate(16)
    words = PROMPTS.domain[:30]
    figures = bake.token_figures(
        objective, gate.expand(objective.W), HEART, words, model.encode, lambda prompts: gate(model.encode(prompts))
    )
    assert figures.keys() == {"left", "near", "others"}
    for row in figures.values():
        assert row["gates"] > 0
        assert row["baked"] == pytest.approx(row["gates"], rel=1e-3)


# --- The command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gate_files(model, objective, tmp_path) -> list[Path]:
    """Two gate files of the tiny model."""
    written = []
    for seed, target in enumerate(("red heart", "dog face")):
        written.append(tmp_path / f"{seed}.safetensors")
        metadata = {"target": target, "surrogate": "an object", "eta": "0.3", "aliases": '["love"]' if seed else "[]"}
        files.save_tensors(written[-1], cpe.to_tensors(open_gate(16, seed).expand(objective.W)), metadata)
    return written


def arguments(tiny: Path, files: list[Path], out: Path, *more: str) -> list[str]:
    gates = [word for file in files for word in ("--gates", str(file))]
    fast = ["--preset", "emoji", "--steps-scale", "0.01", "--steps", "2"]
    return ["bake", *gates, "--out", str(out), "--model", str(tiny), *fast, *more]


def test_bake_writes_a_model_that_loads_strictly_and_says_what_was_lost(tiny, gate_files, tmp_path, capsys):
    out = tmp_path / "baked"
    assert commands.main(arguments(tiny, gate_files, out, "--json", str(tmp_path / "figures.json"))) == 0
    said = capsys.readouterr().out
    assert f"wrote   {out}" in said
    assert "red heart, dog face, love" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    for target in ("red heart", "dog face"):
        rows = figures[target]
        assert {f"left, {bake.HELD_OUT[0]!r}", "image change, target", "image change, others"} <= rows.keys()
        assert all(set(row) == {"gates", "baked"} for row in rows.values())
    baked, original = weights.load_model(out), weights.load_model(tiny)
    assert not torch.equal(baked.encode(["red heart"]), original.encode(["red heart"]))
    for part in ("unet", "vae", "clip"):
        ours, theirs = getattr(baked, part).state_dict(), getattr(original, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_figures_of_gates_are_drawn_with_gates_and_those_of_the_baked_model_with_it(
    tiny, gate_files, tmp_path, monkeypatch
):
    """Where baking does nothing, the baked model moves nothing, and gates do; all images and tokens say so."""
    monkeypatch.setattr(bake.Baker, "changed", lambda self: {})
    figures = tmp_path / "figures.json"
    assert commands.main(arguments(tiny, gate_files[:1], tmp_path / "baked", "--json", str(figures))) == 0
    rows = json.loads(figures.read_text())["red heart"]
    for name, row in rows.items():
        assert row["baked"] == pytest.approx(1 if name.startswith("left") else 0, abs=1e-6)
        assert row["gates"] != pytest.approx(row["baked"], abs=1e-4)


@pytest.mark.parametrize("name", ["red\x1b[31m heart", "red\nheart"])
@pytest.mark.parametrize("key", ["target", "surrogate", "aliases"])
def test_names_in_a_gate_file_give_the_terminal_no_orders(tiny, gate_files, tmp_path, capsys, key, name):
    tensors, metadata = files.load_tensors(gate_files[0])
    files.save_tensors(gate_files[0], tensors, metadata | {key: json.dumps([name]) if key == "aliases" else name})
    assert commands.main(arguments(tiny, gate_files[:1], tmp_path / "baked")) == 2
    said = capsys.readouterr().err
    assert f"the name {name!r} in its metadata is no prompt" in said
    assert "\x1b" not in said


def test_gates_are_baked_by_the_preset_that_trained_them(tiny, gate_files, tmp_path, capsys, monkeypatch):
    def retrained(file: Path, preset: str) -> None:
        tensors, metadata = files.load_tensors(file)
        files.save_tensors(file, tensors, metadata | {"preset": preset})

    asked = []
    monkeypatch.setattr(commands, "read_concepts", lambda paths, preset: asked.append(preset) or pytest.skip("seen"))
    for file in gate_files:
        retrained(file, "object")
    call = [word for word in arguments(tiny, gate_files, tmp_path / "baked") if word not in ("--preset", "emoji")]
    with suppress(pytest.skip.Exception):
        commands.main(call)
    assert asked == ["object"]
    retrained(gate_files[0], "style")
    assert commands.main(call) == 2
    assert "trained with the presets style and object: give --preset, one of these" in capsys.readouterr().err


def test_a_folder_that_is_there_is_left_alone(tiny, gate_files, tmp_path, capsys):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "file").write_text("x")
    assert commands.main(arguments(tiny, gate_files, out)) == 2
    assert f"--out: {out} exists already: choose another name, or remove it." in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["file"]


def test_gates_that_cannot_be_baked_are_named(tiny, gate_files, tmp_path, capsys, monkeypatch):
    def refuse(*_) -> None:
        raise ValueError("their corrections overflow")

    monkeypatch.setattr(bake.Baker, "__init__", refuse)
    assert commands.main(arguments(tiny, gate_files, tmp_path / "baked")) == 2
    assert capsys.readouterr().err == f"cpe.py: {gate_files[0]}, {gate_files[1]}: their corrections overflow.\n"


@pytest.fixture
def ctrl_c(monkeypatch):
    """A function that has the next baking interrupted in its third step."""

    def arm() -> None:
        update = bake.Baker.update

        def interrupted(self):
            if self.done == 2:
                monkeypatch.setattr(bake.Baker, "update", update)
                signal.raise_signal(signal.SIGINT)
            return update(self)

        monkeypatch.setattr(bake.Baker, "update", interrupted)

    return arm


def text_encoder(folder: Path) -> bytes:
    return (folder / "text_encoder" / "model.safetensors").read_bytes()


def test_an_interrupted_bake_goes_on_and_ends_in_the_same_bytes(tiny, gate_files, tmp_path, capsys, ctrl_c):
    place = tmp_path / "place"
    whole, out = place / "whole", place / "baked.v1"
    assert commands.main(arguments(tiny, gate_files, whole, "--images", "0")) == 0
    ctrl_c()
    assert commands.main(arguments(tiny, gate_files, out, "--images", "0")) == 130
    assert "go on with --resume" in capsys.readouterr().err
    assert {path.name for path in place.iterdir()} == {"whole", "baked.v1.baking.state.safetensors"}
    assert files.load_tensors(place / "baked.v1.baking.state.safetensors")[0]["done"] == 3
    assert commands.main(arguments(tiny, gate_files, out, "--images", "0", "--resume")) == 0
    assert {path.name for path in place.iterdir()} == {"whole", "baked.v1"}
    assert text_encoder(whole) == text_encoder(out)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, files.UserError("images are not finite")])
def test_a_bake_that_stopped_while_it_measured_is_measured_by_resume(
    tiny, gate_files, tmp_path, capsys, monkeypatch, stop
):
    out = tmp_path / "baked"
    call = arguments(tiny, gate_files[:1], out, "--images", "0")

    def stopped(*_) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(commands, "measure_baking", stopped)
        assert commands.main(call) == (130 if stop is KeyboardInterrupt else 2)
    assert f"{out} is written; what it loses was not measured to the end" in capsys.readouterr().err
    written = text_encoder(out)
    assert commands.main(call) == 2
    assert "exists already: choose another name, or remove it, or measure what it loses, with --resume" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(weights, "save_model", None)  # it is not written again
    assert commands.main([*call, "--resume"]) == 0
    assert "left, 'the {} here, please'" in capsys.readouterr().out
    assert text_encoder(out) == written
    assert not list(tmp_path.glob("*.state.safetensors"))


def test_a_folder_of_something_else_is_not_taken_for_what_a_bake_has_written(
    tiny, gate_files, tmp_path, capsys, ctrl_c
):
    out = tmp_path / "baked"
    call = arguments(tiny, gate_files[:1], out, "--images", "0")
    ctrl_c()
    assert commands.main(call) == 130
    out.mkdir()
    (out / "file").write_text("x")
    assert commands.main([*call, "--resume"]) == 2
    assert f"{out} exists already: choose another name" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_state_is_gone_on_with_by_the_same_settings_alone_or_removed_by_hand(
    tiny, gate_files, tmp_path, capsys, ctrl_c
):
    out, whole = tmp_path / "baked", tmp_path / "whole"
    ctrl_c()
    assert commands.main(arguments(tiny, gate_files[:1], out, "--images", "0")) == 130
    others = arguments(tiny, gate_files[1:], out), arguments(tiny, gate_files[:1], out, "--seed", "1")
    for other in (*others, arguments(tiny, gate_files[:1], out, "--steps-scale", "0.02")):
        assert commands.main([*other, "--images", "0", "--resume"]) == 2
        assert (
            "other settings, or of another version of cpe.py: use the same, choose another" in capsys.readouterr().err
        )
    state = commands.state_file(out)
    assert commands.main(arguments(tiny, gate_files[:1], out, "--images", "0")) == 2
    assert f"{state} is of an unfinished run: go on with it, by the same settings" in capsys.readouterr().err
    state.unlink()
    assert commands.main(arguments(tiny, gate_files[:1], out, "--images", "0")) == 0
    assert commands.main(arguments(tiny, gate_files[:1], whole, "--images", "0")) == 0
    assert text_encoder(whole) == text_encoder(out)
    assert not commands.state_file(out).exists()


def test_a_dead_zone_is_baked_and_makes_another_run(tiny, gate_files, tmp_path, capsys, ctrl_c, monkeypatch):
    zones, load = [], commands.load_gates
    monkeypatch.setattr(commands, "load_gates", lambda *given: zones.append(load(*given)) or zones[-1])
    call = arguments(tiny, gate_files, tmp_path / "baked", "--images", "0")
    ctrl_c()
    assert commands.main([*call, "--zone", "0.5"]) == 130
    assert zones[-1].zone == 0.5
    assert commands.main([*call, "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert commands.main([*call, "--resume", "--zone", "0.5"]) == 0


def test_resume_refuses_a_state_of_another_version(tiny, gate_files, tmp_path, capsys, ctrl_c, monkeypatch):
    call = arguments(tiny, gate_files[:1], tmp_path / "baked", "--images", "0")
    ctrl_c()
    assert commands.main(call) == 130
    monkeypatch.setitem(commands.VERSIONS, "bake", commands.VERSIONS["bake"] + 1)
    assert commands.main([*call, "--resume"]) == 2
    assert "or of another version of cpe.py: use the same, choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_bake_leaves_no_model(tiny, gate_files, tmp_path, stop):
    out = tmp_path / "place" / "baked"
    out.parent.mkdir()
    call = arguments(tiny, gate_files, out, "--steps-scale", "100")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bake, commands; steps = bake.Baker.steps\n"
        "def told(self):\n    for p in steps(self):\n        print('step', flush=True)\n        yield p\n"
        f"bake.Baker.steps = told; sys.exit(commands.main({call!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "step\n"
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    assert "Traceback" not in errors
    left = [commands.state_file(out)] if stop == signal.SIGINT else []
    assert list(out.parent.iterdir()) == left


# --- On images -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_default_recipe_erases_red_heart_from_the_embedded_model(monkeypatch, tmp_path):
    """Gates of the preset, baked by the default recipe: what CLIP sees in images, before and after."""
    monkeypatch.chdir(tmp_path)
    assert commands.main(["train", "--target", "red heart", "--model", "emoji", "--out", "x.safetensors"]) == 0
    settings = ["--gates", "x.safetensors", "--out", "baked", "--model", "emoji", "--images", "0"]
    assert commands.main(["bake", *settings]) == 0
    world = compare.World(weights.load_model("emoji"))
    target = world.concepts.index("red heart")
    concepts = torch.tensor([target] * 8 + evaluate.nearest(world.features, target, 10))
    prompts = [world.prompt(world.concepts[c], i) for i, c in enumerate(concepts.tolist())]
    right = {}
    for name, model in (("before", world.model), ("after", weights.load_model("baked"))):
        images = compare.draw(model, model.encode(prompts), range(len(prompts)), None, compare.Budget())
        right[name] = world.see(images, "concept") == concepts
    assert right["before"][:8].sum() >= 7  # or there would be nothing to erase
    assert right["after"][:8].sum() <= 1
    assert right["after"][8:].sum() >= right["before"][8:].sum() - 1


# --- diffusers -----------------------------------------------------------------------------------------------------


@pytest.mark.oracle
def test_diffusers_opens_a_baked_model_and_sees_the_same_prompts(tiny, gate_files, tmp_path):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    out = tmp_path / "baked"
    assert commands.main(arguments(tiny, gate_files[:1], out, "--images", "0")) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline.from_pretrained(out, local_files_only=True, torch_dtype=torch.float32)
    baked = weights.load_model(out)
    context, _ = pipe.encode_prompt("a red heart", "cpu", 1, False)
    assert reference.difference(baked.encode(["a red heart"]), context) <= 1e-5
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = pipe("a red heart", generator=torch.Generator().manual_seed(3), **settings).images
    *_, ours = cpe.denoise(baked, ["a red heart"], [3], steps=3, guidance_scale=4.0)
    assert reference.difference(ours, theirs) <= 1e-5


def test_more_concepts_take_more_steps_and_units():
    recipe = bake.Recipe(units=10, steps=70, more=10)
    assert [recipe.of(n).steps for n in (1, 2, 10)] == [70, 80, 160]
    assert [recipe.of(n).units for n in (1, 4, 10)] == [10, 20, 32]
    assert recipe.of(10, 0.5).steps == 80
    assert recipe.of(1, 1e-4).steps == 1
