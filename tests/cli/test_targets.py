"""Which targets a person meant, what files are called after them, and what the embedded model knows."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from tiny import ROOT

from cli import common, compare, options, targets
from loading import prompts
from loading.files import UserError, load_tensors, save_tensors
from solve import Settings


@pytest.fixture(autouse=True)
def all_prompts(monkeypatch, few_prompts):
    """Here it is the embedded model's own prompts that matter."""
    monkeypatch.setattr(targets, "read_prompts", prompts.read_prompts)
    common.is_emoji.cache_clear()


def target(*names: str, model: str = "emoji", **options_given: str) -> targets.Target:
    """The target that arguments of `train` mean."""
    args = options.parse(["train"])
    vars(args).update(model=model, **options_given)
    return targets.target_of(names, args)


@pytest.mark.parametrize("text", ["red heart, umbrella, dog face", "red heart; umbrella and dog face"])
def test_several_things_that_the_model_knows_are_several_targets(text, capsys):
    assert targets.split([text], "emoji") == ["red heart", "umbrella", "dog face"]
    assert "names 3 things, each gets a gate of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Martin Luther King, Jr.", "Add --one-name. 2 of them? Write 'Martin Luther King' Jr. instead."),
        ("Simon and Garfunkel", "one name? Add --one-name. 2 of them? Write Simon Garfunkel instead."),
        ("Brad Pitt; Ada", "one name? Add --one-name. 2 of them? Write 'Brad Pitt' Ada instead."),
    ],
)
def test_what_may_be_one_name_or_several_is_asked_shortly(text, advice):
    with pytest.raises(UserError) as asked:
        targets.split([text], "sd14")
    assert str(asked.value).startswith(repr(text))
    assert str(asked.value).endswith(advice)
    assert targets.split([text], "sd14", one_name=True) == [text]


def test_what_the_embedded_model_cannot_draw_is_refused_however_it_is_written():
    for one_name in False, True:
        with pytest.raises(UserError, match=r"cannot draw '(cat, )?kitty'"):
            target(*targets.split(["cat, kitty"], "emoji", one_name))


def test_both_forms_that_are_advised_are_taken():
    with pytest.raises(UserError, match=r"Add --one-name. 2 of them\? Write black 'white cat' instead."):
        targets.split(["black and white cat"], "emoji")
    for names in targets.split(["black and white cat"], "emoji", one_name=True), ["black"], ["white cat"]:
        assert target(*names).names == names


def test_several_styles_are_several_targets():
    assert targets.split(["noto style and blob style"], "emoji") == ["noto style", "blob style"]


def test_the_same_target_twice_is_one():
    assert targets.split(["Crab", "crab", "red  heart"], "emoji") == ["Crab", "red heart"]
    assert targets.split(["straße", "STRASSE", "Jay-Z", "jay z"], "sd14") == ["straße", "Jay-Z"]
    assert target("CRAB").names == ["crab"]  # as the model spells it
    assert targets.split(["!!!", "???"], "sd14") == ["!!!", "???"]


@pytest.mark.parametrize("name", ["blob style", "Blob Style", "blob"])
def test_a_style_gets_the_preset_for_styles_and_that_is_said(name, capsys):
    assert target(name) == targets.Target(["blob style"], "emoji-style", "noto style")
    assert f"preset  emoji-style, as {name!r} is a style" in capsys.readouterr().out


def test_the_other_preset_is_not_insisted_on(capsys):
    assert target("blob style", preset="emoji").preset == "emoji-style"
    assert target("red heart", preset="emoji-style").preset == "emoji"
    assert "preset  emoji, as 'red heart' is no style" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        (["  "], {"model": "sd14"}, "the target is empty"),
        (["An  Object"], {"model": "sd14", "preset": "object"}, "is both target and surrogate"),
        (["x"], {"model": "sd14", "surrogate": " \t"}, "the surrogate is empty"),
        (["red heart"], {"preset": "celebrity"}, "--preset celebrity is for Stable Diffusion"),
        (["red heart", "Brad"], {}, "cannot draw 'Brad'"),
        (["chair"], {}, "cannot draw 'chair'"),  # it is among the anchors
        (["red heart"], {"surrogate": "a person of note"}, "cannot draw 'a person of note'"),
    ],
)
def test_what_cannot_be_erased_is_said(names, given, words):
    with pytest.raises(UserError, match=words):
        target(*names, **given)


