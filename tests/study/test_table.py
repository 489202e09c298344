"""The table's groups of pictures, its rows, and the command: sentences, two things in one, attacks, time."""

import dataclasses

import pytest
import torch
from test_compare import SMALL
from tiny import write_gates

import erasers
import sampler
from cli import pictures
from loading.prompts import PRESETS, normalised, read_prompts
from study import compare
from study import erased as rows_of_table
from study.attacks import Found, Victim
from study.erased import METHODS, NONE, PUBLISHED_ROWS, TUNED, settings_of
from study.world import GONE, GROUPS, SCENARIOS, Budget, Scenario, cases, sentences

SHORT = {"stages": 2, "first_steps": 3, "later_steps": 2, "attack_steps": 2, "anchors": 4}


@pytest.mark.parametrize("name", ["object", "10 at once", "50 at once"])
def test_images_are_of_the_groups_they_say(world, name, sentence_files):
    scenario = SCENARIOS[name]
    found = cases(world, scenario, Budget())
    members = {group: {world.concepts[c.expected] for c in found if c.group == group} for group in GROUPS}
    for group in GONE:
        assert members[group] == set(scenario.targets)
    assert not members["near, listed"] & set(world.held_out)
    assert members["near, unlisted"] | members["others"] <= set(world.held_out)
    assert len(members["near, listed"]) == len(members["near, unlisted"]) == 10
    assert len(members["others"]) >= 20
    named_alike = {c for c in world.concepts for t in scenario.targets if set(t.split()) < set(c.split())}
    assert ("horse face" in named_alike) == (name != "object")
    assert not named_alike & set().union(*members.values())  # "horse face" is neither to go with "horse" nor to stay
    assert len({c.seed for c in found}) == len(found)  # independent images: the intervals assume it
    for a, b in (("near, listed", "others"), ("near, unlisted", "others"), ("erased", "near, listed")):
        assert not members[a] & members[b]
    for group in ("kept in sentences", "kept beside"):
        assert not members[group] & set(scenario.targets)
        assert all(members[group] & members[kind] for kind in ("near, listed", "near, unlisted", "others"))
    beside = [c for c in found if c.group == "kept beside"]
    assert all(world.concepts[c.expected] in c.prompt and c.judge == "right" for c in beside)
    assert all(any(target in c.prompt for target in scenario.targets) for c in beside)


def test_sentences_for_training_are_templates_and_no_others(world, sentence_files):
    assert sentences("emoji", "held-out") == ["my {} in paris", "look, a {}"]
    assert sentences("emoji", "strange") == ["a flabbergasted {}"]
    assert sentences("celebrity", "strange") == []
    for scenario in SCENARIOS.values():
        assert world.listed(scenario).lines == read_prompts(scenario.preset).lines  # none of them names a target


@pytest.mark.parametrize("preset", ["emoji", "emoji-style"])
def test_sentences_for_training_are_never_those_to_try(preset):
    kinds = ("held-out", "strange", "beside")
    tried = {normalised(line) for each in ("emoji", preset) for kind in kinds for line in sentences(each, kind)}
    assert not tried & {normalised(line) for line in read_prompts(preset).lines}


def test_of_a_picture_of_two_things_the_right_half_is_judged(world):
    drawn = compare.Originals(world, SCENARIOS["object"], SMALL)
    i, case = next((i, case) for i, case in enumerate(drawn.cases) if case.judge == "right")
    height, width = drawn.images.shape[2:]
    wide = sampler.draw(world.model, [case.prompt], [case.seed], None, *SMALL.sampling, size=(height, 2 * width))
    assert wide.shape[3] == 2 * width
    assert drawn.images[i].flatten().tolist() == pytest.approx(wide[0, :, :, width:].flatten().tolist(), abs=1e-4)
    assert drawn.hits[i] == (world.see(drawn.images[i : i + 1], "concept").item() == case.expected)


@pytest.mark.parametrize("name", ["uce", "uce, published", "cpe", "cpe, solved", "lora"])
def test_every_kind_of_method_builds_an_eraser_that_draws(world, name, monkeypatch):
    short = dataclasses.replace(PRESETS["emoji"], **SHORT)
    monkeypatch.setitem(PRESETS, "emoji", short)
    scenario = Scenario(("umbrella", "red heart"))
    method = METHODS[name]
    made = method.build(world, scenario, 0, **method.settings)
    assert made.gates is None or len(made.gates.w_qs) == 2
    assert (made.gates is None) == (not name.startswith("cpe"))
    images = sampler.draw(made.erased, world.model.encode(["an umbrella"]), [0], made.gates, *SMALL.sampling)
    assert images.isfinite().all()


