"""Tune every eraser of the comparison on targets that no scenario holds: eight settings each, linear ones beyond.

    python benchmarks/tune.py [--model emoji] [--methods cpe uce ...]

A setting is scored on images by H, of captions and of sentences. Of settings within 0.01
of the best, which is less than an image, that one wins which changes least of what should stay. Cells are kept on
disk: an interrupted run goes on, two runs side by side share the work.
Prints score, change, seconds and the recognised share of every group, then the best: what `TUNED` of compare.py holds,
and, of CPE, how its preset would have to differ ("cpe" and "surrogate": {} or the first is as it is).
"uce, many" and so on ask linear erasers for ten targets at once (`MANY` of compare.py), "uce, fifty" and so on for
fifty (`CROWD`), "uce, styles" and so on for a style (`STYLE`). "cpe, mlp" and so on try four lambdas of other gates.
"""

import argparse
import dataclasses
import itertools
import pprint
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loading.prompts import read_prompts
from study import compare, erased, evaluate, variants
from study.erased import ABLATIONS, METHODS
from study.world import GONE, SCENARIOS, Budget, Scenario, World
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


def product(**choices: list) -> list[dict]:
    """All combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


FEW = {"images": [4], "sampling_steps": [20]}  # pictures that MACE makes for itself: the authors' take longer


GRIDS = {  # eight each; the first values are the papers' where they name one, of CPE the preset and a step around it
    "cpe": [
        {},
        *(
            {n: v}
            for n, v in [
                ("lam", 30.0),
                ("lam", 100.0),
                ("lam", 1000.0),
                ("k", 1),
                ("k", 8),
                ("templates", 1),
                ("rise", 0.0),
            ]
        ),
    ],
    "cpe, solved": product(weight=[10.0, 1.0], bend=[0.25, 0.1], k=[8, 16]),
    "uce": product(padding=[False, True], templates=["kept", "all"], s_p=[1.0, 0.1]),
    "rece": product(rounds=[3, 1], templates=["", "kept"], s_p=[0.1, 1.0]),
    "mace": product(lr=[1e-5, 1e-3], keep=[0.0, 1.0], lam=[10.0, 0.1], **FEW),
    "speed": product(threshold=[1.0, 0.1], templates=["", "all"], augment=[10, 0]),
    "esd": product(lr=[5e-5, 2e-4, 5e-4, 1e-3], negative=[1.0, 3.0], images=[8], sampling_steps=[20]),
    "lora": product(k=[4, 8], lam=[3.0, 10.0, 30.0, 100.0]),
}


BEYOND = {  # and more of linear erasers: beyond these where their best lay at an edge, and what came to mind later
    "uce": product(padding=[False], templates=["all"], s_p=[3.0, 10.0])
    + product(padding=[False, True], templates=["pairs"], s_p=[1.0, 3.0, 10.0])
    + product(padding=[True], templates=["pairs"], s_p=[30.0, 100.0])
    + product(padding=[True], templates=["pairs"], s_p=[3.0, 10.0, 30.0], eta=[0.3, 1.0]),
    "rece": product(rounds=[1], templates=["kept"], s_p=[0.03, 0.01])
    + product(rounds=[1, 3], templates=["pairs"], s_p=[0.1, 1.0])
    + product(rounds=[1], templates=["pairs"], padding=[True], s_p=[1.0, 3.0, 10.0, 30.0])
    + product(rounds=[1], templates=["pairs"], padding=[True], s_p=[3.0, 10.0], eta=[0.3, 1.0]),
    "mace": product(lr=[1e-5], keep=[3.0, 10.0, 30.0, 100.0], lam=[0.1], **FEW)
    + product(lr=[1e-5], keep=[1.0, 10.0], lam=[0.1, 10.0, 1e3], templates=["kept"], **FEW)
    + product(lr=[1e-5], keep=[0.3, 3.0], lam=[0.1], templates=["kept"], **FEW)
    + product(lr=[1e-4, 1e-3], keep=[1.0], lam=[0.1], templates=["kept"], **FEW)
    + product(lr=[1e-5], keep=[3.0, 10.0], lam=[0.1], templates=["kept"], eta=[0.3, 1.0], **FEW),
    "speed": product(threshold=[3.0, 0.3], templates=["all"], augment=[10])
    + product(threshold=[1.0, 0.1], templates=["pairs"], augment=[10, 0])
    + product(threshold=[3.0, 1.0, 0.3], templates=["pairs"], padding=[True], augment=[0])
    + product(threshold=[1.0, 0.3], templates=["all"], augment=[10], eta=[0.3, 1.0]),
    "esd": product(lr=[2e-4], negative=[5.0, 7.0, 10.0], images=[8], sampling_steps=[20]),
}


PAST = [0.0, 1.0]  # eta: CPE's preset for styles has 1

ASIDE = {  # more questions, on scenarios of their own: the method, the scenarios, the settings
    "surrogate": ("cpe", TARGETS, product(surrogate=["cloud", "an object", "picture", "white circle"])),
    "cpe, solved, many": ("cpe, solved", [TEN], product(weight=[10.0, 30.0], bend=[0.25, 0.5], lam=[100.0, 1000.0])),
    # Other gates than the paper's, with the preset's lambda and those around it.
    **{f"cpe, {kind}": (f"cpe, {kind}", TARGETS, product(lam=[300.0, 30.0, 100.0, 1000.0])) for kind in variants.KINDS},
    # What linear erasers need for many targets at once.
    "uce, many": (
        "uce",
        [TEN],
        product(templates=["all", "kept"], padding=[False], s_p=[3.0, 10.0, 30.0, 100.0])
        + product(templates=["pairs"], padding=[True], s_p=[3.0, 10.0, 30.0, 100.0])
        + product(templates=["pairs"], padding=[True], s_p=[30.0, 100.0], eta=[0.3]),
    ),
    "rece, many": (
        "rece",
        [TEN],
        product(templates=["kept", ""], rounds=[3], s_p=[0.3, 1.0, 3.0, 10.0])
        + product(templates=["pairs"], padding=[True], rounds=[1], s_p=[1.0, 3.0, 10.0, 30.0])
        + product(templates=["pairs"], padding=[True], rounds=[1], s_p=[10.0, 30.0], eta=[0.3]),
    ),
    "mace, many": (
        "mace",
        [TEN],
        product(lr=[1e-5], keep=[0.3, 1.0, 3.0, 10.0], lam=[0.1], templates=["kept"], **FEW)
        + product(lr=[1e-5], keep=[10.0], lam=[0.1], templates=["kept"], eta=[0.3], **FEW),
    ),
    "speed, many": (
        "speed",
        [TEN],
        product(threshold=[0.1, 0.03, 0.01, 0.003], templates=["", "all"], augment=[10])
        + product(threshold=[10.0, 3.0, 1.0, 0.3], templates=[""], augment=[10])
        + product(threshold=[1.0, 0.3, 0.1, 0.03], templates=["pairs"], padding=[True], augment=[0])
        + product(threshold=[0.03, 0.01], templates=[""], augment=[10], eta=[0.3]),
    ),
    "esd, many": ("esd", [TEN], [erased.TUNED["esd"] | {"steps": 200 * n} for n in (1, 2, 3)]),
    "lora, many": (
        "lora",
        [TEN],
        product(k=[8], lam=[30.0, 10.0, 3.0]) + product(k=[8], lam=[10.0, 30.0], longer=[3.0]),
    ),
    # And for fifty.
    "uce, fifty": (
        "uce",
        [FIFTY],
        product(templates=["pairs"], padding=[True], s_p=[30.0, 100.0, 200.0, 300.0], eta=[0.3]),
    ),
    "rece, fifty": (
        "rece",
        [FIFTY],
        product(templates=["pairs"], padding=[True], rounds=[1], s_p=[30.0, 100.0, 300.0], eta=[0.3]),
    ),
    "mace, fifty": (
        "mace",
        [FIFTY],
        product(lr=[1e-5], keep=[10.0, 30.0, 100.0], lam=[0.1], templates=["kept"], eta=[0.3], **FEW),
    ),
    "speed, fifty": (
        "speed",
        [FIFTY],
        product(threshold=[10.0, 3.0, 1.0, 0.3, 0.1, 0.01], templates=[""], augment=[10]),
    ),
    # And for styles.
    "uce, styles": ("uce", STYLES, product(templates=["pairs"], padding=[True], s_p=[0.3, 1.0, 3.0, 10.0], eta=PAST)),
    "rece, styles": (
        "rece",
        STYLES,
        product(rounds=[1], templates=["pairs"], padding=[True], s_p=[0.3, 1.0, 3.0, 10.0], eta=PAST),
    ),
    "mace, styles": (
        "mace",
        STYLES,
        product(lr=[1e-5], keep=[0.3, 1.0, 3.0, 10.0], lam=[0.1], templates=["kept"], eta=PAST, **FEW),
    ),
    "speed, styles": (
        "speed",
        STYLES,
        product(threshold=[3.0, 1.0, 0.3, 0.1], templates=["all"], augment=[10], eta=PAST),
    ),
    "esd, styles": (
        "esd",
        STYLES,
        product(lr=[2e-4, 5e-4], negative=[3.0, 5.0], steps=[200, 400], images=[8], sampling_steps=[20]),
    ),
    "lora, styles": ("lora", STYLES, product(k=[4], lam=[3.0, 10.0, 30.0, 100.0])),
}


def score(figures: dict) -> tuple[float, float]:
    """H, of captions and sentences, and minus the mean change of what should stay: larger is better."""
    kept = [group for name, group in figures["groups"].items() if name not in GONE]
    return figures["H"], -sum(group["change"] for group in kept) / len(kept)


def main() -> None:
    """Print a line per setting, then the best ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=[*GRIDS, *ASIDE])
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    erased.TUNED.clear()  # start from every eraser's own defaults
    erased.MANY.clear()
    erased.CROWD.clear()
    erased.STYLE.clear()
    world, best = World(load_model(args.model)), {}
    for name in args.methods:
        found = []
        eraser, scenarios, grid = ASIDE.get(name) or (name, TARGETS, GRIDS[name] + BEYOND.get(name, []))
        kept = {scenario: compare.Originals(world, scenario, BUDGET) for scenario in scenarios}
        for settings in grid:
            method = dataclasses.replace((METHODS | ABLATIONS)[eraser], settings=settings)
            cells = [
                compare.measure(world, each, method, BUDGET, originals=lambda o=o: o)[0] for each, o in kept.items()
            ]
            mean = tuple(sum(values) / len(cells) for values in zip(*map(score, cells), strict=True))
            groups = [f"{100 * compare.share(g):.0f}" for cell in cells for g in cell["groups"].values() if g["images"]]
            seconds = sum(cell["seconds"] for cell in cells) / len(cells)
            found.append((mean, settings))
            print(f"{name:18}{mean[0]:6.3f}{-mean[1]:8.4f}{seconds:7.1f} s  {settings}", *groups, flush=True)
        top = max(mean[0] for mean, _ in found)
        near = [(mean, settings) for mean, settings in found if mean[0] > top - 0.01]
        best[name] = max(near, key=lambda pair: pair[0][1])[1]
    pprint.pp({"best": best}, width=110)


if __name__ == "__main__":
    main()
