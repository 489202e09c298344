"""Peak memory of `generate` at Stable Diffusion 1.4's size: the command as a user runs it, one step.

    python benchmarks/memory_generate.py --folder /tmp/model        # writes 4 GB of random weights there, once

Runs the command in a process of its own, in both precisions, and prints the largest resident set, memory-mapped weights
included. The files are float32, as the official repository's are. Peak memory does not depend on the number of steps,
nor on what the weights are.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sd14

from cli import main as run


def child(folder: str, dtype: str) -> None:
    """Run `generate`; print the peak and the time."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        words = ["generate", "a red heart", "--model", folder, "--dtype", dtype, "--steps", "1"]
        code = run([*words, "--out", f"{out}/image.png"])
    if code:
        raise SystemExit(code)
    print(f"{dtype:10}{sd14.peak() * 2**20 / 1e9:10.2f}{time.perf_counter() - begun:12.0f}")


def main() -> None:
    """Print one row per precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random model is, or is to be written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(str(args.folder), args.child)
    sd14.write_model(args.folder)
    print(f"{'':10}{'peak GB':>10}{'seconds':>12}")
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, __file__, "--folder", str(args.folder), "--child", dtype]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    return None


if __name__ == "__main__":
    main()
