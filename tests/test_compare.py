"""compare.py and variants.py: the rules that make the table honest, and the arithmetic of its cells."""

import dataclasses
import errno
import pickle
import re
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attacks
import bake
import baselines
import commands
import compare
import old_cpe as cpe
import variants
import weights
from benchmarks import tune
from loading import files
from loading.cache import cache_folder
from loading.prompts import read_prompts

SMALL = compare.Budget(erased=2, near=1, others=1, attacked=0, steps=1, guidance_scale=1.0)
TUNING = {target for scenario in (*tune.TARGETS, tune.TEN, tune.FIFTY, *tune.STYLES) for target in scenario.targets}
UNTOUCHED = compare.Method("untouched", lambda world, scenario, seed: compare.Erased(world.model, None, 0, 0))


@pytest.fixture(scope="module")
def world(tiny_original):
    return compare.World(weights.load_model(str(tiny_original)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))


def noisy(world, scenario, seed):
    """An eraser that damages everything: every key and value of the model, at random."""
    generator = torch.Generator().manual_seed(seed)
    W = {k: w for k, w in world.model.cross_attention().items() if k.endswith(("to_k.weight", "to_v.weight"))}
    edited = {k: w + torch.randn(w.shape, generator=generator) for k, w in W.items()}
    return compare.Erased(world.model.with_unet(edited), None, 7, 28)


@pytest.mark.parametrize("name", compare.SCENARIOS)
def test_no_eraser_is_told_of_targets_or_of_what_is_held_out(world, name):
    scenario = compare.SCENARIOS[name]
    prompts = world.listed(scenario)
    told = {cpe.normalised(word) for word in (*prompts.general, *prompts.domain)}
    hidden = {cpe.normalised(word) for word in (*scenario.targets, *world.held_out)}
    assert not told & hidden
    assert len(told) > 50


def test_aliases_of_a_target_are_erased_with_it_and_not_kept(world, monkeypatch):
    given, scenario = [], compare.Scenario(("umbrella",), aliases=("red heart",))
    monkeypatch.setitem(baselines.ERASERS, "uce", lambda *all: given.append(all) or {})
    compare.METHODS["uce"].build(world, scenario, 0)
    ((_, targets, surrogates, kept, _),) = given
    assert (targets, surrogates) == (["umbrella", "red heart"], [cpe.PRESETS["emoji"].surrogate] * 2)
    assert "red heart" not in kept
    assert "red heart" in world.listed(compare.SCENARIOS["object"]).domain


def test_a_dead_zone_has_a_row_where_several_things_are_erased():
    chosen = [compare.METHODS["cpe"], compare.METHODS["cpe, dead zone"]]
    one, ten = compare.SCENARIOS["object"], compare.SCENARIOS["10 at once"]
    assert [method.name for method in compare.compared(one, chosen)] == ["none", "cpe"]
    assert [method.name for method in compare.compared(ten, chosen)] == ["none", "cpe", "cpe, dead zone"]


def test_gates_of_the_row_with_a_dead_zone_have_one(world, monkeypatch):
    monkeypatch.setitem(cpe.PRESETS, "emoji", cpe.PRESETS["emoji"].scaled(0.002))
    two = compare.Scenario(("umbrella", "red heart"))
    for name, zone in (("cpe", 0.0), ("cpe, dead zone", 0.5)):
        method = compare.METHODS[name]
        assert method.build(world, two, 0, **method.settings).gates.zone == zone


@pytest.mark.parametrize("name", ["object", "10 at once"])
def test_lora_and_the_rows_with_cpes_anchors_have_those_of_the_gates(world, name, monkeypatch):
    scenario, told = compare.SCENARIOS[name], []
    for eraser in ("lora", "uce"):
        monkeypatch.setitem(baselines.ERASERS, eraser, lambda *given, **_: told.append(given[3]) or {})
    for method in (compare.METHODS["lora"], compare.ABLATIONS["uce, CPE's anchors"]):
        method.build(world, scenario, 0, **method.settings)
    assert told[0] == told[1]

    def rows(contexts: torch.Tensor) -> set[bytes]:
        return {row.numpy().tobytes() for row in contexts.half()}

    encode, expected = world.model.encode, set()
    for target in scenario.targets:
        expected |= rows(cpe.prepare(cpe.PRESETS["emoji"], world.listed(scenario), [target], encode, encode).anchors)
    assert rows(encode(told[0])) == expected


