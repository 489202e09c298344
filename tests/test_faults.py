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
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hub_server import Handler
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import FEW, contents, generate, held, train

import cpe
import weights
from cli import check, common, demo, main, runs, targets
from cli import generate as drawing
from cli import train as training
from loading import files
from loading.files import UserError

ROOT = Path(__file__).resolve().parent.parent
# Imports once, for all processes, what takes long: this module, and with it the program, and what torch's optimisers
# import when the first of them is made.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "torch._subclasses.fake_tensor", __name__])

PATIENCE = 600  # seconds until a process is said to hang, on the busiest machine
DOZENS = pytest.mark.parametrize(
    ("name", "kills"), [("tiny", 12), pytest.param("emoji", 40, marks=pytest.mark.slow)], ids=["tiny", "emoji"]
)


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """Nothing here depends on how many prompts there are: encoding them is what takes time."""
    for module in (check, demo, targets, training):
        monkeypatch.setattr(module, "read_prompts", lambda preset: FEW)


@pytest.fixture
def folder_of(tiny_original):
    """The folder of a model, by its name."""
    return {"tiny": tiny_original, "emoji": ROOT / "emoji"}.__getitem__


# --- Killed ------------------------------------------------------------------------------------------------------


def silent() -> None:
    """Print nothing, and leave the cores to the others."""
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # what is killed is the process, not the computer
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    for module in (check, demo, targets, training):
        module.read_prompts = lambda preset: FEW


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

    With `changes`, a shared integer, it dies as in `die_at`: a change of the cache, or of what is beside it.
    """
    silent()
    os.environ["CPE_CACHE"] = str(cache)
    runs.SAVE_SECONDS = checkpoint_seconds
    if changes is not None:
        die_at(cache.parent, changes, last)
    sys.exit(main(arguments))


def run_generate_twice(model: Path, folder: Path, changes, last: int) -> None:
    """A process that draws two pictures of one name, and dies as in `die_at`."""
    silent()
    die_at(folder, changes, last)
    for seed in range(2):
        main(generate(model, folder / "x.png", "--seed", str(seed)))


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
    with pytest.MonkeyPatch.context() as patch:
        # The first process starts the server: not every version of Python tells it where our modules are.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
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
        elif path.is_dir():
            model = weights.load_model(path)
            assert model.tokenizer
            assert model.schedule
            assert model.text_encoder
            assert model.unet
            assert model.vae


def spread(changes: int, kills: int) -> list[int]:
    """So many of the changes 1, 2, ..., the last one among them, or all where there are fewer."""
    return sorted({-(-changes * (i + 1) // kills) for i in range(kills)})


@DOZENS
def test_a_run_killed_at_any_step_goes_on_bit_for_bit(folder_of, tmp_path, name, kills):
    cache, folder, changes = tmp_path / "cache", tmp_path / "out", FORKSERVER.Value("i")
    whole, again, out = (place / "x.safetensors" for place in (tmp_path / "whole", tmp_path / "again", folder))
    whole_run, again_run, run = (train(folder_of(name), path) for path in (whole, again, out))
    assert ended(start(run_command, whole_run, cache)) == 0
    assert ended(start(run_command, again_run, cache, changes)) == 0
    assert held(again) == held(whole)
    moments, went_on = spread(changes.value, kills), 0
    while moments or not out.exists():
        begun = runs.state_file(out).exists()
        code = ended(start(run_command, run, cache, changes, moments[0] if moments else 0))
        assert code in (0, -signal.SIGKILL)
        assert code or out.exists()
        went_on += begun
        if folder.exists():
            assert_whole(folder)
        if out.exists():  # even if it was killed after
            assert held(out) == held(whole)
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
    lines.write_text("red heart\ndog face\ncat\n")  # a first, one between, a last
    whole, again, out = (tmp_path / place for place in ("whole", "again", "out"))
    whole_run, again_run, run = (of_lines(command, lines, folder_of(name), path) for path in (whole, again, out))
    assert ended(start(run_command, whole_run, cache)) == 0
    assert ended(start(run_command, again_run, cache, changes)) == 0
    expected = {file: held(whole / file) for file in contents(whole)}
    assert {file: held(again / file) for file in contents(again)} == expected
    assert len(expected) == 3
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
        assert all(held(out / file) == content for file, content in expected.items())
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
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"x.png", "x-2.png"}


@DOZENS
def test_a_download_killed_at_any_answer_keeps_only_whole_files(server, folder_of, tmp_path, monkeypatch, name, kills):
    """The client dies before an answer: between two files, or in the middle of one, when it asks for the rest."""
    server.folder, answer, cache, killed = folder_of(name), Handler.answer, tmp_path / "hub", threading.Event()

    def kill_and_answer(self, status: int, **headers: object) -> None:
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

    monkeypatch.setattr(Handler, "answer", kill_and_answer)
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
    assert {path.name for path in out.iterdir()} - {"x-2.png"} == {"dog.safetensors", "heart.safetensors", "x.png"}
    assert ended(start(run_command, train(tiny_original, tmp_path / "alone.safetensors"), tmp_path / "fresh")) == 0
    shared, alone = ({path.name for path in folder.iterdir()} for folder in (cache, tmp_path / "fresh"))
    assert alone < shared
    # the dog's: in templates, alone to find what is near, words near it (these presets put two words into a file), and
    # the sentences to check it with, three files with its name and two without
    assert len(shared - alone) == 8
    alone, shared = load_file(tmp_path / "alone.safetensors"), load_file(out / "heart.safetensors")
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


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
        code = main(list(map(str, arguments)))
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


def test_a_disk_that_fills_up_during_training_leaves_the_last_state(run, tiny_original, tmp_path, monkeypatch):
    saved, save = [], files.save_tensors

    def save_once(path, *rest):
        if saved:
            raise files.Unwritten(path, OSError(errno.ENOSPC, "No space left on device"))
        if path.name.endswith(".state.safetensors"):
            saved.append(path)
        save(path, *rest)

    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)
    for module in (runs, training):
        monkeypatch.setattr(module, "save_tensors", save_once)
    code, said = run(train(tiny_original, tmp_path / "x.safetensors"))
    assert code == 2
    assert "the disk is full: make room" in said
    for module in (runs, training):
        monkeypatch.setattr(module, "save_tensors", save)
    assert run(train(tiny_original, tmp_path / "x.safetensors"))[0] == 0


def test_training_goes_on_without_a_cache_that_cannot_be_written(run, mounted, tiny_original, tmp_path, monkeypatch):
    monkeypatch.setenv("CPE_CACHE", str(mounted("size=16k")))
    code, _ = run(train(tiny_original, tmp_path / "x.safetensors"))
    assert code == 0
    assert_whole(tmp_path / "mounted")


def test_a_read_only_folder_is_named_before_any_work(run, mounted, tiny_original, monkeypatch, server, asked):
    folder, original = mounted("ro"), tiny_original
    Path("lines.txt").write_text("cat\n")
    monkeypatch.setattr(drawing, "drawn", lambda *_: pytest.fail("drew"))
    monkeypatch.setattr(training, "trainer_of", lambda *_: pytest.fail("trained"))
    commands_to_try = (
        train(original, folder / "x.safetensors"),
        ["train", "--targets", "lines.txt", *train(original, folder / "new")[2:]],
        generate(original, folder / "new" / "x.png"),
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
    assert "unet/diffusion_pytorch_model.safetensors of" in said
    assert "make room on the disk, check that folder, or set HF_HOME to another" in said
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


def run_unheard(arguments: list[str]) -> None:
    """A process that runs one command, with standard output and error closed: Python has None for each then."""
    silent()
    for number in (1, 2):
        os.close(number)
    sys.stdout = sys.stderr = None
    sys.exit(main(arguments))


def test_work_goes_on_where_nobody_can_be_told_of_it(tiny_original, tmp_path):
    assert ended(start(run_unheard, train(tiny_original, tmp_path / "x.safetensors"))) == 0
    assert files.load_tensors(tmp_path / "x.safetensors")[0]
    assert ended(start(run_unheard, ["inspect", "none", "x"])) == 2


def test_a_terminal_of_few_letters_gets_question_marks(tiny_original, tmp_path):
    command = [sys.executable, str(ROOT / "cpe.py"), "generate", "日本", *generate(tiny_original, Path("x.png"))[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


# --- Names -------------------------------------------------------------------------------------------------------


def test_targets_have_file_names_of_their_own():
    long = [common.slug("é" * 100 + end) for end in ("a", "b")]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= 80 for name in long)
    assert common.slug("CON").startswith("con-")
    assert common.slug("Com1").startswith("com1-")
    assert common.slug("Concorde") == "concorde"


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
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_for_its_state_is_found_before_the_work(run, tmp_path):
    code, said = run(["train", "dog", "--model", "emoji", "--out", str(tmp_path / ("x" * 238 + ".safetensors"))])
    assert code == 2
    assert re.search(r"x\.state\.safetensors .*File name too long", said)
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


def test_offline_nothing_is_connected_to(run, tiny_original, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(train(tiny_original, Path("x.safetensors")))[0] == 0
    assert run(generate(tiny_original, Path("x.png"), "x.safetensors", "--before-after"))[0] == 0
    assert run(["inspect", "x.safetensors", "a cat"])[0] == 0
    assert run(["check", "x.safetensors"])[0] == 0
    assert run(generate(Path("sd14"), Path("y.png")))[0] == 2
    assert asked == []


def gates_for(name: str) -> Path:
    """A gate file that fits sd14, or the embedded model; its metadata say as little of that as the authors' do."""
    d, widths = common.sizes_of(weights.expected_unet(name))
    gates = cpe.ResAG(widths, d, r=1)
    save_file(cpe.to_tensors(gates), f"{name}.safetensors", {"prompts": "red heart"})
    return Path(f"{name}.safetensors")


