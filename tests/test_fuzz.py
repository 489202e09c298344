"""Whatever stands in a file or on the command line: it works, or it ends with a sentence. Never a traceback, a hang,
or memory for what a file only claims to hold.

Plain `pytest` tries about 200 cases, the same each time; `CPE_FUZZ=10000 pytest tests/test_fuzz.py` that many new ones,
and says how many they were. Its first run tried 11,801 and found that the library of tokenizers panics at some merges;
its second, with that mended, tried 12,300 in 1,105 s (two cores, beside other work) and found nothing, but would not
have noticed most hangs. One that does (`test_a_hang_is_noticed`) tried 13303 cases in 98 s and found nothing; with
files of lines given to commands, and sd14 on no disk, 14,303 in 94 s, and nothing again. Another found a
state with an infinite position, which ended in an OverflowError; with that mended, 14,604 cases found nothing.
"""

import ctypes
import faulthandler
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save
from tiny import FEW

import clip
import cpe
import weights
from cli import check, common, demo, main, options, runs, targets
from cli import generate as drawing
from cli import train as training
from loading import files, tokens
from loading.files import UserError
from loading.prompts import parse_prompts

CASES = int(os.environ.get("CPE_FUZZ", "200"))
TRIED: Counter[str] = Counter()  # cases by test
SECONDS, MEGABYTES = 60, 400  # one case, on a busy machine; what a test may add to the memory in use
ENDLESS = 180  # seconds until compiled code that lets no signal through is ended, and the tests with it


def cases(share: float) -> settings:
    """Settings of a test that gets this share of all cases."""
    return settings(
        max_examples=math.ceil(CASES * share),
        derandomize="CPE_FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """Not done in time. No Exception, which the code under test might take for one of its own."""


@contextmanager
def ends_well(*errors: type[Exception]):
    """The block succeeds or raises one of `errors` with one line for people, soon."""
    TRIED[os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]] += 1

    def stop(*_):
        raise Hang(f"not done after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(ENDLESS, exit=True, file=sys.__stderr__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except errors as error:
        if not str(error).strip():
            raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("hanging", "call"),
    [
        ("safetensors.safe_open", lambda: files.load_tensors(__file__)),
        ("loading.tokens.Tokenizer", lambda: tokens.read_tokenizer(Path())),
        ("cli.inspect.run", lambda: main(["inspect", "x.safetensors", "y"])),
    ],
)
def test_a_hang_is_noticed(hanging, call, monkeypatch):
    """Whoever catches errors of any kind does not catch this one."""
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.1)
    monkeypatch.setattr(hanging, lambda *_, **__: time.sleep(10))
    with pytest.raises(Hang), ends_well(UserError):
        call()


def memory(name: str) -> int:
    """VmRSS, the memory of this process in KiB, or VmHWM, the most that it was; Linux only."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


@contextmanager
def little_memory():
    """The block needs no more than `MEGABYTES` above what is in use; not measured where no peak can be forgotten."""
    measured = False
    with suppress(OSError, AttributeError):  # not Linux, or not glibc
        ctypes.CDLL(None).malloc_trim(0)  # or the block is served from what others have freed, and no peak rises
        Path("/proc/self/clear_refs").write_text("5")  # or the peak would be that of the tests before
        measured, before = True, memory("VmRSS")
    yield
    if measured:
        assert memory("VmHWM") - before < MEGABYTES * 1024


@pytest.fixture(autouse=True)
def no_more_memory():
    """No test needs more memory than its own small files."""
    with little_memory():
        yield


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be forgotten here")
def test_memory_is_noticed_below_an_earlier_peak(monkeypatch):
    """The peak is gone, but the allocator keeps most of it: under the block that was freed last lies one in use."""
    freed, in_use = [bytearray(100_000) for _ in range(800)], bytearray(100_000)
    del freed
    monkeypatch.setattr(sys.modules[__name__], "MEGABYTES", 20)
    with pytest.raises(AssertionError), little_memory():
        assert len(bytearray(40 << 20))
    with little_memory():
        assert len(bytearray(10 << 20))
    assert len(in_use)


# --- What to try -------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, -1, 77, 10**6, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30])
TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # every code point, halves of surrogate pairs too
LONG = st.tuples(TEXT, st.integers(0, 2000)).map(lambda pair: pair[0] * pair[1])
JSON = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | TEXT | st.just({}),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64", "X", "")

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_"


def gate_file() -> dict[str, torch.Tensor]:
    """The tensors of a small gate file."""
    widths = {f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{x}": 6 for x in "kv"}
    return cpe.to_tensors(cpe.ResAG(widths, d=4, r=2))


@st.composite
def headers(draw) -> bytes:
    """A safetensors file with any header: lengths, types, shapes and places that need not fit."""
    names = st.sampled_from([*gate_file(), "a", "__metadata__"]) | TEXT
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(DTYPES) | JSON,
            "shape": st.lists(SIZES, max_size=4) | JSON,
            "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
        },
    )
    header = json.dumps(draw(st.dictionaries(names, entry | JSON, max_size=4))).encode()
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=64))


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes with a few of them changed, and perhaps the end missing."""
    content = bytearray(content)
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[place] = value
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Small tensors of any type; sizes without elements may be huge."""
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float4_e2m1fn_x2]
    dtypes = st.sampled_from([*dtypes, torch.int64, torch.bool, torch.complex64, torch.uint8])
    shapes = st.lists(st.integers(0, 6), max_size=4) | st.sampled_from(
        [[0, 2**40], [1, 0, 2**40], [2**40, 0, 1], [1, 1, 5000], [1, 5000, 1], [1, 1, 0]]
    )
    values = st.sampled_from([0.0, 1.0, 1e300, math.nan, math.inf])

    def make(dtype: torch.dtype, shape: list[int], value: float) -> torch.Tensor:
        with suppress(RuntimeError, NotImplementedError):
            return torch.full(shape, value, dtype=torch.float64).to(dtype)
        return torch.empty(shape, dtype=dtype)

    return st.builds(make, dtypes, shapes, values)


