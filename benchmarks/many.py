"""Many concepts: does training their gates in one batch pay, and what do 100 merged gates cost a prompt?

    python benchmarks/many.py

`train --targets` makes the steps of four targets together, in a `many.Batch`, which reads every W_l once for all.
Beside it here a `cpe.Trainer`, which trains one target, and batches of other sizes; minutes are of the whole recipe,
whose attacks share nothing.
"""

import sd14
import torch
from train_step import RECIPE, trainer_at

import cpe
import many

STEPS = {"erase": 3600, "attack": 1800}
PHASE = {"erase": 2, "attack": 1}


def alone(objective: cpe.Objective, data: cpe.Data, kind: str) -> float:
    """Milliseconds a step of one target."""
    run = trainer_at(objective, data, PHASE[kind]).steps()
    return sd14.milliseconds(lambda: next(run), repeats=40, warmup=5)


def in_batch(objective: cpe.Objective, data: cpe.Data, kind: str, targets: int) -> float:
    """Milliseconds a step and target, of so many trained together."""
    many.TOGETHER = targets
    run = many.Batch({i: trainer_at(objective, data, PHASE[kind]) for i in range(targets)}).steps()
    return sd14.milliseconds(lambda: next(run), repeats=max(10, 40 // targets), warmup=5) / targets


@torch.no_grad()
def merged(objective: cpe.Objective, concepts: int) -> tuple[float, float]:
    """Milliseconds a prompt and its empty twin take, and parameters in MiB, of `concepts` merged gates."""
    gates = cpe.ResAG(objective.widths, sd14.WIDTH, RECIPE.r, RECIPE.k, concepts)
    for p in gates.parameters():
        p.normal_(std=0.02)
    E = torch.randn(2, sd14.TOKENS, sd14.WIDTH)
    size = sum(p.numel() for p in gates.parameters()) * 4 / 2**20
    return sd14.milliseconds(lambda: gates.corrections(E), repeats=5), size


def main() -> None:
    """Print two tables."""
    torch.manual_seed(0)
    print(sd14.machine())
    objective, data = cpe.Objective(sd14.cross_attention()), sd14.data()
    print("\na step and target, ms")
    print(f"{'targets':>8}{'erase':>10}{'attack':>10}{'recipe, min':>14}{'ratio':>8}{'peak MiB':>10}")
    first = None
    for targets in (0, 1, 2, 4, 8):
        ms = {k: in_batch(objective, data, k, targets) if targets else alone(objective, data, k) for k in STEPS}
        minutes = sum(STEPS[kind] * each for kind, each in ms.items()) / 6e4
        first = first or minutes
        steps = f"{targets or 'alone':>8}{ms['erase']:10.1f}{ms['attack']:10.1f}"
        print(f"{steps}{minutes:14.2f}{minutes / first:8.2f}{sd14.peak():10.0f}", flush=True)
    print(f"\n{'merged':>8}{'ms a prompt':>14}{'MiB':>8}{'peak MiB of all':>18}")
    for concepts in (1, 10, 100):
        ms, size = merged(objective, concepts)
        print(f"{concepts:8}{ms:14.1f}{size:8.1f}{sd14.peak():18.0f}", flush=True)


if __name__ == "__main__":
    main()
