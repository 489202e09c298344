"""main and options: how commands are found, how errors end them, and that help answers at once."""

import base64
import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT, generate

from cli import main, options, report


@pytest.mark.parametrize("command", ["", *options.COMMANDS])
def test_help_fits_one_screen_and_imports_no_torch(command, capsys):
    words = [command, "--help"] if command else ["--help"]
    check = (
        f"import sys\nfrom cli import main\ntry:\n    main({words})\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 30
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.startswith("usage: cpe.py")


def test_the_script_is_the_command_line():
    done = subprocess.run([sys.executable, "cpe.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"cpe.py {options.VERSION}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean train?"),
        (["train", "x", "y.safetensors"], "y.safetensors: cpe.py train takes no gate files"),
        (["check", "red-heart"], "which gates? Give files that end in .safetensors: check gates/red-heart.safetensors"),
        (["bake"], "which gates? Give files that end in .safetensors: bake gates/red-heart.safetensors"),
        (["train", "x", "--rank", "0"], "0 is not between 1 and"),
        (["fly"], "invalid choice: 'fly'"),
        (["generate", "a\0b"], "is not text"),
        (["generate", "a\udce9b"], "is not text"),
        (["train", "x", "--preset", "none"], "invalid choice"),
        (["train", "x", "--steps-scale", "-1"], "is not between"),
        (["train", "x", "--steps-scale", "nan"], "is not between"),
        (["generate", "x", "--steps", "0"], "is not between"),
        (["generate", "x", "--sampler", "euler"], "invalid choice"),
        (["generate", "x", "--guidence", "4"], "did you mean --guidance?"),
    ],
)
def test_what_no_command_can_be_ends_with_exit_code_2_and_a_way_on(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("usage: cpe.py")


def test_positions_are_text_or_gate_files_wherever_they_stand():
    args = options.parse(["generate", "a cat", "x.safetensors", "--seed", "3", "a dog", "--gates", "odd"])
    assert args.prompts == ["a cat", "a dog"]
    assert args.gates == [Path("odd"), Path("x.safetensors")]
    assert options.parse(["train", "--target", "a", "b", "--seed", "1", "c"]).targets == ["a", "b", "c"]
    assert options.parse(["train", "--target", "a", "--target", "b"]).targets == ["a", "b"]
    assert options.parse(["generate"]).prompts == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "cpe.py: Resource temporarily unavailable\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "cpe.py: x: Permission denied\n"),
        (OSError("cannot identify image file"), "cpe.py: cannot identify image file\n"),
    ],
)
def test_an_error_of_the_system_is_a_sentence(run, monkeypatch, error, words):
    def fail(*_):
        raise error

    monkeypatch.setattr("cli.list.metadata_of", fail)
    Path("gates").mkdir()
    Path("gates/x.safetensors").touch()
    code, said = run("list")
    assert (code, said.endswith(words)) == (2, True)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_too_little_memory_says_what_to_try(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("cli.generate.open_model", fail)
    code, said = run("generate", "a cat", "a dog")
    assert (code, said.startswith("cpe.py: out of memory: close other programs, or try fewer prompts at once")) == (
        2,
        True,
    )


def test_another_error_is_a_traceback(run, monkeypatch):
    monkeypatch.setattr("cli.generate.open_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", "a cat")


def test_an_interruption_while_torch_is_imported_is_no_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["list"]) == 130
    assert "interrupted; nothing half-written is left" in capsys.readouterr().err


def test_output_that_nobody_reads_on_is_no_traceback(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    command = [sys.executable, ROOT / "cpe.py", "list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "cpe.py: Broken pipe\n")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_says_what_is(run, device):
    code, said = run("generate", "a cat", "--device", device)
    assert (code, f"the device {device} cannot be used" in said) == (2, True)


def test_a_model_that_is_not_there_says_which_there_are(run):
    code, said = run("train", "x", "--model", "nowhere")
    assert (code, "there is no model nowhere" in said) == (2, True)
    (code, said) = run("generate", "x", "--model", "model.ckpt")
    assert (code, "pickle" in said) == (2, True)


def test_a_picture_is_drawn_by_the_shared_arguments(run, tiny_original, tmp_path):
    assert run(*generate(tiny_original, tmp_path / "x.png"))[0] == 0
    assert (tmp_path / "x.png").exists()


# --- The page of a training --------------------------------------------------------------------------------------


@pytest.fixture
def page(run) -> Path:
    """The report of a short training."""
    code, said = run("train", "red heart", "--preset", "emoji", "--steps-scale", "0.004", "--report", "--seed", "3")
    assert code == 0, said
    assert "wrote   gates/red-heart.html" in said
    return Path("gates/red-heart.html").absolute()


def test_a_report_can_be_had_of_gates_that_are_there(run):
    short = ("train", "red heart", "--preset", "emoji", "--steps-scale", "0.004")
    assert run(*short)[0] == 0
    assert not Path("gates/red-heart.html").exists()
    code, said = run(*short, "--report")
    assert (code, "already finished" in said, Path("gates/red-heart.html").exists()) == (0, True, True)


def test_a_report_is_one_page_that_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    assert "http" not in text.replace("data:image", "")
    assert text.count("data:image/png;base64,") == 1 + 3
    for words in (
        "<h1>red heart, erased from",
        "of the change that erases it",
        "<td>seed</td><td>3</td>",
        "my red heart",
    ):
        assert words in text
    assert not re.search(r"\$\w", re.sub('base64,[^"]*', "", text))  # every field is filled in
    assert report.table([("<b>", "&")]) == "<tr><td>&lt;b&gt;</td><td>&amp;</td></tr>\n"


def test_a_browser_shows_the_report(page):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no headless Chromium: none of " + ", ".join(names))
    shot = page.with_suffix(".png")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1600"]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    first = io.BytesIO(base64.b64decode(re.search('base64,([^"]*)', page.read_text(encoding="utf-8"))[1]))
    with Image.open(shot) as seen, Image.open(first) as drawn:
        colours = {pixel for _, pixel in drawn.convert("RGB").getcolors(1 << 24)} - {(0, 0, 0), (255, 255, 255)}
        on_screen = {pixel for _, pixel in seen.convert("RGB").getcolors(1 << 24)}
    assert len(colours) > 50
    assert len(colours & on_screen) > len(colours) / 2  # the pictures themselves, not their frames alone
