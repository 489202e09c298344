"""Many concepts: does training their gates in one batch pay, and what do 100 merged gates cost a prompt?

    python benchmarks/many.py

A batch shares every read of W_l; each concept has targets, deltas, anchors and parameters of its own, as it must for
the files that single runs write. Beside it a step of `cpe.Trainer`, which trains one concept after another.
"""

import sd14
import torch
from train_step import trainer_at

import cpe
from products import product

RECIPE = cpe.PRESETS["celebrity"]


def batched_step(objective: cpe.Objective, data: cpe.Data, concepts: int):
    """A function that makes one erase step of `concepts` gates at once, as `Trainer.erase_losses` does of one."""
    gates = cpe.ResAG(objective.widths, sd14.WIDTH, RECIPE.r, RECIPE.k, concepts)
    for p in gates.parameters():
        p.data.normal_(std=0.02)
    deltas = torch.randn(concepts, RECIPE.deltas, sd14.TOKENS, sd14.WIDTH)
    E, x = torch.randn(2, concepts, 1, sd14.TOKENS, sd14.WIDTH)
    energies = objective.energy(torch.cat([x, x - deltas], dim=1))
    trainer = cpe.Trainer(objective, data, RECIPE)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=3e-5, weight_decay=0.01, fused=True)

    def step() -> None:
        """One erase step of all concepts."""
        columns, (P, G), features, seen = gates.columns()[:, 0], objective.products(gates), [], []
        for n, C in enumerate(columns):
            anchors, sigma = trainer.draw_anchors()
            dC, dP = product(deltas[n], torch.cat([C.T, P[n]])).split([C.shape[1], P.shape[1]], dim=-1)
            EC, xP = product(E[n], C.T), product(x[n], P[n])
            features.append(torch.cat([EC, EC + dC, trainer.noisy_features(anchors, sigma, C)]))
            seen.append(torch.cat([xP, xP - dP]))
        z = gates.read(torch.stack(features))[1]
        moved, kept = z.split([1 + RECIPE.deltas, RECIPE.anchors + 1], dim=1)
        missed = cpe.misfit(energies, torch.stack(seen), moved, G).mean(dim=2)  # [N, 1 + J]
        kept = RECIPE.lam * cpe.penalty(kept, G).mean(dim=(1, 2))
        optimizer.zero_grad()
        (missed[:, 0] + missed[:, 1:].mean(dim=1) + kept).sum().backward()
        optimizer.step()

    return step


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
    run = trainer_at(objective, data, phase=2).steps()
    alone = sd14.milliseconds(lambda: next(run), repeats=40, warmup=5)
    print(f"\nms an erase step and concept: {alone:.1f} in `train`; in a batch")
    print(f"{'concepts':>8}{'batched':>10}{'ratio':>8}")
    for concepts in (1, 2, 4, 8):
        step = batched_step(objective, data, concepts)
        each = sd14.milliseconds(step, repeats=max(5, 40 // concepts), warmup=2) / concepts
        print(f"{concepts:8}{each:10.1f}{each / alone:8.2f}", flush=True)
    print(f"\n{'merged':>8}{'ms a prompt':>14}{'MiB':>8}{'peak MiB of all':>18}")
    for concepts in (1, 10, 100):
        ms, size = merged(objective, concepts)
        print(f"{concepts:8}{ms:14.1f}{size:8.1f}{sd14.peak():18.0f}", flush=True)


if __name__ == "__main__":
    main()