def test_published_rows_are_the_authors_settings_and_bare_names(world, monkeypatch):
    given = []
    for name in ("rece", "speed"):
        monkeypatch.setitem(erasers.ERASERS, name, lambda *all, **settings: given.append((all, settings)) or {})
        method, ten = METHODS[f"{name}, published"], SCENARIOS["10 at once"]
        method.build(world, ten, 0, **settings_of(method, ten))
    assert [settings for _, settings in given] == [{"rounds": 1}, erasers.PUBLISHED["speed, many"]]
    for (_, targets, _, preserved, _), _ in given:
        assert targets == list(ten.targets)
        assert set(preserved) <= {*read_prompts("emoji").general, *read_prompts("emoji").domain}


def test_lora_learns_many_targets_in_more_steps(world, monkeypatch):
    given = []
    monkeypatch.setitem(erasers.ERASERS, "lora", lambda *all, **settings: given.append(settings["recipe"]) or {})
    monkeypatch.setattr(rows_of_table, "anchors_of_gates", lambda world, scenario: [""])
    METHODS["lora"].build(world, SCENARIOS["10 at once"], 0, **settings_of(METHODS["lora"], SCENARIOS["10 at once"]))
    for name in ("first_steps", "later_steps", "attack_steps"):
        assert getattr(given[0], name) == 3 * getattr(PRESETS["emoji"], name)
    assert given[0].lam == TUNED["many"]["lora"]["lam"]


@pytest.mark.parametrize("name", ["object", "style"])
def test_every_attack_is_counted_on_the_images_it_was_given(world, name, monkeypatch):
    """The attacks themselves are tested in test_attacks.py: here each gives the plain prompts back."""
    scenario, asked = SCENARIOS[name], []
    made = Victim(world.model, world.model.with_unet({}), torch.nn.Identity())

    def plain(victim, target, templates, seed):
        assert (victim.original, victim.erased, victim.gates) == (world.model, made.erased, made.gates)
        asked.append((target, seed))
        return Found(victim.original.encode([template.format(target) for template in templates]), [], 0.0, 0.0)

    known = world.styles if scenario.style else world.concepts
    target = known.index(scenario.targets[0].removesuffix(" style"))

    def see(images, judge):  # the first of a target, then something else
        assert judge == ("style" if scenario.style else "concept")
        return torch.tensor([target, *[(target + 1) % len(known)] * (len(images) - 1)])

    def draw(model, contexts, seeds, gates, *sampling):
        assert (model, gates) == (made.erased, made.gates)
        return torch.zeros(len(contexts), 3, 16, 16)

    monkeypatch.setattr(compare, "ATTACKS", dict.fromkeys(("embeddings", "tokens"), plain))
    monkeypatch.setattr(sampler, "draw", draw)
    monkeypatch.setattr(world, "see", see, raising=False)
    found = compare.under_attack(world, scenario, made, dataclasses.replace(SMALL, attacked=4, searches=2), 0)
    first = scenario.targets[0]
    assert asked == [(first, 0), (first, 0), (first, 1)]  # tokens are searched for twice
    assert found == {"embeddings": [1, 4], "tokens": [1, 4]}


