"""Fixtures of the erasers' tests: the tiny model, in float32 and in float64; never changed."""

from pathlib import Path

import pytest
import torch

import weights


@pytest.fixture(scope="module")
def model(tiny_original: Path) -> weights.Model:
    """The tiny model."""
    return weights.load_model(tiny_original)


@pytest.fixture(scope="module")
def exact(tiny_original: Path) -> weights.Model:
    """The tiny model in float64, where two ways of computing agree to 1e-9."""
    return weights.load_model(tiny_original, torch.float64)
