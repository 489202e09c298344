"""What goes wrong around a program: it is killed, the disk is full, the folder shared, the network gone, memory short.

Nothing half-written is ever found, and a person is told what to do. Each command is killed at a dozen known steps on a
tiny model; `pytest -m slow tests/test_faults.py` kills each of them at up to forty on the embedded one. What is on disk
changes at these steps alone, so no moment between them would be another; how fast the machine is does not matter.
"""

import errno
import json
import math
import multiprocessing
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import compare
import pytest
import torch
from hub_server import Handler
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import FEW, ON_DISK, bake, contents, generate, train

import bake as baking
import commands
import old_cpe as cpe
import weights
from loading import cache, configs, files, hub
from loading.files import UserError

ROOT = Path(__file__).resolve().parent.parent
# Imports once, for all processes, what takes long (dynamo: torch's optimisers want a decorator of it). Our own modules
# are not found from there by every version of Python.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch._subclasses.fake_tensor",
        "huggingface_hub",
        "safetensors.torch",
        "PIL.Image",
        "pytest",
    ]
)

PATIENCE = 600  # seconds until a process is said to hang, on the busiest machine
DOZENS = pytest.mark.parametrize(
    ("name", "kills"), [("tiny", 12), pytest.param("emoji", 40, marks=pytest.mark.slow)], ids=["tiny", "emoji"]
)


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """Nothing here depends on how many prompts there are: encoding them is what takes time."""
    monkeypatch.setattr(commands, "read_prompts", lambda preset: FEW)


@pytest.fixture
def folder_of(tiny_original):
    """The folder of a model, by its name."""
    return {"tiny": tiny_original, "emoji": ROOT / "emoji"}.__getitem__


# --- Killed ------------------------------------------------------------------------------------------------------


