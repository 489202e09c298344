"""Many targets or prompts from a file: the same files as one by one, however many processes make them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import ROOT, contents

import commands
import many
import old_cpe as cpe
import weights
from loading import cache, files
from loading.files import UserError
from loading.prompts import read_prompts

SHORT = ("--preset", "emoji", "--steps-scale", "0.008")
STEPS = sum(phase.steps for phase in cpe.phases(cpe.PRESETS["emoji"].scaled(0.008)))  # of one target
TARGETS = "# to erase\nred heart, love\n\n  dog face \n#cat\ntwo hearts\n"
FILES = ["dog-face.safetensors", "red-heart.safetensors", "two-hearts.safetensors"]


@pytest.fixture
def train(run, tmp_path):
    """Train all of TARGETS, or of another text, into a folder."""

    def call(out: str, *more: str, targets: str = TARGETS) -> tuple[int, str]:
        (tmp_path / "targets.txt").write_text(targets, encoding="utf-8")
        return run("train", "--targets", "targets.txt", *SHORT, "--out", out, *more)

    return call


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Make this process one of those that torchrun starts."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


def torchrun(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command in two processes."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torchrun")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "cpe.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)


# --- train --targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["resag", "context"])
def test_a_file_of_targets_gives_the_files_of_one_by_one(run, train, gate):
    code, said = train("all", "--gate", gate, "--seed", "7", "--json", "figures.json")
    assert code == 0
    assert "trained 3 targets into all, kept 0" in said
    for name, *aliases in (["red heart", "--alias", "love"], ["dog face"], ["two hearts"]):
        out = f"alone/{commands.slug(name)}.safetensors"
        assert run("train", "--target", name, *aliases, *SHORT, "--gate", gate, "--seed", "7", "--out", out)[0] == 0
    assert list(contents("all")) == FILES
    if gate == "context":  # nothing is computed together
        assert contents("all") == contents("alone")
    for file in FILES:  # of resag the same to rounding
        (ours, kept), (alone, said) = (files.load_tensors(Path(folder, file)) for folder in ("all", "alone"))
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-5)
        assert kept == said
    figures = json.loads(Path("figures.json").read_text())["targets"]
    assert figures["red heart"]["aliases"] == ["love"]
    assert list(figures) == ["red heart", "dog face", "two hearts"]


def test_what_does_not_depend_on_the_target_is_made_once(train, monkeypatch):
    made, asked = [], []
    objective, cached = cpe.Objective, cache.cached_contexts
    monkeypatch.setattr(cpe, "Objective", lambda *given: made.append(1) or objective(*given))
    monkeypatch.setattr(
        "loading.cache.cached_contexts", lambda m, wanted, *_: asked.append(wanted) or cached(m, wanted)
    )
    encoders = []
    load = weights.Part.load
    monkeypatch.setattr(weights.Part, "load", lambda part, *given: encoders.append(part) or load(part, *given))
    assert train("all")[0] == 0
    assert len(made) == len(encoders) == 1
    names = ("red heart", "love", "dog face", "two hearts")
    own = [wanted for wanted in asked if all(not text or any(name in text for name in names) for text in wanted)]
    assert len(own) == 3 * 3  # in templates, bare, and the empty prompt
    assert len(asked) - len(own) == 4  # surrogate, general, domain in templates, domain bare


def test_what_is_finished_is_kept_and_nothing_else_is_replaced(train, monkeypatch):
    assert train("all")[0] == 0
    before = contents("all")
    with monkeypatch.context() as patch:
        patch.setattr(commands, "build_trainer", lambda *_: pytest.fail("trained"))
        code, said = train("all", "--json", "figures.json")
    assert code == 0
    assert said.count("already finished") == 3
    assert contents("all") == before
    assert all(each["kept"] for each in json.loads(Path("figures.json").read_text())["targets"].values())
    Path("all/red-heart.safetensors").unlink()
    del before["red-heart.safetensors"]
    code, said = train("all", "--seed", "1")
    assert code == 2
    assert "line 4 ('dog face'): all/dog-face.safetensors is there already, trained with other settings (seed)" in said
    assert contents("all") == before  # no target was trained before that was found out


@pytest.mark.parametrize("changed", ["prompts", "layers", "file"])
def test_a_finished_file_is_kept_only_if_it_was_made_of_the_same(run, tiny, tmp_path, monkeypatch, changed):
    Path("targets.txt").write_text("red heart\n")
    command = ("train", "--targets", "targets.txt", *SHORT, "--model", str(tiny))
    assert run(*command)[0] == 0
    if changed == "prompts":
        prompts = read_prompts("emoji")
        prompts.general.append("sunset")
        monkeypatch.setattr("loading.prompts.read_prompts", lambda _: prompts)
    elif changed == "layers":
        path = tiny / "unet/diffusion_pytorch_model.safetensors"
        tensors = files.load_tensors(path)[0]
        name = next(name for name in tensors if "attn2.to_v" in name)
        files.save_tensors(path, tensors | {name: 2 * tensors[name]})
    else:
        path = tmp_path / "gates/red-heart.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    code, said = run(*command)
    assert code == 2
    how = "no finished gate file" if changed == "file" else "trained with other settings (prompts or layers)"
    assert f"gates/red-heart.safetensors is there already, {how}: choose another --out, or remove it." in said
    Path("gates/red-heart.safetensors").unlink()
    assert "trained 1 targets into gates, kept 0" in run(*command)[1]
    assert "trained 0 targets into gates, kept 1" in run(*command)[1]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, stop) -> None:
    """Call `stop` after so many steps of training."""
    advance, done = cpe.Trainer.advance, []

    def counted(trainer: cpe.Trainer, losses: dict[str, torch.Tensor]) -> cpe.Progress:
        report = advance(trainer, losses)
        done.append(1)
        if len(done) == steps:
            stop()
        return report

    monkeypatch.setattr(cpe.Trainer, "advance", counted)


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_command_goes_on_after_an_interruption(train, monkeypatch, size):
    assert train("whole")[0] == 0
    before = signal.getsignal(signal.SIGTERM)
    as_process(monkeypatch, 0, size)
    with monkeypatch.context() as patch:
        # Ctrl-C, or torchrun, which stops all processes when one has failed
        sent, together = (signal.SIGINT, 3) if size == 1 else (signal.SIGTERM, 2)
        stop_after(patch, 4 * together, lambda: os.kill(os.getpid(), sent))
        code, said = train("stopped")
    assert code == 130
    assert "the same command goes on" in said
    assert len(contents("stopped")) == together
    for name in contents("stopped"):
        assert name.endswith(".state.safetensors")
        assert files.load_tensors(Path("stopped") / name)[0]["position"].tolist() == [0, 4]
    for rank in range(size):
        as_process(monkeypatch, rank, size)
        assert train("stopped")[0] == 0
    assert contents("stopped") == contents("whole")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("kept", FILES)
def test_gates_do_not_depend_on_who_else_is_trained_with_them(train, kept):
    train("all")
    before = contents("all")
    (Path("all") / kept).unlink()
    assert "trained 1 targets into all, kept 2" in train("all")[1]  # alone in the batch of the three
    assert contents("all") == before


def test_a_state_of_other_settings_is_not_replaced_and_said_before_any_training(train):
    state = Path("all/dog-face.state.safetensors")
    files.save_tensors(state, {"position": torch.zeros(2)}, {"run": "{}"})
    before = state.read_bytes()
    code, said = train("all")
    assert code == 2
    assert "('dog face'): all/dog-face.state.safetensors is of a run with other settings" in said
    assert [path.name for path in Path("all").iterdir()] == [state.name]
    assert state.read_bytes() == before


def test_a_state_of_a_finished_run_is_removed(train):
    train("other", "--seed", "1", "--json", "figures.json")
    before = contents("other")
    settings = json.loads(Path("figures.json").read_text())["targets"]["red heart"]
    settings = {name: value for name, value in settings.items() if name not in ("losses", "reached", "out")}
    state = Path("other/red-heart.state.safetensors")
    files.save_tensors(state, {"position": torch.zeros(2)}, {"run": commands.run_name(settings)})
    assert "kept 3" in train("other", "--seed", "1")[1]
    assert contents("other") == before


def test_a_target_that_diverges_is_named_and_the_others_are_trained(train, monkeypatch):
    def diverge() -> None:
        raise cpe.Diverged("the loss became nan")

    stop_after(monkeypatch, 1, diverge)
    code, said = train("all")
    assert code == 2
    assert "cpe.py: targets.txt, line 2 ('red heart'): the loss became nan" in said
    assert said.endswith("cpe.py: 1 of 3 targets diverged: red heart.\n")
    assert list(contents("all")) == ["dog-face.safetensors", "red-heart.state.safetensors", "two-hearts.safetensors"]


def test_a_target_that_cannot_be_written_costs_the_others_nothing(train, monkeypatch):
    train("whole")

    def fail(run: commands.Run, *_) -> dict:
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(commands, "write_gates", fail)
        code, said = train("all")
    assert code == 2
    assert "line 2 ('red heart'): the disk is full" in said
    assert list(contents("all")) == [name.replace(".safe", ".state.safe") for name in FILES]
    with monkeypatch.context() as patch:
        patch.setattr(cpe.Trainer, "advance", lambda *_: pytest.fail("trained again"))
        assert train("all", "--json", "figures.json")[0] == 0
    assert contents("all") == contents("whole")
    for figures in json.loads(Path("figures.json").read_text())["targets"].values():
        assert figures["losses"].keys() == {"erase", "anchor", "adv", "attack"}


def test_a_state_that_cannot_be_saved_costs_the_others_nothing(train, monkeypatch):
    foreign = Path("all/red-heart.state.safetensors")

    def stop() -> None:
        files.save_tensors(foreign, {"position": torch.zeros(2)}, {"run": "{}"})
        os.kill(os.getpid(), signal.SIGINT)

    stop_after(monkeypatch, 6, stop)
    code, said = train("all")
    assert code == 2
    assert "red-heart.state.safetensors is of a run with other settings" in said
    for name in ("dog-face", "two-hearts"):
        assert files.load_tensors(Path(f"all/{name}.state.safetensors"))[0]["position"].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("error", "words"),
    [(UserError("the disk is full"), "the disk is full"), (MemoryError(), "out of memory on cpu. Try: ")],
)
def test_any_other_error_ends_the_run_and_names_the_target(train, monkeypatch, error, words):
    def fail() -> None:
        raise error

    stop_after(monkeypatch, 1, fail)
    code, said = train("all")
    assert code == 2
    assert f"cpe.py: targets.txt, line 2 ('red heart') and 2 more: {words}" in said
    assert "Traceback" not in said
    assert contents("all") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no lines but"),
        ("# only this\n\n", "no lines but"),
        ("cat\n\nCAT!\n", "line 3 ('CAT!') is the same target as targets.txt, line 1 ('cat')"),
        ("con target\ncon\n", "line 2 ('con') is the same target as targets.txt, line 1 ('con target'), or has"),
        ("cat\n, feline", "line 2: a name is missing before or after a comma"),
        ("cat, feline,\n", "line 1: a name is missing before or after a comma"),
        ("cat\n!?", "line 2: the target is empty"),
        ("an object\n", "line 1: 'an object' is both target and surrogate"),
        ("cat\na\0b\n", "line 2 is not text"),
        ("caf\udce9", "not a text file in UTF-8"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_any_work(run, tmp_path, monkeypatch, text, words):
    Path("targets.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(commands, "open_model", lambda *_: pytest.fail("opened the model"))
    code, said = run("train", "--targets", "targets.txt", "--preset", "object")
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["targets.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--targets", "none.txt"), "none.txt cannot be read"),
        (("train", "--targets", "lines.txt", "--alias", "x"), "--alias goes with --target"),
        (("train", "--targets", "lines.txt", "--out", "x.safetensors"), "--out is a folder here"),
        (("train", "--targets", "lines.txt", "--model", "emoji"), "line 1: the embedded model has never seen"),
        (("generate", "--prompts", "lines.txt", "--out", "lines.txt"), "read or written by this command already"),
        (("generate", "--prompts", "lines.txt", "--steps", "2000"), "steps"),
        (("generate", "--prompts", "lines.txt", "a cat"), "either prompts, or a file"),
        (("generate",), "either prompts, or a file"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(run, tmp_path, arguments, words):
    Path("lines.txt").write_text("Brad Pitt\n")
    try:
        code, said = run(*arguments)
        assert said.count("\n") == 1
        assert words in said
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lines.txt"]


def test_an_endless_file_of_lines_is_not_read_to_its_end(run, monkeypatch):
    monkeypatch.setattr(many, "LARGEST", 1 << 20)
    code, said = run("train", "--targets", "/dev/zero")
    assert code == 2
    assert "/dev/zero is larger than 1 MiB" in said


# --- Batches -----------------------------------------------------------------------------------------------------

RECIPE = cpe.Recipe(
    "", 0.3, 10.0, r=3, k=2, stages=3, first_steps=6, later_steps=3, attack_steps=4, deltas=2, anchors=5
)


def trainer(seed: int, dtype: torch.dtype = torch.float32) -> cpe.Trainer:
    """A small trainer on random numbers, its target and its chance drawn by the seed; all have the same layers."""
    layers = torch.Generator().manual_seed(0)
    sizes = {"to_q": (8, 8), "to_k": (8, 12), "to_v": (8, 12), "to_out.0": (8, 8)}
    paths = [f"down_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in range(3)]
    cross_attention = {
        f"{path}.{name}.weight": torch.randn(*size, generator=layers, dtype=dtype)
        for path in paths
        for name, size in sizes.items()
    }
    own = torch.Generator().manual_seed(seed)
    contexts = [torch.randn(n, 7, 12, generator=own, dtype=dtype) for n in (4, 4, 9, 1)]
    made = cpe.Trainer(cpe.Objective(cross_attention), cpe.Data(*contexts), RECIPE, seed)
    made.gates.to(dtype)
    return made


def finished(trainers: dict[int, cpe.Trainer]) -> dict[int, dict[str, torch.Tensor]]:
    """Train all in a batch; the states they end with, by place."""
    for _ in many.Batch(trainers, 4, unexpected).steps():
        pass
    return {place: each.state() for place, each in trainers.items()}


def unexpected(place: int, error: cpe.Diverged) -> None:
    """Nobody is to diverge."""
    raise error


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names and bits."""
    assert state.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in state.items())


