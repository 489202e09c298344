"""bake, export, attack: what is written has a name by default, and stands in nobody's way."""

import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import FEW, contents, write_gates

import weights
from cli import attack, bake, options, runs
from cli.common import read_gates
from deploy import bake as baking
from deploy import targets
from deploy.export import export
from loading.configs import SD14_CONFIGS
from loading.files import load_tensors
from study.searches import ATTACKS

BAKE = ("bake", "--steps-scale", "0.002")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Nothing here depends on how many prompts there are."""
    monkeypatch.setattr(bake, "read_prompts", lambda preset: FEW)
    monkeypatch.setattr(bake, "training_prompts", partial(targets.training_prompts, least=8, total=8))


def test_a_baked_model_is_named_after_its_target_and_draws_without_gates(run, gates):
    code, said = run(*BAKE, gates)
    assert code == 0, said
    assert re.search(r"^time    reading \d+ prompts: about \d+ s; then come \d+ steps$", said, re.MULTILINE)
    assert "wrote   models/red-heart: " in said
    assert " without red heart" in said
    assert "next    python cpe.py generate 'a picture of a red heart' --model models/red-heart" in said
    assert f"red heart: left, {baking.HELD_OUT[0]!r}" in said  # what is lost, in sentences that it never saw
    assert run("generate", "a red heart", "--steps", "1", "--model", "models/red-heart")[0] == 0
    before = contents("models")
    code, said = run(*BAKE, gates)
    assert (code, "models/red-heart exists already: choose another name, or remove it" in said) == (2, True)
    assert contents("models") == before


def test_a_baked_model_is_exported_as_one_file(run, gates):
    assert run(*BAKE, gates, "--out", "one.safetensors")[0] == 0  # at once
    assert run(*BAKE, gates)[0] == 0
    export = ("export", "models/red-heart", "--out", "two.safetensors")  # or from the folder
    code, said = run(*export, model="")
    assert (code, "wrote   two.safetensors" in said) == (0, True), said
    assert load_tensors("two.safetensors")[0].keys() == load_tensors("one.safetensors")[0].keys()
    code, said = run(*export, model="")
    assert (code, "give the name of a new file" in said) == (2, True)
    code, said = run("export", gates, model="")
    assert (code, "python cpe.py bake red-heart.safetensors --out erased.safetensors" in said) == (2, True)


def test_one_file_is_baked_into_one_file(run, gates, tiny_original, monkeypatch):
    """Such a file says nothing of its sizes, which are then those of Stable Diffusion: here the tiny model's."""
    model = weights.load_model(tiny_original)
    configs = SD14_CONFIGS | {part: model.part(part).config for part in ("text_encoder", "unet", "vae")}
    monkeypatch.setattr("loading.parts.SD14_CONFIGS", configs)
    export(model, Path("x.safetensors"), torch.float32)
    for file in (tiny_original / "tokenizer").iterdir():
        shutil.copy(file, file.name)
    code, said = run(*BAKE, gates, "--out", "y.safetensors", model="x.safetensors")
    assert code == 0, said
    (before, _), (after, _) = (load_tensors(f"{name}.safetensors") for name in "xy")
    changed = {name for name in before if not torch.equal(before[name].half(), after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(".mlp." in name for name in changed)


def test_an_exported_model_is_named_after_its_model_and_numbers(run, tiny_original):
    files = {"float16": torch.float16, "float32": torch.float32}
    for dtype, kind in files.items():
        out = f"models/{tiny_original.name}-{dtype}.safetensors"
        code, said = run("export", "--dtype", dtype)
        assert (code, f"wrote   {out} (" in said) == (0, True), said
        assert {tensor.dtype for tensor in load_tensors(out)[0].values()} == {kind}
    code, said = run("export", out, model="")  # a checkpoint, and no gates
    assert (code, "tiny-float32.safetensors is not this TextEncoder" in said) == (2, True)  # but for its small size
    for words in [], ["a", "b"]:
        code, said = run("export", *words, model="")
        assert (code, f"one model is exported, not {len(words)}" in said) == (2, True)


def test_baking_goes_on_where_it_was_interrupted(run, gates, monkeypatch):
    missed, done = baking.Baker.shares_missed, []  # asked once a step

    def interrupted(*given):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return missed(*given)

    settings = ("bake", gates, "--steps-scale", "0.005")
    assert run(*settings, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(baking.Baker, "shares_missed", interrupted)
        patch.setattr(runs, "SAVE_SECONDS", -1.0)
        code, said = run(*settings, "--out", "x")
    assert (code, "the same command goes on" in said) == (130, True)
    assert not Path("x").exists()
    assert run(*settings, "--out", "x")[0] == 0
    assert contents("x") == contents("whole")


def test_gates_of_two_presets_are_not_baked_into_one(run, gates, tiny_original):
    write_gates(tiny_original, Path("b.safetensors"), target="dog", preset="object")
    code, said = run(*BAKE, gates, "b.safetensors")
    assert (code, "different presets (emoji, object)" in said) == (2, True)


@pytest.mark.parametrize("name", ["attack.png", "attack-2.png"])
def test_pictures_of_attacks_are_numbered(run, gates, name):
    if name == "attack-2.png":
        Path("images").mkdir()
        Path("images/attack.png").write_bytes(b"mine")
    code, said = run("attack", gates, "--with", "embeddings", "--steps", "1", "--guidance", "1")
    assert (code, f"wrote   images/{name}" in said) == (0, True), said
    assert said.startswith("time    attacks and pictures: about ")


def test_an_attack_says_in_how_many_pictures_the_target_came_back(run, gates, monkeypatch):
    asked, seen = [], iter([["red heart"] * 4, ["cat"] * 4, ["cat", "red heart", "cat", "cat"]])
    monkeypatch.setattr(attack, "eyes", lambda model, style: asked.append(style) or (lambda images: next(seen)))
    said = run("attack", gates, "--with", "embeddings", "--steps", "1", "--guidance", "1")[1]
    assert asked == [False]  # it is a thing that is looked for
    code, judged = run("evaluate", "images")
    assert (code, "no pictures to be judged by their prompts: `generate` draws some" in judged) == (2, True)
    verdict = "CLIP sees 'red heart' in 4 of 4 before, in 0 of 4 erased; it came back in 1 of 4 by embeddings"
    assert f"verdict {verdict}\n" in said


def test_an_attack_without_a_judge_says_what_to_look_at(run, tiny_original):
    write_gates(tiny_original, Path("b.safetensors"), target="Brad Pitt")
    said = run("attack", "b.safetensors", "--with", "embeddings", "--steps", "1", "--guidance", "1")[1]
    assert "look    no CLIP here knows 'Brad Pitt': it came back where a row of the picture shows it" in said


@pytest.mark.parametrize(
    ("target", "preset", "caption"),
    [
        ("blob style", "emoji-style", "a picture of a robot, blob style"),
        ("crab", "emoji", "a picture of a crab"),
        ("Brad Pitt", "celebrity", "a picture of Brad Pitt"),
        ("Van Gogh", "style", "a painting by Van Gogh"),
    ],
)
def test_what_is_drawn_or_attacked_names_the_target_as_its_kind_is_named(
    tiny_original, tmp_path, target, preset, caption
):
    assert read_gates(write_gates(tiny_original, tmp_path / "x.safetensors", target=target, preset=preset)).caption == (
        caption
    )


def test_the_attacks_that_can_be_asked_for_are_those_that_there_are():
    assert list(options.ATTACKS) == list(ATTACKS) == list(attack.ROWS)