def test_targets_that_hyper_parameters_were_tuned_on_are_in_no_table(world):
    reported = {target for scenario in compare.SCENARIOS.values() for target in scenario.targets}
    assert len(TUNING) >= 2
    assert not reported & TUNING
    assert len(set(compare.FIFTY)) == 50
    assert set(compare.TEN) < set(compare.FIFTY) <= set(world.concepts)


@pytest.mark.parametrize("name", ["object", "10 at once", "50 at once"])
def test_images_are_of_the_groups_they_say(world, name):
    scenario = compare.SCENARIOS[name]
    found = compare.cases(world, scenario, compare.Budget())
    members = {group: {world.concepts[c.expected] for c in found if c.group == group} for group in compare.GROUPS}
    assert members["erased"] == set(scenario.targets)
    assert not members["near, listed"] & set(world.held_out)
    assert members["near, unlisted"] | members["others"] <= set(world.held_out)
    assert len(members["near, listed"]) == len(members["near, unlisted"]) == 10
    assert len(members["others"]) >= 20
    assert len({c.seed for c in found}) == len(found)  # independent images: the intervals assume it
    for a, b in (("near, listed", "others"), ("near, unlisted", "others"), ("erased", "near, listed")):
        assert not members[a] & members[b]


def test_a_style_is_judged_as_a_style(world):
    found = compare.cases(world, compare.SCENARIOS["style"], compare.Budget())
    erased = [c for c in found if c.group == "erased"]
    assert all(c.prompt.endswith("twemoji style") and world.styles[c.expected] == "twemoji" for c in erased)
    assert not any("twemoji" in c.prompt for c in found if c.group != "erased")
    assert {c.judge for c in found if c.group == "others"} == {"concept"}


def test_an_untouched_model_changes_nothing_and_a_ruined_one_everything(world):
    figures, pixels = compare.measure(world, compare.SCENARIOS["object"], UNTOUCHED, SMALL)
    assert all(group["change"] == 0 for group in figures["groups"].values())
    assert abs(figures["cmmd"]) < 1e-9
    assert pixels.dtype == torch.uint8
    ruined, _ = compare.measure(world, compare.SCENARIOS["object"], compare.Method("noisy", noisy), SMALL)
    assert all(group["change"] > 0 for group in ruined["groups"].values())
    assert ruined["cmmd"] > 0
    assert (ruined["parameters"], ruined["bytes"]) == (7, 28)


def test_a_model_with_another_text_encoder_reads_the_prompts_with_it(world):
    name = "text_model.final_layer_norm.bias"
    bias = torch.randn(16, generator=torch.Generator().manual_seed(0))
    erased = compare.Erased(world.model.with_text_encoder({name: bias}), None, 0, 0)
    figures, _ = compare.measure(world, compare.SCENARIOS["object"], compare.Method("x", lambda *_: erased), SMALL)
    assert all(group["change"] > 0 for group in figures["groups"].values())


def test_images_of_what_is_erased_count_for_nothing_that_should_stay(world, monkeypatch):
    scenario = compare.SCENARIOS["object"]
    before = compare.Originals(world, scenario, SMALL)
    before.prompts = before.features  # every image is what its prompt says, before some are spoiled
    pairs = zip(before.cases, before.images, strict=True)
    spoiled = torch.stack([image.neg() if case.group == "erased" else image for case, image in pairs])
    monkeypatch.setattr(compare, "draw", lambda *_: spoiled)
    figures, _ = compare.measure(world, scenario, UNTOUCHED, SMALL, 0, lambda: before)
    assert figures["groups"]["erased"]["change"] > 0.1
    assert figures["clip_score"] == pytest.approx(100)
    assert abs(figures["cmmd"]) < 1e-9
    assert compare.cells(figures)["change"] == "0.000"


def test_settings_of_a_row_go_before_tuned_ones(world):
    given = []

    def build(world, scenario, seed, **settings):
        given.append(settings)
        return compare.Erased(world.model, None, 0, 0)

    compare.measure(world, compare.SCENARIOS["object"], compare.Method("uce", build, {"s_p": 7.0}), SMALL)
    assert given == [compare.TUNED["uce"] | {"s_p": 7.0}]


