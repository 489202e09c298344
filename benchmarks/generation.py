"""One denoising step and one decoding at Stable Diffusion 1.4's size, against diffusers: time, ratio, difference.

    python benchmarks/generation.py [--part unet vae] [--dtype float32 bfloat16] [--repeats 3] [--side 64] [--busy]

Ours is measured twice: as plain torch, as the command line has it, and sped up for the CPU (speedup.py).

Weights are random in the official layout (speed does not depend on their values) and the same for all. The step is
of two images of 64x64 latents, as guidance needs them for one; the decoding makes one image of 512x512. `--side 16`
is enough to see that it runs. All run in this process, on the same threads, by turns. The fastest of the repeats
counts; with --busy, where other programs run beside it, the median of the process's own CPU time. `difference` is the
largest absolute difference of what is sped up and diffusers' output, as a share of the largest output.

`GFLOP/s` is the speed of what is sped up in the multiplications and additions that diffusers makes, to be compared
with that of one large matrix product, printed above: the processor does no more than that.
"""

import argparse
import gc
import statistics
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


def prepared(build: type, their_class: str, config: dict, dtype: torch.dtype) -> list[torch.nn.Module]:
    """Ours sped up, ours plain, and diffusers' module of `their_class`, with the same random weights."""
    (their_build,) = tiny.reference("diffusers", their_class)
    with torch.device("meta"):
        sides = [build(config).eval(), build(config).eval(), their_build(**config).eval()]
    state = random_weights(sides[0], dtype)
    for side in sides:
        side.load_state_dict(state, assign=True)
    speed_up(sides[0])
    return sides


def step(dtype: torch.dtype, side: int) -> list[Callable[[], Tensor]]:
    """A U-Net step of two images, of each of those `prepared`."""
    fast, plain, theirs = prepared(UNet, "UNet2DConditionModel", tiny.SD14_UNET, dtype)
    latents, context = torch.randn(1, 4, side, side).repeat(2, 1, 1, 1).to(dtype), torch.randn(2, 77, 768).to(dtype)
    kv = plain.keys_values(context)
    ours = [lambda unet=unet: unet(latents, 481, kv) for unet in (fast, plain)]
    return [*ours, lambda: theirs(latents, 481, context).sample]


def decoding(dtype: torch.dtype, side: int) -> list[Callable[[], Tensor]]:
    """A decoding of one image, of each of those `prepared`."""
    fast, plain, theirs = prepared(VAE, "AutoencoderKL", tiny.SD14_VAE, dtype)
    latents = torch.randn(1, 4, side, side).to(dtype)
    return [lambda: fast.decode(latents), lambda: plain.decode(latents), lambda: theirs.decode(latents).sample]


PARTS = {"unet": step, "vae": decoding}


def race(sides: list[Callable[[], Tensor]], repeats: int, busy: bool = False) -> tuple[list[float], list[Tensor]]:
    """Fastest time in ms, or if `busy` the median of CPU time, and the last output of each side, called by turns."""
    clock = time.process_time if busy else time.perf_counter
    times, outputs = [[] for _ in sides], [None] * len(sides)
    for _ in range(repeats):
        for i, side in enumerate(sides):
            begun = clock()
            outputs[i] = side()
            times[i].append(1000 * (clock() - begun))
    return [statistics.median(each) if busy else min(each) for each in times], outputs


def gflops(work: Callable[[], Tensor]) -> float:
    """How many billion multiplications and additions `work` makes."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def product_speed(dtype: torch.dtype, n: int = 2048) -> float:
    """GFLOP/s of a matrix product, n x n."""
    a, b = torch.randn(2, n, n).to(dtype)
    (ms,), _ = race([lambda: a @ b], 8)
    return 2 * n**3 / 1e6 / ms


@torch.no_grad()
def main() -> None:
    """Print one row per part and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=64, help="of the latents; 64 is that of a picture of 512 x 512")
    parser.add_argument("--busy", action="store_true", help="count CPU time, and take medians")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads")
    for dtype in args.dtype:
        print(f"a matrix product in {dtype}: {product_speed(getattr(torch, dtype)):.0f} GFLOP/s")
    names = ("sped up, ms", "plain, ms", "diffusers, ms", "ratio", "plain ratio", "GFLOP/s", "difference")
    print(f"{'part':6}{'dtype':10}" + "".join(f"{name:>15}" for name in names))
    for part in args.part:
        for dtype in args.dtype:
            sides = PARTS[part](getattr(torch, dtype), args.side)
            (fast, plain, theirs), (x, _, y) = race(sides, args.repeats, args.busy)
            difference = tiny.difference(x.float(), y.float()) / y.abs().max().item()
            speed = gflops(sides[-1]) / fast * 1000  # of theirs: oneDNN's products are not counted
            times, ratios = f"{fast:15.0f}{plain:15.0f}{theirs:15.0f}", f"{fast / theirs:15.2f}{plain / theirs:15.2f}"
            print(f"{part:6}{dtype:10}{times}{ratios}{speed:15.0f}{difference:15.1e}", flush=True)
            del sides
            gc.collect()


if __name__ == "__main__":
    main()
