"""What the benchmarks share: random weights in the sizes of Stable Diffusion 1.4, a clock, and the machine's name.

Speed and memory do not depend on the values of weights, so none have to be downloaded.
"""

import json
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpe  # noqa: E402
import weights  # noqa: E402
from clip import TextEncoder  # noqa: E402
from loading import configs, files  # noqa: E402
from loading.parts import Undrawn  # noqa: E402
from loading.prompts import parse_prompts  # noqa: E402
from unet import UNet  # noqa: E402
from vae import VAE  # noqa: E402

CONFIGS = configs.SD14_CONFIGS
WIDTH, TOKENS = CONFIGS["unet"]["cross_attention_dim"], 77
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def machine() -> str:
    """The processor, how many threads use it, and torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)  # of the last core
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        name = f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        name = platform.processor() or platform.machine()
    matrix, bfloat16 = torch.randn(1024, 1024), torch.randn(1024, 1024, dtype=torch.bfloat16)
    rates = [2 * 1024**3 / milliseconds(lambda m=m: m @ m) / 1e6 for m in (matrix, bfloat16)]
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"products of matrices: {rates[0]:.0f} GFLOP/s in float32, {rates[1]:.0f} in bfloat16"
    )


def flags() -> set[str]:
    """What the processor says it can do, on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def peak() -> float:
    """Peak resident memory of this process so far, in MiB, weights mapped from a file included.

    On Linux not `ru_maxrss`, which begins with that of the process by which this one was started.
    """
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def milliseconds(run: Callable[[], object], repeats: int = 15, warmup: int = 3) -> float:
    """Time of `run` in ms: the fastest of the repeats, so that other work on the machine falsifies it least."""
    times = []
    for _ in range(warmup + repeats):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return min(times[warmup:])


def cross_attention() -> dict[str, Tensor]:
    """Random to_q, to_k, to_v, to_out.0 of the 16 cross-attention layers, at the scale of torch's initial values."""
    with torch.device("meta"), Undrawn():
        layers = UNet(CONFIGS["unet"]).cross_attentions()
    parts = {f"{path}.{part}.weight": (layer, part) for path, layer in layers.items() for part in ATTENTION}
    shapes = {key: layer.get_submodule(part).weight.shape for key, (layer, part) in parts.items()}
    return {key: torch.randn(shape) / (3 * shape[1]) ** 0.5 for key, shape in shapes.items()}


def data() -> cpe.Data:
    """Random contexts, as many as the celebrity preset has; tokens have norm sqrt(768), as after a LayerNorm."""
    prompts = parse_prompts((ROOT / "prompts" / "celebrity.txt").read_text(encoding="utf-8"))
    templates = len(prompts.templates)
    anchors = 4 * (len(prompts.general) + cpe.PRESETS["celebrity"].nearest)
    contexts = torch.randn(2 * templates + 1, TOKENS, WIDTH)
    return cpe.Data(
        contexts[:templates],
        contexts[templates:-1],
        torch.randn(anchors, TOKENS, WIDTH).half(),
        contexts[-1:],
    )


PARTS = {"text_encoder": TextEncoder, "unet": UNet, "vae": VAE}


def write_model(folder: Path) -> Path:
    """A folder in the diffusers layout, float32, at full size (4.2 GB), random weights, unless it is there already.

    The tokenizer is the embedded model's, filled up to the official size with words that no prompt holds.
    """
    if (folder / "random-weights").exists():
        return folder
    if folder.exists():
        raise SystemExit(f"{folder} is there already, and not of this script: give another --folder")
    for part, build in PARTS.items():
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        files.write_text(folder / part / "config.json", json.dumps(CONFIGS[part]))
        with torch.device("meta"), Undrawn():
            shapes = {name: t.shape for name, t in build(CONFIGS[part]).state_dict().items()}
        tensors = {n: torch.ones(s) if len(s) == 1 else torch.randn(s) * 0.02 for n, s in shapes.items()}
        files.save_tensors(folder / part / f"{file}.safetensors", tensors)
        del tensors
    tokenizer = ROOT / "emoji" / "tokenizer"
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    size = CONFIGS["text_encoder"]["vocab_size"]
    # BOS and EOS stay the highest ids, as in CLIP
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = sorted((w for w in vocabulary if w not in ends), key=vocabulary.get)
    words += [f"<unused {i}>" for i in range(size - len(words) - len(ends))] + ends
    files.write_text(folder / "tokenizer" / "vocab.json", json.dumps({w: i for i, w in enumerate(words)}))
    files.write_text(folder / "tokenizer" / "merges.txt", (tokenizer / "merges.txt").read_text())
    files.write_text(folder / weights.SCHEDULER, json.dumps(CONFIGS["scheduler"]))
    files.write_text(folder / "random-weights", "")
    return folder
