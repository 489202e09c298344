"""Many concepts: does training their gates in one batch pay?

    python benchmarks/many.py

`train --targets` makes the steps of four targets together, in a `many.Batch`, which reads every W_l once for all.
Beside it here a `cpe.Trainer`, which trains one target, and batches of other sizes. Every target has contexts of its
own. Minutes are of the whole recipe: first stage, attacks, later stages.
"""

from collections.abc import Iterator

import sd14
import torch
from train_step import trainer_at

import many
import old_cpe as cpe

PHASES = {"first": 0, "attack": 1, "later": 2}
STEPS = {"first": 1800, "attack": 1800, "later": 1800}


def steps(objective: cpe.Objective, data: list[cpe.Data], phase: int) -> Iterator:
    """Steps of one trainer, or of several in a batch."""
    trainers = {i: trainer_at(objective, each, phase) for i, each in enumerate(data)}
    return many.Batch(trainers, len(data), lambda *_: None).steps() if len(data) > 1 else trainers[0].steps()


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(sd14.machine())
    objective, data = cpe.Objective(sd14.cross_attention()), [sd14.data()]
    print("\na step and target, ms")
    print(f"{'targets':>8}{''.join(f'{name:>10}' for name in PHASES)}{'recipe, min':>14}{'ratio':>8}{'peak MiB':>10}")
    alone = None
    for targets in (1, 2, 4, 8):
        data += [sd14.data() for _ in range(targets - len(data))]
        ms = {}
        for name, phase in PHASES.items():
            run = steps(objective, data, phase)
            each = sd14.milliseconds(lambda run=run: next(run), repeats=40, warmup=5)
            ms[name] = each / targets
        minutes = sum(STEPS[name] * each for name, each in ms.items()) / 6e4
        alone = alone or minutes
        shown = "".join(f"{each:10.1f}" for each in ms.values())
        print(f"{targets:8}{shown}{minutes:14.2f}{minutes / alone:8.2f}{sd14.peak():10.0f}", flush=True)


if __name__ == "__main__":
    main()
