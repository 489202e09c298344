"""Every notebook of theory/ runs, and so all that it asserts is true."""

import warnings
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `theory`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `theory`")
pytest.importorskip("ipykernel", reason="needs the extra `theory`")
pytest.importorskip("matplotlib", reason="needs the extra `theory`")

THEORY = Path(__file__).parents[1] / "theory"
NOTEBOOKS = sorted(THEORY.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_run(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(THEORY)}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jupyter's own parts
        client.execute()