@pytest.mark.parametrize("name", ["♥", "!!!", "C++", "日本", "é"])
def test_signs_and_other_scripts_are_targets_of_stable_diffusion(name):
    assert target(name, model="sd14").names == [name]


def test_an_accent_may_be_one_letter_or_two():
    names = {target(unicodedata.normalize(form, "Beyonc\u00e9"), model="sd14").names[0] for form in ("NFC", "NFD")}
    assert len(names) == 1


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("gold heart", {"red heart", "yellow heart", "green heart", "blue heart", "purple heart"}),
        ("umbrela", {"umbrella"}),
        ("Bewildered  Face!", {name for name in prompts.read_prompts("emoji").domain if "face" in name.split()}),
        ("trophy", set()),  # spelt a little like "tropical fish", which is nothing like it
        ("of a sputnik with a", set()),
        ("日本", set()),
    ],
)
def test_what_is_offered_instead_shares_a_word_or_its_spelling_and_nothing_is_made_up(name, offered):
    found = targets.alike(name)
    assert set(found) <= offered
    assert len(found) == min(5, len(offered))
    said = ", ".join(found) or "nothing with a name like it"
    with pytest.raises(UserError, match=f"It knows {said}; all that it knows: python cpe.py list"):
        target(name)


@pytest.mark.parametrize(("name", "surrogate"), [("blob style", "cloud"), ("red heart", "noto style")])
def test_a_style_becomes_a_style_and_a_thing_a_thing(name, surrogate):
    with pytest.raises(UserError, match=f"--surrogate '{surrogate}' is nothing that '{name}' can become"):
        target(name, surrogate=surrogate)
    assert target("blob style", surrogate="fluent style").surrogate == "fluent style"
    assert target("red heart", surrogate="umbrella").surrogate == "umbrella"


@pytest.mark.parametrize("model", ["emoji", "copy"])
def test_a_copy_of_the_embedded_model_is_known_as_one_and_has_its_defaults(tmp_path, monkeypatch, model):
    monkeypatch.setenv("HOME", str(tmp_path))
    for part in ("tokenizer", "unet"):
        shutil.copytree(ROOT / "emoji" / part, tmp_path / "copy" / part)
    name = "~/copy" if model == "copy" else "emoji"
    assert common.is_emoji(name)
    assert common.defaults_of(name) == json.loads((ROOT / "emoji/defaults.json").read_text())
    assert common.defaults_of("sd14") == common.SD_DEFAULTS
    assert not common.is_emoji("~/other")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "x" * 5000, "..", "Brad  Pitt!", "日本", "😀", "con"])
def test_a_name_cannot_leave_its_folder(name):
    file = common.slug(name)
    assert file
    assert len(file.encode()) <= 80
    assert not set(file) & set("/\\\0.")
    assert file not in ("con", "nul")


def test_no_two_names_make_one_file():
    names = [
        "♥",
        "♦",
        "!!!",
        "???",
        "C",
        "C++",
        "C#",
        "é",
        "e",
        "日本",
        "日木",
        "कि",
        "का",
        "#cat",
        "cat",
        "x" * 90,
        "x" * 91,
    ]
    assert len({common.slug(name) for name in names}) == len(names)
    assert common.slug("Brad Pitt") == "brad-pitt"
    assert common.slug("STRASSE") == common.slug("straße")  # one name to every command: one file
    assert common.slug(unicodedata.normalize("NFD", "é")) == common.slug("é")


