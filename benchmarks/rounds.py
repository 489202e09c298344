"""What rounds of attack add to solved gates, and what they cost (`solve.Settings.rounds`), in the text encoder alone.

    python benchmarks/rounds.py                                    # four concepts that no scenario erases
    python benchmarks/rounds.py --targets "tiger face" --rounds 0 1 --deltas 16

For every number of rounds, means over the concepts: seconds of one solve (the processor's); the share of the asked
shift that is reached in sentences that no gate was solved in; the same under a fresh attack on each of them, of another
seed than those of the rounds: 1 - (error that is left) / (asked shift), 0 where the attack shuts the gates; and, as
shares of the shift, the size of that attack, and how far sentences about things on no list are moved.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cpe
import solve
from loading.cache import encoded
from loading.prompts import PRESETS, fill, sentences, to_solve
from study.world import Scenario, World
from weights import load_model

TARGETS = ("soccer ball", "peach", "penguin", "ambulance")
RECIPE = PRESETS["emoji"]


def data_of(world: World, target: str) -> cpe.Data:
    """What gates of a target are solved from, as in the comparison's row `cpe, solved`."""
    return encoded(world.model, RECIPE, to_solve(world.listed(Scenario((target,)))), [target], briefly=True)


def figures(world: World, solver: solve.Solver, data: cpe.Data, target: str) -> list[float]:
    """A row of the table, of one concept."""
    begun = time.process_time()
    gates = solver.solve(data.targets, data.surrogates)
    seconds, space, settings = time.process_time() - begun, solver.space, solver.settings
    lines = sentences("emoji", "held-out")
    E, surrogate = (world.model.encode([fill(line, name) for line in lines]) for name in (target, RECIPE.surrogate))
    x = (1 + settings.eta) * (surrogate - E)
    asked = space.energy(x).sum(dim=1)
    deltas = solve.attack(space, gates, E, settings.noise, torch.Generator().manual_seed(1000))
    left = space.error(gates, E + deltas, x - deltas).sum(dim=1) / asked
    things = [name for name in world.held_out if name != target]
    others = world.model.encode([fill(lines[i % len(lines)], thing) for i, thing in enumerate(things)])
    moved = space.error(gates, others, torch.zeros_like(others)).sum(dim=1) / asked.mean()
    shares = (
        space.reached(gates, E, x),
        1 - left,
        space.energy(deltas).sum(dim=1) / asked,
        moved,
        (moved > 0.05).float(),
    )
    return [seconds, *(100 * share.mean().item() for share in shares)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--rounds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--deltas", type=int, default=16, help="of each round")
    args = parser.parse_args()
    world, rows = World(load_model("emoji")), {rounds: [] for rounds in args.rounds}
    one = solve.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
    for target in args.targets:
        data = data_of(world, target)
        anchors = torch.cat([data.anchors, data.empty.to(data.anchors)])
        solver = solve.Solver(world.space, one, anchors, solve.Settings.of(RECIPE, deltas=args.deltas))
        for rounds in args.rounds:
            solver.settings = replace(solver.settings, rounds=rounds)
            rows[rounds].append(figures(world, solver, data, target))
            print(f"{target}, {rounds} rounds: {' '.join(f'{x:.2f}' for x in rows[rounds][-1])}", file=sys.stderr)
    print("\n| rounds | seconds | reached | under attack | the attack | unlisted moved by | by more than 5 % |")
    print("|---|" + 6 * "---:|")
    for rounds, found in rows.items():
        seconds, *shares = torch.tensor(found).mean(dim=0).tolist()
        print(f"| {rounds} | {seconds:.1f} | " + " | ".join(f"{share:.1f} %" for share in shares) + " |")


if __name__ == "__main__":
    main()
