"""compare.py and variants.py: the rules that make the table honest, and the arithmetic of its cells."""

import dataclasses
import re

import pytest
import torch

import cpe
import erasers
import token_space
import weights
from benchmarks import tune
from deploy import bake
from loading.cache import cache_folder
from loading.files import save_tensors
from loading.prompts import PRESETS, Prompts, anchor_prompts, normalised, prepare, read_prompts
from study import attacks, compare, methods, scenarios, sentences, variants, victim

SMALL = scenarios.Budget(erased=2, near=1, others=1, attacked=0, steps=1, guidance_scale=1.0)
TUNING = {target for scenario in (*tune.TARGETS, tune.TEN, tune.FIFTY, *tune.STYLES) for target in scenario.targets}
KNOWN = [("paraphrases", sentences.PARAPHRASES), ("odd words", sentences.UNFAMILIAR)]
UNTOUCHED = methods.Method("untouched", lambda world, scenario, seed: methods.Erased(world.model, None, 0, 0))


@pytest.fixture(scope="module")
def world(tiny_original):
    return scenarios.World(weights.load_model(str(tiny_original)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))


def noisy(world, scenario, seed):
    """An eraser that damages everything: every key and value of the model, at random."""
    generator = torch.Generator().manual_seed(seed)
    W = {k: w for k, w in world.model.cross_attention().items() if k.endswith(("to_k.weight", "to_v.weight"))}
    edited = {k: w + torch.randn(w.shape, generator=generator) for k, w in W.items()}
    return methods.Erased(world.model.with_unet(edited), None, 7, 28)


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_no_eraser_is_told_of_targets_or_of_what_is_held_out(world, name):
    scenario = scenarios.SCENARIOS[name]
    prompts = world.listed(scenario)
    told = {normalised(word) for word in (*prompts.general, *prompts.domain)}
    hidden = {normalised(word) for word in (*scenario.targets, *world.held_out)}
    assert not told & hidden
    assert len(told) > 50


def test_aliases_of_a_target_are_erased_with_it_and_not_kept(world, monkeypatch):
    given, scenario = [], scenarios.Scenario(("umbrella",), aliases=("red heart",))
    monkeypatch.setitem(erasers.ERASERS, "uce", lambda *all: given.append(all) or {})
    methods.METHODS["uce"].build(world, scenario, 0)
    ((_, targets, surrogates, kept, _),) = given
    assert (targets, surrogates) == (["umbrella", "red heart"], [PRESETS["emoji"].surrogate] * 2)
    assert "red heart" not in kept
    assert "red heart" in world.listed(scenarios.SCENARIOS["object"]).domain


@pytest.mark.parametrize("name", ["object", "10 at once"])
def test_lora_and_the_rows_with_cpes_anchors_have_those_of_the_gates(world, name, monkeypatch):
    scenario, told = scenarios.SCENARIOS[name], []
    for eraser in ("lora", "uce"):
        monkeypatch.setitem(erasers.ERASERS, eraser, lambda *given, **_: told.append(given[3]) or {})
    for method in (methods.METHODS["lora"], methods.ABLATIONS["uce, CPE's anchors"]):
        method.build(world, scenario, 0, **method.settings)
    assert told[0] == told[1]

    def rows(contexts: torch.Tensor) -> set[bytes]:
        return {row.numpy().tobytes() for row in contexts.half()}

    encode, expected = world.model.encode, set()
    for target in scenario.targets:
        expected |= rows(prepare(PRESETS["emoji"], world.listed(scenario), [target], encode, encode).anchors)
    assert rows(encode(told[0])) == expected


def test_targets_that_hyper_parameters_were_tuned_on_are_in_no_table(world):
    reported = {target for scenario in scenarios.SCENARIOS.values() for target in scenario.targets}
    assert len(TUNING) >= 2
    assert not reported & TUNING
    assert len(set(scenarios.FIFTY)) == 50
    assert set(scenarios.TEN) < set(scenarios.FIFTY) <= set(world.concepts)


@pytest.mark.parametrize("name", ["object", "10 at once", "50 at once"])
def test_images_are_of_the_groups_they_say(world, name):
    scenario = scenarios.SCENARIOS[name]
    found = scenarios.cases(world, scenario, scenarios.Budget())
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
    found = scenarios.cases(world, scenarios.SCENARIOS["style"], scenarios.Budget())
    erased = [c for c in found if c.group == "erased"]
    assert all(c.prompt.endswith("twemoji style") and world.styles[c.expected] == "twemoji" for c in erased)
    assert not any("twemoji" in c.prompt for c in found if c.group != "erased")
    assert {c.judge for c in found if c.group == "others"} == {"concept"}


