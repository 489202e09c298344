"""emoji/make.py: stopped trainings go on as if they never had been, from nothing is from nothing, CLIP sees colours."""

import importlib.util
import json
import random
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT
from torch import nn

NAMES = ["banana", "pizza", "rocket", "ghost", "cat", "dog", "tree", "key"]  # CLIP's batches of colours hold 8 or more


@pytest.fixture
def make(tmp_path, monkeypatch):
    """The program as a module, beside nothing but eight names: all that it reads and writes is the test's own."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "emoji" / "make.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make", module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    here = tmp_path / "emoji"
    here.mkdir()
    (here / "concepts.txt").write_text("\n".join(NAMES))
    monkeypatch.setattr(module, "HERE", here)
    module.work_in(here)
    return module


@pytest.fixture
def data(make, monkeypatch):
    """Noise for icons, a tokenizer of eight names, little to measure on; recipes whose rate depends on no budget."""
    monkeypatch.setattr(make, "package_file", lambda *_: {})
    monkeypatch.setattr(make, "SENTENCES", 100)
    monkeypatch.setattr(make, "MORE", 20)
    monkeypatch.setattr(make, "JOINED", 100)
    monkeypatch.setattr(make, "FITTED", 3)
    monkeypatch.setattr(make, "psnr", partial(make.psnr, count=4))
    monkeypatch.setattr(make, "measure_latents", partial(make.measure_latents, count=16))
    batches, rest = {"clip": 8, "sentences": 4, "vae": 2, "unet": 4}, (1e-3, 0.01, (0.9, 0.99), 0.9, 1.0 - 1e-9, 1)
    recipes = {name: make.Recipe(2 * size, size, *rest) for name, size in batches.items()}
    monkeypatch.setattr(make, "RECIPES", recipes)

    def noise() -> None:
        shape = (len(NAMES), len(make.STYLES), make.TRAINED + make.HELD_OUT, make.SIZE, make.SIZE, 4)
        icons = torch.randint(256, shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
        make.save({"icons": icons}, make.BUILD / "icons.safetensors")

    monkeypatch.setattr(make, "make_data", noise)


@pytest.fixture
def ready(make, data):
    """Everything that the trainings need, the U-Net's caches too."""
    make.make_data()
    make.make_tokenizer()
    make.save({"scale": torch.tensor(1.0)}, make.BUILD / "latents.safetensors")
    torch.manual_seed(0)
    judge = make.clip.CLIP(make.clip_config())
    make.write_model("clip", judge, make.clip_config(), "model")
    make.export_text_encoder(judge.text_model)
    make.write_model("vae", make.vae.VAE(make.vae_config()), make.vae_config(1.0))


def training(make, samples: int):
    """A network whose parameters are not in alphabetical order and have several shapes; some lie channels-last."""
    torch.manual_seed(0)
    network = nn.Sequential()
    network.add_module("second", nn.Conv2d(3, 5, 3))
    network.add_module("first", nn.Conv2d(5, 2, 1))
    network.to(memory_format=torch.channels_last)

    def loss(size: int, chance: torch.Generator) -> torch.Tensor:
        return network(torch.randn(size, 3, 4, 4, generator=chance)).square().mean()

    make.EXPORTED["small"] = "small/model.safetensors"
    recipe = make.Recipe(samples, 4, 1e-2, 0.01, (0.9, 0.99), 0.9, 1.0 - 1e-9, 1)
    return make.Training("small", network, loss, recipe)


def test_a_stopped_training_goes_on_to_the_same_weights(make):
    whole = training(make, 40)
    list(whole)
    whole.path.unlink()
    list(training(make, 20))
    resumed = training(make, 40)
    assert resumed.seen == 20
    list(resumed)
    for ours, theirs in ((resumed.network.state_dict(), whole.network.state_dict()), (resumed.average, whole.average)):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [path.name for path in make.BUILD.iterdir()] == ["small.safetensors"]


@pytest.mark.parametrize("name", ["clip", "sentences", "vae", "unet"])
def test_every_network_goes_on_to_the_same_weights(make, ready, name):
    path = make.BUILD / f"{name}.safetensors"
    size = make.RECIPES[name].batch
    if name == "sentences":
        make.cache_meanings()
    (make.OUT / make.EXPORTED[name]).unlink(missing_ok=True)  # from random weights
    make.train(name, 3 * size)
    whole = load_file(path)
    for file in (path, make.OUT / make.EXPORTED[name]):
        file.unlink(missing_ok=True)
    make.train(name, size)
    make.train(name, 3 * size)
    resumed = load_file(path)
    assert list(resumed) == list(whole)
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []


