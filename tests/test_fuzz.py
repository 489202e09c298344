"""Whatever stands in a file or on the command line: it works, or it ends with a sentence. Never a traceback, a hang,
or memory for what a file only claims to hold.

Plain `pytest` tries about 200 cases, the same each time; `CPE_FUZZ=10000 pytest tests/test_fuzz.py` that many new ones,
and says how many they were. Its first run tried 11,801 and found that the library of tokenizers panics at some merges;
its second, with that mended, tried 12,300 in 1,105 s (two cores, beside other work) and found nothing, but would not
have noticed most hangs. One that does (`test_a_hang_is_noticed`) tried 13303 cases in 98 s and found nothing; with
files of lines given to commands, and sd14 on no disk, 14,303 in 94 s, and nothing again. Another found a
state with an infinite position, which ended in an OverflowError; with that mended, 14,604 cases found nothing.
"""

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

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

import bake
import clip
import commands
import compare
import many
import old_cpe as cpe
import weights
from loading import files, tokens
from loading.files import UserError
from loading.prompts import parse_prompts

CASES = int(os.environ.get("CPE_FUZZ", "200"))
TRIED: Counter[str] = Counter()  # cases by test
SECONDS, MEGABYTES = 60, 400  # one case, on a busy machine; what a test may add to the memory in use


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
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(
        3 * SECONDS, exit=True, file=sys.__stderr__
    )  # compiled code lets no signal through
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except errors as error:
        if not str(error).strip():
            raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("hanging", "call"),
    [
        ("safetensors.safe_open", lambda: files.load_tensors(__file__)),
        ("loading.tokens.Tokenizer", lambda: tokens.read_tokenizer(Path())),
        ("commands.inspect", lambda: commands.main(["inspect", "x", "--prompt", "y"])),
    ],
)
def test_a_hang_is_noticed(hanging, call, monkeypatch):
    """Whoever catches errors of any kind does not catch this one."""
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
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
    with suppress(OSError):
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
    assert len(bytearray(80 << 20))  # and free it
    monkeypatch.setattr(sys.modules[__name__], "MEGABYTES", 20)
    with pytest.raises(AssertionError), little_memory():
        assert len(bytearray(40 << 20))
    with little_memory():
        assert len(bytearray(10 << 20))


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
    return cpe.to_tensors(cpe.ResAG(widths, d=4, r=2).initialise(torch.Generator().manual_seed(0)))


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
    with ends_well(UserError):
        files.read_shapes(path)
    with ends_well(UserError, ValueError):
        cpe.from_tensors(files.load_tensors(path)[0])


@cases(0.15)
@given(changed(gate_file(), tensors()))
def test_any_gate_file(content):
    with ends_well(ValueError):
        gates = cpe.from_tensors(content)
        kv = {name: torch.zeros(1, 5, width) for name, width in zip(gates.names, gates.widths, strict=True)}
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


def trainer() -> cpe.Trainer:
    """A trainer of the smallest gates, some steps into an attack."""
    draw = torch.Generator().manual_seed(0)
    layers = {f"mid.{x}.weight": torch.randn(4, 4, generator=draw) for x in ("to_q", "to_k", "to_v", "to_out.0")}
    contexts = [torch.randn(n, 3, 4, generator=draw) for n in (2, 2, 5, 1)]
    recipe = cpe.Recipe(
        "x", eta=0.3, lam=1.0, r=2, stages=2, first_steps=2, later_steps=2, attack_steps=4, deltas=2, anchors=2
    )
    return cpe.Trainer(cpe.Objective(layers), cpe.Data(*contexts), recipe)


def state() -> dict[str, torch.Tensor]:
    run = trainer()
    for step, _ in enumerate(run.steps()):
        if step == 3:
            break
    return run.state()


@cases(0.05)
@given(changed(state(), tensors()))
@example(state() | {"position": torch.tensor([math.inf, 0])})
def test_any_state_to_go_on_from(content):
    run = trainer()
    with ends_well(ValueError, cpe.Diverged):
        run.load_state(content)
        assert sum(1 for _ in run.steps()) <= 8


@pytest.fixture(scope="module")
def new_baker(tiny_original):
    """A function that makes a baker of the tiny model, before its first step."""
    model = weights.load_model(tiny_original)
    objective = cpe.Objective(model.cross_attention())
    gates = objective.new_gates("context", 2, 1, torch.Generator().manual_seed(0)).requires_grad_(False)
    gates.inner.lora_up += 0.3
    tokens = model.tokenizer(["a red heart"]), model.tokenizer(["", "a dog", "a cat"])
    recipe = bake.Recipe(steps=4, targets=1, others=2)
    return lambda: bake.Baker(model.text_encoder, gates, objective, *tokens, recipe)


