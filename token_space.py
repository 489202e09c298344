"""The losses of cpe.py as quadratic forms of d = 768 dimensions: the same numbers, dozens of times faster.

Each loss is a sum over projections of |W_l x - R_l(E)|^2. With R_l(E) = z_l U_l, where z_l = s g * (H D_l) are k
numbers per token, it can be multiplied out:

    sum_l w_l |W_l x - z_l U_l|^2  =  x M x^T  -  2 <x P^T, z>  +  z G z^T

    M   = sum_l w_l W_l^T W_l    [d, d]       knows all there is to know of the U-Net
    P_l = w_l U_l W_l            [k, d]
    G_l = w_l U_l U_l^T          [k, k]       w_l = a_l / (d_l L): a mean over features, then over layers

No tensor [B, T, d_l] is left. `TokenSpace` is these forms, `Losses` the paper's losses on them. At the end stands
`ContextGate`, one correction of the context for all layers. Letters as in cpe.py; built on it alone.
"""

import torch
from torch import Tensor, nn

import cpe


class TokenSpace:
    """The frozen projections as seen from the context: their weights w_l, and the metric M."""

    def __init__(self, layers: cpe.Layers):
        self.layers = layers
        self.w = {l: layers.a[l] / (len(W) * len(layers.W)) for l, W in layers.W.items()}
        # M = sum_l w_l W_l^T W_l
        self.M = sum(self.w[l] * W.T @ W for l, W in layers.W.items())

    def energy(self, x: Tensor) -> Tensor:
        """x M x^T = sum_l w_l |W_l x|^2: how much a shift of the context matters, [..., T, d] -> [..., T]."""
        return ((x @ self.M) * x).sum(dim=-1)

    def forms(self, gates: cpe.ResAG) -> tuple[Tensor, Tensor]:
        """P [N L k, d] and G [N, L, k, k]: all that the losses ask of U. KeyError for gates of another model."""
        W, w = self.layers.W, self.w
        P = [w[l] * U @ W[l] for l, U in zip(gates.names, gates.lora_up, strict=True)]
        G = [w[l] * U @ U.mT for l, U in zip(gates.names, gates.lora_up, strict=True)]
        return torch.stack(P, dim=1).flatten(0, 2), torch.stack(G, dim=1)

    def error(self, gates: cpe.ResAG, E: Tensor, x: Tensor) -> Tensor:
        """sum_l w_l |W_l x - R_l(E)|^2 of every token, [B, T]: how far gates are from moving E by x [B, T, d]."""
        return quadratic(self.energy(x), x, codes(gates, E), *self.forms(gates))

    @torch.no_grad()
    def reached(self, gates: cpe.ResAG, E: Tensor, x: Tensor) -> Tensor:
        """The share of shifts x that gates achieve, [B]: 1 all, 0 nothing, below 0 a move away from it.

        1 - sum_t |W_l x - R_l(E)|^2 / sum_t |W_l x|^2        0 where nothing is asked for
        """
        asked = self.energy(x).sum(dim=-1)
        return torch.where(asked > 0, 1 - self.error(gates, E, x).sum(dim=-1) / asked, 0.0)


def codes(gates: cpe.ResAG, E: Tensor) -> Tensor:
    """z = s g * (H D) [B, T, N L k] of contexts E [B, T, d]: of every concept, projection and rank one number."""
    z = gates.gated(E) @ torch.cat(list(gates.lora_down), dim=-1).unsqueeze(1)  # [N, B, T, L k]
    return z.permute(1, 2, 0, 3).flatten(2)


def quadratic(energy: Tensor, x: Tensor, z: Tensor, P: Tensor, G: Tensor) -> Tensor:
    """x M x^T - 2 <x P^T, z> + z G z^T of every token, [B, T]."""
    return energy - 2 * ((x @ P.T) * z).sum(dim=-1) + correction(z, G)