def test_a_batch_trains_what_every_trainer_would_alone():
    together, alone = {i: trainer(i, torch.float64) for i in range(4)}, [trainer(i, torch.float64) for i in range(4)]
    batch = many.Batch(together, 4, unexpected).steps()
    for reports, *expected in zip(batch, *(each.steps() for each in alone), strict=True):
        for found, report in zip((reports[each] for each in together.values()), expected, strict=True):
            assert (found.step, found.total, found.stage, found.kind) == (
                report.step, report.total, report.stage, report.kind,
            )  # fmt: skip
            assert found.losses == pytest.approx(report.losses, rel=1e-9)
    for i, each in together.items():
        torch.testing.assert_close(each.state(), alone[i].state(), rtol=1e-9, atol=1e-12)


def test_who_else_is_in_a_batch_changes_no_bit():
    whole = finished({i: trainer(i) for i in range(4)})
    for places in ([0], [3], [1, 2]):
        for place, state in finished({i: trainer(i) for i in places}).items():
            assert_same(state, whole[place])


@pytest.mark.parametrize("behind", [2, 8])  # still in the first stage, or in an attack
def test_trainers_of_a_batch_may_stand_at_different_steps(behind):
    whole = finished({i: trainer(i) for i in (0, 2)})
    first = {i: trainer(i) for i in (0, 2)}
    for _, _ in zip(range(behind), many.Batch(first, 4, unexpected).steps()):  # noqa: B905 the shorter one ends it
        pass
    late, early = trainer(0), trainer(2)
    late.load_state(first[0].state())
    for place, state in finished({0: late, 2: early}).items():
        assert_same(state, whole[place])


