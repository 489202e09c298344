"""weights.py: whole and exact models load, everything else is refused with a sentence a person can use."""

import errno
import filecmp
import json
import os
import re
import shutil
import struct
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny as reference
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT

import weights
from weights import UserError, load_model

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def change(folder: Path, part: str, **values: object) -> None:
    path = folder / part / "config.json"
    weights.write_text(path, json.dumps(weights.read_json(path) | values))


def change_clip(folder: Path, tower: str, **values: object) -> None:
    change(folder, "clip", **{tower: weights.read_json(folder / "clip/config.json")[tower] | values})


def write_scheduler(folder: Path, config: dict) -> None:
    weights.write_text(folder / weights.SCHEDULER, json.dumps(config))


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
        (lambda t: t.pop("conv_in.bias"), ["1 tensor missing", "conv_in.bias"]),
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


def sparse(path: Path, size: int) -> Path:
    """A safetensors file of one tensor [1, size, 1] that takes one block of the disk, whatever it claims to hold."""
    entry = {"dtype": "F32", "shape": [1, size, 1], "data_offsets": [0, 4 * size]}
    header = json.dumps({"x": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 4 * size)
    assert path.stat().st_blocks * 512 < 1 << 16
    return path


@pytest.fixture
def little_to_map():
    """768 GB of addresses beyond those in use: less than files may claim, where the system would promise anything."""
    resource = pytest.importorskip("resource")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (768 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="no other system keeps to a limit of addresses")
@pytest.mark.parametrize("size", [1 << 37, 1 << 40], ids=["torch cannot map it", "safetensors cannot map it"])
def test_a_file_larger_than_all_memory_is_named(tiny, little_to_map, size):
    path = sparse(tiny / UNET_FILE, size)
    said = rf"{UNET_FILE} is larger \([\d,]+ bytes\) than the memory that can be mapped here \(.*memory.*\): check"
    for read in (weights.load_tensors, weights.read_shapes, lambda _: load_model(tiny).unet):
        with pytest.raises(UserError, match=said):
            read(path)


def test_another_error_while_a_file_is_open_is_not_of_the_file(tiny):
    with pytest.raises(RuntimeError, match="ours"), weights.opened(tiny / UNET_FILE):
        raise RuntimeError("a mistake of ours")


def test_shapes_are_read_without_any_tensor(tiny, tmp_path, monkeypatch):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tiny / UNET_FILE).items()}
    assert weights.read_shapes(tiny / UNET_FILE) == shapes
    weights.save_tensors(tmp_path / "x.safetensors", {"number": torch.tensor(1.0), "none": torch.ones(0, 3)})
    assert weights.read_shapes(tmp_path / "x.safetensors") == {"number": (), "none": (0, 3)}
    opened = weights.opened

    @contextmanager
    def spy(path):
        with opened(path) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=file.get_slice)  # and no get_tensor

    monkeypatch.setattr(weights, "opened", spy)
    assert weights.read_shapes(tiny / UNET_FILE) == shapes
    with pytest.raises(UserError, match="pickle"):
        weights.read_shapes(tmp_path / "x.ckpt")


def test_a_pipe_to_read_from_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"x\.safetensors does not exist: check the path"):
        weights.load_tensors(path)
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"x\.safetensors is a device or a pipe: give the name of a file"):
        weights.load_tensors(path)
    with pytest.raises(UserError, match="is a folder: give a file in it"):
        weights.load_tensors(tmp_path)


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


@pytest.mark.parametrize(
    ("name", "said"),
    [("no-such-model", "there is no model no-such-model: --model takes sd14, emoji, a folder"),
     ("SD1.4", "did you mean sd14?"), ("emojis", "did you mean emoji?"),
     (str(reference.ROOT / "README.md"), r"README\.md is no model: --model takes sd14")],
)  # fmt: skip
def test_what_is_no_model_says_what_there_is(name, said):
    with pytest.raises(UserError, match=said):
        load_model(name)


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


def test_other_heads_are_another_text_encoder(tiny):
    """With the same tensors, and so the same fingerprint."""
    one, prompts = load_model(tiny), ["a cat of two heads"]
    first, heads = weights.cached_contexts(one, prompts), one.part("text_encoder").config["num_attention_heads"]
    change(tiny, "text_encoder", num_attention_heads=2 * heads)
    other = load_model(tiny)
    assert other.fingerprint == one.fingerprint
    contexts = weights.cached_contexts(other, prompts)
    assert torch.equal(contexts, other.encode(prompts).half())
    assert not torch.equal(contexts, first)


