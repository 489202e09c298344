"""README.md: every command of it runs, here on the embedded model and cut short; every file it names is there."""

import importlib
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT, difference, reference, write_gates

import cpe
import sampler
from cli import bake, main
from cli.options import COMMANDS as KNOWN
from weights import load_model, save_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS if re.match(r"(python|make) ", line)]
PYTHON = dedent(re.search(r"^(?: {4}.*\n|\n)+", README.split("## With diffusers\n")[1])[0])
OURS = [shlex.split(line.split("cpe.py ")[1]) for line in COMMANDS if "cpe.py " in line]


def test_every_command_is_one():
    assert {words[0] for words in OURS} >= {"train", "generate", "inspect", "check", "bake"}
    assert {words[0] for words in OURS} <= set(KNOWN)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {line.split()[1] for line in COMMANDS if line.startswith("make ")} <= set(targets)


def test_the_commands_run_one_after_another(tmp_path, monkeypatch, capsys):
    """As a reader types them, from the first to the last; the dog stands in for the person."""
    monkeypatch.chdir(tmp_path)
    read_prompts = bake.read_prompts
    few = {"general": ["house", "tree"], "domain": ["cat", "cloud"]}  # every word costs baking dozens of prompts
    monkeypatch.setattr(bake, "read_prompts", lambda preset: replace(read_prompts(preset), **few))
    monkeypatch.setattr(bake, "training_prompts", partial(bake.training_prompts, least=40, total=40))
    more = {"train": ["--steps-scale", "0.005"], "generate": ["--steps", "2"]}
    more["bake"] = ["--steps-scale", "0.01"]
    for words in OURS:
        command, *rest = (word.replace("Brad Pitt", "dog face").replace("brad-pitt", "dog-face") for word in words)
        model = ["--model", "emoji"] if command == "train" and "--model" not in rest else []
        assert main([command, *rest, *more.get(command, []), *model]) == 0, capsys.readouterr().err
    assert (tmp_path / "models" / "erased" / "text_encoder").is_dir()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_diffusers_draw_what_we_draw(tiny_original, tmp_path, monkeypatch):
    """As they stand, but for a seed; the tiny model is in the place of the embedded one."""
    reference("diffusers")
    monkeypatch.chdir(tmp_path)
    model, prompt = load_model(tiny_original), re.search(r'pipe\("(.+?)"', PYTHON)[1]
    save_model(model.with_unet({}), Path("emoji"))
    gates = cpe.from_tensors(load_file(write_gates(tiny_original, Path("gates/red-heart.safetensors"))))
    exec(PYTHON.replace("pipe(", "torch.manual_seed(0)\npipe("), {})
    with Image.open("erased.png") as image:
        theirs = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    ours, plain = (sampler.draw(model, [prompt], [0], each, 20, 4.0, "ddim") for each in (gates, None))
    assert difference(ours, theirs) < 2 / 255  # pixels are bytes
    assert difference(ours, plain) > 5 / 255


def test_what_else_it_takes_from_our_modules_is_there():
    lines = [line for line in PYTHON.splitlines() if re.match(r"(import|from) (cpe|deploy)", line)]
    assert len(lines) == 2
    exec("\n".join(lines), {})
    called = re.findall(r"`((?:cpe|deploy)\.[\w.]+)\.(\w+)\(", README) + re.findall(r"`(cpe)\.(\w+)\(", README)
    assert {name for _, name in called} == {"erase", "merge"}
    assert all(callable(getattr(importlib.import_module(module), name)) for module, name in called)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "emoji/README.md"])
def test_every_file_that_is_linked_is_there(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not ((ROOT / file).parent / link).exists()]
    assert not missing


def test_files_in_reading_order_are_there():
    named = re.findall(r"^\| (`[^|]+) \|", README, re.MULTILINE)
    files = [name for row in named for name in re.findall(r"`([^`]+)`", row)]
    assert len(files) > 10
    assert all((ROOT / name).exists() for name in files)


def test_the_lines_of_cpe_in_reading_order_are_its_sections():
    ranges = [tuple(map(int, found)) for found in re.findall(r"\| (\d+)-(\d+) \|", README)]
    lines = (ROOT / "cpe.py").read_text(encoding="utf-8").splitlines()
    sections = [number for number, line in enumerate(lines, 1) if line.startswith("# --- ")]
    ends = [start - 2 for start in sections[1:]] + [len(lines)]
    assert ranges == list(zip(sections, ends, strict=True))