def test_an_untouched_model_changes_nothing_and_a_ruined_one_everything(world):
    figures, pixels = compare.measure(world, scenarios.SCENARIOS["object"], UNTOUCHED, SMALL)
    assert all(group["change"] == 0 for group in figures["groups"].values())
    assert abs(figures["cmmd"]) < 1e-9
    assert pixels.dtype == torch.uint8
    ruined, _ = compare.measure(world, scenarios.SCENARIOS["object"], methods.Method("noisy", noisy), SMALL)
    assert all(group["change"] > 0 for group in ruined["groups"].values())
    assert ruined["cmmd"] > 0
    assert (ruined["parameters"], ruined["bytes"]) == (7, 28)


def test_a_model_with_another_text_encoder_reads_the_prompts_with_it(world):
    name = "text_model.final_layer_norm.bias"
    bias = torch.randn(16, generator=torch.Generator().manual_seed(0))
    erased = methods.Erased(world.model.with_text_encoder({name: bias}), None, 0, 0)
    figures, _ = compare.measure(world, scenarios.SCENARIOS["object"], methods.Method("x", lambda *_: erased), SMALL)
    assert all(group["change"] > 0 for group in figures["groups"].values())


def test_images_of_what_is_erased_count_for_nothing_that_should_stay(world, monkeypatch):
    scenario = scenarios.SCENARIOS["object"]
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
        return methods.Erased(world.model, None, 0, 0)

    compare.measure(world, scenarios.SCENARIOS["object"], methods.Method("uce", build, {"s_p": 7.0}), SMALL)
    assert given == [methods.TUNED["uce"] | {"s_p": 7.0}]


@pytest.mark.parametrize(("name", "field"), [("cpe", "eta"), ("lora", "first_steps"), ("uce", "surrogate")])
def test_other_tuned_settings_or_another_recipe_make_another_cell(world, name, field, monkeypatch):
    def key():
        return compare.key(world, scenarios.SCENARIOS["object"], methods.METHODS[name], SMALL, 0)

    keys, recipe = [key()], PRESETS["emoji"]
    assert key() == keys[0]
    monkeypatch.setitem(methods.TUNED, name, {"k": 3})
    keys.append(key())
    monkeypatch.setitem(PRESETS, "emoji", dataclasses.replace(recipe, **{field: 2 * getattr(recipe, field)}))
    keys.append(key())
    assert len(set(keys)) == 3


def test_a_measured_cell_is_read_back_and_a_damaged_one_measured_again(world):
    first, pixels = compare.measure(world, scenarios.SCENARIOS["object"], UNTOUCHED, SMALL)

    def refuse(world, scenario, seed):
        raise AssertionError("measured twice")

    kept = dataclasses.replace(UNTOUCHED, build=refuse)
    second, again = compare.measure(world, scenarios.SCENARIOS["object"], kept, SMALL)
    assert second == first
    assert torch.equal(pixels, again)
    with pytest.raises(AssertionError):  # another seed, budget or setting is another cell
        compare.measure(world, scenarios.SCENARIOS["object"], kept, SMALL, seed=1)
    (file,) = (cache_folder() / "compare").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    third, _ = compare.measure(world, scenarios.SCENARIOS["object"], UNTOUCHED, SMALL)
    assert third["groups"] == first["groups"]
    save_tensors(file, {"images": pixels}, {"figures": "{}"})
    assert compare.measure(world, scenarios.SCENARIOS["object"], UNTOUCHED, SMALL)[0]["groups"] == first["groups"]


@pytest.mark.parametrize("name", ["uce", "cpe", "cpe, solved", "lora"])
def test_every_kind_of_method_builds_and_counts_what_it_ships(world, name, monkeypatch):
    short = dataclasses.replace(PRESETS["emoji"], stages=1, first_steps=2)
    monkeypatch.setitem(PRESETS, "emoji", short)
    scenario, (r, k) = scenarios.Scenario(("umbrella", "red heart")), (short.r, short.k)
    erased = methods.METHODS[name].build(world, scenario, 0)
    W = world.layers.W
    d, L, widths = 16, len(W), sum(len(w) for w in W.values())
    a_file = 2 * d * r + d + L * (d * k + 1) + k * widths  # queries, unused keys, scaler; of each layer D, alpha, U
    trained, written = {
        "uce": (widths * d, widths * d),
        "cpe": (2 * (d * r + d + L * d * k + k * widths), 2 * a_file),
        "cpe, solved": (2 * (d * 16 + d + 8 * (L * d + widths)), 2 * (2 * d * 16 + d + L * (8 * d + 1) + 8 * widths)),
        "lora": (2 * k * (L * d + widths), 2 * k * (L * d + widths)),
    }[name]
    assert erased.parameters == trained
    assert erased.bytes == 4 * written
    assert (erased.gates is None) == (name in ("uce", "lora"))
    images = compare.draw(erased.model, world.model.encode(["an umbrella"]), [0], erased.gates, SMALL)
    assert images.isfinite().all()