def test_a_state_of_a_bake_that_is_nowhere(new_baker):
    baker = new_baker()
    next(baker.steps())
    for done in (math.inf, math.nan):
        with pytest.raises(ValueError, match="another run"):
            baker.load_state(baker.state() | {"done": torch.tensor(done)})


@cases(0.05)
@given(st.data())
def test_any_state_of_a_bake_to_go_on_from(new_baker, data):
    baker = new_baker()
    next(baker.steps())
    content = data.draw(changed(baker.state(), tensors()))
    with ends_well(ValueError, cpe.Diverged):
        baker.load_state(content)
        assert sum(1 for _ in baker.steps()) <= 4


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
    st.lists(
        TEXT | LONG | st.sampled_from(["# x", "a, b", ",", "red heart", "Red-Heart", "con", "con target"]), max_size=5
    )
)
def test_any_file_of_targets(tmp_path, lines):
    path = tmp_path / "targets.txt"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    shared = commands.Training(commands.parser().parse_args(["train", "--targets", str(path)]))
    with ends_well(UserError):
        targets = many.read_targets(path, tmp_path, shared)
        assert {target.out.parent for target in targets} == {tmp_path}
        assert len({target.out.name for target in targets}) == len(targets)


CONCEPT = {"target": "red heart", "surrogate": "an object", "eta": "0.3", "aliases": '["love"]', "prompts": "red heart"}


@cases(0.05)
@given(changed(CONCEPT, TEXT | JSON.map(json.dumps)))
def test_any_metadata_of_a_gate_file(content):
    with ends_well(ValueError):
        concept = bake.read_concept(content, cpe.PRESETS["emoji"])
        assert all(isinstance(name, str) for name in concept.names)


PATHS = st.sampled_from(["x", "", ".", "..", "../..", "~", "~nobody/x", "a/b", "x" * 300, "x/" * 3000, "tiny", "\0"])
OPTIONS = {
    "train": ("--target", "--targets", "--alias", "--surrogate", "--preset", "--steps-scale", "--gate"),
    "generate": ("--prompts", "--steps", "--guidance", "--sampler", "--dtype", "--gates"),
    "inspect": ("--prompt", "--dtype"),
    "bake": ("--gates", "--preset", "--steps-scale", "--images", "--steps", "--guidance", "--sampler"),
    "compare": ("--target", "--preset", "--scenario", "--eraser", "--clip"),
    "demo": ("--target", "--images", "--steps", "--guidance", "--sampler"),
}
FLAGS = {
    "train": ("--resume",),
    "generate": ("--before-after",),
    "bake": ("--resume",),
    "compare": ("--quick", "--ablations"),
}
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
    | st.sampled_from([*commands.PRESET_NAMES, *compare.SCENARIOS, *compare.METHODS, "1", "0.5"])
    | TEXT
    | PATHS
    | st.integers(-2, 2000).map(str)
)


MODELS = PATHS | st.sampled_from(["emoji", "sd14"])


@st.composite
def command_lines(draw) -> list[str]:
    """A command with options that exist and values that need not make sense."""
    name = draw(st.sampled_from(list(OPTIONS)))
    first = {
        "train": ["--target", draw(VALUES)],
        "generate": [draw(TEXT)],
        "inspect": [
            gates := draw(st.sampled_from(["gate.safetensors", "large.safetensors"])),
            "--prompt",
            draw(st.just("a cat") | TEXT),
        ],
        "bake": ["--gates", gates, "--out", "baked"],
    }.get(name, [])
    everywhere = ["--seed", *(["--device"] if name != "demo" else [])]
    options = st.tuples(st.sampled_from([*OPTIONS[name], *everywhere]), VALUES)
    files = {"inspect": [], "compare": ["--out", "--markdown"]}.get(name, ["--out"])
    places = st.tuples(st.sampled_from(["--json", *files]), PATHS)
    if name != "demo":
        places |= st.tuples(st.just("--model"), MODELS)
    flags = st.sampled_from(FLAGS[name]).map(lambda flag: (flag,)) if name in FLAGS else st.nothing()
    drawn = draw(st.lists(options | places | flags, max_size=4))
    model = ["--model", "tiny"] if name != "demo" else []
    return [name, *model, *first, *(word for pair in drawn for word in pair)]


def cell(world, scenario, method, budget, *_) -> tuple[dict, torch.Tensor]:
    """Stands in for compare.measure: the figures of a cell, with no image recognised."""
    drawn = compare.cases(world, scenario, budget)
    groups = {case.group: {"images": 1, "hits": 0, "change": 0.0} for case in drawn}
    figures = {"groups": groups, "style": {"images": 0, "hits": 0}, "clip_score": 0.0, "cmmd": 0.0, "H": 0.0}
    figures |= {"attacks": {}, "seconds": 0.0, "parameters": 0, "bytes": 0}
    return figures, torch.zeros(len(drawn), 3, 8, 8, dtype=torch.uint8)


