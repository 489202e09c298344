"""--device: what is computed on a graphics card is what the CPU computes, and noise is the CPU's on every device.

Every test runs on a graphics card where there is one, and else on a stand-in (card.py): torch's gradients cannot serve
both in one process.
"""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import cpe
import erasers
import sampler
import solve
import weights
from cli import check, common, targets, train
from study.attacks import Victim
from study.searches import ATTACKS
from token_space import TokenSpace, spectral_norm

STAND_IN = "card"
REAL = torch.cuda.is_available()
if not REAL:
    card = pytest.importorskip("card", exc_type=ImportError)  # older torch cannot have devices of one's own


@pytest.fixture
def device(monkeypatch) -> str:
    """The device that `--device cuda` stands for."""
    for module in (check, targets, train):
        monkeypatch.setattr(module, "read_prompts", lambda preset: tiny.FEW)
    if not REAL:
        load_model = weights.load_model

        def load(name: str, dtype=torch.float32, device="cpu", parts=("text_encoder", "unet", "vae")):
            return load_model(name, dtype, f"{STAND_IN}:0" if str(device).startswith("cuda") else device, parts)

        card.install(monkeypatch)
        for module in (weights, common):
            monkeypatch.setattr(module, "load_model", load)
    return "cuda" if REAL else STAND_IN


# --- The stand-in ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(REAL, reason="there is a graphics card")
def test_the_stand_in_is_as_strict_as_hardware(monkeypatch):
    card.install(monkeypatch)
    here, there = torch.ones(3), torch.ones(3).to(STAND_IN)
    assert torch.equal((there + there).cpu(), here + here)
    assert there[torch.tensor([0, 2])].tolist() == (there[:2] * torch.tensor(1.0)).tolist() == [1, 1]
    refused = [
        (RuntimeError, "some tensors are on the card", lambda: here + there),
        (RuntimeError, "some tensors are on the card", lambda: here * there.sum()),
        (RuntimeError, "some tensors are on the card", lambda: here.sum().add_(there.sum())),
        (RuntimeError, "some tensors are on the card", lambda: torch.stack([here.sum(), there.sum()])),
        (RuntimeError, "some tensors are on the card", lambda: torch.arange(3)[torch.tensor([1]).to(STAND_IN)]),
        (RuntimeError, "no such operation", lambda: there.take(torch.tensor([1]).to(STAND_IN))),
        (RuntimeError, "random numbers", lambda: torch.randn(3, device=STAND_IN)),
        (RuntimeError, "random numbers", lambda: there.normal_()),
        (RuntimeError, "decomposes", lambda: torch.linalg.qr(there[None])),
        (TypeError, "float64", lambda: there.double()),
        ((TypeError, RuntimeError), "card|numpy", lambda: there.numpy()),
    ]
    for error, words, operation in refused:
        with pytest.raises(error, match=words):
            operation()


# --- Commands ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="the stand-in draws no random numbers, and training draws on the card")
def test_gates_are_trained_twice_alike(run, tiny_original, device):
    for name in ("one", "two"):
        arguments = tiny.train(tiny_original, Path(f"{name}.safetensors"), "red heart", "--device", "cuda")
        assert run(*arguments)[0] == 0
    assert tiny.held("one.safetensors") == tiny.held("two.safetensors")


def test_gates_are_solved_as_on_the_cpu(tiny_original, device):
    """What gates do, that is: directions of attention may turn their sign."""
    moved = []
    for kind in ("cpu", "cuda"):
        model = weights.load_model(tiny_original, device=kind)
        space = TokenSpace(cpe.Layers.of(model.cross_attention(), spectral_norm))
        one = solve.constant_direction(model.text_encoder.text_model.final_layer_norm)
        words = ("dog", "cat", "sun", "moon", "house", "tree", "book", "car", "boat", "ball")
        anchors = model.encode(["", *(f"a {word}" for word in words)])
        E, surrogate = model.encode(["a red heart", "red heart"]), model.encode(["a cloud", "cloud"])
        gates = solve.Solver(space, one, anchors, solve.Settings()).solve(E, surrogate)
        moved.append(space.error(gates, E, torch.zeros_like(E)).sum().item())
    assert moved[0] > 0
    assert moved[1] == pytest.approx(moved[0], rel=0.05)


@pytest.mark.parametrize("sampler_name", ["ddim", "dpm"])
def test_pictures_are_those_of_the_cpu(run, tiny_original, device, sampler_name):
    tiny.write_gates(tiny_original, Path("gates.safetensors"))
    pixels = {}
    for name in ("cpu", "cuda"):
        arguments = tiny.generate(tiny_original, Path(f"{name}.png"), "--gates", "gates.safetensors", "--before-after")
        assert run(*[*arguments, "--steps", "3", "--sampler", sampler_name, "--device", name])[0] == 0
        pixels[name] = torch.tensor(np.array(Image.open(f"{name}.png")).astype(int))
    assert (pixels["cuda"] - pixels["cpu"]).abs().max() <= (1 if device == STAND_IN else 8)  # levels of 255: rounding
    assert not torch.equal(*pixels["cuda"].chunk(2))  # the gates do something


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pictures_in_half_precision(run, tiny_original, device, dtype):
    arguments = tiny.generate(tiny_original, Path("x.png"), "--dtype", dtype, "--device", "cuda")
    code, said = run(*arguments)
    assert code == 0, said
    assert Path("x.png").exists()


def test_noise_is_the_cpus(tiny_original, device, monkeypatch):
    starts, sample = [], sampler.sample

    def watched(network, schedule, start, *settings):
        starts.append(start.cpu())
        return sample(network, schedule, start, *settings)

    monkeypatch.setattr(sampler, "sample", watched)
    for name in ("cpu", "cuda"):
        model = weights.load_model(tiny_original, device=name)
        *_, latents = sampler.denoise_context(model, model.encode(["a red heart", "a cat"]), [3, 4], steps=2)
        assert latents.device.type == ("cpu" if name == "cpu" else device)
    assert torch.equal(*starts)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_run_on_the_card(tiny_original, device, name):
    few = {"steps": 1, "images": 1, "sampling_steps": 1}
    options = {
        "embeddings": {"steps": 2, "starts": 1},
        "inversion": few,
        "tokens": few,
        "P4D": few,
        "Ring-A-Bell": {"steps": 1},
    }.get(name, {})
    found = []
    for kind in ("cpu", "cuda"):
        model = weights.load_model(tiny_original, device=kind)
        widths, chance = cpe.Layers.of(model.cross_attention(), spectral_norm).widths, torch.Generator().manual_seed(0)
        gates = cpe.ResAG(widths, 16, 4, 1, generator=chance).to(model.device)
        with torch.no_grad():
            for U in gates.lora_up:
                U += 0.1
        victim = Victim(model, model, gates)
        found.append(ATTACKS[name](victim, "cat", ("a picture of a {}",), 0, **options).contexts)
    assert found[1].device.type == device
    if device == STAND_IN:  # by rounding, a search finds something else
        torch.testing.assert_close(found[1].cpu(), found[0], rtol=1e-3, atol=1e-3)


def test_a_linear_eraser_gives_weights_of_the_cpu(tiny_original, device):
    edited = [
        erasers.ERASERS["uce"](weights.load_model(tiny_original, device=kind), ["cat"], "an object", ["a dog"])
        for kind in ("cuda", "cpu")
    ]
    for name, tensor in edited[1].items():
        assert edited[0][name].device.type == "cpu"
        torch.testing.assert_close(edited[0][name], tensor, rtol=1e-3, atol=1e-4)