def test_a_trainer_that_diverges_leaves_the_others_of_its_batch_alone():
    whole = finished({i: trainer(i) for i in (0, 1)})
    lost = trainer(3)
    lost.data.targets.fill_(1e30)
    before, told = lost.state(), []
    trainers = {0: trainer(0), 1: trainer(1), 3: lost}
    for reports in many.Batch(trainers, 4, lambda *error: told.append(error)).steps():
        assert set(reports) == {trainers[0], trainers[1]}
    ((place, error),) = told
    assert place == 3
    assert "stage 1, step 1" in str(error)
    after = lost.state()
    assert_same(*({name: t for name, t in each.items() if "gates." in name} for each in (before, after)))
    for place in (0, 1):
        assert_same(trainers[place].state(), whole[place])


@pytest.mark.parametrize(
    ("targets", "processes", "expected"),
    [
        (6, 1, ["4:0 1 2 3|2:0 1"]),
        (9, 2, ["4:0 1 2 3|4:0", "4:1 2 3|1:0"]),
        (6, 4, ["4:0 1", "4:2", "4:3|2:0", "2:1"]),
        (3, 2, ["3:0 1", "3:2"]),
        (1, 2, ["1:0", ""]),
    ],
)
def test_a_target_has_the_place_of_its_line_whichever_process_trains_it(targets, processes, expected):
    whole, seen = many.batches(range(targets), 4), []
    for rank, words in enumerate(expected):
        mine = many.part(whole, many.Process(rank, processes))
        assert "|".join(f"{size}:{' '.join(map(str, batch))}" for size, batch in mine) == words
        seen += [target for _, batch in mine for target in batch.values()]
    assert seen == list(range(targets))


