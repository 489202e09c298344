"""loading/ldm.py and one-file checkpoints: the original layout, both ways."""

import shutil
from pathlib import Path

import pytest
import tiny as reference
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXT_FILE, UNET_FILE, VAE_FILE

import weights
from cli import check
from cli import train as training
from loading import files, ldm
from loading.configs import SD14_CONFIGS
from loading.files import UserError
from loading.tokens import TOKENIZER
from weights import load_model


def counted(prefix: str, slots: list[list[tuple[str, str]]]) -> dict[str, str]:
    """{our prefix: "<prefix>.<block>.<slot>"} where every inner list is a block of the original's single row."""
    return {ours: f"{prefix}.{i}.{slot}." for i, block in enumerate(slots) for ours, slot in block}


def original_unet(config: dict) -> dict[str, str]:
    """Our prefix -> the original's, counted as its code does: block after block, not computed from an index."""
    layers, last = config["layers_per_block"], len(config["block_out_channels"]) - 1
    down, up = [[("conv_in.", "0")]], []
    for i in range(last + 1):
        block = f"down_blocks.{i}"
        down += [[(f"{block}.resnets.{j}.", "0"), (f"{block}.attentions.{j}.", "1")] for j in range(layers)]
        down += [[(f"{block}.downsamplers.0.conv.", "0.op")]] if i < last else []
    for i, kind in enumerate(config["up_block_types"]):
        block, cross = f"up_blocks.{i}", kind.startswith("CrossAttn")
        up += [[(f"{block}.resnets.{j}.", "0"), (f"{block}.attentions.{j}.", "1")] for j in range(layers + 1)]
        up[-1] += [(f"{block}.upsamplers.0.", "2" if cross else "1")] if i < last else []
    middle = ["mid_block.resnets.0.", "mid_block.attentions.0.", "mid_block.resnets.1."]
    rest = {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    rest |= {"conv_norm_out.": "out.0.", "conv_out.": "out.2."}
    rest |= {ours: f"middle_block.{i}." for i, ours in enumerate(middle)}
    return rest | counted("input_blocks", down) | counted("output_blocks", up)


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def to_original(part: str, key: str, config: dict) -> str:
    """The original name of one of our tensors."""
    if part == "text_encoder":
        return f"cond_stage_model.transformer.{key}"
    if part == "unet":
        ours, theirs = next((o, t) for o, t in original_unet(config).items() if key.startswith(o))
        rest = key.removeprefix(ours)
        if ".resnets." in ours:
            name, end = rest.split(".")
            rest = f"{RESNET[name]}.{end}"
        return f"model.diffusion_model.{theirs}{rest}"
    levels = len(config["block_out_channels"])
    for i in range(levels):
        key = key.replace(f"encoder.down_blocks.{i}.resnets", f"encoder.down.{i}.block")
        key = key.replace(f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample")
        key = key.replace(f"decoder.up_blocks.{i}.resnets", f"decoder.up.{levels - 1 - i}.block")
        key = key.replace(f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{levels - 1 - i}.upsample")
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    for now, then in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        key = key.replace(f"mid_block.attentions.0.{now}", f"mid.attn_1.{then}")
    return "first_stage_model." + key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


# One for every entry of `ldm.IGNORED`.
LEFTOVERS = (
    *("betas", "alphas_cumprod_prev", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("posterior_variance", "logvar", "lvlb_weights", "model_ema.decay", "first_stage_model.loss.logvar"),
    *("cond_stage_model.logit_scale", "cond_stage_model.text_projection", "denoiser.sigmas", "denoiser.log_sigmas"),
    "embedding_manager.string_to_param_dict.*",
)


@pytest.fixture
def checkpoint(tiny, tmp_path, monkeypatch) -> Path:
    """The tiny model in one file, as its code of 2022 would have written it; its tokenizer lies beside."""
    tensors = {name: torch.zeros(2) for name in LEFTOVERS}
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    configs = {}
    for part, file in (("text_encoder", TEXT_FILE), ("unet", UNET_FILE), ("vae", VAE_FILE)):
        configs[part] = files.read_json(tiny / part / "config.json")
        for key, tensor in load_file(tiny / file).items():
            name = to_original(part, key, configs[part])
            if part == "vae" and "attn_1" in name and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            tensors[name] = tensor.contiguous()
    monkeypatch.setattr("loading.parts.SD14_CONFIGS", SD14_CONFIGS | configs)
    path = tmp_path / "single" / "tiny.safetensors"
    files.save_tensors(path, tensors)
    for file in TOKENIZER:
        shutil.copy(tiny / "tokenizer" / file, path.parent)
    return path


def test_a_one_file_checkpoint_equals_the_folder(tiny, checkpoint):
    one, folder = load_model(checkpoint), load_model(tiny)
    for part in ("text_encoder", "unet", "vae"):
        ours, theirs = getattr(one, part).state_dict(), getattr(folder, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(one.encode(["a cat"]), folder.encode(["a cat"]))
    assert one.cross_attention().keys() == folder.cross_attention().keys()
    assert torch.equal(one.schedule.alphas_cumprod, folder.schedule.alphas_cumprod)
    assert one.fingerprint == folder.fingerprint


def test_a_one_file_checkpoint_may_be_in_half_precision(tiny, checkpoint):
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in load_file(checkpoint).items()}
    save_file(tensors, checkpoint)
    one, folder = load_model(checkpoint), load_model(tiny)
    for part in ("text_encoder", "unet", "vae"):
        ours, theirs = getattr(one, part).state_dict(), getattr(folder, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name].half().float()) for name in theirs)
    assert one.fingerprint == folder.fingerprint


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), ["1 missing (conv_out.bias)"]),
        (lambda t: t.update({"model.diffusion_model.x": torch.zeros(1)}), ["not part of", "model.diffusion_model.x"]),
        (lambda t: t.update({"control_model.x": torch.zeros(1)}), ["control_model.x does not belong there"]),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("model.")], ["it has no model.diffusion_model.*"]),
    ],
    ids=["missing", "extra", "another model", "a part missing"],
)
def test_one_file_checkpoints_are_read_strictly(checkpoint, spoil, words):
    tensors = load_file(checkpoint)
    spoil(tensors)
    save_file(tensors, checkpoint)
    with pytest.raises(UserError) as error:
        _ = load_model(checkpoint).unet
    assert all(word in str(error.value) for word in [*words, "tiny.safetensors"])


