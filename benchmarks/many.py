"""Many concepts: does training their gates in one batch pay, and what do 100 merged gates cost a prompt?

    python benchmarks/many.py

A batch shares every read of W_l; each concept has targets, deltas and parameters of its own. *own*: and anchors, as it
must for the files that single runs write, since the nearest words differ. *shared*: all meet the same anchors. Beside
both, in the same run, a step of `cpe.Trainer`, which trains one concept after another.
"""

import resource

import sd14
import torch
from train_step import trainer_at

import cpe

RECIPE = cpe.PRESETS["celebrity"]


def batched_step(objective: cpe.Objective, data: cpe.Data, concepts: int, shared: bool):
    """A function that makes one erase step of `concepts` gates at once, in the manner of `Trainer.erase_losses`.

    `shared`: all meet the same anchors.
    """
    gates = cpe.ResAG(objective.widths, sd14.WIDTH, RECIPE.r, RECIPE.k, concepts)
    for p in gates.parameters():
        p.data.normal_(std=0.02)
    E = torch.randn(concepts, 1 + RECIPE.deltas, sd14.TOKENS, sd14.WIDTH)
    x = torch.randn_like(E)
    energy = objective.energy(x)
    draw = cpe.Trainer(objective, data, RECIPE).draw_anchors
    optimizer = torch.optim.AdamW(gates.parameters(), lr=3e-5, weight_decay=0.01, fused=True)

    def step() -> None:
        """One erase step of all concepts."""
        columns = gates.columns()
        if shared:
            anchors, sigma = draw()
            noise = sigma[:, None, None] * torch.randn(*anchors.shape[:2], columns.shape[-1])
            # anchors meet the columns of all concepts in one product
            wide = columns.squeeze(1).transpose(0, 1).flatten(1)
            seen = (anchors @ wide).unflatten(-1, (concepts, -1)).movedim(-2, 0)
        else:
            anchors, sigma = map(torch.stack, zip(*(draw() for _ in range(concepts)), strict=True))
            noise = sigma[..., None, None] * torch.randn(*anchors.shape[:3], columns.shape[-1])
            seen = anchors @ columns
        R = torch.linalg.qr(columns.detach().squeeze(1))[1].unsqueeze(1)
        _, z = gates.read(torch.cat([E @ columns, seen + noise @ R], dim=1))
        P, G = objective.products(gates)
        misfit = cpe.residual(x, energy, z[:, : E.shape[1]], P, G).mean(dim=(0, 2))
        loss = misfit[0] + misfit[1:].mean() + RECIPE.lam * cpe.penalty(z[:, E.shape[1] :], G).mean()
        optimizer.zero_grad()
        loss.backward()
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
    print(f"{'concepts':>8}{'own anchors':>14}{'shared anchors':>16}")
    for concepts in (1, 2, 4, 8):
        own, shared = (
            sd14.milliseconds(batched_step(objective, data, concepts, kind), repeats=max(4, 40 // concepts), warmup=2)
            for kind in (False, True)
        )
        print(f"{concepts:8}{own / concepts:14.1f}{shared / concepts:16.1f}", flush=True)
    print(f"\n{'merged':>8}{'ms a prompt':>14}{'MiB':>8}{'peak MiB of all':>18}")
    for concepts in (1, 10, 100):
        ms, size = merged(objective, concepts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{concepts:8}{ms:14.1f}{size:8.1f}{peak:18.0f}", flush=True)


if __name__ == "__main__":
    main()