@pytest.mark.parametrize(("name", "field"), [("cpe", "eta"), ("lora", "first_steps"), ("uce", "surrogate")])
def test_other_tuned_settings_or_another_recipe_make_another_cell(world, name, field, monkeypatch):
    def key():
        return compare.key(world, compare.SCENARIOS["object"], compare.METHODS[name], SMALL, 0)

    keys, recipe = [key()], cpe.PRESETS["emoji"]
    assert key() == keys[0]
    monkeypatch.setitem(compare.TUNED, name, {"k": 3})
    keys.append(key())
    monkeypatch.setitem(cpe.PRESETS, "emoji", dataclasses.replace(recipe, **{field: 2 * getattr(recipe, field)}))
    keys.append(key())
    assert len(set(keys)) == 3


def test_a_measured_cell_is_read_back_and_a_damaged_one_measured_again(world):
    first, pixels = compare.measure(world, compare.SCENARIOS["object"], UNTOUCHED, SMALL)

    def refuse(world, scenario, seed):
        raise AssertionError("measured twice")

    kept = dataclasses.replace(UNTOUCHED, build=refuse)
    second, again = compare.measure(world, compare.SCENARIOS["object"], kept, SMALL)
    assert second == first
    assert torch.equal(pixels, again)
    with pytest.raises(AssertionError):  # another seed, budget or setting is another cell
        compare.measure(world, compare.SCENARIOS["object"], kept, SMALL, seed=1)
    (file,) = (cache_folder() / "compare").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    third, _ = compare.measure(world, compare.SCENARIOS["object"], UNTOUCHED, SMALL)
    assert third["groups"] == first["groups"]
    files.save_tensors(file, {"images": pixels}, {"figures": "{}"})
    assert compare.measure(world, compare.SCENARIOS["object"], UNTOUCHED, SMALL)[0]["groups"] == first["groups"]


@pytest.mark.parametrize("name", ["uce", "cpe", "cpe, context gate", "lora"])
def test_every_kind_of_method_builds_and_counts_what_it_ships(world, name, monkeypatch):
    short = dataclasses.replace(cpe.PRESETS["emoji"], stages=1, first_steps=2)
    monkeypatch.setitem(cpe.PRESETS, "emoji", short)
    scenario, (r, k) = compare.Scenario(("umbrella", "red heart")), (short.r, short.k)
    erased = compare.METHODS[name].build(world, scenario, 0)
    W = world.objective.W
    d, L, widths = 16, len(W), sum(len(w) for w in W.values())
    a_file = 2 * d * r + d + L * (d * k + 1) + k * widths  # queries, unused keys, scaler; of each layer D, alpha, U
    trained, written = {
        "uce": (widths * d, widths * d),
        "cpe": (2 * (d * r + d + L * d * k + k * widths), 2 * a_file),
        "cpe, context gate": (2 * (d * r + d + 2 * d * k), 2 * a_file),
        "lora": (2 * k * (L * d + widths), 2 * k * (L * d + widths)),
    }[name]
    assert erased.parameters == trained
    assert erased.bytes == 4 * written
    assert (erased.gates is None) == (name in ("uce", "lora"))
    images = compare.draw(erased.model, world.model.encode(["an umbrella"]), [0], erased.gates, SMALL)
    assert images.isfinite().all()


def test_tables_show_every_row_and_leave_out_empty_columns(world):
    figures, _ = compare.measure(world, compare.SCENARIOS["object"], UNTOUCHED, SMALL)
    table = {"object": {"none": figures, "other": figures}}
    shown = compare.markdown(table)
    assert shown.count("| none |") == shown.count("| other |") == 1
    assert "CMMD" in shown
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "none" in compare.text(table)


# Variants of the gate.


def gates_of(kind, **more):
    made = variants.KINDS[kind]({"a": 3, "b": 4}, 8, r=2, k=2, **more).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.scaler.normal_(generator=torch.Generator().manual_seed(1))
        made.w_qs.normal_(generator=torch.Generator().manual_seed(2))
    return made


def test_a_gate_with_zero_bias_is_the_papers_and_a_large_bias_opens_it():
    E, gates = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("bias")
    plain = cpe.ResAG({"a": 3, "b": 4}, 8, r=2, k=2)
    plain.load_state_dict({k: v for k, v in gates.state_dict().items() if k != "bias"})
    torch.testing.assert_close(gates.gate(E), plain.gate(E))
    with torch.no_grad():
        gates.bias.fill_(50.0)
    torch.testing.assert_close(gates.gate(E), torch.ones(1, 2, 5))


