"""What cpe.py promises, beginning with its losses; on a tiny model, in float64 where numbers matter.

The specification is `literal_gate`, `literal_residual` and `literal_error`: loops that share no code with cpe.py.
"""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, load_file, save
from tiny import ROOT, normal
from torch import Tensor

import cpe
import token_space
from cpe import PRESETS, Data, Layers, Recipe, ResAG, Trainer, learning_rate

OFFICIAL_FILES = sorted((ROOT.parent / "shared" / "official_gates").glob("*.safetensors"))

T, d, TEMPLATES = 5, 8, 5  # tokens, width of the context, prompt templates
BLOCKS = {"down_blocks.0.attentions.0": 3, "down_blocks.1.attentions.1": 5, "mid_block.attentions.0": 6}
PATHS = {f"{block}.transformer_blocks.0.attn2": width for block, width in BLOCKS.items()}


def attention(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights of three cross-attention layers: six projections."""
    tensors = {}
    for i, (path, width) in enumerate(PATHS.items()):
        for j, (p, columns) in enumerate({"to_q": width, "to_k": d, "to_v": d, "to_out.0": width}.items()):
            tensors[f"{path}.{p}.weight"] = normal(width, columns, seed=10 * i + j, dtype=dtype)
    return tensors


LAYERS = Layers.of(attention())


def data(dtype: torch.dtype = torch.float64) -> Data:
    """Random contexts: target and surrogate in 5 templates, 9 anchors, the empty prompt."""
    sizes = {"targets": TEMPLATES, "surrogates": TEMPLATES, "anchors": 9, "empty": 1}
    return Data(**{name: normal(n, T, d, seed=seed, dtype=dtype) for seed, (name, n) in enumerate(sizes.items(), 50)})


def random_gates(r: int, k: int, seed: int = 5, alpha: float = 1.0, widths: dict[str, int] | None = None) -> ResAG:
    """Gates of one concept with random parameters, of a size at which no softmax or sigmoid is flat; float64."""
    gates = ResAG(widths or LAYERS.widths, d, r, k, alpha=alpha).double()
    with torch.no_grad():
        for i, p in enumerate(gates.parameters()):
            p.copy_(0.4 * normal(*p.shape, seed=100 * seed + i))
    return gates


# --- 1. The losses -----------------------------------------------------------------------------------------------


def literal_gate(gates: ResAG, E: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """g and H [d] at token t of one prompt E [T, d]: g = sigmoid(H v), H an average of all tokens."""
    q = [E[u] @ gates.w_qs[0] for u in range(T)]
    shares = [torch.exp(q[t] @ q[u]) for u in range(T)]
    H = sum(share * E[u] for u, share in enumerate(shares)) / sum(shares)
    return 1 / (1 + torch.exp(-(H @ gates.scaler[0, :, 0]))), H


def literal_residual(gates: ResAG, g: Tensor, H: Tensor, l: int, alpha: float) -> Tensor:
    """R_l [d_l] at that token: s g (H D_l) U_l, where s = alpha / k."""
    D, U = gates.lora_down[l][0], gates.lora_up[l][0]
    return alpha / len(U) * g * (H @ D @ U)


def literal_error(gates: ResAG, E: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    """1/L sum_l a_l mean [W_l x - R_l(E)]^2, the mean over prompts, tokens and features."""
    total = 0.0
    for b in range(len(E)):
        for t in range(T):
            g, H = literal_gate(gates, E[b], t)
            for l, (name, W) in enumerate(LAYERS.W.items()):
                wrong = W @ x[b, t] - literal_residual(gates, g, H, l, alpha)
                total = total + LAYERS.a[name] * (wrong @ wrong) / (len(E) * T * len(W))
    return total / len(LAYERS.W)


def literal_losses(gates: ResAG, i: Tensor, anchors: Tensor, deltas: Tensor | None, alpha: float) -> dict[str, Tensor]:
    """The paper's losses of templates i, with eta = 0.3."""
    tar, sur = data().targets, data().surrogates
    shifts = torch.stack([1.3 * (sur[j] - tar[j]) for j in i])
    losses = {
        "erase": literal_error(gates, torch.stack([tar[j] for j in i]), shifts, alpha),
        "anchor": literal_error(gates, anchors, 0 * anchors, alpha),
    }
    if deltas is not None:  # they are added to the first of the templates
        attacked = torch.stack([tar[i[0]] + delta for delta in deltas])
        back = torch.stack([shifts[0] - delta for delta in deltas])
        losses["adversarial"] = literal_error(gates, attacked, back, alpha)
        losses["attack"] = literal_error(gates, attacked, -deltas, alpha)
    return losses


def all_losses(losses: cpe.Losses, gates: ResAG, i: Tensor, anchors: Tensor, deltas: Tensor | None):
    """Those of a step of erasing, and the attacker's."""
    attack = {} if deltas is None else {"attack": losses.attack(gates, i, deltas)}
    return losses.erasing(gates, i, anchors, deltas) | attack


def assert_same(ours: Tensor, theirs: Tensor, learners: list[Tensor]) -> None:
    """Equal values, and equal gradients with respect to all learners, to 1e-12 of their size."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    as_zeros = {
        "retain_graph": True,
        "materialize_grads": True,
    }  # erasing does not depend on the deltas, but for one loss
    gradients = [torch.autograd.grad(loss, learners, **as_zeros) for loss in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("attacked", [False, True], ids=["no deltas", "deltas"])
@pytest.mark.parametrize("templates", [[2], [4, 0, 4]], ids=["one template", "three templates"])
@pytest.mark.parametrize(("r", "k", "alpha"), [(3, 1, 1.0), (2, 4, 0.5), (6, 3, 1.5)])
def test_the_fast_losses_are_the_papers_and_the_papers_are_their_definition(r, k, alpha, templates, attacked):
    gates, i, anchors = random_gates(r, k, alpha=alpha), torch.tensor(templates), normal(3, T, d, seed=8)
    deltas = normal(2, T, d, seed=9).requires_grad_() if attacked else None
    learners = [*gates.parameters(), *([deltas] if attacked else [])]
    paper = all_losses(cpe.Losses(LAYERS, data(), eta=0.3), gates, i, anchors, deltas)
    fast = all_losses(token_space.Losses(LAYERS, data(), eta=0.3), gates, i, anchors, deltas)
    literal = literal_losses(gates, i, anchors, deltas, alpha)
    assert paper.keys() == fast.keys() == literal.keys()
    assert ("adversarial" in paper) == attacked
    for name in paper:
        assert_same(paper[name], literal[name], learners)
        assert_same(fast[name], paper[name], learners)


def test_that_is_the_first_test_of_all(request):
    the_losses = test_the_fast_losses_are_the_papers_and_the_papers_are_their_definition
    order = [item.function is the_losses for item in request.session.items]
    assert order == sorted(order, reverse=True)


def test_layers_weigh_what_an_error_there_can_move():
    tensors = attention()
    norm = lambda M: torch.linalg.svdvals(M)[0].item()  # noqa: E731
    for path in PATHS:
        q, k, v, o = (tensors[f"{path}.{p}.weight"] for p in ("to_q", "to_k", "to_v", "to_out.0"))
        assert LAYERS.a[f"{path}.to_k"] == pytest.approx(norm(o @ v) * norm(q) / 77, rel=1e-12)
        assert LAYERS.a[f"{path}.to_v"] == pytest.approx(norm(o), rel=1e-12)
        assert torch.equal(LAYERS.W[f"{path}.to_k"], k)
        assert torch.equal(LAYERS.W[f"{path}.to_v"], v)
    assert LAYERS.widths == {f"{path}.to_{p}": width for path, width in PATHS.items() for p in "kv"}
    with pytest.raises(KeyError):
        Layers.of({name: tensor for name, tensor in tensors.items() if "to_q" not in name})


# --- 2. The gates ------------------------------------------------------------------------------------------------

MIXED = [(1, 3, 2, 1.0), (11, 5, 1, 2.0), (21, 2, 4, 0.5)]  # seed, r, k, alpha


def mixed() -> list[ResAG]:
    """Gates of three concepts that differ in everything."""
    return [random_gates(r, k, seed, alpha) for seed, r, k, alpha in MIXED]


def test_untrained_gates_are_half_open_and_change_nothing():
    gates, E = ResAG(LAYERS.widths, d, 3, 2, generator=torch.Generator().manual_seed(0)), normal(2, T, d).float()
    assert (gates.gate(E)[0] == 0.5).all()
    assert all((R == 0).all() for R in gates.residuals(E).values())
    # Kaiming-uniform with a = sqrt 5; attention is even because w_qs is divided by d^2
    assert 0.8 < gates.w_qs.abs().max() * d**2 * math.sqrt(d * 3) <= 1.0001
    assert all(0.6 < D.abs().max() * math.sqrt(d * 2) <= 1.0001 for D in gates.lora_down)
    assert [n for n, _ in gates.named_parameters()][:2] == ["w_qs", "scaler"]


def test_erased_keys_and_values_are_the_models_plus_residuals():
    gates, E = random_gates(3, 2), normal(2, T, d, seed=1)
    kv = {l: E @ W.T for l, W in LAYERS.W.items()}
    erased = gates(E, kv | {"elsewhere": E})
    for l, (name, W) in enumerate(LAYERS.W.items()):
        for b in range(2):
            for t in range(T):
                expected = W @ E[b, t] + literal_residual(gates, *literal_gate(gates, E[b], t), l, 1.0)
                torch.testing.assert_close(erased[name][b, t], expected, rtol=1e-12, atol=1e-12)
    assert erased["elsewhere"] is E
    with pytest.raises(KeyError):
        gates(E, {})


def test_of_merged_gates_only_the_widest_open_one_acts_at_each_token():
    gates, E = mixed(), normal(6, T, d, seed=30)
    g, R, acted = [each.gate(E)[0][0] for each in gates], cpe.merge(gates).residuals(E), set()
    for b in range(6):
        for t in range(T):
            n = max(range(3), key=lambda n: g[n][b, t].item())
            acted.add(n)
            for l, name in enumerate(LAYERS.W):
                expected = literal_residual(gates[n], *literal_gate(gates[n], E[b], t), l, MIXED[n][3])
                torch.testing.assert_close(R[name][b, t], expected, rtol=1e-12, atol=1e-12)
    assert acted == {0, 1, 2}


def test_merging_pads_without_changing_values_and_keeps_the_dtype():
    gates, E = mixed(), normal(2, T, d, seed=30)
    merged = cpe.merge(gates)
    assert (merged.w_qs.shape, merged.k, merged.scale.tolist()) == ((3, d, 5), 4, [0.5, 2.0, 0.125])
    for n, each in enumerate(gates):
        torch.testing.assert_close(merged.gate(E)[0][n], each.gate(E)[0][0], rtol=1e-12, atol=0)
        assert torch.equal(merged.lora_down[3][n, :, : each.k], each.lora_down[3][0])
        assert not merged.lora_up[3][n, each.k :].any()
    assert_identical(cpe.merge([cpe.merge(gates[:2]), gates[2]]).state_dict(), merged.state_dict())
    for dtype in (torch.float16, torch.float32, torch.float64):
        same = cpe.merge([each.to(dtype) for each in gates]).state_dict()
        assert {tensor.dtype for tensor in same.values()} == {dtype}


def test_gates_of_different_models_do_not_merge():
    wider = LAYERS.widths | {next(iter(LAYERS.W)): 7}
    for other in (ResAG(LAYERS.widths, d + 1), ResAG(wider, d), ResAG({"context": d}, d)):
        with pytest.raises(ValueError, match="different models"):
            cpe.merge([random_gates(3, 2), other])


# --- 3. The gate file --------------------------------------------------------------------------------------------

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
UP, DOWN, ALPHA = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight", f"{STEM}.alpha"


def sd_widths() -> dict[str, int]:
    """The 32 projections of Stable Diffusion 1.4."""
    paths = {f"down_blocks.{i}.attentions.{j}": 320 * 2**i for i in range(3) for j in range(2)}
    paths |= {"mid_block.attentions.0": 1280}
    paths |= {f"up_blocks.{i}.attentions.{j}": 320 * 2 ** (3 - i) for i in range(1, 4) for j in range(3)}
    return {f"{path}.transformer_blocks.0.attn2.to_{p}": width for path, width in paths.items() for p in "kv"}


@pytest.mark.parametrize(("r", "k"), [(16, 1), (64, 4)])
def test_a_gate_file_has_the_public_layout(r, k):
    stem = "attention_gate.encoder_layer.slf_attn."
    expected = {f"{stem}attention_module1.{name}.weight": [1, 768, r] for name in ("w_qs", "w_ks")}
    expected |= {f"{stem}gate.scaler.weight": [1, 768, 1]}
    for name, width in sd_widths().items():
        key = "lora_unet_" + name.replace(".", "_")
        expected |= {f"{key}.alpha": [], f"{key}.lora_down.weight": [1, 768, k], f"{key}.lora_up.weight": [1, k, width]}
    tensors = cpe.to_tensors(ResAG(sd_widths(), 768, r, k))
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (4, 2.0), (3, 0.1), (5, 0.7)])
def test_gates_survive_their_file_bit_for_bit(k, alpha):
    gates = random_gates(5, k, alpha=alpha).float()
    again = cpe.from_tensors(load(save(cpe.to_tensors(gates))))
    assert again.k == k
    assert again.widths == gates.widths
    E = normal(2, T, d).float()
    for name, R in gates.residuals(E).items():
        assert torch.equal(again.residuals(E)[name], R)
    gates = {name: getattr(gates, name) for name in ("w_qs", "scaler", "scale")}
    assert_identical(gates, {name: getattr(again, name) for name in gates})


def test_merged_gates_are_written_one_by_one():
    with pytest.raises(ValueError, match="one concept, not 3: write each before merging"):
        cpe.to_tensors(cpe.merge(mixed()))


WRONG = {  # what is done to a file, and the tensor that the error names
    "no attention": (lambda f: f.pop(cpe.W_QS), cpe.W_QS),
    "no unused keys": (lambda f: f.pop(cpe.W_KS), cpe.W_KS),
    "no gate": (lambda f: f.pop(cpe.SCALER), cpe.SCALER),
    "no alpha": (lambda f: f.pop(ALPHA), ALPHA),
    "no D": (lambda f: f.pop(DOWN), DOWN),
    "no U": (lambda f: f.pop(UP), STEM),
    "other model": (lambda f: f.update({"conv_in.weight": torch.ones(1)}), "conv_in.weight"),
    "extra part": (lambda f: f.update({f"{STEM}.lora_mid.weight": torch.ones(1)}), f"{STEM}.lora_mid.weight"),
    "other layer": (lambda f: f.update({"lora_te_1.lora_up.weight": torch.ones(1, 2, 4)}), "lora_te_1"),
    "flat attention": (lambda f: f.update({cpe.W_QS: f[cpe.W_QS][0]}), cpe.W_QS),
    "two concepts": (lambda f: f.update({cpe.W_QS: f[cpe.W_QS].repeat(2, 1, 1)}), cpe.W_QS),
    "empty attention": (lambda f: f.update({cpe.W_QS: f[cpe.W_QS][..., :0]}), cpe.W_QS),
    "wide gate": (lambda f: f.update({cpe.SCALER: torch.ones(1, d, 2)}), cpe.SCALER),
    "rank of D": (lambda f: f.update({DOWN: torch.ones(1, d, 5)}), DOWN),
    "rank of U": (lambda f: f.update({UP: torch.ones(1, 5, 6)}), UP),
    "no ranks": (lambda f: f.update({key: t[:, :0] for key, t in f.items() if "lora_up" in key}), "lora_up"),
    "flat U": (lambda f: f.update({UP: torch.ones(6)}), UP),
    "scalar U": (lambda f: f.update({UP: torch.tensor(1.0)}), UP),
    "integers": (lambda f: f.update({UP: torch.ones(1, 2, 6, dtype=torch.int64)}), UP),
    "not a number": (lambda f: f[UP].view(-1)[3].fill_(math.nan), UP),
    "infinite": (lambda f: f[cpe.W_QS].view(-1)[3].fill_(math.inf), cpe.W_QS),
    "two alphas": (lambda f: f.update({ALPHA: torch.ones(2)}), ALPHA),
    "other alpha": (lambda f: f.update({ALPHA: torch.tensor(9.0)}), ALPHA),
    "flat alphas": (lambda f: f.update({key: torch.ones(2) for key in f if "alpha" in key}), ".alpha"),
    "no alpha is finite": (lambda f: f.update({key: torch.tensor(math.nan) for key in f if "alpha" in key}), ".alpha"),
    "nothing": (lambda f: f.clear(), cpe.W_QS),
    "no projection": (lambda f: [f.pop(key) for key in [*f] if "lora" in key], ".lora_up.weight"),
    "unfinished run": (lambda f: (f.clear(), f.update(position=torch.zeros(2))), "the state of an unfinished run"),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_wrong_file_is_refused_by_the_name_of_a_tensor(which):
    spoil, named = WRONG[which]
    tensors = {key: tensor.clone() for key, tensor in cpe.to_tensors(random_gates(3, 2)).items()}
    spoil(tensors)
    with pytest.raises(ValueError) as error:  # noqa: PT011 the name is what is matched
        cpe.from_tensors(tensors)
    assert named in str(error.value)


def test_names_of_projections_are_read_back():
    for name in [*sd_widths(), *LAYERS.W, "up_blocks.12.attentions.10.transformer_blocks.3.attn2.to_v"]:
        assert cpe.projection("lora_unet_" + name.replace(".", "_")) == name
    for wrong in ("", STEM.replace("attn2", "attn1"), STEM[:-1] + "q", STEM + "\n", "x" + STEM):
        with pytest.raises(ValueError, match="names no projection"):
            cpe.projection(wrong)


@pytest.mark.skipif(not OFFICIAL_FILES, reason="needs the authors' gate files")
def test_the_authors_gates_load_merge_and_act():
    assert len(OFFICIAL_FILES) == 6
    files = [load_file(path) for path in OFFICIAL_FILES]
    loaded = [cpe.from_tensors(tensors) for tensors in files]
    for tensors, gates in zip(files, loaded, strict=True):
        assert gates.widths == sd_widths()
        tensors[cpe.W_KS].zero_()  # never used, so not remembered
        assert_identical(cpe.to_tensors(gates), tensors)
    assert {gates.w_qs.shape[2] for gates in loaded} == {16, 64}
    E = normal(2, 77, 768).float()
    with torch.no_grad():
        merged, alone = cpe.merge(loaded), [gates.residuals(E) for gates in loaded]
        widest, residuals = merged.gate(E)[0].argmax(dim=0), merged.residuals(E)
    for name, width in sd_widths().items():
        expected = torch.stack([R[name] for R in alone]).gather(0, widest[None].expand(1, 2, 77, width))[0]
        assert expected.abs().max() > 0
        torch.testing.assert_close(residuals[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# --- 4. The recipe -----------------------------------------------------------------------------------------------

# surrogate, eta, lambda, r, k, stages, first, later, attack steps, deltas, anchors, warm-up
PAPER = {
    "celebrity": ("a person", 0.3, 1e5, 16, 1, 5, 1800, 450, 450, 16, 32, 5),
    "style": ("real photograph", 0.5, 1e4, 16, 1, 10, 1800, 450, 450, 16, 16, 5),
    "explicit": ("a person in modest clothing", 3.0, 1e4, 64, 4, 20, 2400, 1200, 1200, 32, 16, 10),
}


@pytest.mark.parametrize("preset", PAPER)
def test_presets_are_the_papers_and_stages_alternate(preset):
    p = PRESETS[preset]
    found = (p.surrogate, p.eta, p.lam, p.r, p.k, p.stages, p.first_steps, p.later_steps, p.attack_steps, p.deltas)
    assert (*found, p.anchors, p.warmup) == PAPER[preset]
    assert (p.first_lr, p.later_lr, p.attack_lr, p.nearest, p.noise) == (3e-4, 3e-5, 1e-2, 50, 1e-3)
    assert (p.attack_warmup, p.delta_start, p.templates, p.rise) == (5, 0, 1, 0)
    steps = trainer(p).steps
    assert steps == [p.first_steps, *[p.attack_steps, p.later_steps] * (p.stages - 1)]
    assert trainer(replace(p, stages=1)).steps == [p.first_steps]
    assert PRESETS.keys() == PAPER.keys()


def test_the_learning_rate_warms_up_and_falls_in_cosine_cycles():
    for cycles in (1, 2):
        rates = [learning_rate(step, 805, cycles, warmup=5) for step in range(805)]
        assert rates[:6] == [0, 0.2, 0.4, 0.6, 0.8, 1]
        for s in range(800):
            part = s * cycles / 800 % 1
            assert rates[5 + s] == pytest.approx((1 + math.cos(math.pi * part)) / 2, abs=1e-12)
        assert rates[-1] < 1e-4
    assert learning_rate(405, 805, 2, 5) == 1  # the restart
    assert learning_rate(0, 1, 1, 0) == 1


# --- 5. Training -------------------------------------------------------------------------------------------------

RECIPE = Recipe(
    eta=0.3, lam=10.0, r=3, k=2, stages=3, first_steps=9, later_steps=4, attack_steps=5, deltas=3, anchors=4,
    first_lr=1e-2, later_lr=5e-3, attack_lr=1e-1, warmup=1, attack_warmup=2,
)  # fmt: skip
PHASES = [9, 5, 4, 5, 4]


def trainer(recipe: Recipe = RECIPE, seed: int = 0, losses: type[cpe.Losses] = token_space.Losses) -> Trainer:
    """A trainer as users have it: float32, anchors in half precision, untrained gates."""
    contexts, generator = data(torch.float32), torch.Generator().manual_seed(seed)
    contexts.anchors = contexts.anchors.half()
    layers = Layers.of(attention(torch.float32))
    gates = ResAG(layers.widths, d, recipe.r, recipe.k, generator=generator)
    return Trainer(gates, losses(layers, contexts, recipe.eta), recipe, generator)


def state(t: Trainer) -> dict[str, Tensor]:
    """Copies of gates and deltas."""
    tensors = t.gates.state_dict() | ({} if t.deltas is None else {"deltas": t.deltas.detach()})
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same names and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_attacks_change_deltas_only_and_erasing_gates_only():
    t, seen, before, rates = trainer(), [], None, []
    for losses in t:
        after = state(t)
        moved = before and {name for name in before if name in after and not torch.equal(before[name], after[name])}
        seen.append((t.phase, losses.keys()))
        rates.append(t.optimizer.param_groups[0]["lr"])
        if t.step > 2:  # the first step has rate 0, in an attack the deltas are fresh
            assert moved == ({"deltas"} if t.phase % 2 else {*after} - {"scale", "deltas"})
        elif t.step == 1 and before:
            assert rates[-1] == 0
            assert moved <= {"deltas"}
        before = after
    erasing = {"erase", "anchor", "total"}
    keys = [erasing, {"total"}, erasing | {"adversarial"}, {"total"}, erasing | {"adversarial"}]
    assert seen == [(phase, keys[phase]) for phase, steps in enumerate(PHASES) for _ in range(steps)]
    # full rate, cycles and warm-up of each phase
    plan = [(1e-2, 2, 1), (1e-1, 1, 2), (5e-3, 1, 1), (1e-1, 1, 2), (5e-3, 1, 1)]
    expected = [
        full * learning_rate(step, steps, cycles, warmup)
        for steps, (full, cycles, warmup) in zip(PHASES, plan, strict=True)
        for step in range(steps)
    ]
    assert rates == pytest.approx(expected)


def test_a_step_of_training_is_adamw_on_the_papers_total():
    """Erase + adversarial + lambda anchor, of templates and anchors that the generator draws."""
    t = trainer(replace(RECIPE, templates=2))
    for _ in t:
        if (t.phase, t.step) == (2, 2):
            break
    chance, before, gates = torch.Generator(), state(t), trainer().gates
    chance.set_state(t.generator.get_state())
    losses = next(iter(t))
    gates.load_state_dict({name: tensor for name, tensor in before.items() if name != "deltas"})
    i = torch.randint(TEMPLATES, (2,), generator=chance)
    drawn = Trainer(gates, t.losses, t.recipe, chance).draw_anchors()
    paper = cpe.Losses(t.losses.layers, t.losses.data, 0.3)
    terms = paper.erasing(gates, i, drawn, t.deltas)
    total = terms["erase"] + terms["adversarial"] + 10 * terms["anchor"]
    assert losses == pytest.approx({name: term.item() for name, term in (terms | {"total": total}).items()}, rel=1e-4)
    for p, gradient in zip(t.gates.parameters(), torch.autograd.grad(total, list(gates.parameters())), strict=True):
        assert (p.grad - gradient).norm() < 1e-4 * gradient.norm()
    assert isinstance(t.optimizer, torch.optim.AdamW)
    assert t.optimizer.param_groups[0]["weight_decay"] == 0.01


def test_the_slow_losses_train_the_same_gates():
    slow, fast = trainer(losses=cpe.Losses), trainer()
    for a, b in zip(slow, fast, strict=True):
        assert a == pytest.approx(b, rel=1e-2)
    for a, b in zip(slow.gates.parameters(), fast.gates.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=1e-2)


@pytest.fixture(scope="module")
def whole() -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What a run that is never stopped yields, and what it ends with."""
    t = trainer()
    return list(t), state(t)


@pytest.mark.parametrize("stop", range(sum(PHASES) + 1))
def test_a_run_may_stop_anywhere_and_go_on_bit_for_bit(stop, whole):
    history, end = whole
    stopped, resumed = trainer(), trainer(seed=99)
    begun = [losses for _, losses in zip(range(stop), stopped)]  # noqa: B905 the shorter one ends it

    resumed.gates.load_state_dict(stopped.gates.state_dict())
    resumed.deltas = None if stopped.deltas is None else stopped.deltas.detach().clone()
    resumed.phase, resumed.step = stopped.phase, stopped.step
    resumed.generator.set_state(stopped.generator.get_state())
    if stop:
        resumed.begin()
        resumed.optimizer.load_state_dict(deepcopy(stopped.optimizer.state_dict()))
    assert begun + list(resumed) == history
    assert_identical(state(resumed), end)
    # and so does the very run that was left
    assert begun + list(stopped) == history
    assert_identical(state(stopped), end)


def test_deltas_begin_as_kaiming_by_d_squared_or_at_a_share_of_the_target():
    def begun(t: Trainer) -> Tensor:
        t.phase = 1
        t.begin()
        assert t.deltas.requires_grad
        assert not any(p.requires_grad for p in t.gates.parameters())
        return t.deltas.detach()

    sd, recipe, E = Layers({"k": torch.zeros(4, 768)}, {"k": 1.0}), PRESETS["celebrity"], torch.ones(2, 77, 768)
    losses = cpe.Losses(sd, Data(E, E, E, E[:1]), 0.3)
    deltas = begun(Trainer(ResAG(sd.widths, 768), losses, recipe, torch.Generator().manual_seed(0)))
    assert deltas.shape == (16, 77, 768)
    bound = 1 / math.sqrt(77 * 768) / 768**2  # torch's fan of [J, T, d] is T d
    assert 0.99 * bound < deltas.abs().max() <= 1.0001 * bound
    assert deltas.flatten(1).norm(dim=1).tolist() == pytest.approx([1e-6] * 16, rel=0.05)

    t = trainer(replace(RECIPE, delta_start=0.1, deltas=500))
    assert begun(t).std().item() == pytest.approx(0.1 * t.losses.data.targets[0].norm().item(), rel=0.02)


def test_anchors_are_noisy_mixtures_of_two_and_the_empty_prompt():
    t = trainer(replace(RECIPE, anchors=4000, noise=0.1))
    t.losses.data.anchors *= torch.arange(1, 10).view(-1, 1, 1)  # each is noisy as befits its own norm
    chance = torch.Generator().manual_seed(7)
    t.generator.set_state(chance.get_state())
    drawn, again = t.draw_anchors(), torch.randint(9, (2, 4000), generator=chance)
    beta = torch.rand(4000, 1, 1, generator=chance)
    E = t.losses.data.anchors.float()[again]
    assert drawn.shape == (4001, T, d)
    assert torch.equal(drawn[-1:], t.losses.data.empty)
    sigma = 0.1 * E.flatten(2).norm(dim=2)[..., None, None]
    noise = drawn[:-1] - beta * E[0] - (1 - beta) * E[1]
    noise = noise / ((beta * sigma[0]) ** 2 + ((1 - beta) * sigma[1]) ** 2).sqrt()
    # standard normal, to five standard errors; every pair occurs, and every weight alike
    assert noise.mean(dim=0).abs().max() < 5 / 4000**0.5
    assert (noise.square().mean(dim=0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5
    assert len(set(zip(*again.tolist(), strict=True))) == 81
    assert beta.mean().item() == pytest.approx(0.5, abs=5 / (12 * 4000) ** 0.5)


def test_training_erases_and_attacks_find_a_way_back():
    recipe = replace(RECIPE, first_steps=300, attack_steps=60, stages=2, later_steps=1, lam=0.01)
    t, erase, attack = trainer(recipe), [], []
    for losses in t:
        (attack if t.phase % 2 else erase).append(losses.get("erase", losses["total"]))
    assert sum(erase[280:300]) < 0.9 * sum(erase[:20])
    assert sum(attack[-10:]) < 0.9 * sum(attack[:10])


@pytest.mark.parametrize("stop", [0, 3, 11, 15])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1])
def test_divergence_is_seen_before_it_reaches_the_gates(stop, value, monkeypatch):
    t = trainer()
    if not stop:
        t.begin()
    for _ in zip(range(stop), t):  # noqa: B905 the shorter one ends it
        pass
    before, draw = state(t), t.draw_losses

    def diverged() -> dict[str, Tensor]:
        learner = t.optimizer.param_groups[0]["params"][0]
        # sqrt has the value 0 and an infinite slope at 0: the loss alone looks sound
        slope = (learner * 0).sum().sqrt() if value == 1 else 0
        return {name: loss * value + slope for name, loss in draw().items()}

    monkeypatch.setattr(t, "draw_losses", diverged)
    with pytest.raises(FloatingPointError, match=f"phase {t.phase + 1}, step {t.step + 1}"):
        next(iter(t))
    assert_identical(state(t), before)


def test_lambda_rises_as_the_square_of_the_steps_in_the_first_stage_alone():
    for rise in (0.0, 0.5):
        t, shares = trainer(replace(RECIPE, rise=rise)), []
        t.gates.load_state_dict(random_gates(3, 2).state_dict())
        for losses in t:
            if t.phase % 2 == 0:
                rest = losses["erase"] + losses.get("adversarial", 0.0)
                shares.append((losses["total"] - rest) / (10 * losses["anchor"]))
        first = [min(1, (s / 4.5) ** 2) if rise else 1 for s in range(1, 10)]
        assert shares == pytest.approx(first + [1] * 8, rel=1e-3)