def correction(z: Tensor, G: Tensor) -> Tensor:
    """z G z^T = sum_l w_l |R_l(E)|^2 of every token, [B, T]: how much the gates move it."""
    blocks = z.unflatten(-1, G.shape[:3])
    return (torch.einsum("btnlk,nlkj->btnlj", blocks, G) * blocks).sum(dim=(-3, -2, -1))


class Losses(cpe.Losses):
    """cpe.Losses in token space; values and gradients are the same to rounding."""

    def __init__(self, layers: cpe.Layers, data: cpe.Data, eta: float):
        super().__init__(layers, data, eta)
        self.space = TokenSpace(layers)
        # x M x^T [P, T] of every template, which the gates cannot change
        self.energies = torch.stack([self.space.energy(self.shift(i)) for i in range(len(data.targets))])
        self.under_attack: tuple[Tensor, Tensor] | None = None

    def error(self, gates: cpe.ResAG, E: Tensor, x: Tensor) -> Tensor:
        """The mean over prompts and tokens of `TokenSpace.error`."""
        return self.space.error(gates, E, x).mean()

    # What makes it fast: all contexts of a step go through the gate at once, P and G are computed once for all of them,
    # anchors ask for z G z^T alone, and x M x^T is not computed anew in every step.

    def erasing(self, gates: cpe.ResAG, i: Tensor, anchors: Tensor, deltas: Tensor | None) -> dict[str, Tensor]:
        """All losses of one step of erasing, by name."""
        E, x, energy = self.data.targets[i], self.shift(i), self.energies[i]
        if deltas is not None:
            E = torch.cat([E, E[:1] + deltas])
            x, energy = torch.cat([x, x[:1] - deltas]), torch.cat([energy, self.energy_under_attack(i, deltas)])
        z = features(gates, torch.cat([E, anchors]))
        P, G = self.space.forms(gates)
        errors = quadratic(energy, x, z[: len(E)], P, G).mean(dim=1)
        losses = {"erase": errors[: len(i)].mean(), "anchor": correction(z[len(E) :], G).mean()}
        return losses if deltas is None else losses | {"adversarial": errors[len(i) :].mean()}

    def attack(self, gates: cpe.ResAG, i: Tensor, deltas: Tensor) -> Tensor:
        """The attacker's loss."""
        z = features(gates, self.data.targets[i[:1]] + deltas)
        return quadratic(self.space.energy(deltas), -deltas, z, *self.space.forms(gates)).mean()

    def energy_under_attack(self, i: Tensor, deltas: Tensor) -> Tensor:
        """(x - delta) M (x - delta)^T [J, T] of the first of templates i."""
        if self.under_attack is None or self.under_attack[0] is not deltas:
            self.under_attack = deltas, deltas @ self.space.M
        dM = self.under_attack[1]
        # x M x^T - 2 delta M x^T + delta M delta^T
        return self.energies[i[:1]] + ((deltas - 2 * self.shift(i[:1])) * dM).sum(dim=-1)


def features(gates: cpe.ResAG, E: Tensor) -> Tensor:
    """`codes` of one concept without forming H: H v = A (E v) and H D = A (E D), where A = softmax(Q Q^T)."""
    if type(gates) is not cpe.ResAG or len(gates.w_qs) > 1:
        return codes(gates, E)
    columns = torch.cat([gates.w_qs, gates.scaler, *gates.lora_down], dim=-1)[0]  # [d, r + 1 + L k]
    r = gates.w_qs.shape[-1]
    q, rest = (E @ columns).split([r, columns.shape[1] - r], dim=-1)
    logits, z = (torch.softmax(q @ q.mT, dim=-1) @ rest).split([1, rest.shape[-1] - 1], dim=-1)
    return gates.scale * torch.sigmoid(logits) * z