def silent() -> None:
    """Print nothing, and leave the cores to the others."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    commands.read_prompts = lambda preset: FEW


CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate")


def die_at(folder: Path, changes, last: int) -> None:
    """Kill this process just before its `last`-th change of what is in a folder, 0: never; counts in `changes`.

    A file that is opened to be written is left half of what it was, as it is for a moment.
    """
    changes.value = 0

    def change(event: str, details: tuple) -> None:
        opened = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)
        inside = details and isinstance(details[0], str | os.PathLike) and os.fspath(details[0]).startswith(str(folder))
        if not inside or not (opened or event in CHANGING) or changes.value == last > 0:
            return
        changes.value += 1
        if changes.value == last:
            if opened:
                with open(details[0], "ab") as file:
                    file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(change)  # what Python itself tells of every file


def run_command(arguments: list[str], cache: Path, changes=None, last: int = 0, checkpoint_seconds: float = -1) -> None:
    """A process that runs one command and saves the state of training or baking after every step, or less often.

    With `changes`, a shared integer, it dies as of `die_at`: a change of the cache, or of what is beside it.
    """
    silent()
    os.environ["CPE_CACHE"] = str(cache)
    commands.CHECKPOINT_SECONDS = checkpoint_seconds
    if changes is not None:
        die_at(cache.parent, changes, last)
    sys.exit(commands.main(arguments))


def run_generate_twice(model: Path, folder: Path, changes, last: int) -> None:
    """A process that draws one picture over another, and dies as of `die_at`."""
    silent()
    die_at(folder, changes, last)
    for seed in range(2):
        commands.main(generate(model, folder / "x.png", "--json", str(folder / "x.json"), "--seed", str(seed)))


def run_bake(arguments: list[str], cache: Path, all_there) -> None:
    """A process that bakes and waits for the others before it writes the model."""
    save_model = weights.save_model

    def save_together(*model, **changed) -> Path:
        all_there.wait(PATIENCE)
        return save_model(*model, **changed)

    weights.save_model = save_together
    run_command(arguments, cache, checkpoint_seconds=math.inf)  # a state would keep the other from beginning


def run_download(endpoint: str, cache: Path, all_there=None) -> None:
    """A process that fetches a model from a server on this machine, at the same time as others if it shall wait."""
    silent()
    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(cache), False
    constants.DOWNLOAD_CHUNK_SIZE = 512
    if all_there:
        all_there.wait(PATIENCE)
    weights.load_model("sd14")


def start(target, *arguments) -> multiprocessing.Process:
    process = FORKSERVER.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int:
    """Its exit code, once it has ended of itself."""
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def assert_whole(folder: Path) -> None:
    """Every file or model that does not say by its name that it is unfinished can be read to its end."""
    for path in (path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.suffix == ".safetensors" and path.is_file():
            assert files.load_tensors(path)[0]
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["seeds"]
        elif path.is_dir():
            model = weights.load_model(path)
            assert model.tokenizer
            assert model.schedule
            assert model.text_encoder
            assert model.unet
            assert model.vae


def result(out: Path) -> bytes:
    """What a run has made: the bytes of its gate file, or of its text encoder."""
    return (out / "text_encoder" / "model.safetensors" if out.is_dir() else out).read_bytes()


def spread(changes: int, kills: int) -> list[int]:
    """So many of the changes 1, 2, ..., the last one among them, or all where there are fewer."""
    return sorted({-(-changes * (i + 1) // kills) for i in range(kills)})


@DOZENS
@pytest.mark.parametrize("command", ["train", "bake"])
def test_a_run_killed_at_any_step_goes_on_bit_for_bit(folder_of, tmp_path, command, name, kills):
    cache, folder, changes = tmp_path / "cache", tmp_path / "out", FORKSERVER.Value("i")
    whole, again, out = (place / "x.safetensors" for place in (tmp_path / "whole", tmp_path / "again", folder))
    more = [] if command == "train" else [tmp_path / "gates.safetensors"]
    whole_run, again_run, run = (globals()[command](folder_of(name), path, *more) for path in (whole, again, out))
    assert ended(start(run_command, whole_run, cache)) == 0
    assert ended(start(run_command, again_run, cache, changes)) == 0
    assert result(again) == result(whole)
    moments, went_on = spread(changes.value, kills), 0
    while moments or not out.exists():
        begun = commands.state_file(out).exists()
        code = ended(start(run_command, [*run, "--resume"], cache, changes, moments[0] if moments else 0))
        assert code in (0, -signal.SIGKILL)
        assert code or out.exists()
        went_on += begun
        if folder.exists():
            assert_whole(folder)
        if out.exists():  # even if it was killed after
            assert result(out) == result(whole)
            if moments:  # begin anew: its state may still be there
                shutil.rmtree(folder)
        if code:  # a run that goes on may have ended before
            moments.pop(0)
    assert went_on  # from a state that a killed run has left
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [out.name]


def of_lines(command: str, lines: Path, model: Path, out: Path) -> list[str]:
    """Arguments that train, or draw, every line of a file."""
    settings = ["--preset", "emoji", "--steps-scale", "0.01"] if command == "train" else ["--steps", "1"]
    option = "--targets" if command == "train" else "--prompts"
    return [command, option, str(lines), "--out", str(out), "--model", str(model), *settings]


@DOZENS
@pytest.mark.parametrize("command", ["train", "generate"])
def test_many_lines_killed_at_any_step_go_on_bit_for_bit(folder_of, tmp_path, command, name, kills):
    lines, cache, changes = tmp_path / "lines.txt", tmp_path / "cache", FORKSERVER.Value("i")
    lines.write_text("red heart\ndog face\ncat\nhouse\ntree\n")
    whole, again, out = (tmp_path / place for place in ("whole", "again", "out"))
    whole_run, again_run, run = (of_lines(command, lines, folder_of(name), path) for path in (whole, again, out))
    assert ended(start(run_command, whole_run, cache)) == 0
    assert ended(start(run_command, again_run, cache, changes)) == 0
    expected = contents(whole)
    assert contents(again) == expected
    assert len(expected) == 5
    moments, went_on, code = spread(changes.value, kills), 0, -signal.SIGKILL
    while moments or code:
        went_on += out.exists() and any(not path.name.startswith(".") for path in out.iterdir())
        code = ended(start(run_command, run, cache, changes, moments[0] if moments else 0))
        assert code in (0, -signal.SIGKILL)
        if out.exists():
            assert_whole(out)
        if code:
            moments.pop(0)
            continue
        assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == set(expected)
        assert all((out / file).read_bytes() == content for file, content in expected.items())
        shutil.rmtree(out)
    assert went_on  # from what a killed run has left


@DOZENS
def test_a_picture_killed_at_any_step_is_whole_or_not_there(folder_of, tmp_path, name, kills):
    folder, changes = tmp_path / "out", FORKSERVER.Value("i")
    assert ended(start(run_generate_twice, folder_of(name), folder, changes, 0)) == 0
    for last in spread(changes.value, kills):
        shutil.rmtree(folder)
        assert ended(start(run_generate_twice, folder_of(name), folder, changes, last)) == -signal.SIGKILL
        if folder.exists():
            assert_whole(folder)
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"x.png", "x.json"}


@DOZENS
def test_a_download_killed_at_any_answer_keeps_only_whole_files(server, folder_of, tmp_path, monkeypatch, name, kills):
    """The client dies before an answer: between two files, or in the middle of one, when it asks for the rest."""
    server.folder, answer, cache, killed = folder_of(name), Handler.answer, tmp_path / "hub", threading.Event()

    def told(self, status: int, **headers: object) -> None:
        if 0 < server.last == len(server.requests) and not killed.is_set():
            server.client.get(timeout=PATIENCE).kill()
            killed.set()
        answer(self, status, **headers)

    def download(last: int) -> int:
        server.requests.clear()
        killed.clear()
        server.last, server.client, server.cut, server.stays_down = last, queue.Queue(), 1000, False
        process = start(run_download, constants.ENDPOINT, cache)
        server.client.put(process)
        return ended(process)

    monkeypatch.setattr(Handler, "answer", told)
    assert download(0) == 0
    original, (rest,) = weights.load_model(server.folder), [i for i, r in enumerate(server.requests, 1) if r[2]]
    for last in sorted({*spread(len(server.requests), kills), rest}):
        shutil.rmtree(cache)
        assert download(last) == -signal.SIGKILL
        for snapshot in cache.glob("*/snapshots/*"):
            for path in (path for path in snapshot.rglob("*") if path.is_file()):
                assert path.read_bytes() == (server.folder / path.relative_to(snapshot)).read_bytes()
        server.cut = None
        model = weights.load_model("sd14")  # goes on with what is there
        assert model.fingerprint == original.fingerprint
        assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), original.unet.parameters(), strict=True))


# --- Shared ------------------------------------------------------------------------------------------------------


def test_processes_may_share_a_cache_and_an_output_folder(tiny_original, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    # a state that one has saved would keep the other from beginning
    processes = [
        start(run_command, train(tiny_original, out / "heart.safetensors"), cache, None, 0, math.inf) for _ in range(2)
    ]
    processes += [start(run_command, train(tiny_original, out / "dog.safetensors", "dog"), cache)]
    processes += [start(run_command, generate(tiny_original, out / "x.png"), cache) for _ in range(2)]
    assert [ended(process) for process in processes] == [0] * 5
    assert_whole(out)
    assert_whole(cache)
    assert sorted(path.name for path in out.iterdir()) == ["dog.safetensors", "heart.safetensors", "x.png"]
    assert ended(start(run_command, train(tiny_original, tmp_path / "alone.safetensors"), tmp_path / "fresh")) == 0
    shared, alone = ({path.name for path in folder.iterdir()} for folder in (cache, tmp_path / "fresh"))
    assert alone < shared
    assert len(shared - alone) == 2  # the dog's, in templates and bare
    alone, shared = load_file(tmp_path / "alone.safetensors"), load_file(out / "heart.safetensors")
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["same settings", "other settings"])
def test_two_bakes_into_one_folder_leave_the_model_of_one(tiny_original, tmp_path, seeds):
    out, all_there = tmp_path / "out", FORKSERVER.Barrier(2)
    arguments = [bake(tiny_original, out / "x", tmp_path / "gates.safetensors", "--seed", str(seed)) for seed in seeds]
    codes = [ended(p) for p in [start(run_bake, each, tmp_path / "cache", all_there) for each in arguments]]
    assert sorted(codes) == [0, 2]
    first = codes.index(0)
    alone = bake(tiny_original, tmp_path / "alone", tmp_path / "gates.safetensors", "--seed", str(seeds[first]))
    assert ended(start(run_command, alone, tmp_path / "cache")) == 0
    assert contents(out / "x") == contents(tmp_path / "alone")
    assert [path.name for path in out.iterdir()] == ["x"]


def test_two_downloads_into_one_cache_end_as_one(server, tiny, tmp_path):
    cache, all_there = tmp_path / "hub", FORKSERVER.Barrier(2)
    processes = [start(run_download, constants.ENDPOINT, cache, all_there) for _ in range(2)]
    assert [ended(process) for process in processes] == [0, 0]
    (snapshot,) = cache.glob("*/snapshots/*")
    assert contents(snapshot).items() <= contents(tiny).items()
    assert sorted(contents(snapshot)) == sorted(set(server.downloads))
    assert len(list(cache.glob("*/blobs/*"))) == len(set(contents(snapshot).values()))  # nothing half-written


# --- No room, no rights ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_original, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(arguments: list[str]) -> tuple[int, str]:
        code = commands.main(arguments)
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return call


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a file system of its own in a folder; skips where that is not allowed."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        return folder

    yield mount
    with suppress(OSError):
        subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_full_disk_is_named_and_left_as_it_was(run, mounted, tiny_original):
    folder = mounted("size=16k")
    (folder / "x.png").write_bytes(b"before")
    (folder / "other").write_bytes(bytes(4096))
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(512))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for arguments in (train(tiny_original, folder / "x.safetensors"), generate(tiny_original, folder / "x.png")):
        code, said = run(arguments)
        assert code == 2
        assert "the disk is full: make room" in said
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("room", ["16k", "200k"], ids=["for no network", "for one network"])
def test_a_model_that_does_not_fit_on_the_disk_is_named_and_leaves_nothing(run, mounted, tiny_original, tmp_path, room):
    folder = mounted(f"size={room}")
    code, said = run(bake(tiny_original, folder / "x", tmp_path / "gates.safetensors"))
    assert code == 2
    assert said.splitlines()[-1].endswith(f"cpe.py: {folder / 'x'} could not be written: the disk is full: make room")
    assert list(folder.iterdir()) == []


def test_what_was_trained_before_the_disk_was_full_is_not_lost(run, mounted, tiny_original, tmp_path, monkeypatch):
    folder = mounted("size=200k")
    monkeypatch.setattr(commands, "CHECKPOINT_SECONDS", 0)
    arguments = bake(tiny_original, folder / "x", tmp_path / "gates.safetensors")
    code, said = run(arguments)
    assert code == 2
    assert "the disk is full: make room, then go on with --resume" in said
    assert list(folder.iterdir()) == [commands.state_file(folder / "x")]
    mounted("remount,size=2m")
    monkeypatch.setattr(baking.Baker, "update", pytest.fail)  # every step is done
    assert run([*arguments, "--resume"])[0] == 0
    assert_whole(folder)
    assert list(folder.iterdir()) == [folder / "x"]


def test_a_disk_that_fills_up_during_training_leaves_the_last_state(run, tiny_original, tmp_path, monkeypatch):
    saved, save = [], files.save_tensors

    def save_once(path, *rest):
        if saved:
            raise files.Unwritten(path, OSError(errno.ENOSPC, "No space left on device"))
        if path.name.endswith(".state.safetensors"):
            saved.append(path)
        save(path, *rest)

    monkeypatch.setattr(commands, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(files, "save_tensors", save_once)
    code, said = run(train(tiny_original, tmp_path / "x.safetensors"))
    assert code == 2
    assert "the disk is full: make room, then go on with --resume" in said
    monkeypatch.setattr(files, "save_tensors", save)
    assert run([*train(tiny_original, tmp_path / "x.safetensors"), "--resume"])[0] == 0


def test_a_disk_that_is_full_before_a_state_is_saved_leaves_nothing_to_go_on_with(
    run, tiny_original, tmp_path, monkeypatch
):
    save = files.save_tensors

    def full(path, *rest):
        if path.parent == tmp_path:
            raise files.Unwritten(path, OSError(errno.ENOSPC, "No space left on device"))
        save(path, *rest)

    monkeypatch.setattr(files, "save_tensors", full)
    code, said = run(train(tiny_original, tmp_path / "x.safetensors"))
    assert code == 2
    assert "the disk is full: make room" in said
    assert "--resume" not in said


def diverge(trainer: cpe.Trainer) -> dict[str, float]:
    """Stands in for a step whose loss is no number."""
    raise cpe.Diverged("the loss became nan")


def no_room(gates: cpe.ResAG) -> dict[str, torch.Tensor]:
    """Stands in for a disk that had room for the state, and has none for the gates."""
    raise files.Unwritten(Path("x.safetensors"), OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize(
    ("owner", "name", "fault", "words"),
    [
        (cpe.Trainer, "update", diverge, "the loss became nan: try another --seed."),
        (cpe, "to_tensors", no_room, "x.safetensors could not be written: the disk is full: make room"),
    ],
    ids=["diverged", "full disk"],
)
def test_the_demo_names_no_option_that_it_has_not(run, monkeypatch, tmp_path, owner, name, fault, words):
    monkeypatch.setattr(owner, name, fault)
    monkeypatch.setattr(commands, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setitem(cpe.PRESETS, "emoji", cpe.PRESETS["emoji"].scaled(0.001))
    code, said = run(["demo", "--out", "x.png"])
    assert code == 2
    assert said.splitlines()[-1].endswith(f"cpe.py: {words}")
    assert list(tmp_path.iterdir()) == []  # no state that nothing could go on with


def test_training_goes_on_without_a_cache_that_cannot_be_written(run, mounted, tiny_original, tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(mounted("size=16k")))
    with pytest.warns(UserWarning, match="disk is full.*CPE_CACHE"):
        code, _ = run(train(tiny_original, tmp_path / "x.safetensors"))
    assert code == 0
    assert_whole(tmp_path / "mounted")


def test_a_read_only_folder_is_named_before_any_work(run, mounted, tiny_original, monkeypatch, server, asked):
    folder, original = mounted("ro"), tiny_original
    Path("lines.txt").write_text("cat\n")
    monkeypatch.setattr(commands, "draw", lambda *_: pytest.fail("drew"))
    monkeypatch.setattr(commands, "build_trainer", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(commands, "build_baker", lambda *_: pytest.fail("baked"))
    commands_to_try = (
        train(original, folder / "x.safetensors"),
        ["train", "--targets", "lines.txt", *train(original, folder / "new")[3:]],
        bake(original, folder / "x", Path("gates.safetensors")),
        generate(original, folder / "new" / "x.png"),
        generate(original, Path("x.png"), "--json", str(folder / "x.json")),
        generate(original, folder.parent),
        ["generate", "--prompts", "lines.txt", *generate(original, folder / "new")[2:]],
    )
    before = sorted(path.name for path in folder.parent.iterdir())
    for model in (original, "sd14"):  # nor is a model downloaded for nothing
        for arguments in commands_to_try:
            code, said = run([*arguments, "--model", str(model)])
            assert code == 2
            assert "Read-only file system: check the folder" in said or "is a folder" in said
    assert asked == []
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def test_a_folder_that_was_only_asked_about_is_not_left_behind(tmp_path):
    files.check_writable(tmp_path / "new" / "inner" / "x.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    files.check_writable(tmp_path / "old" / "x.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "old"]


def test_a_download_that_does_not_fit_keeps_its_finished_files(run, mounted, server, monkeypatch):
    cache = mounted("size=300k")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    drawing = generate(Path("sd14"), Path("x.png"))
    with pytest.warns(UserWarning, match="Not enough free disk space"):
        code, said = run(drawing)
    assert code == 2
    assert "downloading unet/diffusion_pytorch_model.safetensors" in said
    assert "make room on the disk, or set HF_HOME to another" in said
    (snapshot,) = cache.glob("*/snapshots/*")
    finished = contents(snapshot)
    assert "text_encoder/model.safetensors" in finished
    assert finished.items() <= contents(server.folder).items()
    assert len(list(cache.glob("*/blobs/*"))) == len(finished)  # nothing half-written
    mounted("remount,size=2m")
    server.requests.clear()
    assert run(drawing)[0] == 0
    assert not finished.keys() & set(server.downloads)


def test_a_cache_of_models_that_cannot_be_written_is_named_and_read(run, mounted, server, monkeypatch):
    cache = mounted("ro")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    drawing = generate(Path("sd14"), Path("x.png"))
    code, said = run(drawing)
    assert code == 2
    assert "Read-only file system" in said
    assert str(cache) in said
    assert "check that folder, or set HF_HOME to another" in said
    assert "try again" not in said
    mounted("remount,rw,size=2m")
    assert run(drawing)[0] == 0
    mounted("remount,ro")
    assert run(drawing)[0] == 0


@pytest.mark.parametrize("to", ["/dev/full", "closed pipe"])
def test_output_that_nobody_can_read_is_no_traceback(tiny_original, tmp_path, to):
    if to != "closed pipe":
        if not os.path.exists(to):
            pytest.skip(f"there is no {to}")
        stdout = os.open(to, os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    command = [sys.executable, str(ROOT / "cpe.py"), *generate(tiny_original, Path("x.png"))]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(stdout)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("cpe.py: standard output cannot be written")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">&-", ">&- 2>&-"])
def test_work_goes_on_where_nobody_can_be_told_of_it(tiny_original, tmp_path, redirection):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    command = [sys.executable, str(ROOT / "cpe.py"), *train(tiny_original, Path("x.safetensors"))]
    line = f"{shlex.join(command)} {redirection}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert files.load_tensors(tmp_path / "x.safetensors")[0]
    wrong = f"{shlex.join([*command[:2], 'inspect', 'none', '--prompt', 'x'])} {redirection}"
    assert subprocess.run(wrong, shell=True, capture_output=True, cwd=tmp_path).returncode == 2


def test_a_terminal_of_few_letters_gets_question_marks(tiny_original, tmp_path):
    command = [sys.executable, str(ROOT / "cpe.py"), "generate", "日本", *generate(tiny_original, Path("x.png"))[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


# --- Names -------------------------------------------------------------------------------------------------------


def test_targets_have_file_names_of_their_own():
    long = [commands.slug("é" * 100 + end) for end in ("a", "b")]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= 80 for name in long)
    assert commands.slug("CON") == "con-target"
    assert commands.slug("Com1") == "com1-target"
    assert commands.slug("Concorde") == "concorde"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/..", "x\0y"])
def test_a_path_that_is_no_file_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no name of a file"):
        files.write_text(name, "x")


def test_a_file_name_may_be_as_long_as_the_system_allows(tmp_path):
    files.write_text(tmp_path / ("x" * 250 + ".json"), "{}")
    with pytest.raises(UserError, match="File name too long"):
        files.write_text(tmp_path / ("x" * 256), "{}")


@pytest.mark.parametrize("folders", [".", "new/inner"])
def test_a_name_that_is_too_long_is_found_before_the_work(tmp_path, folders):
    files.check_writable(tmp_path / folders / ("x" * 250 + ".json"))
    with pytest.raises(UserError, match=r"xx\.json could not be written: File name too long: .*choose another"):
        files.check_writable(tmp_path / folders / ("x" * 251 + ".json"))
    (tmp_path / "link").symlink_to("x" * 256)
    with pytest.raises(UserError, match="File name too long"):
        files.check_writable(tmp_path / "link")
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


@pytest.mark.parametrize(
    ("command", "name"),
    [("train --target dog", "x" * 238 + ".safetensors"), ("bake --gates dog.safetensors", "x" * 238)],
)
def test_a_name_too_long_for_the_state_beside_it_is_found_before_the_work(tmp_path, capsys, command, name):
    assert commands.main([*command.split(), "--model", "emoji", "--out", str(tmp_path / name)]) == 2
    assert re.search(r"--out: .*x\.(baking\.)?state\.safetensors .*File name too long", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# --- Network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """Every address that is looked up or connected to."""
    asked: list[tuple] = []

    def watch(owner: object, name: str, address) -> None:
        original = getattr(owner, name)

        def watched(*arguments, **options):
            asked.append(address(arguments))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(socket.socket, "connect", lambda arguments: arguments[1][:2])
    watch(socket.socket, "connect_ex", lambda arguments: arguments[1][:2])
    watch(socket.socket, "sendto", lambda arguments: arguments[-1][:2])
    watch(socket, "getaddrinfo", lambda arguments: arguments[:2])
    return asked


@pytest.fixture
def in_short(monkeypatch, tmp_path) -> list[list[str]]:
    """`demo` and `compare` as they are called, but quick: of the same code, with few steps, concepts and images."""
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))  # or what another test has measured would be read
    enough = cpe.Prompts(FEW.templates, FEW.general, [*FEW.domain, *map(str, range(36))])  # for every group of images
    monkeypatch.setattr(compare, "read_prompts", lambda preset: enough)
    monkeypatch.setattr(compare, "SCENARIOS", {"object": compare.Scenario(("red heart",))})
    monkeypatch.setattr(compare, "QUICK", compare.Budget(erased=1, near=1, others=1, attacked=0, steps=1))
    monkeypatch.setitem(cpe.PRESETS, "emoji", cpe.PRESETS["emoji"].scaled(0.005))
    return [["demo", "--images", "1", "--steps", "1"], ["compare", "--quick"]]


def test_offline_nothing_is_connected_to(run, tiny_original, asked, in_short, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(train(tiny_original, Path("x.safetensors")))[0] == 0
    gates = ["--gates", "x.safetensors", "--before-after"]
    assert run(generate(tiny_original, Path("x.png"), *gates))[0] == 0
    assert run(["inspect", "x.safetensors", "--prompt", "a cat", "--model", str(tiny_original)])[0] == 0
    assert run(bake(tiny_original, Path("baked"), Path("gates.safetensors"), "--images", "1", "--steps", "1"))[0] == 0
    assert run(generate(Path("sd14"), Path("y.png")))[0] == 2
    assert run(["compare", "--quick", "--model", "sd14"])[0] == 2
    assert run(["compare", "--quick", "--clip", "openai/clip-vit-base-patch32"])[0] == 2
    for arguments in in_short:
        assert run(arguments)[0] == 0
    assert asked == []


def gates_for(name: str) -> Path:
    """A gate file that fits sd14, or the embedded model; its metadata say as little of that as the authors' do."""
    d, widths = commands.wanted_sizes(weights.expected_unet(name))
    gates = cpe.ResAG(widths, d, r=1).initialise(torch.Generator().manual_seed(0))
    save_file(cpe.to_tensors(gates), f"{name}.safetensors", {"prompts": "red heart"})
    return Path(f"{name}.safetensors")


