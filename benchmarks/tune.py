"""Tune the erasers of the comparison on targets that no scenario holds; captions and sentences are scored alike.

    python benchmarks/tune.py [--model emoji] [--methods uce rece ...]
    python benchmarks/tune.py --methods "uce, many"     # and so on: ten targets at once
    python benchmarks/tune.py --methods "uce, crowd"    # fifty
    python benchmarks/tune.py --methods "uce, style"    # two styles

A setting is scored on images by H, of captions and of sentences. Of settings within 0.01 of the best, which is less
than an image, that one wins which changes least of what should stay. Cells are kept on disk: an interrupted run goes
on, two runs side by side share the work.

Prints how many images a setting takes; then, setting by setting, score, change, seconds (of the eraser, and in all)
and the recognised share of every group; then the best, which study/tuned.json holds (of "many" and so on what differs
from one target; of CPE it would have to be the preset's).
"""

import argparse
import dataclasses
import itertools
import pprint
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loading.prompts import read_prompts
from study import compare, erased, evaluate
from study.erased import METHODS
from study.world import SCENARIOS, Budget, Scenario, World
from weights import load_model

TARGETS = [Scenario(("tiger face",)), Scenario(("soccer ball",))]
TEN = Scenario(
    ("soccer ball", "tiger face", "yellow heart", "mrs. claus", "peach", "cow", "ambulance", "rose", "angry face",
     "penguin"),
)  # fmt: skip
ERASED = {name for scenario in SCENARIOS.values() for name in scenario.targets} | {*TEN.targets}
LISTED = [name for i, name in enumerate(read_prompts("emoji").domain) if i % 3 != 1 and name not in ERASED]
FIFTY = Scenario(tuple(evaluate.spread(LISTED, 50)))
STYLES = [Scenario(("blob style",), "emoji-style"), Scenario(("fluent style",), "emoji-style")]
BUDGET = Budget(erased=8, near=1, others=1, sentences=12, attacked=0, steps=10)
PAST = [0.0, 1.0]  # eta: CPE's preset for styles has 1