def spectral_norm(matrix: Tensor, tolerance: float = 1e-8, most: int = 1000) -> float:
    """Largest singular value of a matrix [m, n], to 1e-6 of it: Lanczos on M^T M, far cheaper than all of them."""
    # M^T M v_i = beta_i-1 v_i-1 + alpha_i v_i + beta_i v_i+1: in the basis v_1, v_2, ... a tridiagonal T
    v = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    v, before, alphas, betas, norm = v / v.norm(), torch.zeros_like(v), [], [0.0], 0.0
    for step in range(1, most + 1):
        w = matrix.T @ (matrix @ v) - betas[-1] * before
        alphas.append((w @ v).item())
        w = w - alphas[-1] * v
        betas.append(w.norm().item())
        if step % 10 == 0 or betas[-1] == 0:
            diagonal, side = (torch.tensor(x, dtype=torch.float64) for x in (alphas, betas[1:-1]))
            # M^T M and T share their largest eigenvalue, which T approaches from below
            previous, norm = norm, torch.linalg.eigvalsh(diagonal.diag() + side.diag(-1))[-1].clamp(min=0).item() ** 0.5
            if betas[-1] == 0 or norm - previous <= tolerance * norm:
                break
        v, before = w / betas[-1], v
    return norm


# --- One correction of the context for all layers ----------------------------------------------------------------


class ContextGate(nn.Module):
    """A gate that changes the context itself; our variant, not the paper's.

        E' = E + s g * (H D) U_c       D [d, k], U_c [k, d]

    Every projection then receives W_l (E' - E): it is a ResAG whose D_l are equal and whose U_l = U_c W_l^T, and
    `expand` writes it as one. Any pipeline that takes prompt embeddings can be given its E'. `inner` is the same gate
    as a ResAG whose only projection is the context.
    """

    def __init__(self, d: int, r: int = 16, k: int = 8, N: int = 1):
        super().__init__()
        self.inner = cpe.ResAG({"context": d}, d, r, k, N, alpha=k)

    def forward(self, E: Tensor) -> Tensor:
        """The erased context E' [B, T, d], in its dtype."""
        return E + self.inner.residuals(E.to(self.inner.w_qs))["context"].to(E)

    def expand(self, layers: cpe.Layers) -> cpe.ResAG:
        """The same eraser as a ResAG: to be saved, merged and attached like any other."""
        inner, W = self.inner, list(layers.W.values())
        (N, d, r), D, U_c = inner.w_qs.shape, inner.lora_down[0], inner.lora_up[0]
        gates = cpe.ResAG(layers.widths, d, r, inner.k, N).to(inner.w_qs)
        state = {"w_qs": inner.w_qs, "scaler": inner.scaler, "scale": inner.scale}
        # U_l = U_c W_l^T
        state |= {f"lora_down.{l}": D for l in range(len(W))} | {f"lora_up.{l}": U_c @ W[l].T for l in range(len(W))}
        gates.load_state_dict(state)
        return gates


def context_gate(space: TokenSpace, gates: cpe.ResAG) -> ContextGate:
    """The change of the context that comes nearest to what gates ask of all layers: `ContextGate.expand` backwards.

    E' = E + (sum_l w_l R_l(E) W_l) M^-1 minimises sum_l w_l |W_l (E' - E) - R_l(E)|^2 at every token. As R_l(E) is, it
    is linear in the codes: a context gate with all D_l side by side and U_c = P M^-1, of rank L k. Exact for gates
    that were expanded from one.
    """
    N, d, r = gates.w_qs.shape
    context = ContextGate(d, r, gates.k * len(gates.names), N).to(gates.w_qs)
    P, M = space.forms(gates)[0].cpu().double(), space.M.cpu().double()
    state = {"w_qs": gates.w_qs, "scaler": gates.scaler, "scale": gates.scale}
    state["lora_down.0"] = torch.cat(list(gates.lora_down), dim=-1)
    # M is singular where the layers look at fewer than d directions: what none sees is left alone.
    state["lora_up.0"] = (P @ torch.linalg.pinv(M, hermitian=True)).unflatten(0, (N, -1))
    context.inner.load_state_dict(state)
    return context