WITH_GATES = {
    "generate": ["generate", "a cat", "--gates"],
    "generate many": ["generate", "--prompts", "prompts.txt", "--gates"],
    "inspect": ["inspect", "--prompt", "a cat"],
    "bake": ["bake", "--out", "baked", "--gates"],
}


@pytest.mark.parametrize("command", WITH_GATES)
def test_gates_of_another_model_are_named_before_one_is_downloaded(run, server, asked, command):
    Path("prompts.txt").write_text("a cat")
    for gates, model, title in (
        ("emoji", "sd14", "the embedded model"),
        ("sd14", "emoji", "Stable Diffusion 1.x"),
    ):
        code, said = run([*WITH_GATES[command], str(gates_for(gates)), "--model", model])
        assert code == 2
        assert f"{gates}.safetensors is of another model" in said
        assert f"It fits {title}: use --model {gates}." in said
    assert asked == []


def test_gates_of_an_unknown_model_are_for_the_one_that_they_were_trained_for(run, asked):
    gates = cpe.ResAG({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 8}, d=1024)
    save_file(cpe.to_tensors(gates.initialise(torch.Generator())), "x.safetensors")  # no metadata
    code, said = run([*WITH_GATES["inspect"], "x.safetensors"])
    assert code == 2
    assert "context of width 1024, sd14 has 32 of width 768. Use the --model that it was trained for" in said
    assert asked == []


