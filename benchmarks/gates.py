"""What merged gates cost at Stable Diffusion 1.4's size: memory, and time for one prompt of 77 tokens.

    python benchmarks/gates.py [--concepts 1 10 50 100] [--step-ms 6000]

Gates and context are random (the cost does not depend on their values); r = 16, k = 1 on 32 projections. They act
once per prompt, on the keys and values, and not at all in a denoising step: `share` is their part of an image of 50
steps of --step-ms each (benchmarks/generation.py measures it, with guidance: two contexts, and both are gated).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny

import old_cpe as cpe
from unet import UNet


@torch.no_grad()
def main() -> None:
    """Print one row per number of concepts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10, 50, 100])
    parser.add_argument("--step-ms", type=float, default=6000, help="of one denoising step")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with torch.device("meta"):
        layers = UNet(tiny.SD14_UNET).cross_attentions()
    widths = {f"{path}.{k}": getattr(layer, k).out_features for path, layer in layers.items() for k in ("to_k", "to_v")}
    random = torch.Generator().manual_seed(0)
    context = torch.randn(2, 77, 768, generator=random)  # the empty prompt's and the prompt's
    kv = {name: torch.randn(2, 77, width, generator=random) for name, width in widths.items()}
    print(f"{torch.get_num_threads()} threads")
    print(f"{'concepts':>8}{'merge ms':>10}{'MB':>8}{'ms a prompt':>13}{'share':>9}")
    for concepts in args.concepts:
        gates = [cpe.ResAG(widths, 768).initialise(random) for _ in range(concepts)]
        begun = time.perf_counter()
        merged = cpe.merge(gates)
        merging = 1000 * (time.perf_counter() - begun)
        size = sum(x.numel() * x.element_size() for x in merged.state_dict().values()) / 1e6
        fastest = float("inf")
        for _ in range(args.repeats):
            begun = time.perf_counter()
            merged(context, kv)
            fastest = min(fastest, 1000 * (time.perf_counter() - begun))
        share = fastest / (50 * args.step_ms)
        print(f"{concepts:8}{merging:10.0f}{size:8.1f}{fastest:13.1f}{share:9.4%}")


if __name__ == "__main__":
    main()