def test_tables_show_every_row_and_leave_out_empty_columns(world):
    figures, _ = compare.measure(world, scenarios.SCENARIOS["object"], UNTOUCHED, SMALL)
    table = {"object": {"none": figures, "other": figures}}
    shown = compare.markdown(table)
    assert shown.count("| none |") == shown.count("| other |") == 1
    assert "CMMD" in shown
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "none" in compare.text(table)


# Variants of the gate.


def gates_of(kind, **more):
    made = variants.KINDS[kind]({"a": 3, "b": 4}, 8, r=2, k=2, **more)
    with torch.no_grad():
        for n, parameter in enumerate(made.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(n))
    return made


def test_a_gate_with_zero_bias_is_the_papers_and_a_large_bias_opens_it():
    E, gates = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("bias")
    plain = cpe.ResAG({"a": 3, "b": 4}, 8, r=2, k=2)
    plain.load_state_dict({k: v for k, v in gates.state_dict().items() if k != "bias"})
    with torch.no_grad():
        gates.bias.fill_(0.0)
    torch.testing.assert_close(gates.residuals(E), plain.residuals(E))
    with torch.no_grad():
        gates.bias.fill_(50.0)
    torch.testing.assert_close(gates.gate(E)[0], torch.ones(1, 2, 5, 1))


def test_a_token_wise_gate_sees_each_token_alone():
    E, gates = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("token-wise")
    torch.testing.assert_close(gates.gate(E)[0], torch.sigmoid(E @ gates.scaler[0])[None])


def test_a_hard_gate_is_open_or_shut_and_still_learns():
    E, gates = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("hard")
    g = gates.gate(E)[0]
    assert set(g.flatten().tolist()) == {0.0, 1.0}
    g.sum().backward()
    assert gates.scaler.grad.abs().max() > 0


def test_a_perceptron_has_no_gate():
    E, gates = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3)), gates_of("mlp")
    assert (gates.gate(E)[0] == 1).all()
    for l, R in enumerate(gates.residuals(E).values()):
        hidden = torch.nn.functional.gelu(gates.scale * (E @ gates.lora_down[l][0]) + gates.bias[l][0])
        torch.testing.assert_close(R, hidden @ gates.lora_up[l][0])


@pytest.mark.parametrize("kind", variants.KINDS)
def test_every_variant_trains(world, kind):
    recipe = dataclasses.replace(PRESETS["emoji"], stages=2, first_steps=3, later_steps=2, attack_steps=2, anchors=4)
    encode, made = world.model.encode, variants.KINDS[kind]
    data = prepare(recipe, Prompts(["{}", "a {}"], ["dog", "sun"], []), ["cat"], encode, encode)
    gates = made(world.layers.widths, 16, recipe.r, recipe.k, generator=torch.Generator().manual_seed(0))
    losses = (cpe.Losses if made in variants.LITERAL else token_space.Losses)(world.layers, data, recipe.eta)
    before = {name: p.clone() for name, p in gates.named_parameters()}
    assert len(list(cpe.Trainer(gates, losses, recipe, torch.Generator().manual_seed(0)))) == 7
    moved = [name for name, p in gates.named_parameters() if not torch.equal(p, before[name])]
    assert any("lora_up" in name for name in moved)
    assert kind not in ("bias", "mlp") or "bias" in moved


@pytest.mark.parametrize("name", ["object", "style", "10 at once"])
def test_every_attack_is_counted_on_the_images_it_was_given(world, name, monkeypatch):
    """The attacks themselves are tested in test_attacks.py: here each gives the plain prompts back."""
    scenario, asked = scenarios.SCENARIOS[name], []

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
    found = compare.under_attack(world, scenario, methods.Erased(world.model, None, 0, 0), budget, 0)
    first, all_of_them = scenario.targets[0], [(one, 0, scenario.preset) for one in scenario.targets]
    # tokens are searched for twice; of several targets all are spoken of
    assert asked == [(first, 0), (first, 0), (first, 1), *all_of_them, *all_of_them]
    spoken = max(4, len(scenario.targets))
    images = {"revival": 4, "tokens": 4, "paraphrases": spoken, "odd words": spoken}
    assert {attack: group["images"] for attack, group in found.items()} == images
    assert all(group["hits"] == 1 for group in found.values())


