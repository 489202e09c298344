"""study/world.py, erased.py, compare.py: the rules that make the table honest, and its arithmetic."""

import dataclasses
from functools import partial

import pytest
import torch
from tiny import ROOT

import cpe
import erasers
import token_space
from benchmarks import tune
from benchmarks.ablations import ABLATIONS, Unmixed
from cli.many import read_lines
from loading.cache import cache_folder, encoded
from loading.files import save_tensors
from loading.prompts import PRESETS, anchor_prompts, fill, normalised, prepare
from study import compare, evaluate
from study import erased as rows_of_table
from study.attacks import Victim
from study.erased import METHODS, TUNED, Method, settings_of
from study.world import GONE, GROUPS, SCENARIOS, Budget, Scenario, cases

SMALL = Budget(erased=2, near=1, others=1, sentences=4, attacked=0, steps=1, guidance_scale=1.0)
TUNING = {target for scenario in (*tune.TARGETS, tune.TEN, tune.FIFTY, *tune.STYLES) for target in scenario.targets}
UNTOUCHED = Method("untouched", lambda world, scenario, seed: Victim(world.model, world.model))


def noisy(world, scenario, seed):
    """An eraser that damages everything: every key and value of the model, at random."""
    generator = torch.Generator().manual_seed(seed)
    W = {k: w for k, w in world.model.cross_attention().items() if k.endswith(("to_k.weight", "to_v.weight"))}
    edited = {k: w + torch.randn(w.shape, generator=generator) for k, w in W.items()}
    return Victim(world.model, world.model.with_unet(edited))


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_eraser_is_told_of_targets_or_of_what_is_held_out(world, name):
    scenario = SCENARIOS[name]
    prompts = world.listed(scenario)
    told = {normalised(word) for word in (*prompts.general, *prompts.domain)}
    hidden = {normalised(word) for word in (*scenario.targets, *world.held_out)}
    assert not told & hidden
    assert len(told) > 50


@pytest.mark.parametrize("targets", [("umbrella",), ("umbrella", "owl")])
def test_lora_has_the_anchors_of_the_gates(world, targets, monkeypatch):
    scenario, told = Scenario(targets), []
    monkeypatch.setitem(erasers.ERASERS, "lora", lambda *given, **_: told.append(given[3]) or {})
    METHODS["lora"].build(world, scenario, 0, **settings_of(METHODS["lora"], scenario))

    def rows(contexts: torch.Tensor) -> set[bytes]:
        return {row.numpy().tobytes() for row in contexts.half()}

    encode, expected = world.model.encode, set()
    bare = partial(encode, briefly=True)  # as `cache.encoded` has it
    for target in scenario.targets:
        expected |= rows(prepare(PRESETS["emoji"], world.listed(scenario), [target], encode, encode, bare).anchors)
    assert rows(encode(told[0])) == expected


def test_targets_that_hyper_parameters_were_tuned_on_are_in_no_table(world):
    reported = {target for scenario in SCENARIOS.values() for target in scenario.targets}
    assert len(TUNING) >= 2
    assert not reported & TUNING
    ten, fifty = (SCENARIOS[f"{n} at once"].targets for n in (10, 50))
    assert (len(set(ten)), len(set(fifty))) == (10, 50)
    assert set(ten) < set(fifty) <= set(world.concepts)
    assert [line for _, line in read_lines(ROOT / "prompts/emoji-targets.txt")] == list(fifty)  # train --targets


def test_a_style_is_judged_as_a_style(world):
    found = cases(world, SCENARIOS["style"], Budget())
    erased = [c for c in found if c.group == "erased"]
    assert all(c.prompt.endswith("twemoji style") and world.styles[c.expected] == "twemoji" for c in erased)
    assert not any("twemoji" in c.prompt for c in found if c.group not in (*GONE, "kept beside"))
    assert {c.judge for c in found if c.group == "others"} == {"concept"}


