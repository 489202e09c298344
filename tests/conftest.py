"""Fixtures of all tests: a tiny model in a folder, commands that run on it, and a cache that is not the user's."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hub_server import server  # noqa: F401  a fixture
from tiny import write_model

from cli.main import main

if not torch.cuda.is_available():
    with suppress(ImportError):  # older torch
        import card  # noqa: F401  torch counts devices at the first gradient, which may be another file's
# Ctrl-C counts even where the tests were started in the background, with a shell that told them to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it computes
os.fsync = lambda file: None  # no test cuts the power: nobody waits for the disk


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder, to read only."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(tiny_original: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_original, tmp_path / "tiny"))


@pytest.fixture
def run(
    tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    """Run a command in an empty folder, on the tiny model unless its arguments say otherwise ("": they say nothing).

    Returns its exit code and what it printed.
    """
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, model: str | None = None) -> tuple[int, str]:
        model = str(tiny_original) if model is None else model
        say = ["--model", model] if model and "--model" not in arguments and arguments[:1] != ("list",) else []
        try:
            code = main([*map(str, arguments), *say])
        except SystemExit as stop:  # argparse's own
            code = stop.code
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return call


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never touch the user's cache of contexts, nor the network; all processes of one run share one cache."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("CPE_CACHE", str(base / "cache"))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the losses, written in two ways; then what takes longest, so that no process is at it when others end."""
    first, long = "test_the_fast_losses_are_the_papers", ("test_faults", "test_notebooks")
    items.sort(key=lambda item: (not item.name.startswith(first), item.path.stem not in long))
