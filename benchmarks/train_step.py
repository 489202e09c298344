"""Time of a training step at Stable Diffusion 1.4's size, against the definition carried out literally.

    python benchmarks/train_step.py            # a step of each kind, in one run
    python benchmarks/train_step.py --full     # and the celebrity recipe from end to end, without prompt encoding
    python benchmarks/train_step.py --tried    # instead: what was tried and left out
    python benchmarks/train_step.py --device cuda    # on a graphics card, which draws noise itself or is sent it

Two references, both with one gate per layer, float32 and AdamW:

    two models     every one of the 32 projections is evaluated in the original and in the erased model, and their
                   outputs are compared, as the definition of the erased model reads
    formula        the formulas of the losses term by term: W_l never meets an anchor

Before anything is timed, losses and gradients of one step must agree between the references and ours.
"""

import argparse
import dataclasses
import time

import sd14
import torch
from torch import Tensor, nn

import old_cpe as cpe

RECIPE = cpe.PRESETS["celebrity"]


class Literal(nn.Module):
    """Gates and losses exactly as they are defined; `both` evaluates both models at every projection."""

    def __init__(self, objective: cpe.Objective, data: cpe.Data, gates: cpe.ResAG, recipe: cpe.Recipe, both: bool):
        super().__init__()
        self.objective, self.data, self.recipe, self.both = objective, data, recipe, both
        self.w_qs, self.scaler = nn.Parameter(gates.w_qs[0].detach().clone()), nn.Parameter(gates.scaler[0].clone())
        self.downs = nn.ParameterList(gates.lora_down[0].detach().split(gates.k, dim=1))
        self.ups = nn.ParameterList(up[0].detach().clone() for up in gates.ups())
        self.s = gates.scale.item()

    def correction(self, l: int, E: Tensor) -> Tensor:
        """R_l(E) [B, T, d_l], gate and all."""
        Q = E @ self.w_qs
        H = torch.softmax(Q @ Q.mT, dim=-1) @ E
        g = torch.sigmoid(H @ self.scaler)
        return self.s * (g * H) @ self.downs[l] @ self.ups[l]

    def mean(self, terms: list[Tensor]) -> Tensor:
        """1/L sum_l a_l times the terms of the layers."""
        return sum(a * term for a, term in zip(self.objective.a.values(), terms, strict=True)) / len(terms)

    def erase(self, i: int, deltas: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        """erase, adv, anchor losses of template i, deltas [J, T, d], anchors [n, T, d]."""
        tar, sur, eta = self.data.targets[i : i + 1], self.data.surrogates[i : i + 1], self.recipe.eta
        terms = {"erase": [], "adv": [], "anchor": []}
        for l, W in enumerate(self.objective.W.values()):
            R = self.correction(l, torch.cat([tar, tar + deltas, anchors]))
            R_tar, R_adv, R_anchor = R.split([1, len(deltas), len(anchors)])
            if self.both:
                wanted = tar @ W.T + (1 + eta) * (sur @ W.T - tar @ W.T)
                terms["erase"].append((wanted - (tar @ W.T + R_tar)).square().mean())
                terms["adv"].append((wanted - ((tar + deltas) @ W.T + R_adv)).square().mean())
                terms["anchor"].append(((anchors @ W.T + R_anchor) - anchors @ W.T).square().mean())
            else:
                wanted = (1 + eta) * (sur - tar) @ W.T
                terms["erase"].append((wanted - R_tar).square().mean())
                terms["adv"].append((wanted - deltas @ W.T - R_adv).square().mean())
                terms["anchor"].append(R_anchor.square().mean())
        return {name: self.mean(each) for name, each in terms.items()}

    def attack(self, i: int, deltas: Tensor) -> dict[str, Tensor]:
        """attack loss of template i."""
        tar, terms = self.data.targets[i : i + 1], []
        for l, W in enumerate(self.objective.W.values()):
            R = self.correction(l, tar + deltas)
            moved = (tar + deltas) @ W.T + R - tar @ W.T if self.both else deltas @ W.T + R
            terms.append(moved.square().mean())
        return {"attack": self.mean(terms)}

    def draw_anchors(self) -> Tensor:
        """32 mixtures [33, T, d] of two noisy anchors, and the empty prompt."""
        n, E = self.recipe.anchors, self.data.anchors
        first, second = (E[torch.randint(len(E), (n,)).to(E.device)].float() for _ in range(2))
        noisy = [
            e + self.recipe.noise * e.norm(dim=(1, 2), keepdim=True) * torch.randn_like(e) for e in (first, second)
        ]
        beta = torch.rand(n, 1, 1).to(first)
        return torch.cat([beta * noisy[0] + (1 - beta) * noisy[1], self.data.empty])

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """erase + adv + lambda anchor, or the attack alone."""
        return sum((self.recipe.lam if name == "anchor" else 1.0) * loss for name, loss in losses.items())


def literal_step(literal: Literal, kind: str, deltas: Tensor):
    """A function that makes one optimiser step of the literal definition."""
    deltas = deltas.clone().requires_grad_(kind == "attack")
    parameters = [deltas] if kind == "attack" else list(literal.parameters())
    literal.requires_grad_(kind == "erase")
    optimizer = torch.optim.AdamW(parameters, lr=3e-5, weight_decay=0.01)

    def step() -> None:
        i = torch.randint(len(literal.data.targets), ()).item()
        optimizer.zero_grad()
        losses = literal.attack(i, deltas) if kind == "attack" else literal.erase(i, deltas, literal.draw_anchors())
        literal.total(losses).backward()
        optimizer.step()

    return step


def trainer_at(objective: cpe.Objective, data: cpe.Data, phase: int, gate: str = "resag", **changes) -> cpe.Trainer:
    """A trainer at the start of a phase (0, 2 erase, 1 attack), with deltas but in 0, and gates that do something."""
    trainer = cpe.Trainer(objective, data, dataclasses.replace(RECIPE, **changes), kind=gate)
    for p in trainer.gates.parameters():
        p.data.normal_(std=0.02)
    if phase:
        trainer.deltas = torch.randn(RECIPE.deltas, sd14.TOKENS, sd14.WIDTH).to(data.targets)
    trainer.phase = phase
    return trainer


def check(objective: cpe.Objective, data: cpe.Data) -> float:
    """Largest relative difference of a loss or gradient between the literal definition and ours, on one step."""
    worst = 0.0
    for both, phase, kind in ((True, 2, "erase"), (False, 2, "erase"), (True, 1, "attack"), (False, 1, "attack")):
        ours = trainer_at(objective, data, phase, noise=0.0)
        ours.begin()
        literal = Literal(objective, data, ours.core, RECIPE, both)
        state = ours.generator.get_state()
        i = torch.randint(len(data.targets), (1,), generator=ours.generator).item()
        anchors, _ = ours.draw_anchors()
        ours.generator.set_state(state)
        if kind == "erase":
            found, expected = ours.erase_losses(), literal.erase(i, ours.deltas, anchors)
        else:
            deltas = ours.deltas.detach().clone().requires_grad_()
            found, expected = ours.attack_losses(), literal.attack(i, deltas)
        literal.total(found).backward()
        literal.total(expected).backward()
        pairs = [(found[name], expected[name]) for name in expected]
        if kind == "erase":
            pairs += [(getattr(ours.core, name).grad[0], getattr(literal, name).grad) for name in ("w_qs", "scaler")]
            pairs += [(ours.core.lora_down.grad[0], torch.cat([down.grad for down in literal.downs], dim=1))]
            pairs += [(ours.core.lora_up.grad[0], torch.cat([up.grad for up in literal.ups], dim=1))]
        else:
            pairs += [(ours.deltas.grad, deltas.grad)]
        worst = max([worst, *(((a - b).norm() / b.norm()).item() for a, b in pairs)])
    if not worst < 1e-4:
        raise SystemExit(f"the losses differ by {worst:.1e}: nothing was timed")
    return worst


def tried(objective: cpe.Objective, data: cpe.Data) -> None:
    """Print what one flat parameter and torch.compile would gain in an erase step, beside the step as it is."""
    trainer = trainer_at(objective, data, 2)
    trainer.begin()
    parameters, optimizer = list(trainer.gates.parameters()), trainer.optimizer
    sizes = [p.numel() for p in parameters]
    losses = trainer.erase_losses

    def step() -> None:
        """Losses, gradients, update."""
        optimizer.zero_grad()
        found = losses()
        (found["erase"] + found["adv"] + RECIPE.lam * found["anchor"]).backward()
        optimizer.step()

    print(f"{'the step, ms':44}{sd14.milliseconds(step, repeats=60, warmup=10):8.2f}")
    print(f"{'  of which fused AdamW, ' + str(len(sizes)) + ' parameters':44}{sd14.milliseconds(optimizer.step):8.2f}")
    flat = nn.Parameter(torch.randn(sum(sizes)))
    flat.grad = torch.randn_like(flat)
    alone = torch.optim.AdamW([flat], lr=1e-5, fused=True)
    print(f"{'  the same with one flat parameter':44}{sd14.milliseconds(alone.step):8.2f}")
    cpe.product = lambda x, W: x @ W.mT  # torch.compile cannot take oneDNN's
    print(f"{'the step, products by torch':44}{sd14.milliseconds(step, repeats=60, warmup=10):8.2f}")
    losses = torch.compile(trainer.erase_losses)
    begun = time.perf_counter()
    step()
    print(f"{'  compiled, after ' + f'{time.perf_counter() - begun:.0f} s':44}", end="")
    print(f"{sd14.milliseconds(step, repeats=60, warmup=10):8.2f}")


def main() -> None:
    """Print one row per kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--full", type=float, nargs="?", const=1.0, metavar="SHARE", help="run this share of the recipe"
    )
    parser.add_argument("--tried", action="store_true", help="instead: what was tried and left out")
    parser.add_argument("--only-ours", action="store_true", help="leave the references out")
    parser.add_argument("--device", default="cpu", help="where to compute")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(sd14.machine())
    begun = time.perf_counter()
    objective = cpe.Objective({name: W.to(args.device) for name, W in sd14.cross_attention().items()})
    data = cpe.Data(**{name: E if E is None else E.to(args.device) for name, E in vars(sd14.data()).items()})
    print(f"objective and random data       {time.perf_counter() - begun:8.1f} s")
    if args.tried:
        return tried(objective, data)
    print(f"losses and gradients agree to   {check(objective, data):8.0e}")

    steps = {"erase": sum(p.steps for p in cpe.phases(RECIPE) if p.kind == "erase")}
    steps["attack"] = sum(p.steps for p in cpe.phases(RECIPE)) - steps["erase"]
    ms: dict[tuple[str, str], float] = {}
    deltas = torch.randn(RECIPE.deltas, sd14.TOKENS, sd14.WIDTH).to(args.device)
    for who, both in (("two models", True), ("formula", False)):
        if not args.only_ours:
            literal = Literal(objective, data, trainer_at(objective, data, 2).core, RECIPE, both)
            for kind in steps:
                ms[who, kind] = sd14.milliseconds(literal_step(literal, kind, deltas), repeats=5, warmup=1)
            del literal
    for gate in ("resag", "context"):
        for phase, kind in ((2, "erase"), (1, "attack")):
            run = trainer_at(objective, data, phase, gate).steps()
            ms[gate, kind] = sd14.milliseconds(lambda run=run: next(run), repeats=100, warmup=10)
    if args.device != "cpu":
        cpe.DRAW = ()
        run = trainer_at(objective, data, 2).steps()
        ms["noise sent", "erase"] = sd14.milliseconds(lambda: next(run), repeats=100, warmup=10)
        ms["noise sent", "attack"] = ms["resag", "attack"]

    print(f"\n{'ms a step':14}{'erase':>10}{'attack':>10}{'recipe':>12}{'ours is faster by':>22}")
    for who in dict.fromkeys(who for who, _ in ms):
        recipe = sum(ms[who, kind] * n for kind, n in steps.items()) / 60_000
        ratios = " and ".join(f"{ms[who, kind] / ms['resag', kind]:.0f}" for kind in steps)
        print(f"{who:14}{ms[who, 'erase']:10.1f}{ms[who, 'attack']:10.1f}{recipe:8.1f} min{ratios:>22}")

    if args.full:
        for gate in ("resag", "context"):
            begun = time.perf_counter()
            recipe = RECIPE.scaled(args.full)
            done = sum(1 for _ in cpe.Trainer(objective, data, recipe, kind=gate).steps())
            print(
                f"{gate}: {args.full:g} of the recipe, {done} steps: {(time.perf_counter() - begun) / 60:.2f} min",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
