"""What several test files share: tiny configs and models, weights that any machine draws alike, commands, references.

Fixtures are in conftest.py. Where a test takes the fixture `tiny`, this module is imported under another name.
"""

import importlib
import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cpe
import weights
from loading import configs, files
from loading.prompts import Prompts
from loading.tokens import TOKENIZER

ROOT = Path(__file__).resolve().parent.parent

# --- Configs -----------------------------------------------------------------------------------------------------

# For comparisons of one network with the references: small, but with every kind of block.
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}

SD14_TEXT, SD14_UNET, SD14_VAE = (configs.SD14_CONFIGS[part] for part in ("text_encoder", "unet", "vae"))
VIT_LARGE = {  # openai/clip-vit-large-patch14, whose text tower is SD 1.4's
    "text_config": SD14_TEXT,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "projection_dim": 768,
}

# The parts of the tiny model on disk: the least that a model can be made of.
ON_DISK_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
}
ON_DISK_TEXT = {**ON_DISK_TOWER, "vocab_size": len(files.read_json(ROOT / "emoji/tokenizer/vocab.json"))}
ON_DISK = {
    "text_encoder": ON_DISK_TEXT,
    "unet": {
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
    },
    "vae": {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    "clip": {
        "text_config": ON_DISK_TEXT,
        "vision_config": {**ON_DISK_TOWER, "image_size": 16, "patch_size": 8},
        "projection_dim": 8,
    },
}

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}

# --- Models and files --------------------------------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    """The tiny model in the diffusers layout: everything about it is real but the quality of its pictures."""
    (folder / "tokenizer").mkdir(parents=True)
    for file in TOKENIZER:
        shutil.copy(ROOT / "emoji" / "tokenizer" / file, folder / "tokenizer")
    for part, config in ON_DISK.items():
        build, stem = weights.PARTS[part]
        torch.manual_seed(len(str(config)))
        files.write_text(folder / part / "config.json", json.dumps(config))
        tensors = build(config).state_dict()
        if part == "text_encoder":
            # A bias, as trained ones have: without it there is no `cpe.constant_direction`. Of the size: at 0.003 and
            # 0.01 MACE's fusion with lam = 1e-9 is too ill-conditioned for its tolerance.
            tensors["text_model.final_layer_norm.bias"] = 0.02 * draw("bias", config["hidden_size"])
        files.save_tensors(folder / part / f"{stem}.safetensors", tensors)
    files.write_text(folder / weights.SCHEDULER, json.dumps(configs.SD14_CONFIGS["scheduler"]))
    return folder


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def change(folder: Path, part: str, **values: object) -> None:
    """Change some settings of a part's config.json."""
    path = folder / part / "config.json"
    files.write_text(path, json.dumps(files.read_json(path) | values))


def contents(folder: str | Path) -> dict[str, bytes]:
    """The bytes of all files in a folder and its folders, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def held(path: str | Path) -> bytes | tuple[dict[str, bytes], dict[str, str]]:
    """The bytes of a file; of safetensors the bytes of each tensor, and the metadata, whose order there is chance."""
    if Path(path).suffix != ".safetensors":
        return Path(path).read_bytes()
    tensors, metadata = files.load_tensors(path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, metadata


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, of torch's own generator: other machines may draw others."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw(name: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the name and the shape alone (numpy's frozen generator)."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.tensor(random.standard_normal(shape), dtype=torch.float32)


def filled(model: nn.Module) -> nn.Module:
    """The model in eval mode, every tensor drawn by its key: biases and norms included, none of them trivial."""
    state = {}
    for key, tensor in model.state_dict().items():
        noise = draw(key, *tensor.shape)
        if key.endswith("bias"):
            state[key] = 0.1 * noise
        elif tensor.dim() < 2:  # norms, the class embedding, the logit scale
            state[key] = 1 + 0.1 * noise
        else:
            state[key] = noise * (tensor.shape[0] / tensor.numel()) ** 0.5
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def tokens(vocab_size: int, length: int = 9) -> Tensor:
    """Three rows of ids: BOS, some words, then EOS up to the end."""
    bos, eos = vocab_size - 2, vocab_size - 1
    rows = [[bos, 5, 17, 3, eos], [bos, 40, 2, 2, 31, 8, 11, eos], [bos, eos]]
    return torch.tensor([row + [eos] * (length - len(row)) for row in rows])


# --- Commands ----------------------------------------------------------------------------------------------------

FEW = Prompts(["a picture of a {}", "{}"], ["house", "tree"], ["red heart", "dog face", "cat", "cloud"])


def train(model: Path, out: Path, target: str = "red heart", *more: str) -> list[str]:
    """Arguments of a short training."""
    settings = ["--preset", "emoji", "--steps-scale", "0.01", "--model", str(model)]
    return ["train", target, "--out", str(out), *settings, *more]


def write_gates(folder: Path, out: Path, seed: int = 0, **metadata: str) -> Path:
    """A gate file for a model: random, and open somewhere."""
    layers = cpe.Layers.of(weights.load_model(folder).cross_attention())
    width = next(iter(layers.W.values())).shape[1]
    gates = cpe.ResAG(layers.widths, width, r=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    files.save_tensors(out, cpe.to_tensors(gates), {"target": "red heart", "preset": "emoji"} | metadata)
    return out


def bake(model: Path, out: Path, gates: Path, *more: str) -> list[str]:
    """Arguments of a short baking; writes the gate file."""
    write_gates(model, gates)
    settings = ["--steps-scale", "0.03", "--model", str(model)]
    return ["bake", str(gates), "--out", str(out), *settings, *more]


def generate(model: Path, out: Path, *more: str) -> list[str]:
    """Arguments that draw one small picture."""
    return ["generate", "a cat", "--steps", "1", "--model", str(model), "--out", str(out), *more]


# --- The references ----------------------------------------------------------------------------------------------


def reference(library: str, *names: str) -> list:
    """Objects of diffusers or transformers; the test is skipped where the extra `oracle` is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library, exc_type=ImportError)
        module = importlib.import_module(library)
        return [getattr(module, name) for name in names]


