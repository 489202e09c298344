"""README.md: every command of it runs, here on the embedded model and cut short; every file it names is there."""

import re
import shlex
from pathlib import Path

from tiny import ROOT

from cli import check, demo, main, options, targets, train
from loading.prompts import Prompts, read_prompts

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS if re.match(r"(python|make|torchrun|pip) ", line)]
# torchrun's, too: of several processes each does what one alone does with its lines.
OURS = [shlex.split(line.split("cpe.py ")[1]) for line in ("python cpe.py demo", *COMMANDS) if "cpe.py " in line]
SHORT = {"train": ["--first-steps", "3", "--later-steps", "2", "--attack-steps", "2"], "generate": ["--steps", "2"]}
SHORT["demo"] = ["--steps", "2"]
NEEDED = ("cloud", "red heart", "dog face", "tiger face", "robot", "umbrella", "dog", "crab")


def few_prompts(preset: str) -> Prompts:
    """The prompts of a preset, but few: encoding them is what takes time."""
    prompts = read_prompts(preset)
    domain = [word for i, word in enumerate(prompts.domain) if i % 5 == 0 or word in NEEDED]
    return Prompts(prompts.templates[:2], prompts.general[:12], domain)


def shortened(arguments: list[str]) -> list[str]:
    """The same command on the embedded model, with few steps; the dog stands in for the person."""
    command, *rest = (a.replace("Brad Pitt", "dog face").replace("brad-pitt", "dog-face") for a in arguments)
    own = command == "train" or (command == "generate" and not any("safetensors" in each for each in rest))
    model = ["--model", "emoji"] if own and "emoji" not in rest else []
    return [command, *rest, *model, *SHORT.get(command, [])]


def test_every_command_runs_in_the_order_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in (check, demo, targets, train):
        monkeypatch.setattr(module, "read_prompts", few_prompts)
    monkeypatch.setattr(demo, "SEEDS", 1)
    Path("targets.txt").write_text("tiger face\nrobot\n")
    Path("prompts.txt").write_text("a picture of a robot\na dog\n")
    for arguments in OURS:
        options.parse(arguments)
        if arguments[0] in SHORT or arguments[0] in ("inspect", "check", "list"):  # the others' tests run them
            assert main(shortened(arguments)) == 0, f"{arguments}: {capsys.readouterr().err}"


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
