"""Time of solved gates at Stable Diffusion 1.4's size, beside training them.

    python benchmarks/solve.py [--steps 20]

Random weights, contexts given. Prints seconds of what all targets share (`Solver`), of the gates of one target, and of
the paper's celebrity recipe by training, extrapolated from `--steps` steps of each kind in the same run.
"""

import argparse
import time
from dataclasses import replace

import sd14
import torch

import cpe
import solve
import token_space

RECIPE = cpe.PRESETS["celebrity"]


def trained(layers: cpe.Layers, data: cpe.Data, steps: int) -> float:
    """Seconds of the whole recipe, from a few steps of erasing, attacking, and erasing again."""
    recipe = replace(RECIPE, stages=2, first_steps=steps, later_steps=steps, attack_steps=steps)
    chance = torch.Generator().manual_seed(0)
    gates = cpe.ResAG(layers.widths, sd14.WIDTH, recipe.r, recipe.k, generator=chance)
    trainer, begun, seconds = cpe.Trainer(gates, token_space.Losses(layers, data, 0.3), recipe, chance), {}, {}
    for _ in trainer:
        begun.setdefault(trainer.phase, time.perf_counter())  # after the first step, which warms up
        seconds[trainer.phase] = (time.perf_counter() - begun[trainer.phase]) / max(1, trainer.step - 1)
    later = (RECIPE.stages - 1) * (RECIPE.attack_steps * seconds[1] + RECIPE.later_steps * seconds[2])
    return RECIPE.first_steps * seconds[0] + later


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each kind, to extrapolate from")
    steps = parser.parse_args().steps
    print(sd14.machine())
    layers = cpe.Layers.of(sd14.cross_attention(), lambda matrix: torch.ones(()))
    norm = torch.nn.LayerNorm(sd14.WIDTH).requires_grad_(False)
    norm.bias.uniform_(0, 1)
    given = sd14.data()
    data = cpe.Data(*(norm(E.float()) for E in (given.targets, given.surrogates, given.anchors, given.empty)))
    space, one = token_space.TokenSpace(layers), solve.constant_direction(norm)
    anchors = torch.cat([data.anchors, data.empty])
    begun = time.perf_counter()
    solver = solve.Solver(space, one, anchors, solve.Settings())
    shared = time.perf_counter() - begun
    own = sd14.milliseconds(lambda: solver.solve(data.targets, data.surrogates), repeats=3, warmup=1) / 1000
    print(f"\n{len(data.targets)} prompts of the target, {len(anchors)} anchors")
    print(f"solved: {shared:.1f} s for all targets, {own:.1f} s for each; peak {sd14.peak():.0f} MiB")
    by_steps = trained(layers, data, steps)
    print(f"trained: {by_steps:.0f} s (extrapolated), {by_steps / (shared + own):.0f} times as long")


if __name__ == "__main__":
    main()
