"""sampler.py: the noise schedule, guidance, and the two samplers on a seeded dummy network."""

import inspect
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from sampler import METHODS, Schedule, check_steps, guided, latent_size, sample
from weights import load_model

HERE = Path(__file__).parent
STEPS = [1, 2, 3, 8, 20, 50]
KV = {"shift": torch.tensor([-0.2, 0.2])}  # the empty prompt, the prompt
ALONE = {"shift": torch.tensor([0.2])}


def latents(rows: int = 1) -> torch.Tensor:
    return tiny.draw("latents", rows, 4, 4, 4)


def check(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Every step agrees to 1e-5 of the largest value of that step."""
    assert len(ours) == len(theirs)
    for step, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert tiny.difference(x, y) <= 1e-5 * y.abs().max().item(), f"step {step}"


def test_schedule_is_stable_diffusions():
    alphas = Schedule().alphas_cumprod
    assert len(alphas) == 1000
    assert alphas[0].item() == pytest.approx(1 - 0.00085)
    assert alphas[-1].item() == pytest.approx(0.0046602, rel=1e-4)


def test_timesteps():
    assert Schedule().timesteps(50) == list(range(981, 0, -20))
    assert Schedule().timesteps(1) == [1]
    assert Schedule().timesteps(500) == list(range(999, 0, -2))


def test_add_noise():
    clean, noise, schedule = latents(2), tiny.draw("noise", 2, 4, 4, 4), Schedule()
    a = schedule.alphas_cumprod[[3, 800]].view(-1, 1, 1, 1)
    expected = a.sqrt() * clean + (1 - a).sqrt() * noise
    assert torch.allclose(schedule.add_noise(clean, noise, torch.tensor([3, 800])), expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guidance_formula(scale):
    x = latents()
    uncond, cond = tiny.dummy(x, 500, {"shift": KV["shift"][:1]}), tiny.dummy(x, 500, ALONE)
    expected = uncond + scale * (cond - uncond)
    assert torch.allclose(guided(tiny.dummy, x, 500, KV, scale), expected, atol=1e-6)


def test_guidance_scale_1_never_reads_the_empty_prompt():
    x = latents()
    assert torch.equal(guided(tiny.dummy, x, 500, ALONE, 1), tiny.dummy(x, 500, ALONE))


@pytest.mark.parametrize("method", METHODS)
def test_guidance_scale_1_is_the_limit_of_the_formula(method):
    near = list(sample(tiny.dummy, Schedule(), latents(), KV, 8, 1 + 1e-6, method))
    assert torch.allclose(near[-1], list(sample(tiny.dummy, Schedule(), latents(), ALONE, 8, 1, method))[-1], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_sample_is_a_generator_of_steps(method):
    calls = []

    def unet(x, timestep, kv):
        calls.append(timestep)
        return tiny.dummy(x, timestep, kv)

    start = latents()
    steps = sample(unet, Schedule(), start, KV, steps=7, method=method)
    assert inspect.isgenerator(steps)
    assert calls == []
    next(steps)
    assert len(calls) == 1
    assert len(list(steps)) == 6
    assert calls == sorted(calls, reverse=True)
    assert torch.equal(start, latents())


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown sampler 'euler': choose one of ddim, dpm"):
        sample(tiny.dummy, Schedule(), latents(), KV, method="euler")


@pytest.mark.parametrize("method", METHODS)
def test_no_sampler_begins_amid_the_noise(method):
    for steps in (0, 501, 600, 1000):
        with pytest.raises(ValueError, match=f"a picture takes between 1 and 500 steps, not {steps}"):
            sample(tiny.dummy, Schedule(), latents(), KV, steps, method=method)
    for steps in (1, 7, 50, 334, 500):
        check_steps(Schedule(), steps, method)


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_stored_reference(method):
    stored = load_file(HERE / "reference.safetensors")[method]
    ours = sample(tiny.dummy, Schedule(), latents(), {"shift": torch.zeros(1)}, 8, 1, method)
    check(list(ours), list(stored.split(1)))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("scale", [1, 7.5])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("method", "name", "config"),
    [("ddim", "DDIMScheduler", tiny.DDIM), ("dpm", "DPMSolverMultistepScheduler", tiny.BETAS)],
)
def test_equals_diffusers(method, name, config, steps, scale):
    (make,) = tiny.reference("diffusers", name)
    scheduler = make(**config)
    scheduler.set_timesteps(steps)
    kv = ALONE if scale == 1 else KV
    x, theirs, timesteps, ours_timesteps = latents(), [], [], []
    for t in scheduler.timesteps:
        timesteps.append(int(t))
        x = scheduler.step(guided(tiny.dummy, x, int(t), kv, scale), t, x).prev_sample
        theirs.append(x)

    def unet(x, timestep, kv):
        ours_timesteps.append(timestep)
        return tiny.dummy(x, timestep, kv)

    check(list(sample(unet, Schedule(), latents(), kv, steps, scale, method)), theirs)
    assert ours_timesteps == timesteps


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [3, 7, 20, 30, 50, 150, 334, 499, 500])
def test_timesteps_equal_diffusers(steps):
    (make,) = tiny.reference("diffusers", "DDIMScheduler")
    scheduler = make(**tiny.DDIM)
    scheduler.set_timesteps(steps)
    assert Schedule().timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.oracle
def test_add_noise_equals_diffusers():
    (make,) = tiny.reference("diffusers", "DDIMScheduler")
    clean, noise, t = latents(2), tiny.draw("noise", 2, 4, 4, 4), torch.tensor([3, 800])
    assert tiny.difference(Schedule().add_noise(clean, noise, t), make(**tiny.DDIM).add_noise(clean, noise, t)) <= 1e-6


def test_a_picture_may_have_any_size_that_the_networks_can_halve(tiny_original):
    model = load_model(tiny_original)  # an autoencoder of two levels, a U-Net of two
    assert latent_size(model) == (4, 4)
    assert latent_size(model, (8, 24)) == (4, 12)
    for size in ((8, 26), (0, 8), (-8, 8)):
        with pytest.raises(ValueError, match="width and height are multiples of 4 here"):
            latent_size(model, size)