def test_a_cell_counts_what_the_judge_sees(world, monkeypatch, sentence_files):
    """Half of each group is recognised; strange words count only where the model itself draws the thing."""
    scenario = SCENARIOS["object"]
    rows = cases(world, scenario, SMALL)
    half = {group: sum(case.group == group for case in rows) // 2 for group in GROUPS}
    before = compare.Originals(world, scenario, SMALL)
    before.hits = [case.group != "strange words" or i % 2 == 0 for i, case in enumerate(rows)]

    def judged(world, all_cases, images):
        left, answers = dict(half), []
        for case in all_cases:
            left[case.group] -= 1
            answers.append(left[case.group] >= 0)
        return answers

    monkeypatch.setattr(compare, "recognised", judged)
    figures = compare.figures_of(world, before, before.images)
    odd, _ = figures["counts"].pop("strange words")[1], figures["counts"].pop("style")
    assert odd == sum(case.group == "strange words" and i % 2 == 0 for i, case in enumerate(rows)) > 0
    hits = {group: count for group, (count, _) in figures["counts"].items()}
    assert hits == {group: n for group, n in half.items() if group != "strange words"}
    kept = [count / n for name, (count, n) in figures["counts"].items() if name not in GONE]
    said, images = figures["counts"]["sentences"]
    assert len(kept) == 5
    expected = 3 / (1 / 0.5 + len(kept) / sum(kept) + 1 / (1 - said / images))
    assert compare.H(figures["counts"]) == pytest.approx(expected)
    assert compare.cells(figures)["erased"] == "50 (9–91)"  # Wilson's, of one of two
    del figures["counts"]["sentences"]
    kept = [count / n for name, (count, n) in figures["counts"].items() if name not in GONE]
    twice = 3 / (1 / 0.5 + len(kept) / sum(kept) + 1 / 0.5)  # without them erasing counts twice
    assert compare.H(figures["counts"]) == pytest.approx(twice)


def test_the_time_is_said_beforehand(world):
    scenarios = {"object": SCENARIOS["object"]}
    count = len(cases(world, SCENARIOS["object"], SMALL))
    said = compare.forecast(world, scenarios, [], SMALL, 0)
    assert said.startswith(f"1 cells, {count} images: about ")
    list(compare.run(world, scenarios, [], SMALL))
    assert compare.forecast(world, scenarios, [], SMALL, 0) == "every cell is on disk"
    assert NONE.name == "none"


# --- The command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--eraser", "magic"], "unknown eraser 'magic'"),
        (["--scenario", "weather"], "unknown scenario 'weather': choose among \"object\""),
        (["Brad Pitt"], "is not in prompts/emoji.txt"),
        (["--preset", "celebrity"], "--preset goes with targets, and styles are judged"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(run, arguments, words):
    code, said = run("compare", *arguments)
    assert (code, said.count("\n")) == (2, 1)
    assert words in said


def test_the_command_draws_a_table_and_a_picture_and_writes_both(run, monkeypatch, tmp_path):
    monkeypatch.setattr("cli.compare.QUICK", SMALL)
    files, shown, draw = ("--json", "x.json", "--markdown", "x.md"), [], pictures.sheet
    monkeypatch.setattr("cli.compare.sheet", lambda *parts: shown.extend(parts) or draw(*parts))
    code, said = run("compare", "--quick", "--eraser", "uce", "--eraser", "speed", *files)
    assert code == 0, said
    assert "3 cells" in said
    assert (tmp_path / "x.json").is_file()
    assert (tmp_path / "images" / "compare.png").is_file()
    rows = [line.split("|")[1].strip() for line in (tmp_path / "x.md").read_text().splitlines()[4:7]]
    assert rows == list(shown[0]) == ["none", "uce", "speed"]  # and the picture has their names
    assert any("umbrella" in prompt for prompt in shown[1])


def test_published_rows_stand_beside_the_tuned_ones(run, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "run", lambda world, scenarios, methods, *_: asked.extend(methods) or iter(()))
    monkeypatch.setattr(compare, "forecast", lambda *all: "")
    assert run("compare", "--quick", "--published")[0] == 0
    assert tuple(method.name for method in asked) == PUBLISHED_ROWS
    assert PUBLISHED_ROWS[:2] == ("uce", "uce, published")
    assert {row.split(",")[0] for row in PUBLISHED_ROWS} == {*erasers.ERASERS} - {"lora"}


def test_what_takes_an_hour_alone_runs_only_when_it_is_named(run, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "run", lambda world, scenarios, *more: asked.append(list(scenarios)) or iter(()))
    monkeypatch.setattr(compare, "forecast", lambda *all: "")
    assert run("compare")[0] == run("compare", "--scenario", "50 at once")[0] == 0
    assert asked == [["object", "neighbours", "person", "style", "10 at once"], ["50 at once"]]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(FloatingPointError("the loss became nan"), 2, "the loss became nan"), (KeyboardInterrupt(), 130, "goes on")],
)
def test_what_ends_a_comparison_is_said(run, monkeypatch, error, code, words):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(compare, "run", fail)
    monkeypatch.setattr(compare, "forecast", lambda *all: "")
    ended, said = run("compare", "--quick")
    assert ended == code
    assert words in said


def test_gates_are_attacked_on_the_command_line(run, tmp_path, tiny_original):
    gates = write_gates(tiny_original, tmp_path / "gates.safetensors")
    code, said = run("attack", str(gates), "--with", "embeddings", "--steps", "1", "--guidance", "1")
    assert code == 0, said
    assert "embeddings" in said
    assert (tmp_path / "images" / "attack.png").is_file()
    code, said = run("attack", str(gates), "--with", "magic")
    assert (code, "invalid choice: 'magic'" in said) == (2, True)
