"""weights.py: whole and exact models load, everything else is refused with a sentence a person can use."""

import errno
import json
import os
import struct
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from weights import UserError, load_model

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def change(folder: Path, part: str, **values: object) -> None:
    path = folder / part / "config.json"
    weights.write_text(path, json.dumps(weights.read_json(path) | values))


def test_every_part_loads_with_the_dtype_asked_for(tiny):
    model = load_model(tiny, torch.bfloat16)
    for part in (model.text_encoder, model.unet, model.vae, model.clip):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not any(p.is_meta or p.requires_grad for p in part.parameters())
    assert model.encode(["a red heart", ""]).shape == (2, 77, 16)
    

def test_loaded_tensors_are_those_of_the_file(tiny):
    loaded = load_model(tiny).unet.state_dict()
    for name, tensor in load_file(tiny / UNET_FILE).items():
        assert torch.equal(loaded[name], tensor)


def test_the_fp16_variant_is_used_when_it_is_the_only_file(tiny):
    tensors = load_file(tiny / UNET_FILE)
    save_file({n: t.half() for n, t in tensors.items()}, tiny / "unet/diffusion_pytorch_model.fp16.safetensors")
    (tiny / UNET_FILE).unlink()
    unet = load_model(tiny).unet
    assert torch.equal(unet.conv_in.weight, tensors["conv_in.weight"].half().float())


def test_position_ids_of_old_files_are_ignored(tiny):
    tensors = load_file(tiny / TEXT_FILE)
    before = load_model(tiny)
    context, fingerprint = before.encode(["a cat"]), before.fingerprint
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tiny / TEXT_FILE)
    after = load_model(tiny)
    assert torch.equal(after.encode(["a cat"]), context)
    assert after.fingerprint == fingerprint


def test_old_names_of_the_autoencoders_attention_load(tiny):
    tensors = load_file(tiny / VAE_FILE)
    old = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for now, then in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
                name = name.replace(f".{now}.", f".{then}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # and they were convolutions
        old[name] = tensor.contiguous()
    assert old.keys() != tensors.keys()
    latents = torch.randn(1, 4, 4, 4)
    expected = load_model(tiny).vae.decode(latents)
    save_file(old, tiny / VAE_FILE)
    assert torch.equal(load_model(tiny).vae.decode(latents), expected)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("conv_in.bias"), ["1 tensors missing", "conv_in.bias"]),
        (lambda t: t.update(surplus=torch.zeros(1)), ["not part of this architecture", "surplus"]),
        (lambda t: t.update({"conv_in.bias": torch.zeros(9)}), ["unfit", "conv_in.bias is [9], not [8]"]),
        (lambda t: t.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}), ["unfit", "holds I64"]),
        (lambda t: t.update({"conv_in.weight": t["conv_in.weight"].mT.flatten(0, 1).contiguous()}), ["conv_in.weight"]),
    ],
    ids=["missing", "extra", "misshapen", "integers", "permuted"],
)
def test_loading_is_strict(tiny, spoil, words):
    tensors = load_file(tiny / UNET_FILE)
    spoil(tensors)
    save_file(tensors, tiny / UNET_FILE)
    with pytest.raises(UserError) as error:
        _ = load_model(tiny).unet
    assert all(word in str(error.value) for word in [*words, UNET_FILE])


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "use_linear_projection", True),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("unet", "norm_num_groups", 5),
        ("unet", "block_out_channels", 8),
        ("unet", "sample_size", None),
        ("vae", "shift_factor", 0.1),
        ("vae", "latent_channels", "4"),
        ("text_encoder", "hidden_act", "gelu"),
        ("text_encoder", "num_attention_heads", 3),
        ("text_encoder", "vocab_size", -1),
        ("clip", "projection_dim", 0),
    ],
)
def test_a_config_that_is_not_implemented_names_file_and_key(tiny, part, key, value):
    change(tiny, part, **{key: value})
    with pytest.raises(UserError) as error:
        getattr(load_model(tiny), part)
    assert key in str(error.value)
    assert f"{part}/config.json" in str(error.value)