def test_an_untouched_model_changes_nothing_and_a_ruined_one_everything(world):
    figures, pixels = compare.measure(world, SCENARIOS["object"], UNTOUCHED, SMALL)
    assert figures["change"] == 0
    assert abs(figures["CMMD"]) < 1e-9
    assert pixels.dtype == torch.uint8
    ruined, spoilt = compare.measure(world, SCENARIOS["object"], Method("noisy", noisy), SMALL)
    assert ruined["change"] > 0
    assert ruined["CMMD"] > 0
    assert all(not torch.equal(a, b) for a, b in zip(pixels, spoilt, strict=True))


def test_images_of_what_is_erased_count_for_nothing_that_should_stay(world, monkeypatch):
    scenario = SCENARIOS["object"]
    before = compare.Originals(world, scenario, SMALL)
    before.prompts = before.features  # every image is what its prompt says, before some are spoiled
    pairs = zip(before.cases, before.images, strict=True)
    spoiled = torch.stack([image.neg() if case.group == "erased" else image for case, image in pairs])
    monkeypatch.setattr(compare, "drawn", lambda *_: spoiled)
    figures, _ = compare.measure(world, scenario, UNTOUCHED, SMALL, 0, lambda: before)
    assert evaluate.change(before.images, spoiled).max() > 0.1
    assert figures["CLIP score"] == pytest.approx(100)
    assert abs(figures["CMMD"]) < 1e-9
    assert compare.cells(figures)["change"] == "0.000"


def test_settings_of_a_row_go_before_tuned_ones(world):
    given = []

    def build(world, scenario, seed, **settings):
        given.append(settings)
        return Victim(world.model, world.model)

    compare.measure(world, SCENARIOS["object"], Method("uce", build, {"s_p": 7.0}), SMALL)
    assert given == [TUNED["one"]["uce"] | {"s_p": 7.0}]


@pytest.mark.parametrize(("name", "field"), [("cpe", "eta"), ("lora", "first_steps"), ("uce", "surrogate")])
def test_other_tuned_settings_or_another_recipe_make_another_cell(world, name, field, monkeypatch):
    def key():
        return compare.cell_path(world, SCENARIOS["object"], METHODS[name], SMALL, 0)

    keys, recipe = [key()], PRESETS["emoji"]
    assert key() == keys[0]
    monkeypatch.setitem(TUNED["one"], name, {"k": 3})
    keys.append(key())
    monkeypatch.setitem(PRESETS, "emoji", dataclasses.replace(recipe, **{field: 2 * getattr(recipe, field)}))
    keys.append(key())
    assert len(set(keys)) == 3


def test_a_measured_cell_is_read_back_and_a_damaged_one_measured_again(world):
    first, pixels = compare.measure(world, SCENARIOS["object"], UNTOUCHED, SMALL)

    def refuse(world, scenario, seed):
        raise AssertionError("measured twice")

    kept = dataclasses.replace(UNTOUCHED, build=refuse)
    second, again = compare.measure(world, SCENARIOS["object"], kept, SMALL)
    assert second == first
    assert torch.equal(pixels, again)
    with pytest.raises(AssertionError):  # another seed, budget or setting is another cell
        compare.measure(world, SCENARIOS["object"], kept, SMALL, seed=1)
    (file,) = (cache_folder() / "compare").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    third, _ = compare.measure(world, SCENARIOS["object"], UNTOUCHED, SMALL)
    assert third["counts"] == first["counts"]
    save_tensors(file, {"images": pixels}, {})
    assert compare.measure(world, SCENARIOS["object"], UNTOUCHED, SMALL)[0]["counts"] == first["counts"]


