"""--device: what is computed on a graphics card is what the CPU computes, and noise is the CPU's on every device.

Every test runs on a graphics card where there is one, and else on a stand-in (card.py): torch's gradients cannot serve
both in one process.
"""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import attacks
import baselines
import commands
import compare
import old_cpe as cpe
import sampler
import unet
import variants
import weights
from loading import files, prompts

STAND_IN = "card"
REAL = torch.cuda.is_available()
if not REAL:
    card = pytest.importorskip("card", exc_type=ImportError)  # older torch cannot have devices of one's own
CONCEPTS = prompts.read_prompts("emoji").domain[:40]


@pytest.fixture
def device(monkeypatch) -> str:
    """The device that `--device cuda` stands for."""
    monkeypatch.setattr(commands, "read_prompts", lambda preset: tiny.FEW)
    monkeypatch.setattr(compare, "read_prompts", lambda preset: dataclasses.replace(tiny.FEW, domain=CONCEPTS))
    monkeypatch.setattr(cpe, "DRAW", ())  # the CPU's noise, to compare with what was computed there
    if not REAL:
        load_model = weights.load_model

        def load(name: str, dtype=torch.float32, device="cpu", parts=("text_encoder", "unet", "vae")):
            return load_model(name, dtype, f"{STAND_IN}:0" if str(device).startswith("cuda") else device, parts)

        card.install(monkeypatch)
        monkeypatch.setattr(weights, "load_model", load)
    return "cuda" if REAL else STAND_IN


def assert_near(on_card: dict[str, torch.Tensor], on_cpu: dict[str, torch.Tensor], device: str) -> None:
    """The same tensors: of the stand-in to the bit, of hardware to one in a hundred."""
    assert on_card.keys() == on_cpu.keys()
    for name, tensor in on_cpu.items():
        error = (on_card[name].cpu().float() - tensor.float()).norm()
        assert error <= (0 if device == STAND_IN else 0.01 * tensor.float().norm()), name


def gates_of(path: Path) -> dict[str, torch.Tensor]:
    return files.load_tensors(path)[0]


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


@pytest.mark.parametrize("kind", ["resag", "context"])
def test_gates_are_trained_as_on_the_cpu(run, tiny_original, device, kind):
    losses = {}
    for name in ("cpu", "cuda"):
        arguments = tiny.train(tiny_original, Path(f"{name}.safetensors"), "red heart", "--gate", kind)
        assert run(*[*arguments, "--device", name, "--json", "x.json"])[0] == 0
        losses[name] = json.loads(Path("x.json").read_text())["losses"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0 if device == STAND_IN else 0.01)
    if device == STAND_IN:  # rounding is magnified by training
        assert_near(gates_of(Path("cuda.safetensors")), gates_of(Path("cpu.safetensors")), device)


def test_a_seed_repeats_a_run_with_the_cards_own_noise(run, tiny_original, device, monkeypatch):
    if device != STAND_IN:  # which has none
        monkeypatch.setattr(cpe, "DRAW", (device,))
    for name in ("one", "two"):
        arguments = tiny.train(tiny_original, Path(f"{name}.safetensors"), "red heart", "--device", "cuda")
        assert run(*arguments)[0] == 0
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


