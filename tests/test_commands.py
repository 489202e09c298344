"""The command line: what it writes, how it ends, and what it says when something is wrong."""

import json
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ROOT

import commands
import old_cpe as cpe
import unet
import weights
from loading import files

TRAIN = ("train", "--target", "red heart", "--preset", "emoji", "--steps-scale", "0.02")


def test_train_writes_one_gate_file_and_says_what_is_next(run, tmp_path, tiny_original):
    code, said = run(*TRAIN, "--json", "figures.json")
    assert code == 0
    assert "wrote   gates/red-heart.safetensors" in said
    assert "python cpe.py generate" in said
    assert [p.name for p in (tmp_path / "gates").iterdir()] == ["red-heart.safetensors"]
    tensors, metadata = files.load_tensors("gates/red-heart.safetensors")
    recipe = cpe.PRESETS["emoji"]
    expected = {"prompts": "red heart", "rank": "4", "alpha": "1.0", "version": "2", "target": "red heart"}
    expected |= {"surrogate": recipe.surrogate, "eta": str(recipe.eta), "lam": str(recipe.lam), "seed": "0"}
    assert expected.items() <= metadata.items()
    assert metadata["fingerprint"] == weights.load_model(tiny_original).fingerprint
    assert cpe.from_tensors(tensors).concepts == 1
    figures = json.loads(Path("figures.json").read_text())
    assert set(figures["losses"]) == {"erase", "adv", "anchor", "attack"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(run):
    files = []
    for i, seed in enumerate((1, 1, 2)):
        run(*TRAIN, "--seed", str(seed), "--out", f"{i}.safetensors")
        files.append(load_file(f"{i}.safetensors"))
    key = cpe.KEYS["w_qs"]
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])
    assert not torch.equal(files[0][key], files[2][key])


def test_a_finished_gate_file_is_kept(run, monkeypatch):
    assert run(*TRAIN)[0] == 0
    before = Path("gates/red-heart.safetensors").read_bytes()
    monkeypatch.setattr(commands, "build_trainer", lambda *_: pytest.fail("trained"))
    code, said = run(*TRAIN, "--json", "figures.json")
    assert code == 0
    assert "kept    gates/red-heart.safetensors: already finished" in said
    assert "next    python cpe.py generate" in said
    assert json.loads(Path("figures.json").read_text())["kept"]
    assert Path("gates/red-heart.safetensors").read_bytes() == before


def test_a_gate_file_of_other_settings_is_not_replaced(run):
    assert run(*TRAIN)[0] == 0
    before = Path("gates/red-heart.safetensors").read_bytes()
    for other, names in (
        (("--seed", "1"), "seed"),
        (("--alias", "love"), "aliases"),
        (("--steps-scale", "0.03"), "steps"),
        (("--preset", "object"), "preset, prompts or layers, surrogate"),
    ):
        code, said = run(*TRAIN, *other)
        assert code == 2
        assert f"gates/red-heart.safetensors is there already, trained with other settings ({names})" in said
        assert "choose another --out, or remove it" in said
        assert Path("gates/red-heart.safetensors").read_bytes() == before


@pytest.mark.parametrize("version", [None, "1", "3", "of the authors"])
def test_a_gate_file_of_another_version_can_be_used_but_is_not_finished(run, version):
    run(*TRAIN, "--out", "x.safetensors")
    tensors, metadata = files.load_tensors("x.safetensors")
    del metadata["version"]
    other = metadata | ({"version": version} if version else {})
    files.save_tensors(Path("x.safetensors"), tensors, other)
    code, said = run(*TRAIN, "--out", "x.safetensors")
    assert code == 2
    assert "x.safetensors is there already, trained with other settings (version of cpe.py)" in said
    assert run("generate", "a cat", "--gates", "x.safetensors", "--steps", "1")[0] == 0
    assert run("inspect", "--gates", "x.safetensors", "--prompt", "a red heart")[0] == 0
    bake = ("bake", "--gates", "x.safetensors", "--out", "baked", "--preset", "emoji", "--images", "0")
    assert run(*bake, "--steps-scale", "0.002")[0] == 0


