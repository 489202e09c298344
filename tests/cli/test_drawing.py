"""generate, inspect, demo: pictures that say what they show, and replace nothing."""

import json
import os
import re
import shlex
import shutil
import struct
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import ROOT, contents, write_gates

import cpe
import sampler
import weights
from cli import check, common, demo, evaluate, generate, inspect, many, options, pictures, targets
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import read_prompts
from study.evaluate import drawn_with, read_folder, read_image
from study.world import World


def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What is asked of sampler.draw from now on."""
    asked, real = [], sampler.draw

    def draw(model, prompts, seeds, gates, steps, guidance, method, **more):
        asked.append(
            {"prompts": prompts, "seeds": seeds, "steps": steps, "guidance": guidance, "sampler": method} | more
        )
        return real(model, prompts, seeds, gates, steps, guidance, method, **more)

    monkeypatch.setattr(sampler, "draw", draw)
    return asked


def test_pictures_are_named_after_their_prompt_labelled_and_numbered(run, gates):
    for name in ("a-red-heart.png", "a-red-heart-2.png", "a-red-heart-3.png"):
        code, said = run("generate", "a red heart", "a cat", gates, "--before-after")
        assert code == 0, said
        assert f"wrote   images/{name}: above before, below after, seeds 0 to 1, 2 steps, guidance 3" in said
    assert len(contents("images")) == 3
    with Image.open("images/a-red-heart.png") as image:
        assert image.width > 2 * 16  # twice 8 pixels each, and a margin with the names of the rows
        assert image.height > 2 * 16


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        (0.004, "unchanged (0.004 of 2)"),
        (0.04, "hardly changed (0.040 of 2)"),
        (0.1, "somewhat changed (0.100 of 2)"),
        (0.5, "another picture (0.500 of 2)"),
        (2.0, "another picture (2.000 of 2)"),
    ],
)
def test_how_far_a_picture_moved_is_a_word_and_a_number(run, gates, monkeypatch, moved, said):
    before = torch.full((1, 3, 8, 8), -1.0)
    monkeypatch.setattr(generate, "drawn", lambda *_: {"before": before, "after": before + moved})
    lines = run("generate", "a red heart", gates, "--before-after")[1].splitlines()
    assert [line for line in lines if line.startswith("change")] == [f"change  {said}  a red heart"]


def test_gates_bring_their_models_way_of_drawing(run, gates, monkeypatch):
    asked = seen(monkeypatch)
    assert run("generate", "a cat", gates, model="")[0] == 0
    assert run("generate", "a cat", gates, "--steps", "3", "--guidance", "1", model="")[0] == 0
    assert [(each["steps"], each["guidance"], each["sampler"]) for each in asked] == [(2, 3.0, "dpm"), (3, 1, "dpm")]


@pytest.mark.parametrize(("model", "how"), [("emoji", (20, 4.0, "dpm")), ("sd14", (50, 7.5, "ddim"))])
def test_a_model_brings_its_own_way_of_drawing(model, how):
    args = options.parse(["generate", "a cat", "--model", model])
    common.settle(args)
    assert (args.steps, args.guidance, args.sampler) == how


def test_how_long_it_takes_is_said_beforehand_from_measured_steps(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(clock)))
    for text, steps in ("long", 90), ("short", 1):  # three steps in 20 s
        list(common.bar(range(steps), steps, text))
    assert capsys.readouterr().out == "time    long: about 10 min (90 steps)\n"


def test_many_prompts_say_how_long_all_of_them_take(run, monkeypatch):
    Path("lines").write_text("\n".join("abcdefgh"))
    clock = iter(range(0, 10000, 20))
    monkeypatch.setattr(generate, "write", lambda *_: True)  # all that takes time
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(clock)))
    said = run("generate", "--prompts", "lines")[1]
    assert "time    all prompts: about 53 s (8 steps)\n" in said  # three of them took 20 s


def test_gates_of_a_model_that_is_gone_say_which(run, tiny_original):
    write_gates(tiny_original, Path("b.safetensors"), model="elsewhere/model")
    code, said = run("generate", "a cat", "b.safetensors", model="")
    assert (code, "elsewhere/model" in said) == (2, True)


def test_it_says_what_gates_do_in_prompts_that_name_their_target_the_failures_last(run, gates, monkeypatch):
    tensors, metadata = load_tensors(gates)
    (scaler,) = [name for name in tensors if "scaler" in name]
    save_tensors("x.safetensors", tensors | {scaler: 0 * tensors[scaler]}, metadata)  # half open everywhere
    prompts = ("my red hearts", "a red-heart", "a cat")
    for least, word in (0.6, "SHUT    "), (0.4, "WEAK    "):
        monkeypatch.setattr(inspect, "SHUT", least)
        said = run("generate", *prompts, "x.safetensors", "--steps", "1")[1]
        for prompt in prompts[:2]:
            assert f"{word}{prompt!r} names 'red heart', but its gate opens to 0.50 at" in said
            inspected = run("inspect", prompt, "x.safetensors")[1]  # in the same words
            assert next(line for line in said.splitlines() if repr(prompt) in line) in inspected.splitlines()
        assert "'a cat'" not in said.split("next ")[0]
    Path("lines").write_text("\n".join(prompts))  # of a file as well
    listed = run("generate", "--prompts", "lines", "x.safetensors", "--steps", "1")[1]
    assert all(f"WEAK    {prompt!r} names 'red heart'" in listed for prompt in prompts[:2])
    found = iter([0.1, 0.9])
    monkeypatch.setattr(inspect, "look", lambda file, prompt, *_: opening(0.9, next(found), prompt))
    lines = run("generate", *prompts, "x.safetensors", "--steps", "1")[1].splitlines()
    assert [line.split()[0] for line in lines if " names " in line] == ["opens", "WEAK"]


def test_what_is_next_after_a_failure_is_to_look_at_it(run, gates, monkeypatch):
    found = {"a red heart": 0.9, "my red heart": 0.1, "old red heart": 0.1}
    monkeypatch.setattr(inspect, "look", lambda file, prompt, *_: opening(0.9, found[prompt], prompt))
    said = run("generate", *found, gates, "--steps", "1")[1]
    assert said.endswith(f"next    python cpe.py inspect {gates} 'my red heart'\n")


def test_what_the_model_itself_does_not_draw_is_no_failure_of_the_gate(run, gates, monkeypatch):
    monkeypatch.setattr(inspect, "look", lambda file, prompt, *_: opening(0.9, 0.1, prompt, "red heart"))
    asked = []
    monkeypatch.setattr(inspect, "undrawn", lambda *named: asked.append(named[:2]) or ["a red heart"])
    said = run("generate", "a red heart", "my red heart", "a cat", gates, "--steps", "1")[1]
    assert asked == [("red heart", ["a red heart", "my red heart"])]
    assert "undrawn 'a red heart' names 'red heart', but the model draws none there even without gates\n" in said
    assert "WEAK    'my red heart' names" in said
    assert said.endswith("'my red heart'\n")


def test_clip_looks_at_two_pictures_without_gates(monkeypatch, tiny_original):
    model = SimpleNamespace(name="emoji")
    monkeypatch.setattr(sampler, "draw", lambda model, prompts, seeds, gates, *_, **__: [prompts, seeds, gates][0])
    looks = iter(["red heart", "cat", "cat", "dog"])
    monkeypatch.setattr(pictures, "eyes", lambda *_: lambda drawn: [next(looks) for _ in drawn])
    assert pictures.undrawn("Red Heart", ["one in two", "none"], model) == ["none"]
    assert pictures.undrawn("Brad Pitt", ["x"], model) == []  # CLIP cannot look for it
    # Two things want a wide picture: a square one says nothing (and no looks are left here).
    assert pictures.undrawn("red heart", ["a red heart and a crab"], model) == []
    assert pictures.undrawn("red heart", ["x"], weights.load_model(tiny_original)) == []


def test_a_name_that_the_model_does_not_read_is_not_said_to_be_kept_from_a_gate(run, gates):
    behind = "so " * 80 + "red heart"
    half = "so " * 74 + "red heart"  # of the name one word is read
    for prompt in behind, half:
        with pytest.warns(UserWarning, match="prompt cut at 75 tokens") as warned:
            said = run("generate", prompt, gates, "--steps", "1")[1]
        assert "names" not in said
        assert len(warned) == 1
        with pytest.warns(UserWarning, match="prompt cut at 75 tokens") as warned:
            said = run("inspect", prompt, gates)[1]
        assert ("does not name 'red heart'" in said, len(warned)) == (True, 1)
    with pytest.warns(UserWarning, match="prompt cut") as warned:
        said = run("inspect", "red heart " + "so " * 80, gates)[1]
    assert (" names 'red heart'" in said, len(warned)) == (True, 1)


def test_what_a_gate_file_says_of_drawing_is_blamed_on_the_file(run, gates):
    tensors, metadata = load_tensors(gates)
    for drawing in ({"sampler": "euler"}, {"steps": 0}, {"steps": 5000}):
        save_tensors(gates, tensors, metadata | {"drawing": json.dumps(drawing)})
        code, said = run("generate", "a cat", gates)
        assert (code, f"cpe.py: {gates}: " in said, "--steps" in said) == (2, True, False), said


@pytest.mark.parametrize(
    ("target", "prompt", "instead"),
    [
        ("Jay-Z", "a photo of Jay Z", "a photo of cloud"),
        ("owl", "An owl and an  owl's nest", "a cloud and an  cloud nest"),
        ("dog", "a hot dog, hot  dogs and a dog's bone", "a hot dog, hot  dogs and a cloud bone"),
        ("dog", "two hot dogs", "two hot dogs"),
        ("hot dog", "a hot dog for a dog", "a cloud for a dog"),
        ("Dr. Dre", "dr dre's music", "cloud music"),
        ("C++", "a book about c++", "a book about cloud"),
        ("red heart", "a red-heart, hearts", "a cloud, hearts"),
        ("red heart", "a red hearth", "a red hearth"),
        ("straße", "the STRASSE at night", "the cloud at night"),
        ("STRASSE", "Meine Straße", "meine cloud"),
        ("Straße", "Straße in ROM", "cloud in rom"),  # CLIP reads no capitals
    ],
)
def test_a_name_is_found_however_its_words_are_joined(gates, target, prompt, instead):
    file = common.read_gates(gates)
    concept = replace(file.concept, names=[target], surrogate="cloud")
    assert inspect.with_surrogate(replace(file, concept=concept), prompt) == instead


def test_a_negative_prompt_is_drawn_away_from(run, gates, monkeypatch):
    asked = seen(monkeypatch)
    assert run("generate", "a cat", "--steps", "1", "--negative", "a dog")[0] == 0
    assert asked[0]["negative"] == "a dog"
    assert run("generate", "a cat", "--steps", "1", "--out", "images/b.png")[0] == 0
    assert Path("images/a-cat.png").read_bytes() != Path("images/b.png").read_bytes()


def test_a_picture_has_the_size_that_was_asked_for(run, gates):
    assert run("generate", "a cat", "--steps", "1", "--size", "24x8", "--out", "wide.png")[0] == 0
    with Image.open("wide.png") as wide:
        assert wide.width == 2 * 24
        assert '"size": [8, 24]' in wide.info["cpe"]
    for size, words in (
        ("24x7", "--size: width and height are multiples of 4 here, not 24 and 7."),
        ("24", "24 is no size"),
    ):
        code, said = run("generate", "a cat", "--steps", "1", "--size", size, "--out", "none.png")
        assert (code, words in said, Path("none.png").exists()) == (2, True, False), said


def test_gates_of_another_text_encoder_are_used_with_a_warning(run, gates):
    tensors, metadata = load_tensors(gates)
    save_tensors(gates, tensors, metadata | {"fingerprint": "0" * 16})
    with pytest.warns(UserWarning, match="trained for another model"):
        assert run("generate", "a cat", gates, "--steps", "1")[0] == 0
    save_tensors(gates, tensors, {name: text for name, text in metadata.items() if name != "fingerprint"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("generate", "a cat", gates, "--steps", "1")[0] == 0


def test_what_is_said_to_be_next_runs(run, gates, tiny_original):
    said = run("generate", "a red heart", gates, "--steps", "1")[1]
    following = shlex.split(said.split("next ")[1].split("\n")[0])[2:]
    assert following == ["inspect", str(gates), "a red heart"]
    code, said = run(*following, model="")
    assert code == 0
    following = shlex.split(said.split("next ")[1].split("\n")[0])[2:]
    assert run(*following, "--steps", "1", model="")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate",), "either prompts, or a file"),
        (("generate", "x", "--prompts", "lines"), "either prompts, or a file"),
        (("generate", "x", "--before-after"), "give at least one gate file"),
        (("generate", "a cat", ""), "the prompt is empty"),
        (("generate", "x", "--out", "x.jpg"), "a name that ends in .png"),
        (("generate", "x", "--out", "/dev/null/x.png"), "/dev/null/x.png could not be written"),
        (("generate", "x", "none.safetensors"), "none.safetensors does not exist: check its name, or train it first"),
        (("generate", "x", "--gates", "gate.pt"), "pickle"),
        (("generate", "--prompts", "lines", "--out", "x.png"), "--out is a folder here"),
        (("generate", "--prompts", "none"), "none does not exist"),
        (("inspect", "x"), "which gates? Give one file or more"),
        (("inspect", "red-heart.safetensors"), "one prompt is looked at, not 0"),
        (("inspect", "red-heart.safetensors", "a", "cat"), "one prompt is looked at, not 2: quote it"),
        (("inspect", "red-heart.safetensors", "  "), "the prompt is empty"),
        (("check", "red-heart.safetensors", "--sentences", "lines"), "needs one {}"),
        (("demo", "red heart", "--model", "."), "the demo is of the embedded model"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(run, gates, arguments, words):
    Path("lines").write_text("a cat\n")
    Path("gate.pt").write_bytes(b"")
    before = contents(".")
    code, said = run(*arguments)
    assert code == 2
    assert words in said
    assert "Traceback" not in said
    assert contents(".") == before


@pytest.mark.parametrize("words", [["generate", "a cat"], ["generate", "--prompts", "lines"]])
def test_steps_that_cannot_be_drawn_are_a_sentence_before_a_model_is_opened(run, monkeypatch, words):
    Path("lines").write_text("a picture of a cat\n")
    monkeypatch.setattr(generate, "open_model", lambda *_: pytest.fail("opened the model"))
    code, said = run(*words, "--sampler", "ddim", "--steps", "600")
    assert (code, "--steps: a picture takes between 1 and 500 steps, not 600" in said) == (2, True)


def test_a_gate_file_that_is_given_twice_counts_once(run, gates):
    assert run("generate", "a red heart", gates, "--out", "once.png")[0] == 0
    assert run("generate", "a red heart", gates, gates, "--out", "twice.png")[0] == 0
    assert Path("once.png").read_bytes() == Path("twice.png").read_bytes()


def test_gates_that_do_not_fit_say_which_model_they_are_of(run, gates):
    for model in ("emoji", "sd14"):
        code, said = run("generate", "a cat", gates, "--model", model)
        assert (code, f"{gates} is of another model: it corrects 8 projections" in said) == (2, True)


def test_images_that_are_no_numbers_are_not_written(run, monkeypatch):
    def broken(*_, **__):
        raise ValueError("the model's images are not finite numbers")

    monkeypatch.setattr(sampler, "draw", broken)
    for dtype, words in ("float32", "the weights or the gates are damaged"), ("float16", "try --dtype float32"):
        code, said = run("generate", "a cat", "--dtype", dtype)
        assert (code, words in said) == (2, True)
    assert not Path("images").exists()


# --- Files of prompts --------------------------------------------------------------------------------------------


def test_a_file_of_prompts_is_a_picture_each_and_those_that_are_there_stay(run, gates, monkeypatch):
    Path("lines").write_text("# mine\na cat\n\n#1 dad mug\na dog\n")
    code, said = run("generate", "--prompts", "lines", gates, "--before-after", "--out", "x")
    assert code == 0, said
    names = ["0001-a-cat.png", f"0002-{common.slug('#1 dad mug')}.png", "0003-a-dog.png"]
    assert list(contents("x")) == sorted(names)
    assert "passed  1 comment line of lines" in said
    assert "drew    3 prompts, kept 0" in said
    before = contents("x")
    Path("x/0003-a-dog.png").unlink()
    assert (
        "drew    1 prompts, kept 2" in run("generate", "--prompts", "lines", gates, "--before-after", "--out", "x")[1]
    )
    assert contents("x") == before
    assert "kept 0" in run("generate", "--prompts", "lines", gates, "--before-after", "--out", "x", "--seed", "1")[1]
    assert before.items() <= contents("x").items()
    assert len(contents("x")) == 6  # numbered: nothing is overwritten


def test_another_unet_draws_anew(run, tiny_original, tmp_path):
    model = shutil.copytree(tiny_original, tmp_path / "model")
    Path("lines").write_text("a cat\n")
    draw = ("generate", "--prompts", "lines", "--model", str(model), "--out", "x")
    assert "drew    1 prompts, kept 0" in run(*draw, model="")[1]
    assert "drew    0 prompts, kept 1" in run(*draw, model="")[1]
    os.utime(next((model / "unet").glob("*.safetensors")), ns=(0, 0))  # as a file that was written anew
    assert "drew    1 prompts, kept 0" in run(*draw, model="")[1]


def test_a_table_brings_seeds_and_guidance_of_its_own(run, monkeypatch):
    rows = [
        "case_number,prompt,evaluation_seed,evaluation_guidance,mood",
        '7,"a cat, sleeping",42,3.5,good',
        "8,a dog,,,",
    ]
    Path("t.csv").write_text("\n".join(rows))
    asked = seen(monkeypatch)
    code, said = run("generate", "--prompts", "t.csv", "--steps", "1", "--out", "x")
    assert code == 0, said
    assert "passed  columns mood of t.csv" in said
    assert list(contents("x")) == ["7-a-cat-sleeping.png", "8-a-dog.png"]
    assert [(each["seeds"], each["guidance"]) for each in asked] == [([42], 3.5), ([0], 7.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,seed\na cat,x", "line 2: .*seeds are whole numbers"),
        ("prompt,seed\na cat,4.5", "line 2: .*seeds are whole numbers"),
        ("prompt,guidance_scale\na cat,much", "line 2: .*guidance scales 0 to 100"),
        ("prompt,seed\na cat, asleep,4", "line 2: 3 fields for 2 columns: put what holds a comma in double quotes"),
        ('prompt\n"a cat\na dog', "line 3 is no CSV .*: check its double quotes"),
        ("a,b\n1,2", "has no column `prompt`"),
        ("prompt\n\n", "has no prompts"),
        ("prompt,seed\n ,7\n,8", "t.csv has no prompts: fill its column `prompt`"),
        ("prompt,seed\n ,7,8\na cat,1", "line 2: 3 fields for 2 columns"),
    ],
)
def test_a_spoilt_table_is_named(run, text, words):
    Path("t.csv").write_text(text)
    code, said = run("generate", "--prompts", "t.csv")
    assert code == 2
    assert re.search(words, said)


def test_seeds_keep_every_digit_and_prompts_their_quotes(run):
    Path("t.csv").write_text('prompt,seed\na cat,42.0\n\n"a ""red"" heart, twice",9007199254740993\n')
    drawings = many.read_drawings(Path("t.csv"))
    assert [(each.prompt, each.seed) for each in drawings] == [("a cat", 42), ('a "red" heart, twice', 2**53 + 1)]


def test_rows_without_a_prompt_are_passed_aloud(run, capsys):
    """As I2P has one, which the authors' code passes over."""
    Path("t.csv").write_text("prompt,seed\na cat,1\n ,7\n,\na dog,2\n")
    assert [each.prompt for each in many.read_drawings(Path("t.csv"))] == ["a cat", "a dog"]
    assert capsys.readouterr().out == "passed  2 rows of t.csv without a prompt\n"


