"""Every notebook of theory/ runs, and so all that it asserts is true; what is committed is the output of one run.

The cells are executed here, without jupyter, with half of the steps: `make theory` runs them in full. Model, contexts,
and the gates that all of them begin with, are made once for all six.
"""

import importlib
import json
import os
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from tiny import ROOT

NOTEBOOKS = sorted((ROOT / "theory").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

os.environ.setdefault("CPE_THEORY_BUDGET", "0.5")  # before lab.py is imported
sys.path.insert(0, str(ROOT / "theory"))


def code_cells(path: Path) -> list[dict]:
    """The code cells of a notebook, as they are on disk."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def check_labels(figure) -> None:
    """Every figure has a title, every axis says what it shows; a colour bar needs one label, pictures their places."""
    assert figure.get_suptitle() or any(axes.get_title() for axes in figure.axes)
    for axes in figure.axes:
        if axes.images and not axes.get_xticks().size and not axes.get_yticks().size:  # drawn by the model, in a grid
            place = axes.get_subplotspec()
            assert axes.get_title() or not place.is_first_row(), "a column of pictures does not say what it shows"
            assert axes.get_ylabel() or not place.is_first_col(), "a row of pictures does not say what it shows"
            continue
        labels = [axes.get_xlabel(), axes.get_ylabel()]
        wanted = 1 if axes.get_label() == "<colorbar>" else 2
        assert sum(map(bool, labels)) >= wanted, f"{axes.get_title()!r} has axes without labels"


def once(method):
    """A method of a laboratory that without arguments answers alike: what it answered first, or rather copies of it."""
    answers = {}

    def call(room, *arguments, **options):
        if arguments or options:
            return method(room, *arguments, **options)
        if id(room) not in answers:
            answers[id(room)] = method(room)
        return deepcopy(answers[id(room)])

    return call


@pytest.fixture(scope="session")
def lab():
    """theory/lab.py, where a model has one laboratory, whoever opens it."""
    pytest.importorskip("matplotlib", reason="needs the extra `theory`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        lab = importlib.import_module("lab")
        patch.setattr(lab, "open_lab", cache(lab.open_lab))
        for name in ("solved", "uce"):
            patch.setattr(lab.Lab, name, once(getattr(lab.Lab, name)))
        yield lab


def test_all_six_are_there():
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")


@each_notebook
def test_it_begins_with_pictures_that_the_model_drew_and_then_makes_its_claim(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shown = next(number for number, cell in enumerate(cells) if "plt.show()" in "".join(cell["source"]))
    assert "lab.strip(" in "".join(cells[shown]["source"])
    said = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert "picture" in said[0]
    claim = next(number for number, cell in enumerate(cells) if "**The claim.**" in "".join(cell["source"]))
    assert claim == shown + 1
    assert any("*Proof.*" in text for text in said)


@each_notebook
def test_it_says_whose_its_statements_are(path):
    text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    assert "ours" in text
    assert ("Theorem 1" in text) == (path.stem[0] in "12")


def test_gates_are_the_shipped_ones(lab):
    """What the notebooks call the shipped gate is what the command solves for, but for the hidden concepts."""
    room = lab.open_lab("emoji")
    assert room.solver().settings == room.shop.recipe(room.erased)
    prompts = room.shop.prompts(room.erased)
    shipped = lab.train.Workshop.prompts(room.shop, room.erased)
    assert prompts.templates == shipped.templates
    assert prompts.general == shipped.general
    assert set(shipped.domain) - set(prompts.domain) == set(room.hidden)
    assert not set(room.listed) & set(room.hidden)
    trainer = room.trainer(1 / lab.BUDGET)
    assert trainer.recipe == lab.PRESETS["emoji"]


@each_notebook
def test_outputs_are_those_of_one_run(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output.get("name") == "stdout" for output in outputs)
    # neither errors nor warnings
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@each_notebook
def test_every_figure_is_printed_where_it_is_drawn(path):
    for cell in code_cells(path):
        images = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert images == "".join(cell["source"]).count("plt.show()")


@each_notebook
def test_notebook_runs(path, lab, monkeypatch):
    plt = lab.plt
    plt.switch_backend("Agg")
    plt.close("all")  # what a notebook that failed before left open

    def show() -> None:
        for number in plt.get_fignums():
            check_labels(plt.figure(number))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(ROOT)
    names: dict = {"__name__": path.stem}
    asserted = 0
    for number, cell in enumerate(code_cells(path), start=1):
        source = "".join(cell["source"])
        asserted += source.count("assert ")
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
    assert asserted
    assert not plt.get_fignums()  # all shown, and so all checked
