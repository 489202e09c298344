"""emoji/make.py: a training that was stopped goes on as if it never had been, and CLIP cannot overlook colours."""

import importlib.util
import sys

import pytest
import torch
from tiny import ROOT
from torch import nn


@pytest.fixture
def make(tmp_path, monkeypatch):
    """The program as a module, whose checkpoints go to a folder of the test."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "emoji" / "make.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make", module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setitem(module.EXPORTED, "small", "nothing.safetensors")
    return module


def training(make, samples: int):
    """A network whose parameters are not in alphabetical order, and have several shapes."""
    torch.manual_seed(0)
    network = nn.Sequential()
    network.add_module("second", nn.Linear(3, 5))
    network.add_module("first", nn.Linear(5, 2))

    def loss(size: int) -> torch.Tensor:
        return network(torch.ones(size, 3)).square().mean()

    recipe = make.Recipe(samples, 4, 1e-2, 0.01, (0.9, 0.99), 0.9, 1.0 - 1e-9, 1)
    return make.Training("small", network, loss, recipe)


def test_a_stopped_training_goes_on_to_the_same_weights(make):
    whole = training(make, 40)
    list(whole)
    whole.path.unlink()
    list(training(make, 20))
    resumed = training(make, 40)
    assert resumed.seen == 20
    list(resumed)
    for ours, theirs in ((resumed.network.state_dict(), whole.network.state_dict()), (resumed.average, whole.average)):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [path.name for path in make.BUILD.iterdir()] == ["small.safetensors"]


def test_the_loss_of_colours_is_least_where_features_point_at_their_colour(make):
    colours = torch.arange(len(make.COLOURS))
    right = torch.eye(12)[colours]
    assert make.colour_loss(right, colours) < 1e-3
    assert make.colour_loss(right, colours.roll(1)) > 9
    blind = torch.eye(12)[-1].expand(len(colours), -1)
    torch.testing.assert_close(make.colour_loss(blind, colours).exp(), torch.tensor(float(len(colours))))