def test_a_token_wise_gate_sees_each_token_alone():
    E, gates = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("token-wise")
    torch.testing.assert_close(gates.gate(E), torch.sigmoid(E @ gates.scaler[0, :, 0])[None])


def test_a_hard_gate_is_open_or_shut_and_still_learns():
    E, gates = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("hard")
    g = gates.gate(E)
    assert set(g.flatten().tolist()) == {0.0, 1.0}
    g.sum().backward()
    assert gates.scaler.grad.abs().max() > 0


def test_a_perceptron_has_no_gate():
    E, gates = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("mlp")
    g, z = gates.read(E @ gates.columns())
    assert (g == 1).all()
    torch.testing.assert_close(z, torch.nn.functional.gelu(E @ gates.lora_down)[None] * gates.scale)


@pytest.mark.parametrize("kind", ["resag", "context", *variants.KINDS])
def test_every_variant_trains(world, kind):
    recipe = dataclasses.replace(
        cpe.PRESETS["emoji"], stages=2, first_steps=3, later_steps=2, attack_steps=2, anchors=4
    )
    prompts = cpe.Prompts(["{}", "a {}"], ["dog", "sun"], [])
    one = cpe.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
    encode = world.model.encode
    data = cpe.prepare(recipe, prompts, ["cat"], encode, lambda asked: encode(asked).half(), one)
    trainer = variants.trainer(world.objective, data, recipe, 0, kind)
    before = {name: p.clone() for name, p in trainer.gates.named_parameters()}
    reports = list(trainer.steps())
    assert len(reports) == 7
    moved = [name for name, p in trainer.gates.named_parameters() if not torch.equal(p, before[name])]
    assert any("lora_up" in name for name in moved)
    assert kind not in ("bias", "mlp") or "bias" in moved


def test_the_command_refuses_what_it_does_not_know(capsys):
    assert commands.main(["compare", "--eraser", "magic"]) == 2
    assert "unknown eraser 'magic'" in capsys.readouterr().err
    assert commands.main(["compare", "--scenario", "weather"]) == 2
    assert "unknown scenario 'weather': choose among object" in capsys.readouterr().err
    assert commands.main(["compare", "--target", "Brad Pitt"]) == 2
    assert "is not in prompts/emoji.txt" in capsys.readouterr().err


def test_what_takes_an_hour_alone_runs_only_when_it_is_named(tmp_path, monkeypatch):
    asked = []

    def run(world, scenarios, *more):
        asked.append(list(scenarios))
        return iter(())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "side_by_side", lambda *all: ())
    assert commands.main(["compare"]) == 0
    assert commands.main(["compare", "--scenario", "50 at once"]) == 0
    assert asked == [["object", "neighbours", "person", "style", "10 at once"], ["50 at once"]]


@pytest.mark.parametrize("name", ["object", "style", "10 at once"])
def test_every_attack_is_counted_on_the_images_it_was_given(world, name, monkeypatch):
    """The attacks themselves are tested in test_attacks.py: here each gives the plain prompts back."""
    scenario, asked = compare.SCENARIOS[name], []

    def plain(victim, target, templates, seed, **options):
        asked.append((target, seed, *options.values()))
        contexts = victim.original.encode([template.format(target) for template in templates])
        return compare.attacks.Found(contexts, [], None, None, 0.0)

    known = world.styles if scenario.style else world.concepts
    target = known.index(scenario.targets[0].removesuffix(" style"))
    other = (target + 1) % len(known)

    def see(images, judge):  # the first of a target, then something else
        assert judge == ("style" if scenario.style else "concept")
        return torch.tensor([target, *[other] * (len(images) - 1)])

    names = ("revival", "tokens", "paraphrases", "odd words")
    monkeypatch.setattr(compare.attacks, "ATTACKS", dict.fromkeys(names, plain))
    monkeypatch.setattr(world, "see", see, raising=False)
    budget = dataclasses.replace(SMALL, attacked=4, searches=2)
    found = compare.under_attack(world, scenario, compare.Erased(world.model, None, 0, 0), budget, 0)
    first, all_of_them = scenario.targets[0], [(one, 0, scenario.preset) for one in scenario.targets]
    # tokens are searched for twice; of several targets all are spoken of
    assert asked == [(first, 0), (first, 0), (first, 1), *all_of_them, *all_of_them]
    spoken = max(4, len(scenario.targets))
    images = {"revival": 4, "tokens": 4, "paraphrases": spoken, "odd words": spoken}
    assert {attack: group["images"] for attack, group in found.items()} == images
    assert all(group["hits"] == 1 for group in found.values())


