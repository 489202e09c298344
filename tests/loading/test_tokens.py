"""loading/tokens.py: a tokenizer's folder is read whole, or refused."""

import json
import re

import pytest
import torch

import weights
from loading import cache, files
from loading.files import UserError
from loading.tokens import TOKENIZER
from weights import load_model


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_missing_or_broken_tokenizer_is_named(tiny, file):
    path = tiny / "tokenizer" / file
    path.write_text("{}" if file == "vocab.json" else "only three words")
    with pytest.raises(UserError, match="tokenizer"):
        _ = load_model(tiny).encode(["x"])
    path.unlink()
    with pytest.raises(UserError, match=file):
        _ = load_model(tiny).encode(["x"])


def test_a_tokenizer_in_one_file_is_read_and_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))
    model = load_model(tiny)
    texts = ["a cat", "Two dogs, here"]
    expected, context = model.tokenizer(texts), model.encode(texts)
    vocab, merges = ((tiny / "tokenizer" / file).read_text(encoding="utf-8") for file in TOKENIZER)
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    for file in TOKENIZER:
        (tiny / "tokenizer" / file).unlink()
    for pairs in (lines, [line.split() for line in lines]):  # as older and newer versions write them
        said = {"model": {"vocab": json.loads(vocab), "merges": pairs}, "added_tokens": [{"content": "<|endoftext|>"}]}
        files.write_text(tiny / "tokenizer/tokenizer.json", json.dumps(said))
        again = load_model(weights.save_model(load_model(tiny), tmp_path / f"copy-{len(pairs[0])}"))
        assert torch.equal(again.tokenizer(texts), expected)
        assert torch.equal(again.encode(texts), context)
        assert torch.equal(cache.cached_contexts(again, texts), context.half())
    said["added_tokens"].append({"content": "<mine>"})
    files.write_text(tiny / "tokenizer/tokenizer.json", json.dumps(said))
    with pytest.raises(UserError, match=r"tokenizer.json adds the word '<mine>'"):
        _ = load_model(tiny).tokenizer
    files.write_text(tiny / "tokenizer/tokenizer.json", "{}")
    with pytest.raises(UserError, match="could not be read"):
        _ = load_model(tiny).tokenizer


def test_words_added_to_a_vocabulary_are_refused(tiny):
    files.write_text(tiny / "tokenizer/added_tokens.json", json.dumps({"<|endoftext|>": 1}))
    assert load_model(tiny).tokenizer
    files.write_text(tiny / "tokenizer/added_tokens.json", json.dumps({"<mine>": 49408}))
    with pytest.raises(UserError, match=r"added_tokens.json adds the word '<mine>'"):
        _ = load_model(tiny).tokenizer


@pytest.mark.parametrize(
    ("file", "said", "words"),
    [
        ("tokenizer_config.json", {"pad_token": "!"}, "pad_token is '!', and only '<|endoftext|>' is implemented"),
        ("special_tokens_map.json", {"pad_token": {"content": "!"}}, "pad_token is '!'"),
        ("tokenizer_config.json", {"model_max_length": 64}, "model_max_length is 64, but the text encoder reads 77"),
    ],
)
def test_another_padding_or_length_is_refused(tiny, file, said, words):
    good = {"pad_token": {"content": "<|endoftext|>"}, "model_max_length": 77}
    files.write_text(tiny / "tokenizer" / file, json.dumps(good))
    assert load_model(tiny).tokenizer
    files.write_text(tiny / "tokenizer" / file, json.dumps(good | said))
    with pytest.raises(UserError, match=re.escape(words)):
        _ = load_model(tiny).tokenizer