def test_tables_show_every_row_and_leave_out_empty_columns(world):
    figures, _ = compare.measure(world, SCENARIOS["object"], UNTOUCHED, SMALL)
    table = {"object": {"none": figures, "other": figures}}
    lines = [line for line in compare.markdown(table).splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["", "---:", "none", "other"]
    assert len({line.count("|") for line in lines}) == 1
    assert "CMMD" in lines[0]
    assert "P4D" not in lines[0]  # there were no attacks
    narrow = [line for line in compare.markdown(table, most=3).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in narrow[:-4]} == {5}  # the methods, and three columns
    assert sum("none" in line for line in narrow) == -(-(lines[0].count("|") - 2) // 3)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TUNED.items() for name in table])
def test_tuned_settings_are_of_the_grid_that_was_searched(kind, name):
    before = {"one": [], "many": ["one"], "crowd": ["one", "many"], "style": ["one"]}[kind]
    settings = {key: value for each in (*before, kind) for key, value in TUNED[each].get(name, {}).items()}
    assert settings in tune.asked(name if kind == "one" else f"{name}, {kind}")[2]
    assert len({*tune.FIFTY.targets}) == 50


def test_settings_of_many_targets_and_of_styles_are_for_a_row_and_what_starts_from_it():
    one, ten, fifty = (SCENARIOS[name] for name in ("object", "10 at once", "50 at once"))
    for method in (METHODS["uce"], Method("uce, past", METHODS["uce"].build, {"eta": 7.0})):
        assert settings_of(method, one) == TUNED["one"]["uce"] | method.settings
        assert settings_of(method, ten) == TUNED["one"]["uce"] | TUNED["many"]["uce"] | method.settings
        crowd = TUNED["one"]["uce"] | TUNED["many"]["uce"] | TUNED["crowd"]["uce"]
        assert settings_of(method, fifty) == crowd | method.settings
        assert settings_of(method, SCENARIOS["style"]) == TUNED["one"]["uce"] | TUNED["style"]["uce"] | method.settings
    assert settings_of(METHODS["uce, published"], ten) == {}


def test_ablations_change_what_they_say_and_nothing_else():
    """eta, lambda, r, J, noise and the deltas' start, each in a recipe that stays otherwise."""
    recipe, names = PRESETS["emoji"], set()
    assert ABLATIONS["cpe"] is METHODS["cpe"]
    for method in ABLATIONS.values():
        for name, value in method.settings.items() if " = " in method.name else ():
            assert method.name == f"cpe, {name} = {value:g}"
            assert getattr(recipe, name) != value
            names.add(name)
            assert settings_of(method, SCENARIOS["object"]) == {name: value}
    assert names >= {"eta", "lam", "r", "deltas", "noise", "delta_start"}


@pytest.mark.parametrize(
    ("row", "published", "trainer"),
    [
        ("cpe", False, cpe.Trainer),
        ("cpe, published prompts", True, cpe.Trainer),
        ("cpe, unmixed", False, Unmixed),
        ("cpe, nearest = 0", False, cpe.Trainer),
    ],
)
def test_rows_of_other_prompts_or_anchors(world, monkeypatch, row, published, trainer):
    """What is seen is what gates are trained with, up to the first step."""
    seen, method = [], ABLATIONS[row]

    def few_of(model, recipe, prompts, *more, **how):
        assert recipe.nearest == method.settings.get("nearest", 50)
        seen.append(prompts)
        few = {name: getattr(prompts, name)[:6] for name in ("templates", "frames", "general", "domain")}
        return encoded(model, recipe, dataclasses.replace(prompts, **few), *more, **how)

    def begin(self):
        seen.append(type(self))
        raise FloatingPointError

    monkeypatch.setattr(rows_of_table, "encoded", few_of)
    monkeypatch.setattr(cpe.Trainer, "begin", begin)
    with pytest.raises(FloatingPointError):
        method.build(world, SCENARIOS["object"], 0, **method.settings)
    assert (not seen[0].frames, seen[0].spelt == 0, not seen[0].parts) == (published,) * 3
    assert (seen[0].per_word == len(seen[0].templates)) == published
    assert seen[1] is trainer


def test_unmixed_anchors_are_prompts_with_noise_of_their_own_size():
    E = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))
    data, recipe = cpe.Data(E[:2], E[2:4], 10 * E, E[:1]), dataclasses.replace(PRESETS["emoji"], anchors=64, noise=1e-3)
    losses, drawn = token_space.Losses(cpe.Layers({"a": torch.eye(8)}, {"a": 1.0}), data, 0.3), {}
    for kind in (cpe.Trainer, Unmixed):
        rows = kind(cpe.ResAG({"a": 8}, 8), losses, recipe, torch.Generator().manual_seed(0)).draw_anchors()
        assert torch.equal(rows[-1:], data.empty)
        drawn[kind] = torch.cdist(rows[:-1].flatten(1), data.anchors.flatten(1)).amin(1).mean().item()
    # noise of 1e-3 |E| in each of 40 elements: about 0.0063 |E| in all
    size = data.anchors.flatten(1).norm(dim=1).mean().item()
    assert drawn[Unmixed] == pytest.approx(1e-3 * 40**0.5 * size, rel=0.1)
    assert drawn[cpe.Trainer] > 20 * drawn[Unmixed]


