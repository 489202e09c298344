"""Gate files that are not of `train`: the authors' own name a target, and neither preset nor surrogate nor eta."""

from pathlib import Path

import pytest
import torch
from tiny import ROOT

import cpe
from cli import bake, common
from deploy.targets import read_concept
from loading.configs import SD14_CONFIGS
from loading.files import UserError, save_tensors
from loading.prompts import PRESETS
from unet import UNet

OFFICIAL = sorted((ROOT.parent / "shared" / "official_gates").glob("*.safetensors"))
PEOPLE = {"adam driver": "celebrity", "claude monet": "style", "Élisabeth Vigée Le Brun": "style", "nudity": "explicit"}


def of_preset(preset: str) -> tuple[str, str, float]:
    return preset, PRESETS[preset].surrogate, PRESETS[preset].eta


def theirs(path: Path, target: str, preset: str) -> Path:
    """A file with what theirs has: tensors, and three words of metadata."""
    recipe = cpe.PRESETS[preset]
    with torch.device("meta"):
        layers = UNet(SD14_CONFIGS["unet"]).cross_attentions()
    widths = {f"{name}.{k}": getattr(a, k).out_features for name, a in layers.items() for k in ("to_k", "to_v")}
    gates = cpe.ResAG(widths, 768, recipe.r, recipe.k)
    save_tensors(path, cpe.to_tensors(gates), {"prompts": target, "rank": str(recipe.k), "alpha": "1.0"})
    return path


@pytest.mark.parametrize("target", PEOPLE)
def test_their_presets_are_recognised_and_that_is_said(tmp_path, target):
    preset, file = PEOPLE[target], common.read_gates(theirs(tmp_path / "x.safetensors", target, PEOPLE[target]))
    with pytest.warns(UserWarning, match=f"does not say how it was trained: taken for preset {preset}"):
        file.warn_of_guess()
    assert (file.preset, file.concept.surrogate, file.concept.eta) == of_preset(preset)


@pytest.mark.parametrize("target", PEOPLE)
def test_baking_asks_for_the_preset_and_takes_its_surrogate(tmp_path, target):
    file = common.read_gates(theirs(tmp_path / "x.safetensors", target, PEOPLE[target]))
    with pytest.raises(UserError, match=r"does not say how it was trained: say --preset \(one of celebrity, style"):
        bake.common_preset([file])
    concept = read_concept({"prompts": file.target} | file.metadata, PRESETS["object"])
    assert ("object", concept.surrogate, concept.eta) == of_preset("object")
    assert concept.names == [target]


def test_bake_says_so_before_it_opens_a_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bake, "open_model", lambda *_: pytest.fail("opened the model"))
    code, said = run("bake", theirs(tmp_path / "x.safetensors", "claude monet", "style"), model="")
    assert (code, "say --preset" in said) == (2, True)


@pytest.mark.skipif(not OFFICIAL, reason="needs the authors' gate files")
@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: path.stem)
def test_the_authors_own_files(path):
    file, preset = common.read_gates(path), path.stem.split("-")[0]
    assert file.model == "sd14"
    with pytest.warns(UserWarning, match="taken for preset"):
        file.warn_of_guess()
    assert (file.preset, file.concept.surrogate, file.concept.eta) == of_preset(preset)
    with pytest.raises(UserError, match="say --preset"):
        bake.common_preset([file])