def test_training_reads_cross_attention_and_nothing_else(tiny, monkeypatch):
    model = load_model(tiny)
    tensors = model.cross_attention()
    layers = list(model.unet.cross_attentions())
    assert list(tensors) == [f"{p}.{q}.weight" for p in layers for q in ("to_q", "to_k", "to_v", "to_out.0")]
    del model.unet
    opened, read = weights.opened, []

    @contextmanager
    def spy(path):
        with opened(path) as file:
            yield SimpleNamespace(
                keys=file.keys,
                get_slice=file.get_slice,
                get_tensor=lambda key: read.append(key) or file.get_tensor(key),
            )

    monkeypatch.setattr(weights, "opened", spy)
    assert list(model.cross_attention()) == read == list(tensors)
    assert "unet" not in model.__dict__


def test_fingerprints_tell_text_encoders_apart(tiny):
    before = load_model(tiny).fingerprint
    tensors = load_file(tiny / TEXT_FILE)
    tensors["text_model.final_layer_norm.bias"][0] += 1e-3
    save_file(tensors, tiny / TEXT_FILE)
    assert load_model(tiny).fingerprint != before


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_pickles_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="pickle"):
        weights.load_tensors(path)
    with pytest.raises(UserError, match="pickle"):
        load_model(path)


def test_a_folder_with_only_pickles_is_refused(tiny):
    (tiny / UNET_FILE).rename(tiny / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        _ = load_model(tiny).unet


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a safetensors file",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{}garbage",
        struct.pack("<Q", 80) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}  ',
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    ],
    ids=["empty", "text", "huge header", "trailing", "terabytes", "no JSON"],
)
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.safetensors"):
        weights.load_tensors(path)


def test_a_truncated_file_is_named(tiny):
    path = tiny / UNET_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        _ = load_model(tiny).unet


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 10000], ids=["empty", "list", "cut", "deep"])
def test_a_config_that_is_no_json_object_is_named(tiny, content):
    (tiny / "unet/config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        _ = load_model(tiny).unet


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_missing_or_broken_tokenizer_is_named(tiny, file):
    path = tiny / "tokenizer" / file
    path.write_text("{}" if file == "vocab.json" else "only three words")
    with pytest.raises(UserError, match="tokenizer"):
        _ = load_model(tiny).encode(["x"])
    path.unlink()
    with pytest.raises(UserError, match=file):
        _ = load_model(tiny).encode(["x"])


def test_an_unknown_model_says_what_there_is():
    with pytest.raises(UserError, match="sd14, emoji"):
        load_model("no-such-model")


def test_without_weights_and_network_both_ways_out_are_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--model emoji"):
        load_model("sd14")


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file.json"
    weights.write_text(path, json.dumps({"a": 1}))

    def interrupted() -> None:
        with weights.atomic(path) as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="disk is full"):
        weights.write_text(tmp_path / "file", "content")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        weights.write_text(tmp_path / "file" / "below", "")


def test_a_second_target_finds_its_anchors_in_the_cache(tiny, monkeypatch):
    model = load_model(tiny)
    prompts = [f"a picture of {i} cats" for i in range(10)]
    first = weights.cached_contexts(model, prompts, chunk=4)
    assert first.dtype == torch.float16
    assert torch.equal(first, model.encode(prompts).half())
    monkeypatch.setattr(model, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(weights.cached_contexts(model, prompts, chunk=4), first)


def test_a_damaged_cache_is_made_anew(tiny):
    model = load_model(tiny)
    first = weights.cached_contexts(model, ["a damaged entry"])
    for path in weights.cache_folder().glob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert torch.equal(weights.cached_contexts(model, ["a damaged entry"]), first)
