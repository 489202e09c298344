"""loading/files.py: files appear whole or not at all, and whatever cannot be read or written is a sentence."""

import errno
import json
import os
import struct

import pytest
import tiny as reference
import torch
from tiny import UNET_FILE

from loading import files
from loading.files import UserError
from weights import load_model


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_pickles_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="pickle"):
        files.load_tensors(path)
    with pytest.raises(UserError, match="pickle"):
        load_model(path)


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
        files.load_tensors(path)


def test_another_error_while_a_file_is_open_is_not_of_the_file(tiny):
    with pytest.raises(RuntimeError, match="ours"), files.opened(tiny / UNET_FILE):
        raise RuntimeError("a mistake of ours")


def test_a_pipe_to_read_from_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"x\.safetensors does not exist: check the path"):
        files.load_tensors(path)
    os.mkfifo(path)
    for each in (path, tmp_path):
        with pytest.raises(UserError, match="is no file: check the path"):
            files.load_tensors(each)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file.json"
    files.write_text(path, json.dumps({"a": 1}))

    def interrupted() -> None:
        with files.atomic(path) as part:
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
        files.write_text(tmp_path / "file", "content")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        files.write_text(tmp_path / "file" / "below", "")


def test_a_limit_on_file_size_leaves_nothing(tmp_path):
    """The writer in Rust meets the limit itself; what was there before stays."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.safetensors"
    files.save_tensors(path, {"x": torch.zeros(10)})
    before = reference.contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            files.save_tensors(path, {"x": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reference.contents(tmp_path) == before


def test_files_written_are_readable_for_others(tmp_path):
    """A temporary file's narrow permissions must not survive."""
    umask = os.umask(0o022)
    try:
        files.write_text(tmp_path / "text", "x")
        files.save_tensors(tmp_path / "tensors.safetensors", {"x": torch.zeros(1)})
    finally:
        os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("other", [lambda weight: weight, lambda weight: weight[:2]], ids=["the same", "a part"])
def test_one_tensor_under_two_names_is_a_sentence(tmp_path, other):
    weight = torch.zeros(3)
    with pytest.raises(
        UserError, match=r"x\.safetensors could not be .*: a and b are one tensor .*: clone one of them"
    ):
        files.save_tensors(tmp_path / "x.safetensors", {"b": weight, "a": other(weight), "c": torch.ones(2)})
    assert not list(tmp_path.iterdir())
    files.save_tensors(tmp_path / "x.safetensors", {"b": weight, "a": other(weight).clone()})