def test_a_setting_of_a_text_encoder_that_changes_nothing_leaves_the_cache_as_it_is(tiny, monkeypatch):
    first = weights.cached_contexts(load_model(tiny), ["a cat of any version"])
    change(tiny, "text_encoder", transformers_version="4.0")
    model = load_model(tiny)
    monkeypatch.setattr(model, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(weights.cached_contexts(model, ["a cat of any version"]), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_variant_fits_the_dtype(tiny, dtype):
    """float16 takes the half-precision file; bfloat16 would be rounded twice by it."""
    tensors = load_file(tiny / UNET_FILE)
    save_file({n: (t + 1).half() for n, t in tensors.items()}, tiny / "unet/diffusion_pytorch_model.fp16.safetensors")
    value = load_model(tiny, dtype).unet.conv_in.weight
    expected = tensors["conv_in.weight"]
    assert torch.equal(value, (expected + 1).half() if dtype == torch.float16 else expected.to(dtype))


def test_text_encoders_as_transformers_5_writes_them_load(tiny):
    context = load_model(tiny).encode(["a cat"])
    tensors = load_file(tiny / TEXT_FILE)
    save_file({name.removeprefix("text_model."): t for name, t in tensors.items()}, tiny / TEXT_FILE)
    assert torch.equal(load_model(tiny).encode(["a cat"]), context)


def test_a_tensor_under_two_names_is_refused(tiny):
    tensors = load_file(tiny / TEXT_FILE)
    name = "final_layer_norm.bias"
    save_file(tensors | {name: tensors[f"text_model.{name}"].clone()}, tiny / TEXT_FILE)
    with pytest.raises(UserError, match=r"final_layer_norm\.bias is there twice"):
        _ = load_model(tiny).text_encoder


@pytest.mark.parametrize(
    ("part", "key"),
    [("unet", "cross_attention_dim"), ("unet", "up_block_types"), ("vae", "latent_channels"), ("clip", "vision_config")]
    + [("text_encoder", key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")],
)
def test_a_size_that_is_missing_names_file_and_key(tiny, part, key):
    path = tiny / part / "config.json"
    config = weights.read_json(path)
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        getattr(load_model(tiny), part)
    assert key in str(error.value)
    assert f"{part}/config.json" in str(error.value)


def test_a_setting_nobody_knows_is_refused_unless_it_is_null(tiny):
    change(tiny, "unet", new_setting=None, _private="x", addition_embed_type_num_heads=64)
    assert load_model(tiny).unet is not None
    change(tiny, "unet", new_setting="deeper")
    with pytest.raises(UserError, match='new_setting is "deeper", a setting that is not implemented'):
        load_model(tiny)


def test_clip_checks_both_towers(tiny):
    change_clip(tiny, "vision_config", hidden_act="gelu")
    with pytest.raises(UserError, match='hidden_act is "gelu", and only "quick_gelu"'):
        _ = load_model(tiny).clip


@pytest.mark.parametrize("key", ["use_rope", "num_key_value_heads", "new_setting"])
@pytest.mark.parametrize("where", ["text_encoder", "clip", "text_config", "vision_config"])
def test_a_setting_of_clip_that_nobody_knows_is_refused(tiny, where, key):
    part = "text_encoder" if where == "text_encoder" else "clip"
    if where == part:
        change(tiny, part, **{key: 1})
    else:
        change_clip(tiny, where, **{key: 1})
    with pytest.raises(UserError, match=rf"{part}/config\.json: {key} is 1, a setting that is not implemented"):
        load_model(tiny, parts=(part,))


# What transformers around 4.21 wrote into the config of every network, those of openai/clip-vit-* among them.
DUMP = {
    **{"_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0},
    **{"bad_words_ids": None, "bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None},
    **{"decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0},
    **{"early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2, "finetuning_task": None},
    **{"exponential_decay_length_penalty": None, "forced_bos_token_id": None, "forced_eos_token_id": None},
    **{"hidden_act": "quick_gelu", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0},
    **{"initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False, "layer_norm_eps": 1e-05},
    **{"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0},
    **{"model_type": "clip_text_model", "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1},
    **{"num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False},
    **{"pad_token_id": 1, "prefix": None, "problem_type": None, "projection_dim": 768, "pruned_heads": {}},
    **{"remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True, "sep_token_id": None},
    **{"return_dict_in_generate": False, "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False},
    **{"tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0},
    **{"torch_dtype": None, "torchscript": False, "transformers_version": "4.21.0.dev0", "typical_p": 1.0},
    **{"use_bfloat16": False},
}


def test_configs_of_old_transformers_open(tiny):
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    change(tiny, "text_encoder", **DUMP, max_position_embeddings=77)
    for tower in ("text_config", "vision_config"):
        stated = {key: weights.read_json(tiny / "clip/config.json")[tower][key] for key in sizes}
        change_clip(tiny, tower, **DUMP)
        change(tiny, "clip", **{f"{tower}_dict": {**stated, "projection_dim": 768}})
    change(tiny, "clip", initializer_factor=1.0, logit_scale_init_value=2.6592, torch_dtype="float32")
    assert load_model(tiny, parts=("text_encoder", "clip")).clip is not None


@pytest.mark.parametrize("again", [{"num_attention_heads": 4}, {"use_rope": True}, {"hidden_act": "gelu"}, [1]])
def test_a_clip_that_contradicts_itself_is_refused(tiny, again):
    """transformers would believe text_config_dict."""
    config = weights.read_json(tiny / "clip/config.json")
    del config["text_config"]["hidden_act"]
    (tiny / "clip/config.json").write_text(json.dumps({**config, "text_config_dict": again}))
    with pytest.raises(UserError, match=r"text_config_dict says|use_rope|hidden_act"):
        load_model(tiny, parts=("clip",))


def test_parts_that_do_not_fit_together_are_named(tiny):
    change(tiny, "unet", cross_attention_dim=24)
    model = weights.Model("x", tiny, torch.float32, torch.device("cpu"))
    model.part("text_encoder")
    for _ in range(2):  # the second time, too
        with pytest.raises(UserError, match="cross_attention_dim is 24, hidden_size is 16"):
            model.part("unet")
    with pytest.raises(UserError, match="cross_attention_dim is 24, hidden_size is 16"):
        load_model(tiny)


@pytest.mark.parametrize("file", ["vae/config.json", VAE_FILE, "text_encoder/config.json"])
def test_what_is_missing_shows_before_any_work_is_done(tiny, file):
    (tiny / file).unlink()
    with pytest.raises(UserError, match=file):
        load_model(tiny)


def test_parts_that_are_not_asked_for_need_not_be_there(tiny):
    for file in ("vae/config.json", "scheduler/scheduler_config.json"):
        (tiny / file).unlink()
    model = load_model(tiny, parts=("text_encoder", "unet"))
    assert model.cross_attention()
    with pytest.raises(UserError, match=r"scheduler_config\.json"):
        _ = model.schedule


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "linear"),
        ("num_train_timesteps", 0),
        ("beta_end", "big"),
        ("beta_start", 0.5),
        ("beta_start", True),
        ("beta_schedule", None),
        ("clip_sample", True),
        ("predict_epsilon", False),
        ("rescale_betas_zero_snr", True),
        ("set_alpha_to_one", True),
        ("sigma_max", 14.6),
        ("thresholding", True),
        ("timestep_spacing", "trailing"),
        ("timestep_type", "continuous"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", []),
        ("use_flow_sigmas", True),
        ("use_karras_sigmas", True),
        ("variance_type", "learned_range"),
        ("original_inference_steps", 50),  # of LCM, whose U-Nets are distilled
        ("new_setting", False),
    ],
)
def test_another_schedule_is_refused(tiny, key, value):
    write_scheduler(tiny, weights.SD14_CONFIGS["scheduler"] | {key: value})
    with pytest.raises(UserError, match=key) as error:
        _ = load_model(tiny).schedule
    assert weights.SCHEDULER in str(error.value)


# As they are published or as diffusers writes them; see also those that it writes now, below.
PNDM = {**reference.BETAS, "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "skip_prk_steps": True}
SCHEDULERS = {
    "SD 1.4": PNDM
    | {"_diffusers_version": "0.7.0.dev0", "set_alpha_to_one": False, "steps_offset": 1}
    | {"trained_betas": None, "clip_sample": False},
    "SD 1.4 at first": PNDM | {"_diffusers_version": "0.2.2"},
    "SD 1.5": PNDM
    | {"prediction_type": "epsilon", "set_alpha_to_one": False, "steps_offset": 1}
    | {"timestep_spacing": "leading", "trained_betas": None},
    "DPM-Solver": PNDM
    | {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"}
    | {"dynamic_thresholding_ratio": 0.995, "euler_at_final": False, "final_sigmas_type": "zero", "flow_shift": 1.0}
    | {"lambda_min_clipped": -float("inf"), "lower_order_final": True, "prediction_type": "epsilon"}
    | {"sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint", "steps_offset": 1, "thresholding": False}
    | {"timestep_spacing": "linspace", "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None},
    "Euler": PNDM
    | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "steps_offset": 1}
    | {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "timestep_type": "discrete"}
    | {"sigma_max": None, "sigma_min": None, "_use_default_values": ["sigma_min"], "use_karras_sigmas": False},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_stable_diffusion_open(tiny, name):
    expected = load_model(tiny).schedule
    write_scheduler(tiny, SCHEDULERS[name])
    schedule = load_model(tiny).schedule
    assert torch.equal(schedule.alphas_cumprod, expected.alphas_cumprod)
    assert schedule.timesteps(50) == expected.timesteps(50)


def test_a_schedule_is_not_guessed(tiny):
    write_scheduler(tiny, {"beta_start": 0.00085, "beta_schedule": "scaled_linear"})
    with pytest.raises(UserError, match="does not say beta_end"):
        _ = load_model(tiny).schedule
    config = {**PNDM, "_class_name": "DDIMScheduler"}  # which takes set_alpha_to_one to be true unless it is told
    write_scheduler(tiny, config)
    with pytest.raises(UserError, match="does not say set_alpha_to_one"):
        _ = load_model(tiny).schedule
    write_scheduler(tiny, config | {"set_alpha_to_one": False})
    assert load_model(tiny).schedule.config.items() >= weights.STEPPING.items()


def test_a_model_saved_says_all_of_its_schedule(tiny, tmp_path):
    write_scheduler(tiny, PNDM)
    folder = weights.save_model(load_model(tiny), tmp_path / "saved")
    said = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    assert weights.read_json(folder / weights.SCHEDULER).items() >= said.items()


def test_a_model_without_clip_says_so(tiny):
    shutil.rmtree(tiny / "clip")
    with pytest.raises(UserError, match="no clip/ folder"):
        _ = load_model(tiny).clip


@pytest.mark.parametrize("device", ["cuda", "mps", "nonsense"])
def test_a_device_that_is_not_there_is_named(tiny, device):
    if (device == "cuda" and torch.cuda.is_available()) or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip("it is there")
    with pytest.raises(UserError, match=f"the device {device} cannot be used"):
        load_model(tiny, device=device)


def test_a_cache_that_cannot_be_written_is_one_warning(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        weights.cached_contexts(load_model(tiny), ["a cat", "a dog", "a tree"], chunk=1)
    assert [str(each.message).split(":")[0] for each in said] == [f"{tmp_path}/file could not be written"]


def test_a_tokenizer_in_one_file_is_read_and_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))
    model = load_model(tiny)
    texts = ["a cat", "Two dogs, here"]
    expected, context = model.tokenizer(texts), model.encode(texts)
    vocab, merges = ((tiny / "tokenizer" / file).read_text(encoding="utf-8") for file in weights.TOKENIZER)
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    for file in weights.TOKENIZER:
        (tiny / "tokenizer" / file).unlink()
    for pairs in (lines, [line.split() for line in lines]):  # as older and newer versions write them
        said = {"model": {"vocab": json.loads(vocab), "merges": pairs}, "added_tokens": [{"content": "<|endoftext|>"}]}
        weights.write_text(tiny / "tokenizer/tokenizer.json", json.dumps(said))
        again = load_model(weights.save_model(load_model(tiny), tmp_path / f"copy-{len(pairs[0])}"))
        assert torch.equal(again.tokenizer(texts), expected)
        assert torch.equal(again.encode(texts), context)
        assert torch.equal(weights.cached_contexts(again, texts), context.half())
    said["added_tokens"].append({"content": "<mine>"})
    weights.write_text(tiny / "tokenizer/tokenizer.json", json.dumps(said))
    with pytest.raises(UserError, match=r"tokenizer.json adds the word '<mine>'"):
        _ = load_model(tiny).tokenizer
    weights.write_text(tiny / "tokenizer/tokenizer.json", "{}")
    with pytest.raises(UserError, match="could not be read"):
        _ = load_model(tiny).tokenizer


def test_words_added_to_a_vocabulary_are_refused(tiny):
    weights.write_text(tiny / "tokenizer/added_tokens.json", json.dumps({"<|endoftext|>": 1}))
    assert load_model(tiny).tokenizer
    weights.write_text(tiny / "tokenizer/added_tokens.json", json.dumps({"<mine>": 49408}))
    with pytest.raises(UserError, match=r"added_tokens.json adds the word '<mine>'"):
        _ = load_model(tiny).tokenizer


def test_a_network_in_several_files_is_named(tiny):
    (tiny / "unet/diffusion_pytorch_model.safetensors").rename(
        tiny / "unet/diffusion_pytorch_model-00001-of-1.safetensors"
    )
    weights.write_text(tiny / "unet/diffusion_pytorch_model.safetensors.index.json", "{}")
    with pytest.raises(UserError, match="comes in several files, which are not read: save it again in one file"):
        load_model(tiny)


def test_a_setting_that_says_nothing_is_none(tiny):
    config = weights.read_json(tiny / "unet/config.json")
    weights.write_text(tiny / "unet/config.json", json.dumps(config | {"upcast_attention": None}))
    assert load_model(tiny).unet
    weights.write_text(tiny / "unet/config.json", json.dumps(config | {"upcast_attention": True}))
    with pytest.raises(UserError, match="upcast_attention is true, and only false"):
        load_model(tiny)


def test_clip_loads_from_its_own_folder(tiny):
    for file in weights.TOKENIZER:
        shutil.copy(tiny / "tokenizer" / file, tiny / "clip")
    clip, tokenizer = weights.load_clip(tiny / "clip")
    tokens = tokenizer(["a cat"])
    assert torch.equal(clip.encode_text(tokens), load_model(tiny).clip.encode_text(tokens))
    with pytest.raises(UserError, match="there is no CLIP model nonsense"):
        weights.load_clip("nonsense")


def test_editing_loaded_weights_leaves_the_file_alone(tiny):
    """They are a memory map, but a private one."""
    before = (tiny / UNET_FILE).read_bytes()
    unet = load_model(tiny).unet
    unet.conv_in.weight.add_(1)
    assert (tiny / UNET_FILE).read_bytes() == before
    assert not torch.equal(unet.conv_in.weight, load_model(tiny).unet.conv_in.weight)


def test_building_draws_no_initial_values(tiny):
    """And leaves torch's generator alone: a seed set before loading holds after it."""
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    model = load_model(tiny)
    _ = model.text_encoder, model.unet, model.vae, model.clip
    assert torch.equal(torch.get_rng_state(), expected)


# --- One-file checkpoints ----------------------------------------------------------------------------------------


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


# One for every entry of `weights.LDM_IGNORED`.
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
        configs[part] = weights.read_json(tiny / part / "config.json")
        for key, tensor in load_file(tiny / file).items():
            name = to_original(part, key, configs[part])
            if part == "vae" and "attn_1" in name and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            tensors[name] = tensor.contiguous()
    monkeypatch.setattr(weights, "SD14_CONFIGS", weights.SD14_CONFIGS | configs)
    path = tmp_path / "single" / "tiny.safetensors"
    weights.save_tensors(path, tensors)
    for file in weights.TOKENIZER:
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


def test_fingerprints_agree_on_both_precisions(tiny):
    before = load_model(tiny).fingerprint
    save_file({n: t.half() for n, t in load_file(tiny / TEXT_FILE).items()}, tiny / TEXT_FILE)
    assert load_model(tiny).fingerprint == before
    assert load_model(tiny, torch.bfloat16).fingerprint == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), ["1 tensor missing", "conv_out.bias"]),
        (lambda t: t.update({"model.diffusion_model.x": torch.zeros(1)}), ["not part of", "model.diffusion_model.x"]),
        (lambda t: t.update({"control_model.x": torch.zeros(1)}), ["control_model.x does not belong there"]),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("first_stage")], ["it has no first_stage_model.*"]),
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
    config = weights.SD14_CONFIGS[part]
    names = weights.Part(weights.PARTS[part][0], config, Path(), str).empty().state_dict()
    originals = {name: to_original(part, name, config) for name in names}
    assert len(set(originals.values())) == len(names)
    for name, original in originals.items():
        assert weights.ldm_name(original, part, config) == name
    for original, name in PUBLISHED.get(part, {}).items():
        assert originals[name] == weights.LDM_PREFIXES[part] + original


# --- Writing models ----------------------------------------------------------------------------------------------


def test_a_model_saved_is_the_model(tiny, tmp_path):
    folder = weights.save_model(load_model(tiny), tmp_path / "copy")
    ours, theirs = reference.contents(folder), reference.contents(tiny)
    assert all(ours[file] == theirs[file] for file in (TEXT_FILE, UNET_FILE, VAE_FILE))
    model, original = load_model(folder), load_model(tiny)
    assert torch.equal(model.encode(["a cat"]), original.encode(["a cat"]))
    assert torch.equal(model.clip.logit_scale, original.clip.logit_scale)
    assert model.schedule.config["beta_start"] == 0.00085
    assert weights.read_json(folder / "tokenizer/tokenizer_config.json")["model_max_length"] == 77


def test_a_model_saved_holds_what_was_changed_and_nothing_else(tiny, tmp_path):
    model = load_model(tiny)
    edited = {name: t.clone() for name, t in model.unet.state_dict().items()}
    edited["conv_in.bias"] += 1
    folder = weights.save_model(model, tmp_path / "edited", unet=edited)
    assert torch.equal(load_model(folder).unet.conv_in.bias, model.unet.conv_in.bias + 1)
    assert reference.contents(folder)[TEXT_FILE] == (tiny / TEXT_FILE).read_bytes()
    with pytest.raises(ValueError, match="not the tensors of a UNet"):
        weights.save_model(model, tmp_path / "wrong", unet={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="nonsense"):
        weights.save_model(model, tmp_path / "wrong", nonsense={})
    assert not (tmp_path / "wrong").exists()


def test_a_one_file_checkpoint_is_saved_as_a_folder(tiny, checkpoint, tmp_path):
    (checkpoint.parent / "clip").mkdir()  # of whatever lies beside it
    assert not load_model(checkpoint).has_clip
    folder = weights.save_model(load_model(checkpoint), tmp_path / "folder")
    model, original = load_model(folder), load_model(tiny)
    assert torch.equal(model.encode(["a cat"]), original.encode(["a cat"]))
    assert torch.equal(model.vae.quant_conv.weight, original.vae.quant_conv.weight)


def test_a_model_is_not_saved_over_another(tiny):
    before = reference.contents(tiny)
    with pytest.raises(UserError, match="exists already"):
        weights.save_model(load_model(tiny), tiny)
    assert reference.contents(tiny) == before


def test_saving_a_model_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    model = load_model(tiny)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="could not be written"):
        weights.save_model(model, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("file", [UNET_FILE, "tokenizer/merges.txt"])
def test_saving_a_model_whose_file_cannot_be_read_names_that_file(tiny, tmp_path, file):
    model = load_model(tiny)
    (tiny / file).unlink()
    with pytest.raises(UserError, match=f"tiny/{re.escape(file)} cannot be read") as error:
        weights.save_model(model, tmp_path / "copy")
    assert "written" not in str(error.value)
    assert not (tmp_path / "copy").exists()


def test_a_limit_on_file_size_leaves_nothing(tmp_path):
    """The writer in Rust meets the limit itself; what was there before stays."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.safetensors"
    weights.save_tensors(path, {"x": torch.zeros(10)})
    before = reference.contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            weights.save_tensors(path, {"x": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reference.contents(tmp_path) == before


def test_equal_tensors_and_metadata_give_equal_files(tmp_path):
    """The library alone writes metadata in an order that changes from one call to the next."""
    metadata = {name: f'{name} é日\x01\x7f\u2028"\\/' for name in "zyxwvutsrqponmlkjihg"}
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16)}
    for name in "12":
        weights.save_tensors(tmp_path / f"{name}.safetensors", tensors, metadata)
    one, two = reference.contents(tmp_path).values()
    assert one == two
    read, said = weights.load_tensors(tmp_path / "1.safetensors")
    assert said == {"format": "pt", **metadata}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_files_written_are_readable_for_others(tmp_path):
    """A temporary file's narrow permissions must not survive."""
    umask = os.umask(0o022)
    try:
        weights.write_text(tmp_path / "text", "x")
        weights.save_tensors(tmp_path / "tensors.safetensors", {"x": torch.zeros(1)})
    finally:
        os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


# --- The libraries that defined the layouts ----------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_that_diffusers_wrote_loads(tiny, tmp_path, variant):
    """Their tiny pipeline, saved by them, gives our noise and images what theirs gives."""
    (make_text, text_config) = reference.reference("transformers", "CLIPTextModel", "CLIPTextConfig")
    make_unet, make_vae, ddim = reference.reference(
        "diffusers", "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"
    )
    config = weights.read_json(tiny / "text_encoder/config.json")
    theirs = {
        "text_encoder": make_text(text_config(**config)),
        "unet": make_unet(**weights.read_json(tiny / "unet/config.json")),
        "vae": make_vae(**weights.read_json(tiny / "vae/config.json")),
    }
    folder = tmp_path / "theirs"
    for part, module in theirs.items():
        kwargs = {"variant": variant} if variant and part != "text_encoder" else {}
        module.eval().requires_grad_(False).save_pretrained(folder / part, **kwargs)
    ddim(**reference.DDIM).save_pretrained(folder / "scheduler")
    shutil.copytree(tiny / "tokenizer", folder / "tokenizer")

    model = load_model(folder)
    context, latents = model.encode(["a cat"]), reference.draw("latents", 1, 4, 4, 4)
    tokens = model.tokenizer(["a cat"])
    assert reference.difference(context, theirs["text_encoder"](tokens).last_hidden_state) <= 1e-5
    noise = model.unet(latents, 5, model.unet.keys_values(context))
    assert reference.difference(noise, theirs["unet"](latents, 5, context).sample) <= 1e-5
    assert reference.difference(model.vae.decode(latents), theirs["vae"].decode(latents).sample) <= 1e-5


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
        *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
        *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    ],
)
def test_schedulers_that_diffusers_writes_open(tiny, name):
    """Made new for SD, and turned from the PNDM of SD 1.4, as most in circulation are: then they keep its settings."""
    make, pndm = reference.reference("diffusers", name, "PNDMScheduler")
    expected = load_model(tiny).schedule.alphas_cumprod
    told = {key: False for key in ("clip_sample", "set_alpha_to_one") if key in make().config}
    for scheduler in (make(**reference.BETAS, **told), make.from_config(pndm.from_config(SCHEDULERS["SD 1.4"]).config)):
        scheduler.save_pretrained(tiny / "scheduler")
        assert weights.read_json(tiny / weights.SCHEDULER)["_class_name"] == name
        assert torch.equal(load_model(tiny).schedule.alphas_cumprod, expected)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler"])
def test_what_a_scheduler_leaves_out_is_what_diffusers_takes(tiny, tmp_path, name):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    folder = weights.save_model(load_model(tiny), tmp_path / "ours")
    index = weights.read_json(folder / "model_index.json")
    weights.write_text(folder / "model_index.json", json.dumps(index | {"scheduler": ["diffusers", name]}))
    write_scheduler(folder, {**PNDM, "_class_name": name, **({"set_alpha_to_one": False} if "DDIM" in name else {})})
    theirs = pipeline.from_pretrained(folder, local_files_only=True).scheduler.config
    ours = load_model(folder).schedule.config
    assert {key: theirs.get(key, False) for key in weights.STEPPING} == {key: ours[key] for key in weights.STEPPING}


@pytest.mark.oracle
def test_clips_that_transformers_writes_open(tiny):
    make, text = reference.reference("transformers", "CLIPConfig", "CLIPTextConfig")
    make(**weights.read_json(tiny / "clip/config.json")).save_pretrained(tiny / "clip")
    text(**weights.read_json(tiny / "text_encoder/config.json")).save_pretrained(tiny / "text_encoder")
    for part in ("clip", "text_encoder"):  # not what differs from the defaults: everything
        config = weights.read_json(tiny / part / "config.json")
        whole = (make if part == "clip" else text)(**config).to_dict()
        weights.write_text(tiny / part / "config.json", json.dumps(whole, default=str))
    assert load_model(tiny, parts=("text_encoder", "clip")).clip is not None


@pytest.mark.oracle
def test_a_folder_we_wrote_loads_in_diffusers(tiny, tmp_path):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    model = load_model(tiny)
    folder = weights.save_model(model, tmp_path / "ours", unet=model.unet.state_dict())
    theirs = pipeline.from_pretrained(folder, local_files_only=True)
    for part in ("unet", "vae"):
        ours = getattr(model, part).state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in getattr(theirs, part).state_dict().items())
    tokens = model.tokenizer(["a cat"])
    assert theirs.tokenizer("a cat", padding="max_length", max_length=77)["input_ids"] == tokens[0].tolist()
    with torch.no_grad():
        context = theirs.text_encoder(tokens).last_hidden_state
    assert reference.difference(model.encode(["a cat"]), context) <= 1e-5


@pytest.mark.oracle
def test_a_pipeline_that_diffusers_saved_is_read(tiny, tmp_path):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    model, texts = load_model(tiny), ["a cat", "a red heart, here"]
    pipeline.from_pretrained(weights.save_model(model, tmp_path / "ours"), local_files_only=True).save_pretrained(
        tmp_path / "theirs"
    )
    again = load_model(tmp_path / "theirs")
    assert torch.equal(again.tokenizer(texts), model.tokenizer(texts))
    assert torch.equal(again.encode(texts), model.encode(texts))
    assert again.fingerprint == model.fingerprint
    # And what is saved of that is what stock tools open, whichever files the tokenizer came in.
    stock = pipeline.from_pretrained(weights.save_model(again, tmp_path / "again"), local_files_only=True)
    ids = stock.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, model.tokenizer(texts))


@pytest.mark.oracle
def test_the_original_layout_is_the_one_diffusers_converts(tiny, checkpoint):
    convert_unet, convert_vae = reference.reference(
        "diffusers.loaders.single_file_utils", "convert_ldm_unet_checkpoint", "convert_ldm_vae_checkpoint"
    )
    for part, convert in (("unet", convert_unet), ("vae", convert_vae)):
        config = weights.read_json(tiny / part / "config.json") | {"class_embed_type": None}
        theirs, ours = convert(load_file(checkpoint), config), getattr(load_model(tiny), part).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(tensor.reshape(ours[name].shape), ours[name]) for name, tensor in theirs.items())


def test_a_twin_with_another_unet_shares_the_rest_and_leaves_the_first_alone(tiny):
    model = weights.load_model(str(tiny))
    name = next(key for key in model.cross_attention() if key.endswith("to_k.weight"))
    before = model.cross_attention()[name].clone()
    twin = model.with_unet({name: before + 1})
    assert torch.equal(twin.cross_attention()[name], before + 1)
    assert torch.equal(model.cross_attention()[name], before)
    with pytest.raises(KeyError, match="nothing"):
        model.with_unet({"nothing.weight": before})


def test_an_edited_model_is_saved_as_it_is_edited(tiny, tmp_path):
    model = weights.load_model(str(tiny))
    name = next(key for key in model.cross_attention() if key.endswith("to_k.weight"))
    bias = "text_model.final_layer_norm.bias"
    changed = {name: model.cross_attention()[name] + 1}, {bias: model.text_encoder.state_dict()[bias] + 1}
    twin = model.with_unet(changed[0]).with_text_encoder(changed[1])
    saved = weights.load_model(weights.save_model(twin, tmp_path / "twin"))
    for part in ("unet", "text_encoder"):
        ours, expected = getattr(saved, part).state_dict(), getattr(twin, part).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.items())
    assert filecmp.cmp(tmp_path / "twin" / VAE_FILE, tiny / VAE_FILE, shallow=False)


def test_a_twin_with_another_text_encoder_says_so(tiny, tmp_path):
    model = weights.load_model(str(tiny))
    name, unet = "text_model.final_layer_norm.bias", model.unet
    before, mark = model.text_encoder.state_dict()[name].clone(), model.fingerprint
    twin = model.with_text_encoder({name: before + 1})
    assert (twin.encode(["a cat"]) - model.encode(["a cat"]) - 1).abs().max() < 1e-5
    assert torch.equal(model.text_encoder.state_dict()[name], before)
    assert twin.unet is unet
    assert model.fingerprint == mark != twin.fingerprint
    saved = weights.save_model(model, tmp_path / "saved", text_encoder=twin.text_encoder.state_dict())
    assert weights.load_model(saved).fingerprint == twin.fingerprint


# --- What comes with the program -----------------------------------------------------------------------------------


def test_prompts_and_the_embedded_model_are_found_in_a_clone_and_where_pip_puts_them(tmp_path, monkeypatch):
    assert weights.shipped("prompts") == ROOT / "prompts"
    user = weights.sysconfig.get_preferred_scheme("user")  # of pip install --user
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "site-packages" / "weights.py"))
    monkeypatch.setattr(weights.sysconfig, "get_path", lambda name, scheme="all": str(tmp_path / scheme / name))
    with pytest.raises(UserError, match="run from a clone of the repository"):
        load_model("emoji")
    for scheme in (user, "all"):
        folder = tmp_path / scheme / "data" / "share" / "cpe" / "emoji"
        folder.mkdir(parents=True)
        assert weights.shipped("emoji") == folder


def test_pip_installs_every_module_and_all_that_comes_with_the_program():
    tomllib = pytest.importorskip("tomllib")
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(installed["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    folders = {f"emoji/{part}": "*" for part in (*weights.PARTS, "scheduler", "tokenizer")} | {"prompts": "*.txt"}
    assert installed["data-files"] == {f"share/cpe/{name}": [f"{name}/{files}"] for name, files in folders.items()}