def test_list_says_what_there_is(run, gates):
    Path("gates/many").mkdir(parents=True)
    tensors, metadata = load_tensors(gates)
    save_tensors("gates/many/red-heart.safetensors", tensors, metadata | {"surrogate": "cloud"})
    code, said = run("list")
    assert code == 0
    solved = Settings.of(prompts.PRESETS["emoji-style"], style=True)
    for words in (
        "models  --model sd14",
        "preset  celebrity    becomes 'a person'; trained: eta 0.3, lambda 100000, rank 1\n",
        f"becomes 'noto style'; solved: eta {solved.eta:g}, lambda {solved.lam:g}, rank {solved.k}\n",
        f"gates   gates/many/red-heart.safetensors: erases red heart from {metadata['model']}, which becomes 'cloud'\n",
    ):
        assert words in said
    assert "tropical fish" in said
    assert "blob style" in said


def test_list_finds_gates_where_demo_puts_them_and_nothing_else(run, gates, tiny_original):
    assert f"gates   {gates}: erases red heart from" in run("list")[1]  # in the folder itself
    Path("images").mkdir()
    gates.rename("images/demo-red-heart.safetensors")
    save_tensors("model.safetensors", load_tensors("images/demo-red-heart.safetensors")[0])  # says of no target
    found = [line for line in run("list")[1].splitlines() if line.startswith("gates ")]
    assert [line.split(":")[0] for line in found] == ["gates   images/demo-red-heart.safetensors"]
    Path("images/demo-red-heart.safetensors").unlink()
    assert "gates   none here, in gates/, or in images/" in run("list")[1]


@pytest.mark.parametrize("name", ["👩\u200d🚀", "می\u200cخواهم"])
def test_a_name_with_joiners_is_read_from_its_file_as_it_was_written(gates, name):
    tensors, metadata = load_tensors(gates)
    save_tensors("joined.safetensors", tensors, metadata | {"target": name})
    assert common.read_gates(Path("joined.safetensors")).target == name


def test_what_a_listed_file_says_cannot_write_to_the_terminal(run, gates):
    tensors, metadata = load_tensors(gates)
    save_tensors("odd.safetensors", tensors, metadata | {"target": "red\x1b[2Jheart"})
    assert "gates   odd.safetensors: erases red?[2Jheart from" in run("list")[1]


@pytest.mark.parametrize(
    ("given", "meant", "preset"),
    [
        (["Umbrella", "umbrella"], ("umbrella",), "emoji"),
        (["red-heart", "Dog Face"], ("red heart", "dog face"), "emoji"),
        (["Blob"], ("blob style",), "emoji-style"),
    ],
)
def test_targets_of_a_comparison_are_read_as_those_of_train(given, meant, preset):
    (scenario,) = compare.of_targets(options.parse(["compare", *given])).values()
    assert (scenario.targets, scenario.preset) == (meant, preset)


def test_what_cannot_be_compared_is_said_with_what_can():
    for given, words in (
        (["Brad Pitt"], "the embedded model cannot draw 'Brad Pitt'. It knows"),
        (["cloud"], "is both target and surrogate: choose another target"),
        (["umbrella", "blob style"], "'blob style' is not in prompts/emoji.txt"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            compare.of_targets(options.parse(["compare", *given]))


# --- Lines of a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("Brad Pitt", ["Brad Pitt"]),
        ("Brad Pitt, William Bradley Pitt", ["Brad Pitt", "William Bradley Pitt"]),
        ("50 Cent", ["50 Cent"]),
        ("2Pac, Tupac Shakur", ["2Pac", "Tupac Shakur"]),
        ("#1 dad mug", ["#1 dad mug"]),
        ("Anderson Cooper", ["Anderson Cooper"]),  # neither this nor the next has the word "and"
        ("Ferdinand", ["Ferdinand"]),
        ("Salt-N-Pepa", ["Salt-N-Pepa"]),
        ("C++", ["C++"]),
        ('Dwayne "The Rock" Johnson', ['Dwayne "The Rock" Johnson']),
        ('"Weird Al" Yankovic, Al Yankovic', ['"Weird Al" Yankovic', "Al Yankovic"]),
        ('"Sammy Davis, Jr."', ["Sammy Davis, Jr."]),
        ('"Martin Luther King, Jr." ,MLK', ["Martin Luther King, Jr.", "MLK"]),
    ],
)
def test_a_line_is_a_name_and_after_commas_other_names_of_it(line, names):
    assert targets.names_in(line, "celebrity") == names