def test_no_batch_comes_twice(make, ready, monkeypatch):
    drawn, draw = [], make.any_pictures
    monkeypatch.setattr(make, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(make, "any_pictures", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    make.train("vae", 8)  # a checkpoint, and so a measurement, after every step
    make.train("vae", 12)
    (make.BUILD / "vae.safetensors").rename(make.BUILD / "before.safetensors")
    weights = make.part_of(load_file(make.BUILD / "before.safetensors"), "average.")
    make.save(weights, make.OUT / make.EXPORTED["vae"])
    make.train("vae", 2)  # on from exported weights, without a checkpoint
    assert len(drawn) == 7
    assert len({batch.numpy().tobytes() for batch in drawn}) == len(drawn)


def test_a_checkpoint_without_random_numbers_begins_new_ones(make):
    first = training(make, 4)
    list(first)
    tensors = load_file(first.path)
    del tensors["chance"]
    save_file(tensors, first.path, {"seen": "4", "seconds": "1.0"})
    again = training(make, 8)
    assert again.seen == 4
    assert not torch.equal(again.chance.get_state(), training(make, 8).chance.get_state())


def test_measuring_draws_from_no_common_stream(make, ready):
    pictures, before = make.Pictures(), torch.get_rng_state()
    judge, autoencoder = make.clip.CLIP(make.clip_config()), make.vae.VAE(make.vae_config())
    torch.set_rng_state(before)
    figures = make.psnr(autoencoder, pictures), make.zero_shot_renders(judge, pictures)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert figures == (make.psnr(autoencoder, pictures), make.zero_shot_renders(judge, pictures))


def test_exported_weights_are_trained_on_and_an_empty_folder_begins_at_random(make, tmp_path):
    at_random = training(make, 4).average
    exported = {name: torch.full_like(tensor, 0.5).half() for name, tensor in at_random.items()}
    make.save(exported, make.OUT / "small" / "model.safetensors")
    assert all((tensor == 0.5).all() for tensor in training(make, 4).network.state_dict().values())
    make.work_in(tmp_path / "elsewhere")
    state = training(make, 4).network.state_dict()
    assert all(torch.equal(state[name], at_random[name]) for name in at_random)


class InThisProcess:
    """In place of subprocess.Popen: runs make.py with the same arguments, in this module."""

    def __init__(self, make, command: list[str], env: dict):
        assert command[1] == make.__file__
        with pytest.MonkeyPatch.context() as patch:
            self.code = run(make, patch, *command[2:])

    def wait(self) -> int:
        return self.code


def run(make, monkeypatch, *arguments: str) -> int:
    """The command line; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["make.py", *arguments])
    return make.main()


def files(folder) -> dict[str, bytes]:
    """Every file under a folder and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def threads():
    """The number of threads as it was."""
    before = torch.get_num_threads()
    yield str(before)
    torch.set_num_threads(before)


def test_from_nothing_the_whole_model_is_made_in_a_folder_of_its_own(
    make, data, monkeypatch, tmp_path, threads, capsys
):
    before = {"concepts.txt": "\n".join(NAMES).encode()}
    monkeypatch.setattr(make.subprocess, "Popen", lambda command, env: InThisProcess(make, command, env))
    monkeypatch.setattr(
        make, "generate", lambda prompts, _=0, wide=False, *__: torch.zeros(len(prompts), 3, 64, 64 * (1 + wide))
    )
    new = tmp_path / "new"
    assert run(make, monkeypatch, "all", "--out", str(new), "--threads", threads) == 0
    assert files(make.HERE) == before
    parts = json.loads((new / "model_index.json").read_text())
    assert all((new / part).is_dir() for part, (library, _) in dict(list(parts.items())[1:-1]).items() if library)
    tower = make.part_of(load_file(new / "clip" / "model.safetensors"), "text_model.")
    encoder = make.part_of(load_file(new / "text_encoder" / "model.safetensors"), "text_model.")
    assert encoder.keys() == tower.keys()
    assert all(torch.equal(encoder[name], tower[name]) for name in tower)
    out = capsys.readouterr().out
    assert all(f"{name} {recipe.samples} samples" in out for name, recipe in make.RECIPES.items())
    trained = files(new)
    assert run(make, monkeypatch, "all", "--out", str(new), "--threads", threads) == 0
    assert "samples" not in capsys.readouterr().out  # the second time nothing is left to train
    assert files(new) == trained


@pytest.mark.parametrize(
    ("command", "first"), [("export", "unet"), ("vae", "data"), ("clip", "tokenizer"), ("evaluate", "data")]
)
def test_a_step_too_early_names_the_one_to_run_first(make, monkeypatch, tmp_path, threads, capsys, command, first):
    new = tmp_path / "new folder"
    assert run(make, monkeypatch, command, "--out", str(new), "--threads", threads) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"run `python emoji/make.py {first} --out '{new}'` first" in error


def test_after_the_vae_alone_export_says_what_is_missing(make, ready, monkeypatch, threads, capsys):
    (make.BUILD / "latents.safetensors").unlink()
    make.train("vae", 2)
    before = files(make.OUT)
    assert run(make, monkeypatch, "export", "--threads", threads, "--out", str(make.OUT)) == 2
    assert capsys.readouterr().err.endswith("run `python emoji/make.py unet` first\n")
    assert files(make.OUT) == before


def test_a_file_can_be_no_folder_of_a_model(make, monkeypatch, tmp_path, threads, capsys):
    (tmp_path / "file").write_text("")
    assert run(make, monkeypatch, "export", "--out", str(tmp_path / "file"), "--threads", threads) == 2
    assert "give another one" in capsys.readouterr().err


def test_the_loss_of_colours_is_least_where_features_point_at_their_colour(make):
    colours = torch.arange(len(make.COLOURS))
    right = torch.eye(12)[colours]
    assert make.colour_loss(right, colours) < 1e-3
    assert make.colour_loss(right, colours.roll(1)) > 9
    blind = torch.eye(12)[-1].expand(len(colours), -1)
    torch.testing.assert_close(make.colour_loss(blind, colours).exp(), torch.tensor(float(len(colours))))


def test_a_training_ends_by_the_clock(make, monkeypatch):
    clock = iter(range(0, 10_000, 6))  # every look at the clock six seconds later
    monkeypatch.setattr(make.time, "time", lambda: next(clock))
    short = training(make, 4_000_000)
    short.recipe = make.replace(short.recipe, minutes=2, flat=0.5, lr=1.0)
    assert short.recipe.rate(4, 30) == 1.0
    assert short.recipe.rate(4, 90) == pytest.approx(0.5)
    list(short)
    assert 120 <= short.seconds < 135
    assert 0 < short.seen < 200


def test_of_two_things_the_first_stands_on_the_left(make, data):
    make.make_data()
    pictures = make.Pictures()
    pictures.icons = torch.full_like(pictures.icons, 255)  # opaque
    pictures.icons[1, ..., 0] = 0  # and this one without red
    scenes = [make.Scene((0, 1), 0, 0, ""), make.Scene((1, 0), 1, 1, "")]
    red = make.draw_wide(pictures, scenes, random.Random(0))[:, 0]
    assert red.shape == (2, 64, 128)
    assert [red[0, :, :64].unique().item(), red[0, :, 64:].unique().item()] == [1, -1]
    assert [red[1, :, :64].unique().item(), red[1, :, 64:].unique().item()] == [-1, 1]
    alone = make.draw(pictures, scenes * 20, random.Random(0))[:, 0].flatten(1)
    assert alone.mean(dim=1).unique().tolist() == [-1, 1]  # in a square there is room for one, either of them


def test_what_a_sentence_should_mean_is_what_its_caption_means(make, ready):
    make.cache_meanings()
    meanings, tokenizer = make.Meanings(), make.tokenizer()
    encoder = make.exported(make.clip.TextEncoder, "text_encoder", "model")
    scene = make.Scene((3,), 1, 2, "my very old ghost is sleeping, twemoji style", 1, -1)
    tokens = tokenizer([scene.text])[0]
    with torch.no_grad():
        caption = encoder(tokenizer([make.caption("ghost", style="twemoji")]))[0]
        bare = encoder(tokenizer([make.caption("ghost")]))[0]
    goals, weights = meanings(scene, tokens)
    after = int(tokenizer([make.caption("ghost", style="twemoji")]).argmax())
    eos = int(tokens.argmax())
    late = max(eos, after) + 1
    torch.testing.assert_close(goals[late:], caption[late:], atol=5e-3, rtol=0)
    torch.testing.assert_close(goals[eos], caption[after], atol=5e-3, rtol=0)
    (name,) = make.name_ends(scene.text, tuple(NAMES))
    assert tokenizer.tokens(scene.text)[name - 1] in "ghost"
    length = len(tokenizer.ids(make.caption("ghost")))
    torch.testing.assert_close(goals[name], bare[length], atol=5e-3, rtol=0)
    assert set(weights.nonzero().flatten().tolist()) == {name, eos, *range(late, 77)}
    pair = make.Scene((3, 0), 1, 2, "a ghost and two bananas", -1, -1)
    two, _ = meanings(pair, tokenizer([pair.text])[0])
    one, other = (meanings(make.Scene((c,), 1, 2, pair.text), tokenizer([pair.text])[0])[0] for c in (3, 0))
    torch.testing.assert_close(two[60:77:2], (one + make.SIDES)[60:77:2])  # the left thing's tokens
    torch.testing.assert_close(two[61:77:2], (other - make.SIDES)[61:77:2])
    end = int(tokenizer([pair.text]).argmax())
    torch.testing.assert_close(two[end], (one + other)[end] / 2)
    assert len(make.name_ends(pair.text, tuple(NAMES))) == 2


def test_merges_go_on_from_older_ones(make):
    words = {"cat": 9, "cats": 4, "hat": 1}
    first = [("a", "t</w>"), ("x", "y"), ("c", "at</w>"), ("a", "t")]
    merges = make.more_merges(first, words, 2)
    assert merges[:3] == [("a", "t</w>"), ("c", "at</w>"), ("a", "t")]  # "xy" is in no word
    assert merges[3:] == [("c", "at"), ("cat", "s</w>")]
    assert make.merged(["a", "b", "a", "b", "b"], ("a", "b")) == ["ab", "ab", "b"]