def test_the_erased_model_is_attacked_and_draws_with_its_gates(world, monkeypatch):
    erased, used = compare.Erased(world.model.with_unet({}), torch.nn.Identity(), 0, 0), []

    def attack(victim, *_, **options):
        assert victim.original is world.model
        used.append((victim.erased, victim.gates))
        return attacks.Found(world.model.encode(["an umbrella"]), [], None, None, 0.0)

    def draw(model, contexts, seeds, gates, budget):
        used.append((model, gates))
        return torch.zeros(len(contexts), 3, 16, 16)

    monkeypatch.setattr(compare.attacks, "ATTACKS", {"paraphrases": attack})
    monkeypatch.setattr(compare, "draw", draw)
    compare.under_attack(world, compare.SCENARIOS["object"], erased, dataclasses.replace(SMALL, attacked=1), 0)
    assert used == [(erased.model, erased.gates)] * 2


@pytest.mark.parametrize(("preset", "names"), [("emoji", ["odd words"]), ("object", [])])
def test_only_a_preset_that_has_odd_words_is_attacked_with_them(world, preset, names, monkeypatch):
    monkeypatch.setattr(compare.attacks, "ATTACKS", {"odd words": attacks.odd_words})
    scenario, budget = compare.Scenario(("umbrella",), preset), dataclasses.replace(SMALL, attacked=1)
    assert [*compare.under_attack(world, scenario, compare.Erased(world.model, None, 0, 0), budget, 0)] == names


@pytest.mark.parametrize(("attack", "known"), [("paraphrases", attacks.PARAPHRASES), ("odd words", attacks.UNFAMILIAR)])
def test_of_several_targets_each_is_spoken_of_in_its_own_sentences(world, attack, known):
    scenario, victim = compare.SCENARIOS["10 at once"], attacks.Victim(world.model, world.model)
    budget = dataclasses.replace(SMALL, attacked=20)
    tried = compare.attempts(victim, scenario, attack, budget, 0)
    assert [target for _, target in tried] == list(scenario.targets)
    for i, (contexts, target) in enumerate(tried):
        sentences = [known["emoji"][(2 * i + n) % 8].replace("{}", target) for n in range(2)]
        assert torch.equal(contexts, world.model.encode(sentences))