def changed(known: dict, values: st.SearchStrategy) -> st.SearchStrategy[dict]:
    """The dictionary with up to three entries gone, others, or new."""
    missing = object()
    changes = st.dictionaries(st.sampled_from(list(known)) | TEXT, values | st.just(missing), min_size=1, max_size=3)
    return changes.map(lambda change: {k: v for k, v in {**known, **change}.items() if v is not missing})


def saved(content: dict[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file; nothing where safetensors itself refuses to write it."""
    with suppress(SafetensorError):
        return save(content)
    return b""


# --- Files -------------------------------------------------------------------------------------------------------


@cases(0.30)
@given(headers() | damaged(save(gate_file())) | st.binary(max_size=200))
def test_any_safetensors_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    with ends_well(UserError, ValueError):
        cpe.from_tensors(files.load_tensors(path)[0])


@cases(0.15)
@given(changed(gate_file(), tensors()))
def test_any_gate_file(content):
    with ends_well(ValueError):
        gates = cpe.from_tensors(content)
        kv = {name: torch.zeros(1, 5, width) for name, width in gates.widths.items()}
        assert set(gates(torch.ones(1, 5, gates.w_qs.shape[1]), kv)) == set(gates.names)


@pytest.fixture(scope="module")
def spoilt(tiny_original, tmp_path_factory) -> Path:
    """A copy of the tiny model's folder for this file to spoil."""
    return Path(shutil.copytree(tiny_original, tmp_path_factory.mktemp("spoilt") / "tiny"))


@cases(0.10)
@given(st.data())
def test_any_weights_file(spoilt, tiny_original, data):
    """In a part of a folder, or alone as a checkpoint: bytes changed, or tensors other than they should be."""
    part = data.draw(st.sampled_from(["text_encoder", "vae", "clip"]))
    (file,) = (path.name for path in (tiny_original / part).glob("*.safetensors"))
    kept = files.load_tensors(tiny_original / part / file)[0]
    content = data.draw(damaged(save(kept)) | changed(kept, tensors()).map(saved) | headers())
    path = data.draw(st.sampled_from([spoilt / part / file, spoilt / "alone.safetensors"]))
    path.write_bytes(content)
    try:
        with ends_well(UserError):
            model = weights.load_model(path if path.parent == spoilt else spoilt)
            assert getattr(model, part)
    finally:
        shutil.copy(tiny_original / part / file, spoilt / part / file)


@cases(0.15)
@given(st.data())
def test_any_config(spoilt, tiny_original, data):
    part = data.draw(st.sampled_from([*weights.PARTS, "scheduler"]))
    file = weights.SCHEDULER if part == "scheduler" else f"{part}/config.json"
    config = files.read_json(tiny_original / file)
    inner = data.draw(st.sampled_from([None, *(key for key, value in config.items() if isinstance(value, dict))]))
    if inner:
        config[inner] = data.draw(changed(config[inner], JSON))
    else:
        config = data.draw(changed(config, JSON | st.lists(SIZES, max_size=3)))
    text = json.dumps(config).encode()
    (spoilt / file).write_bytes(data.draw(st.just(text) | damaged(text)))
    try:
        with ends_well(UserError):
            model = weights.load_model(spoilt, parts=())
            if part == "scheduler":
                assert min(model.schedule.timesteps(1)) >= 0
            else:
                getattr(model, part)
    finally:
        shutil.copy(tiny_original / file, spoilt / file)


@cases(0.08)
@given(st.data())
def test_any_tokenizer(spoilt, tiny_original, data):
    file = data.draw(st.sampled_from(tokens.TOKENIZER))
    content = (tiny_original / "tokenizer" / file).read_bytes()
    if file == "vocab.json":
        table = st.dictionaries(TEXT, JSON, max_size=5) | changed(json.loads(content), SIZES | JSON)
        text = table.map(lambda table: json.dumps(table).encode())
    else:
        lines = content.decode().splitlines()
        text = st.lists(st.sampled_from(lines) | TEXT, max_size=50).map("\n".join)
        text = text.map(lambda text: text.encode(errors="surrogatepass"))
    (spoilt / "tokenizer" / file).write_bytes(data.draw(text | damaged(content) | st.binary(max_size=50)))
    try:
        with ends_well(UserError):
            assert weights.load_model(spoilt).encode(["a red heart", ""]).isfinite().all()
    finally:
        shutil.copy(tiny_original / "tokenizer" / file, spoilt / "tokenizer" / file)


@cases(0.10)
@given(
    st.lists(
        st.sampled_from(["[templates]", "[frames]", "[general]", "[domain]", "[", "# x", "a {}", "a", "{}", "{}{}"])
        | TEXT
    )
)
def test_any_file_of_prompts(lines):
    with ends_well(ValueError):
        prompts = parse_prompts("\n".join(lines))
        for template in prompts.templates:
            assert template.format("x") == template.replace("{}", "x")


def trainer() -> runs.Trainer:
    """A trainer of the smallest gates."""
    draw = torch.Generator().manual_seed(0)
    layers = {f"mid.{x}.weight": torch.randn(4, 4, generator=draw) for x in ("to_q", "to_k", "to_v", "to_out.0")}
    contexts = [torch.randn(n, 3, 4, generator=draw) for n in (2, 2, 5, 1)]
    recipe = cpe.Recipe(
        "x", eta=0.3, lam=1.0, r=2, stages=2, first_steps=2, later_steps=2, attack_steps=4, deltas=2, anchors=2
    )
    layers = cpe.Layers.of(layers)
    return runs.Trainer(
        cpe.ResAG(layers.widths, 4, 2, generator=draw), cpe.Losses(layers, cpe.Data(*contexts), 0.3), recipe, draw
    )


def state() -> dict[str, torch.Tensor]:
    """The state of a trainer some steps into an attack."""
    made = trainer()
    for _ in zip(range(4), made):  # noqa: B905 the shorter one ends it
        pass
    return made.state()


@cases(0.05)
@given(changed(state(), tensors()))
@example(state() | {"position": torch.tensor([math.inf, 0])})
def test_any_state_to_go_on_from(content):
    made = trainer()
    with ends_well(ValueError, FloatingPointError):
        made.load_state(content)
        assert sum(1 for _ in made) <= 8


# --- Words -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_original) -> clip.Tokenizer:
    return tokens.read_tokenizer(tiny_original / "tokenizer")


@cases(0.10)
@given(TEXT | LONG)
def test_any_prompt(tokenizer, prompt):
    text = not any("\ud800" <= letter <= "\udfff" for letter in prompt)
    with ends_well(*([] if text else [ValueError])):
        ids = tokenizer([prompt])
        assert ids.shape == (1, 77)
        assert len(tokenizer.tokens(prompt)) == len(tokenizer.ids(prompt))
        assert text


@cases(0.10)
@given(
    TEXT | LONG | st.sampled_from(["red heart, dog", "a;b", "A and B", "con", "#", "♥"]),
    st.sampled_from(["emoji", "x"]),
)
def test_any_target(text, model):
    with ends_well(UserError):
        for name in targets.split([text], model):
            assert 0 < len(common.slug(name).encode()) <= 80


@cases(0.10)
@given(TEXT | st.sampled_from(['"a, b', 'a, "b" c', '""', "1,", "- a"]))
def test_any_line_of_a_targets_file_in_double_quotes_is_one_name(text):
    with ends_well(UserError):
        targets.names_in(text, "emoji")
    quoted = '"{}"'.format(text.replace('"', '""'))
    assert not text.strip() or targets.names_in(quoted, "emoji") == [text]


PATHS = st.sampled_from(["x", "", ".", "..", "../..", "~", "~nobody/x", "a/b", "x" * 300, "x/" * 3000, "tiny", "\0"])
OPTIONS = {
    "train": (
        "--target",
        "--targets",
        "--alias",
        "--surrogate",
        "--preset",
        "--steps-scale",
        "--how",
        "--eta",
        "--rank",
    ),
    "generate": ("--prompts", "--steps", "--guidance", "--sampler", "--dtype", "--gates", "--negative"),
    "inspect": ("--out",),
    "check": ("--sentences",),
    "demo": ("--steps", "--guidance", "--sampler"),
}
FLAGS = {"train": ("--literal", "--published", "--one-name"), "generate": ("--before-after",)}
VALUES = (
    st.sampled_from(["emoji", "context", "dpm", "float16", "bfloat16", "1e400", "nan", "-1", "١", "9" * 5000])
    | st.sampled_from(
        [
            "gate.safetensors",
            "large.safetensors",
            "../x",
            "/etc/x",
            "con",
            "x" * 5000,
            "red heart",
            "noto style",
            "santa claus",
            "Brad Pitt",
        ]
    )
    | st.sampled_from([*options.PRESETS, "solve", "1", "0.5"])
    | TEXT
    | PATHS
    | st.integers(-2, 2000).map(str)
)


MODELS = PATHS | st.sampled_from(["emoji", "sd14"])


@st.composite
def command_lines(draw) -> list[str]:
    """A command with options that exist and values that need not make sense."""
    name = draw(st.sampled_from(list(OPTIONS)))
    gates = draw(st.sampled_from(["gate.safetensors", "large.safetensors"]))
    first = {"train": [draw(VALUES)], "generate": [draw(TEXT)], "inspect": [gates, draw(st.just("a cat") | TEXT)]}
    first |= {"check": [gates], "demo": []}
    options = st.tuples(st.sampled_from([*OPTIONS[name], "--seed", "--device"]), VALUES)
    places = st.tuples(st.just("--model"), MODELS)
    places |= st.tuples(st.just("--out"), PATHS) if name != "check" else st.nothing()
    flags = st.sampled_from(FLAGS[name]).map(lambda flag: (flag,)) if name in FLAGS else st.nothing()
    drawn = draw(st.lists(options | places | flags, max_size=4))
    return [name, *["--model", "tiny"] * (name != "demo"), *first[name], *(word for pair in drawn for word in pair)]


@pytest.fixture
def nothing_heavy(tiny_original, tmp_path, monkeypatch):
    """An empty folder with a model and gate files, where training and drawing take no time, and nothing to download.

    "emoji" is the tiny model, and sd14 is on no disk; gate.safetensors fits the one, large.safetensors the other.
    """
    home = tmp_path / "home"
    home.mkdir()
    (home / "tiny").symlink_to(tiny_original)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("something was connected to"))
    unets = {"emoji": weights.load_model(tiny_original).part("unet").empty(), "sd14": weights.expected_unet("sd14")}
    monkeypatch.setattr(weights, "expected_unet", unets.__getitem__)
    for name, (d, widths) in {n: common.sizes_of(unet) for n, unet in unets.items()}.items():
        tensors = cpe.to_tensors(cpe.ResAG(widths, d, r=1))
        path = home / {"emoji": "gate.safetensors", "sd14": "large.safetensors"}[name]
        files.save_tensors(path, tensors, {"target": "red heart"})
    monkeypatch.setattr(common, "expected_unet", unets.__getitem__)
    monkeypatch.chdir(home)
    layers = common.sizes_of(unets["emoji"])
    made = SimpleNamespace(gates=cpe.ResAG(layers[1], layers[0]))
    monkeypatch.setattr(training, "trainer_of", lambda *_: made)
    monkeypatch.setattr(training, "solved", lambda *_: made.gates)
    monkeypatch.setattr(training, "train", lambda *_: None)
    monkeypatch.setattr(demo, "print_table", lambda *_: None)
    monkeypatch.setattr(demo, "nearest_words", lambda *_: ["dog face", "cat", "fox", "crab"])
    monkeypatch.setattr(drawing.sampler, "draw", lambda model, prompts, *_, **__: torch.zeros(len(prompts), 3, 8, 8))
    for module in (check, demo, targets, training):
        monkeypatch.setattr(module, "read_prompts", lambda preset: FEW)
    for module in (check, drawing, training):
        opened = module.open_model

        def small_model(args, parts, files=(), opened=opened):
            args.model = "tiny" if args.model == "emoji" else args.model
            return opened(args, [part for part in parts if part != "clip"], files)

        monkeypatch.setattr(module, "open_model", small_model)
    return home


@cases(0.10)
@given(command_lines())
def test_any_command_line(nothing_heavy, capsys, arguments):
    with ends_well():
        try:
            code = main(arguments)
        except SystemExit as stop:  # argparse's own
            code = stop.code
        assert code in (0, 2)
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    assert streams.out if code == 0 else streams.err
    assert [path.name for path in nothing_heavy.parent.iterdir()] == ["home"]  # nothing left the folder


NEWLINES = st.just("\n") | st.sampled_from(["\r\n", "\r", "\n\n", "\x0b", "\u2028", "\x85", "\0"])
CODES = st.just("utf-8") | st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "latin-1"])
LINES = st.sampled_from(
    ["red heart", "dog", "a cat, tom", "# x", "", ",", "con", "Red Heart", "a" * 300, "..", "/etc/x"]
)