def test_the_erased_model_is_attacked_and_draws_with_its_gates(world, monkeypatch):
    erased, used = methods.Erased(world.model.with_unet({}), torch.nn.Identity(), 0, 0), []

    def attack(victim, *_, **options):
        assert victim.original is world.model
        used.append((victim.erased, victim.gates))
        return attacks.Found(world.model.encode(["an umbrella"]), [], None, None, 0.0)

    def draw(model, contexts, seeds, gates, budget):
        used.append((model, gates))
        return torch.zeros(len(contexts), 3, 16, 16)

    monkeypatch.setattr(compare.attacks, "ATTACKS", {"paraphrases": attack})
    monkeypatch.setattr(compare, "draw", draw)
    compare.under_attack(world, scenarios.SCENARIOS["object"], erased, dataclasses.replace(SMALL, attacked=1), 0)
    assert used == [(erased.model, erased.gates)] * 2


@pytest.mark.parametrize(("preset", "names"), [("emoji", ["odd words"]), ("object", [])])
def test_only_a_preset_that_has_odd_words_is_attacked_with_them(world, preset, names, monkeypatch):
    monkeypatch.setattr(compare.attacks, "ATTACKS", {"odd words": attacks.odd_words})
    scenario, budget = scenarios.Scenario(("umbrella",), preset), dataclasses.replace(SMALL, attacked=1)
    assert [*compare.under_attack(world, scenario, methods.Erased(world.model, None, 0, 0), budget, 0)] == names


@pytest.mark.parametrize(("attack", "known"), KNOWN)
def test_of_several_targets_each_is_spoken_of_in_its_own_sentences(world, attack, known):
    scenario, attacked = scenarios.SCENARIOS["10 at once"], victim.Victim(world.model, world.model)
    budget = dataclasses.replace(SMALL, attacked=20)
    tried = compare.attempts(attacked, scenario, attack, budget, 0)
    assert [target for _, target in tried] == list(scenario.targets)
    for i, (contexts, target) in enumerate(tried):
        said = [known["emoji"][(2 * i + n) % 8].replace("{}", target) for n in range(2)]
        # encoded among others: in a batch of another size kernels may round otherwise, by 1e-6 of numbers around 1
        torch.testing.assert_close(contexts, world.model.encode(said), rtol=1e-4, atol=1e-4)


