"""Every notebook of theory/ runs, and so all that it asserts is true; what is committed is the output of one run.

The cells are executed here, without jupyter, with half of the training steps: `make theory` runs them in full.
"""

import json
import os
import sys
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
    """Every axis of a figure says what it shows; a colour bar needs one label only."""
    for axes in figure.axes:
        labels = [axes.get_xlabel(), axes.get_ylabel()]
        wanted = 1 if axes.get_label() == "<colorbar>" else 2
        assert sum(map(bool, labels)) >= wanted, f"{axes.get_title()!r} has axes without labels"


def test_all_five_are_there():
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


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
def test_notebook_runs(path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="needs the extra `theory`")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
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
