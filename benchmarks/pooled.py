"""The comparison with all its pictures, but without attacks, which take the longest: every scenario, and all pooled.

    python benchmarks/pooled.py [--scenarios object style ...] [--erasers "cpe, solved" uce ...]

Prints how long it takes, then tables as `compare` prints them. Cells are kept on disk: an interrupted run goes on, two
runs of other scenarios side by side share the work, and one after them pools it in seconds.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import compare
from study.erased import METHODS, QUICK_ROWS
from study.world import LONG, SCENARIOS, Budget, World
from weights import load_model

BUDGET = replace(Budget(), attacked=0)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shown = [name for name in SCENARIOS if name not in LONG]
    parser.add_argument("--scenarios", nargs="+", default=shown, choices=list(SCENARIOS))
    parser.add_argument("--erasers", nargs="+", default=list(QUICK_ROWS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world, methods = World(load_model("emoji")), [METHODS[name] for name in args.erasers]
    scenarios, figures = {name: SCENARIOS[name] for name in args.scenarios}, {}
    print(compare.forecast(world, scenarios, methods, BUDGET, 0), flush=True)
    for scenario, method, row, _ in compare.run(world, scenarios, methods, BUDGET):
        figures.setdefault(scenario, {})[method] = row
        print(f"{scenario}: {method}, H {row['H']:.2f}", flush=True)
    print(compare.markdown(figures, most=7))


if __name__ == "__main__":
    main()
