"""The mathematics of the notebooks, in small functions that tests/test_theory.py checks in both directions.

Two ways to erase a token: a linear edit adds Delta e (every edit of a weight matrix does), a gate adds a bump.

Letters: d width of an embedding, m width of a projection, n number of listed embeddings, c targets, T tokens, k rank,
    e_t [d] target, t [m] what must be added to it, S [d, d] = E[e e^T] second moment of the tokens that remain.
Everything is meant for float64. Sources: Pinv and Lagrange multipliers for T1 and T2, Rockafellar's separation theorem
for T3, Gao & Pavel (arXiv 1704.00805) for the softmax's Lipschitz constant in T4, single linkage for T5, ridge
regression for T6, logistic and reduced-rank regression for T7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --- T1: the floor of linear edits ---------------------------------------------------------------------------------


def second_moment(E: Tensor) -> Tensor:
    """S = mean of e e^T over the rows of E [n, d]."""
    return E.T @ E / len(E)


def damage(Delta: Tensor, S: Tensor) -> float:
    """E|Delta e|^2 = tr(Delta S Delta^T), of Delta [m, d]: what the edit does to the tokens that remain."""
    return ((Delta @ S) * Delta).sum().item()


def spectrum(S: Tensor, rtol: float = 1e-10) -> tuple[Tensor, Tensor]:
    """(S^+, projector onto the null space), both [d, d]; eigenvalues under rtol times the largest count as zero."""
    values, Q = torch.linalg.eigh((S + S.mT) / 2)
    kept = values > rtol * values.max().clamp_min(0)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return (Q * inverse) @ Q.T, (Q * (~kept).to(Q)) @ Q.T


def outside(projector: Tensor, e_t: Tensor, rtol: float = 1e-4) -> bool:
    """Whether e_t has a part in the null space of S; less than rtol |e_t| is taken for float32 rounding.

    `projector` [d, d] is the one of `spectrum`.
    """
    return bool((projector @ e_t).norm() > rtol * e_t.norm())


def leverage(S: Tensor, e_t: Tensor) -> float:
    """q = e_t^T S^+ e_t: how much like the remaining tokens a target is; infinity outside range(S)."""
    inverse, projector = spectrum(S)
    return float("inf") if outside(projector, e_t) else (e_t @ inverse @ e_t).item()


def floor(S: Tensor, e_t: Tensor, t: Tensor) -> float:
    """min { E|Delta e|^2 : Delta e_t = t } = |t|^2 / q; 0 when e_t is not in range(S)."""
    return t.square().sum().item() / leverage(S, e_t)


def best_edit(S: Tensor, e_t: Tensor, t: Tensor) -> Tensor:
    """Delta* [m, d] that attains the floor: t (S^+ e_t)^T / q, or t n^T / (n^T e_t) with n the part of e_t outside."""
    inverse, projector = spectrum(S)
    direction = (projector if outside(projector, e_t) else inverse) @ e_t
    return torch.outer(t, direction) / (direction @ e_t)


def frontier(S: Tensor, e_t: Tensor, t: Tensor, error: float) -> float:
    """The least damage of any Delta with |Delta e_t - t| <= error: (|t| - error)_+^2 / q. error = 0 is the floor."""
    return max(t.norm().item() - error, 0.0) ** 2 / leverage(S, e_t)


def soft_floor(S: Tensor, e_t: Tensor, t: Tensor, lam: float) -> float:
    """min |Delta e_t - t|^2 + lam E|Delta e|^2 = |t|^2 lam / (lam + q), lam > 0."""
    return t.square().sum().item() * lam / (lam + leverage(S, e_t))


def soft_edit(S: Tensor, e_t: Tensor, t: Tensor, lam: float) -> Tensor:
    """The minimiser [m, d] of the soft form, q / (lam + q) Delta*: a shorter step in the same direction."""
    q = leverage(S, e_t)
    return best_edit(S, e_t, t) * (1.0 if q == float("inf") else q / (lam + q))


def soft_loss(Delta: Tensor, S: Tensor, e_t: Tensor, t: Tensor, lam: float) -> float:
    """|Delta e_t - t|^2 + lam E|Delta e|^2, of Delta [m, d]."""
    return (Delta @ e_t - t).square().sum().item() + lam * damage(Delta, S)


def floor_many(S: Tensor, E_t: Tensor, T: Tensor) -> float:
    """min { E|Delta e|^2 : Delta E_t = T } = tr(T G^-1 T^T), G = E_t^T S^-1 E_t.

    Targets are the columns of E_t [d, c], their shifts those of T [m, c]. S must be invertible; with dependent
    targets (and shifts that agree with that) G^-1 becomes G^+.
    """
    G = E_t.T @ torch.linalg.solve(S, E_t)
    return (T @ torch.linalg.pinv(G, hermitian=True) @ T.T).trace().item()


def best_edit_many(S: Tensor, E_t: Tensor, T: Tensor) -> Tensor:
    """Delta* [m, d] = T G^-1 E_t^T S^-1."""
    X = torch.linalg.solve(S, E_t)
    return T @ torch.linalg.pinv(E_t.T @ X, hermitian=True) @ X.T


def soft_floor_many(S: Tensor, E_t: Tensor, T: Tensor, lam: Tensor) -> Tensor:
    """min |Delta E_t - T|_F^2 / c + lam E|Delta e|^2 = lam tr(T (K + c lam I)^-1 T^T), K = E_t^T S^+ E_t, of every lam.

    Columns as in `floor_many`, any number of them, all in range(S); lam [n] > 0.
    """
    # Targets may lie in directions of 1e-12 of the largest: without them the bound would be too high.
    k, V = torch.linalg.eigh(E_t.T @ spectrum(S, 1e-13)[0] @ E_t)
    energy = (T @ V).square().sum(dim=0)  # [c]
    return (lam[:, None] * energy / (k.clamp_min(0) + E_t.shape[1] * lam[:, None])).sum(dim=1)


def frontier_many(S: Tensor, E_t: Tensor, T: Tensor, error: float) -> float:
    """What no Delta with |Delta E_t - T|_F^2 / c <= error gets under in damage: max over lam of (F(lam) - error) / lam.

    F is `soft_floor_many`. Every lam gives a bound, so a grid of them does; the edit that is optimal there attains it.
    """
    lam = torch.logspace(-8, 6, 561, dtype=S.dtype)
    return ((soft_floor_many(S, E_t, T, lam) - error) / lam).max().clamp_min(0).item()


# --- T2: listing what must be kept ----------------------------------------------------------------------------------


def listed_edit(listed: Tensor, e_t: Tensor, t: Tensor) -> Tensor:
    """The edit [m, d] that does the least to the rows of `listed` [n, d], and of those the one of least norm.

    While they do not span e_t it is the null-space edit, without any damage to the list.
    """
    return best_edit(second_moment(listed), e_t, t)


def spread_bound(sigma: float, e_t: Tensor, t: Tensor) -> float:
    """sigma^2 |t|^2 / |e_t|^2 <= E|Delta e|^2 for every Delta with Delta e_t = t, when S >= sigma^2 I."""
    return sigma**2 * (t.norm() / e_t.norm()).square().item()


# --- T3: gates ------------------------------------------------------------------------------------------------------


def gate_error_bound(kappa: float, margin: float, t: Tensor) -> float:
    """|t| / (1 + e^(kappa m)) <= |t| e^(-kappa m): bounds both the erase error and the damage of one token."""
    return t.norm().item() * torch.sigmoid(torch.tensor(-kappa * margin, dtype=torch.float64)).item()


def gate(E: Tensor, v: Tensor, b: float, kappa: float, t: Tensor) -> Tensor:
    """R(e) = sigmoid(kappa (v^T e - b)) t of every row of E [n, d], [n, m]."""
    return torch.outer(torch.sigmoid(kappa * (E @ v - b)), t)


def sufficient_kappa(q: float, margin: float) -> float:
    """From here on the squared damage of a gate is below the floor |t|^2 / q: ln(q) / (2 m), or 0 when q <= 1."""
    return max(torch.tensor(q, dtype=torch.float64).log().item() / (2 * margin), 0.0)


def halfway(v: Tensor, e_t: Tensor, others: Tensor) -> tuple[float, float]:
    """(b, m): the plane v^T e = b halfway between e_t and the nearest of `others` [n, d], and the margin to both.

    In the units of v^T e; m > 0 exactly when v separates e_t from all of them.
    """
    target, nearest = (v @ e_t).item(), (others @ v).max().item()
    return (target + nearest) / 2, (target - nearest) / 2


def hull_point(e_t: Tensor, others: Tensor, steps: int = 500) -> Tensor:
    """The point [d] of the convex hull of `others` [n, d] nearest to e_t, by Frank-Wolfe with exact line search.

    p - e_t is zero iff e_t is in the hull. Otherwise v = e_t - p tends to the normal of the plane of maximal margin;
    whatever the number of steps, `halfway(v, ...)` > 0 is a certificate that e_t is outside.
    """
    p = others.mean(dim=0)
    for _ in range(steps):
        s = others[(others @ (e_t - p)).argmax()]
        step = s - p
        length = step.square().sum()
        if length == 0:
            break
        gamma = ((e_t - p) @ step / length).clamp(0, 1)
        if gamma == 0:
            break
        p = p + gamma * step
    return p


def ellipsoid_normal(e_t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """v [d] = u / gamma, with e_t = gamma u + beta: the ellipsoid's normal at a token that left a LayerNorm.

    v^T (e_t - e) = |u_t|^2 - u_t^T u > 0 for every other e with |u| <= |u_t|. Needs gamma != 0 in every coordinate,
    and |u|^2 = d var / (var + eps), which is the same for all tokens only as far as eps is negligible.
    """
    return (e_t - bias) / weight.square()


# --- T4: attention --------------------------------------------------------------------------------------------------


def attention(q: Tensor, K: Tensor, V: Tensor, W_o: Tensor, heads: int = 1) -> tuple[Tensor, Tensor]:
    """Output [N, o] and probabilities [heads, N, T], for q [N, m], K and V [T, m], W_o [o, m]."""
    q, K, V = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, K, V))
    P = torch.softmax(q @ K.mT * q.shape[-1] ** -0.5, dim=-1)
    return (P @ V).transpose(0, 1).flatten(1) @ W_o.T, P


def norm2(W: Tensor) -> float:
    """Spectral norm of a matrix W [m, n]."""
    return torch.linalg.matrix_norm(W, ord=2).item()


def value_bound(dV: Tensor, W_o: Tensor) -> float:
    """How far any output row can move when V moves by dV [T, m]: |W_o| |dV|_F, W_o [o, m]. No assumption."""
    return norm2(W_o) * dV.norm().item()


def softmax_slope(P: Tensor) -> float:
    """max over rows of |diag(p) - p p^T|_2: how fast the probabilities P [..., T] follow their logits. At most 1/2;
    1/T exactly where attention is even."""
    P = P.flatten(0, -2)
    return torch.linalg.matrix_norm(torch.diag_embed(P) - P.unsqueeze(-1) * P.unsqueeze(-2), ord=2).max().item()


def key_bound(q: Tensor, dK: Tensor, E: Tensor, W_v: Tensor, W_o: Tensor, heads: int = 1, slope: float = 0.5) -> float:
    """How far any output row can move when K moves by dK [T, m], of q [N, m], with V = E W_v^T, E [T, d].

        |W_o W_v| |E| slope |dK|_F max|q| / sqrt(m / heads)          one head
        |W_o| |W_v| ...                                              several: each head has its own probabilities

    slope = 1/2 always holds. The paper's 1/77 is the slope of even attention, so it holds to first order, there.
    """
    mixing = norm2(W_o @ W_v) if heads == 1 else norm2(W_o) * norm2(W_v)
    scale = (q.shape[-1] / heads) ** -0.5
    return mixing * norm2(E) * slope * dK.norm().item() * q.norm(dim=-1).max().item() * scale


def centred(rows: Tensor) -> Tensor:
    """Rows [T, m] minus their mean: what attention can tell apart. A softmax ignores what all keys have in common,
    and changes of probabilities sum to zero, so they ignore what all values have in common."""
    return rows - rows.mean(dim=0)


def value_bound_by_token(dV: Tensor, W_o: Tensor, heads: int = 1) -> float:
    """The sharper form of `value_bound`: |W_o| sqrt(sum_h max_j |dV_jh|^2), dV [T, m], as outputs average tokens."""
    rows = dV.unflatten(-1, (heads, -1)).norm(dim=-1)  # [T, heads]
    return norm2(W_o) * rows.max(dim=0).values.norm().item()


def key_bound_by_head(q: Tensor, dK: Tensor, E: Tensor, W_v: Tensor, W_o: Tensor, heads: int = 1) -> float:
    """The sharper form of `key_bound`, with the logits that really move and every head's own product:

    max over rows of sum_h |W_o^h W_v^h| |E - mean| 1/2 |(dK^h - mean) q^h| / sqrt(m / heads)

    Shapes as there.
    """
    q, dK = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, centred(dK)))  # [heads, N or T, m / heads]
    logits = (dK @ q.mT).norm(dim=1) * q.shape[-1] ** -0.5  # [heads, N]
    pairs = zip(W_o.unflatten(1, (heads, -1)).unbind(1), W_v.unflatten(0, (heads, -1)), strict=True)
    mixing = torch.tensor([norm2(o @ v) for o, v in pairs], dtype=q.dtype)
    return (mixing @ logits).max().item() * norm2(centred(E)) / 2


# --- T5: modes ------------------------------------------------------------------------------------------------------


def merge_heights(X: Tensor) -> Tensor:
    """Lengths [n - 1], ascending, of the edges of the minimum spanning tree of the rows of X [n, d] (Prim).

    Of the graph that joins rows nearer than h, the number of components is 1 + the count of lengths >= h.
    """
    distances = torch.cdist(X, X)
    best, lengths = distances[0].clone(), []
    best[0] = float("inf")
    done = torch.zeros(len(X), dtype=torch.bool)
    done[0] = True
    for _ in range(len(X) - 1):
        i = best.argmin()
        lengths.append(best[i].item())
        done[i] = True
        best = torch.minimum(best, distances[i])
        best[done] = float("inf")
    return torch.tensor(lengths, dtype=X.dtype).sort().values


def modes(X: Tensor, h: float) -> Tensor:
    """Component [n] of every row of X [n, d] in the graph that joins rows nearer than h.

    When every mode hangs together in steps under h, and two modes are nowhere nearer than h, these are the modes.
    """
    near = torch.cdist(X, X) < h
    labels = torch.arange(len(X))
    while True:
        # the smallest label within reach
        spread = torch.where(near, labels, len(X)).min(dim=1).values.minimum(labels)
        if torch.equal(spread, labels):
            return labels
        labels = spread


# --- The adversary --------------------------------------------------------------------------------------------------


def reviving_shift(W_edited: Tensor, W: Tensor, e_t: Tensor) -> Tensor:
    """delta [d] with W' (e_t + delta) as near to W e_t as can be; W', W [m, d] may be all layers stacked.

    Of an edit W' = W (I + A) it revives the target exactly, unless I + A is singular.
    """
    return torch.linalg.lstsq(W_edited, (W - W_edited) @ e_t, driver="gelsd").solution


def attack_floor(kappa: float, margin: float, v: Tensor, t: Tensor, slope: float, radius: float) -> float:
    """What no attack |delta| <= radius on a `gate` gets under: |W delta + R(e_t + delta)| >= this.

    |t| sigmoid(kappa (m - |v| radius)) - |W| radius,   or 0;    slope = |W|, m the margin at e_t, v [d]
    """
    opening = torch.sigmoid(torch.tensor(kappa * (margin - v.norm().item() * radius), dtype=torch.float64)).item()
    return max(t.norm().item() * opening - slope * radius, 0.0)


def closing_shift(v: Tensor, margin: float, beyond: float) -> Tensor:
    """The shortest delta [d] that puts a token of margin m as far as `beyond` on the closed side of a `gate`."""
    return -(margin + beyond) * v / v.square().sum()


# --- T6: one correction of the context ------------------------------------------------------------------------------


def context_ridge(z: Tensor, x: Tensor, z_a: Tensor, lam: float) -> Tensor:
    """U_c [k, d] = (sum z^T z + lam sum z_a^T z_a)^-1 sum z^T x, for codes z [n, k], shifts x [n, d], anchors z_a.

    The best U of every layer, whatever its W_l [m, d] and its weight a_l, is U_c W_l^T (`layer_loss`).
    """
    return torch.linalg.lstsq(z.T @ z + lam * z_a.T @ z_a, z.T @ x).solution


def layer_loss(U: Tensor, W: Tensor, z: Tensor, x: Tensor, z_a: Tensor, lam: float) -> Tensor:
    """|x W^T - z U|^2 + lam |z_a U|^2 of one layer, U [k, m]."""
    return (x @ W.T - z @ U).square().sum() + lam * (z_a @ U).square().sum()


# --- T7: the gate that is solved for --------------------------------------------------------------------------------


def logistic_loss(y: Tensor, z: Tensor, s: Tensor, z_a: Tensor, c: Tensor, w: float, rho: float) -> Tensor:
    """sum_t s_t log(1 + e^-l_t) + w sum_a c_a log(1 + e^l_a) + rho |v|^2, l = z v + b, of y = (v, b) [d + 1].

    Tokens that shall open the gate are the rows of z [n, d], with weights s [n]; those that shall not, z_a and c.
    """
    v, b = y[:-1], y[-1]
    missed, opened = s @ F.softplus(-(z @ v + b)), c @ F.softplus(z_a @ v + b)
    return missed + w * opened + rho * v.square().sum()


def logistic_newton(
    y: Tensor, z: Tensor, s: Tensor, z_a: Tensor, c: Tensor, w: float, rho: float
) -> tuple[Tensor, ...]:
    """Gradient [d + 1] and Hessian [d + 1, d + 1] of `logistic_loss`; the Hessian is positive definite for rho > 0."""
    one, one_a = (torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in (z, z_a))
    p, p_a = torch.sigmoid(-(one @ y)), torch.sigmoid(one_a @ y)
    ridge = 2 * rho * torch.cat([torch.ones_like(y[:-1]), torch.zeros_like(y[-1:])])
    gradient = w * (c * p_a) @ one_a - (s * p) @ one + ridge * y
    curvature, curvature_a = s * p * (1 - p), w * c * p_a * (1 - p_a)
    hessian = (curvature[:, None] * one).T @ one + (curvature_a[:, None] * one_a).T @ one_a + ridge.diag()
    return gradient, hessian


def logistic_optimum(y: Tensor, *problem: Tensor | float) -> Tensor:
    """The minimum (v, b) [d + 1] of `logistic_loss`, by Newton's method from y with halved steps."""
    for _ in range(50):
        gradient, hessian = logistic_newton(y, *problem)
        step, now, length = torch.linalg.solve(hessian, gradient), logistic_loss(y, *problem), 1.0
        while logistic_loss(y - length * step, *problem) > now and length > 1e-6:
            length /= 2
        y = y - length * step
        if gradient @ step < 1e-14 * now:
            break
    return y


