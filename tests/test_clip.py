"""clip.py: the tokenizer, the text tower and the vision tower."""

import gzip
import json
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

import clip

HERE = Path(__file__).parent
FOLDER = HERE.parent / "emoji" / "tokenizer"

TEXTS = [
    "a photo of a cat",
    "A Photo Of A CAT",
    "  two\tspaces \n and   lines ",
    "it's we've they'll I'm don't you'd they're IT'S",
    "3 cats, 12 dogs and 2024 years",
    "café naïve Ångström Édith cafe\u0301 İstanbul STRASSE straße",
    "🐱 a cat 👩‍🚀 🇫🇷 👍🏽!",
    "кошка 猫 고양이 قطة γάτα ไทย हिन्दी",
    'odd punctuation: (a), [b]... "c" — d/e_f #g @h $5 50% a&b',
    "<|endoftext|> a <|startoftext|>cat<|endoftext|>",
    "non\u00a0breaking\u2003space\u200bzero",
    "",
    "   ",
    "\x00\x1f",
    "ﬁne ½ ① ™ Ａ k㎝ Ⅷ Σίσυφος ς",  # what NFKC would replace; a final sigma
]

# The first merges of the vocabulary of OpenAI's CLIP, and so of SD 1.4 ...
MERGES = """
i n | t h | a n | r e | a r | e r | th e</w> | in g</w> | o u | o n | s t | o r | e n | o n</w> | a l | a t | e r</w> |
i t | i n</w> | t o</w> | r o | i s</w> | l e | i c | a t</w> | an d</w> | e d</w> | o f</w> | c h | o r</w> | e s</w> |
i l | e l | s t</w> | a c | o m | a m | l o | a n</w> | a y</w> | s h | r i | l i | t i | f or</w> | n e | ð Ł | r a |
h a | d e | o l | v e</w> | s i | u r | a l</w> | s e | ' s</w> | u n | d i
"""
# ... and the ids of TEXTS in a vocabulary of only these, as transformers 5.24 has them: of bytes, and of whole words
# where the merges suffice (320, 539 and 536 are "a", "of" and "at" as everybody's SD 1.4 has them). Printed by
# CLIPTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"], of the folder that `beginning` is.
IDS = """
320 79 71 78 531 539 320 66 536 | 320 79 71 78 531 539 320 66 536 | 83 86 334 82 79 546 542 537 75 512 542 |
72 339 568 86 324 6 563 513 68 344 6 75 331 328 6 332 67 525 6 339 88 78 340 6 323 513 68 344 6 81 324 72 339 568 |
274 66 527 338 267 272 273 67 78 70 338 537 273 271 273 275 88 68 516 338 |
66 64 69 127 358 77 64 127 107 563 127 98 77 70 522 81 127 114 332 127 102 67 529 327 66 64 69 127 358 328 136 485 522
514 65 84 331 522 559 82 82 324 522 559 127 253 324 |
558 238 365 320 66 536 558 239 102 158 222 235 558 248 478 558 229 104 558 229 371 558 239 235 558 237 121 256 |
140 118 140 122 141 230 140 118 140 364 163 234 360 166 111 254 168 244 239 168 251 368 149 224 148 115 148 358
138 111 138 105 139 226 138 365 156 117 226 156 116 245 156 116 351 156 97 373 156 97 379 156 97 357 156 98 491 156 97
355 156 98 478 |
78 67 323 79 569 66 83 84 527 72 525 281 263 320 8 267 314 321 60 13 13 269 257 322 257 158 222 498 323 270 324 318 325
258 326 287 327 259 276 276 271 260 320 261 321 |
572 320 571 66 536 572 | 77 525 65 515 64 74 519 82 79 546 324 158 222 489 89 517 334 | | | 188 475 |
171 105 223 77 324 126 377 158 239 510 158 226 351 171 121 479 330 159 236 507 158 227 371 139 225 138 107 139 225 139
227 139 228 138 123 139 480 139 480
"""
STORED = [[int(word) for word in row.split()] for row in IDS.split("|")]


def write_vocabulary(folder, merges):
    """The two files of a CLIP vocabulary that has these merges, numbered as OpenAI's."""
    symbols = list(pre_tokenizers.ByteLevel.alphabet())
    # The bytes that print stand for themselves and come first; the others are numbered from U+0100.
    symbols.sort(key=lambda c: (ord(c) >= 256, ord(c)))
    symbols += [f"{c}</w>" for c in symbols]
    symbols += [pair.replace(" ", "") for pair in merges] + [clip.BOS, clip.EOS]
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """A folder with the beginning of the official vocabulary."""
    return write_vocabulary(tmp_path_factory.mktemp("beginning"), [pair.strip() for pair in MERGES.split("|")])