def test_of_several_gates_the_one_of_another_model_is_named(run):
    two = ["--gates", str(gates_for("emoji")), "--gates", str(gates_for("sd14"))]
    code, said = run(["generate", "a cat", *two, "--model", "emoji"])
    assert code == 2
    assert said.startswith("cpe.py: sd14.safetensors is of another model")


def test_gates_that_say_nothing_of_their_model_are_used_if_they_fit(run, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "not in the Hugging Face cache" in run([*WITH_GATES["inspect"], str(gates_for("sd14"))])[1]
    assert run([*WITH_GATES["inspect"], str(gates_for("emoji")), "--model", "emoji"])[0] == 0


def test_online_only_the_hubs_endpoint_is_connected_to(run, server, asked, monkeypatch, tmp_path):
    assert run(generate(Path("sd14"), Path("x.png")))[0] == 0
    monkeypatch.setitem(configs.SD14_CONFIGS, "unet", ON_DISK["unet"])  # whose gates these are
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert run([*bake(server.folder, Path("baked"), Path("gates.safetensors")), "--model", "sd14"])[0] == 0
    assert server.downloads.count("text_encoder/model.safetensors") == 2
    assert set(asked) == {("127.0.0.1", server.server_port)}


def test_online_the_embedded_model_connects_to_nothing(run, server, asked, in_short):
    for arguments in in_short:
        assert run(arguments)[0] == 0
    assert asked == []


def test_the_judge_of_a_comparison_comes_from_the_hubs_endpoint(run, server, asked, in_short, tiny):
    server.folder = Path(shutil.copytree(tiny / "tokenizer", tiny / "clip", dirs_exist_ok=True))
    judged = ["--clip", hub.SD14]  # the server's only name
    assert run(["compare", "--quick", "--eraser", "uce", "--model", str(tiny), *judged])[0] == 0
    assert "model.safetensors" in server.downloads
    assert set(asked) == {("127.0.0.1", server.server_port)}


# --- Precision and memory ----------------------------------------------------------------------------------------


def test_gates_are_inspected_in_the_precision_that_they_are_used_in(run, tiny_original, tmp_path):
    assert run(train(tiny_original, Path("x.safetensors")))[0] == 0
    tokens = {}
    for dtype in ("float32", "bfloat16", "float16"):
        arguments = ["--prompt", "a red heart", "--model", str(tiny_original), "--dtype", dtype, "--json", "x.json"]
        assert run(["inspect", "x.safetensors", *arguments])[0] == 0
        tokens[dtype] = json.loads(Path("x.json").read_text())["gates"][0]
    assert tokens["bfloat16"] != tokens["float32"]
    assert tokens["bfloat16"] == pytest.approx(tokens["float32"], abs=0.05)
    assert tokens["float16"] == pytest.approx(tokens["float32"], abs=0.01)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_says_what_is(run, tiny_original, device):
    if getattr(torch, device).is_available() if device == "cuda" else torch.backends.mps.is_available():
        pytest.skip("it is there")
    code, said = run(generate(tiny_original, Path("x.png"), "--device", device))
    assert code == 2
    assert f"the device {device} cannot be used" in said
    assert "available here: cpu. Leave --device out" in said
    assert run(["demo", "--target", "cat", "--device", device]) == (code, said)


def test_too_little_memory_says_what_to_try(run, tiny):
    config = files.read_json(tiny / "unet/config.json")
    files.write_text(tiny / "unet/config.json", json.dumps(config | {"sample_size": 1_000_000}))  # 16 TB of noise
    code, said = run(["generate", "a cat", "a dog", *generate(tiny, Path("x.png"))[2:]])
    assert code == 2
    assert "out of memory on cpu. Try: " in said
    assert "--dtype bfloat16" in said
    assert "fewer prompts" in said
    assert "--device cpu" not in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
        RuntimeError("unable to mmap 4294967296 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_every_way_to_run_out_of_memory_is_known(run, tiny_original, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(commands, "draw", fail)
    code, said = run(generate(tiny_original, Path("x.png"), "--dtype", "float16"))
    assert code == 2
    assert said == "cpe.py: out of memory on cpu. Try: close other programs\n"


def test_a_graphics_card_that_is_too_small_is_told_of_the_processor():
    args = commands.parser().parse_args(["generate", "a cat", "--device", "cuda"])
    said = "out of memory on cuda. Try: close other programs, --dtype bfloat16 (half the memory), --device cpu"
    assert commands.memory_advice(args) == said


def test_only_files_are_replaced(tmp_path):
    path = tmp_path / "x.json"
    os.mkfifo(path)
    for write in (files.check_writable, lambda path: files.write_text(path, "{}")):
        with pytest.raises(UserError, match=r"x.json is a device or a pipe: give the name of a file"):
            write(path)
    assert path.is_fifo()


def test_an_interruption_while_torch_is_imported_is_no_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "many.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "many", raising=False)
    assert commands.main(["inspect", "x", "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "\ncpe.py: interrupted before it began\n"


def test_another_error_is_no_lack_of_memory(run, tiny_original, monkeypatch):
    def fail(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(commands, "draw", fail)
    with pytest.raises(RuntimeError, match="ours"):
        run(generate(tiny_original, Path("x.png")))


# --- Damaged -----------------------------------------------------------------------------------------------------


def test_images_that_are_no_numbers_are_not_written(run, tiny):
    path = tiny / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path)
    code, said = run(generate(tiny, Path("x.png")))
    assert code == 2
    assert "not finite numbers: the weights or the gates are damaged" in said
    assert "try --dtype float32" in run(generate(tiny, Path("x.png"), "--dtype", "bfloat16"))[1]
    assert not Path("x.png").exists()


def test_a_tokenizer_of_another_model_is_named(tiny):
    vocabulary = files.read_json(tiny / "tokenizer/vocab.json")
    files.write_text(tiny / "tokenizer/vocab.json", json.dumps(vocabulary | {"<|endoftext|>": 10**6}))
    with pytest.raises(UserError, match=r"tokenizer is of another model"):
        weights.load_model(tiny).encode(["a cat"])


def test_a_cached_context_of_another_shape_is_made_anew(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(tmp_path / "cache"))
    model = weights.load_model(tiny)
    good = cache.cached_contexts(model, ["a cat"])
    (path,) = (p for p in cache.cache_folder().iterdir() if torch.equal(load_file(p)["contexts"], good))
    save_file({"contexts": good[:, :5]}, path)
    assert torch.equal(cache.cached_contexts(model, ["a cat"]), good)


def test_more_steps_than_the_schedule_has_are_refused(run, tiny_original):
    code, said = run(generate(tiny_original, Path("x.png"), "--steps", "1000", "--sampler", "dpm"))
    assert code == 2
    assert "--steps: dpm takes steps between 1 and 999" in said


@pytest.mark.parametrize("command", ["demo", "bake"])
def test_steps_that_cannot_be_drawn_are_refused_before_any_work(run, tiny_original, tmp_path, monkeypatch, command):
    baked = bake(tiny_original, Path("baked"), Path("gates.safetensors"), "--images", "1")  # writes the gates
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(commands, "build_trainer", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(commands, "build_baker", lambda *_: pytest.fail("baked"))
    arguments = {"demo": ["demo", "--target", "red heart", "--out", "x.png"], "bake": baked}[command]
    code, said = run([*arguments, "--steps", "1000", "--sampler", "dpm"])
    assert code == 2
    assert said == "cpe.py: --steps: dpm takes steps between 1 and 999, not 1000.\n"
    assert sorted(tmp_path.iterdir()) == before


def test_half_a_surrogate_pair_is_not_text(run, tiny_original):
    for text in ("\ud800", "a\0b"):
        code, said = run(["generate", text, "--model", str(tiny_original)])
        assert code == 2
        assert "is not text" in said
    with pytest.raises(ValueError, match="not Unicode"):
        weights.load_model(tiny_original).encode(["\ud800"])


@pytest.mark.parametrize("line", ["a {name} {}", "{} }", "a {", "[templates"])
def test_stray_braces_in_prompts_are_a_slip(line):
    with pytest.raises(ValueError, match=r"brace|heading|with one {} in it"):
        cpe.parse_prompts(f"[templates]\n{{}}\n{line}\n[general]\na dog")
    with pytest.raises(ValueError, match=r"brace|heading|with one {} in it"):
        cpe.parse_prompts(f"[templates]\n{{}}\n[general]\n{line}")


def test_a_target_that_is_every_anchor_leaves_none(run):
    with pytest.raises(ValueError, match="no anchor words are left"):
        cpe.anchor_words(cpe.Prompts(["{}"], ["A dog"], []), ["a dog"])
