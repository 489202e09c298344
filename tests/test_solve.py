"""solve.py: the closed forms are the optimum they claim to be, and the gates do what gates are for."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import cpe
import sampler
import solve
from loading.cache import cached_contexts
from loading.prompts import PRESETS, prepare, read_prompts, sentences
from solve import Settings, Solver
from study.world import World
from token_space import TokenSpace
from weights import load_model

D, T = 24, 12


def layers(seed: int = 0) -> cpe.Layers:
    """Two projections of widths that differ."""
    chance = torch.Generator().manual_seed(seed)
    names = [f"mid_block.attentions.0.transformer_blocks.0.attn2.{kind}" for kind in ("to_k", "to_v")]
    W = {name: torch.randn(width, D, generator=chance) for name, width in zip(names, (16, 40), strict=True)}
    return cpe.Layers(W, dict.fromkeys(W, 1.0) | {names[0]: 0.3})


class Words:
    """A text encoder in miniature: positions, one word per prompt, and a LayerNorm with a bias at the end."""

    def __init__(self):
        chance = torch.Generator().manual_seed(1)
        self.positions, self.words = torch.randn(T, D, generator=chance), torch.randn(60, D, generator=chance)
        self.norm = nn.LayerNorm(D).requires_grad_(False)
        self.norm.weight.uniform_(0.5, 1.5, generator=chance)
        self.norm.bias.uniform_(0, 1, generator=chance)

    def __call__(self, numbers: list[int], seed: int = 0, where: int = 4) -> Tensor:
        """Contexts of prompts that say word number n at place `where` and after it, among noise for other words."""
        noise = torch.randn(len(numbers), T, D, generator=torch.Generator().manual_seed(seed))
        there = (torch.arange(T) >= where).float()[:, None]
        return self.norm(self.positions + 0.3 * noise + 2 * there * self.words[numbers][:, None])


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


def spared_of(solver: Solver) -> Tensor:
    """H [n, d] of the anchors' tokens."""
    return solver.standardised * solver.deviation + solver.mean


@pytest.fixture(scope="module")
def solver(words: Words) -> Solver:
    anchors = torch.cat([words(list(range(2, 50)), seed) for seed in (1, 2)])
    return Solver(TokenSpace(layers()), solve.constant_direction(words.norm), anchors, Settings())


def test_all_outputs_of_a_layer_norm_agree_in_one_direction(words):
    u = solve.constant_direction(words.norm)
    torch.testing.assert_close(words([3, 5]) @ u, torch.ones(2, T), atol=1e-4, rtol=0)
    assert solve.constant_direction(nn.LayerNorm(D)) is None  # no bias: no such direction


def test_a_solved_gate_moves_its_target_and_nothing_else(words, solver):
    gates = solver.solve(words([0] * 40, 3), words([1] * 40, 3))
    E, surrogate = words([0] * 20, 9), words([1] * 20, 9)  # prompts that it never saw
    x = 1.3 * (surrogate - E)
    assert solver.space.reached(gates, E, x).mean() > 0.8
    others = words(list(range(2, 60)), 8)  # ten of these words are no anchors
    moved = solver.space.error(gates, others, torch.zeros_like(others)).sum(dim=1)
    assert moved.max() < 0.02 * solver.space.energy(x).sum(dim=1).mean()


def test_erasing_goes_first_where_an_anchor_is_like_the_target(words, solver):
    """The regression's margin is then below 0; a gate that bends at a share of it would open the wrong way round."""
    alike = torch.cat([words(list(range(2, 50))), words([0] * 16, 5)])
    solver = Solver(solver.space, solver.one, alike, replace(Settings(), lam=1.0))
    E, surrogate = words([0] * 40, 3), words([1] * 40, 3)
    x = 1.3 * (surrogate - E)
    gates = solver.solve(E, surrogate)
    there, others = gates.gate(E)[0][0, :, 4:], gates.gate(words(list(range(2, 60)), 8))[0][0]
    assert there.mean() > 0.8 > 0.2 > others.mean()
    assert solver.space.reached(gates, E, x).mean() > 0.5