# --- generate --prompts ------------------------------------------------------------------------------------------

PROMPTS = "a cat\n\n# not drawn\na dog\na cat\n???\n"
PICTURES = ["0001-a-cat.png", "0002-a-dog.png", "0003-a-cat.png", "0004-prompt.png"]
DRAW = ("--steps", "2", "--seed", "5")


def pixels(path: str) -> bytes:
    """The pixels of a picture, whatever else its file says."""
    with Image.open(path) as image:
        return image.tobytes()


def test_every_prompt_of_a_file_is_drawn_as_if_alone(run):
    Path("prompts.txt").write_text(PROMPTS)
    code, said = run("generate", "--prompts", "prompts.txt", *DRAW, "--json", "figures.json")
    assert code == 0
    assert "drew    4 prompts into images/generated, each from seed 5" in said
    pictures = contents("images/generated")
    assert list(pictures) == PICTURES
    assert run("generate", "a dog", *DRAW, "--out", "alone.png")[0] == 0
    assert pixels("images/generated/0002-a-dog.png") == pixels("alone.png")
    assert pictures["0001-a-cat.png"] == pictures["0003-a-cat.png"]
    figures = json.loads(Path("figures.json").read_text())
    assert [each["prompt"] for each in figures["pictures"]] == ["a cat", "a dog", "a cat", "???"]
    assert "of other prompts" not in said
    Path("prompts.txt").write_text(PROMPTS.replace("a dog\n", ""))
    said = run("generate", "--prompts", "prompts.txt", *DRAW)[1]
    assert "left    3 of other prompts there, 0002-a-dog.png for one" in said