def test_a_row_is_the_single_command_with_the_same_numbers_bit_for_bit(run, gates):
    Path("t.csv").write_text("prompt,evaluation_seed,evaluation_guidance\na red heart,4290749014,2.5\na cat,4,5\n")
    assert run("generate", "--prompts", "t.csv", gates, "--out", "x", "--negative", "a dog")[0] == 0
    single = ("generate", "a red heart", gates, "--seed", "4290749014", "--guidance", "2.5", "--negative", "a dog")
    assert run(*single, "--out", "one.png")[0] == 0
    with Image.open("x/0001-a-red-heart.png") as row, Image.open("one.png") as one:
        assert row.width == row.height  # no heading: other programs read such folders
        assert one.height > row.height
        bare = one.crop((0, one.height - row.height, *one.size))
        assert bare.tobytes() == row.tobytes()


def test_pictures_that_it_draws_are_judged_by_their_prompts(run, gates, tiny_original):
    for prompt in "a red heart", "a cat":
        assert run("generate", prompt, gates, "--steps", "1", "--out", f"drawn/{prompt}.png")[0] == 0
    assert [prompt for _, prompt in read_folder(Path("drawn"))] == ["a cat", "a red heart"]
    Path("one").write_text("a cat\n")
    assert run("generate", "--prompts", "one", gates, "--steps", "1", "--out", "bare")[0] == 0
    code, said = run("evaluate", "drawn", "--name", "cat", "--name", "red heart")
    assert (code, "accuracy" in said) == (0, True), said