@pytest.fixture(scope="module")
def tokenizer():
    return clip.Tokenizer(FOLDER / "vocab.json", FOLDER / "merges.txt")


@pytest.fixture(scope="module")
def theirs():
    (tokenizer,) = tiny.reference("transformers", "CLIPTokenizer")
    return tokenizer.from_pretrained(FOLDER)


def test_tokenizer_pads_with_eos_to_77(tokenizer):
    ids = tokenizer(["a cat", ""])
    words = tokenizer.ids("a cat")
    assert ids.shape == (2, 77)
    assert ids.dtype == torch.long
    assert ids[0].tolist() == [tokenizer.bos, *words] + [tokenizer.eos] * (76 - len(words))
    assert ids[1].tolist() == [tokenizer.bos] + [tokenizer.eos] * 76
    assert tokenizer([]).shape == (0, 77)


def test_tokenizer_ignores_case_and_white_space(tokenizer):
    assert tokenizer.ids("A\tPhoto \n of  a CAT ") == tokenizer.ids("a photo of a cat")


def test_tokenizer_composes_accents(tokenizer):
    assert tokenizer.ids("cafe\u0301") == tokenizer.ids("café")


def test_tokenizer_splits_contractions_and_digits(tokenizer):
    assert tokenizer.ids("it's") == tokenizer.ids("it") + tokenizer.ids("'s")
    assert tokenizer.ids("2024") == [i for digit in "2024" for i in tokenizer.ids(digit)]


@pytest.mark.parametrize(("text", "ids"), list(zip(TEXTS, STORED, strict=True)))
def test_tokenizer_gives_the_stored_ids(beginning, text, ids):
    assert clip.Tokenizer(beginning / "vocab.json", beginning / "merges.txt").ids(text) == ids


def test_tokens_are_readable(tokenizer):
    assert "".join(tokenizer.tokens(" A photo  of a cat")) == "Aphotoofacat"
    shown = tokenizer.tokens("pokémon, 猫")  # not the bytes that byte pairs are made of
    assert {letter for token in shown for letter in token} == set("pokémon,猫")


def test_long_prompt_is_cut_with_a_warning_that_shows_what(tokenizer):
    with pytest.warns(UserWarning, match="prompt cut at 75 tokens.*'7 and Unread'"):
        ids = tokenizer(["1" * 75 + "7 and Unread"])
    assert ids[0].tolist() == [tokenizer.bos, *tokenizer.ids("1" * 75), tokenizer.eos]


def test_75_tokens_fit_without_a_warning(tokenizer):
    assert tokenizer(["1" * 75])[0, -2:].tolist() == [tokenizer.ids("1")[0], tokenizer.eos]


def test_tokenizer_refuses_other_files(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match="not a CLIP vocabulary"):
        clip.Tokenizer(tmp_path / "vocab.json", FOLDER / "merges.txt")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match=r"merges \('a', 'b', 'c'\) into a word that .* does not have"):
        clip.Tokenizer(FOLDER / "vocab.json", tmp_path / "merges.txt")
    longest = max(json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8")), key=len)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{longest} a\n")  # which the library panics at
    with pytest.raises(ValueError, match=r"into a word that .* does not have"):
        clip.Tokenizer(FOLDER / "vocab.json", tmp_path / "merges.txt")


def test_sd14_text_encoder_has_the_official_size():
    with torch.device("meta"):
        assert tiny.size(clip.TextEncoder(tiny.SD14_TEXT)) == (196, 123_060_480)


def test_vit_large_has_the_official_size():
    with torch.device("meta"):
        assert tiny.size(clip.CLIP(tiny.VIT_LARGE)) == (590, 427_616_513)


def test_text_tower_equals_the_stored_reference():
    stored = load_file(HERE / "reference.safetensors")["text"]
    ours = tiny.filled(clip.TextEncoder(tiny.TEXT))
    assert tiny.difference(ours(tiny.tokens(60)), stored) <= 1e-5


def test_both_towers_equal_the_stored_reference():
    stored = load_file(HERE / "reference.safetensors")["clip"]
    ours = tiny.filled(clip.CLIP(tiny.CLIP))
    assert tiny.difference(ours(tiny.draw("images", 2, 3, 16, 16), tiny.tokens(60)), stored) <= 1e-5


def test_text_tower_is_causal():
    ours, ids = tiny.filled(clip.TextEncoder(tiny.TEXT)), tiny.tokens(60)
    changed = ids.clone()
    changed[:, 5:] = 1
    assert torch.allclose(ours(ids)[:, :5], ours(changed)[:, :5], atol=1e-6)
    assert not torch.allclose(ours(ids)[:, 5:], ours(changed)[:, 5:], atol=1e-3)


