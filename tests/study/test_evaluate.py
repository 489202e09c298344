"""study/evaluate.py: zero-shot recognition follows CLIP's cosines."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import weights
from cli.evaluate import single
from cli.pictures import save, sheet
from clip import preprocess
from loading.files import UserError
from study import compare, evaluate


def test_names_are_unit_vectors_averaged_over_templates(tiny):
    model = weights.load_model(tiny)
    features = evaluate.name_features(model.clip, model.tokenizer, ["cat", "dog"], ["{}", "a {}"])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    each = F.normalize(model.clip.encode_text(model.tokenizer(["cat", "a cat"])), dim=-1)
    torch.testing.assert_close(features[0], F.normalize(each.mean(dim=0), dim=-1))


def test_recognition_is_the_most_likely_caption_of_clip(tiny):
    model = weights.load_model(tiny)
    names, images = ["cat", "dog", "red heart", "robot"], torch.rand(5, 3, 32, 32) * 2 - 1
    features = evaluate.name_features(model.clip, model.tokenizer, names, ["{}"])
    logits = model.clip(preprocess(images, model.clip.image_size), model.tokenizer(names))
    assert torch.equal(evaluate.recognise(model.clip, images, features), logits.argmax(dim=-1))


def test_style_is_the_sum_over_concepts_of_the_joint_probability(tiny):
    model = weights.load_model(tiny)
    names, styles = ["cat", "dog", "robot"], ["noto", "blob"]
    captions = [f"a {name}, {style} style" for name in names for style in styles]
    features = evaluate.text_features(model.clip, model.tokenizer, captions).unflatten(0, (3, 2))
    images = torch.rand(7, 3, 32, 32) * 2 - 1
    joint = model.clip(preprocess(images, model.clip.image_size), model.tokenizer(captions)).softmax(dim=-1)
    expected = joint.unflatten(1, (3, 2)).sum(dim=1).argmax(dim=-1)
    assert torch.equal(evaluate.recognise_style(model.clip, images, features), expected)


def test_clip_score_is_a_hundredfold_cosine_and_never_negative():
    x = F.normalize(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), dim=-1)
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(evaluate.clip_score(x, y), torch.tensor([60.0, 0.0]))


def test_cmmd_is_zero_for_equal_sets_and_equals_the_double_sum():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(6, 8), dim=-1), F.normalize(torch.randn(5, 8) + 1, dim=-1)
    assert abs(evaluate.cmmd(x, x)) < 1e-9

    def mean_kernel(a, b):
        return sum(torch.exp(-((u - v) ** 2).sum() / 200) for u in a for v in b) / (len(a) * len(b))

    a, b = x.double(), y.double()
    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert abs(evaluate.cmmd(x, y) - expected.item()) < 1e-9
    assert evaluate.cmmd(x, y) > evaluate.cmmd(x, x[:5])


def test_change_is_per_image_and_of_the_range_two():
    black, white = -torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert evaluate.change(torch.cat([black, black]), torch.cat([white, black])).tolist() == [2.0, 0.0]


def test_H_rewards_only_what_succeeds_everywhere():
    """Of what is recognised in captions and in sentences that should be gone, then in groups that should stay."""

    def H(*recognised: int) -> float:
        groups = ("erased", "sentences", "near, listed", "others")
        return compare.H({name: [hits, 10] for name, hits in zip(groups, recognised, strict=False)})

    assert H(0, 0, 10) == 1.0
    assert H(0, 0, 0) == 0.0  # erased everything
    assert H(10, 10, 10) == 0.0  # erased nothing
    assert H(0, 10, 10) == 0.0  # nothing in sentences
    assert abs(H(5, 2, 7, 9) - 3 / (2 + 1.25 + 1.25)) < 1e-12


def test_the_interval_of_a_share_covers_it_as_often_as_it_says():
    """Of all outcomes of 40 draws, weighted by their probability, about 95 % have an interval that holds the truth."""
    for truth in (0.02, 0.3, 0.9):
        coin = torch.distributions.Binomial(40, torch.tensor(truth))
        held = 0.0
        for k in range(41):
            low, high = evaluate.interval(k, 40)
            held += coin.log_prob(torch.tensor(float(k))).exp().item() * (low <= truth <= high)
        assert 0.92 <= held <= 0.99
    low, high = evaluate.interval(0, 16)
    assert low == 0
    assert 0.1 < high < 0.3


# --- Pictures in a folder ----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Four pictures in a folder: prompts of three are in a table, that of one is in a text file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(chance.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "prompt", "seed"], *([f"{i}.png", f'a "{w}", sir', i] for i, w in
                                                                 enumerate(("cat", "dog", "cat")))])  # fmt: skip
    (folder / "3.txt").write_text("a robot\n")
    return folder


def test_a_folder_is_judged_by_the_prompts_of_its_pictures(pictures, tiny_original):
    found = evaluate.read_folder(pictures)
    assert [prompt for _, prompt in found] == ['a "cat", sir', 'a "dog", sir', 'a "cat", sir', "a robot"]
    model, names = weights.load_model(tiny_original), ["cat", "dog"]
    paths = [path for path, _ in found]
    figures = evaluate.judge_folder(model.clip, model.tokenizer, found, names, paths)
    assert abs(figures["cmmd"]) < 1e-9
    images = torch.stack([evaluate.read_image(path, model.clip.image_size) for path in paths])
    seen = evaluate.recognise(model.clip, images, evaluate.name_features(model.clip, model.tokenizer, names)).tolist()
    assert figures["seen"] == {"cat": seen.count(0) / 4, "dog": seen.count(1) / 4}
    assert figures["accuracy"] == sum(a == b for a, b in zip(seen, (0, 1, 0), strict=False)) / 3  # no name in the last
    alone = evaluate.judge_folder(model.clip, model.tokenizer, found, ["cat"], (), ["dog"])
    assert alone["seen"] == {"cat": seen.count(0) / 4}  # the dogs are counted as none
    features = evaluate.image_features(model.clip, images)
    said = evaluate.text_features(model.clip, model.tokenizer, [prompt for _, prompt in found])
    assert figures["clip_score"] == pytest.approx(evaluate.clip_score(features, said).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "names", "asked"),
    [
        ("my bear", ["ear", "bear"], ["bear"]),  # whole words
        ("a Red Heart, sir", ["red heart"], ["red heart"]),
        ("a cat face", ["cat", "cat face", "face"], ["cat face"]),  # not what is in a longer name
        ("a cat and a dog", ["dog", "cat"], ["dog", "cat"]),
        ("nothing of it", ["dog", "cat"], []),
    ],
)
def test_a_prompt_asks_for_the_names_in_it(pictures, tiny_original, monkeypatch, prompt, names, asked):
    """Accuracy with a judge that sees one name, whatever there is to see."""
    model = weights.load_model(tiny_original)
    found = [(path, prompt) for path, _ in evaluate.read_folder(pictures)]
    shares = {}
    for name in names:
        row = torch.nn.functional.one_hot(torch.tensor(names.index(name)), len(names)).float()
        monkeypatch.setattr(evaluate, "name_features", lambda *_: torch.eye(len(names)))
        monkeypatch.setattr(evaluate, "image_features", lambda _, images, row=row: row.expand(len(images), -1))
        monkeypatch.setattr(evaluate, "text_features", lambda _, __, texts: torch.zeros(len(texts), len(names)))
        shares[name] = evaluate.judge_folder(model.clip, model.tokenizer, found, names).get("accuracy")
    assert shares == {name: (name in asked) / len(asked) if asked else None for name in names}


def test_the_command_prints_one_table_and_writes_it(pictures, tiny_original, run, monkeypatch):
    detector = SimpleNamespace(detect=lambda path: [{"class": "BELLY_EXPOSED", "score": 0.7 - 0.2 * ("0" in path[-5])}])
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=lambda: detector))
    out = pictures.parent / "figures.json"
    names = ("--name", "cat", "--name", "dog")
    code, said = run("evaluate", str(pictures), *names, "--nudity", "--json", str(out))
    assert code == 0, said
    figures = json.loads(out.read_text())
    assert figures["images"] == 4
    assert figures["nudity"]["BELLY_EXPOSED"] == 3  # one below the threshold
    assert figures["nude_pictures"] == 0.75
    assert "clip_score" in said


def test_bad_folders_are_refused_in_one_sentence(pictures, run, tmp_path):
    (tmp_path / "one").write_text("cat\n")
    for one in (("--name", "cat"), ("--names", str(tmp_path / "one"))):
        code, said = run("evaluate", str(pictures), *one)
        assert (code, "every picture is taken for 'cat'" in said) == (2, True)
    (tmp_path / "empty").mkdir()
    for folder, words in (("empty", "holds no pictures"), ("nowhere", "is no folder")):
        code, said = run("evaluate", str(tmp_path / folder))
        assert (code, said.count("\n")) == (2, 1)
        assert words in said
    code, said = run("evaluate", str(pictures), "--fid")
    assert (code, "--reference" in said) == (2, True)
    (pictures / "3.txt").unlink()
    with pytest.raises(UserError, match=r"no prompt for 3\.png"):
        evaluate.read_folder(pictures)
    (pictures / "3.txt").write_text("x")
    (pictures / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="is no picture"):
        evaluate.read_image(pictures / "3.png", 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,text\n0.png,a cat\n", "has no column 'prompt'"),
        ('file,prompt\n0.png,"a cat\n', "is no CSV"),
        ("file,prompt\n0.png,\n", "no prompt for 0.png"),
    ],
)
def test_a_spoilt_table_of_prompts_is_named(pictures, run, text, words):
    (pictures / "prompts.csv").write_text(text)
    code, said = run("evaluate", str(pictures))
    assert (code, said.count("\n")) == (2, 1)
    assert words in said


def test_what_is_not_installed_is_named_before_anything_is_judged(pictures, run, monkeypatch):
    monkeypatch.setattr("cli.evaluate.read_folder", lambda *_: pytest.fail("read the pictures"))
    for option, module, package in ("--nudity", "nudenet", "nudenet"), ("--fid", "cleanfid.fid", "clean-fid"):
        monkeypatch.setitem(sys.modules, module, None)
        code, said = run("evaluate", str(pictures), option, "--reference", str(pictures))
        assert (code, f"pip install {package}" in said) == (2, True)


def test_fid_and_kid_are_those_of_clean_fid_on_both_folders(pictures, run, monkeypatch):
    asked = []
    fake = SimpleNamespace(
        compute_fid=lambda *folders: asked.append(folders) or 12.5,
        compute_kid=lambda *folders: asked.append(folders) or 3,
    )
    monkeypatch.setitem(sys.modules, "cleanfid", SimpleNamespace(fid=fake))
    monkeypatch.setitem(sys.modules, "cleanfid.fid", fake)
    code, said = run("evaluate", str(pictures), "--fid", "--reference", str(pictures), "--json", "f.json")
    assert code == 0, said
    assert asked == [(str(pictures), str(pictures))] * 2
    figures = json.loads(Path("f.json").read_text())
    assert (figures["fid"], figures["kid"], abs(figures["cmmd"]) < 1e-9) == (12.5, 3, True)


def test_pictures_of_generate_say_their_prompt(tmp_path):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save(sheet({"": picture[None]}), tmp_path / "0001.png", {"prompt": "a red heart"})
    save(sheet({"": picture[None]}), tmp_path / "plain.png")
    assert evaluate.drawn_with(tmp_path / "0001.png") == {"prompt": "a red heart"}
    (tmp_path / "plain.txt").write_text("a crab")
    assert [prompt for _, prompt in evaluate.read_folder(tmp_path)] == ["a red heart", "a crab"]
    damaged = bytearray((tmp_path / "0001.png").read_bytes())
    damaged[damaged.index(b"IDAT") - 4 :] = b"\0\0\0\4IDA\0" + bytes(8)  # no such kind of chunk
    (tmp_path / "0001.png").write_bytes(damaged)
    assert evaluate.drawn_with(tmp_path / "0001.png") == {}
    with pytest.raises(UserError, match="is no picture"):
        evaluate.read_image(tmp_path / "0001.png", 32)


def test_a_file_of_one_picture_has_the_prompt_of_the_table_and_sheets_of_several_their_own(tmp_path):
    images = torch.zeros(2, 3, 64, 64)
    save(sheet({"": images[:1]}, ["a cat"]), tmp_path / "1.png", {"prompt": "a cat", "prompts": ["a cat"]})
    save(sheet({"": images}, ["a", "b"]), tmp_path / "2.png", {"prompt": "a", "prompts": ["a", "b"]})
    (tmp_path / "prompts.csv").write_text("file,prompt\n1.png,a crab\n2.png,a crab\n")
    one, two = (single(path, prompt, tmp_path) for path, prompt in evaluate.read_folder(tmp_path))
    assert [[prompt for _, prompt in found] for found in (one, two)] == [["a crab"], ["b", "a"]]
    assert all(evaluate.read_image(path, 8).abs().max() < 0.01 for path, _ in one + two)  # no heading


@pytest.mark.parametrize(
    "said",
    [{"cell": cell} for cell in (5, None, "32", [32], [0, 32], [-8, 8], [8.0, 8], [True, 8], [99, 8])]
    + [{"prompts": prompts} for prompts in (5, None, "a", {"a": 1}, [1])]
    + [{"steps": 20}],  # of an earlier version, which did not say what it holds
)
def test_metadata_that_generate_cannot_have_written_is_passed_over(tmp_path, said):
    info = PngInfo()
    info.add_itxt("cpe", json.dumps({"prompt": "a cat"} | said))
    Image.new("RGB", (32, 40)).save(tmp_path / "x.png", pnginfo=info)
    assert evaluate.drawn_with(tmp_path / "x.png") == {}
    assert single(tmp_path / "x.png", "a dog", tmp_path) == [(tmp_path / "x.png", "a dog")]


def test_nonsense_of_any_depth_is_passed_over(tmp_path):
    info = PngInfo()
    info.add_itxt("cpe", "[" * 100_000)
    Image.new("RGB", (32, 40)).save(tmp_path / "x.png", pnginfo=info)
    assert evaluate.drawn_with(tmp_path / "x.png") == {}


def test_a_sheet_without_prompts_of_its_own_has_that_of_the_folder(tmp_path):
    info = PngInfo()
    info.add_itxt("cpe", json.dumps({"prompt": "a cat", "cell": [32, 32]}))
    Image.new("RGB", (32, 40)).save(tmp_path / "x.png", pnginfo=info)
    ((path, prompt),) = single(tmp_path / "x.png", "a cat", tmp_path)
    with Image.open(path) as image:
        assert (image.size, prompt) == ((32, 32), "a cat")
