"""Peak memory of the whole `train` command on a model of Stable Diffusion 1.4's size, and how soon it makes a step.

    python benchmarks/memory.py --folder /tmp/model        # writes 4 GB of random weights there, once
    python benchmarks/memory.py --folder /tmp/model --whole
    python benchmarks/memory.py --folder /tmp/model --whole --device cuda    # or another option of `train`

Runs of the same command, each in a process of its own:

    encodes       the text encoder is used: 64 of the target's prompts are not in the cache
    warm          everything is in the cache, as for a target that is trained again, or goes on
    cold, whole   with --whole: nothing is in the cache, and the whole recipe is trained, not a hundredth of it
    warm, whole   the same command for another target, after that

For the first two the rest of the cache is filled with random contexts: reading them costs what reading real ones does.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sd14
import torch

import cpe
import weights
from cli import main as run
from loading import cache
from loading.prompts import own_prompts, read_prompts

TRAIN = ["train", "--preset", "celebrity"]
SHORT, WHOLE = ["Brad Pitt", "--steps-scale", "0.01"], ["Brad Pitt"]


def child(folder: str, begun: float, more: list[str]) -> None:
    """Run `train` with `more` options; print its peak memory, when its first step was done, how long it encoded."""
    seconds = {"encoding": 0.0}
    encode, update = weights.Model.encode, cpe.Trainer.update

    def timed_encode(*args, **kwargs):
        start = time.time()
        contexts = encode(*args, **kwargs)
        if "first step" not in seconds:  # afterwards `train` checks the gates in sentences
            seconds["encoding"] += time.time() - start
        return contexts

    def timed_update(trainer, loss):
        report = update(trainer, loss)
        seconds.setdefault("first step", time.time() - begun)
        return report

    weights.Model.encode, cpe.Trainer.update = timed_encode, timed_update
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        code = run([*TRAIN, *more, "--model", folder, "--out", f"{out}/gate.safetensors"])
    if code:
        raise SystemExit(code)
    first, encoding = seconds["first step"], seconds["encoding"]
    print(f"{sd14.peak():10.0f}{first:14.1f}{encoding:12.1f}{first - encoding:12.1f}{time.time() - begun:10.1f}")


def fill_cache(folder: Path) -> None:
    """Random contexts for everything that `prepare` asks of the cache, but 64 prompts of the target."""
    model = weights.load_model(folder, parts=("text_encoder",))
    model.encode = lambda prompts, **_: torch.randn(len(prompts), sd14.TOKENS, sd14.WIDTH)
    recipe, prompts = cpe.PRESETS["celebrity"], read_prompts("celebrity")
    cache.encoded(model, recipe, prompts, SHORT[:1])
    own = [prompt for prompt, _ in own_prompts(SHORT[:1], prompts, recipe.surrogate)]
    cache.path_of(model, own[:64], briefly=False).unlink()


def row(name: str, folder: Path, options: list[str]) -> None:
    """Print the figures of one run."""
    print(f"{name:14}", end="", flush=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--child", str(time.time()), *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def main() -> None:
    """Print one row per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random model is, or is to be written")
    parser.add_argument("--whole", action="store_true", help="the whole recipe, from an empty cache and a full one")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    if args.child:
        return child(str(args.folder), args.child, options)
    print(sd14.machine())
    sd14.write_model(args.folder)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CPE_CACHE"] = cache
        print(f"\n{'':14}{'peak MiB':>10}{'first step, s':>14}{'encoding':>12}{'the rest':>12}{'all, s':>10}")
        if args.whole:
            row("cold, whole", args.folder, [*WHOLE, *options])
            row("warm, whole", args.folder, ["Angelina Jolie", *options])
            return None
        fill_cache(args.folder)
        row("encodes", args.folder, [*SHORT, *options])
        row("warm", args.folder, [*SHORT, *options])
    return None


if __name__ == "__main__":
    main()
