"""README.md: every command of it runs, here on the embedded model and cut short; every file it names is there."""

import re
import shlex
from dataclasses import replace
from functools import partial

import pytest
from tiny import ROOT

import cpe
from cli import bake, main
from cli.options import COMMANDS as KNOWN

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS if re.match(r"(python|make) ", line)]
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


def test_the_python_of_the_readme_is_ours():
    """What the block for diffusers imports and calls is there."""
    from deploy.hooks import attach

    assert callable(attach)
    assert callable(cpe.from_tensors)
    assert callable(cpe.merge)
    assert '.images[0].save("' in README  # a reader wants to see it


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
