"""README.md: every command of it runs, here on the embedded model and cut short; every file it names is there."""

import re
import shlex
from dataclasses import replace
from functools import partial

import pytest
from tiny import ROOT

import bake
import commands
import compare
import old_cpe as cpe
import weights
from loading import prompts

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS if re.match(r"(python|make|torchrun|pip) ", line)]
# torchrun's, too: of several processes each does what one alone does with its lines (tests/test_many.py).
OURS = [shlex.split(line.split("cpe.py ")[1]) for line in ("python cpe.py demo", *COMMANDS) if "cpe.py " in line]
NEEDED = ("cloud", "red heart", "dog face", "tiger face", "robot", "umbrella", "dog")
SMALL = compare.Budget(erased=2, near=1, others=1, attacked=0, steps=1, guidance_scale=1.0)


def shortened(arguments: list[str]) -> list[str]:
    """The same command on the embedded model, with few steps; the dog stands in for the person."""
    command, *rest = (a.replace("Brad Pitt", "dog face").replace("brad-pitt", "dog-face") for a in arguments)
    more = [] if "emoji" in rest or command == "demo" else ["--model", "emoji"]
    more += {"train": ["--steps-scale", "0.005"], "bake": ["--steps-scale", "0.01", "--steps", "2"]}.get(command, [])
    more += {"generate": ["--steps", "2"], "demo": ["--steps", "2", "--images", "1"]}.get(command, [])
    return [command, *rest, *more]


def few_prompts(preset: str, read=prompts.read_prompts) -> cpe.Prompts:
    """The prompts of a preset, but few: encoding them is what takes time."""
    prompts = read(preset)
    domain = [word for i, word in enumerate(prompts.domain) if i % 5 == 0 or word in NEEDED]
    return cpe.Prompts(prompts.templates[:2], prompts.general[:12], domain)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with its own cache, and recipes of a few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compare, "QUICK", SMALL)
    monkeypatch.setattr(compare, "Budget", lambda: SMALL)
    for name in ("emoji", "emoji-style", "celebrity"):
        monkeypatch.setitem(cpe.PRESETS, name, cpe.PRESETS[name].scaled(0.005))
    monkeypatch.setattr(compare, "SCENARIOS", dict.fromkeys(compare.SCENARIOS, compare.SCENARIOS["object"]))
    for name in ("esd", "mace"):
        short = replace(compare.METHODS[name], settings={"images": 1, "sampling_steps": 1, "steps": 1})
        monkeypatch.setitem(compare.METHODS, name, short)
    monkeypatch.setattr(bake, "Recipe", partial(bake.Recipe, steps=2))
    for module in (weights, compare):
        monkeypatch.setattr(module, "read_prompts", few_prompts)
    monkeypatch.setattr(compare, "side_by_side", lambda *all: ())  # other processes would know none of this
    monkeypatch.setattr(compare, "ABLATIONS", dict(list(compare.ABLATIONS.items())[:1]))
    monkeypatch.setattr(compare, "ABLATION_SCENARIOS", {"object": compare.SCENARIOS["object"]})
    return tmp_path


@pytest.mark.filterwarnings("ignore:the embedded model was never taught")  # "a portrait of"
def test_every_command_runs_in_the_order_of_the_readme(workplace, capsys):
    assert {"demo", "train", "generate", "inspect", "compare", "bake"} <= {arguments[0] for arguments in OURS}
    (workplace / "targets.txt").write_text("tiger face\nrobot\n")
    (workplace / "prompts.txt").write_text("a picture of a robot\na dog\n")
    for arguments in OURS:
        code = commands.main(shortened(arguments))
        said = capsys.readouterr()
        assert code == 0, f"{arguments}: {said.err}"
        # None is of a target that an earlier one has trained, and would keep.
        assert "wrote   gates/" in said.out or arguments[:2] != ["train", "--target"]


def test_every_other_command_names_what_is_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in COMMANDS:
        program, *rest = shlex.split(line)
        if program == "make":
            assert set(rest) <= set(targets), line
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), line


def test_every_file_that_the_readme_names_is_there():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    tabled = [
        name for line in README.splitlines() if line.startswith("| `") for name in re.findall(r"`([\w/.]+)`", line)
    ]
    assert len(linked) >= 3
    missing = [name for name in [*linked, *tabled] if ("." in name or "/" in name) and not (ROOT / name).exists()]
    assert not missing


def test_the_table_of_files_has_every_module():
    rows = {name for line in README.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+\.py)`", line)}
    assert {path.name for path in ROOT.glob("*.py")} <= rows