def test_a_run_that_stopped_on_the_cpu_goes_on_on_the_card(run, tiny_original, device, monkeypatch):
    attack = cpe.Trainer.attack_losses

    def stopped(trainer):
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C, in the phase after the first erasing
        return attack(trainer)

    whole, part = Path("whole.safetensors"), Path("part.safetensors")
    assert run(*[*tiny.train(tiny_original, whole), "--seed", "3"])[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(cpe.Trainer, "attack_losses", stopped)
        assert run(*[*tiny.train(tiny_original, part), "--seed", "3"])[0] == 130
    assert run(*[*tiny.train(tiny_original, part), "--seed", "3", "--resume", "--device", "cuda"])[0] == 0
    if device == STAND_IN:
        assert part.read_bytes() == whole.read_bytes()


def test_a_file_of_targets_is_trained_as_on_the_cpu(run, tiny_original, device):
    Path("targets.txt").write_text("red heart, love\ncat\ndog face\n")
    settings = ["--preset", "emoji", "--steps-scale", "0.01", "--model", str(tiny_original)]
    for name in ("cpu", "cuda"):
        assert run(*["train", "--targets", "targets.txt", "--out", name, "--device", name, *settings])[0] == 0
    assert tiny.contents("cpu").keys() == tiny.contents("cuda").keys() != set()
    if device == STAND_IN:
        assert tiny.contents("cpu") == tiny.contents("cuda")


@pytest.mark.parametrize("sampler_name", ["ddim", "dpm"])
def test_pictures_are_those_of_the_cpu(run, tiny_original, device, sampler_name):
    tiny.bake(tiny_original, Path("x"), Path("gates.safetensors"))  # writes the gates
    pixels = {}
    for name in ("cpu", "cuda"):
        arguments = tiny.generate(tiny_original, Path(f"{name}.png"), "--gates", "gates.safetensors", "--before-after")
        assert run(*[*arguments, "--steps", "3", "--sampler", sampler_name, "--device", name])[0] == 0
        pixels[name] = torch.tensor(np.array(Image.open(f"{name}.png")).astype(int))
    assert (pixels["cuda"] - pixels["cpu"]).abs().max() <= (0 if device == STAND_IN else 8)
    assert not torch.equal(*pixels["cuda"].chunk(2))  # the gates do something


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pictures_in_half_precision(run, tiny_original, device, dtype):
    arguments = tiny.generate(tiny_original, Path("x.png"), "--dtype", dtype, "--device", "cuda")
    assert run(*arguments)[0] == 0
    assert Path("x.png").exists()


def test_noise_is_the_cpus(tiny_original, device, monkeypatch):
    starts, sample = [], sampler.sample

    def watched(network, schedule, start, *settings):
        starts.append(start.cpu())
        return sample(network, schedule, start, *settings)

    monkeypatch.setattr(sampler, "sample", watched)
    for name in ("cpu", "cuda"):
        model = weights.load_model(tiny_original, device=name)
        *_, latents = cpe.denoise(model, ["a red heart", "a cat"], [3, 4], steps=2)
        assert latents.device.type == ("cpu" if name == "cpu" else device)
    assert torch.equal(*starts)


def test_gate_values_are_printed_as_on_the_cpu(run, tiny_original, device):
    tiny.bake(tiny_original, Path("x"), Path("gates.safetensors"))
    arguments = ["inspect", "gates.safetensors", "--prompt", "a red heart", "--model", str(tiny_original)]
    values = []
    for name in ("cpu", "cuda"):
        assert run(*[*arguments, "--device", name, "--json", "x.json"])[0] == 0
        values += json.loads(Path("x.json").read_text())["gates"]
    assert values[1] == pytest.approx(values[0], rel=1e-6 if device == STAND_IN else 1e-3)


def test_a_text_encoder_is_baked_as_on_the_cpu(run, tiny_original, device):
    for name in ("cpu", "cuda"):
        arguments = tiny.bake(tiny_original, Path(name), Path("gates.safetensors"), "--device", name, "--images", "1")
        assert run(*[*arguments, "--steps", "1"])[0] == 0
    baked = [gates_of(Path(name, "text_encoder/model.safetensors")) for name in ("cuda", "cpu")]
    for name, tensor in baked[1].items():  # products of the CPU's own kernels are rounded in another order
        torch.testing.assert_close(baked[0][name], tensor, rtol=0.01, atol=0.01)


# --- The comparison ----------------------------------------------------------------------------------------------

SMALL = compare.Budget(erased=2, near=1, others=1, attacked=0, steps=1, guidance_scale=1.0)


def short(eraser: str) -> dict:
    """Settings with which an eraser takes seconds, and changes something."""
    drawn = {"steps": 2, "images": 2, "sampling_steps": 2}
    return {"esd": drawn, "mace": drawn | {"keep": 0.0}, "speed": {"augment": 1}}.get(eraser, {})


# The others are made of what these are made of.
@pytest.mark.parametrize("name", ["cpe", "cpe, baked", "rece", "mace", "speed", "esd", "lora"])
def test_rows_of_the_table_are_measured_as_on_the_cpu(tiny_original, device, name, monkeypatch, tmp_path):
    recipe = dataclasses.replace(cpe.PRESETS["emoji"].scaled(0.001), nearest=2, first_lr=1.0)
    monkeypatch.setitem(cpe.PRESETS, "emoji", recipe)
    quick = compare.bake.Recipe(steps=2)
    monkeypatch.setattr(compare.bake, "Recipe", lambda: quick)
    monkeypatch.setattr(compare.bake, "training_prompts", lambda *_: (["a red heart"], ["", "a cat", "a tree"]))
    scenario, figures = compare.Scenario(tuple(CONCEPTS[:2])), []
    method = dataclasses.replace(compare.METHODS[name], settings=compare.METHODS[name].settings | short(name))
    for kind in ("cpu", "cuda"):
        monkeypatch.setenv("CPE_CACHE", str(tmp_path / kind))
        quiet = weights.load_model(tiny_original, device=kind)
        loud = {n: 30 * W for n, W in quiet.unet.state_dict().items() if n.endswith("attn2.to_out.0.weight")}
        world = compare.World(quiet.with_unet(loud))
        figures.append(compare.measure(world, scenario, method, SMALL)[0])
    moved = [[counts["change"] for counts in each["groups"].values()] for each in figures]
    assert max(moved[0]) > 1e-5
    assert moved[1] == pytest.approx(moved[0], rel=0.05)
    assert all(figures[1][size] == figures[0][size] for size in ("parameters", "bytes"))


@pytest.mark.parametrize("kind", variants.KINDS)
def test_other_gates_are_trained_on_the_card(tiny_original, device, kind):
    model, prompts = weights.load_model(tiny_original, device="cuda"), tiny.FEW
    recipe = dataclasses.replace(cpe.PRESETS["object"].scaled(0.001), nearest=2)
    one = cpe.constant_direction(model.text_encoder.text_model.final_layer_norm)
    data = cpe.prepare(recipe, prompts, ["red heart"], model.encode, model.encode, one)
    trainer = variants.trainer(cpe.Objective(model.cross_attention()), data, recipe, 0, kind)
    assert all(report for report in trainer.steps())
    assert {parameter.device.type for parameter in trainer.gates.parameters()} == {device}


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_attacks_run_on_the_card(tiny_original, device, name):
    options = {
        "embeddings": {"steps": 2, "starts": 1},
        "inversion": {"steps": 1, "images": 1, "sampling_steps": 1},
        "tokens": {"steps": 1, "images": 1, "sampling_steps": 1},
    }.get(name, {})
    found = []
    for kind in ("cpu", "cuda"):
        model = weights.load_model(tiny_original, device=kind)
        gates = cpe.Objective(model.cross_attention()).new_gates("resag", 4, 1, torch.Generator().manual_seed(0))
        with torch.no_grad():
            gates.lora_up += 0.1
        victim = attacks.Victim(model, model, gates)
        found.append(attacks.ATTACKS[name](victim, "cat", ("a picture of a {}",), 0, **options).contexts)
    assert found[1].device.type == device
    if device == STAND_IN:  # by rounding, a search finds something else
        torch.testing.assert_close(found[1].cpu(), found[0], rtol=1e-3, atol=1e-3)


def test_a_linear_eraser_gives_weights_of_the_cpu(tiny_original, device):
    edited = [
        baselines.uce(weights.load_model(tiny_original, device=kind), ["cat"], "an object", ["a dog"])
        for kind in ("cuda", "cpu")
    ]
    for name, tensor in edited[1].items():
        assert edited[0][name].device.type == "cpu"
        torch.testing.assert_close(edited[0][name], tensor, rtol=1e-3, atol=1e-4)


# --- Other people's pipelines ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler, when it is first imported
def test_gates_are_attached_to_a_unet_on_the_card(device):
    network = tiny.filled(unet.UNet(tiny.UNET))
    context = tiny.draw("context", 2, 9, 32)
    attentions = network.cross_attentions()
    W = {f"{p}.{k}": getattr(a, k).weight for p, a in attentions.items() for k in ("to_k", "to_v")}
    gates = cpe.ResAG({name: len(w) for name, w in W.items()}, 32, r=4, k=2)
    with torch.no_grad():
        for name, parameter in gates.named_parameters():
            parameter.copy_(tiny.draw(name, *parameter.shape) / parameter.shape[1] ** 0.5)
        expected = gates(context, network.keys_values(context))
        cpe.attach(network.to(device), gates)
        erased = network.keys_values(context.to(device))
    for name, tensor in expected.items():
        torch.testing.assert_close(erased[name].cpu(), tensor, rtol=1e-3, atol=1e-3)