def test_a_solved_gate_is_an_ordinary_gate_file(words, solver):
    gates = solver.solve(words([0] * 8), words([1] * 8))
    again = cpe.from_tensors(cpe.to_tensors(gates))
    E = words([0, 7], 5)
    for name, R in gates.residuals(E).items():
        torch.testing.assert_close(again.residuals(E)[name], R)


def test_the_scaler_is_the_minimum_of_its_convex_problem(words, solver):
    """Its gradient, written out, is zero there."""
    H = solver.attended(words([0] * 30, 3))[:, solver.chosen].flatten(0, 1).double()
    shares = torch.rand(len(H), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares /= shares.sum()
    v, b = (each.double() for each in solver.regression(H.float(), shares.float()))
    z, z_a = ((x.double() - solver.mean.double()) / solver.deviation.double() for x in (H, spared_of(solver)))
    w, rho, counted = solver.settings.weight, solver.settings.rho, solver.counted.double()
    opened = counted * torch.sigmoid(z_a @ v + b)
    missed = shares * torch.sigmoid(-(z @ v + b))
    # d/dv: - sum_t shares_t sigmoid(-l) z + w mean_a sigmoid(l) z + 2 rho v
    gradient = -missed @ z + w * opened @ z_a + 2 * rho * v
    assert gradient.norm() < 1e-3 * (missed @ z.abs()).norm()
    assert abs(w * opened.sum() - missed.sum()) < 1e-3 * missed.sum()


@pytest.mark.parametrize("k", [1, 3, D])
def test_the_correction_is_the_least_squares_of_its_rank(words, solver, k):
    """No B of rank k has a smaller sum_t |x - g h B|_M^2 + lambda mean_a |max(g, floor) h B|_M^2."""
    solver = Solver(solver.space, solver.one, words(list(range(2, 50))), replace(Settings(), k=k))
    E = words([0] * 30, 3)
    x = 1.3 * (words([1] * 30, 3) - E)
    gates = solver.gates(E, x)
    M, s, scaler = solver.space.M.double(), solver.settings, gates.scaler[0, :, 0].double()
    H, H_a = solver.attended(E)[:, solver.chosen].double(), spared_of(solver).double()
    sizes = solver.space.energy(x).mean(dim=1).double()
    weights = ((sizes.mean() / sizes / len(x))[:, None] * solver.counts.double()).sqrt()[..., None]
    g, g_a = torch.sigmoid(H @ scaler)[..., None], torch.sigmoid(H_a @ scaler).clamp(min=s.floor)[:, None]
    Z = torch.cat([(weights * g * H).flatten(0, 1), (s.lam * solver.counted.double()).sqrt()[:, None] * g_a * H_a])
    asked = (weights * x[:, solver.chosen]).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(M)
    root = vectors * values.sqrt() @ vectors.T
    wanted = torch.cat([asked, torch.zeros_like(H_a)]) @ root
    # the textbook: the fit of full rank, cut off at its first k principal directions
    fit = Z @ torch.linalg.lstsq(Z, wanted).solution
    V = torch.linalg.svd(fit, full_matrices=False)[2][:k].T
    W, U = solver.space.layers.W[gates.names[1]].double(), gates.lora_up[1][0].double()
    U_c = torch.linalg.lstsq(W, U.T).solution.T  # U_l = U_c W_l^T, and this W_l has full rank
    mine = Z @ (gates.scale.item() * gates.lora_down[1][0].double() @ U_c @ root)
    assert (mine - wanted).square().sum() <= (fit @ V @ V.T - wanted).square().sum() * (1 + 1e-3)


def test_what_an_attack_finds_can_be_erased_too(words, solver):
    E, surrogate = words([0] * 40, 3), words([1] * 40, 3)
    x, once = 1.3 * (surrogate - E), solver.solve(E, surrogate)
    deltas = solve.attack(solver.space, once, E, 1e-3, torch.Generator().manual_seed(5))
    undone = solver.space.reached(once, E + deltas, x - deltas).mean()
    assert undone < solver.space.reached(once, E, x).mean() - 0.3
    again = solver.gates(torch.cat([E, E + deltas]), torch.cat([x, x - deltas]))
    # 0.03 before, 0.21 after (0.08 and 0.38 where a gate bends at a quarter of the margin)
    assert solver.space.reached(again, E + deltas, x - deltas).mean() > undone + 0.1
    rounds = Solver(solver.space, solver.one, words(list(range(2, 50))), replace(Settings(), rounds=1))
    assert rounds.solve(E, surrogate).scaler.ne(once.scaler).any()


def test_the_same_twice_is_the_same_to_the_bit(words, solver):
    one, other = (solver.solve(words([0] * 8), words([1] * 8)) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_contexts_are_enough(words, solver):
    E, surrogate, anchors = words([0] * 20, 3), words([1] * 20, 3), words(list(range(2, 50)))
    x = 1.3 * (surrogate - E)
    exact = Solver(solver.space, solver.one, anchors, solver.settings).solve(E, surrogate)
    half = Solver(solver.space, solver.one, anchors.half(), solver.settings).solve(E.half(), surrogate.half())
    assert half.scaler.dtype == torch.float32
    assert abs(solver.space.reached(half, E, x).mean() - solver.space.reached(exact, E, x).mean()) < 0.02


def in_few_directions(directions: int, one: Tensor, *contexts: Tensor) -> list[Tensor]:
    """Contexts [B, T, d] projected onto a plane of so many directions that holds their mean, and where E one = 1."""
    tokens = torch.cat([E.flatten(0, 1) for E in contexts]).double()
    u, mean = one.double() / one.double().norm(), tokens.mean(dim=0)
    around = tokens - mean
    V = torch.linalg.svd(around - torch.outer(around @ u, u), full_matrices=False)[2][:directions].T
    return [(mean + (E.double() - mean) @ V @ V.T).float() for E in contexts]


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("directions", [2, 4, 8])
def test_contexts_of_fewer_directions_than_the_model_has_are_solved(words, solver, directions, rounds):
    """G is singular then, as is what the attention is made of: of 24 directions (its width is 16) there are a few."""
    given = words(list(range(2, 50))), words([0] * 40, 3), words([1] * 40, 3)
    anchors, E, surrogate = in_few_directions(directions, solver.one, *given)
    flat = torch.cat([anchors, E, surrogate]).flatten(0, 1)
    assert torch.linalg.matrix_rank(flat - flat.mean(dim=0), rtol=1e-4) == directions
    gates = Solver(solver.space, solver.one, anchors, replace(Settings(), rounds=rounds)).solve(E, surrogate)
    assert all(parameter.isfinite().all() for parameter in gates.parameters())
    x = 1.3 * (surrogate - E)
    assert solver.space.reached(gates, E, x).mean() > 0.8
    moved = solver.space.error(gates, anchors, torch.zeros_like(anchors)).sum(dim=1)
    assert moved.max() < 1e-3 * solver.space.energy(x).sum(dim=1).mean()


def test_one_prompt_again_and_again_is_anchors_enough(words, solver):
    """And layers that look at six of 24 directions: M is singular as well."""
    E, surrogate = words([0] * 40, 3), words([1] * 40, 3)
    thin = TokenSpace(cpe.Layers({name: W[:3] for name, W in layers().W.items()}, layers().a))
    gates = Solver(thin, solver.one, words([2]).expand(12, -1, -1), Settings()).solve(E, surrogate)
    assert all(parameter.isfinite().all() for parameter in gates.parameters())
    assert thin.reached(gates, E, 1.3 * (surrogate - E)).mean() > 0.9


def test_a_target_among_the_anchors_is_kept_and_gates_stay_finite(words, solver):
    E, surrogate = words([0] * 40, 3), words([1] * 40, 3)
    gates = Solver(solver.space, solver.one, torch.cat([words([*range(2, 50)]), E]), Settings()).solve(E, surrogate)
    assert all(parameter.isfinite().all() for parameter in gates.parameters())
    assert solver.space.reached(gates, E, 1.3 * (surrogate - E)).mean() < 0.2


def test_places_count_every_token_once():
    chosen, counts = solve.places(77)
    assert chosen[:20].tolist() == list(range(20))
    assert counts.sum() == 77
    assert abs(sum(1 if place % 2 else -1 for place in chosen[20:].tolist())) <= 1  # paddings of either thing
    assert len(solve.places(8)[0]) == 8


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda w, s: Solver(s.space, s.one, w([2, 3]), s.settings), "2 anchors are too few"),
        (lambda w, s: Solver(s.space, s.one, w([2] * 12) * torch.nan, s.settings), "an anchor is not made of finite"),
        (lambda w, s: Solver(s.space, s.one, w([2] * 12) * 1e20, s.settings), "an anchor is not made of finite"),
        (lambda w, s: Solver(s.space, s.one, w([2] * 12).half() * 1e6, s.settings), "an anchor is not made of finite"),
        (lambda w, s: s.solve(w([0]) * torch.nan, w([1])), "a context of the target or its surrogate is not made of"),
        # every token of every prompt is the same: there is nothing to attend to
        (
            lambda w, s: Solver(s.space, s.one, w([2])[:, :1].expand(12, T, -1), s.settings).solve(w([0]), w([1])),
            "what gates are solved from is not made of finite numbers",
        ),
        (lambda w, s: s.solve(w([0]), w([1]) * torch.inf), "finite"),
        (lambda w, s: s.solve(w([0]), w([0])), "the same to this text encoder"),
    ],
)
def test_what_cannot_be_solved_is_said(words, solver, wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong(words, solver)


# --- A style of the embedded model -------------------------------------------------------------------------------


@torch.no_grad()
def test_a_style_goes_from_things_that_no_gate_was_solved_on_and_other_styles_and_the_things_stay():
    """In sentences of no other file, about things on no list: solved with a few paddings, it acts on all."""
    world, preset = World(load_model("emoji")), "emoji-style"
    model, space, recipe = world.model, world.space, PRESETS[preset]

    encoders = partial(model.encode, briefly=True), partial(cached_contexts, model, briefly=True)
    data = prepare(recipe, read_prompts(preset), ["blob style"], *encoders)
    one = solve.constant_direction(model.text_encoder.text_model.final_layer_norm)
    anchors, settings = torch.cat([data.anchors.to(data.empty), data.empty]), Settings.of(recipe, style=True)
    with torch.enable_grad():
        gates = Solver(space, one, anchors, settings).solve(data.targets, data.surrogates)
    blob, noto, fluent = (
        model.encode([line.replace("{}", style) for line in sentences(preset, "held-out")])
        for style in ("blob style", "noto style", "fluent style")
    )
    reached = space.reached(gates, blob, (1 + settings.eta) * (noto - blob))
    assert reached.mean() > 0.8  # 0.88
    assert (reached > 0.5).float().mean() > 0.9  # all but one
    moved = space.error(gates, fluent, torch.zeros_like(fluent)).sum(dim=1)
    assert moved.max() < 0.02 * space.energy(noto - blob).sum(dim=1).mean()

    things = world.held_out[::4]
    contexts = model.encode([f"a picture of a {thing} on a blue background, blob style" for thing in things])
    images = sampler.draw(model, contexts, range(len(things)), gates, 10, 4.0, "dpm")
    seen = [world.concepts[c] == thing for c, thing in zip(world.see(images, "concept"), things, strict=True)]
    assert sum(seen) >= 0.75 * len(things)  # at the eta of the trained preset, 1, less than a half
    assert (world.see(images, "style") == world.styles.index("blob")).sum() <= 0.2 * len(things)