def test_pictures_of_one_file_are_judged_each_by_itself_and_of_before_and_after_those_after(run, gates, monkeypatch):
    prompts, draw = ("a red heart", "a cat", "a dog"), ("--steps", "1", "--seed", "3")
    assert run("generate", *prompts, gates, "--before-after", *draw, "--out", "drawn/")[0] == 0
    Path("lines").write_text("\n".join(prompts))
    table = ["prompt,seed", *(f"{prompt},{3 + i}" for i, prompt in enumerate(prompts))]
    Path("lines.csv").write_text("\n".join(table))
    assert run("generate", "--prompts", "lines.csv", gates, "--steps", "1", "--out", "alone")[0] == 0
    (sheet,), alone = read_folder(Path("drawn")), read_folder(Path("alone"))
    found = list(evaluate.cut(sheet[0], drawn_with(sheet[0]), Path()))[::-1]
    assert [prompt for _, prompt in found] == [prompt for _, prompt in alone] == list(prompts)
    for (cut, _), (whole, _) in zip(found, alone, strict=True):
        # one level of 255: a batch of three is not computed as three of one are
        torch.testing.assert_close(read_image(cut, 16), read_image(whole, 16), rtol=0, atol=1.01 / 127.5)
    assert "cell" not in drawn_with(alone[0][0])  # it stands alone already
    monkeypatch.setitem(sys.modules, "cleanfid.fid", SimpleNamespace())
    for folder, reference in (("drawn", "alone"), ("alone", "drawn")):
        code, said = run("evaluate", folder, "--fid", "--reference", reference)
        assert (code, "--fid takes files as they are" in said) == (2, True)
    code, said = run("evaluate", "drawn", "--reference", "alone", "--json", "x.json")  # of sheets the pictures, too
    assert (code, abs(json.loads(Path("x.json").read_text())["cmmd"]) < 1e-3) == (0, True), said
    code, said = run("evaluate", "drawn", "--json", "/dev/null/x.json")
    assert (code, "clip_score" in said) == (2, False)