def test_a_target_in_sentences_becomes_the_surrogate_in_them(world, monkeypatch):
    given = []
    monkeypatch.setitem(erasers.ERASERS, "uce", lambda *all, **settings: given.append((all, settings)) or {})
    one, templates = SCENARIOS["object"], world.listed(SCENARIOS["object"]).lines
    surrogate = PRESETS["emoji"].surrogate
    METHODS["uce"].build(world, one, 0, sentences=True, s_p=2.0)
    (((_, targets, surrogates, kept, _), _),) = given
    assert targets == [fill(template, "umbrella") for template in templates]
    assert surrogates == [fill(template, surrogate) for template in templates]
    assert kept == anchor_prompts([*world.listed(one).general, *world.listed(one).domain], templates)


@pytest.mark.parametrize("name", ["mace", "esd", "lora"])
def test_erasers_that_put_names_into_sentences_themselves_are_given_them(world, name, monkeypatch):
    given, scenario = [], SCENARIOS["object"]
    monkeypatch.setitem(erasers.ERASERS, name, lambda *all, **settings: given.append((all, settings)) or {})
    monkeypatch.setattr(rows_of_table, "anchors_of_gates", lambda world, scenario: [""])
    METHODS[name].build(world, scenario, 0, **settings_of(METHODS[name], scenario))
    ((_, targets, *_), settings) = given[0]
    assert targets == ["umbrella"]
    assert settings["templates"] == world.listed(scenario).lines


def test_scenarios_together_are_all_their_images_together(world):
    def row(erased: int, kept: int, change: float) -> dict:
        counts = {"erased": [erased, 4], **{name: [kept, 10] for name in GROUPS[1:4]}, "style": [30, 30]}
        return {"counts": counts, "CLIP score": 20.0, "CMMD": change, "change": change, "seconds": 2.0, "H": 0.5}

    table = {"a": {"none": row(4, 10, 0.0), "x": row(1, 8, 0.2)}, "b": {"none": row(4, 10, 0.0), "x": row(0, 4, 0.6)}}
    figures = compare.pooled(table)["x"]
    assert figures["counts"]["erased"] == [1, 8]
    assert figures["counts"]["others"] == [12, 20]
    assert figures["CMMD"] == figures["change"] == pytest.approx(0.4)
    assert "All 2 scenarios" in compare.markdown(table).splitlines()[0]

    # 3 / (1 / (7/8) + 1 / (12/20) + 1 / (7/8)): without sentences the erased images count twice
    assert compare.cells(figures)["H"] == f"{3 / (2 * 8 / 7 + 20 / 12):.2f}"
    assert compare.cells(compare.pooled(table)["none"])["H"] == "0.00"