def test_a_second_run_draws_what_is_missing_damaged_or_of_other_settings(run, train):
    train("gates")
    Path("prompts.txt").write_text("a cat\na dog\na “cat”\n", encoding="utf-8")
    draw = ("generate", "--prompts", "prompts.txt", *DRAW)
    run(*draw)
    first = contents("images/generated")
    assert "drew    0 prompts into images/generated, each from seed 5, kept 3" in run(*draw)[1]
    Path("images/generated/0001-a-cat.png").unlink()
    Path("images/generated/0002-a-dog.png").write_bytes(first["0002-a-dog.png"][:-30])
    assert ", kept 1\n" in run(*draw)[1]
    assert contents("images/generated") == first
    gates = ("--gates", f"gates/{FILES[0]}")
    zone = (*gates, "--zone", "0.5")
    for other in (("--seed", "6"), ("--steps", "3"), ("--guidance", "2"), ("--sampler", "dpm"), gates, zone):
        assert ", kept 0\n" in run(*draw, *other)[1]
    (Path("gates") / FILES[1]).replace(Path("gates") / FILES[0])  # another gate under the same name
    assert ", kept 0\n" in run(*draw, *gates)[1]


CHANGES = {
    weights.SCHEDULER: lambda text: text.replace("0.012", "0.013"),
    "tokenizer/merges.txt": lambda text: text.rsplit("\n", 2)[0] + "\n",
    "vae/config.json": lambda text: json.dumps(json.loads(text) | {"scaling_factor": 0.5}),
}