def test_pictures_of_the_embedded_model_are_judged_by_its_own_clip(run, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(evaluate, "load_clip", lambda name, **_: asked.append(name) or pytest.fail("another judge"))
    assert run("generate", "a crab", "--steps", "1", "--guidance", "1", model="emoji")[0] == 0
    code, said = run("evaluate", "images", "--name", "crab", model="")
    assert (code, asked, "judge   the CLIP of emoji; the pictures are of emoji\n" in said) == (0, [], True), said
    page = pictures.sheet({"a": torch.zeros(1, 3, 8, 8)}, ["x"])
    pictures.save(page, Path("images/attack.png"), {"prompt": "a crab", "prompts": []})  # says nothing of its model
    assert "seen, crab" in said  # one name is enough, as it may see all else that the model knows
    shutil.copytree(ROOT / "emoji", "copy", ignore=shutil.ignore_patterns("unet.safetensors", "*.py", "*.md"))
    assert run("generate", "a crab", "--steps", "1", "--guidance", "1", model="copy")[0] == 0  # or one that is baked
    code, said = run("evaluate", "images", model="")
    assert (code, "judge   the CLIP of copy; the pictures are of copy and emoji\n" in said) == (0, True), said


def test_who_judges_pictures_of_several_models_is_said_before_it_is_fetched(run, monkeypatch):
    for number, model in enumerate(("emoji", "sd14")):
        said = {"prompt": "a crab", "prompts": ["a crab"], "model": model}
        pictures.save(pictures.sheet({"": torch.zeros(1, 3, 8, 8)}), Path(f"images/{number}.png"), said)
    code, said = run("evaluate", "images", model="")
    assert (code, "openai/clip-vit-large-patch14 is not in the Hugging Face cache" in said) == (2, True), said
    assert "(--model emoji: its own CLIP); the pictures are of emoji and sd14\n" in said.split("cpe.py:")[0]
    Path("images/0.png").unlink()
    said = run("evaluate", "images", model="")[1]
    assert "judge   openai/clip-vit-large-patch14; the pictures are of sd14\n" in said


def test_a_reference_without_pictures_to_compare_with_is_named(run, tiny_original):
    image = torch.zeros(1, 3, 8, 8)
    pictures.save(pictures.sheet({"": image}), Path("images/1.png"), {"prompt": "a cat", "prompts": ["a cat"]})
    pictures.save(pictures.sheet({"a": image}, ["x"]), Path("sheets/1.png"), {"prompt": "a cat", "prompts": []})
    Path("empty").mkdir()
    for reference in ("sheets", "empty"):
        code, said = run("evaluate", "images", "--reference", reference)
        assert (code, f"cpe.py: {reference} holds no pictures to be judged" in said) == (2, True), said


def test_a_picture_that_claims_to_be_huge_was_drawn_with_nothing(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 50_000, 50_000)  # width and height in the header
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    assert drawn_with(path) == {}


# --- inspect, check, demo ----------------------------------------------------------------------------------------


def test_inspect_has_a_line_for_every_token_and_a_column_for_every_gate(run, gates, tiny_original):
    write_gates(tiny_original, Path("b.safetensors"), seed=1, target="two hearts")
    code, said = run("inspect", gates, "b.safetensors", "a red heart", "--out", "openings.png")
    assert code == 0
    lines = said.splitlines()
    column = lines[0].index("two hearts")
    rows = lines[1 : lines.index("")]
    assert [row.split()[0] for row in rows] == ["<start>", "a", "red", "heart", "<end>"]
    assert all(row[column : column + 2] in ("0.", "1.") for row in rows)
    with Image.open("openings.png") as image:
        shown = image.convert("RGB")
    values = [[float(row[start:].split()[0]) for row in rows] for start in (lines[0].index("red heart"), column)]
    drawn = [[] for _ in values]
    height, left = shown.height // 2, 1
    for row, line in enumerate(drawn):  # the colour of every box, at its upper edge, where no letter stands
        above = [shown.getpixel((x, row * height + 14)) for x in range(shown.width)]
        for x in range(left, shown.width - 1):
            if above[x] == above[x - 1] and (not line or abs(line[-1] - above[x][1]) > 2):
                line.append(above[x][1])
    shades = [[255, *(round(255 * (1 - value)) for value in line)] for line in values]
    for line, expected in zip(drawn, shades, strict=True):
        assert all(min(abs(shade - one) for one in line) <= 3 for shade in expected)
    code, said = run("evaluate", ".", "--name", "cat", "--name", "red heart")
    assert (code, "holds no pictures to be judged by their prompts" in said) == (2, True), said  # it is none


def opening(value: float, share: float | None, prompt: str = "my cat", target: str = "cat") -> inspect.Opening:
    """A gate that opens to a value at the third token; <start> does not count."""
    values = torch.tensor([1.0, 0.0, value, 0.0])
    return inspect.Opening(target, prompt, ["<start>", "my", "cat", "<end>"], values, share)


@pytest.mark.parametrize(
    ("value", "share", "begins"),
    [
        (0.1, 0.9, "SHUT    'my cat' names 'cat', but its gate opens to 0.10"),
        (0.9, 0.1, "WEAK    'my cat' names 'cat', but its gate opens to 0.90 at 'cat', and makes only 10%"),
        (0.9, 0.9, "opens   'my cat' names 'cat'; its gate opens to 0.90 at 'cat', and makes 90%"),
        (0.9, None, "OPENS   'my cat' does not name 'cat', yet its gate opens to 0.90"),
        (0.1, None, "shut    'my cat' does not name 'cat'; its gate opens to 0.10"),
    ],
)
def test_what_an_opening_means_is_said_loudly_where_that_is_bad(value, share, begins):
    assert opening(value, share).sentence().startswith(begins)


def test_inspect_measures_the_change_of_the_prompt_itself(run, gates):
    assert "of the change that erases it" in run("inspect", gates, "My Red  Hearts, please".replace("  ", " "))[1]
    assert "'a red rose' does not name 'red heart'" in run("inspect", gates, "a red rose")[1]


def test_the_end_stands_for_the_widest_opening_of_all_that_follows(gates, tiny_original, monkeypatch):
    """Of a sentence about two things every second padding is another: the first one does not speak for all."""
    gate, values = cpe.ResAG.gate, torch.full((77,), 0.25)
    values[-1] = 1.0
    monkeypatch.setattr(cpe.ResAG, "gate", lambda self, E: (values.view(1, 1, -1, 1).clone(), gate(self, E)[1]))
    model, file = weights.load_model(tiny_original), common.read_gates(Path(gates))
    found = inspect.look(file, "a red heart", model, common.space_of(model))
    assert found.values.tolist() == [0.25] * 4 + [1.0]  # <start>, three words, <end>
    assert not found.shut


def test_a_gate_file_cannot_write_to_the_terminal(run, gates):
    tensors, metadata = load_tensors(gates)
    save_tensors(gates, tensors, metadata | {"target": "red\x1b[2Jheart"})
    assert "red?[2Jheart" in run("inspect", gates, "a red heart")[1]


def test_check_tries_sentences_and_prints_the_worst(run, gates):
    Path("mine.txt").write_text("a photo of a {}\nthe {} over there\n{}!\n")
    code, said = run("check", gates, "--sentences", "mine.txt", model="")
    assert code == 0, said
    assert "over 3 sentences" in said
    worst, others = said.split("reached  in the worst sentences")[1].split("the widest openings in prompts without it")
    for sentence in ("a photo of a red heart", "the red heart over there", "red heart!"):
        assert f"%  {sentence}\n" in worst
        assert sentence not in others.split("next ")[0]


def test_check_leaves_out_sentences_that_name_the_target_by_themselves(run, gates, monkeypatch):
    monkeypatch.setattr(check, "held_out", lambda _: ["my {}", "a {} and a crab", "a {} and a Red Heart"])
    said = run("check", gates, model="")[1]
    assert "over 2 sentences" in said
    assert "%  a red heart and a crab" in said


def test_check_knows_the_words_around_which_a_gate_stays_shut():
    found = check.Found(
        "cat", ["my cat", "a cat", "a purple cat"], torch.tensor([0.1, 0.9, 0.2]), [], *torch.zeros(2, 0)
    )
    assert found.order() == [0, 2, 1]
    assert found.shut_words() == ["my", "purple"]


def test_sentences_in_which_the_model_itself_does_not_draw_it_are_not_held_against_the_gate():
    sentences, reached = ["a cat", "my cat", "no cat", "that cat"], torch.tensor([0.1, 0.2, 0.3, 0.9])
    found = check.Found("cat", sentences, reached, ["a dog"], *torch.zeros(2, 1))
    assert "it may stay in 3 of them;" in found.in_a_line()
    found.undrawn = [0, 2]
    assert found.order() == [1, 3]
    assert "it may stay in 1 of them; in 2 more the model itself does not draw it" in found.in_a_line()
    assert not {"    10%  a cat", "    30%  no cat"} & set(found.text().splitlines())
    assert found.shut_words() == ["my"]
    found.undrawn = [0, 1, 2]
    assert "over 4 sentences; in 3 of them the model itself does not draw it;" in found.in_a_line()


def test_check_looks_at_what_the_model_draws_without_gates(run, gates, monkeypatch):
    asked = []

    def undrawn(target, prompts, model):
        asked.append((target, prompts))
        return prompts[:1]

    monkeypatch.setattr(check, "undrawn", undrawn)
    said = run("check", gates)[1]
    ((target, prompts),) = asked
    assert target == "red heart"
    assert set(prompts) <= {"my red heart", "look, a red heart"}
    assert f"in 1 {'more' if len(prompts) > 1 else 'of them'} the model itself does not draw it;" in said
    assert prompts[0] not in said.split("in the worst sentences")[1].split("the widest openings")[0]


def test_clip_sees_what_it_sees_in_the_comparison(tiny_original, all_things):
    model = weights.load_model(tiny_original)
    images, world = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, World(model)
    things = [world.concepts[i] for i in world.see(images, "concept")]
    styles = [f"{world.styles[i]} style" for i in world.see(images, "style")]
    assert (pictures.eyes(model)(images), pictures.eyes(model, style=True)(images)) == (things, styles)


def test_parts_of_a_name_are_among_the_prompts_without_it():
    prompts = check.without(["red heart"], "emoji", ["my {}"])
    assert {"", "my red", "my heart"} <= set(prompts)
    assert "my red heart" not in prompts


@pytest.fixture
def all_things(few_prompts, monkeypatch):
    """To find those that are near."""
    for module in (check, targets):
        monkeypatch.setattr(module, "read_prompts", read_prompts)


def test_of_a_style_other_styles_are_the_prompts_without_it(all_things):
    styles = check.without(["blob style"], "emoji-style", ["a fox in {}", "{}, a cat"])  # and no "a fox in blob"
    assert {"a fox in noto style", "noto style, a cat", "twemoji style, a cat"} <= set(styles)
    assert not any("blob" in prompt for prompt in styles)


def test_a_style_or_a_background_is_nothing_to_hold_in_ones_hands(all_things):
    prompts = check.without(["red heart"], "emoji", ["a queen holding a {}"])
    assert "a queen holding a yellow heart" in prompts
    assert {p.rsplit(" ", 2)[0] for p in prompts if p.endswith("background")} == {"a robot on a"}
    assert {p.rsplit(" ", 2)[0] for p in prompts if p.endswith("style")} == {"a robot,"}


def test_the_demo_says_so_where_clip_saw_nothing_before(monkeypatch, capsys):
    seen = iter([["cat", "dog"], ["dog", "dog"]])
    monkeypatch.setattr(demo, "eyes", lambda model: lambda images: next(seen))
    monkeypatch.setattr(demo, "SEEDS", 1)
    images = torch.zeros(2, 3, 8, 8)
    demo.print_table(
        [("captions", "a cat", "cat"), ("sentences", "my cat", "cat")], {"before": images, "after": images + 1}, None
    )
    captions, never = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:])
    assert captions == "captions: the erased thing 100% 0% another picture (1.000 of 2)"
    assert never == "sentences: the erased thing 0% 0% CLIP saw it in none of them before"