def test_a_file_of_one_part_says_to_give_the_folder(tiny):
    with pytest.raises(UserError, match="given as the folder that holds unet/"):
        load_model(tiny / UNET_FILE)


def test_a_one_file_checkpoint_without_tokenizer_says_where_to_put_one(checkpoint, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(checkpoint.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (checkpoint.parent / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"brings no tokenizer: put vocab\.json and merges\.txt beside it"):
        _ = load_model(checkpoint).tokenizer


# Read off the published checkpoint of Stable Diffusion 1.4.
PUBLISHED = {
    "unet": {
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        ),
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
        "input_blocks.11.0.in_layers.2.bias": "down_blocks.3.resnets.1.conv1.bias",
        "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        "output_blocks.8.2.conv.bias": "up_blocks.2.upsamplers.0.conv.bias",
        "output_blocks.11.1.norm.weight": "up_blocks.3.attentions.2.norm.weight",
        "time_embed.2.weight": "time_embedding.linear_2.weight",
        "out.2.weight": "conv_out.weight",
    },
    "vae": {
        "encoder.down.2.downsample.conv.weight": "encoder.down_blocks.2.downsamplers.0.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "decoder.up.3.block.2.conv1.weight": "decoder.up_blocks.0.resnets.2.conv1.weight",
        "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
        "decoder.up.0.block.0.nin_shortcut.bias": "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
        "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.norm_out.weight": "encoder.conv_norm_out.weight",
        "post_quant_conv.weight": "post_quant_conv.weight",
    },
}


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_every_name_of_stable_diffusion_has_one_original(part):
    config = SD14_CONFIGS[part]
    names = weights.Part(weights.PARTS[part][0], config, Path(), str).empty().state_dict()
    ours = ldm.ldm_names(part, config, names)
    originals = {name: to_original(part, name, config) for name in names}
    assert len(set(originals.values())) == len(names)
    for name, original in originals.items():
        assert ours[name] == original
    for original, name in PUBLISHED.get(part, {}).items():
        assert originals[name] == ldm.PREFIXES[part] + original


def test_a_one_file_checkpoint_is_saved_as_a_folder(tiny, checkpoint, tmp_path):
    (checkpoint.parent / "clip").mkdir()  # of whatever lies beside it
    assert not load_model(checkpoint).has_clip
    folder = weights.save_model(load_model(checkpoint), tmp_path / "folder")
    model, original = load_model(folder), load_model(tiny)
    assert torch.equal(model.encode(["a cat"]), original.encode(["a cat"]))
    assert torch.equal(model.vae.quant_conv.weight, original.vae.quant_conv.weight)


@pytest.mark.oracle
def test_the_original_layout_is_the_one_diffusers_converts(tiny, checkpoint):
    convert_unet, convert_vae = reference.reference(
        "diffusers.loaders.single_file_utils", "convert_ldm_unet_checkpoint", "convert_ldm_vae_checkpoint"
    )
    for part, convert in (("unet", convert_unet), ("vae", convert_vae)):
        config = files.read_json(tiny / part / "config.json") | {"class_embed_type": None}
        theirs, ours = convert(load_file(checkpoint), config), getattr(load_model(tiny), part).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(tensor.reshape(ours[name].shape), ours[name]) for name, tensor in theirs.items())


def test_what_is_written_in_the_original_layout_is_read_again(tiny, checkpoint):
    model, original = load_model(tiny), load_file(checkpoint)
    tensors = {}
    for part in ("text_encoder", "unet", "vae"):
        tensors |= ldm.to_ldm(part, model.part(part).config, getattr(model, part).state_dict())
    assert tensors.keys() == {key for key in original if not ldm.IGNORED.match(key)}
    assert all(torch.equal(tensor, original[name]) for name, tensor in tensors.items())


def test_a_checkpoint_without_autoencoder_trains(checkpoint, run, monkeypatch):
    tensors = load_file(checkpoint)
    save_file({n: t for n, t in tensors.items() if not n.startswith("first_stage_model.")}, checkpoint)
    model = load_model(checkpoint, parts=("text_encoder", "unet"))
    assert model.cross_attention()
    assert model.encode(["a cat"]).shape == (1, 77, 16)
    with pytest.raises(UserError, match=r"it has no first_stage_model\.\*"):
        _ = model.vae
    for module in (check, training):
        monkeypatch.setattr(module, "read_prompts", lambda preset: reference.FEW)
    code, said = run(*reference.train(checkpoint, Path("x.safetensors")))
    assert code == 0, said
