"""weights.py: whole and exact models load, everything else is refused with a sentence a person can use."""

import errno
import filecmp
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny as reference
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT, TEXT_FILE, UNET_FILE, VAE_FILE, change

import sampler
import weights
from loading import files
from loading.files import UserError
from loading.tokens import TOKENIZER
from weights import load_model


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a network's tensors.

    These are compared to the bit, not what is computed from them: that a processor may round in another way where the
    same numbers begin elsewhere in memory.
    """
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether tensors have the same names and bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
    before, fingerprint = state(load_model(tiny).text_encoder), load_model(tiny).fingerprint
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tiny / TEXT_FILE)
    assert same(state(load_model(tiny).text_encoder), before)
    assert load_model(tiny).fingerprint == fingerprint


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
    expected = state(load_model(tiny).vae)
    save_file(old, tiny / VAE_FILE)
    assert same(state(load_model(tiny).vae), expected)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("conv_in.bias"), ["1 missing (conv_in.bias)"]),
        (lambda t: t.update(surplus=torch.zeros(1)), ["1 not part of this architecture (surplus)"]),
        (lambda t: t.update({"conv_in.bias": torch.zeros(9)}), ["unfit", "conv_in.bias is [9] of F32, not [8]"]),
        (
            lambda t: t.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}),
            ["unfit", "[8] of I64, not [8] of floating-point numbers"],
        ),
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


def test_training_reads_cross_attention_and_nothing_else(tiny, monkeypatch):
    model = load_model(tiny)
    tensors = model.cross_attention()
    layers = list(model.unet.cross_attentions())
    assert list(tensors) == [f"{p}.{q}.weight" for p in layers for q in ("to_q", "to_k", "to_v", "to_out.0")]
    del model.unet
    opened, read = files.opened, []

    @contextmanager
    def spy(path):
        with opened(path) as file:
            yield SimpleNamespace(
                keys=file.keys,
                get_slice=file.get_slice,
                get_tensor=lambda key: read.append(key) or file.get_tensor(key),
            )

    monkeypatch.setattr("loading.parts.opened", spy)
    assert list(model.cross_attention()) == read == list(tensors)
    assert "unet" not in model.__dict__


def test_a_few_paddings_stand_for_all_where_a_prompt_is_read_briefly(tiny):
    """Up to them it is what `encode` gives, whatever else is in the batch; a prompt that fills all tokens is whole."""
    model = load_model(tiny)
    prompts = ["a cat", "dog", "cat " * 100, "a cat and a dog and a cat", "my <|endoftext|> " + "dog " * 12]
    with pytest.warns(UserWarning, match="prompt cut"):
        briefly, whole = model.encode(prompts, batch_size=3, briefly=True), model.encode(prompts)
    for i, prompt in enumerate(prompts):
        last = min(1 + len(model.tokenizer.ids(prompt)) + model.paddings, model.tokens - 1)
        torch.testing.assert_close(briefly[i, : last + 1], whole[i, : last + 1])
        assert torch.equal(briefly[i, last + 1 :], briefly[i, last - 1 : -2])  # the last two by turns
    assert not torch.allclose(briefly[0], whole[0])
    assert model.encode([], briefly=True).shape == (0, *whole.shape[1:])


def test_fingerprints_tell_text_encoders_apart(tiny):
    before = load_model(tiny).fingerprint
    tensors = load_file(tiny / TEXT_FILE)
    tensors["text_model.final_layer_norm.bias"][0] += 1e-3
    save_file(tensors, tiny / TEXT_FILE)
    assert load_model(tiny).fingerprint != before


def test_a_folder_with_only_pickles_is_refused(tiny):
    (tiny / UNET_FILE).rename(tiny / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        _ = load_model(tiny).unet


def test_a_truncated_file_is_named(tiny):
    path = tiny / UNET_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        _ = load_model(tiny).unet


@pytest.mark.parametrize(
    ("name", "said"),
    [("no-such-model", "there is no model no-such-model: --model takes sd14, emoji, owner/name"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_variant_fits_the_dtype(tiny, dtype):
    """float16 takes the half-precision file; bfloat16 would be rounded twice by it."""
    tensors = load_file(tiny / UNET_FILE)
    save_file({n: (t + 1).half() for n, t in tensors.items()}, tiny / "unet/diffusion_pytorch_model.fp16.safetensors")
    value = load_model(tiny, dtype).unet.conv_in.weight
    expected = tensors["conv_in.weight"]
    assert torch.equal(value, (expected + 1).half() if dtype == torch.float16 else expected.to(dtype))


def test_text_encoders_as_transformers_5_writes_them_load(tiny):
    expected = state(load_model(tiny).text_encoder)
    tensors = load_file(tiny / TEXT_FILE)
    save_file({name.removeprefix("text_model."): t for name, t in tensors.items()}, tiny / TEXT_FILE)
    assert same(state(load_model(tiny).text_encoder), expected)


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


def test_clip_loads_from_its_own_folder(tiny):
    for file in TOKENIZER:
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


def test_fingerprints_agree_on_both_precisions(tiny):
    before = load_model(tiny).fingerprint
    save_file({n: t.half() for n, t in load_file(tiny / TEXT_FILE).items()}, tiny / TEXT_FILE)
    assert load_model(tiny).fingerprint == before
    assert load_model(tiny, torch.bfloat16).fingerprint == before


def test_a_model_saved_is_the_model(tiny, tmp_path):
    folder = weights.save_model(load_model(tiny), tmp_path / "copy")
    ours, theirs = reference.contents(folder), reference.contents(tiny)
    assert all(ours[file] == theirs[file] for file in (TEXT_FILE, UNET_FILE, VAE_FILE))
    model, original = load_model(folder), load_model(tiny)
    assert torch.equal(model.encode(["a cat"]), original.encode(["a cat"]))
    assert torch.equal(model.clip.logit_scale, original.clip.logit_scale)
    assert model.schedule.config["beta_start"] == 0.00085
    assert files.read_json(folder / "tokenizer/tokenizer_config.json")["model_max_length"] == 77


def test_a_model_saved_holds_what_was_changed_and_nothing_else(tiny, tmp_path):
    model = load_model(tiny)
    bias = model.unet.conv_in.bias + 1
    folder = weights.save_model(model.with_unet({"conv_in.bias": bias}), tmp_path / "edited")
    assert torch.equal(load_model(folder).unet.conv_in.bias, bias)
    assert reference.contents(folder)[TEXT_FILE] == (tiny / TEXT_FILE).read_bytes()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.with_unet({"conv_in.bias": bias[:1]})


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


@pytest.mark.oracle
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_that_diffusers_wrote_loads(tiny, tmp_path, variant):
    """Their tiny pipeline, saved by them, gives our noise and images what theirs gives."""
    (make_text, text_config) = reference.reference("transformers", "CLIPTextModel", "CLIPTextConfig")
    make_unet, make_vae, ddim = reference.reference(
        "diffusers", "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"
    )
    config = files.read_json(tiny / "text_encoder/config.json")
    theirs = {
        "text_encoder": make_text(text_config(**config)),
        "unet": make_unet(**files.read_json(tiny / "unet/config.json")),
        "vae": make_vae(**files.read_json(tiny / "vae/config.json")),
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
def test_a_folder_we_wrote_loads_in_diffusers(tiny, tmp_path):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    model = load_model(tiny)
    folder = weights.save_model(model.with_unet({}), tmp_path / "ours")  # written anew, not copied
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
def test_a_wide_picture_equals_diffusers(tiny, tmp_path):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    model = load_model(tiny)
    height, width = sampler.draw(model, ["a cat"], [5], None, 1).shape[2:]
    theirs = pipeline.from_pretrained(weights.save_model(model, tmp_path / "ours"), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(5)}
    expected = theirs("a cat", height=height, width=2 * width, output_type="latent", **how).images
    *_, ours = sampler.denoise_context(model, model.encode(["a cat"]), [5], None, 3, 3.0, size=(height, 2 * width))
    assert ours.shape[3] == 2 * ours.shape[2]
    assert reference.difference(ours, expected) <= 1e-4


@pytest.mark.oracle
def test_a_pipeline_that_diffusers_saved_is_read(tiny, tmp_path):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    model, texts = load_model(tiny), ["a cat", "a red heart, here"]
    pipeline.from_pretrained(weights.save_model(model, tmp_path / "ours"), local_files_only=True).save_pretrained(
        tmp_path / "theirs"
    )
    again = load_model(tmp_path / "theirs")
    assert torch.equal(again.tokenizer(texts), model.tokenizer(texts))
    assert same(state(again.text_encoder), state(model.text_encoder))
    assert again.fingerprint == model.fingerprint
    # And what is saved of that is what stock tools open, whichever files the tokenizer came in.
    stock = pipeline.from_pretrained(weights.save_model(again, tmp_path / "again"), local_files_only=True)
    ids = stock.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, model.tokenizer(texts))


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
    saved = weights.save_model(twin, tmp_path / "saved")
    assert weights.load_model(saved).fingerprint == twin.fingerprint


# --- Models as they come -----------------------------------------------------------------------------------------


def test_a_local_folder_of_a_short_name_is_not_shadowed(tiny, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert weights.expected_unet("sd14").config["sample_size"] == 64
    tiny.rename("sd14")
    assert load_model("sd14").unet.config["sample_size"] == 4
    reference.write_gates(Path("sd14"), Path("x.safetensors"))
    code, said = run("inspect", "a cat", "x.safetensors", "--model", "sd14")  # its gates fit
    assert code == 0, said
    Path("emoji").mkdir()  # which is no model
    for _ in range(2):
        assert load_model("emoji").unet.config == files.read_json(ROOT / "emoji/unet/config.json")
        monkeypatch.chdir(ROOT)


def test_a_projection_beside_the_text_encoder_is_passed_over(tiny):
    expected = state(load_model(tiny).text_encoder)
    save_file(load_file(tiny / TEXT_FILE) | {"text_projection.weight": torch.zeros(8, 16)}, tiny / TEXT_FILE)
    assert same(state(load_model(tiny).text_encoder), expected)


@pytest.mark.parametrize("variant", ["bf16", "non_ema"])
def test_another_variant_of_the_weights_is_named(tiny, variant):
    (tiny / UNET_FILE).rename(tiny / f"unet/diffusion_pytorch_model.{variant}.safetensors")
    with pytest.raises(
        UserError, match=rf"only the variant diffusion_pytorch_model\.{variant}\.safetensors: rename it"
    ):
        load_model(tiny)


def test_a_lora_that_is_not_merged_is_named(tiny):
    whole, lora = load_file(tiny / UNET_FILE), torch.zeros(2, 2)
    wrapped = {name.replace("to_q.", "to_q.base_layer."): tensor for name, tensor in whole.items()}
    for tensors in (  # of peft, and of diffusers before it used peft
        wrapped | {"mid_block.to_q.lora_A.default.weight": lora, "mid_block.to_q.lora_B.default.weight": lora.clone()},
        whole | {"mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.down.weight": lora},
    ):
        save_file(tensors, tiny / UNET_FILE)
        with pytest.raises(UserError, match=r"holds a LoRA that is not merged: .*fuse_lora"):
            _ = load_model(tiny).unet
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tiny / "alone.safetensors")
    with pytest.raises(UserError, match="It is a LoRA: fuse it into its model"):
        load_model(tiny / "alone.safetensors")