def test_a_cell_counts_what_the_judge_sees(world, monkeypatch):
    """Of the target's two images one is recognised; of the others the first half; of styles all."""
    scenario = scenarios.SCENARIOS["object"]
    rows = scenarios.cases(world, scenario, SMALL)
    half = {group: sum(case.group == group for case in rows) // 2 for group in compare.GROUPS}

    def see(images, judge):
        if judge == "style":
            return torch.tensor([next(i for i, s in enumerate(world.styles) if s in case.prompt) for case in rows])
        answers, left = [], dict(half) | dict.fromkeys(compare.SENTENCES, 0)
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
    spoken = figures | {"groups": figures["groups"] | {"sentences": {"images": 8, "hits": 2}}}
    assert compare.harmonic(spoken) == pytest.approx(3 / (1 / 0.5 + 1 / kept + 1 / 0.75))


@pytest.mark.parametrize("name", methods.TUNED)
def test_tuned_settings_are_of_the_grid_that_was_searched(name):
    grid = tune.ASIDE[name][2] if name in tune.ASIDE else tune.GRIDS[name] + tune.BEYOND.get(name, [])
    assert methods.TUNED[name] in grid


@pytest.mark.parametrize("name", methods.MANY)
def test_settings_for_many_targets_are_of_the_grid_that_was_searched(name):
    assert methods.TUNED[name] | methods.MANY[name] in tune.ASIDE[f"{name}, many"][2]


@pytest.mark.parametrize("name", methods.CROWD)
def test_settings_for_fifty_targets_are_of_the_grid_that_was_searched(name):
    settings = methods.TUNED[name] | methods.MANY.get(name, {}) | methods.CROWD[name]
    assert settings in tune.ASIDE[f"{name}, fifty"][2]
    assert len({*tune.FIFTY.targets}) == 50


@pytest.mark.parametrize("name", [name for name in methods.STYLE if not name.startswith("cpe")])
def test_settings_for_styles_are_of_the_grid_that_was_searched(name):
    assert methods.TUNED[name] | methods.STYLE[name] in tune.ASIDE[f"{name}, styles"][2]


def test_settings_of_many_targets_and_of_styles_are_for_a_row_and_its_ablations():
    one, ten, fifty = (scenarios.SCENARIOS[name] for name in ("object", "10 at once", "50 at once"))
    for method in (methods.METHODS["uce"], methods.ABLATIONS["uce, CPE's anchors"]):
        assert methods.tuned(method, one) == methods.TUNED["uce"]
        assert methods.tuned(method, ten) == methods.TUNED["uce"] | methods.MANY["uce"]
        assert methods.tuned(method, fifty) == methods.tuned(method, ten) | methods.CROWD["uce"]
        assert methods.tuned(method, scenarios.SCENARIOS["style"]) == methods.TUNED["uce"] | methods.STYLE["uce"]


def test_a_target_in_sentences_becomes_the_surrogate_in_them(world, monkeypatch):
    given = []
    monkeypatch.setitem(erasers.ERASERS, "uce", lambda *all, **settings: given.append((all, settings)) or {})
    one, templates = scenarios.SCENARIOS["object"], read_prompts("emoji").templates
    surrogate = PRESETS["emoji"].surrogate
    for where in ("kept", "all", "pairs"):
        methods.METHODS["uce"].build(world, one, 0, templates=where, s_p=2.0)
    (kept, _), (everywhere, _), (pairs, settings) = given
    assert (kept[1], kept[2]) == (["umbrella"], [surrogate])
    assert everywhere[1] == pairs[1] == [template.replace("{}", "umbrella") for template in templates]
    assert everywhere[2] == [surrogate] * len(templates)
    assert pairs[2] == [template.replace("{}", surrogate) for template in templates]
    assert kept[3] == pairs[3] == anchor_prompts([*world.listed(one).general, *world.listed(one).domain], templates)
    # With fewer to preserve each weighs more, so that all of them together weigh the same.
    methods.METHODS["uce"].build(world, one, 0, templates="pairs", anchors=True, s_p=2.0)
    fewer, weighed = given[-1]
    assert len(fewer[3]) * weighed["s_p"] == pytest.approx(len(pairs[3]) * settings["s_p"])


@pytest.mark.parametrize("preset", ["emoji", "explicit"])
def test_lora_learns_many_targets_in_more_steps_of_whatever_preset(world, monkeypatch, preset):
    given = []
    monkeypatch.setitem(erasers.ERASERS, "lora", lambda *all, **settings: given.append(settings["recipe"]) or {})
    scenario = dataclasses.replace(scenarios.SCENARIOS["10 at once"], preset=preset)
    monkeypatch.setattr(methods, "anchors_of_gates", lambda world, scenario: [""])
    methods.METHODS["lora"].build(world, scenario, 0, **methods.tuned(methods.METHODS["lora"], scenario))
    names = ("first_steps", "later_steps", "attack_steps")
    assert {getattr(given[0], name) / getattr(PRESETS[preset], name) for name in names} == {3.0}
    assert given[0].lam == methods.MANY["lora"]["lam"]


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
    same_gates = {"cpe, baked"}  # as the tuned ones
    assert {*tune.GRIDS} | same_gates == set(methods.METHODS)
    assert {len(grid) for grid in tune.GRIDS.values()} == {8}


@pytest.mark.parametrize("method", ["cpe", "cpe, baked"])
def test_gates_are_trained_once_for_all_cells_that_need_them(world, method, monkeypatch):
    few = {"first_steps": 12, "later_steps": 6, "attack_steps": 6}
    monkeypatch.setitem(PRESETS, "emoji", dataclasses.replace(PRESETS["emoji"], **few))
    short = bake.Recipe(steps=2)
    monkeypatch.setattr(bake, "Recipe", lambda: short)
    scenario = scenarios.SCENARIOS["object"]
    first = methods.METHODS["cpe"].build(world, scenario, 0)
    assert first.spared == 0
    again = methods.METHODS[method].build(world, scenario, 0)
    assert again.spared > 0
    if method == "cpe":
        assert all(torch.equal(a, b) for a, b in zip(first.gates.parameters(), again.gates.parameters(), strict=True))
    else:
        before, after = (model.encode(["a picture of a umbrella"]) for model in (world.model, again.model))
        assert again.gates is None
        assert not torch.equal(before, after)


def test_cells_of_another_device_are_others(tiny_original, monkeypatch):
    world = scenarios.World(weights.load_model(str(tiny_original)))
    here = world.fingerprint
    del world.fingerprint
    monkeypatch.setattr(world.model, "device", torch.device("cuda"))
    assert world.fingerprint != here