def copied(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    """Their model with our tensors (shared, not copied), strictly; some versions drop the prefix `text_model.`."""
    known = theirs.state_dict()
    state = {key if key in known else key.removeprefix("text_model."): x for key, x in ours.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


def their_text(config: dict, ours: nn.Module) -> nn.Module:
    """transformers' CLIPTextModel with our weights."""
    model, make = reference("transformers", "CLIPTextModel", "CLIPTextConfig")
    return copied(ours, model(make(**{"hidden_act": "quick_gelu", **config})))


def their_clip(config: dict, ours: nn.Module) -> nn.Module:
    """transformers' CLIPModel with our weights."""
    model, make = reference("transformers", "CLIPModel", "CLIPConfig")
    return copied(ours, model(make(**config)))


def their_unet(config: dict, ours: nn.Module) -> nn.Module:
    """diffusers' UNet2DConditionModel with our weights."""
    (model,) = reference("diffusers", "UNet2DConditionModel")
    return copied(ours, model(**config))


def their_vae(config: dict, ours: nn.Module) -> nn.Module:
    """diffusers' AutoencoderKL with our weights."""
    (model,) = reference("diffusers", "AutoencoderKL")
    return copied(ours, model(**config))


def dummy(latents: Tensor, timestep: int, kv: dict[str, Tensor]) -> Tensor:
    """A seeded stand-in for the U-Net: mixes channels, depends on the timestep, and adds kv["shift"] [B] per row."""
    noise = torch.tanh(torch.einsum("ij,bjhw->bihw", draw("dummy", 4, 4), latents))
    return noise + 0.3 * np.sin(int(timestep) / 150) + kv["shift"].view(-1, 1, 1, 1)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; the shapes must agree."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def assert_same(ours: nn.Module, theirs: nn.Module, outputs: Callable[..., list], *inputs: Tensor) -> None:
    """Two networks with the same weights are one function; `outputs(ours, theirs, *inputs)` lists pairs to compare.

    In float32 a pair differs by 1e-5 at most, at any size. Whether that is rounding, float64 tells: there both agree
    to 1e-12 (measured: 2e-14 at full size; one wrong eps of a GroupNorm: 2e-8 or more), and seen from there, ours
    in float32 has rounded no more than twice as much as theirs.
    """
    single = outputs(ours, theirs, *inputs)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    double = outputs(ours.double(), copied(ours, theirs), *inputs)
    for (x, y), (exact, their_exact) in zip(single, double, strict=True):
        assert difference(x, y) <= 1e-5
        assert difference(exact, their_exact) <= 1e-12
        assert (x - exact).norm() <= 2 * (y - their_exact).norm()


def eps(model: nn.Module) -> dict[str, float]:
    """The eps of every normalisation by path: too small a thing for activations of tiny models to show."""
    norms = nn.GroupNorm, nn.LayerNorm
    return {path: module.eps for path, module in model.named_modules() if isinstance(module, norms)}


def size(model: nn.Module) -> tuple[int, int]:
    """Tensors and parameters of a model."""
    return len(model.state_dict()), sum(x.numel() for x in model.state_dict().values())
