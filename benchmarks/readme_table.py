"""The small table of the README: "red heart" erased from the embedded model by five erasers, six columns.

    python benchmarks/readme_table.py

A few pictures of each kind, all from the same seeds, judged by the model's own CLIP: shares in per cent. `compare` has
more of everything. Settings are those of study/erased.py.
"""

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sampler  # noqa: E402
from study import evaluate  # noqa: E402
from study.erased import METHODS, NONE, settings_of  # noqa: E402
from study.world import SCENARIOS, World, sentences  # noqa: E402
from weights import load_model  # noqa: E402

ROWS = ("none", "cpe, solved", "uce", "rece", "speed", "mace")
TARGET, COUNT = "red heart", 16


def main() -> None:
    """Draw, judge and print a row for every eraser."""
    world, scenario = World(load_model("emoji")), SCENARIOS["neighbours"]
    target, frames = world.concepts.index(TARGET), sentences("emoji", "held-out")
    order = (world.features @ world.features[target]).argsort(descending=True).tolist()
    order = [c for c in order if world.concepts[c] not in (TARGET, "cloud")]
    near, others = order[:COUNT], evaluate.spread(order[20:], COUNT)
    groups = {
        "captions": [(world.prompt(TARGET, i), target) for i in range(COUNT)],
        "sentences": [(frames[4 * i].replace("{}", TARGET), target) for i in range(COUNT)],
        "near": [(world.prompt(world.concepts[c], i), c) for i, c in enumerate(near)],
        "others": [(world.prompt(world.concepts[c], i), c) for i, c in enumerate(others)],
        "in sentences": [(frames[4 * i + 1].replace("{}", world.concepts[c]), c) for i, c in enumerate(others)],
    }
    print(f"| {COUNT} pictures each | {' | '.join(groups)} | seconds |")
    print("|---" + "|---:" * (len(groups) + 1) + "|")
    for name in ROWS:
        begun, method = time.perf_counter(), METHODS.get(name, NONE)
        erased = method.build(world, scenario, 0, **settings_of(method, scenario))
        seconds, cells = time.perf_counter() - begun, []
        for rows in groups.values():
            prompts, expected = zip(*rows, strict=True)
            with torch.no_grad():
                images = sampler.draw(erased.model, prompts, range(COUNT), erased.gates, 10, 4.0, "dpm")
            seen = evaluate.recognise(world.clip, images, world.features).tolist()
            cells.append(f"{100 * sum(a == b for a, b in zip(seen, expected, strict=True)) / COUNT:.0f}")
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
