"""Peak memory of `generate` at Stable Diffusion 1.4's size: the command as a user runs it, one step, bfloat16.

    python benchmarks/memory_generate.py [--dtype bfloat16] [--folder /tmp/sd14-random] [--keep]

Writes a model with random weights in the official layout (float16, 2.1 GB), runs the command on it in a process of
its own, and prints the largest resident set of that process, memory-mapped weights included. Peak memory does not
depend on the number of steps, nor on what the weights are. The prompt is read by the embedded model's tokenizer.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny

from clip import TextEncoder
from unet import UNet
from vae import VAE

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "text_encoder/model": (TextEncoder, tiny.SD14_TEXT),
    "unet/diffusion_pytorch_model": (UNet, tiny.SD14_UNET),
    "vae/diffusion_pytorch_model": (VAE, tiny.SD14_VAE),
}


def write_model(folder: Path) -> None:
    """A Stable Diffusion 1.4 with random weights, float16, in the diffusers layout."""
    for name, (build, config) in PARTS.items():
        path = folder / f"{name}.fp16.safetensors"
        path.parent.mkdir(parents=True)
        (path.parent / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            state = build(config).state_dict()
        save_file(
            {key: torch.empty(x.shape, dtype=torch.float16).uniform_(-0.02, 0.02) for key, x in state.items()}, path
        )
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(ROOT / "emoji" / part, folder / part)


def main() -> None:
    """Print the peak and the time of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sd14-random"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="leave the folder for another run")
    args = parser.parse_args()
    if not args.folder.exists():
        write_model(args.folder)
    command = [sys.executable, str(ROOT / "cpe.py"), "generate", "a red heart", "--model", str(args.folder)]
    command += ["--dtype", args.dtype, "--steps", "1"]
    command += ["--out", str(args.folder / "image.png")]
    begun = time.perf_counter()
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{args.dtype}: peak {peak:.2f} GB, {time.perf_counter() - begun:.0f} s for one step and the decoding")
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