class Trained:
    """A trainer that has come to its end."""

    objective, finished = None, True

    def steps(self) -> tuple[()]:
        """None are left."""
        return ()

    def state(self) -> dict[str, torch.Tensor]:
        """There is nothing to go on with."""
        return {}


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
    d, widths = commands.wanted_sizes(unets["sd14"])
    large = cpe.to_tensors(cpe.ResAG(widths, d, r=1).initialise(torch.Generator().manual_seed(0)))
    files.save_tensors(home / "large.safetensors", large, {"target": "red heart"})
    objective = cpe.Objective(weights.load_model(tiny_original).cross_attention())
    gates = objective.new_gates("resag", 2, 1, torch.Generator())
    files.save_tensors(home / "gate.safetensors", cpe.to_tensors(gates), {"target": "red heart"})
    monkeypatch.chdir(home)
    monkeypatch.setattr(commands, "build_trainer", lambda *_: Trained())
    monkeypatch.setattr(commands, "watch", lambda *_: None)
    monkeypatch.setattr(commands.Run, "begin", lambda *_, **__: None)
    monkeypatch.setattr(commands, "finished_gates", lambda *_: gates)
    monkeypatch.setattr(commands, "check_reached", lambda *_: 1.0)
    monkeypatch.setattr(commands, "draw", lambda model, prompts, *_: torch.zeros(len(prompts), 3, 8, 8))
    monkeypatch.setattr(compare, "measure", cell)
    monkeypatch.setattr(compare, "side_by_side", lambda *_: ())  # other processes would know none of this
    read = commands.read_prompts

    def few_prompts(preset: str) -> cpe.Prompts:
        prompts = read(preset)
        named = {*compare.FIFTY, "cat face", "red apple"}
        domain = [word for i, word in enumerate(prompts.domain) if i % 10 == 0 or word in named]
        return cpe.Prompts(prompts.templates[:2], prompts.general, domain)

    monkeypatch.setattr(commands, "read_prompts", few_prompts)
    opened = commands.open_model

    def small_model(args, parts, *dtype):
        args.model = "tiny" if args.model == "emoji" else args.model
        return opened(args, parts, *dtype)

    monkeypatch.setattr(commands, "open_model", small_model)
    return home


@cases(0.10)
@given(command_lines())
def test_any_command_line(nothing_heavy, capsys, arguments):
    with ends_well():
        try:
            code = commands.main(arguments)
        except SystemExit as stop:  # argparse's own
            code = stop.code
        assert code in (0, 2)
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    assert streams.out if code == 0 else streams.err
    assert [path.name for path in nothing_heavy.parent.iterdir()] == ["home"]  # nothing left the folder
    shutil.rmtree(nothing_heavy / "baked", ignore_errors=True)  # so that it can be baked again


@cases(0.03)
@given(
    st.dictionaries(
        st.sampled_from(["w_qs", "scaler", "lora_down", "lora_up"]), st.sampled_from([0.0, 1e-4, 1e4, 1e18, 1e30])
    )
)
def test_any_sizes_of_gates_given_to_bake(nothing_heavy, capsys, sizes):
    """Its encoding and fitting is done in earnest, its training is not."""
    tensors, metadata = files.load_tensors("gate.safetensors")
    gates, chance = cpe.from_tensors(tensors), torch.Generator().manual_seed(0)
    for name, parameter in gates.named_parameters():
        parameter.data = sizes.get(name, 1.0) * torch.randn(parameter.shape, generator=chance)
    files.save_tensors(Path("x.safetensors"), cpe.to_tensors(gates), metadata)
    with ends_well():
        code = commands.main(["bake", "--gates", "x.safetensors", "--out", "baked", "--model", "tiny"])
    assert code in (0, 2)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.err.strip() or code == 0
    shutil.rmtree("baked", ignore_errors=True)


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
        code = commands.main([command, option, "lines.txt", "--out", "out", "--json", "x.json", "--model", model])
    assert code in (0, 2)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if code == 0:
        figures = json.loads(Path("x.json").read_text(encoding="utf-8"))
        done = figures["pictures"] if command == "generate" else figures["targets"].values()
        assert sorted(path.name for path in Path("out").iterdir()) == sorted(Path(each["out"]).name for each in done)
        assert 0 < len(done) <= len(re.split(r"\r\n|\r|\n", content.decode("utf-8-sig")))
    else:
        assert said.err.strip()
    assert {path.name for path in nothing_heavy.parent.iterdir()} == {"home"}
    shutil.rmtree("out", ignore_errors=True)


@pytest.mark.skipif("CPE_FUZZ" not in os.environ, reason="counts only when a number is asked for")
def test_as_many_cases_were_tried_as_were_asked_for(capsys):
    with capsys.disabled():
        print(f"\n{sum(TRIED.values())} cases: {', '.join(f'{n} {name}' for name, n in TRIED.items())}")
    assert sum(TRIED.values()) >= CASES