def product(**choices: list) -> list[dict]:
    """All combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def one_changed(**choices: list) -> list[dict]:
    """Nothing changed, then one thing at a time."""
    return [{}, *({name: value} for name, values in choices.items() for value in values)]


SAID = {"sentences": [True]}  # targets, surrogates and what stays in CPE's sentences
BOTH = {"sentences": [False, True]}
TAILS = SAID | {"padding": [True]}  # and the padding, which has seen the name, goes with it
ONCE = {"rounds": [1]}  # of RECE
FEW = {"lr": [1e-5], "images": [4], "sampling_steps": [20]}  # of MACE: few pictures, the authors' take longer
OPPOSITE = SAID | {"images": [8], "sampling_steps": [20]}  # of ESD-x

# The first values are the papers' where they name one; of CPE the preset, and a step around it.
GRIDS = {
    "cpe": one_changed(lam=[30.0, 100.0, 1000.0], k=[1, 8], templates=[1], rise=[0.0]),
    "cpe, solved": product(weight=[30.0, 10.0], bend=[0.5, 0.25], k=[8, 16]),
    "uce": product(**BOTH, padding=[False, True], s_p=[1.0, 3.0, 10.0, 30.0])
    + product(**TAILS, s_p=[3.0, 10.0, 30.0], eta=[0.3, 1.0]),
    "rece": product(**BOTH, rounds=[3, 1], s_p=[0.1, 1.0])
    + product(**TAILS, **ONCE, s_p=[1.0, 3.0, 10.0, 30.0])
    + product(**TAILS, **ONCE, s_p=[3.0, 10.0], eta=[0.3, 1.0]),
    "mace": product(**BOTH, **FEW, keep=[0.0, 1.0], lam=[10.0, 0.1])
    + product(**SAID, **FEW, keep=[0.3, 3.0, 10.0, 30.0], lam=[0.1])
    + product(**SAID, **FEW | {"lr": [1e-4, 1e-3]}, keep=[1.0], lam=[0.1])
    + product(**SAID, **FEW, keep=[3.0, 10.0], lam=[0.1], eta=[0.3, 1.0]),
    "speed": product(**BOTH, threshold=[3.0, 1.0, 0.3, 0.1])
    + product(**SAID, threshold=[3.0, 1.0, 0.3, 0.1], augment=[0]),
    "esd": product(**OPPOSITE, lr=[5e-5, 2e-4, 5e-4, 1e-3], negative=[1.0, 3.0])
    + product(**OPPOSITE, lr=[2e-4], negative=[5.0, 7.0, 10.0]),
    "lora": product(k=[4, 8], lam=[3.0, 10.0, 30.0, 100.0]),
}
LONGER = {"first_steps": [3000], "later_steps": [750], "attack_steps": [300]}  # of LoRA, which learns ten in one run
ASIDE = {  # more questions, on scenarios of their own: the method, the scenarios, the settings
    "surrogate": ("cpe", TARGETS, product(surrogate=["cloud", "an object", "picture", "white circle"])),
    "cpe, solved, many": ("cpe, solved", [TEN], product(weight=[30.0, 100.0], bend=[0.5, 0.25], k=[8, 16])),
    "cpe, solved, style": ("cpe, solved", STYLES, product(eta=[0.3, 0.5], k=[16, 32], weight=[10.0, 3.0], r=[64])),
    "uce, many": ("uce", [TEN], product(**TAILS, s_p=[10.0, 30.0, 100.0, 300.0], eta=[0.0, 0.3])),
    "rece, many": ("rece", [TEN], product(**TAILS, **ONCE, s_p=[10.0, 30.0, 100.0, 300.0], eta=[0.0, 0.3])),
    "mace, many": ("mace", [TEN], product(**SAID, **FEW, keep=[1.0, 3.0, 10.0], lam=[0.1], eta=[0.0, 0.3])),
    "speed, many": ("speed", [TEN], product(**BOTH, threshold=[3.0, 1.0, 0.3, 0.1, 0.03, 0.01], augment=[10])),
    "esd, many": ("esd", [TEN], product(**OPPOSITE, lr=[2e-4], negative=[5.0], steps=[200, 400, 600])),
    "lora, many": ("lora", [TEN], product(k=[8], lam=[30.0, 10.0, 3.0]) + product(k=[8], lam=[10.0, 30.0], **LONGER)),
    "uce, crowd": ("uce", [FIFTY], product(**TAILS, s_p=[30.0, 100.0, 200.0, 300.0, 600.0], eta=[0.3])),
    "rece, crowd": ("rece", [FIFTY], product(**TAILS, **ONCE, s_p=[30.0, 100.0, 300.0], eta=[0.3])),
    "mace, crowd": ("mace", [FIFTY], product(**SAID, **FEW, keep=[10.0, 30.0, 100.0], lam=[0.1], eta=[0.3])),
    "speed, crowd": (
        "speed", [FIFTY], product(sentences=[False], threshold=[10.0, 3.0, 1.0, 0.3, 0.1, 0.01], augment=[10])),
    "uce, style": ("uce", STYLES, product(**TAILS, s_p=[0.3, 1.0, 3.0, 10.0], eta=PAST)),
    "rece, style": ("rece", STYLES, product(**TAILS, **ONCE, s_p=[0.3, 1.0, 3.0, 10.0], eta=PAST)),
    "mace, style": ("mace", STYLES, product(**SAID, **FEW, keep=[0.3, 1.0, 3.0, 10.0], lam=[0.1], eta=PAST)),
    "speed, style": ("speed", STYLES, product(**SAID, threshold=[3.0, 1.0, 0.3, 0.1], augment=[10])),
    "esd, style": ("esd", STYLES, product(**OPPOSITE, lr=[2e-4, 5e-4], negative=[3.0, 5.0], steps=[200, 400])),
    "lora, style": ("lora", STYLES, product(k=[4], lam=[3.0, 10.0, 30.0, 100.0])),
}  # fmt: skip


def asked(name: str) -> tuple[str, list[Scenario], list[dict]]:
    """The method, the scenarios and the settings of a question."""
    return ASIDE.get(name) or (name, TARGETS, GRIDS[name])


def main() -> None:
    """Print a line per setting, then the best ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=[*GRIDS, *ASIDE])
    parser.add_argument("--first", type=int, help="only so many settings of each")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for table in erased.TUNED.values():
        table.clear()  # start from every eraser's own defaults
    world, best = World(load_model(args.model)), {}
    for name in args.methods:
        found, (eraser, scenarios, grid) = [], asked(name)
        kept = {scenario: compare.Originals(world, scenario, BUDGET) for scenario in scenarios}
        print(f"{name}: {len(grid)} settings of {sum(len(o.cases) for o in kept.values())} images each", flush=True)
        for settings in grid[: args.first]:
            begun, method = time.perf_counter(), dataclasses.replace(METHODS[eraser], settings=settings)
            cells = [
                compare.measure(world, each, method, BUDGET, originals=lambda o=o: o)[0] for each, o in kept.items()
            ]
            # larger is better: H, of captions and of sentences, and less change of what should stay
            score, change = (sum(cell[key] for cell in cells) / len(cells) for key in ("H", "change"))
            found.append((score, -change, settings))
            shares = [f"{100 * hits / n:.0f}" for cell in cells for hits, n in cell["counts"].values() if n]
            took = f"{sum(c['seconds'] for c in cells):.0f} of {time.perf_counter() - begun:.0f} s"
            print(f"{name:14}{score:6.3f}{change:8.4f}  {took:14}  {settings}", *shares, flush=True)
        top = max(found, key=lambda row: row[0])[0]
        best[name] = max((row for row in found if row[0] > top - 0.01), key=lambda row: row[1])[2]
    pprint.pp({"best": best}, width=110)


if __name__ == "__main__":
    main()