def test_resume_refuses_a_state_of_another_version(run, monkeypatch, tiny_original):
    args = commands.parser().parse_args([*TRAIN, "--model", str(tiny_original)])
    settings = commands.Training(args).settings(["red heart"])
    before = settings | {"version": settings["version"] - 1}
    files.save_tensors(Path("x.state.safetensors"), {"a": torch.zeros(1)}, {"run": commands.run_name(before)})
    code, said = run(*TRAIN, "--out", "x.safetensors", "--resume")
    assert code == 2
    assert "x.state.safetensors is of a run with other settings, or of another version of cpe.py" in said


def test_a_file_that_is_no_gate_file_is_not_replaced(run):
    Path("notes.safetensors").write_text("mine")
    code, said = run(*TRAIN, "--out", "notes.safetensors")
    assert code == 2
    assert "notes.safetensors is there already, no finished gate file: choose another --out, or remove it." in said
    assert Path("notes.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["gates", "notes.txt", "x.state.safetensors", "x.png"])
def test_a_gate_file_has_a_name_of_one(run, name):
    code, said = run(*TRAIN, "--out", name)
    assert code == 2
    assert "give a name that ends in .safetensors, and not in .state.safetensors" in said


def test_the_demo_replaces_its_own_gates_and_no_others(run, monkeypatch):
    out = Path("demo.safetensors")
    monkeypatch.setattr(commands, "build_trainer", lambda *_: SimpleNamespace(steps=list))
    monkeypatch.setattr(commands, "watch", lambda *_: None)
    monkeypatch.setattr(commands, "write_gates", lambda run, settings, out, replace: {"out": out})
    args = commands.parser().parse_args(["demo"])
    for metadata in ({}, {"target": "dog face"}):
        files.save_tensors(out, {}, metadata)
        with pytest.raises(files.UserError, match=r"demo.safetensors is there already, and of no demo"):
            commands.train_demo(args, out)
    files.save_tensors(out, {}, {"target": "dog face", "demo": "true"})
    assert commands.train_demo(args, out) == {"out": out}


def test_a_state_is_replaced_by_no_other_run(run):
    files.save_tensors("gates/red-heart.state.safetensors", {}, {"run": "hours of work"})
    before = Path("gates/red-heart.state.safetensors").read_bytes()
    code, said = run(*TRAIN)
    assert code == 2
    assert "gates/red-heart.state.safetensors is of an unfinished run: go on with it" in said
    assert Path("gates/red-heart.state.safetensors").read_bytes() == before


def test_a_state_that_another_run_has_saved_meanwhile_is_not_replaced(run, monkeypatch):
    monkeypatch.setattr(commands, "CHECKPOINT_SECONDS", -1.0)
    state, steps = Path("gates/red-heart.state.safetensors"), cpe.Trainer.steps

    def slowly(trainer: cpe.Trainer) -> Iterator[cpe.Progress]:
        files.save_tensors(state, {}, {"run": "hours of work"})
        yield from steps(trainer)

    monkeypatch.setattr(cpe.Trainer, "steps", slowly)
    code, said = run(*TRAIN)
    assert code == 2
    assert "state.safetensors is of a run with other settings" in said
    assert files.load_tensors(state)[1]["run"] == "hours of work"


def test_gates_that_another_run_has_written_meanwhile_are_not_replaced(run, monkeypatch):
    build = commands.build_trainer

    def slowly(*arguments: object) -> cpe.Trainer:
        files.save_tensors("gates/red-heart.safetensors", {}, {"target": "red heart", "seed": "7"})
        return build(*arguments)

    monkeypatch.setattr(commands, "build_trainer", slowly)
    code, said = run(*TRAIN)
    assert code == 2
    assert "gates/red-heart.safetensors is there already, trained with other settings" in said
    assert files.load_tensors("gates/red-heart.safetensors")[1]["seed"] == "7"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "g.safetensors", "--prompt", "x", "--json", "g.safetensors"), "text under the name of something"),
        (("inspect", "g", "--prompt", "x", "--json", "g"), "--json: g is read or written by this command already"),
        (("generate", "--prompts", "lines", "--json", "./lines"), "--json: lines is read or written by this command"),
        (("compare", "--markdown", "x.md", "--json", "x.md"), "--json: x.md is read or written by this command"),
        (("bake", "--gates", "g", "--out", "d", "--json", "d"), "--json: d is read or written by this command"),
        (("inspect", "g", "--prompt", "x", "--model", "m", "--json", "m/config.json"), "and no file of this command"),
        (("inspect", "--prompt", "x"), "which gates? Give one gate file or more"),
        (("inspect", "g", "--prompt", "x", "--json", "notes"), "notes is there already, and no file of this command"),
        (("inspect", "g", "--prompt", "x", "--json", "five"), "five is there already, and no file of this command"),
        (("compare", "--quick", "--markdown", "notes"), "notes is there already, and no file of this command"),
        (("generate", "a cat", "g.safetensors", "--gates", "g"), "'g.safetensors' looks like a gate file: say --gates"),
        (("generate", "a cat", "--zone", "0.5"), "--zone is of gates: give at least one"),
    ],
)
def test_no_output_replaces_another_or_what_is_read(run, arguments, words):
    Path("m").mkdir()
    for name in ("g.safetensors", "g", "lines", "notes", "m/config.json"):
        Path(name).write_text("mine")
    Path("five").write_text("5")
    code, said = run(*arguments)
    assert code == 2
    assert words in said
    assert Path("five").read_text() == "5"
    assert all(Path(name).read_text() == "mine" for name in ("g.safetensors", "g", "lines", "notes", "m/config.json"))


