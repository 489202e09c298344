"""Search the recipe of the embedded model: which k, lambda and learning rate erase most and damage least.

    python benchmarks/search_preset.py [--model emoji]

Trains gates on four concepts and measures, in token space, on prompts that training never sees:

    left     share of the asked shift of the target that is still missing     sum_l w_l |W_l x - R_l|^2 / x M x^T
    near     how far the 10 nearest concepts are moved, as a share of that     sum_l w_l |R_l|^2 / x M x^T
    others   the same for all concepts that were no anchors

Lower is better in every column. The targets are not those of any reported table. Run it again whenever the embedded
model's weights change: the recipe in cpe.py does not come from a run on the present ones.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import commands
import cpe
import weights

TARGETS = ("tiger face", "green apple", "soccer ball", "robot")
HELD_OUT = "the {} here, please"  # a template of no preset


@torch.no_grad()
def measure(trainer: cpe.Trainer, model: weights.Model, target: str, words: list[str]) -> tuple[float, float, float]:
    """(left, near, others) of trained gates."""
    core, objective, recipe = trainer.core, trainer.objective, trainer.recipe
    P, G = objective.products(trainer.gates)
    E, surrogate = model.encode([HELD_OUT.format(target), HELD_OUT.format(recipe.surrogate)])
    x = (1 + recipe.eta) * (surrogate - E)[None]
    _, z = core.read(E[None] @ core.columns())
    energy = objective.energy(x)
    left = cpe.residual(x, energy, z, P, G).sum() / energy.sum()
    contexts = model.encode([HELD_OUT.format(word) for word in words])
    _, z = core.read(contexts @ core.columns())
    moved = cpe.penalty(z, G)[0].sum(dim=-1) / energy.sum()
    order = (contexts - E).flatten(1).norm(dim=-1).argsort()
    return left.item(), moved[order[:10]].mean().item(), moved[order[10:]].mean().item()


def main() -> None:
    """Print one row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--lam", type=float, nargs="+", default=[1e2, 1e3, 1e4, 1e5])
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--gate", default="resag")
    args = parser.parse_args()
    model = weights.load_model(args.model, parts=("text_encoder", "unet"))
    prompts = commands.read_prompts("emoji")
    objective = cpe.Objective(model.cross_attention())
    print(f"{'k':>3}{'lambda':>9}{'lr':>8}{'left':>9}{'near':>11}{'others':>11}{'seconds':>9}")
    for k, lam, lr in itertools.product(args.k, args.lam, args.lr):
        recipe = dataclasses.replace(cpe.PRESETS["emoji"], k=k, lam=lam, first_lr=lr, later_lr=lr / 3)
        rows, begun = [], time.perf_counter()
        for target in TARGETS:
            words = cpe.anchor_words(prompts, [target]).domain
            data = cpe.prepare(
                recipe, prompts, [target], model.encode, lambda asked: weights.cached_contexts(model, asked)
            )
            trainer = cpe.Trainer(objective, data, recipe, kind=args.gate)
            for _ in trainer.steps():
                pass
            rows.append(measure(trainer, model, target, words))
        left, near, others = torch.tensor(rows).mean(dim=0).tolist()
        seconds = (time.perf_counter() - begun) / len(TARGETS)
        print(f"{k:3}{lam:9.0e}{lr:8.0e}{left:9.1%}{near:11.2e}{others:11.2e}{seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()
