"""One file in the original layout: read again by us to the bit, and by diffusers."""

import pytest
import tiny as reference
import torch

import weights
from deploy.export import export
from loading import parts
from loading.files import UserError, load_tensors

PARTS = ("text_encoder", "unet", "vae")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_tensor_is_in_the_file_once_under_its_original_name(tiny, tmp_path, dtype):
    model = weights.load_model(tiny)
    export(model, tmp_path / "one.safetensors", dtype)
    tensors, _ = load_tensors(tmp_path / "one.safetensors")
    assert len(tensors) == sum(len(getattr(model, part).state_dict()) for part in PARTS)
    assert {t.dtype for t in tensors.values()} == {dtype}
    # the values are all there, whatever their names
    ours = sorted(
        t.to(dtype).double().sum().item() for part in PARTS for t in getattr(model, part).state_dict().values()
    )
    assert ours == sorted(t.double().sum().item() for t in tensors.values())


def test_a_file_is_read_again_to_the_bit(tiny, tmp_path, monkeypatch):
    model = weights.load_model(tiny)
    export(model, tmp_path / "one.safetensors", torch.float32)
    # such a file says nothing of its sizes, which are then those of Stable Diffusion: here the tiny model's
    monkeypatch.setattr(parts, "SD14_CONFIGS", {part: model.part(part).config for part in PARTS})
    for part in PARTS:
        again = parts.ldm_part(tmp_path / "one.safetensors", part).load(torch.float32, torch.device("cpu"))
        for name, tensor in getattr(model, part).state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_numbers_too_large_for_half_precision_are_named(tiny, tmp_path):
    model = weights.load_model(tiny)
    name = "text_model.final_layer_norm.weight"
    large = model.with_text_encoder({name: torch.full((16,), 1e6)})
    with pytest.raises(UserError, match=f"{name} .* write a folder"):
        export(large, tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diffusers_draws_from_the_file_what_it_draws_from_the_folder(tmp_path, dtype):
    (kind,) = reference.reference("diffusers", "StableDiffusionPipeline")
    model = weights.load_model("emoji")
    one = tmp_path / "one.safetensors"
    export(model, one, dtype)
    # such a file says nothing of its sizes
    single = kind.from_single_file(str(one), config=str(model.path), local_files_only=True, dtype=torch.float32)
    folder = kind.from_pretrained(model.path, local_files_only=True, dtype=torch.float32)
    pictures = []
    for pipe in (single, folder):
        pipe.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        pictures.append(pipe("a red heart", **how).images)
    torch.testing.assert_close(*pictures, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)