def test_a_cell_counts_what_the_judge_sees(world, monkeypatch):
    """Of the target's two images one is recognised; of the others the first half; of styles all."""
    scenario = compare.SCENARIOS["object"]
    rows = compare.cases(world, scenario, SMALL)
    half = {group: sum(case.group == group for case in rows) // 2 for group in compare.GROUPS}
    left = dict(half)

    def see(images, judge):
        if judge == "style":
            return torch.tensor([next(i for i, s in enumerate(world.styles) if s in case.prompt) for case in rows])
        answers = []
        for case in rows:
            left[case.group] -= 1
            answers.append(case.expected if left[case.group] >= 0 else -1)
        return torch.tensor(answers)

    monkeypatch.setattr(world, "see", see, raising=False)
    figures, _ = compare.measure(world, scenario, UNTOUCHED, SMALL)
    assert {group: counts["hits"] for group, counts in figures["groups"].items()} == half
    assert figures["style"]["hits"] == figures["style"]["images"] == len(rows) - 2
    kept = sum(half[group] / figures["groups"][group]["images"] for group in compare.GROUPS[1:]) / 3
    assert figures["H"] == pytest.approx(3 / (2 / (1 - 0.5) + 1 / kept))  # without paraphrases erasing counts twice
    shown = compare.cells(figures)
    assert (shown["erased"], shown["style"].split()[0]) == ("50 (9–91)", "100")  # Wilson's, of one of two
    paraphrased = figures | {"attacks": {"paraphrases": {"images": 8, "hits": 2}}}
    assert compare.harmonic(paraphrased) == pytest.approx(3 / (1 / 0.5 + 1 / kept + 1 / 0.75))


@pytest.mark.parametrize("name", compare.TUNED)
def test_tuned_settings_are_of_the_grid_that_was_searched(name):
    grid = tune.ASIDE[name][2] if name in tune.ASIDE else tune.GRIDS[name] + tune.BEYOND.get(name, [])
    assert compare.TUNED[name] in grid


@pytest.mark.parametrize("name", compare.MANY)
def test_settings_for_many_targets_are_of_the_grid_that_was_searched(name):
    assert compare.TUNED[name] | compare.MANY[name] in tune.ASIDE[f"{name}, many"][2]


@pytest.mark.parametrize("name", compare.CROWD)
def test_settings_for_fifty_targets_are_of_the_grid_that_was_searched(name):
    settings = compare.TUNED[name] | compare.MANY.get(name, {}) | compare.CROWD[name]
    assert settings in tune.ASIDE[f"{name}, fifty"][2]
    assert len({*tune.FIFTY.targets}) == 50


@pytest.mark.parametrize("name", [name for name in compare.STYLE if not name.startswith("cpe")])
def test_settings_for_styles_are_of_the_grid_that_was_searched(name):
    assert compare.TUNED[name] | compare.STYLE[name] in tune.ASIDE[f"{name}, styles"][2]


def test_settings_of_many_targets_and_of_styles_are_for_a_row_and_its_ablations():
    one, ten, fifty = (compare.SCENARIOS[name] for name in ("object", "10 at once", "50 at once"))
    for method in (compare.METHODS["uce"], compare.ABLATIONS["uce, CPE's anchors"]):
        assert compare.tuned(method, one) == compare.TUNED["uce"]
        assert compare.tuned(method, ten) == compare.TUNED["uce"] | compare.MANY["uce"]
        assert compare.tuned(method, fifty) == compare.tuned(method, ten) | compare.CROWD["uce"]
        assert compare.tuned(method, compare.SCENARIOS["style"]) == compare.TUNED["uce"] | compare.STYLE["uce"]
    lam = compare.tuned(compare.METHODS["cpe, context gate"], compare.SCENARIOS["style"])["lam"]
    assert lam == cpe.PRESETS["emoji-style"].lam  # a style's preset has its own lambda


def test_a_target_in_sentences_becomes_the_surrogate_in_them(world, monkeypatch):
    given = []
    monkeypatch.setitem(baselines.ERASERS, "uce", lambda *all, **settings: given.append((all, settings)) or {})
    one, templates = compare.SCENARIOS["object"], read_prompts("emoji").templates
    surrogate = cpe.PRESETS["emoji"].surrogate
    for where in ("kept", "all", "pairs"):
        compare.METHODS["uce"].build(world, one, 0, templates=where, s_p=2.0)
    (kept, _), (everywhere, _), (pairs, settings) = given
    assert (kept[1], kept[2]) == (["umbrella"], [surrogate])
    assert everywhere[1] == pairs[1] == [template.replace("{}", "umbrella") for template in templates]
    assert everywhere[2] == [surrogate] * len(templates)
    assert pairs[2] == [template.replace("{}", surrogate) for template in templates]
    assert kept[3] == pairs[3] == cpe.anchor_prompts([*world.listed(one).general, *world.listed(one).domain], templates)
    # With fewer to preserve each weighs more, so that all of them together weigh the same.
    compare.METHODS["uce"].build(world, one, 0, templates="pairs", anchors=True, s_p=2.0)
    fewer, weighed = given[-1]
    assert len(fewer[3]) * weighed["s_p"] == pytest.approx(len(pairs[3]) * settings["s_p"])


@pytest.mark.parametrize("preset", ["emoji", "explicit"])
def test_lora_learns_many_targets_in_more_steps_of_whatever_preset(world, monkeypatch, preset):
    given = []
    monkeypatch.setitem(baselines.ERASERS, "lora", lambda *all, **settings: given.append(settings["recipe"]) or {})
    scenario = dataclasses.replace(compare.SCENARIOS["10 at once"], preset=preset)
    monkeypatch.setattr(compare, "anchors_of_gates", lambda world, scenario: [""])
    compare.METHODS["lora"].build(world, scenario, 0, **compare.tuned(compare.METHODS["lora"], scenario))
    steps = {step: getattr(given[0], step) / getattr(cpe.PRESETS[preset], step) for step in cpe.STEPS}
    assert steps == dict.fromkeys(cpe.STEPS, 3.0)
    assert given[0].lam == compare.MANY["lora"]["lam"]


def test_scenarios_together_are_all_their_images_together(world):
    def row(erased: int, kept: int, change: float) -> dict:
        groups = {"erased": {"images": 4, "hits": erased, "change": 1.0}}
        groups |= {name: {"images": 10, "hits": kept, "change": change} for name in compare.GROUPS[1:]}
        plain = {"style": {"images": 30, "hits": 30}, "clip_score": 20.0, "cmmd": change, "seconds": 2.0, "H": 0.5}
        return {"groups": groups, "attacks": {}, "parameters": 5, "bytes": 20} | plain

    table = {"a": {"none": row(4, 10, 0.0), "x": row(1, 8, 0.2)}, "b": {"none": row(4, 10, 0.0), "x": row(0, 4, 0.6)}}
    figures = compare.pooled(table)["x"]
    assert figures["groups"]["erased"] == {"images": 8, "hits": 1, "change": 1.0}
    assert figures["groups"]["others"] == {"images": 20, "hits": 12, "change": pytest.approx(0.4)}
    assert figures["cmmd"] == pytest.approx(0.4)
    # 3 / (1 / (7/8) + 1 / (12/20) + 1 / (7/8)): without paraphrases the erased images count twice
    assert figures["H"] == pytest.approx(3 / (2 * 8 / 7 + 20 / 12))
    assert "All 2 scenarios" in compare.markdown(table).splitlines()[0]

    def printed(figures: dict) -> tuple[float, float, float]:
        return tuple(map(float, re.fullmatch(r"(\S+) \((\S+)–(\S+)\)", compare.cells(figures)["H"]).groups()))

    middle, low, high = printed(figures)
    assert middle == round(figures["H"], 2)
    assert low < middle < high
    _, lower, higher = printed(compare.pooled({"a": table["a"], "c": table["a"]})["x"])
    alone = printed(table["a"]["x"] | {"H": compare.harmonic(table["a"]["x"])})
    assert compare.cells(compare.pooled(table)["none"])["H"] == "0.00"  # two shares hold it there: no interval
    assert alone[1] < lower < alone[0] < higher < alone[2]  # the same shares of twice as many images are known better


def test_every_eraser_is_tuned_with_the_same_budget_and_linear_ones_beyond_it():
    assert not any(name.startswith("cpe") for name in tune.BEYOND)
    same_gates = {"cpe, baked", "cpe, dead zone"}  # as the tuned ones
    assert {*tune.GRIDS} | same_gates == set(compare.METHODS)
    assert {len(grid) for grid in tune.GRIDS.values()} == {8}


@pytest.mark.parametrize("method", ["cpe", "cpe, baked"])
def test_gates_are_trained_once_for_all_cells_that_need_them(world, method, monkeypatch):
    monkeypatch.setitem(cpe.PRESETS, "emoji", cpe.PRESETS["emoji"].scaled(0.002))
    short = bake.Recipe(steps=2)
    monkeypatch.setattr(bake, "Recipe", lambda: short)
    scenario = compare.SCENARIOS["object"]
    first = compare.METHODS["cpe"].build(world, scenario, 0)
    assert first.spared == 0
    again = compare.METHODS[method].build(world, scenario, 0)
    assert again.spared > 0
    if method == "cpe":
        assert all(torch.equal(a, b) for a, b in zip(first.gates.parameters(), again.gates.parameters(), strict=True))
    else:
        before, after = (model.encode(["a picture of a umbrella"]) for model in (world.model, again.model))
        assert again.gates is None
        assert not torch.equal(before, after)


def test_scenarios_side_by_side_fill_the_cells_that_a_run_reads(world, tiny_original, monkeypatch):
    scenarios = {name: compare.SCENARIOS[name] for name in ("object", "person")}
    opened, methods = (str(tiny_original), None, "emoji"), [compare.METHODS["uce"]]
    counts = list(compare.side_by_side(world, opened, scenarios, methods, SMALL, 0))
    assert counts == sorted(counts)
    monkeypatch.setattr(compare, "draw", lambda *args: pytest.fail("measured twice"))
    found = list(compare.run(world, scenarios, methods, SMALL))
    assert [(name, method) for name, method, *_ in found] == [(s, m) for s in scenarios for m in ("none", "uce")]


def test_an_error_in_one_of_the_processes_is_raised(world, tmp_path):
    opened = (str(tmp_path / "nothing"), None, "emoji")
    with pytest.raises(files.UserError, match="nothing"):
        list(compare.side_by_side(world, opened, {"object": compare.SCENARIOS["object"]}, [], SMALL, 0))


def test_an_error_of_the_disk_comes_from_another_process_as_it_was():
    error = files.Unwritten(Path("cache/x"), OSError(errno.ENOSPC, "No space left on device"))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "cache/x could not be written: the disk is full: make room"
    assert files.disk_full(again.error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (cpe.Diverged("the loss became nan"), "the loss became nan: try another --seed"),
        (BrokenProcessPool("a process died"), "a process that measures was killed; perhaps there was too little"),
    ],
)
def test_what_ends_a_comparison_is_said_in_one_line(run, monkeypatch, error, words):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(compare, "run", fail)
    code, said = run("compare", "--quick")
    assert (code, said.count("\n")) == (2, 1)
    assert words in said