def ridge_gain(B: Tensor, G: Tensor, C: Tensor, M: Tensor) -> Tensor:
    """2 tr(B^T C M) - tr(B^T G B M): by how much a correction B [d, d] lowers the loss of doing nothing.

    sum_t w_t |x_t - h_t B|_M^2 + lam sum_a c_a |h_a B|_M^2 = sum_t w_t |x_t|_M^2 - gain
    G = sum_t w_t h_t^T h_t + lam sum_a c_a h_a^T h_a,    C = sum_t w_t h_t^T x_t
    """
    return 2 * ((B.T @ C) * M.T).sum() - ((B.T @ G @ B) * M.T).sum()


def mixture_moment(h: Tensor, c: Tensor) -> Tensor:
    """E m^T m [d, d] of mixtures m = alpha a + (1 - alpha) b: rows a, b of h [n, d] by their weights c [n], 1 in all.

    alpha is uniform in [0, 1]:  2/3 S + 1/3 mu^T mu,    S = sum_a c_a h_a^T h_a,    mu = sum_a c_a h_a
    """
    mu = c @ h
    return 2 / 3 * (c[:, None] * h).T @ h + torch.outer(mu, mu) / 3


def rank_gains(G: Tensor, C: Tensor, W: Tensor) -> Tensor:
    """s_1^2 >= s_2^2 >= ... of G^-1/2 C W^T: the most that B W^T of rank k can gain in |.| W is the sum of the first k.

    For one layer W [m, d]; for all layers at once, W is M^1/2.
    """
    values, Q = torch.linalg.eigh(G)
    whitened = (Q / values.clamp_min(1e-12 * values.max()).sqrt()) @ Q.T
    return torch.linalg.svdvals(whitened @ C @ W.T).square()
