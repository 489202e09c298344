"""One denoising step and one decoding at Stable Diffusion 1.4's size, against diffusers: time, ratio, difference.

    python benchmarks/generation.py [--part unet vae] [--dtype float32 bfloat16] [--repeats 3] [--plain]

Ours is sped up for the CPU (speedup.py); with --plain it is plain torch, as the command line has it.

Weights are random in the official layout (speed does not depend on their values) and the same for both. The step is
of two images of 64x64 latents, as guidance needs them for one; the decoding makes one image of 512x512. Both sides
run in this process, on the same threads, by turns; the fastest of each side's repeats counts. `difference` is the
largest absolute difference of the two outputs, as a share of the largest output.

`GFLOP/s` is our speed in the multiplications and additions that diffusers makes, to be compared
with that of one large matrix product, printed above: the processor does no more than that.
"""

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny

from speedup import speed_up
from unet import UNet
from vae import VAE

warnings.simplefilter("ignore")  # what diffusers says while it is imported


def random_weights(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state for a model on the meta device: uniform weights that keep the size of what passes through."""
    state = {}
    for key, tensor in model.state_dict().items():
        inputs = tensor[0].numel() if tensor.dim() > 1 else 100
        state[key] = torch.empty(tensor.shape, dtype=dtype).uniform_(-1, 1) * inputs**-0.5
    return state


def prepared(build: type, their_class: str, config: dict, dtype: torch.dtype, plain: bool) -> tuple:
    """Ours, perhaps `plain`, and diffusers' module of `their_class`, each with its copy of the same random weights."""
    (their_build,) = tiny.reference("diffusers", their_class)
    with torch.device("meta"):
        ours, theirs = build(config).eval(), their_build(**config).eval()
    state = random_weights(ours, dtype)
    ours.load_state_dict({key: weight.clone() for key, weight in state.items()}, assign=True)
    theirs.load_state_dict(state, assign=True)
    return ours if plain else speed_up(ours), theirs


def step(dtype: torch.dtype, plain: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A U-Net step of two images, ours and diffusers'."""
    ours, theirs = prepared(UNet, "UNet2DConditionModel", tiny.SD14_UNET, dtype, plain)
    latents, context = torch.randn(1, 4, 64, 64).repeat(2, 1, 1, 1).to(dtype), torch.randn(2, 77, 768).to(dtype)
    kv = ours.keys_values(context)
    return lambda: ours(latents, 481, kv), lambda: theirs(latents, 481, context).sample


def decoding(dtype: torch.dtype, plain: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A decoding of one image, ours and diffusers'."""
    ours, theirs = prepared(VAE, "AutoencoderKL", tiny.SD14_VAE, dtype, plain)
    latents = torch.randn(1, 4, 64, 64).to(dtype)
    return lambda: ours.decode(latents), lambda: theirs.decode(latents).sample


PARTS = {"unet": step, "vae": decoding}


def race(sides: tuple[Callable[[], Tensor], ...], repeats: int) -> tuple[list[float], list[Tensor]]:
    """Fastest time in ms and the last output of each side, called by turns."""
    fastest, outputs = [float("inf")] * len(sides), [None] * len(sides)
    for _ in range(repeats):
        for i, side in enumerate(sides):
            begun = time.perf_counter()
            outputs[i] = side()
            fastest[i] = min(fastest[i], 1000 * (time.perf_counter() - begun))
    return fastest, outputs


def gflops(work: Callable[[], Tensor]) -> float:
    """How many billion multiplications and additions `work` makes."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def product_speed(dtype: torch.dtype, n: int = 2048) -> float:
    """GFLOP/s of a matrix product, n x n."""
    a, b = torch.randn(2, n, n).to(dtype)
    (ms,), _ = race((lambda: a @ b,), 8)
    return 2 * n**3 / 1e6 / ms


@torch.no_grad()
def main() -> None:
    """Print one row per part and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="without speedup.py")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads")
    for dtype in args.dtype:
        print(f"a matrix product in {dtype}: {product_speed(getattr(torch, dtype)):.0f} GFLOP/s")
    print(f"{'part':6}{'dtype':10}{'ours ms':>10}{'diffusers ms':>14}{'ratio':>8}{'GFLOP/s':>10}{'difference':>12}")
    for part in args.part:
        for dtype in args.dtype:
            sides = PARTS[part](getattr(torch, dtype), args.plain)
            (ours, theirs), (x, y) = race(sides, args.repeats)
            difference = tiny.difference(x.float(), y.float()) / y.abs().max().item()
            speed = gflops(sides[1]) / ours * 1000  # of theirs: oneDNN's products are not counted
            print(
                f"{part:6}{dtype:10}{ours:10.0f}{theirs:14.0f}{ours / theirs:8.2f}{speed:10.0f}{difference:12.1e}",
                flush=True,
            )
            del sides
            gc.collect()


if __name__ == "__main__":
    main()
