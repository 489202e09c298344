"""benchmarks/protocols: every script runs from end to end on the embedded model, here with one picture of each kind."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from tiny import FEW, ROOT, write_gates

from cli import check, train
from cli.main import main

SCRIPTS = ROOT / "benchmarks" / "protocols"
pytestmark = pytest.mark.skipif(not shutil.which("sh") or not hasattr(os, "mkfifo"), reason="needs a shell")
# What stands in for Python: it hands its arguments over, and ends with the exit code that it is given.
ASKS = '#!/bin/sh\nprintf "%s\\n" "$@" > "$ASK/question"\nread -r code < "$ASK/answer"\nexit "$code"\n'


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """Of the presets' prompts a few are enough to train with."""
    for module in (check, train):
        monkeypatch.setattr(module, "read_prompts", lambda preset: FEW)
    monkeypatch.setattr(check, "sentences", lambda preset, kind: ["my {}", "look, a {}"] if kind == "held-out" else [])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script on the embedded model; its commands are run in this process, where torch is there already."""

    def call(script: str, **variables: str) -> list[list[str]]:
        """The commands that it gave."""
        for pipe in ("question", "answer"):
            os.mkfifo(tmp_path / pipe)
        (tmp_path / "python").write_text(ASKS)
        (tmp_path / "python").chmod(0o755)
        environment = {"MODEL": "emoji", "PYTHON": str(tmp_path / "python"), "ASK": str(tmp_path), "STEPS": "1"}
        environment = os.environ | environment | {"COUNT": "1", "OUT": str(tmp_path / "out")} | variables
        said = tmp_path / "said"
        with said.open("w") as file:
            script = subprocess.Popen(["sh", SCRIPTS / script], env=environment, stdout=file, stderr=file)
        # At its end somebody must write, for nobody reads of a pipe that was never written to.
        end = threading.Thread(target=lambda: (script.wait(), (tmp_path / "question").open("w").close()), daemon=True)
        end.start()
        monkeypatch.chdir(ROOT)
        given = []
        try:
            while asked := (tmp_path / "question").read_text():
                given.append(asked.splitlines()[1:])
                (tmp_path / "answer").write_text(f"{main(given[-1])}\n")
        finally:
            script.kill()
        assert script.wait() == 0, said.read_text() + capsys.readouterr().err
        return given

    return call


@pytest.mark.parametrize("protocol", ["celebrities", "artists", "explicit"])
def test_it_erases_draws_and_judges(run, tmp_path, protocol):
    commands = run(f"{protocol}.sh")
    out, parts = tmp_path / "out", ["prompts"] if protocol == "explicit" else ["erased", "kept"]
    assert [words[0] for words in commands] == ["train"] + ["generate", "generate", "evaluate", "evaluate"] * len(parts)
    assert len(list((out / "gates").glob("*.safetensors"))) == 1
    for part in parts:
        rows = (out / f"{part}.csv").read_text().count("\n") - 1
        for when in ("before", "after"):
            assert len(list((out / f"{part}-{when}").glob("*.png"))) == rows > 0
            figures = json.loads((out / f"{part}-{when}.json").read_text())
            assert figures["images"] == rows
            assert {"clip_score", "accuracy", *(["cmmd"] if when == "after" else [])} <= figures.keys()


def test_captions_are_drawn_with_the_gates_of_another_protocol(run, tmp_path):
    write_gates(ROOT / "emoji", tmp_path / "gates" / "red-heart.safetensors", model="emoji")
    commands = run("coco.sh", GATES=str(tmp_path / "gates"), ROWS="3")
    assert [words[0] for words in commands] == ["generate", "generate", "evaluate", "evaluate"]
    figures = json.loads((tmp_path / "out/captions-after.json").read_text())
    assert figures["images"] == 3
    assert figures["cmmd"] > 0


def test_without_gates_it_says_what_to_run_first(tmp_path):
    environment = os.environ | {
        "MODEL": "emoji",
        "OUT": str(tmp_path / "out"),
        "GATES": str(tmp_path),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(["sh", SCRIPTS / "coco.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run explicit.sh first, or set GATES" in done.stderr


def test_the_page_names_every_script():
    page = (ROOT / "docs/protocols.md").read_text(encoding="utf-8")
    assert all(path.name in page for path in SCRIPTS.glob("*.sh"))