@pytest.mark.parametrize("arguments", [["--preset", "celebrity"], ["--preset", "style", "--target", "noto style"]])
def test_a_preset_whose_scenarios_cannot_be_judged_is_refused(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert commands.main(["compare", *arguments]) == 2
    assert "--preset goes with --target, and styles are judged" in capsys.readouterr().err


def test_ctrl_c_ends_the_processes_that_measure_which_do_not_hear_it(world, monkeypatch):
    heard, ended, before = [], [], signal.getsignal(signal.SIGINT)

    class Pool:
        def __init__(self, *_): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, *_):
            heard.append(signal.getsignal(signal.SIGINT))
            return Future()

        def shutdown(self, **_): ...

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Pool)
    process = SimpleNamespace(terminate=lambda: ended.append(True))
    monkeypatch.setattr(compare.multiprocessing, "active_children", lambda: [process])
    scenarios = {"object": compare.SCENARIOS["object"]}
    measuring = compare.side_by_side(world, ("", None, "emoji"), scenarios, [UNTOUCHED], SMALL, 0)
    assert next(measuring) == 0
    assert heard == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        measuring.throw(KeyboardInterrupt)
    assert ended == [True]


def test_an_interrupted_comparison_says_that_what_is_measured_is_kept(tiny_original, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run", stopped)
    assert commands.main(["compare", "--scenario", "object", "--model", str(tiny_original)]) == 130
    assert "what is measured is kept: the same command goes on" in capsys.readouterr().err


def test_cells_of_another_device_are_others(tiny_original, monkeypatch):
    world = compare.World(weights.load_model(str(tiny_original)))
    here = world.fingerprint
    del world.fingerprint
    monkeypatch.setattr(world.model, "device", torch.device("cuda"))
    assert world.fingerprint != here


@pytest.mark.parametrize(("alive", "measured"), [(True, 3), (False, 1)])
def test_a_process_whose_parent_was_killed_measures_no_further_cell(tiny_original, monkeypatch, alive, measured):
    monkeypatch.setattr(compare.multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: alive))
    monkeypatch.setattr(compare, "run", lambda *all: (cells.append(i) for i in range(3)))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    cells: list[int] = []
    compare.fill(str(tiny_original), None, "emoji", compare.SCENARIOS["object"], ["cpe"], SMALL, 0)
    assert len(cells) == measured


def test_templates_among_other_words_hold_nothing_that_gates_know_or_are_tried_with():
    prompts = read_prompts("emoji")
    tried = (*attacks.UNFAMILIAR["emoji"], *bake.HELD_OUT, *attacks.PARAPHRASES["emoji"])
    taken = {word for text in (*prompts.domain, *prompts.templates, *tried) for word in cpe.normalised(text).split()}
    assert not taken.intersection(compare.WORDS.split())
    more = compare.among_words(prompts, 50)
    assert more.templates[: len(prompts.templates)] == prompts.templates
    added = more.templates[len(prompts.templates) :]
    assert len(set(added)) == 50
    assert all(template.count("{}") == 1 and len(template.split()) > 1 for template in added)
    assert compare.among_words(prompts, 50) == more
    assert compare.among_words(prompts, 0) == prompts
