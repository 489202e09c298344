"""What tests of the command line share: few prompts, as encoding them is what takes time, and a gate file."""

from pathlib import Path

import pytest
from tiny import FEW, write_gates

from cli import check, targets, train


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """Nothing here depends on how many prompts there are."""
    for module in (check, targets, train):
        monkeypatch.setattr(module, "read_prompts", lambda preset: FEW)
    monkeypatch.setattr(check, "sentences", lambda preset, kind: ["my {}", "look, a {}"] if kind == "held-out" else [])


@pytest.fixture
def gates(run, tiny_original) -> Path:
    """A gate file of the tiny model in the present folder, which says all that `train` says."""
    drawing = '{"steps": 2, "guidance": 3.0, "sampler": "dpm"}'
    return write_gates(tiny_original, Path("red-heart.safetensors"), model=str(tiny_original), drawing=drawing)
