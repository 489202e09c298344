"""Fixtures of the comparison's tests: the tiny model as a world, its own cache, and sentences of our own."""

import shutil

import pytest
from tiny import ROOT

from loading import prompts
from study.world import World
from weights import load_model


@pytest.fixture(scope="module")
def world(tiny_original):
    return World(load_model(str(tiny_original)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sentence_files(tmp_path, monkeypatch):
    """Sentences for the embedded model, whichever stand in prompts/."""
    folder = shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    (folder / "emoji-held-out.txt").write_text("my {} in paris\nlook, a {}\n")
    (folder / "emoji-strange.txt").write_text("# odd\na flabbergasted {}\n")
    (folder / "emoji-beside.txt").write_text("a {} and a {other}\n")
    monkeypatch.setattr(prompts, "shipped", lambda _: folder)