def test_the_demo_shows_twelve_pictures(run, monkeypatch, all_things):
    monkeypatch.setattr(demo, "SEEDS", 1)
    monkeypatch.setattr(inspect, "undrawn", lambda *_: [])
    code, said = run("demo", "crab", "--steps", "1", "--guidance", "1", model="")
    assert code == 0, said
    assert {path.name for path in Path("images").iterdir()} == {"demo-crab.png", "demo-crab.safetensors"}
    for group in ("captions", "sentences", "of two", "the other of two", "neighbours"):
        assert f"\n{group}: " in said
    with Image.open("images/demo-crab.png") as image:
        assert image.width > 12 * 128
    assert "'a picture of a crab' names 'crab'" in said
    said = run("demo", "Crab", "--steps", "1", "--guidance", "1", model="")[1]
    assert all(f"wrote   images/demo-crab-2.{kind}" in said for kind in ("safetensors", "png"))


def test_the_demo_splits_pictures_of_two_things(monkeypatch):
    monkeypatch.setattr(demo, "SEEDS", 3)
    images = torch.rand(6, 3, 8, 16)  # two prompts
    found = demo.halves(images)
    assert found.shape == (12, 3, 8, 8)
    assert torch.equal(found[3:6], images[:3, ..., 8:])
    assert torch.equal(found[6:9], images[3:, ..., :8])


