"""What each number of CPE's recipe is worth: it is changed alone, and gates are trained, drawn with and judged anew.

    python benchmarks/ablations.py                              # "red heart", 15 rows of a minute of a core each
    python benchmarks/ablations.py --all                        # 22 rows
    python benchmarks/ablations.py --rows "cpe, eta = 0" "cpe, unmixed"
    python benchmarks/ablations.py --targets "cat face" "red apple" --full

Prints a table as `compare --quick` does, of every target; with --full as many pictures as `compare` draws, and all its
columns but attacks. Cells are kept on disk: an interrupted run goes on.
"""

import argparse
import dataclasses
import sys
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cpe
from study import compare
from study.erased import METHODS, NONE, Method
from study.world import QUICK, Budget, Scenario, World
from weights import load_model

CPE = METHODS["cpe"]  # eta .3, lam 300, r 16, k 4, stages 2, deltas 16, noise and delta_start 1e-3: loading/prompts.py
STEPS = {
    "eta": (0.0, 1.0), "lam": (30.0, 3000.0), "r": (4, 64), "deltas": (1, 64), "noise": (0.0, 1e-2),
    "delta_start": (0.0,),
}  # fmt: skip
MORE = {"k": (1, 8), "stages": (1, 4), "rise": (0.0,), "templates": (1,), "nearest": (0,)}  # with --all


class Unmixed(cpe.Trainer):
    """Training with anchors that are not mixed: what the paper's mixtures are worth."""

    def draw_anchors(self) -> Tensor:
        """Anchors [n + 1, T, d]: anchor prompts with noise; the last is the empty prompt."""
        data, chance = self.losses.data, {"generator": self.generator, "device": self.generator.device}
        E = data.anchors[torch.randint(len(data.anchors), (self.recipe.anchors,), **chance)].to(data.empty)
        sigma = self.recipe.noise * E.norm(dim=(1, 2), keepdim=True)
        return torch.cat([E + sigma * torch.randn(E.shape, **chance, dtype=E.dtype), data.empty])


def unmixed(*given: object, **settings: object) -> compare.Victim:
    """CPE's row with anchors that are not mixed. (A class has no place in the name of a cell.)"""
    return CPE.build(*given, trainer=Unmixed, **settings)


def changed(steps: dict[str, tuple]) -> list[Method]:
    """A row for every value of every number."""
    return [Method(f"cpe, {name} = {x:g}", CPE.build, {name: x}) for name, values in steps.items() for x in values]


ROWS = [
    CPE,
    *changed(STEPS),
    Method("cpe, unmixed", unmixed),
    Method("cpe, published prompts", CPE.build, {"published": True}),
]
ABLATIONS = {method.name: method for method in (*ROWS, *changed(MORE))}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["red heart"])
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], choices=list(ABLATIONS), metavar="ROW")
    parser.add_argument("--all", action="store_const", const=list(ABLATIONS), dest="rows")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world, figures = World(load_model("emoji")), {}
    budget = dataclasses.replace(Budget(), attacked=0) if args.full else QUICK
    for target in args.targets:
        scenario = Scenario((target,))
        originals = cache(partial(compare.Originals, world, scenario, budget))
        for method in tqdm([NONE, *(ABLATIONS[name] for name in args.rows)], target, leave=False):
            row, _ = compare.measure(world, scenario, method, budget, args.seed, originals)
            figures.setdefault(target, {})[method.name] = row
    print(compare.markdown(figures, compare.COLUMNS if args.full else compare.QUICK_COLUMNS, most=7))


if __name__ == "__main__":
    main()
