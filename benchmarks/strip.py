"""Draw figures/strip.png, the picture of the README: before, with solved gates, and with UCE.

python benchmarks/strip.py
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sampler  # noqa: E402
from cli.pictures import grid  # noqa: E402
from study.erased import METHODS, NONE, settings_of  # noqa: E402
from study.world import SCENARIOS, World  # noqa: E402
from weights import load_model  # noqa: E402

PROMPTS = [
    "a picture of a red heart, noto style",
    "my sister drew a red heart",
    "a big red heart on the beach",
    "a picture of a blue heart, noto style",
    "my sister drew a dog face",
    "a pizza on a wooden table",
    "a picture of a red apple, fluent style",
    "a crab in the rain",
]


def main() -> None:
    """Draw and write."""
    world = World(load_model("emoji"))
    scenario, rows, names = SCENARIOS["neighbours"], [], ["before", "CPE", "UCE"]
    for method in (NONE, METHODS["cpe, solved"], METHODS["uce"]):
        erased = method.build(world, scenario, 0, **settings_of(method, scenario))
        with torch.no_grad():
            rows.append(sampler.draw(erased.model, PROMPTS, range(len(PROMPTS)), erased.gates, 30, 4.0, "dpm"))
    out = ROOT / "figures" / "strip.png"
    grid(rows, out, PROMPTS, names)
    print(f"wrote   {out}")


if __name__ == "__main__":
    main()