def test_a_dead_zone_shuts_gates_that_are_not_open_so_far(run):
    assert run(*TRAIN)[0] == 0
    tensors, metadata = files.load_tensors("gates/red-heart.safetensors")
    scaler = tensors[cpe.KEYS["scaler"]]
    files.save_tensors("x.safetensors", tensors | {cpe.KEYS["scaler"]: 0.01 * scaler}, metadata)  # half open
    values, change = {}, {}
    for zone in ("0", "0.25"):
        shown = ("inspect", "x.safetensors", "--prompt", "a red heart")
        drawn = ("generate", "a red heart", "--gates", "x.safetensors", "--before-after", "--steps", "2")
        for call in (shown, drawn):
            assert run(*call, "--zone", zone, "--json", f"{call[0]}.json")[0] == 0
        values[zone] = torch.tensor(json.loads(Path("inspect.json").read_text())["gates"][0])
        (change[zone],) = json.loads(Path("generate.json").read_text())["change"]
    torch.testing.assert_close(values["0.25"], (values["0"] - 0.25).clamp(min=0) / 0.75)
    assert 0 < change["0.25"] < change["0"]


@pytest.mark.parametrize("words", [["generate", "a cat"], ["generate", "--prompts", "lines"], ["demo"]])
def test_steps_that_cannot_be_drawn_are_said_before_a_model_is_opened(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "open_model", None)
    Path("lines").write_text("a picture of a cat\n")
    assert commands.main([*words, "--sampler", "ddim", "--steps", "600"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cpe.py: --steps: ddim takes up to 500 steps or 1000")
    assert said.count("\n") == 1


def test_compare_takes_no_target_that_is_the_surrogate(run):
    code, said = run("compare", "--target", "cloud")
    assert code == 2
    assert "'cloud' is what targets of --preset emoji become" in said


def test_a_gate_file_that_claims_more_than_any_holds_is_refused_before_it_is_read(run, monkeypatch):
    save_file({"a": torch.zeros(11)}, "large.safetensors")
    monkeypatch.setattr(commands, "LARGEST_GATES", 10)
    monkeypatch.setattr(files, "load_tensors", None)
    code, said = run("generate", "a cat", "--gates", "large.safetensors")
    assert code == 2
    assert "large.safetensors has 11 numbers: that is no gate file" in said


@pytest.mark.parametrize(("share", "warns"), [(0.6, False), (0.4, True), (0.04, True), (-0.1, True)])
def test_gates_that_hardly_change_their_target_are_a_warning(run, monkeypatch, share, warns):
    monkeypatch.setattr(cpe, "reached", lambda *_: share)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run(*TRAIN, "--json", "figures.json")[0] == 0
    words = f"the gates make only {max(share, 0):.0%} of the change that erases 'red heart'"
    assert [words in str(each.message) for each in said] == [True] * warns
    assert all("`train` can take more steps" in str(each.message) for each in said)  # `demo`, which warns too, cannot
    assert json.loads(Path("figures.json").read_text())["reached"] == share


def test_a_context_gate_is_saved_as_gates_of_every_layer(run):
    code, _ = run(*TRAIN, "--gate", "context")
    assert code == 0
    gates = cpe.from_tensors(load_file("gates/red-heart.safetensors"))
    assert len(gates.names) == len(gates.widths) == 8


def test_generate_with_untrained_corrections_changes_nothing(run, tiny):
    objective = cpe.Objective(weights.load_model(tiny).cross_attention())
    gates = objective.new_gates("resag", 4, 1, torch.Generator().manual_seed(0))
    save_file(cpe.to_tensors(gates), "zero.safetensors")
    code, said = run("generate", "a cat", "a dog", "--gates", "zero.safetensors", "--before-after", "--steps", "2")
    assert code == 0
    assert said.count("change  0.0000") == 2
    with Image.open("images/generated.png") as image:
        assert image.size == (2 * 8, 2 * 8)


def test_an_image_depends_on_its_own_prompt_and_seed_alone(tiny):
    model = weights.load_model(tiny)
    *_, both = cpe.denoise(model, ["a cat", "a dog"], [3, 4], steps=3)
    *_, alone = cpe.denoise(model, ["a dog"], [4], steps=3)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prompts", "seeds"), [(["a cat"], [3, 4]), (["a cat", "a dog"], [3])])
def test_an_image_without_a_prompt_or_a_seed_is_no_image(tiny_original, prompts, seeds):
    model = weights.load_model(tiny_original)
    with pytest.raises(ValueError, match="every image needs a prompt and a seed"):
        list(cpe.denoise(model, prompts, seeds, steps=1))


def test_gates_change_the_image(run):
    run(*TRAIN, "--steps-scale", "0.2")
    code, _ = run(
        "generate", "red heart", "--gates", "gates/red-heart.safetensors", "--before-after", "--steps", "4",
        "--json", "figures.json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(Path("figures.json").read_text())["change"][0] > 0


def test_gates_of_another_text_encoder_are_used_with_a_warning(run, tiny):
    run(*TRAIN)
    draw = ("generate", "a cat", "--gates", "gates/red-heart.safetensors", "--steps", "1")
    with warnings.catch_warnings(record=True) as said:
        assert run(*draw)[0] == 0
    assert not said
    path = tiny / "text_encoder" / "model.safetensors"
    tensors, metadata = files.load_tensors(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, path, metadata)
    with pytest.warns(UserWarning, match="gates/red-heart.safetensors was trained for another model"):
        assert run(*draw, "--model", str(tiny))[0] == 0


def test_the_next_command_can_be_copied_into_a_shell(run):
    for prompt in ('say "hi" $HOME', "it's"):
        run(*TRAIN, "--out", "g 0.safetensors")
        said = run("generate", prompt, "--gates", "g 0.safetensors", "--steps", "1")[1]
        assert shlex.split(said.split("next ")[1])[2:6] == ["inspect", "g 0.safetensors", "--prompt", prompt]
    run(*TRAIN[:1], "--target", "dog face", *TRAIN[3:])
    both = ("g 0.safetensors", "gates/dog-face.safetensors")
    said = run("generate", "a cat", "--gates", both[0], "--gates", both[1], "--zone", "0.5", "--steps", "1")[1]
    following = shlex.split(said.split("next ")[1].split("\n")[0])[2:]
    assert following[:7] == ["inspect", *both, "--prompt", "a cat", "--zone", "0.5"]
    assert run(*following)[0] == 0


@pytest.mark.parametrize(
    ("model", "erased"), [("emoji", False), ("sd14", False), ("model.safetensors", False), ("tiny", True)]
)
def test_erasing_is_next_unless_the_model_may_have_been_baked(tiny, monkeypatch, model, erased):
    monkeypatch.chdir(tiny.parent)
    (tiny.parent / "emoji").mkdir()  # as in a clone
    args = commands.parser().parse_args(["generate", "a cat", "--model", model])
    said = commands.after_drawing(args, "a cat")
    assert said == (None if erased else f"python cpe.py train --target ... --model {model}")


def test_train_never_builds_the_unet(run, monkeypatch):
    real = weights.Part.load

    def load(part: weights.Part, *more):
        assert part.build is not unet.UNet
        return real(part, *more)

    monkeypatch.setattr(weights.Part, "load", load)
    assert run(*TRAIN)[0] == 0


def test_inspect_prints_a_column_for_every_gate(run):
    run(*TRAIN, "--out", "first.safetensors")
    run("train", "--target", "two hearts", *TRAIN[3:], "--out", "second.safetensors")
    said = run("inspect", "first.safetensors", "second.safetensors", "--prompt", "a red heart")[1].splitlines()
    column = said[0].index("two hearts")
    numbers = [line for line in said[1:] if "0." in line and "took" not in line]
    assert len(numbers) == 5
    assert all(line[column : column + 2] == "0." for line in numbers)


def test_what_follows_inspecting_draws_with_all_of_the_gates(run):
    run(*TRAIN, "--out", "first.safetensors")
    run("train", "--target", "two hearts", *TRAIN[3:], "--out", "second.safetensors")
    said = run("inspect", "first.safetensors", "second.safetensors", "--prompt", "a red heart", "--zone", "0.5")[1]
    (following,) = [line for line in said.splitlines() if line.startswith("next ")]
    assert "--gates first.safetensors --gates second.safetensors --zone 0.5 --before-after" in following


def test_a_copy_of_the_embedded_model_is_known_below_the_home_folder(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "emoji/tokenizer", tmp_path / "baked/tokenizer")
    (tmp_path / "baked/unet").mkdir()
    shutil.copy(ROOT / "emoji/unet/config.json", tmp_path / "baked/unet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert commands.is_emoji("~/baked")
    words = json.loads((tmp_path / "baked/tokenizer/vocab.json").read_text())
    for path in (tmp_path / "baked/tokenizer").iterdir():
        path.unlink()
    for said, known in ({"model": {"vocab": words}}, True), ({"model": {}}, False):  # as transformers 5 writes it
        (tmp_path / "baked/tokenizer/tokenizer.json").write_text(json.dumps(said))
        assert commands.is_emoji("~/baked") == known
    assert not commands.is_emoji("~/other")


def test_a_target_that_is_trained_again_is_not_encoded_again(run, monkeypatch):
    run(*TRAIN, "--out", "first.safetensors")
    monkeypatch.setattr(weights.Model, "encode", lambda *_: pytest.fail("encoded"))
    assert run(*TRAIN, "--out", "second.safetensors")[0] == 0
    assert Path("first.safetensors").read_bytes() == Path("second.safetensors").read_bytes()


def test_a_gate_file_cannot_write_to_the_terminal(run):
    run(*TRAIN)
    path = Path("gates/red-heart.safetensors")
    save_file(load_file(path), path, {"target": "red\x1b[2Jheart"})
    assert "red?[2Jheart" in run("inspect", str(path), "--prompt", "a red heart")[1]


def test_the_states_of_training_and_baking_to_one_name_are_two_files():
    states = [commands.state_file(Path(name)) for name in ("out/x.safetensors", "out/x")]
    assert len(set(states)) == 2
    assert all(state.parent == Path("out") and state.suffix == ".safetensors" for state in states)


def test_a_picture_that_claims_to_be_huge_was_drawn_with_nothing(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 50_000, 50_000)  # width and height in the header
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    assert commands.drawn_with(path) == ""


def test_inspect_prints_a_gate_value_for_every_token(run):
    run(*TRAIN)
    code, said = run("inspect", "gates/red-heart.safetensors", "--prompt", "a red heart", "--json", "figures.json")
    assert code == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["targets"] == ["red heart"]
    assert len(figures["gates"][0]) == len(figures["tokens"])
    assert all(token in said for token in figures["tokens"])
    assert all(0 <= value <= 1 for value in figures["gates"][0])  # far from its bend, a sigmoid rounds to these


def test_words_that_the_embedded_model_never_read_are_named_where_gates_are_to_open():
    args = commands.parser().parse_args(["generate", "x", "--model", "emoji", "--gates", "red-heart.safetensors"])
    with pytest.warns(UserWarning, match=r"never taught my, photo: gates may stay shut"):
        commands.warn_of_odd_words(args, ["My red heart", "a photo of a red heart"])
    caption = "a picture of a red heart on a blue background, noto style"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        commands.warn_of_odd_words(args, [caption, "pizza emoji", ""])
        args.gates = []
        commands.warn_of_odd_words(args, ["a photo of a red heart"])
        args.gates, args.model = [Path("brad-pitt.safetensors")], "sd14"
        commands.warn_of_odd_words(args, ["a photo of Brad Pitt"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--target", "  "), "empty"),
        (("train", "--target", "…"), "empty"),
        (("train", "--target", "An  Object", "--preset", "object"), "surrogate"),
        (("train", "--target", "x", "--preset", "object", "--surrogate", " \t"), "the surrogate is empty"),
        (("train", "--target", "x", "--model", "nowhere"), "there is no model nowhere: --model takes"),
        (("train", "--target", "red heart", "--alias", "Brad", "--model", "emoji"), "never seen 'Brad'"),
        (("train", "--target", "red heart", "--preset", "emoji-style", "--model", "emoji"), "leave --preset out"),
        (("train", "--target", "Noto style", "--model", "emoji"), "is a style: give --preset emoji-style"),
        (("train", "--target", "x", "--model", "model.ckpt"), "pickle"),
        (("train", "--target", "Brad Pitt", "--model", "emoji"), "never seen"),
        (("train", "--target", "x", "--out", "/dev/null/x.safetensors"), "--out: /dev/null/x.safetensors could not be"),
        (("generate", "x", "--out", "/dev/null/x.png"), "--out: /dev/null/x.png could not be written"),
        (("generate", "x", "--json", "/dev/null/x.json"), "--json: /dev/null/x.json could not be written"),
        (
            ("compare", "--out", "x.png", "--markdown", "/dev/null/x.md"),
            "--markdown: /dev/null/x.md could not be written",
        ),
        (
            ("generate", "x", "--gates", "none.safetensors"),
            "the gate file none.safetensors does not exist: check its name, or train it first: python cpe.py train",
        ),
        (("generate", "a cat", ""), "the prompt is empty: give some words"),
        (("inspect", "none.safetensors", "--prompt", " \n"), "the prompt is empty"),
        (
            ("generate", "x", "--gates", "wide.safetensors", "--gates", "other/../wide.safetensors"),
            "the gate file other/../wide.safetensors is given twice",
        ),
        (("inspect", "wide.safetensors", "wide.safetensors", "--prompt", "x"), "is given twice"),
        (("generate", "x", "--before-after"), "--gates"),
        (("generate", "x", "--gates", "gate.pt"), "pickle"),
        (("generate", "x", "--gates", "other.safetensors"), "Give a gate file, as `train` writes it."),
        (("generate", "x", "--gates", "wide.safetensors"), "another model"),
    ],
)
def test_what_the_user_can_mend_ends_with_a_sentence_and_exit_code_2(run, tmp_path, arguments, words):
    for name in ("model.ckpt", "gate.pt"):
        (tmp_path / name).write_bytes(b"")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    wide = cpe.ResAG({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 8}, d=32)
    save_file(cpe.to_tensors(wide.initialise(torch.Generator())), "wide.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    code, said = run(*arguments)
    assert code == 2
    assert words in said
    assert "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train", "--target", "x", "--preset", "none"),
        ("train", "--target", "x", "--steps-scale", "-1"),
        ("train", "--target", "x", "--steps-scale", "nan"),
        ("generate", "x", "--steps", "0"),
        ("generate", "x", "--sampler", "euler"),
        ("fly",),
    ],
)
def test_wrong_arguments_end_with_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\0b", "x" * 5000, "..", "Brad  Pitt!", "日本", "😀"])
def test_a_target_cannot_leave_its_folder(name):
    file = commands.slug(name)
    assert file
    assert len(file.encode()) <= 80
    assert not set(file) & set("/\\\0.")


def test_resume_refuses_a_state_of_other_settings(run):
    save_file({"position": torch.zeros(2)}, "x.state.safetensors", {"run": "{}"})
    code, said = run(*TRAIN, "--out", "x.safetensors", "--resume")
    assert code == 2
    assert "other settings" in said


def test_the_embedded_models_preset_ends_with_a_margin(run, monkeypatch, tiny_original):
    directions = []
    monkeypatch.setattr(cpe.Trainer, "sharpen", lambda trainer: directions.append(trainer.data.one))
    assert run(*TRAIN)[0] == 0
    said = weights.load_model(tiny_original).encode(["a cat", "two dogs"]) @ directions[0]
    torch.testing.assert_close(said, torch.ones_like(said), rtol=1e-4, atol=1e-4)
    assert run(*TRAIN, "--preset", "object", "--out", "other.safetensors")[0] == 0
    assert len(directions) == 1


def test_a_run_that_diverged_goes_on_from_its_last_good_state(run, monkeypatch):
    assert run(*TRAIN, "--out", "whole.safetensors")[0] == 0
    update = cpe.Trainer.update

    def diverge(trainer: cpe.Trainer) -> dict[str, float]:
        if trainer.done == 7:
            raise cpe.Diverged("the loss became nan")
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(cpe.Trainer, "update", diverge)
        code, said = run(*TRAIN, "--out", "x.safetensors")
    assert code == 2
    assert "the loss became nan. The last good state is in x.state.safetensors" in said
    assert not Path("x.safetensors").exists()
    assert run(*TRAIN, "--out", "x.safetensors", "--resume")[0] == 0
    assert Path("x.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_a_file_that_cannot_grow_is_named_and_nothing_is_left(run, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))  # as on a full disk
    try:
        code, said = run(*TRAIN, "--out", "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "the disk is full: make room" in said
    assert not list(tmp_path.iterdir())


def test_resume_says_when_there_is_nothing_to_go_on_with(run):
    with pytest.warns(UserWarning, match=r"there is no x.state.safetensors to go on with: this run begins anew"):
        assert run(*TRAIN, "--out", "x.safetensors", "--resume")[0] == 0


def test_an_interruption_before_the_first_step_promises_no_resume(run, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "build_trainer", interrupted)
    code, said = run(*TRAIN, "--out", "x.safetensors")
    assert (code, said.splitlines()[-1]) == (130, "cpe.py: interrupted; nothing half-written is left")


def test_a_demo_that_is_interrupted_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupted(runs, *_):
        commands.save_all(runs)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "watch", interrupted)
    assert commands.main(["demo"]) == 130
    assert "nothing half-written is left" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_help_does_not_import_torch():
    check = "import sys; import commands; commands.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
    done = subprocess.run([sys.executable, "cpe.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "train" in done.stdout


@pytest.mark.parametrize("arguments", [["--model", "emoji"], ["--model", str(ROOT / "emoji"), "--preset", "celebrity"]])
def test_the_embedded_model_refuses_names_it_has_never_seen(arguments, capsys):
    assert commands.main(["train", "--target", "Brad Pitt", *arguments]) == 2
    assert "has never seen 'Brad Pitt'" in capsys.readouterr().err
    assert commands.main(["train", "--target", "red heart", "--surrogate", "a person of note", *arguments]) == 2
    assert "has never seen 'a person of note'" in capsys.readouterr().err


def test_a_copy_of_the_embedded_model_is_known_as_one(tmp_path, capsys):
    shutil.copytree(ROOT / "emoji", tmp_path / "mine", ignore=shutil.ignore_patterns("build"))
    assert commands.main(["train", "--target", "Brad Pitt", "--model", str(tmp_path / "mine")]) == 2
    assert "has never seen 'Brad Pitt'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_erases_its_target_and_keeps_the_others(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert commands.main(["demo", "--json", "figures.json"]) == 0
    groups = json.loads(Path("figures.json").read_text())["groups"]
    assert groups["erased"]["after"] <= 0.05
    for name in ("nearest", "others"):
        assert groups[name]["after"] >= groups[name]["before"] - 0.02


@pytest.mark.parametrize("command", [["generate", "a cat"], ["demo"], ["compare"]])
def test_pictures_are_png_and_that_is_said_before_any_work(command, capsys):
    assert commands.main([*command, "--out", "x.jpg"]) == 2
    assert "a name that ends in .png" in capsys.readouterr().err
