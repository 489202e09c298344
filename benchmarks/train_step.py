"""Time of one step of training at Stable Diffusion 1.4's size: the losses term by term, and in token space.

    python benchmarks/train_step.py [--device cuda]

Random weights and contexts. Prints milliseconds of an erasing step with the adversarial loss and of a step of attack,
their ratios in one run, and how far the two gradients are apart, as a share of their size.
"""

import argparse

import sd14
import torch

import cpe
import token_space

RECIPE = cpe.PRESETS["celebrity"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print(sd14.machine())
    tensors = {name: W.to(device) for name, W in sd14.cross_attention().items()}
    layers = cpe.Layers.of(tensors, token_space.spectral_norm)
    data = cpe.Data(**{name: E.to(device) for name, E in vars(sd14.data()).items()})
    chance = torch.Generator().manual_seed(0)
    gates = cpe.ResAG(layers.widths, sd14.WIDTH, RECIPE.r, RECIPE.k, generator=chance).to(device)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(0, 0.01)
    deltas = torch.randn(RECIPE.deltas, sd14.TOKENS, sd14.WIDTH, device=device, requires_grad=True)
    i, anchors = torch.tensor([0], device=device), torch.randn(33, sd14.TOKENS, sd14.WIDTH, device=device)
    literal, fast = (kind(layers, data, RECIPE.eta) for kind in (cpe.Losses, token_space.Losses))

    def erase(losses: cpe.Losses) -> list[torch.Tensor]:
        total = sum(losses.erasing(gates, i, anchors, deltas.detach()).values())
        return list(torch.autograd.grad(total, list(gates.parameters())))

    def attack(losses: cpe.Losses) -> list[torch.Tensor]:
        return list(torch.autograd.grad(losses.attack(gates, i, deltas), deltas))

    print(f"\n{'step':10}{'term by term, ms':>18}{'token space, ms':>18}{'ratio':>8}{'apart':>10}")
    for name, step in (("erase", erase), ("attack", attack)):
        ours, theirs = (torch.cat([g.flatten() for g in step(losses)]).double() for losses in (fast, literal))
        apart = ((ours - theirs).norm() / theirs.norm()).item()
        slow = sd14.milliseconds(lambda step=step: step(literal), repeats=2, warmup=1)
        quick = sd14.milliseconds(lambda step=step: step(fast))
        print(f"{name:10}{slow:18.0f}{quick:18.1f}{slow / quick:8.0f}{apart:10.0e}")


if __name__ == "__main__":
    main()
