"""What gates cost in a diffusers U-Net of Stable Diffusion 1.4's size, where every layer asks them in every pass.

    python benchmarks/hooks.py      # needs `pip install diffusers` and 8 GB of memory

CPU time of one thread, as other programs may keep the cores busy: of a pass (two rows, 64 x 64 latents), the faster of
two; and of the projections that gates hang on, alone, with gates and without, the fastest of 15. Weights are random.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpe  # noqa: E402
from deploy.hooks import PROJECTIONS, attach, cross_attentions, detach  # noqa: E402
from loading.configs import SD14_CONFIGS  # noqa: E402


class Attention(nn.Module):
    """The two projections of a layer, and nothing else of it."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.to_k, self.to_v = theirs.to_k, theirs.to_v

    def forward(self, E: Tensor) -> None:
        """From a context [B, T, 768], nothing."""
        self.to_k(E)
        self.to_v(E)


class Projections(nn.Module):
    """All layers that read the prompt, one after another."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        layers = cross_attentions(unet).values()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn2": Attention(layer)}) for layer in layers)

    def forward(self, E: Tensor) -> None:
        """From a context [B, T, 768], nothing."""
        for block in self.blocks:
            block["attn2"](E)


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds of CPU time."""
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        seconds.append(time.process_time() - begun)
    return min(seconds)


@torch.inference_mode()
def main() -> None:
    """Print a line for one gate, one for ten."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD14_CONFIGS["unet"]).eval().requires_grad_(False)
    latents, E = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    whole = fastest(lambda: unet(latents, 10, E), 2)
    alone = Projections(unet)
    plain = fastest(lambda: alone(E), 15)
    print(f"a pass {whole:.1f} s")
    paths = cross_attentions(alone)
    widths = {f"{path}.{kind}": getattr(paths[path], kind).out_features for path in paths for kind in PROJECTIONS}
    for N in (1, 10):
        attach(alone, cpe.ResAG(widths, 768, N=N))
        added = fastest(lambda: alone(E), 15) - plain
        detach(alone)
        print(f"gates of {N:2} concepts add {added:.3f} s, {added / whole:.1%}")


if __name__ == "__main__":
    main()