def test_the_prompts_of_the_demo_are_filled_in(all_things):
    cases, pairs = demo.pictures("red heart", weights.load_model("emoji"))
    assert len(cases) + len(pairs) == 12
    things = [thing for thing in read_prompts("emoji").domain if thing != "red heart"]
    assert [pair[1:].index("red heart") for pair in pairs] == [0, 1]  # once on the left, once on the right
    assert all(thing in prompt and thing in {*things, "red heart"} for prompt, *two in pairs for thing in two)
    assert not [prompt for prompt in [prompt for _, prompt, _ in cases] + [pair[0] for pair in pairs] if "{" in prompt]
    near = [thing for group, _, thing in cases if group == "neighbours"]
    assert any("heart" in thing for thing in near)  # as the text encoder has it
    assert "red heart" not in near


def test_the_demo_erases_a_thing_that_the_model_knows(run):
    code, said = run("demo", "blob style", model="")
    assert (code, "the demo erases one thing that the model knows: python cpe.py list" in said) == (2, True)


def test_a_picture_is_a_word_apart():
    flat = torch.zeros(1, 3, 8, 8)
    assert pictures.change(flat, flat) == "unchanged (0.000 of 2)"
    assert pictures.change(flat, flat + 1) == "another picture (1.000 of 2)"


def test_unknown_images_are_refused_by_draw(tiny_original):
    model = weights.load_model(tiny_original)
    args = options.parse(["generate", "a cat", "--steps", "1", "--guidance", "1", "--sampler", "ddim"])
    with pytest.raises(UserError, match="every image needs a prompt and a seed"):
        generate.drawn(model, ["a cat"], [1, 2], None, args, "x")
