"""loading/cache.py: contexts are encoded once."""

import json

import pytest
import torch
from tiny import change

from loading import cache, files
from weights import Model, load_model


def test_a_second_target_finds_its_anchors_in_the_cache(tiny, monkeypatch):
    model = load_model(tiny)
    prompts = [f"a picture of {i} cats" for i in range(10)]
    first = cache.cached_contexts(model, prompts, chunk=4)
    assert first.dtype == torch.float16
    assert torch.equal(first, model.encode(prompts).half())
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("encoded again"))
    assert torch.equal(cache.cached_contexts(model, prompts, chunk=4), first)


def test_what_is_missing_is_encoded_together_and_stored_apart(tiny, monkeypatch):
    """The words of one target share some with those of another: only the others are encoded, in one batch."""
    model, asked = load_model(tiny), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **more: asked.append(texts) or encode(texts, **more))
    words = [f"a {name}" for name in ("cat", "dog", "cow", "fox", "hen", "owl")]
    cache.cached_contexts(model, words[2:4], chunk=2)
    found = cache.cached_contexts(model, words, chunk=2)
    assert asked == [words[2:4], words[:2] + words[4:]]
    torch.testing.assert_close(found, encode(words).half(), rtol=0, atol=2e-3)


def test_paddings_that_repeat_one_are_stored_once(tiny, monkeypatch):
    """What is read briefly comes back whole, and is no answer to who asks for all paddings."""
    model, prompts = load_model(tiny), ["a cat read briefly", "dog", "three dogs and a cat"]
    briefly, whole = cache.cached_contexts(model, prompts, briefly=True), cache.cached_contexts(model, prompts)
    assert torch.equal(briefly, model.encode(prompts, briefly=True).half())
    assert briefly.shape == whole.shape
    assert not torch.equal(briefly, whole)
    stored = cache.stored(cache.path_of(model, prompts, briefly=True))
    longest = max(len(model.tokenizer.ids(prompt)) for prompt in prompts)
    assert stored.shape[1] == 1 + longest + 1 + Model.paddings
    encode, other = model.encode, load_model(tiny)
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("encoded again"))
    assert torch.equal(cache.cached_contexts(model, prompts, briefly=True), briefly)
    monkeypatch.setattr(Model, "paddings", 2)
    assert torch.equal(cache.cached_contexts(other, prompts, briefly=True), other.encode(prompts, briefly=True).half())
    assert not torch.equal(encode(prompts, briefly=True).half(), briefly)


def test_a_damaged_cache_is_made_anew(tiny):
    model = load_model(tiny)
    first = cache.cached_contexts(model, ["a damaged entry"])
    for path in cache.cache_folder().glob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert torch.equal(cache.cached_contexts(model, ["a damaged entry"]), first)


def test_a_setting_of_a_text_encoder_that_changes_nothing_leaves_the_cache_as_it_is(tiny, monkeypatch):
    first = cache.cached_contexts(load_model(tiny), ["a cat of any version"])
    change(tiny, "text_encoder", transformers_version="4.0")
    model = load_model(tiny)
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("encoded again"))
    assert torch.equal(cache.cached_contexts(model, ["a cat of any version"]), first)


def test_a_cache_that_cannot_be_written_costs_time_alone(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "file"))
    model = load_model(tiny)
    assert torch.equal(cache.cached_contexts(model, ["a cat"]), model.encode(["a cat"]).half())


def test_another_tokenizer_is_another_context(tiny):
    first = cache.cached_contexts(load_model(tiny), ["a cat"])
    path = tiny / "tokenizer/vocab.json"
    words = files.read_json(path)
    words["cat</w>"], words["dog</w>"] = words["dog</w>"], words["cat</w>"]
    files.write_text(path, json.dumps(words))
    assert not torch.equal(cache.cached_contexts(load_model(tiny), ["a cat"]), first)