@pytest.mark.parametrize("file", CHANGES)
def test_pictures_of_another_noise_schedule_tokenizer_or_config_are_drawn_anew(run, tiny, file):
    Path("prompts.txt").write_text("a cat\n")
    draw = ("generate", "--prompts", "prompts.txt", *DRAW, "--model", str(tiny))
    run(*draw)
    assert ", kept 1\n" in run(*draw)[1]
    text = (tiny / file).read_text()
    changed = CHANGES[file](text)
    assert changed != text
    (tiny / file).write_text(changed)
    assert ", kept 0\n" in run(*draw)[1]


def test_prompts_of_a_file_are_drawn_in_the_precision_that_was_asked_for(run, monkeypatch):
    Path("prompts.txt").write_text("a cat\n")
    seen, draw = [], commands.draw
    monkeypatch.setattr(commands, "draw", lambda model, *rest: seen.append(model.dtype) or draw(model, *rest))
    for dtype in ("bfloat16", "float32"):
        assert run("generate", "--prompts", "prompts.txt", *DRAW, "--dtype", dtype)[0] == 0
    assert seen == [torch.bfloat16, torch.float32]


def test_gates_act_on_every_prompt_of_a_file(run, train):
    train("gates")
    Path("prompts.txt").write_text("a red heart\na dog\n")
    command = ("generate", "--prompts", "prompts.txt", *DRAW, "--before-after", "--gates", f"gates/{FILES[1]}")
    code, said = run(*command, "--json", "figures.json")
    assert code == 0
    assert said.count("change ") == 2
    assert all("change" in each for each in json.loads(Path("figures.json").read_text())["pictures"])
    assert run(*command[:1], "a dog", *command[3:], "--out", "alone.png")[0] == 0
    assert pixels("images/generated/0002-a-dog.png") == pixels("alone.png")


def test_a_prompt_that_cannot_be_drawn_is_named(run, monkeypatch):
    def fail(*_):
        raise UserError("the model's images are not finite numbers.")

    monkeypatch.setattr(commands, "draw", fail)
    Path("prompts.txt").write_text(PROMPTS)
    code, said = run("generate", "--prompts", "prompts.txt")
    assert code == 2
    assert said == "cpe.py: prompts.txt, line 1 ('a cat'): the model's images are not finite numbers.\n"


def test_drawing_goes_on_after_an_interruption(run, monkeypatch):
    Path("prompts.txt").write_text(PROMPTS)
    draw = ("generate", "--prompts", "prompts.txt", *DRAW)
    grid = commands.grid

    def interrupted(rows: list[torch.Tensor], path: Path, **more: str) -> None:
        if path.name == PICTURES[1]:
            raise KeyboardInterrupt
        grid(rows, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "grid", interrupted)
        code, said = run(*draw)
    assert code == 130
    assert "interrupted; nothing half-written is left (the same command goes on)" in said
    assert list(contents("images/generated")) == PICTURES[:1]
    assert ", kept 1\n" in run(*draw)[1]
    assert list(contents("images/generated")) == PICTURES


# --- Several processes -------------------------------------------------------------------------------------------