def test_preprocess_normalises_and_resizes():
    grey = torch.zeros(1, 3, 16, 16)
    expected = (0.5 - torch.tensor(clip.IMAGE_MEAN)) / torch.tensor(clip.IMAGE_STD)
    for size in (8, 16, 32):
        out = clip.preprocess(grey, size)
        assert out.shape == (1, 3, size, size)
        assert torch.allclose(out.mean(dim=(0, 2, 3)), expected, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_equals_transformers(tokenizer, theirs, text):
    expected = theirs(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert tokenizer([text])[0].tolist() == expected


@pytest.mark.oracle
def test_the_stored_ids_are_those_of_transformers(beginning):
    (make,) = tiny.reference("transformers", "CLIPTokenizer")
    theirs = make.from_pretrained(beginning)
    assert [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == STORED


@pytest.mark.oracle
@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_tokenizer_equals_transformers_on_any_text(tokenizer, theirs, text):
    assert tokenizer.ids(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.oracle
def test_cut_prompt_equals_transformers(tokenizer, theirs):
    prompt = "a very long story of " * 40
    expected = theirs(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
    with pytest.warns(UserWarning, match="prompt cut"):
        assert tokenizer([prompt])[0].tolist() == expected


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with the vocabulary of OpenAI's CLIP and so of SD 1.4, derived from the file of merges it came as."""
    try:
        package = metadata.distribution("open_clip_torch")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the official vocabulary: pip install --no-deps open_clip_torch")
    packed = package.locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(Path(packed).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    return write_vocabulary(tmp_path_factory.mktemp("official"), merges)


@pytest.mark.oracle
def test_the_official_vocabulary(official):
    """Ids as everybody's SD 1.4 has them, and transformers' on texts of every kind."""
    ours = clip.Tokenizer(official / "vocab.json", official / "merges.txt")
    assert (ours.bos, ours.eos) == (49406, 49407)
    assert ours.ids("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert ours.ids("a photograph of an astronaut riding a horse") == [320, 8853, 539, 550, 18376, 6765, 320, 4558]
    (make,) = tiny.reference("transformers", "CLIPTokenizer")
    theirs = make.from_pretrained(official)
    for text in [*TEXTS, "a portrait of Brad Pitt", "Van Gogh, Kelly McKernan, Thomas Kinkade", "R2-D2"]:
        assert ours.ids(text) == theirs(text, add_special_tokens=False)["input_ids"]


def texts(ours, theirs, ids):
    return [(ours(ids), theirs(input_ids=ids).last_hidden_state)]


def features(ours, theirs, ids, images):
    """Of CLIP: the vision tower at its end and projected, the text tower projected, and the logits."""
    vision = theirs.vision_model(pixel_values=images).pooler_output
    text = theirs.text_model(input_ids=ids).pooler_output
    return [
        (ours.vision_model(images), vision),
        (ours.encode_image(images), theirs.visual_projection(vision)),
        (ours.encode_text(ids), theirs.text_projection(text)),
        (ours(images, ids), theirs(input_ids=ids, pixel_values=images).logits_per_image),
    ]


@pytest.mark.oracle
@pytest.mark.parametrize("length", [9, 77])
@pytest.mark.parametrize("change", [{}, {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6}])
def test_text_tower_equals_transformers(change, length):
    config = {**tiny.TEXT, **change}
    ours = tiny.filled(clip.TextEncoder(config))
    tiny.assert_same(ours, tiny.their_text(config, ours), texts, tiny.tokens(60, length))


@pytest.mark.oracle
@pytest.mark.parametrize("change", [{}, {"patch_size": 8, "num_hidden_layers": 3}])
def test_both_towers_equal_transformers(change):
    config = {**tiny.CLIP, "vision_config": {**tiny.VISION, **change}}
    ours = tiny.filled(clip.CLIP(config))
    inputs = tiny.tokens(60), tiny.draw("images", 2, 3, 16, 16)
    tiny.assert_same(ours, tiny.their_clip(config, ours), features, *inputs)


@pytest.mark.oracle
@pytest.mark.slow
def test_sd14_text_encoder_equals_transformers():
    ours = tiny.filled(clip.TextEncoder(tiny.SD14_TEXT))
    tiny.assert_same(ours, tiny.their_text(tiny.SD14_TEXT, ours), texts, tiny.tokens(49408, 77))


@pytest.mark.oracle
@pytest.mark.slow
def test_vit_large_equals_transformers():
    """Both towers of the CLIP that evaluates Stable Diffusion, openai/clip-vit-large-patch14."""
    ours = tiny.filled(clip.CLIP(tiny.VIT_LARGE))
    inputs = tiny.tokens(49408, 77), tiny.draw("images", 2, 3, 224, 224)
    # In float32 products are made in another order than theirs: 1e-5 is asked for; in float64 they are the same.
    tiny.assert_same(ours, tiny.their_clip(tiny.VIT_LARGE, ours), features, *inputs)