@st.composite
def files_of_lines(draw) -> bytes:
    """A text file with lines of any letters, in some encoding, perhaps damaged; or any bytes at all."""
    long = LONG.map(lambda text: re.sub("[\r\n]", " ", text))  # thousands of pictures take their time
    lines = draw(st.lists(LINES | TEXT | long, min_size=1, max_size=5))
    if draw(st.integers(0, 9)) == 9:
        lines *= 20
    text = draw(NEWLINES).join(lines)
    whole = text.encode(draw(CODES), errors=draw(st.sampled_from(["replace", "ignore"])))
    odd = damaged(whole + b"\n") | st.just(text.encode(errors="surrogatepass")) | st.binary(max_size=100)
    return draw(st.sampled_from([whole, whole, draw(odd)]))


@cases(0.10)
@given(files_of_lines(), st.sampled_from(["tiny", "emoji", "sd14"]), st.sampled_from(["generate", "train"]))
def test_any_file_of_lines_given_to_a_command(nothing_heavy, capsys, content, model, command):
    Path("lines.txt").write_bytes(content)
    option = {"generate": "--prompts", "train": "--targets"}[command]
    with ends_well():
        code = main([command, option, "lines.txt", "--out", "out", "--model", model])
    assert code in (0, 2)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if code == 0:
        assert 0 < len(list(Path("out").iterdir())) <= len(re.split(r"\r\n|\r|\n", content.decode("utf-8-sig")))
    else:
        assert said.err.strip()
    assert {path.name for path in nothing_heavy.parent.iterdir()} == {"home"}
    shutil.rmtree("out", ignore_errors=True)


@pytest.mark.skipif("CPE_FUZZ" not in os.environ, reason="counts only when a number is asked for")
def test_as_many_cases_were_tried_as_were_asked_for(capsys):
    with capsys.disabled():
        print(f"\n{sum(TRIED.values())} cases: {', '.join(f'{n} {name}' for name, n in TRIED.items())}")
    assert sum(TRIED.values()) >= CASES