def test_processes_share_the_lines_and_only_the_first_speaks(run, train, monkeypatch):
    Path("prompts.txt").write_text(PROMPTS)
    draw = ("generate", "--prompts", "prompts.txt", *DRAW)
    assert train("one")[0] == run(*draw, "--out", "drawn")[0] == 0
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        code, said = train("three", "--json", "figures.json")
        assert code == 0
        assert len(contents("three")) == rank + 1
        assert ("of 3: the others say nothing" in said and "took" in said) if rank == 0 else said == ""
        assert run(*draw, "--out", "shared") == (0, "") or rank == 0
        assert len(json.loads(Path(f"figures-{rank}.json").read_text())["targets"]) == 1
    assert contents("three") == contents("one")
    assert contents("shared") == contents("drawn")
    as_process(monkeypatch, 3, 4)
    assert train("four") == (0, "")  # more processes than lines


@pytest.mark.parametrize(
    "values", [("x", "2", "0"), ("2", "2", "0"), ("-1", "2", "0"), ("0", "2", "x"), ("0", "0", "0")]
)
def test_variables_that_torchrun_never_sets_are_refused(run, monkeypatch, values):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values, strict=True):
        monkeypatch.setenv(name, value)
    code, said = run("train", "--targets", "x")
    assert code == 2
    assert "in the environment is nothing that torchrun sets" in said


def test_every_process_has_a_graphics_card_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for process, device in ((many.Process(), "cuda:0"), (many.Process(5, 8, 1), "cuda:1")):
        args = commands.parser().parse_args(["train", "--targets", "x", "--device", "cuda"])
        many.separate(args, process)
        assert args.device == device
    with pytest.raises(UserError, match="process 2 of this machine finds 2 graphics cards"):
        many.separate(
            commands.parser().parse_args(["train", "--target", "x", "--device", "cuda"]), many.Process(2, 3, 2)
        )
    args = commands.parser().parse_args(["train", "--targets", "x"])
    many.separate(args, many.Process(1, 2, 1))
    assert args.device == "cpu"


def test_torchrun_gives_the_files_of_one_process(train, tiny_original, tmp_path):
    assert train("one")[0] == 0
    settings = ("--targets", "targets.txt", *SHORT, "--model", str(tiny_original))
    done = torchrun(tmp_path, "train", *settings, "--out", "two")
    assert done.returncode == 0, done.stderr
    assert contents("two") == contents("one")
    assert done.stdout.count("wrote   ") == 2
    assert done.stdout.count("trained ") == done.stdout.count("took ") == 1


@pytest.mark.slow
def test_torchrun_gives_the_files_of_one_process_on_the_embedded_model(run, tmp_path, monkeypatch):
    for kind in (
        ("train", "--targets", "targets.txt", *SHORT),
        ("generate", "--prompts", "targets.txt", *DRAW),
    ):
        Path("targets.txt").write_text("red heart, heart\ndog face\ntwo hearts\n")
        assert run(*kind, "--model", "emoji", "--out", f"one-{kind[0]}")[0] == 0
        monkeypatch.setenv("CPE_CACHE", str(tmp_path / "new-cache"))  # both write it
        done = torchrun(tmp_path, *kind, "--model", "emoji", "--out", f"two-{kind[0]}")
        assert done.returncode == 0, done.stderr
        assert contents(f"two-{kind[0]}") == contents(f"one-{kind[0]}")
    assert not [name for name in contents("new-cache") if name.startswith(".")]


def test_a_process_that_fails_names_its_target_and_leaves_nothing_half_written(
    run, tiny_original, tmp_path, monkeypatch
):
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "all/dog-face.safetensors").mkdir(parents=True)
    Path("targets.txt").write_text(TARGETS)
    settings = ("--targets", "targets.txt", "--preset", "emoji", "--model", str(tiny_original))
    done = torchrun(tmp_path, "train", *settings, "--out", "all")  # the first process would train for minutes
    assert done.returncode != 0
    assert "cpe.py: targets.txt, line 4 ('dog face'): --out: all/dog-face.safetensors is a folder" in done.stderr
    assert "exitcode  : 2" in done.stderr
    (tmp_path / "all/dog-face.safetensors").rmdir()
    for path in (*Path("all").iterdir(), *Path("cache").glob("*")):
        assert files.load_tensors(path)[0]
