"""unet.py: the U-Net, and the claim that the prompt enters through keys and values alone."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from unet import UNet

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def unet():
    return tiny.filled(UNet(tiny.UNET))


def test_sd14_has_the_official_size():
    with torch.device("meta"):
        unet = UNet(tiny.SD14_UNET)
    assert tiny.size(unet) == (686, 859_520_964)
    assert len(unet.cross_attentions()) == 16


def test_equals_the_stored_reference(unet):
    stored = load_file(HERE / "reference.safetensors")["unet"]
    kv = unet.keys_values(tiny.draw("context", 1, 9, 32))
    assert tiny.difference(unet(tiny.draw("latents", 1, 4, 8, 8), 701, kv), stored) <= 1e-5


def test_eps_of_every_group_norm(unet):
    for path, eps in tiny.eps(unet).items():
        transformer = path.endswith(".norm") and "attentions" in path
        assert eps == (1e-6 if transformer else 1e-5), path


def test_keys_values_are_named_after_their_weights(unet):
    context = tiny.draw("context", 2, 9, 32)
    kv, state = unet.keys_values(context), unet.state_dict()
    assert len(kv) == 2 * len(unet.cross_attentions())
    for name, value in kv.items():
        assert torch.allclose(value, context @ state[f"{name}.weight"].T, atol=1e-6)


def test_keys_values_depend_on_neither_image_nor_timestep(unet):
    """One dictionary serves every step: the hooks below see what each cross-attention would project itself."""
    context = tiny.draw("context", 1, 9, 32)
    kv, calls = unet.keys_values(context), []

    def check(layer, arguments):
        x, keys, values = arguments
        q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (layer.to_q(x), keys, values))
        assert torch.equal(keys, layer.to_k(context))
        assert torch.equal(values, layer.to_v(context))
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        calls.append((weights @ v).transpose(1, 2).flatten(-2))

    def compare(layer, arguments, output):
        assert torch.allclose(output, layer.to_out[0](calls[-1]), atol=1e-5)

    hooks = []
    for layer in unet.cross_attentions().values():
        hooks += [layer.register_forward_pre_hook(check), layer.register_forward_hook(compare)]
    for timestep in (981, 1):
        unet(tiny.draw(f"latents at {timestep}", 1, 4, 8, 8), timestep, kv)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2 * len(unet.cross_attentions())


def test_rows_of_a_batch_do_not_mix(unet):
    """What is done to one prompt's keys and values leaves the other rows (the empty prompt) as they were."""
    latents = tiny.draw("latents", 1, 4, 8, 8).repeat(2, 1, 1, 1)
    kv = unet.keys_values(tiny.draw("context", 2, 9, 32))
    gated = {name: torch.cat([x[:1], x[1:] + 1]) for name, x in kv.items()}
    before, after = unet(latents, 501, kv), unet(latents, 501, gated)
    assert torch.allclose(before[0], after[0], atol=1e-6)
    assert not torch.allclose(before[1], after[1], atol=1e-2)
    alone = unet(latents[:1], 501, {name: x[:1] for name, x in kv.items()})
    assert torch.allclose(before[:1], alone, atol=1e-5)


def test_timestep_may_be_a_number_or_one_per_image(unet):
    latents, context = tiny.draw("latents", 2, 4, 8, 8), tiny.draw("context", 2, 9, 32)
    kv = unet.keys_values(context)
    assert torch.equal(unet(latents, 7, kv), unet(latents, torch.tensor([7, 7]), kv))
    mixed = unet(latents, torch.tensor([7, 900]), kv)
    assert torch.allclose(mixed[0], unet(latents, 7, kv)[0], atol=1e-6)
    assert torch.allclose(mixed[1], unet(latents, 900, kv)[1], atol=1e-6)


CHANGES = [
    {},
    {"layers_per_block": 1, "attention_head_dim": 2},
    {
        "block_out_channels": [16, 24],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    },
    {"block_out_channels": [8, 16, 24, 32], "attention_head_dim": 8}
    | {name: tiny.SD14_UNET[name] for name in ("down_block_types", "up_block_types")},
]


def noises(ours, theirs, latents, context, timesteps):
    return [(ours(latents, timesteps, ours.keys_values(context)), theirs(latents, timesteps, context).sample)]


@pytest.mark.oracle
@pytest.mark.parametrize("change", CHANGES)
def test_equals_diffusers(change):
    config = {**tiny.UNET, **change}
    ours = tiny.filled(UNet(config))
    theirs = tiny.their_unet(config, ours)
    assert tiny.eps(ours) == tiny.eps(theirs)
    latents, context = tiny.draw("latents", 3, 4, 16, 16), tiny.draw("context", 3, 77, 32)
    tiny.assert_same(ours, theirs, noises, latents, context, torch.tensor([0, 481, 999]))


@pytest.mark.oracle
@pytest.mark.slow
def test_sd14_equals_diffusers():
    ours = tiny.filled(UNet(tiny.SD14_UNET))
    latents, context = tiny.draw("latents", 1, 4, 64, 64), tiny.draw("context", 1, 77, 768)
    # Takes 10 GiB.
    tiny.assert_same(ours, tiny.their_unet(tiny.SD14_UNET, ours), noises, latents, context, torch.tensor([481]))
