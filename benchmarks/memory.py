"""Peak memory of the whole `train` command on a model of Stable Diffusion 1.4's size, and how soon it makes a step.

    python benchmarks/memory.py --folder /tmp/model        # writes 4 GB of random weights there, once

Two runs of the same command, each in a process of its own:

    encodes    the text encoder is used: the target's prompts and 64 anchors are not in the cache
    warm       everything but the target's own prompts is in the cache

The rest of the cache is filled with random contexts: reading them costs what reading real ones does.
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sd14
import torch

import commands
import cpe
import weights

TRAIN = ["train", "--target", "Brad Pitt", "--preset", "celebrity", "--steps-scale", "0.01"]
MiB = 2**20


def peak() -> float:
    """Peak resident memory of this process so far, in MiB, weights mapped from a file included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MiB


def child(folder: str, begun: float) -> None:
    """Run `train`, and say when it encoded, when its first step was done, and how much memory it took till the end."""
    seconds = {"encoding": 0.0}
    encode, update = weights.Model.encode, cpe.Trainer.update

    def timed_encode(*args, **kwargs):
        start = time.time()
        contexts = encode(*args, **kwargs)
        seconds["encoding"] += time.time() - start
        return contexts

    def timed_update(trainer):
        losses = update(trainer)
        seconds.setdefault("first step", time.time() - begun)
        return losses

    weights.Model.encode, cpe.Trainer.update = timed_encode, timed_update
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        code = commands.main([*TRAIN, "--model", folder, "--out", f"{out}/gate.safetensors"])
    if code:
        raise SystemExit(code)
    first, encoding = seconds["first step"], seconds["encoding"]
    print(f"{peak():10.0f}{first:14.1f}{encoding:12.1f}{first - encoding:12.1f}{time.time() - begun:10.1f}")


def fill_cache(folder: Path) -> list[Path]:
    """Random contexts for everything that `prepare` asks of the cache; returns the files, the newest last."""
    model = weights.load_model(folder, parts=("text_encoder",))
    model.encode = lambda prompts: torch.randn(len(prompts), sd14.TOKENS, sd14.WIDTH)
    prompts = weights.read_prompts("celebrity")
    cpe.prepare(
        cpe.PRESETS["celebrity"], prompts, ["x"], model.encode, lambda asked: weights.cached_contexts(model, asked)
    )
    return sorted(weights.cache_folder().glob("*.safetensors"), key=lambda path: (path.stat().st_size, path.name))


def main() -> None:
    """Print one row per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random model is, or is to be written")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(str(args.folder), args.child)
    print(sd14.machine())
    sd14.write_model(args.folder)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CPE_CACHE"] = cache
        files = fill_cache(args.folder)
        print(f"\n{'':10}{'peak MiB':>10}{'first step, s':>14}{'encoding':>12}{'the rest':>12}{'all, s':>10}")
        for name in ("encodes", "warm"):
            if name == "encodes":
                files[-1].unlink()  # a chunk of 64 anchors
            print(f"{name:10}", end="", flush=True)
            command = [sys.executable, __file__, "--folder", str(args.folder), "--child", str(time.time())]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return None


if __name__ == "__main__":
    main()
