"""The gate solved for instead of trained: seconds instead of minutes, and no step, learning rate or schedule.

Training finds three things. The first hardly matters; the others are convex problems:

    attention     Q = E w_qs: the r principal directions of contexts, so that a token attends to tokens like itself
    scaler        logistic regression: which tokens carry the target?
    correction    ridge regression of the shift on the tokens that the gate lets through, then the best of rank k

The result is a ResAG like any other: the same file, the same code that applies it. It is not the paper's way, but
stands beside it (`train --how solve`). theory/6 states and proves what is solved here; letters as in cpe.py.

    solver = Solver(space, one, anchors, Settings())      # once per model: attention, and what all targets share
    gates = solver.solve(targets, surrogates)             # a ResAG of one concept, in seconds
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpe
from token_space import ContextGate, TokenSpace


@dataclass(frozen=True)
class Settings:
    """What the answer depends on; benchmarks/README.md says how they were found."""

    eta: float = 0.3  # how far beyond the surrogate
    r: int = 16  # width of the attention
    k: int = 8  # rank of the correction of the context
    temperature: float = 16.0  # of the attention: at 16 a token sees itself and tokens like it
    weight: float = 30.0  # w: what all anchors together weigh in the logistic regression, the target's tokens being 1
    rho: float = 1e-3  # ridge of the scaler, in standard deviations of the anchors
    bend: float = 0.5  # where the gate bends, as a share of the margin
    lam: float = 100.0  # lambda: weight of the anchors in the correction
    floor: float = 0.1  # an anchor counts as if the gate were open so far at least: it may open by mistake
    rounds: int = 0  # of attack, each with `deltas` adversarial embeddings that are then erased as well
    deltas: int = 16
    noise: float = 1e-3  # what a delta starts from, as a share of the target's norm

    @staticmethod
    def of(recipe: cpe.Recipe, style: bool = False, **changed: float) -> "Settings":
        """Those of a preset, with its eta, and fields that are `changed`.

        A style adds something else to each thing: that takes more directions to attend in, and a higher rank. Trained
        gates aim farther beyond the surrogate than they get. Solved ones get there, and things would lose their shape.
        """
        own = {"eta": 0.3, "r": 64, "k": 16, "weight": 0.3, "bend": 0.25} if style else {}
        return Settings(**{"eta": recipe.eta} | own | changed)


def constant_direction(norm: nn.LayerNorm) -> Tensor | None:
    """The direction u [d] in which all outputs of a LayerNorm agree, E u = 1: what a bias would need.

        E = g x + b with sum x = 0    =>    E (1 / g) = sum b / g

    None if there is no such direction: without a bias b they lie around 0.
    """
    g, b = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
    u = 1 / g / (b / g).sum()
    return u.to(norm.weight) if u.isfinite().all() else None


def roots(S: Tensor) -> tuple[Tensor, Tensor]:
    """S^1/2 and S^-1/2 of a symmetric matrix [d, d]; what lies below 1e-10 of its largest value is lifted to it.

    In float64 on the CPU: Apple's graphics cards have none.
    """
    check_finite(S, "what gates are solved from")
    values, V = torch.linalg.eigh(S.cpu().double())
    values = values.clamp(min=values[-1] * 1e-10)
    return (V * values.sqrt()) @ V.T, (V / values.sqrt()) @ V.T


def places(tokens: int, words: int = 20, stride: int = 5) -> tuple[Tensor, Tensor]:
    """Which of T tokens are looked at, and what each counts for: all that hold words, a fifth of the paddings.

    These differ little. The stride is odd, as the embedded model reads one of two things in the even ones.
    """
    chosen = torch.tensor([*range(min(words, tokens)), *range(words, tokens, stride)])
    return chosen, chosen.diff(append=torch.tensor([tokens])).float()


class Solver:
    """Solves for the gates of any number of targets of one model; what they share is computed once.

    `one` [d] is the text encoder's `constant_direction`, anchors [A, T, d] are contexts that must stay, '' among them.
    ValueError for fewer than ten anchors, or numbers that are not finite.
    """

    def __init__(self, space: TokenSpace, one: Tensor, anchors: Tensor, settings: Settings):
        if len(anchors) < 10:
            raise ValueError(f"{len(anchors)} anchors are too few to say what must stay: give ten or more")
        check_finite(anchors, "an anchor")
        self.space, self.one, self.settings = space, one, settings
        self.chosen, counts = places(anchors.shape[1])
        self.counts = counts.to(one) / counts.sum()
        self.M_half, self.M_inverse = roots(space.M)
        self.w_qs = self.attention(anchors)
        # H of the anchors' tokens [n, d], and what each counts for [n], 1 in all
        spared = torch.cat([self.attended(part.to(one))[:, self.chosen] for part in anchors.split(64)]).flatten(0, 1)
        self.counted = self.counts.repeat(len(anchors)) / len(anchors)
        self.mean, deviation = spared.mean(dim=0), spared.std(dim=0)
        self.deviation = deviation.clamp(min=1e-3 * deviation.mean().item() + 1e-12)  # features that hardly vary
        self.standardised = spared.sub_(self.mean).div_(self.deviation)  # in place: of the paper's lists 100 MB
        # mean_a h_a h_a^T: what a linear map would have to leave alone
        self.moment = self.moment_of(self.counted)

    def moment_of(self, weights: Tensor) -> Tensor:
        """sum_t weights_t h_t h_t^T [d, d] over the anchors' tokens, weights [n]; in parts, as all is much memory."""
        total = torch.zeros_like(self.space.M)
        for z, w in zip(self.standardised.split(4096), weights.split(4096), strict=True):
            h = z[w > 0] * self.deviation + self.mean
            total += (w[w > 0, None] * h).T @ h
        return total

    def attention(self, anchors: Tensor) -> Tensor:
        """w_qs [d, r] of Q = (E - mean) V_r temperature / mean_i s_i: r principal directions of contexts, sizes s_i."""
        tokens, s = anchors[:, self.chosen].to(self.one).flatten(0, 1), self.settings
        mean = tokens.mean(dim=0)
        tokens -= mean
        covariance = tokens.T @ tokens / len(tokens)
        sizes, V = (part.to(tokens) for part in torch.linalg.eigh(covariance.cpu()))
        w_qs = s.temperature * V[:, -s.r :] / sizes[-s.r :].clamp(min=0).sqrt().mean()
        # the mean without a bias, as E one = 1 at every token
        return w_qs - torch.outer(self.one, mean @ w_qs)

    def attended(self, E: Tensor) -> Tensor:
        """H = softmax(Q Q^T) E, [B, T, d] -> [B, T, d]."""
        Q = E @ self.w_qs
        return torch.softmax(Q @ Q.mT, dim=-1) @ E

    def solve(self, targets: Tensor, surrogates: Tensor, seed: int = 0) -> cpe.ResAG:
        """A gate that moves contexts of the target [P, T, d] to those of its surrogate, and leaves the anchors alone.

        With `rounds`, it is attacked, and solved for anew with what the attacks found. ValueError for numbers that are
        not finite, or where target and surrogate are the same to the text encoder.
        """
        E, x = targets.to(self.one), (1 + self.settings.eta) * (surrogates - targets).to(self.one)
        check_finite(x, "a context of the target or its surrogate")
        gates, chance = self.gates(E, x), torch.Generator().manual_seed(seed)
        for _ in range(self.settings.rounds):
            picks = torch.randint(len(targets), (self.settings.deltas,), generator=chance).to(E.device)
            deltas = attack(self.space, gates, E[picks], self.settings.noise, chance)
            E, x = torch.cat([E, E[picks] + deltas]), torch.cat([x, x[picks] - deltas])
            gates = self.gates(E, x)
        return gates

    def gates(self, E: Tensor, x: Tensor) -> cpe.ResAG:
        """The gate that moves contexts E [P, T, d] by x [P, T, d]."""
        return self.context_gate(E, x).expand(self.space.layers).requires_grad_(False)

    def context_gate(self, E: Tensor, x: Tensor) -> ContextGate:
        """The same as one change of the context. ValueError where nothing is asked for."""
        energy = self.space.energy(x)
        if not energy.sum() > 0:
            raise ValueError("target and surrogate are the same to this text encoder: choose another surrogate")
        H = self.attended(E)[:, self.chosen]
        # every prompt counts alike, and in it every token by its share of what must be moved
        sizes = energy.mean(dim=1).clamp(min=1e-6 * energy.mean())
        shares = energy[:, self.chosen] * self.counts / sizes[:, None] / len(x)
        scaler = self.scaler(H.flatten(0, 1), shares.flatten())
        return self.assemble(scaler, *self.ridge(H, x[:, self.chosen], sizes, scaler))

    def regression(self, wanted: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """v [d] and b [] that tell tokens that are wanted [n, d], with their shares [n] of the shift, from the anchors.

            sum_t shares_t log(1 + e^-l_t) + w mean_a log(1 + e^l_a) + rho |v|^2,      l = v (h - mean) / deviation + b

        Convex; by L-BFGS.
        """
        s, z, z_a = self.settings, (wanted - self.mean) / self.deviation, self.standardised
        v, b = torch.zeros_like(self.mean).requires_grad_(), self.mean.new_zeros(()).requires_grad_()

        def loss() -> Tensor:
            missed, opened = shares @ F.softplus(-(z @ v + b)), self.counted @ F.softplus(z_a @ v + b)
            return missed + s.weight * opened + s.rho * v.square().sum()

        minimise([v, b], loss, max_iter=60)
        return v.detach(), b.detach()

    def scaler(self, wanted: Tensor, shares: Tensor) -> Tensor:
        """The scaler [d] of g = sigmoid(t (l - c)), from the regression's l: four fifths of the shift lie at l >= m.

        It bends at c = `bend` m, and is almost open at m, where t (m - c) = 4. Where anchors are so much like the
        target that m is near 0 or below, it bends at m - 1: erasing goes first. Arguments as for `regression`.
        """
        v, b = self.regression(wanted, shares)
        v, b = v / self.deviation, b - (self.mean / self.deviation) @ v
        logits, order = (wanted @ v + b).sort()
        m = logits[(shares[order].cumsum(0) < 0.2 * shares.sum()).sum().clamp(max=len(logits) - 1)]
        c = torch.minimum(self.settings.bend * m, m - 1)
        # t (h v + b - c) without a bias, as H one = 1
        return 4 / (m - c) * (v + (b - c) * self.one)

    def ridge(self, H: Tensor, x: Tensor, sizes: Tensor, scaler: Tensor) -> tuple[Tensor, Tensor]:
        """G and C [d, d] of the correction B = G^-1 C, x = g h B, which is best in all layers whatever their weights.

        G = sum_t w_t g_t^2 h_t h_t^T + lambda mean_a max(g_a, floor)^2 h_a h_a^T,     C = sum_t w_t g_t h_t x_t^T
        """
        s, g_a = self.settings, torch.sigmoid(self.standardised @ (self.deviation * scaler) + self.mean @ scaler)
        # prompts weigh alike, however long their shifts
        weights = (sizes.mean() / sizes / len(x))[:, None, None] * self.counts[:, None]
        wanted = torch.sigmoid(H @ scaler)[..., None] * H
        C = (weights * wanted).flatten(0, 1).T @ x.flatten(0, 1)
        # the anchors' part: floor^2 of the moment that all targets share, and more where this gate is open
        more = self.counted * (g_a.square() - s.floor**2).clamp(min=0)
        spared = s.floor**2 * self.moment + self.moment_of(more)
        G = (weights * wanted).flatten(0, 1).T @ wanted.flatten(0, 1) + s.lam * spared
        return G + 1e-6 * G.trace() / len(G) * torch.eye(len(G)).to(G), C

    def assemble(self, scaler: Tensor, G: Tensor, C: Tensor) -> ContextGate:
        """The gate of rank k nearest to B = G^-1 C, in the metrics G of its tokens and M of the layers.

        G^1/2 B M^1/2 = G^-1/2 C M^1/2 = Y,    Y^T Y = V S^2 V^T,    D = G^-1/2 Y V_k,    U_c = V_k^T M^-1/2
        """
        _, G_inverse = roots(G)
        Y = G_inverse @ C.cpu().double() @ self.M_half
        V = torch.linalg.eigh(Y.T @ Y)[1][:, -self.settings.k :]
        gate = ContextGate(len(scaler), self.w_qs.shape[1], V.shape[1]).to(self.w_qs)
        state = {"w_qs": self.w_qs[None], "scaler": scaler[None, :, None], "scale": gate.inner.scale}
        state |= {"lora_down.0": (G_inverse @ Y @ V)[None], "lora_up.0": (V.T @ self.M_inverse)[None]}
        gate.inner.load_state_dict(state)
        return gate


def check_finite(contexts: Tensor, what: str) -> None:
    """ValueError for contexts that are not finite numbers, or so large that their squares are not."""
    if not torch.linalg.vector_norm(contexts, dtype=torch.promote_types(contexts.dtype, torch.float32)).isfinite():
        raise ValueError(f"{what} is not made of finite numbers: encode in float32, or check the text encoder")


def minimise(parameters: list[Tensor], loss: Callable[[], Tensor], **options: int) -> None:
    """Change parameters, in place, so that their loss is small: L-BFGS. Nothing else gets a gradient."""
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward(inputs=parameters)
        return value

    optimizer.step(closure)


def attack(
    space: TokenSpace, gates: cpe.ResAG, E: Tensor, noise: float, generator: torch.Generator, steps: int = 30
) -> Tensor:
    """Deltas [J, T, d] that undo gates on contexts E [J, T, d]: the paper's attack, by L-BFGS.

    min over delta_j:   sum_l w_l |W_l delta_j + R_l(E_j + delta_j)|^2
    """
    start = torch.randn(E.shape, generator=generator, dtype=E.dtype).to(E.device)  # the CPU's, on every device
    deltas = (noise * E.norm(dim=(1, 2), keepdim=True) * start).requires_grad_()
    minimise([deltas], lambda: space.error(gates, E + deltas, -deltas).sum(), max_iter=steps)
    return deltas.detach()