WITH_GATES = {
    "generate": ["generate", "a cat", "--gates"],
    "generate many": ["generate", "--prompts", "prompts.txt", "--gates"],
    "inspect": ["inspect", "a cat"],
    "check": ["check"],
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
        assert f"It fits {title}: use --model {gates}, or leave --model out." in said
    assert asked == []


def test_gates_of_an_unknown_model_are_for_the_one_that_they_were_trained_for(run, asked):
    gates = cpe.ResAG({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 8}, d=1024)
    save_file(cpe.to_tensors(gates), "x.safetensors")  # no metadata
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


# --- Precision and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gates_work_in_the_precision_of_the_model(run, tiny_original, dtype):
    assert run(train(tiny_original, Path("x.safetensors")))[0] == 0
    assert run(["generate", "a red heart", "x.safetensors", "--steps", "1", "--dtype", dtype])[0] == 0


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_says_what_is(run, tiny_original, device):
    if getattr(torch, device).is_available() if device == "cuda" else torch.backends.mps.is_available():
        pytest.skip("it is there")
    code, said = run(generate(tiny_original, Path("x.png"), "--device", device))
    assert code == 2
    assert f"the device {device} cannot be used" in said
    assert "leave --device out" in said


def test_too_little_memory_says_what_to_try(run, tiny):
    config = files.read_json(tiny / "unet/config.json")
    files.write_text(tiny / "unet/config.json", json.dumps(config | {"sample_size": 1_000_000}))  # 16 TB of noise
    code, said = run(["generate", "a cat", "a dog", *generate(tiny, Path("x.png"))[2:]])
    assert code == 2
    assert "out of memory: close other programs, or try fewer prompts at once" in said


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
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(drawing, "drawn", fail)
    code, said = run(generate(tiny_original, Path("x.png"), "--dtype", "float16"))
    assert code == 2
    assert said.startswith("cpe.py: out of memory: close other programs")


def test_only_files_are_replaced(tmp_path):
    path = tmp_path / "x.json"
    os.mkfifo(path)
    for write in (files.check_writable, lambda path: files.write_text(path, "{}")):
        with pytest.raises(UserError, match=r"x.json is a device or a pipe: give the name of a file"):
            write(path)
    assert path.is_fifo()


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


def test_more_steps_than_the_schedule_has_are_refused(run, tiny_original):
    code, said = run(generate(tiny_original, Path("x.png"), "--steps", "1000", "--sampler", "dpm"))
    assert code == 2
    assert "--steps: a picture takes between 1 and 500 steps" in said


def test_half_a_surrogate_pair_is_not_text(run, tiny_original):
    for text in ("\ud800", "a\0b"):
        with pytest.raises(SystemExit) as stop:
            run(["generate", text, "--model", str(tiny_original)])
        assert stop.value.code == 2
    with pytest.raises(ValueError, match="not Unicode"):
        weights.load_model(tiny_original).encode(["\ud800"])
