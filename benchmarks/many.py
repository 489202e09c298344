"""Many concepts: does training their gates in one batch pay, and what do 100 merged gates cost a prompt?

    python benchmarks/many.py

A batch shares the drawn anchors and every read of W_l; each concept has targets, deltas and parameters of its own.
"""

import resource

import sd14
import torch

import cpe

RECIPE = cpe.PRESETS["celebrity"]


def batched_step(objective: cpe.Objective, data: cpe.Data, concepts: int):
    """A function that makes one erase step of `concepts` gates at once, in the manner of `Trainer.erase_losses`."""
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
        anchors, sigma = draw()
        columns = gates.columns()
        # anchors meet the columns of all concepts in one product
        wide = columns.squeeze(1).transpose(0, 1).flatten(1)
        noise = sigma[:, None, None] * torch.randn(*anchors.shape[:2], columns.shape[-1])
        seen = (anchors @ wide).unflatten(-1, (concepts, -1)).movedim(-2, 0)
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
    print(f"\n{'concepts':>8}{'ms a step and concept':>24}")
    for concepts in (1, 2, 4, 8):
        ms = sd14.milliseconds(batched_step(objective, data, concepts), repeats=max(4, 40 // concepts), warmup=2)
        print(f"{concepts:8}{ms / concepts:24.1f}", flush=True)
    print(f"\n{'merged':>8}{'ms a prompt':>14}{'MiB':>8}{'peak MiB of all':>18}")
    for concepts in (1, 10, 100):
        ms, size = merged(objective, concepts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{concepts:8}{ms:14.1f}{size:8.1f}{peak:18.0f}", flush=True)


if __name__ == "__main__":
    main()
