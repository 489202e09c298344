"""What cpe.py promises, against the formulas written out; a tiny model, float64 where numbers matter.

`literal_*` functions below are the specification: H is formed, every W_l x and R_l(E) is computed, nothing is fused.
"""

import math
import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save
from tiny import ROOT, normal
from torch import Tensor

import cpe
import variants
from cpe import ContextGate, Data, Objective, Prompts, Recipe, ResAG, Trainer

OFFICIAL = ROOT.parent / "shared" / "official_gates"
OFFICIAL_FILES = sorted(OFFICIAL.glob("*.safetensors"))

T, d = 7, 12  # tokens, width of the context
SD14 = {"down_blocks.0": [4, 4], "down_blocks.1": [6, 6], "down_blocks.2": [10, 10]}  # widths; 4 stands for 320, ...
SD14 |= {"up_blocks.1": [10, 10, 10], "up_blocks.2": [6, 6, 6], "up_blocks.3": [4, 4, 4], "mid_block": [10]}
LAYERS = {  # the sixteen of SD 1.4: thirty-two projections
    f"{block}.attentions.{i}.transformer_blocks.0.attn2": width
    for block, widths in SD14.items()
    for i, width in enumerate(widths)
}
WIDTHS = {f"{path}.{p}": width for path, width in LAYERS.items() for p in ("to_k", "to_v")}
RECIPE = Recipe(
    "a person", eta=0.3, lam=10.0, r=3, k=2, stages=3, first_steps=5, later_steps=3, attack_steps=4, deltas=3,
    anchors=4, first_lr=1e-2, later_lr=5e-3, attack_lr=1e-1, warmup=1,
)  # fmt: skip


