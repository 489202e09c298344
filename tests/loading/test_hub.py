"""weights.py against a server: Stable Diffusion 1.4 is found in the cache, else downloaded; all on this machine."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub as hub
import pytest
import torch
from huggingface_hub import constants

import weights
from loading.files import UserError
from loading.hub import SD14
from loading.tokens import read_tokenizer
from weights import load_model


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_download_is_complete_and_minimal(server, tiny):
    model, original = load_model("sd14"), load_model(tiny)
    assert sorted(server.downloads) == sorted(
        ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
        + ["text_encoder/config.json", "text_encoder/model.safetensors"]
        + [f"{p}/{f}" for p in ("unet", "vae") for f in ("config.json", "diffusion_pytorch_model.safetensors")]
    )
    assert torch.equal(model.encode(["a cat"]), original.encode(["a cat"]))
    for name, tensor in original.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], tensor)
    assert model.name == "sd14"


def test_what_the_cache_has_is_not_asked_for_again(server, monkeypatch):
    load_model("sd14")
    server.requests.clear()
    load_model("sd14")
    assert server.requests == []
    offline(monkeypatch)
    assert load_model("sd14").encode(["a cat"]).shape == (1, 77, 16)


def test_training_downloads_no_autoencoder(server):
    model = load_model("sd14", parts=("text_encoder", "unet"))
    assert not any(file.startswith("vae/") for file in server.downloads)
    assert model.vae.config["latent_channels"] == 4  # and comes when it is asked for
    assert server.downloads[-1] == "vae/diffusion_pytorch_model.safetensors"


def test_half_precision_downloads_the_small_variant_if_there_is_one(server, tiny):
    text = tiny / "text_encoder"
    (text / "model.fp16.safetensors").write_bytes((text / "model.safetensors").read_bytes())
    load_model("sd14", torch.float16, parts=("text_encoder", "unet"))
    assert "text_encoder/model.fp16.safetensors" in server.downloads
    assert "text_encoder/model.safetensors" not in server.downloads
    assert "unet/diffusion_pytorch_model.safetensors" in server.downloads


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, tiny):
    server.cut, server.stays_down = 3 * 512, False
    assert load_model("sd14").fingerprint == load_model(tiny).fingerprint
    assert [ranges for _, _, ranges in server.requests if ranges] == [f"bytes={3 * 512}-"]


def test_downloads_show_how_far_they_are(server, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    load_model("sd14")
    shown = sys.stderr.getvalue()
    for file in server.downloads:
        assert re.search(rf"{re.escape(Path(file).name)}: 100%", shown)


def test_a_download_that_failed_keeps_what_was_finished(server, tiny):
    server.cut = 3 * 512
    with pytest.raises(UserError, match=r"vocab\.json.*failed.*try again"):
        load_model("sd14")
    server.cut = None
    server.requests.clear()
    assert load_model("sd14").fingerprint == load_model(tiny).fingerprint
    assert server.downloads[0] == "tokenizer/vocab.json"
    assert "scheduler/scheduler_config.json" not in server.downloads


def test_offline_with_an_empty_cache_names_both_ways_out(server, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE") as error:
        load_model("sd14")
    assert "--model emoji" in str(error.value)
    assert "the folder of a copy" in str(error.value)
    assert SD14 in str(error.value)
    assert server.requests == []


def test_a_server_that_is_down_is_named_without_waiting_for_it(server, monkeypatch):
    server.shutdown()
    server.server_close()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(UserError, match=r"downloading it failed: connect to the network") as error:
        load_model("sd14")
    assert "--model emoji" in str(error.value)


def test_a_file_that_the_repository_lacks_is_named(server, tiny):
    (tiny / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no vae/diffusion_pytorch_model\.safetensors or vae/.*fp16"):
        load_model("sd14")


def test_a_full_disk_is_not_tried_again(server, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", full)
    with pytest.raises(UserError, match="make room on the disk, check that folder, or set HF_HOME") as error:
        load_model("sd14")
    assert "try again" not in str(error.value)


def test_a_one_file_checkpoint_takes_its_tokenizer_from_sd14(server, tiny, tmp_path):
    path = tmp_path / "elsewhere" / "model.safetensors"
    path.parent.mkdir()
    path.touch()
    model = weights.Model("x", path, torch.float32, torch.device("cpu"))
    assert read_tokenizer(model.tokenizer_folder).ids("a cat") == load_model(tiny).tokenizer.ids("a cat")
    assert all(file.startswith("tokenizer/") for file in server.downloads)


def test_clip_from_a_repository(server, tiny, monkeypatch):
    for file in ("vocab.json", "merges.txt"):
        (tiny / "clip" / file).write_bytes((tiny / "tokenizer" / file).read_bytes())
    server.folder = tiny / "clip"
    model, tokenizer = weights.load_clip(SD14)  # any name will do for this server
    assert torch.equal(model.logit_scale, load_model(tiny).clip.logit_scale)
    assert tokenizer.eos == load_model(tiny).tokenizer.eos
    assert sorted(server.downloads) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]


def test_a_repository_is_a_model_and_so_is_its_folder_in_the_cache(server, tiny, tmp_path, monkeypatch):
    expected = load_model(tiny).fingerprint
    assert load_model(SD14).fingerprint == expected
    offline(monkeypatch)
    cached = tmp_path / "hub" / "models--CompVis--stable-diffusion-v1-4"
    assert load_model(cached).fingerprint == expected
    with pytest.raises(UserError, match="is a cache of 1 models: name one, as in --model CompVis/stable"):
        load_model(cached.parent)
    with pytest.raises(UserError, match=r"tokenizer_config\.json of some/body is not in the Hugging Face cache"):
        load_model("some/body")


def test_files_come_by_way_of_the_endpoint_though_the_hub_offers_another_way(server):
    load_model("sd14", parts=("text_encoder",))
    assert "text_encoder/model.safetensors" in server.downloads
    assert server.others == []


def test_the_hubs_environment_variables_are_honoured(server, tmp_path):
    """HF_ENDPOINT and HF_HOME, as a user sets them: before the program starts."""
    code = "import weights; print(weights.load_model('sd14', parts=('text_encoder',)).path)"
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": "0"}
    command, root = [sys.executable, "-c", code], Path(weights.__file__).parent
    environment = os.environ | settings
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert server.downloads[-1] == "text_encoder/model.safetensors"
    assert done.stdout.startswith(str(tmp_path / "home"))
