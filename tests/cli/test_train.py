"""train: one gate file a target, which says what it depends on, and is replaced by nothing."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FEW, ROOT, TEXT_FILE, contents, held

import cpe
import solve
import token_space
import unet
import weights
from cli import common, options, runs, train
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import PRESETS

TRAIN = ("train", "red heart", "--preset", "emoji", "--steps-scale", "0.01")
GATES = Path("gates/red-heart.safetensors")


def all_in(folder: str) -> dict[str, tuple]:
    """What all files in a folder hold."""
    return {name: held(Path(folder, name)) for name in contents(folder)}


def test_it_writes_one_gate_file_that_knows_all_about_itself(run, tiny_original):
    code, said = run(*TRAIN)
    assert code == 0
    assert f"wrote   {GATES}" in said
    assert (
        "next    python cpe.py generate 'a picture of a red heart' gates/red-heart.safetensors --before-after" in said
    )
    assert list(contents("gates")) == [GATES.name]
    tensors, metadata = load_tensors(GATES)
    recipe = PRESETS["emoji"]
    expected = {"prompts": "red heart", "rank": "4", "alpha": "1", "version": "6", "target": "red heart"}
    expected |= {"surrogate": recipe.surrogate, "eta": str(recipe.eta), "lam": str(recipe.lam), "seed": "0"}
    expected |= {"model": str(tiny_original), "preset": "emoji", "aliases": "[]", "how": "train"}
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["drawing"]) == {"steps": 50, "guidance": 7.5, "sampler": "ddim"}
    assert metadata["fingerprint"] == weights.load_model(tiny_original).fingerprint
    assert len(cpe.from_tensors(tensors).w_qs) == 1


def test_it_ends_with_a_check_in_one_line(run):
    said = run(*TRAIN)[1]
    (line,) = [line for line in said.splitlines() if line.startswith("check ")]
    assert (
        "of the change that erases it, over 2 sentences; it may stay in 2 of them; without it, prompts move by" in line
    )


def test_commands_take_from_the_gate_file_what_it_knows(run):
    assert run(*TRAIN)[0] == 0
    for command in ("generate", "a red heart", "--steps", "1"), ("inspect", "a red heart"), ("check",):
        assert run(*command, GATES, model="")[0] == 0  # no --model is given


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(run):
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        run(*TRAIN, "--seed", seed, "--out", f"{name}.safetensors")
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a[cpe.W_QS], c[cpe.W_QS])


def test_the_papers_own_losses_train_the_same_gates(run):
    settings = ("--first-steps", "6", "--later-steps", "3", "--attack-steps", "3")
    assert run("train", "red heart", "--preset", "emoji", *settings, "--out", "fast.safetensors")[0] == 0
    assert run("train", "red heart", "--preset", "emoji", *settings, "--literal", "--out", "plain.safetensors")[0] == 0
    fast, plain = load_file("fast.safetensors"), load_file("plain.safetensors")
    for name in fast:
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-2, atol=1e-3)
    assert load_tensors("plain.safetensors")[1]["literal"] == "true"


def test_published_gates_are_trained_in_templates_alone(run, monkeypatch):
    def before_training(shop, target):
        prompts = shop.prompts(target)
        assert (prompts.frames, prompts.parts, prompts.spelt) == ([], False, 0)
        assert shop.settings(target)["published"] == "true"
        raise UserError("seen")

    monkeypatch.setattr(train, "read_prompts", lambda _: replace(FEW, frames=["my {}"]))
    monkeypatch.setattr(train, "trainer_of", before_training)
    assert "seen" in run(*TRAIN, "--published")[1]
    code, said = run(*TRAIN[:4], "--published", "--how", "solve")
    assert (code, "--published: of --how train alone" in said) == (2, True)


def test_every_number_of_the_recipe_is_an_option_that_the_file_stores(run):
    numbers = {f.name: f.type for f in fields(cpe.Recipe) if f.name != "surrogate"}
    assert {name: kind.__name__ for name, _, kind in options.recipe_fields()} == {
        name: kind if isinstance(kind, str) else kind.__name__ for name, kind in numbers.items()
    }
    given = ("--eta", "0.7", "--lambda", "5", "--rank", "2", "--gate-rank", "3", "--stages", "1", "--noise", "0.01")
    assert run(*TRAIN, *given, "--deltas", "3", "--first-steps", "4")[0] == 0
    metadata = load_tensors(GATES)[1]
    for name, value in {"eta": 0.7, "lam": 5, "k": 2, "r": 3, "stages": 1, "noise": 0.01, "deltas": 3}.items():
        assert json.loads(metadata[name]) == value
    assert json.loads(metadata["first_steps"]) == 4  # --steps-scale is for what nobody gave


def test_gates_can_be_solved_for(run):
    settings = ("train", "red heart", "--preset", "emoji", "--how", "solve", "--rank", "3")
    assert run(*settings)[0] == 0
    tensors, metadata = load_tensors(GATES)
    assert cpe.from_tensors(tensors).k == 3
    assert (metadata["how"], metadata["rank"]) == ("solve", "3")
    assert "already finished" in run(*settings)[1]
    code, said = run(*settings, "--stages", "3")
    assert (code, "--stages: of --how train alone" in said) == (2, True)


@pytest.mark.parametrize("name", ["red heart", "Red  Heart", "RED HEART", "red-heart"])
def test_a_finished_gate_file_stays_however_its_target_is_written(run, monkeypatch, name):
    assert run(*TRAIN)[0] == 0
    before = GATES.read_bytes()
    monkeypatch.setattr(train, "trainer_of", lambda *_: pytest.fail("trained"))
    code, said = run("train", name, *TRAIN[2:])
    assert code == 0
    assert f"kept    {GATES}: already finished" in said
    assert "next    python cpe.py generate" in said
    assert GATES.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (("--seed", "1"), "seed"),
        (("--alias", "love"), "aliases"),
        (("--steps-scale", "0.03"), "first-steps"),
        (("--lambda", "7"), "lambda"),
        (("--preset", "object"), "preset, surrogate, eta"),
    ],
)
def test_a_gate_file_of_other_settings_is_not_replaced(run, other, names):
    assert run(*TRAIN)[0] == 0
    before = GATES.read_bytes()
    code, said = run(*TRAIN, *other)
    assert code == 2
    assert f"{GATES} is there already, trained with other settings ({names.split(',')[0]}" in said
    assert "choose another --out, or remove it" in said
    assert GATES.read_bytes() == before


@pytest.mark.parametrize("version", [None, "1", "of the authors"])
def test_a_gate_file_of_another_version_can_be_used_but_is_not_finished(run, version):
    run(*TRAIN)
    tensors, metadata = load_tensors(GATES)
    del metadata["version"]
    save_tensors(GATES, tensors, metadata | ({"version": version} if version else {}))
    code, said = run(*TRAIN)
    assert (code, "trained with other settings (version)" in said) == (2, True)
    assert run("generate", "a cat", GATES, "--steps", "1")[0] == 0


@pytest.mark.parametrize("changed", ["prompts", "layers", "file"])
def test_a_finished_file_stays_only_if_it_was_made_of_the_same(run, tiny, monkeypatch, changed):
    command = (*TRAIN, "--model", str(tiny))
    assert run(*command)[0] == 0
    if changed == "prompts":
        more = replace(train.read_prompts("emoji"), general=["house", "tree", "sunset"])
        monkeypatch.setattr(train, "read_prompts", lambda _: more)
    elif changed == "layers":
        path = tiny / "unet/diffusion_pytorch_model.safetensors"
        tensors = load_tensors(path)[0]
        name = next(name for name in tensors if "attn2.to_v" in name)
        save_tensors(path, tensors | {name: 2 * tensors[name]})
    else:
        GATES.write_bytes(GATES.read_bytes()[:-1])
    code, said = run(*command)
    assert code == 2
    how = "no finished gate file" if changed == "file" else "trained with other settings (inputs)"
    assert f"{GATES} is there already, {how}: choose another --out, or remove it." in said


@pytest.mark.parametrize("name", ["gates", "notes.txt", "x.state.safetensors", "x.png"])
def test_a_gate_file_has_a_name_of_one(run, name):
    code, said = run(*TRAIN, "--out", name)
    assert (code, "give a name that ends in .safetensors, and not in .state.safetensors" in said) == (2, True)


def test_it_never_builds_the_unet(run, monkeypatch):
    real = weights.Part.load

    def load(part: weights.Part, *more):
        assert part.build is not unet.UNet
        return real(part, *more)

    monkeypatch.setattr(weights.Part, "load", load)
    assert run(*TRAIN)[0] == 0


def test_a_target_that_is_trained_again_is_not_encoded_again(run, monkeypatch):
    run(*TRAIN, "--out", "first.safetensors")
    shop = train.Workshop(options.parse([*TRAIN, "--model", load_tensors("first.safetensors")[1]["model"]]))
    shop.args.how = "train"
    monkeypatch.setattr(weights.Model, "encode", lambda _, texts, **how: pytest.fail(f"encoded {texts[:3]}"))
    target = train.target_of(["red heart"], shop.args)
    assert shop.data(target).targets.shape[0] == 8  # two templates, four spellings


def test_what_cannot_be_mended_by_going_on_is_said(run, monkeypatch):
    def diverge(trainer: cpe.Trainer, loss: torch.Tensor) -> None:
        raise FloatingPointError("the loss became nan in phase 1, step 1")

    monkeypatch.setattr(cpe.Trainer, "update", diverge)
    code, said = run(*TRAIN)
    assert code == 2
    assert "the loss became nan in phase 1, step 1. Try another --seed, or smaller learning rates" in said
    assert not list(Path("gates").glob("*"))


# --- Many --------------------------------------------------------------------------------------------------------

LINES = "# to erase\nred heart, love\n\n  dog face \n#cat\ntwo hearts\n"
SHORT = ("--preset", "emoji", "--steps-scale", "0.004")


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Make this process one of those that torchrun starts."""
    for name, value in ("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank), ("TORCHELASTIC_RUN_ID", "x"):
        monkeypatch.setenv(name, str(value))


def test_a_file_of_targets_gives_the_files_of_one_by_one(run, monkeypatch):
    Path("targets.txt").write_text(LINES)
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        code, said = run("train", "--targets", "targets.txt", *SHORT, "--out", "all")
        assert code == 0, said
        assert "passed  1 comment line of targets.txt" in said
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, *aliases in (["red heart", "--alias", "love"], ["dog face"], ["two hearts"], ["#cat"]):
        assert run("train", name, *aliases, *SHORT, "--out", f"alone/{common.slug(name)}.safetensors")[0] == 0
    assert [name.split("-")[0] for name in contents("all")] == ["cat", "dog", "red", "two"]  # `#cat` is a target
    assert all_in("all") == all_in("alone")


def test_a_process_of_torchrun_without_a_line_has_nothing_to_do(run, gates, monkeypatch):
    Path("one.txt").write_text("red heart\n")
    as_process(monkeypatch, 1, 2)
    assert run("train", "--targets", "one.txt", *SHORT, "--out", "all")[0] == 0
    assert run("generate", "--prompts", "one.txt", gates, "--out", "drawn", "--steps", "1")[0] == 0
    assert not Path("all").exists()
    assert not Path("drawn").exists()


def test_targets_side_by_side_get_a_file_each(run):
    code, said = run("train", "--target", "red heart", "dog face", *SHORT)
    assert code == 0, said
    prompts, files = "'a picture of a red heart' 'a picture of a dog face'", f"{GATES} gates/dog-face.safetensors"
    assert f"next    python cpe.py generate {prompts} {files} --before-after" in said
    assert list(contents("gates")) == ["dog-face.safetensors", "red-heart.safetensors"]
    assert "becomes " not in said


def test_one_surrogate_for_several_targets_is_said_aloud(run):
    code, said = run("train", "red heart", "dog face", *SHORT, "--surrogate", "cat")
    assert (code, "becomes 'cat': each of the 2 targets\n" in said) == (0, True), said


def test_the_next_line_has_the_article_that_the_target_needs(run):
    code, said = run("train", "owl", *SHORT, "--out", "owl.safetensors")
    assert (code, "generate 'a picture of an owl' owl.safetensors" in said) == (0, True), said


def test_a_clusters_own_variables_do_not_silence_a_single_command(run, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, said = run(*TRAIN)
    assert (code, f"wrote   {GATES}" in said, "took " in said) == (0, True, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no lines but"),
        ("# only this\n\n", "no lines but"),
        ("cat\n\nCAT\n", "line 3: 'CAT' is the same target as targets.txt, line 1"),
        ("cat\n, feline", "line 2: a name is missing before or after a comma"),
        (
            "cat\n1,Brad Pitt\n",
            "line 2: '1' has the number or mark of a list: leave that out. If all of it is a name: ",
        ),
        ("an object\n", "line 1: 'an object' is both target and surrogate"),
        ("caf\udce9", "cannot be read as text in UTF-8"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_any_work(run, tmp_path, monkeypatch, text, words):
    Path("targets.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(train, "open_model", lambda *_: pytest.fail("opened the model"))
    code, said = run("train", "--targets", "targets.txt", "--preset", "object")
    assert code == 2
    assert words in said
    assert [path.name for path in tmp_path.iterdir()] == ["targets.txt"]


def test_other_names_of_a_target_are_said_before_any_work(run, monkeypatch):
    """ "Pitt, Brad" would erase Pitt, and Brad as well."""
    Path("targets.txt").write_text("dog face\nPitt, Brad\n")
    monkeypatch.setattr(train, "open_model", lambda *_: pytest.fail("opened the model"))
    monkeypatch.setattr(train, "check_new", lambda _: (_ for _ in ()).throw(UserError("seen")))
    code, said = run("train", "--targets", "targets.txt", "--preset", "object")
    assert (code, "erases  Pitt, also called Brad\n" in said, "erases  dog face" in said) == (2, True, False), said


def test_torchrun_starts_it(tiny_original, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torchrun")
    (tmp_path / "targets.txt").write_text("red heart\ndog face\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "cpe.py"]
    command += ["train", "--targets", "targets.txt", *SHORT, "--model", tiny_original, "--first-steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert list(contents(tmp_path / "gates")) == ["dog-face.safetensors", "red-heart.safetensors"]


SOLVE = ("train", "red heart", "--preset", "emoji", "--how", "solve")


@pytest.mark.parametrize("name", ["Red  Heart", "RED HEART", " red heart "])
def test_a_target_is_no_anchor_however_either_is_written(run, monkeypatch, name):
    """A text encoder reads capitals and spaces alike: as an anchor it would be kept instead of erased."""
    assert run(*SOLVE, "--out", "plain.safetensors")[0] == 0
    same = ["red heart", "Red  Heart", "RED HEART", "red-heart"]
    monkeypatch.setattr(train, "read_prompts", lambda _: replace(FEW, general=[*FEW.general, *same]))
    assert run(SOLVE[0], name, *SOLVE[2:], "--out", "other.safetensors")[0] == 0
    plain, other = load_file("plain.safetensors"), load_file("other.safetensors")
    assert all(torch.equal(plain[each], other[each]) for each in plain)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.nan, "an anchor is not made of finite numbers: encode in float32, or check the text encoder"),
        (0.0, "target and surrogate are the same to this text encoder"),
    ],
)
def test_a_text_encoder_that_says_nothing_is_refused_in_one_sentence(run, tiny, value, said):
    path, embeddings = tiny / TEXT_FILE, "text_model.embeddings."
    save_file({n: torch.full_like(x, value) if embeddings in n else x for n, x in load_file(path).items()}, path)
    code, output = run(*SOLVE, model=str(tiny))
    assert (code, said in output, output.count("\n")) == (2, True, 1), output
    assert not list(Path().rglob("*heart*"))


# --- Interrupted -------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a step."""
    update, done = cpe.Trainer.update, []

    def counted(trainer: cpe.Trainer, loss: torch.Tensor) -> None:
        done.append(1)
        if len(done) == step:
            os.kill(os.getpid(), number)
        update(trainer, loss)

    monkeypatch.setattr(cpe.Trainer, "update", counted)


PHASES = ("--first-steps", "5", "--attack-steps", "3", "--later-steps", "4", "--stages", "3")
LAST = 5 + 2 * (3 + 4)


@pytest.mark.parametrize("step", [2, 4, 5, 6, 8, 9, 12, 13, 15, LAST - 1])
def test_a_run_that_was_interrupted_at_any_step_goes_on_bit_for_bit(run, monkeypatch, step):
    assert run(*TRAIN, *PHASES, "--out", "whole.safetensors")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        patch.setattr(runs, "SAVE_SECONDS", -1.0)
        code, said = run(*TRAIN, *PHASES, "--out", "x.safetensors")
    assert code == 130
    assert "interrupted; nothing half-written is left (the same command goes on)" in said
    assert list(Path().glob("x.*")) == [Path("x.state.safetensors")]
    code, said = run(*TRAIN, *PHASES, "--seed", "1", "--out", "x.safetensors")
    assert (code, "x.state.safetensors is of an unfinished run with other settings" in said) == (2, True)
    code, said = run(*TRAIN, *PHASES, "--out", "x.safetensors")
    assert (code, f"goes on x.state.safetensors, at step {step - 1} of {LAST}" in said) == (0, True)
    assert held("x.safetensors") == held("whole.safetensors")
    assert not Path("x.state.safetensors").exists()


INSIDE = [(solve.Solver, "scaler"), (torch.nn.functional, "softplus"), (solve.Solver, "ridge"), (solve, "roots")]


@pytest.mark.parametrize(("where", "what"), [*INSIDE, (solve.Solver, "assemble"), (cpe, "to_tensors")])
def test_a_solve_that_is_interrupted_leaves_nothing(run, monkeypatch, where, what):
    """At its start, in the middle of a regression, before each equation, and when all that is left is writing."""
    assert run(*SOLVE, "--out", "whole.safetensors")[0] == 0
    with monkeypatch.context() as patch:
        plain = getattr(where, what)
        patch.setattr(where, what, lambda *given: (os.kill(os.getpid(), signal.SIGINT), plain(*given))[1])
        code, said = run(*SOLVE, "--out", "new/x.safetensors")
    assert (code, said.endswith("\ncpe.py: interrupted; nothing half-written is left\n")) == (130, True), said
    assert list(contents("new")) == []
    assert run(*SOLVE, "--out", "new/x.safetensors")[0] == 0
    assert held("new/x.safetensors") == held("whole.safetensors")


def test_of_many_solves_those_that_were_finished_are_kept(run, monkeypatch):
    Path("targets.txt").write_text("red heart\ndog face\ncat\n")
    command, solved = (*SOLVE[:1], "--targets", "targets.txt", *SOLVE[2:], "--out", "x"), []

    def second(solver: solve.Solver, *given: object) -> cpe.ResAG:
        solved.append(solver)
        if len(solved) == 2:
            raise KeyboardInterrupt
        return plain(solver, *given)

    plain = solve.Solver.solve
    monkeypatch.setattr(solve.Solver, "solve", second)
    assert run(*command)[0] == 130
    assert list(contents("x")) == ["red-heart.safetensors"]
    code, said = run(*command)
    assert (code, "kept    x/red-heart.safetensors: already finished" in said) == (0, True)
    assert list(contents("x")) == ["cat.safetensors", "dog-face.safetensors", "red-heart.safetensors"]


def test_a_run_that_is_saved_after_every_step_is_the_same(run, monkeypatch):
    run(*TRAIN, "--out", "a.safetensors")
    monkeypatch.setattr(runs, "SAVE_SECONDS", -1.0)
    run(*TRAIN, "--out", "b.safetensors")
    assert held("a.safetensors") == held("b.safetensors")


def test_a_file_of_targets_goes_on_by_the_same_command(run, monkeypatch):
    Path("targets.txt").write_text("red heart\ndog face\n")
    command = ("train", "--targets", "targets.txt", *TRAIN[2:], *PHASES, "--out")
    assert run(*command, "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, LAST + 3)
        patch.setattr(runs, "SAVE_SECONDS", -1.0)
        assert run(*command, "x")[0] == 130
    assert list(contents("x")) == ["dog-face.state.safetensors", "red-heart.safetensors"]
    assert run(*command, "x")[0] == 0
    assert all_in("x") == all_in("whole")


@pytest.mark.parametrize("kind", ["settings", "damaged", "shapes"])
def test_a_state_of_another_run_is_refused_and_left_alone(run, monkeypatch, kind):
    state = Path("gates/red-heart.state.safetensors")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        patch.setattr(runs, "SAVE_SECONDS", -1.0)
        run(*TRAIN)
    tensors, metadata = load_tensors(state)
    if kind == "settings":
        save_tensors(state, tensors, metadata | {"run": "{}"})
    elif kind == "damaged":
        state.write_bytes(state.read_bytes()[:-1])
    else:
        save_tensors(state, tensors | {"position": torch.tensor([9, 9])}, metadata)
    before = state.read_bytes()
    code, said = run(*TRAIN)
    assert code == 2
    words = {"settings": "other settings", "damaged": "or damaged", "shapes": "this state is of another run"}
    assert words[kind] in said
    assert state.read_bytes() == before


def test_the_state_of_an_unfinished_run_is_no_gate_file(run, monkeypatch):
    interrupt_at(monkeypatch, 3)
    monkeypatch.setattr(runs, "SAVE_SECONDS", -1.0)
    run(*TRAIN)
    code, said = run("generate", "a cat", "gates/red-heart.state.safetensors")
    assert (code, "the state of an unfinished run" in said) == (2, True)


def trainer_of(seed: int) -> runs.Trainer:
    """A small trainer on random numbers."""
    chance = torch.Generator().manual_seed(seed)
    sizes = {"to_q": (8, 8), "to_k": (8, 12), "to_v": (8, 12), "to_out.0": (8, 8)}
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    layers = cpe.Layers.of({f"{path}.{n}.weight": torch.randn(*size, generator=chance) for n, size in sizes.items()})
    data = cpe.Data(*(torch.randn(n, 7, 12, generator=chance) for n in (4, 4, 9, 1)))
    recipe = cpe.Recipe("", lam=10.0, r=3, k=2, stages=2, first_steps=4, later_steps=3, attack_steps=2, anchors=5)
    gates = cpe.ResAG(layers.widths, 12, 3, 2, generator=chance)
    return runs.Trainer(gates, token_space.Losses(layers, data, recipe.eta), recipe, chance)


@pytest.mark.parametrize("missing", ["generator", "position", "gates.w_qs", "optimizer.0.exp_avg", "deltas"])
def test_a_state_without_one_of_its_tensors_is_of_another_run(missing):
    trainer = trainer_of(0)
    for _ in zip(range(6), trainer):  # noqa: B905 the shorter one ends it
        pass
    state = trainer.state()
    assert missing in state
    trainer_of(0).load_state(state)
    with pytest.raises(ValueError, match="this state is of another run"):
        trainer_of(0).load_state({name: tensor for name, tensor in state.items() if name != missing})


def test_a_full_disk_is_named_and_what_was_trained_is_not_lost(run, monkeypatch):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))  # as on a full disk
    try:
        code, said = run(*TRAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, "the disk is full: make room" in said) == (2, True)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_the_recipe_of_a_preset_is_what_is_trained(tiny_original):
    args = options.parse([*TRAIN, "--model", str(tiny_original)])
    args.how = train.how(args)
    target = train.target_of(["red heart"], args)
    scaled = {name: max(1, round(0.01 * getattr(PRESETS["emoji"], name))) for name in train.STEPS}
    assert asdict(train.Workshop(args).recipe(target)) == asdict(replace(PRESETS["emoji"], **scaled))


def test_a_file_that_is_no_gate_file_is_not_replaced(run):
    Path("notes.safetensors").write_text("mine")
    code, said = run(*TRAIN, "--out", "notes.safetensors")
    assert (code, "is there already, no finished gate file" in said) == (2, True)
    assert Path("notes.safetensors").read_text() == "mine"
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(UserError, match=r"Give a gate file, as `train` writes it"):
        common.read_gates(Path("other.safetensors"))