def cross_attention(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights of SD 1.4's cross-attention layers, each much narrower."""
    tensors = {}
    for i, (path, width) in enumerate(LAYERS.items()):
        tensors[f"{path}.to_q.weight"] = normal(width, width, seed=10 * i, dtype=dtype)
        tensors[f"{path}.to_k.weight"] = normal(width, d, seed=10 * i + 1, dtype=dtype)
        tensors[f"{path}.to_v.weight"] = normal(width, d, seed=10 * i + 2, dtype=dtype)
        tensors[f"{path}.to_out.0.weight"] = normal(width, width, seed=10 * i + 3, dtype=dtype)
        tensors[f"{path}.to_out.0.bias"] = normal(width, seed=10 * i + 4, dtype=dtype)
    return tensors


def data(dtype: torch.dtype = torch.float64) -> Data:
    """Random contexts: 5 pairs of prompts and 9 anchors."""
    targets, surrogates = normal(5, T, d, seed=1, dtype=dtype), normal(5, T, d, seed=2, dtype=dtype)
    return Data(targets, surrogates, normal(9, T, d, seed=3, dtype=dtype), normal(1, T, d, seed=4, dtype=dtype))


def randomised(gates: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """The gates with random parameters, of a size at which no softmax or sigmoid is flat; float64."""
    gates = gates.double()
    with torch.no_grad():
        for i, p in enumerate(gates.parameters()):
            p.copy_(0.4 * normal(*p.shape, seed=seed + i))
    return gates


def gate(seed: int, r: int = 3, k: int = 2, alpha: float = 1.0) -> ResAG:
    """Random gates of one concept for the tiny model."""
    gates = randomised(ResAG(WIDTHS, d, r, k, alpha=alpha), seed)
    gates.w_ks.copy_(normal(1, d, r, seed=seed + 50))
    return gates


def trainer(kind: str = "resag", k: int = 2, **changes) -> Trainer:
    """A trainer in float64 whose gates are random."""
    recipe = replace(RECIPE, k=k, noise=0.0, **changes)
    trainer = Trainer(Objective(cross_attention(), tokens=T), data(), recipe, kind=kind)
    randomised(trainer.gates)
    return trainer


# --- The specification -------------------------------------------------------------------------------------------


def literal_gate(gates: ResAG, E: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """H [B, T, d] and g [B, T, 1] of concept n: H = softmax(Q Q^T) E, g = sigmoid(H v)."""
    Q = E @ gates.w_qs[n]
    H = torch.softmax(Q @ Q.transpose(1, 2), dim=-1) @ E
    return H, torch.sigmoid(H @ gates.scaler[n])


def literal_corrections(gates: ResAG, E: Tensor, n: int = 0) -> dict[str, Tensor]:
    """R_l(E) = s (g * H) D_l U_l [B, T, d_l] of concept n."""
    H, g = literal_gate(gates, E, n)
    s, start, R = gates.alpha[n] / gates.k, 0, {}
    for l, (name, width) in enumerate(zip(gates.names, gates.widths, strict=True)):
        D, U = gates.lora_down[n][:, l * gates.k : (l + 1) * gates.k], gates.lora_up[n][:, start : start + width]
        R[name] = s * (g * H) @ D @ U
        start += width
    return R


def literal_context_corrections(gates: ContextGate, E: Tensor, W: dict[str, Tensor]) -> dict[str, Tensor]:
    """W_l (E' - E), with E' - E = s (g * H) D U_c."""
    (change,) = literal_corrections(gates.inner, E).values()
    return {name: change @ W_l.T for name, W_l in W.items()}


def literal_loss(objective: Objective, gates, x: Tensor, E: Tensor) -> Tensor:
    """1/L sum_l a_l mean([W_l x - R_l(E)]^2)."""
    if isinstance(gates, ContextGate):
        R = literal_context_corrections(gates, E, objective.W)
    else:
        R = literal_corrections(gates, E)
    terms = [objective.a[name] * (x @ W.T - R[name]).square().mean() for name, W in objective.W.items()]
    return sum(terms) / len(terms)


def assert_same(loss: Tensor, literal: Tensor, parameters: list[Tensor]) -> None:
    """Equal values and gradients, to 1e-9 of their size."""
    torch.testing.assert_close(loss, literal, rtol=1e-9, atol=0)
    ours = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(literal, parameters, allow_unused=True)
    assert any(g is not None for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            assert (a - b).norm() <= 1e-9 * b.norm()
            assert b.norm() > 0


# --- Losses ------------------------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["resag", "context"])
RANKS = pytest.mark.parametrize("k", [1, 4])


@KINDS
@RANKS
@pytest.mark.parametrize("templates", [1, 4])
def test_erase_adv_and_anchor_losses_are_their_definitions(templates, kind, k):
    t = trainer(kind, k)
    t.recipe = replace(t.recipe, templates=templates)
    t.deltas = normal(3, T, d, seed=8)
    t.begin()
    state = t.generator.get_state()
    losses = t.erase_losses()

    # The same draws: templates; two anchors per mixture and its weight.
    t.generator.set_state(state)
    i = torch.randint(5, (templates,), generator=t.generator)
    first, second = torch.randint(9, (2, 4), generator=t.generator)
    beta = torch.rand(4, generator=t.generator, dtype=torch.float64)[:, None, None]
    E, sur, A = t.data.targets[i], t.data.surrogates[i], t.data.anchors.double()
    anchors = torch.cat([beta * A[first] + (1 - beta) * A[second], t.data.empty])
    x = 1.3 * (sur - E)

    loss, parameters = (lambda x, E: literal_loss(t.objective, t.gates, x, E)), list(t.gates.parameters())
    assert losses.keys() == {"erase", "adv", "anchor"}
    assert_same(losses["erase"], loss(x, E), parameters)
    assert_same(losses["adv"], loss(x[:1] - t.deltas, E[:1] + t.deltas), parameters)
    assert_same(losses["anchor"], loss(torch.zeros_like(anchors), anchors), parameters)


@KINDS
@RANKS
def test_attack_loss_is_its_definition(kind, k):
    t = trainer(kind, k)
    t.phase = 1
    t.begin()
    t.deltas = normal(3, T, d, seed=8).requires_grad_()
    state = t.generator.get_state()
    loss = t.attack_losses()["attack"]
    t.generator.set_state(state)
    E = t.data.targets[torch.randint(5, (1,), generator=t.generator)]
    # W_l delta + R_l(E + delta), here squared with the other sign
    assert_same(loss, literal_loss(t.objective, t.gates, -t.deltas, E + t.deltas), [t.deltas])


@RANKS
def test_a_context_gate_is_the_resag_that_it_expands_to(k):
    objective, E = Objective(cross_attention(), tokens=T), normal(4, T, d, seed=9)
    context = randomised(ContextGate(d, r=3, k=k, concepts=2, alpha=3.0))
    expanded = context.expand(objective.W).double()
    kv = {name: E @ W.T for name, W in objective.W.items()}
    erased = expanded(E, kv)
    for name, W in objective.W.items():
        torch.testing.assert_close(erased[name], context(E) @ W.T, rtol=1e-6, atol=1e-6)  # expand stores float32
    single = randomised(ContextGate(d, r=3, k=k))
    expanded = single.expand(objective.W).double()
    for gates in (single, expanded):
        P, G = objective.products(gates)
        core = getattr(gates, "inner", gates)
        x = normal(4, T, d, seed=10)
        loss = cpe.residual(x, objective.energy(x), core.read(E @ core.columns())[1], P, G).mean()
        torch.testing.assert_close(loss, literal_loss(objective, gates, x, E), rtol=1e-9, atol=0)
        asked = sum(objective.a[name] * (x @ W.T).square().mean() for name, W in objective.W.items()) / len(objective.W)
        assert cpe.reached(objective, gates, E, x) == pytest.approx(1 - (loss / asked).item(), rel=1e-9)


def test_where_nothing_is_asked_nothing_is_reached():
    objective, E = Objective(cross_attention(), tokens=T), normal(4, T, d, seed=9)
    for gates in (gate(1), randomised(ContextGate(d, r=3, k=2))):
        assert cpe.reached(objective, gates, E, torch.zeros(4, T, d, dtype=torch.float64)) == 0.0


def test_even_templates_count_alike_however_long_their_shifts():
    t = trainer(even=True, templates=50)
    t.shifts *= torch.arange(1, 6, dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        t.gates.lora_up.zero_()  # gates that do nothing miss all of every shift: a template's energy
    energies = t.objective.energy(t.shifts).mean(dim=-1)
    assert energies.max() > 10 * energies.min()
    t.begin()
    torch.testing.assert_close(t.erase_losses()["erase"], energies.mean())

    t.recipe = replace(t.recipe, even=False)
    t.begin()
    state = t.generator.get_state()
    losses = t.erase_losses()
    t.generator.set_state(state)
    i = torch.randint(5, (50,), generator=t.generator)
    torch.testing.assert_close(losses["erase"], energies[i].mean())


def test_without_deltas_there_is_no_adversarial_loss():
    t = trainer()
    t.begin()
    assert t.erase_losses().keys() == {"erase", "anchor"}


def test_total_loss_weighs_the_anchors_with_lambda():
    t = trainer()
    t.deltas = normal(3, T, d, seed=8)
    t.begin()
    state, before = t.generator.get_state(), {n: p.clone() for n, p in t.gates.named_parameters()}
    losses = t.update().losses
    gradient = {n: p.grad.clone() for n, p in t.gates.named_parameters()}
    t.generator.set_state(state)
    t.gates.load_state_dict(t.gates.state_dict() | before)
    again = t.erase_losses()
    assert losses == {name: value.item() for name, value in again.items()}
    total = again["erase"] + again["adv"] + 10.0 * again["anchor"]
    for g, expected in zip(gradient.values(), torch.autograd.grad(total, list(t.gates.parameters())), strict=True):
        torch.testing.assert_close(g, expected)


# --- Anchors' noise ----------------------------------------------------------------------------------------------


@pytest.fixture(params=[(), ("cpu",)], ids=["sent to the device", "drawn by the device"])
def chance(request, monkeypatch):
    """Both ways to draw the anchors' noise; that of graphics cards runs on the CPU as well."""
    monkeypatch.setattr(cpe, "DRAW", request.param)


@pytest.mark.usefixtures("chance")
@pytest.mark.parametrize("c", [5, 20], ids=["fewer columns than d", "more columns than d"])
def test_noisy_features_have_the_mean_and_covariance_of_noise_in_d_dimensions(c):
    t, columns, B = trainer(), normal(d, c, seed=1), 4000
    context = normal(1, 3, d, seed=2)
    for s in (0.5, 2.0):
        features = t.noisy_features(context.expand(B, 3, d), torch.full((B,), s), columns)
        noise = (features - context @ columns) / s
        # mean 0, covariance C^T C, tokens independent; five standard errors
        size = columns.norm(dim=0)
        assert (noise.mean(dim=0).abs() / size).max() < 5 / B**0.5
        for a in range(3):
            for b in range(3):
                expected = columns.T @ columns if a == b else torch.zeros(c, c)
                error = noise[:, a].T @ noise[:, b] / B - expected
                assert (error.abs() / size[:, None] / size).max() < 5 * (2 / B) ** 0.5


@pytest.mark.usefixtures("chance")
def test_noisy_features_have_the_mean_gradient_of_noise_in_d_dimensions():
    t, columns, B = trainer(), normal(d, 5, seed=1).requires_grad_(), 20000
    features = t.noisy_features(torch.zeros(B, 1, d, dtype=torch.float64), torch.ones(B), columns)
    (gradient,) = torch.autograd.grad(features.square().sum() / B, columns)
    # E |n C|^2 = |C|^2
    assert (gradient - 2 * columns).norm() < 0.03 * (2 * columns).norm()


def test_the_empty_prompt_gets_no_noise_and_every_other_anchor_its_share():
    t = Trainer(Objective(cross_attention(), tokens=T), data(), replace(RECIPE, noise=0.1, anchors=500))
    state = t.generator.get_state()
    E, sigma = t.draw_anchors()
    t.generator.set_state(state)
    first, second = torch.randint(9, (2, 500), generator=t.generator)
    beta = torch.rand(500, generator=t.generator, dtype=torch.float64)
    assert E.shape == (501, T, d)
    assert torch.equal(E[-1:], t.data.empty)
    assert sigma[-1] == 0
    norms = t.data.anchors.double().flatten(1).norm(dim=1)
    variance = (0.1 * beta * norms[first]) ** 2 + (0.1 * (1 - beta) * norms[second]) ** 2
    torch.testing.assert_close(sigma[:-1].double(), variance.sqrt(), rtol=1e-5, atol=0)
    # Beta(1, 1), pairs of any two
    assert abs(beta.mean() - 0.5) < 0.05
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) > 70


def test_anchors_in_half_precision_are_mixed_to_within_rounding():
    contexts = data(torch.float32)
    contexts.anchors = contexts.anchors.half()
    t = Trainer(Objective(cross_attention(torch.float32), tokens=T), contexts, replace(RECIPE, anchors=500))
    state = t.generator.get_state()
    mixed = t.draw_anchors()[0]
    t.generator.set_state(state)
    first, second = (contexts.anchors[i].double() for i in torch.randint(9, (2, 500), generator=t.generator))
    beta = torch.rand(500, generator=t.generator)[:, None, None].double()
    exact = beta * first + (1 - beta) * second
    assert mixed.dtype == torch.float32
    # Half an ulp of a number x is up to 2^-11 |x|: one where beta is rounded, times |E_1 - E_2|, one for the sum.
    wrong = (mixed[:-1].double() - exact).abs() / torch.maximum(first.abs(), second.abs())
    assert wrong.max() <= 2.01 * 2**-11


# --- Gates -------------------------------------------------------------------------------------------------------

MIXED = [(1, 3, 2, 1.0), (11, 5, 1, 2.0), (21, 2, 4, 0.5)]  # seed, r, k, alpha


def test_only_the_widest_open_gate_acts_at_each_token():
    gates = [gate(*each) for each in MIXED]
    E = normal(6, T, d, seed=30)
    W = {name: normal(width, d, seed=i) for i, (name, width) in enumerate(WIDTHS.items())}
    kv = {name: E @ W_l.T for name, W_l in W.items()} | {"elsewhere.to_k": E}
    g = [literal_gate(each, E, 0)[1] for each in gates]
    R = [literal_corrections(each, E) for each in gates]
    merged = cpe.merge(gates).double()
    erased, corrections = merged(E, kv), merged.corrections(E)
    acted = set()
    for b in range(6):
        for t in range(T):
            n = max(range(3), key=lambda n: g[n][b, t].item())
            acted.add(n)
            for name in WIDTHS:
                expected = R[n][name][b, t]
                torch.testing.assert_close(corrections[name][b, t], expected, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(erased[name][b, t], kv[name][b, t] + expected, rtol=1e-5, atol=1e-6)
    assert acted == {0, 1, 2}
    assert torch.equal(erased["elsewhere.to_k"], E)
    torch.testing.assert_close(merged.gate(E), torch.stack(g).squeeze(-1), rtol=1e-5, atol=1e-6)


def test_merging_pads_without_changing_values():
    E = normal(2, T, d, seed=30)
    gates = [gate(*each) for each in MIXED]
    merged = cpe.merge(gates).double()
    assert (merged.concepts, merged.r, merged.k) == (3, 5, 4)
    g, z = merged.read(E @ merged.columns())
    ups = merged.ups()
    for n, each in enumerate(gates):
        H, literal_g = literal_gate(each, E, 0)
        torch.testing.assert_close(g[n], literal_g.squeeze(-1), rtol=1e-5, atol=1e-6)
        for l, (name, expected) in enumerate(literal_corrections(each, E).items()):
            assert merged.names[l] == name
            torch.testing.assert_close(z[n][..., 4 * l : 4 * l + 4] @ ups[l][n], expected, rtol=1e-5, atol=1e-6)
        assert H.shape == E.shape
    # merging is associative
    assert_identical(cpe.merge([cpe.merge(gates[:2]), gates[2]]).state_dict(), cpe.merge(gates).state_dict())


def test_gates_with_a_dead_zone_do_nothing_until_they_are_open_so_far():
    E, gates = normal(2, T, d, seed=30), [gate(*each) for each in MIXED]
    plain, merged = cpe.merge(gates).double(), cpe.merge(gates, zone=0.5).double()
    g, z = plain.read(E @ plain.columns())
    dead, codes = merged.read(E @ merged.columns())
    assert 0 < (g < 0.5).sum() < g.numel()
    torch.testing.assert_close(dead, torch.where(g > 0.5, 2 * g - 1, 0))
    torch.testing.assert_close(codes, z / g[..., None] * dead[..., None])
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"a dead zone lies in \[0, 1\)"):
            cpe.merge(gates, wrong)


def test_a_dead_zone_outlives_a_change_of_form():
    objective = Objective(cross_attention(), tokens=T)
    gates = cpe.merge([objective.new_gates("resag", 3, 2, torch.Generator()).double()], zone=0.25)
    context_gate = objective.context_gate(gates.double())
    assert context_gate.inner.zone == context_gate.expand(objective.W).zone == 0.25


def test_gates_of_different_models_do_not_merge():
    for other in (ResAG(WIDTHS, d + 1), ResAG(WIDTHS | {next(iter(WIDTHS)): 7}, d), ResAG({"context": d}, d)):
        with pytest.raises(ValueError, match="different models"):
            cpe.merge([gate(0), other.initialise(torch.Generator())])


def test_a_projection_that_the_unet_lacks_is_an_error():
    with pytest.raises(KeyError):
        gate(0)(normal(1, T, d), {})


@KINDS
def test_untrained_gates_are_half_open_and_change_nothing(kind):
    objective, E = Objective(cross_attention(), tokens=T), normal(2, T, d)
    gates = objective.new_gates(kind, 3, 2, torch.Generator().manual_seed(0)).double()
    core = getattr(gates, "inner", gates)
    assert (core.gate(E) == 0.5).all()
    if kind == "context":
        assert torch.equal(gates(E), E)
    else:
        assert all((R == 0).all() for R in gates.corrections(E).values())
    # Kaiming-uniform with a = sqrt 5, w_qs and w_ks divided by d^2
    assert 0.9 < core.w_qs.abs().max() * d**2 * math.sqrt(d * 3) <= 1.0001
    assert 0.9 < core.lora_down.abs().max() * math.sqrt(d * 2) <= 1.0001
    assert core.w_ks.abs().max() > 0


# --- Gate files --------------------------------------------------------------------------------------------------


def sd_widths() -> dict[str, int]:
    """The 32 projections of Stable Diffusion 1.4."""
    paths = {f"down_blocks.{i}.attentions.{j}": 320 * 2**i for i in range(3) for j in range(2)}
    paths |= {"mid_block.attentions.0": 1280}
    paths |= {f"up_blocks.{i}.attentions.{j}": 320 * 2 ** (3 - i) for i in range(1, 4) for j in range(3)}
    return {f"{path}.transformer_blocks.0.attn2.to_{p}": width for path, width in paths.items() for p in "kv"}


def gate_file(r: int = 16, k: int = 1) -> dict[str, Tensor]:
    """The tensors of an untrained gate file of SD 1.4's size."""
    return cpe.to_tensors(ResAG(sd_widths(), 768, r, k).initialise(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("r", "k"), [(16, 1), (64, 4)])
def test_a_gate_file_has_the_public_layout(r, k):
    tensors = gate_file(r, k)
    stem = "attention_gate.encoder_layer.slf_attn."
    expected = {
        f"{stem}attention_module1.w_qs.weight": [1, 768, r],
        f"{stem}attention_module1.w_ks.weight": [1, 768, r],
        f"{stem}gate.scaler.weight": [1, 768, 1],
    }
    for name, width in sd_widths().items():
        key = "lora_unet_" + name.replace(".", "_")
        expected |= {f"{key}.alpha": [], f"{key}.lora_down.weight": [1, 768, k], f"{key}.lora_up.weight": [1, k, width]}
    assert {key: list(t.shape) for key, t in tensors.items()} == expected
    assert len(expected) == 3 + 3 * 32
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    if k == 1:
        count = sum(t.numel() for t in tensors.values())
        assert (count, count - 768 * 16) == (74_912, 62_624)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert key in tensors


def test_gates_survive_their_file_bit_for_bit():
    gates = gate(3, r=5, k=4, alpha=2.0).float()
    tensors = cpe.to_tensors(gates)
    again = cpe.from_tensors(load(save(tensors)))
    assert (again.r, again.k, again.alpha.item(), again.scale.item()) == (5, 4, 2.0, 0.5)
    for key, t in cpe.to_tensors(again).items():
        assert torch.equal(t, tensors[key]), key
    E = normal(2, T, d, dtype=torch.float32)
    for name, R in gates.corrections(E).items():  # to rounding: the projections are in another order, in one product
        torch.testing.assert_close(again.corrections(E)[name], R)


def test_a_file_does_not_alias_the_gates():
    gates = gate(3).float()
    tensors = cpe.to_tensors(gates)
    before = {key: t.clone() for key, t in tensors.items()}
    with torch.no_grad():
        for p in (*gates.parameters(), *gates.buffers()):
            p.zero_()
    assert all(torch.equal(tensors[key], before[key]) for key in before)


W_QS = cpe.KEYS["w_qs"]
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
WRONG = {
    "no attention": (lambda f: f.pop(W_QS), "w_qs"),
    "no unused keys": (lambda f: f.pop(cpe.KEYS["w_ks"]), "w_ks"),
    "no gate": (lambda f: f.pop(cpe.KEYS["scaler"]), "scaler"),
    "no alpha": (lambda f: f.pop(f"{STEM}.alpha"), f"{STEM}.alpha"),
    "no down": (lambda f: f.pop(f"{STEM}.lora_down.weight"), f"{STEM}.lora_down.weight"),
    "no up": (lambda f: f.pop(f"{STEM}.lora_up.weight"), f"{STEM}.lora_up.weight"),
    "other model": (lambda f: f.update({"unet.conv_in.weight": torch.ones(1)}), "unet.conv_in.weight"),
    "extra part": (lambda f: f.update({f"{STEM}.lora_mid.weight": torch.ones(1)}), f"{STEM}.lora_mid.weight"),
    "flat attention": (lambda f: f.update({W_QS: f[W_QS][0]}), "w_qs"),
    "two concepts": (lambda f: f.update({W_QS: f[W_QS].repeat(2, 1, 1)}), "w_qs"),
    "empty attention": (lambda f: f.update({W_QS: f[W_QS][..., :0]}), "w_qs"),
    "scaler": (lambda f: f.update({cpe.KEYS["scaler"]: torch.ones(1, d, 2)}), "gate.scaler.weight"),
    "rank": (lambda f: f.update({f"{STEM}.lora_down.weight": torch.ones(1, d, 5)}), f"{STEM}.lora_down.weight"),
    "rank of U": (lambda f: f.update({f"{STEM}.lora_up.weight": torch.ones(1, 5, 10)}), f"{STEM}.lora_up.weight"),
    "flat U": (lambda f: f.update({f"{STEM}.lora_up.weight": torch.ones(10)}), f"{STEM}.lora_up.weight"),
    "scalar U": (lambda f: f.update({f"{STEM}.lora_up.weight": torch.tensor(1.0)}), f"{STEM}.lora_up.weight"),
    "width": (lambda f: f.update({cpe.KEYS["w_ks"]: torch.ones(1, d + 1, 3)}), "w_ks"),
    "not a number": (lambda f: f[f"{STEM}.lora_up.weight"].fill_(math.nan), f"{STEM}.lora_up.weight"),
    "infinite": (lambda f: f[W_QS].fill_(math.inf), "w_qs"),
    "infinite alpha": (lambda f: f.update({f"{STEM}.alpha": torch.tensor(math.inf)}), f"{STEM}.alpha"),
    "two alphas": (lambda f: f.update({f"{STEM}.alpha": torch.ones(2)}), f"{STEM}.alpha"),
    "other alpha": (lambda f: f.update({f"{STEM}.alpha": torch.tensor(9.0)}), f"{STEM}.alpha"),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_wrong_file_is_refused_by_the_name_of_a_tensor(which):
    spoil, named = WRONG[which]
    tensors = cpe.to_tensors(gate(3))
    spoil(tensors)
    with pytest.raises(ValueError) as error:  # noqa: PT011 the name is what is matched
        cpe.from_tensors(tensors)
    assert named in str(error.value)


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(math.nan), torch.tensor(math.inf)])
def test_the_first_alpha_is_checked_like_every_other(value):
    tensors = cpe.to_tensors(gate(3))
    key = min(key for key in tensors if key.endswith(".alpha"))
    with pytest.raises(ValueError, match="alpha"):
        cpe.from_tensors(tensors | {key: value})


def test_a_file_without_ranks_is_refused():
    tensors = cpe.to_tensors(gate(3))
    empty = tensors | {n: t[..., :0] for n, t in tensors.items() if n.endswith(".lora_down.weight")}
    empty |= {n: t[:, :0] for n, t in tensors.items() if n.endswith(".lora_up.weight")}
    with pytest.raises(ValueError, match="lora_down"):
        cpe.from_tensors(empty)


def test_nothing_is_not_a_gate_file():
    with pytest.raises(ValueError, match="w_qs"):
        cpe.from_tensors({})
    with pytest.raises(ValueError, match="projection"):
        cpe.from_tensors({key: torch.ones(1, d, 1) for key in cpe.KEYS.values()})


def test_module_path_inverts_the_key():
    for name in [*sd_widths(), *WIDTHS, "up_blocks.12.attentions.10.transformer_blocks.3.attn2.to_v"]:
        assert cpe.module_path("lora_unet_" + name.replace(".", "_")) == name


@pytest.mark.parametrize(
    "key",
    [
        "",
        "lora_unet_",
        "lora_te_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q",
        "lora_unet_mid_block_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k\n",
        "xlora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    ],
)
def test_module_path_refuses_other_keys(key):
    with pytest.raises(ValueError, match="does not name"):
        cpe.module_path(key)


@pytest.mark.skipif(not OFFICIAL_FILES, reason="needs the authors' gate files")
def test_the_authors_gates_load_merge_and_act():
    assert len(OFFICIAL_FILES) == 6
    loaded = []
    for path in OFFICIAL_FILES:
        tensors = load_file(path)
        gates = cpe.from_tensors(tensors)
        again = cpe.to_tensors(gates)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)
        assert dict(zip(gates.names, gates.widths, strict=True)) == sd_widths()
        loaded.append(gates)
    E = normal(2, 77, 768, dtype=torch.float32)
    with torch.no_grad():
        merged, alone = cpe.merge(loaded), [gates.corrections(E) for gates in loaded]
        corrections, winner = merged.corrections(E), merged.gate(E).argmax(dim=0)
    assert {gates.r for gates in loaded} == {16, 64}
    for name, width in sd_widths().items():
        assert corrections[name].shape == (2, 77, width)
        assert corrections[name].isfinite().all()
        expected = torch.stack([each[name] for each in alone])
        expected = expected.gather(0, winner[None, :, :, None].expand(1, 2, 77, width))[0]
        torch.testing.assert_close(corrections[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# --- Layers' weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (40, 40), (200, 50)])
def test_spectral_norm(shape):
    for seed in range(10):
        matrix = normal(*shape, seed=seed)
        assert cpe.spectral_norm(matrix) == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-6)
    assert cpe.spectral_norm(torch.zeros(shape)) == 0


def test_spectral_norm_of_a_degenerate_pair_and_of_single_precision():
    assert cpe.spectral_norm(torch.diag(torch.tensor([3.0, -3.0, 1.0]))) == pytest.approx(3, rel=1e-6)
    matrix = normal(320, 320, dtype=torch.float32)
    assert cpe.spectral_norm(matrix) == pytest.approx(torch.linalg.matrix_norm(matrix.double(), 2).item(), rel=1e-6)


def test_gates_of_other_projections_have_no_loss_here():
    objective = Objective(cross_attention(), tokens=T)
    for names in (list(WIDTHS)[1:], list(WIDTHS)[::-1]):
        with pytest.raises(ValueError, match="another order"):
            objective.products(ResAG({name: WIDTHS[name] for name in names}, d, k=2))


def test_layers_weigh_what_an_error_there_can_move():
    tensors = cross_attention()
    objective = Objective(tensors)
    norm = lambda M: torch.linalg.matrix_norm(M, 2).item()  # noqa: E731
    for path in LAYERS:
        q, _, v, o = (tensors[f"{path}.{p}.weight"] for p in ("to_q", "to_k", "to_v", "to_out.0"))
        assert objective.a[f"{path}.to_k"] == pytest.approx(norm(o @ v) * norm(q) / 77, rel=1e-4)
        assert objective.a[f"{path}.to_v"] == pytest.approx(norm(o), rel=1e-4)
    assert objective.widths == WIDTHS
    literal = sum(objective.a[n] / len(W) / 32 * W.T @ W for n, W in objective.W.items())
    torch.testing.assert_close(objective.M, literal)


# --- Anchors -----------------------------------------------------------------------------------------------------

SPELLINGS = ["Brad Pitt", "brad pitt", "BRAD PITT", "Brad-Pitt", "  brad   PITT. "]
PEOPLE = ["angelina jolie", "Brad Pitt", "Tom Cruise", "brad pitt", "Penélope Cruz", "Bradley Cooper", "Pitt"]


@pytest.mark.parametrize("target", SPELLINGS)
def test_the_target_is_no_anchor_however_it_is_written(target):
    prompts = Prompts(["a photo of {}"], ["a person", *SPELLINGS], [*SPELLINGS, *PEOPLE])
    words = cpe.anchor_words(prompts, [target])
    assert words.general == ["a person"]
    assert words.domain == ["angelina jolie", "Tom Cruise", "Penélope Cruz", "Bradley Cooper", "Pitt"]
    # aliases too, also when an accent is written as two characters
    words = cpe.anchor_words(prompts, [target, "PITT", "pene\u0301lope cruz"])
    assert words.domain == ["angelina jolie", "Tom Cruise", "Bradley Cooper"]


class Encoder:
    """Gives every prompt a context that can be recognised in half precision."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, prompts: list[str]) -> Tensor:
        self.asked += prompts
        return torch.stack([self.context(p) for p in prompts]) if prompts else torch.zeros(0, T, d)

    @staticmethod
    def context(prompt: str) -> Tensor:
        return normal(T, d, seed=zlib.crc32(prompt.encode()), dtype=torch.float32)

    def prompts_of(self, rows: Tensor) -> list[str]:
        """Which prompts these contexts belong to."""
        known = {tuple(self.context(p).half().flatten().tolist()): p for p in self.asked}
        return [known[tuple(row.flatten().tolist())] for row in rows]


@pytest.mark.parametrize("target", SPELLINGS[:4])
def test_training_data_never_has_the_target_among_its_anchors(target):
    templates = ["a photo of {}", "{}", "{} smiling", "a painting of {}", "a statue of {}"]
    prompts = Prompts(templates, ["a person", "brad pitt", "a dog"], PEOPLE)
    encode, anchors = Encoder(), Encoder()
    data = cpe.prepare(replace(RECIPE, nearest=3), prompts, [target, "tom cruise"], encode, anchors)

    for i, name in enumerate([target, "tom cruise"]):
        for j, template in enumerate(templates):
            for found, word in ((data.targets, name), (data.surrogates, "a person")):
                assert torch.equal(found[5 * i + j], Encoder.context(template.format(word)).half().float())
    assert torch.equal(data.empty[0], Encoder.context(""))
    assert data.anchors.dtype == torch.float16

    bare = {word: Encoder.context(word).flatten() for word in PEOPLE}
    allowed = ["angelina jolie", "Penélope Cruz", "Bradley Cooper", "Pitt"]
    near = sorted(allowed, key=lambda w: -torch.cosine_similarity(bare[w], Encoder.context(target).flatten(), dim=0))
    used = anchors.prompts_of(data.anchors)
    assert used == cpe.anchor_prompts(["a person", "a dog", *near[:3]], templates)
    assert len(used) == 5 * 4
    assert not any("brad pitt" in p.casefold() or "tom cruise" in p.casefold() for p in used)


def test_every_target_asks_for_the_same_anchors():
    asked = []
    for target in ("Brad Pitt", "a dog", "somebody else"):
        anchors = Encoder()
        cpe.prepare(RECIPE, Prompts(["{}", "a {}"], ["a person", "a dog"], PEOPLE), [target], Encoder(), anchors)
        asked.append(anchors.asked)
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.parametrize(("general", "domain"), [(["a dog"], []), ([], ["a dog"]), (["a dog"], ["Brad Pitt"])])
def test_one_list_of_anchors_is_enough(general, domain):
    encode, anchors = Encoder(), Encoder()
    data = cpe.prepare(RECIPE, Prompts(["{}", "a {}"], general, domain), ["brad pitt"], encode, anchors)
    assert sorted(anchors.prompts_of(data.anchors)) == ["a a dog", "a dog"]


# --- Prompts -----------------------------------------------------------------------------------------------------


def test_prompts_are_read_by_heading():
    text = "# note\n[templates]\n a {} \n\n[general]\nman\n# no\n[domain]\nx y\n[templates]\n{}\n"
    assert cpe.parse_prompts(text) == Prompts(["a {}", "{}"], ["man"], ["x y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\[templates\]"),
        ("[general]\nman", r"\[templates\]"),
        ("[templates]\nno place", "one {}"),
        ("[templates]\n{} and {}", "one {}"),
        ("a photo of {}", "under a heading"),
        ("[templates]\n{}\n[Domain]\nx", "unknown heading"),
        ("[templates]\n{}\n[other]\nx", "unknown heading"),
    ],
)
def test_mistakes_in_prompts_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        cpe.parse_prompts(text)


@pytest.mark.parametrize("preset", cpe.PRESETS)
def test_every_preset_has_its_prompts(preset):
    prompts = cpe.parse_prompts((ROOT / "prompts" / f"{preset}.txt").read_text(encoding="utf-8"))
    few = preset.startswith("emoji")
    assert len(prompts.templates) >= (8 if few else 40)
    assert len(prompts.general) >= (20 if few else 100)
    assert len(prompts.domain) >= 100
    for lines in (prompts.templates, prompts.general, prompts.domain):
        assert len({cpe.normalised(line) if "{}" not in line else line for line in lines}) == len(lines)
    for word in prompts.domain[:3]:
        assert all(word in t.format(word) for t in prompts.templates)


def test_every_file_of_prompts_is_a_presets():
    assert {path.stem for path in (ROOT / "prompts").glob("*.txt")} == set(cpe.PRESETS)


# --- Recipes -----------------------------------------------------------------------------------------------------

# surrogate, eta, lambda, r, k, stages, first, later, attack steps, deltas, anchors, warm-up
PAPER = {
    "celebrity": ("a person", 0.3, 1e5, 16, 1, 5, 1800, 450, 450, 16, 32, 5),
    "style": ("real photograph", 0.5, 1e4, 16, 1, 10, 1800, 450, 450, 16, 16, 5),
    "explicit": ("a person in modest clothing", 3.0, 1e4, 64, 4, 20, 2400, 1200, 1200, 32, 16, 10),
}


@pytest.mark.parametrize("preset", PAPER)
def test_presets_are_the_papers(preset):
    p = cpe.PRESETS[preset]
    found = (p.surrogate, p.eta, p.lam, p.r, p.k, p.stages, p.first_steps, p.later_steps, p.attack_steps, p.deltas)
    assert (*found, p.anchors, p.warmup) == PAPER[preset]
    assert (p.first_lr, p.later_lr, p.attack_lr, p.nearest, p.noise) == (3e-4, 3e-5, 1e-2, 50, 1e-3)


@pytest.mark.parametrize("preset", PAPER)
def test_stages_alternate_and_end_with_erasing(preset):
    p, plan = cpe.PRESETS[preset], cpe.phases(cpe.PRESETS[preset])
    assert [phase.kind for phase in plan] == ["erase", *["attack", "erase"] * (p.stages - 1)]
    assert [(phase.steps, phase.lr) for phase in plan[:3]] == [
        (p.first_steps, 3e-4),
        (p.attack_steps, 1e-2),
        (p.later_steps, 3e-5),
    ]
    assert [phase.cycles for phase in plan if phase.kind == "erase"] == [2] + [1] * (p.stages - 1)
    assert len(cpe.phases(replace(p, stages=1))) == 1


def test_learning_rate_warms_up_and_falls_in_cosine_cycles():
    first, attack, later = cpe.phases(cpe.PRESETS["celebrity"])[:3]
    rates = [cpe.learning_rate(first, step, 5) for step in range(1800)]
    assert rates[:6] == pytest.approx([3e-4 * i / 6 for i in range(1, 7)])
    half = 5 + math.ceil(1795 / 2)  # where the second cycle starts
    assert rates[half - 1] < 1e-9 < 2.999e-4 < rates[half]
    assert rates[-1] < 1e-9
    quarter = cpe.learning_rate(cpe.Phase("erase", 805, 1.0, cycles=2), 5 + 200, 5)
    assert quarter == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(rates[5:half]))
    rates = [cpe.learning_rate(later, step, 5) for step in range(450)]
    assert rates[5] == 3e-5
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert {cpe.learning_rate(attack, step, 5) for step in range(5, 450)} == {1e-2}
    assert cpe.learning_rate(attack, 0, 5) == pytest.approx(1e-2 / 6)


def test_scaled_recipes_change_steps_alone():
    scaled = RECIPE.scaled(2.4)
    assert (scaled.first_steps, scaled.later_steps, scaled.attack_steps) == (12, 7, 10)
    assert replace(scaled, first_steps=5, later_steps=3, attack_steps=4) == RECIPE
    assert RECIPE.scaled(1) == RECIPE
    assert RECIPE.scaled(1e-9).first_steps == 1
    for factor in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            RECIPE.scaled(factor)


# --- Training ----------------------------------------------------------------------------------------------------

STEPS = 5 + 4 + 3 + 4 + 3


def fresh(kind: str, seed: int = 0) -> Trainer:
    """A trainer as users have it: float32, anchors in half precision, untrained, with noise."""
    contexts = data(torch.float32)
    contexts.anchors = contexts.anchors.half()
    return Trainer(Objective(cross_attention(torch.float32), tokens=T), contexts, RECIPE, seed, kind)


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same names and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def finished(trainer: Trainer) -> dict[str, Tensor]:
    """The state at the end of training."""
    for _ in trainer.steps():
        pass
    return trainer.state()


@pytest.mark.usefixtures("chance")
@KINDS
def test_a_seed_repeats_a_run_bit_for_bit(kind):
    one, two = fresh(kind), fresh(kind)
    reports = list(one.steps()), list(two.steps())
    assert reports[0] == reports[1]
    assert_identical(one.state(), two.state())
    other = finished(fresh(kind, seed=1))
    assert not any(torch.equal(t, other[name]) for name, t in one.state().items() if t.ndim > 2)

    progress = reports[0]
    assert [p.step for p in progress] == list(range(1, STEPS + 1))
    assert {p.total for p in progress} == {STEPS}
    assert [p.stage for p in progress] == [1] * 9 + [2] * 7 + [3] * 3
    assert [p.kind for p in progress] == ["erase"] * 5 + ["attack"] * 4 + ["erase"] * 3 + ["attack"] * 4 + ["erase"] * 3
    for p in progress:
        erase = {"erase", "anchor"} if p.step <= 5 else {"erase", "anchor", "adv"}
        assert p.losses.keys() == (erase if p.kind == "erase" else {"attack"})
        assert all(math.isfinite(value) for value in p.losses.values())


@pytest.mark.usefixtures("chance")
@KINDS
def test_a_run_may_stop_anywhere_and_go_on_bit_for_bit(kind):
    whole = finished(fresh(kind))
    for stop in range(STEPS + 1):
        stopped = fresh(kind)
        for _, _ in zip(range(stop), stopped.steps()):  # noqa: B905 the shorter one ends it
            pass
        state = stopped.state()
        assert state["gates.inner.w_qs" if kind == "context" else "gates.w_qs"].isfinite().all()
        kept = {name: t.clone() for name, t in state.items()}
        resumed = fresh(kind, seed=99)
        resumed.load_state(load(save(state)))
        assert_identical(resumed.state(), state)
        assert_identical(finished(resumed), whole)
        # going on from the very tensors leaves them alone
        resumed = fresh(kind, seed=99)
        resumed.load_state(state)
        assert_identical(finished(resumed), whole)
        assert_identical(state, kept)


def test_an_attack_changes_deltas_only_and_erasing_gates_only():
    t = fresh("resag")
    before = t.state()
    for p in t.steps():
        after = t.state()
        moved = {name for name in ("gates.lora_up", "deltas") if not torch.equal(before[name], after[name])}
        assert moved == ({"gates.lora_up"} if p.kind == "erase" else {"deltas"})
        before = after


def test_training_erases_and_attacks_find_a_way_back():
    recipe = replace(RECIPE, first_steps=300, attack_steps=60, stages=2, later_steps=5, lam=0.01)
    t = Trainer(Objective(cross_attention(torch.float32), tokens=T), data(torch.float32), recipe)
    progress = list(t.steps())
    erase = [p.losses["erase"] for p in progress if p.stage == 1 and p.kind == "erase"]
    attack = [p.losses["attack"] for p in progress if p.kind == "attack"]
    assert sum(erase[-20:]) < 0.9 * sum(erase[:20])
    assert sum(attack[-10:]) < 0.9 * sum(attack[:10])


def test_a_state_of_another_run_is_refused():
    t = fresh("resag")
    next(steps := t.steps())
    next(steps)
    state = t.state()
    with pytest.raises(ValueError, match="another run"):
        fresh("context").load_state(state)
    for missing in ("deltas", "position", "generator", "gates.w_qs"):
        with pytest.raises(ValueError, match="another run"):
            fresh("resag").load_state({name: tensor for name, tensor in state.items() if name != missing})
    with pytest.raises(ValueError, match="another run"):
        fresh("resag").load_state(state | {"position": torch.tensor([50, 1])})


def test_all_outputs_of_a_layer_norm_agree_in_one_direction():
    norm = torch.nn.LayerNorm(d).double()
    assert cpe.constant_direction(norm) is None  # no bias: they lie around 0
    with torch.no_grad():
        norm.weight.copy_(normal(d, seed=1))
        norm.bias.copy_(normal(d, seed=2))
        E = norm(normal(5, T, d, seed=3))
    torch.testing.assert_close(E @ cpe.constant_direction(norm), torch.ones(5, T, dtype=E.dtype))


def newton(X, sign, weight, ridge, start, steps=60):
    """Logistic regression, all but the last coefficient drawn to those of `start`, by Newton's method in numpy."""
    X, sign, weight, start = (np.asarray(each, dtype=np.float64) for each in (X, sign, weight, start))
    shrink, v = np.diag([2 * ridge] * (X.shape[1] - 1) + [0]), start

    def total(v):
        return (weight * np.logaddexp(0, -sign * (X @ v))).sum() + shrink.diagonal() @ (v - start) ** 2 / 2

    for _ in range(steps):
        p = 1 / (1 + np.exp(sign * (X @ v)))
        gradient = -X.T @ (weight * p * sign) + shrink @ (v - start)
        step = np.linalg.solve((X.T * (weight * p * (1 - p))) @ X + shrink, gradient)
        size = 1.0
        while total(v - size * step) > total(v) and size > 1e-6:
            size /= 2
        v = v - size * step
    return v


def test_tokens_are_separated_as_by_logistic_regression():
    wanted, spared = 0.5 + normal(30, d, seed=1).double(), normal(6, 20, d, seed=2).double()
    shares = torch.rand(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = normal(d, seed=4).double()
    v, b = cpe.separate(wanted, shares, spared, start)

    rows, deviation = torch.cat([wanted, spared.flatten(0, 1)]), spared.flatten(0, 1).std(dim=0)
    X = torch.cat([rows / deviation, torch.ones(len(rows), 1)], dim=1)
    weights = torch.cat([shares, torch.full((120,), 10 / 120)])
    expected = newton(X, [1] * 30 + [-1] * 120, weights, 1e-3, torch.cat([start * deviation, torch.zeros(1)]))
    np.testing.assert_allclose((rows @ v + b).numpy(), X.numpy() @ expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", ["resag", "context", "token-wise"])
@pytest.mark.parametrize("adversaries", [0, 3])
def test_sharpening_solves_the_scaler_with_a_margin_and_keeps_the_rest(kind, adversaries):
    norm = torch.nn.LayerNorm(d).double()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * normal(d, seed=1))
        norm.bias.copy_(normal(d, seed=2))
        E = data()
        contexts = Data(*map(norm, (2 * normal(d, seed=3) + E.targets, E.surrogates, E.anchors.double(), E.empty)))
    contexts.one = cpe.constant_direction(norm)
    made = variants.trainer(Objective(cross_attention(), tokens=T), contexts, replace(RECIPE, margin=0.6), 0, kind)
    randomised(made.gates)
    made.deltas = 0.1 * normal(adversaries, T, d, seed=5).double()
    made.begin()
    g, z = made.core.read(contexts.targets @ made.core.columns())
    before = {name: tensor.clone() for name, tensor in made.core.state_dict().items()}
    made.sharpen()

    def attended(E):
        return made.core.attended(E)[0].detach()

    energy = made.objective.energy(made.shifts)
    shares = energy / energy.sum()
    i = torch.arange(adversaries) % len(contexts.targets)
    moved = made.objective.energy(made.shifts[i] - made.deltas)
    v, b = cpe.separate(
        torch.cat([attended(contexts.targets), attended(contexts.targets[i] + made.deltas)]),
        torch.cat([shares, moved / moved.sum()]),
        torch.cat([attended(contexts.anchors), attended(contexts.empty)]),
        before["scaler"][0, :, 0],
    )
    logits = attended(contexts.targets) @ v + b
    by_logit = sorted(zip(logits.flatten().tolist(), shares.flatten().tolist(), strict=True))
    m = next(l for i, (l, _) in enumerate(by_logit) if sum(share for _, share in by_logit[: i + 1]) >= 0.2)
    assert m > 0.1
    new = torch.sigmoid(4 * (logits - 0.6 * m) / (0.4 * m))
    sharp, codes = made.core.read(contexts.targets @ made.core.columns())
    torch.testing.assert_close(sharp[0], new)
    torch.testing.assert_close(codes / sharp[..., None], z / g[..., None])
    after = made.core.state_dict()
    torch.testing.assert_close(after["lora_up"], before["lora_up"] * (shares * g[0]).sum() / (shares * new).sum())
    assert all(after[name].equal(before[name]) for name in ("w_qs", "lora_down", "scale"))


def test_a_gate_that_cannot_tell_the_target_is_left_as_it_was():
    contexts = data()
    contexts.anchors, contexts.one = contexts.targets.half(), normal(d)
    made = Trainer(Objective(cross_attention(), tokens=T), contexts, replace(RECIPE, margin=0.5))
    randomised(made.gates)
    made.begin()
    before = {name: tensor.clone() for name, tensor in made.gates.state_dict().items()}
    made.sharpen()
    assert all(tensor.equal(before[name]) for name, tensor in made.gates.state_dict().items())


@pytest.mark.parametrize("wrong", [{"margin": 0.5}, {"margin": 1.0}, {"margin": -0.1}])
def test_a_margin_needs_a_direction_and_a_sensible_size(wrong):
    contexts = data()
    contexts.one = None if wrong["margin"] == 0.5 else normal(d)
    with pytest.raises(ValueError, match=r"a margin lies in \[0, 1\), and needs"):
        Trainer(Objective(cross_attention(), tokens=T), contexts, replace(RECIPE, **wrong))


def test_a_margin_is_made_at_the_end_of_training_alone(monkeypatch):
    monkeypatch.setattr(Trainer, "sharpen", lambda self: calls.append(self.done))
    calls: list[int] = []
    made = trainer()
    made.recipe = replace(made.recipe, margin=0.5)
    assert len(list(made.steps())) == made.total
    assert calls == [made.total]
    calls.clear()
    list(trainer().steps())
    assert not calls


@pytest.mark.parametrize("stop", [0, 1, 6, 10])
def test_divergence_leaves_the_gates_as_they_were(stop):
    t = fresh("resag")
    steps = t.steps()
    for _ in range(stop):
        next(steps)
    before = t.state()
    t.shifts = t.shifts * math.nan
    t.data.targets = t.data.targets * math.nan
    stage = 1 if stop < 9 else 2
    with pytest.raises(cpe.Diverged, match=f"stage {stage}"):
        for _ in steps:
            pass
    after = t.state()
    assert_identical(*({n: s[n] for n in s if n.startswith("gates.")} for s in (before, after)))


def test_a_gradient_that_overflows_stops_before_it_reaches_the_gates(monkeypatch):
    t = fresh("resag")
    steps = t.steps()
    next(steps)
    before = t.state()
    losses = t.erase_losses
    # sqrt has the value 0 and an infinite slope at 0: the loss alone looks sound
    monkeypatch.setattr(
        t, "erase_losses", lambda products: losses(products) | {"adv": (t.core.scaler * 0).sum().sqrt()}
    )
    with pytest.raises(cpe.Diverged, match="gradient"):
        next(steps)
    after = t.state()
    assert_identical(*({n: s[n] for n in s if n.startswith("gates.")} for s in (before, after)))


def test_lambda_rises_in_the_first_stage_alone_and_in_the_papers_presets_not_at_all():
    t = fresh("resag")
    assert t.recipe.rise == 0
    assert t.risen() == 1
    t.recipe = replace(t.recipe, rise=0.5)
    half = t.plan[0].steps / 2
    seen = []
    for step in range(t.plan[0].steps):
        t.step = step
        seen.append(t.risen())
    assert seen[0] == pytest.approx(min(1, (1 / half) ** 2))
    assert seen == sorted(seen)
    assert seen[-1] == 1
    t.phase, t.step = 2, 0
    assert t.risen() == 1
    assert {name for name, recipe in cpe.PRESETS.items() if recipe.rise} == {"emoji", "emoji-style"}
