"""Matrix products and attention of speedup.py against torch's own, float32, at sizes that this project meets.

    python benchmarks/products.py

Both sides run in this process by turns; the fastest of each side's repeats counts. GFLOP/s count a multiplication and
an addition as two.
"""

import itertools
from collections.abc import Callable

import sd14
import speedup
import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = {  # rows, inputs, outputs
    "CLIP's MLP, 8 prompts": (8 * 77, 768, 3072),
    "U-Net, 64 x 64, feed-forward": (2 * 4096, 320, 2560),
    "U-Net, 16 x 16, to_q": (2 * 256, 1280, 1280),
    "an erase step, features of the anchors": (33 * 77, 768, 49),
    "embedded U-Net, one prompt": (2 * 64, 96, 96),
}
HEADS = {
    "U-Net, 64 x 64, self-attention": (8, 4096, 40),
    "autoencoder, 64 x 64": (1, 4096, 512),
}  # heads, tokens, width


def race(sides: tuple[Callable[[], Tensor], ...], repeats: int = 10) -> list[float]:
    """Fastest time in ms of each side, called by turns."""
    times = [[sd14.milliseconds(side, repeats=1, warmup=0) for side in sides] for _ in range(repeats)]
    return [min(column) for column in zip(*times, strict=True)]


def row(name: str, operations: float, sides: tuple[Callable[[], Tensor], ...]) -> None:
    """Print one line: speed of ours and torch's, and ours in torch's time."""
    ours, theirs = race(sides)
    difference = (sides[0]() - sides[1]()).abs().max().item()
    speeds = "".join(f"{operations / 1e6 / ms:10.0f}" for ms in (ours, theirs))
    print(f"{name:40}{speeds}{ours / theirs:8.2f}{difference:12.0e}", flush=True)


@torch.inference_mode()
def main() -> None:
    """Print one row per size."""
    torch.manual_seed(0)
    print(sd14.machine())
    print(f"\n{'GFLOP/s':40}{'ours':>10}{'torch':>10}{'ratio':>8}{'difference':>12}")
    for name, (rows, inputs, outputs) in LAYERS.items():
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5
        sides = tuple(lambda f=f, x=x, w=weight: f(x, w) for f in (speedup.linear, F.linear))
        row(name, 2 * rows * inputs * outputs, sides)
    for (name, (heads, tokens, width)), dtype in itertools.product(HEADS.items(), (torch.float32, torch.bfloat16)):
        q, k, v = (torch.randn(2, heads, tokens, width).to(dtype) for _ in range(3))
        functions = (speedup.attention, F.scaled_dot_product_attention)
        sides = tuple(lambda f=f, a=(q, k, v): f(*a).float() for f in functions)
        row(f"{name}, {str(dtype).removeprefix('torch.')}", 8 * heads * tokens**2 * width, sides)


if __name__ == "__main__":
    main()