@pytest.mark.parametrize(
    ("line", "odd", "question"),
    [
        ("1,Brad Pitt", "1", "has the number or mark of a list"),
        ("1. Brad Pitt", "1. Brad Pitt", "has the number or mark of a list"),
        ("2) Brad Pitt", "2) Brad Pitt", "has the number or mark of a list"),
        ("- Brad Pitt", "- Brad Pitt", "has the number or mark of a list"),
        ("1984", "1984", "has the number or mark of a list"),
        ("name", "name", "may head a column"),
        ("Target_Names,aliases", "Target_Names", "may head a column"),
        ("1\tBrad Pitt", "1\tBrad Pitt", "has more than one column"),
        ("| Brad Pitt | actor |", "| Brad Pitt | actor |", "has more than one column"),
        ("1;Brad Pitt", "1;Brad Pitt", "may be several names"),
        ("Brad Pitt and Angelina Jolie", "Brad Pitt and Angelina Jolie", "may be several names"),
        ("Simon And Garfunkel", "Simon And Garfunkel", "may be several names"),
        ("AT&T", "AT&T", "may be several names"),
        ("Brad Pitt # an actor", "Brad Pitt # an actor", "ends in a comment"),
        ("Brad Pitt #actor", "Brad Pitt #actor", "ends in a comment"),
        ("Martin Luther King, Jr.", "Jr.", "may be the end of the name before: quote both as one"),
        ("Prince, Junior", "Junior", "may be the end of the name before: quote both as one"),
        ("Brad Pitt, 'Brad'", "'Brad'", 'begins with a quote that is not a plain "'),
        ("“Sammy Davis, Jr.”", "“Sammy Davis", 'begins with a quote that is not a plain "'),
        ('"Sammy Davis', '"Sammy Davis', "has a double quote that is not closed"),
        ('5" floppy disk', '5" floppy disk', "has a double quote that is not closed"),
    ],
)
def test_what_may_be_no_name_is_asked_about_and_the_question_says_how_to_answer(line, odd, question):
    with pytest.raises(UserError) as asked:
        targets.names_in(line, "celebrity")
    assert str(asked.value).startswith(f"{odd!r} {question}")
    answer = str(asked.value).split(" If all of it is a name: ")[1].removesuffix(".")
    assert targets.names_in(answer, "celebrity") == [line if "name before" in question else odd]


def test_a_name_that_the_preset_lists_raises_no_question():
    for line in ("Anna and Elena Balbusso", "anna And Elena Balbusso"):
        assert targets.names_in(line, "style") == [line]
    with pytest.raises(UserError, match="may be several names"):
        targets.names_in("Anna and Elena Balbusso", "celebrity")


@pytest.mark.parametrize("line", ["Brad Pitt,", ", Brad Pitt", 'Brad Pitt, ""', "Brad Pitt,, William"])
def test_a_name_is_missing_where_there_is_nothing_between_commas(line):
    with pytest.raises(UserError, match="a name is missing before or after a comma"):
        targets.names_in(line, "celebrity")


@pytest.mark.parametrize("preset", prompts.PRESETS)
def test_no_name_that_a_preset_lists_is_asked_about_in_a_file(preset):
    for name in prompts.read_prompts(preset).domain:
        assert targets.names_in(name, preset) == [name]
