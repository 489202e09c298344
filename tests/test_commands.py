"""The command line: what it writes, how it ends, and what it says when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ROOT

import commands
import cpe
import weights

TRAIN = ("train", "--target", "red heart", "--preset", "emoji", "--steps-scale", "0.02")


def test_train_writes_one_gate_file_and_says_what_is_next(run, tmp_path):
    code, said = run(*TRAIN, "--json", "figures.json")
    assert code == 0
    assert "wrote   gates/red-heart.safetensors" in said
    assert "python cpe.py generate" in said
    assert [p.name for p in (tmp_path / "gates").iterdir()] == ["red-heart.safetensors"]
    tensors, metadata = weights.load_tensors("gates/red-heart.safetensors")
    assert metadata["prompts"] == "red heart"
    assert metadata["rank"] == "4"
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


def test_gates_change_the_image(run):
    run(*TRAIN, "--steps-scale", "0.2")
    code, _ = run(
        "generate", "red heart", "--gates", "gates/red-heart.safetensors", "--before-after", "--steps", "4",
        "--json", "figures.json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(Path("figures.json").read_text())["change"][0] > 0


def test_inspect_prints_a_gate_value_for_every_token(run):
    run(*TRAIN)
    code, said = run("inspect", "gates/red-heart.safetensors", "--prompt", "a red heart", "--json", "figures.json")
    assert code == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["targets"] == ["red heart"]
    assert len(figures["gates"][0]) == len(figures["tokens"])
    assert all(token in said for token in figures["tokens"])
    assert all(0 < value < 1 for value in figures["gates"][0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--target", "  "), "empty"),
        (("train", "--target", "…"), "empty"),
        (("train", "--target", "An  Object", "--preset", "object"), "surrogate"),
        (("train", "--target", "x", "--model", "nowhere"), "there is no model"),
        (("train", "--target", "x", "--model", "model.ckpt"), "pickle"),
        (("train", "--target", "Brad Pitt", "--model", "emoji"), "never seen"),
        (("train", "--target", "x", "--out", "/dev/null/x.safetensors"), "could not be written"),
        (("generate", "x", "--gates", "none.safetensors"), "does not exist"),
        (("generate", "x", "--before-after"), "--gates"),
        (("generate", "x", "--gates", "gate.pt"), "pickle"),
        (("generate", "x", "--gates", "other.safetensors"), "not a gate file"),
        (("generate", "x", "--gates", "wide.safetensors"), "another model"),
    ],
)
def test_what_the_user_can_mend_ends_with_a_sentence_and_exit_code_2(run, tmp_path, arguments, words):
    (tmp_path / "model.ckpt").write_bytes(b"")
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


@pytest.mark.parametrize("command", [["generate", "a cat"], ["demo"], ["compare"]])
def test_pictures_are_png_and_that_is_said_before_any_work(command, capsys):
    assert commands.main([*command, "--out", "x.jpg"]) == 2
    assert "a name that ends in .png" in capsys.readouterr().err
