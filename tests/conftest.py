"""A tiny random model in the official layout: everything but the quality of its pictures is real."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import weights
from clip import CLIP, TextEncoder
from unet import UNet
from vae import VAE

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it computes

ROOT = Path(__file__).resolve().parent.parent

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "in_channels": 4,
    "out_channels": 4,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "sample_size": 4,
}
VAE_CONFIG = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def write_part(folder: Path, kind: type, config: dict, file: str) -> None:
    """One part of a model: random weights of its own seed, and its config.json."""
    torch.manual_seed(len(str(config)))
    weights.write_text(folder / "config.json", json.dumps(config))
    weights.save_tensors(folder / file, kind(config).state_dict())


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder, to read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    (folder / "tokenizer").mkdir(parents=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(ROOT / "emoji" / "tokenizer" / file, folder / "tokenizer")
    text = TEXT | {"vocab_size": len(weights.read_json(folder / "tokenizer" / "vocab.json"))}
    write_part(folder / "text_encoder", TextEncoder, text, "model.safetensors")
    write_part(folder / "unet", UNet, UNET, "diffusion_pytorch_model.safetensors")
    write_part(folder / "vae", VAE, VAE_CONFIG, "diffusion_pytorch_model.safetensors")
    both = {"text_config": text, "vision_config": VISION, "projection_dim": 8}
    write_part(folder / "clip", CLIP, both, "model.safetensors")
    weights.write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(weights.SD14_CONFIGS["scheduler"]))
    return folder


@pytest.fixture
def tiny(tiny_original: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_original, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never touch the user's cache of contexts, nor the network."""
    monkeypatch.setenv("CPE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
