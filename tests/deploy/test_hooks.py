"""Gates on any tree of modules: what attach promises. test_tools.py: the same in the tools that people use."""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny as reference
import torch
from torch import Tensor, nn

import cpe
from deploy import hooks

# --- Any tree of modules -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """What attach looks for, and nothing else; K * V stands for attention."""

    def __init__(self):
        super().__init__()
        self.to_k, self.to_v = nn.Linear(32, 6, bias=False), nn.Linear(32, 6, bias=False)

    def forward(self, E: Tensor) -> Tensor:
        """From a context [B, T, 32], [B, T, 6]."""
        return self.to_k(E) * self.to_v(E)


class Tree(nn.Module):
    """Three layers that read the prompt."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn2": Attention()}) for _ in range(3))

    def forward(self, E: Tensor) -> Tensor:
        """From a context [B, T, 32], [B, T, 6]."""
        return sum(block["attn2"](E) for block in self.blocks)


def open_gates(network: nn.Module, seed: int = 0, d: int = 32, size: float = 1.5) -> cpe.ResAG:
    """Random gates, open somewhere, with residuals that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    paths = hooks.cross_attentions(network)
    widths = {f"{p}.{k}": network.get_submodule(f"{p}.{k}").out_features for p in paths for k in hooks.PROJECTIONS}
    gates = cpe.ResAG(widths, d, r=4, k=2)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(0, size * parameter.shape[1] ** -0.5, generator=generator)
    return gates.requires_grad_(False)


@pytest.fixture
def tree() -> Tree:
    return reference.filled(Tree())


@pytest.fixture
def gates(tree) -> cpe.ResAG:
    return open_gates(tree)


def context(name: str = "context", rows: int = 2) -> Tensor:
    return reference.draw(name, rows, 9, 32)


def erased(tree: Tree, gates: cpe.ResAG, E: Tensor) -> Tensor:
    """What the erased tree returns, by the definition."""
    R = gates.residuals(E)
    return sum(
        (block["attn2"].to_k(E) + R[f"blocks.{i}.attn2.to_k"]) * (block["attn2"].to_v(E) + R[f"blocks.{i}.attn2.to_v"])
        for i, block in enumerate(tree.blocks)
    )


@torch.no_grad()
def test_attach_is_the_definition_and_detach_restores_to_the_bit(tree, gates):
    plain, expected = tree(context()), erased(tree, gates, context())
    for each in (open_gates(tree, seed=1), gates):  # the second replaces the first
        hooks.attach(tree, each)
    torch.testing.assert_close(tree(context()), expected)
    assert not torch.allclose(plain, expected)
    for _ in range(2):
        hooks.detach(tree)
        assert torch.equal(tree(context()), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._state_dict_hooks for m in tree.modules())


@torch.no_grad()
def test_merged_gates_of_two_concepts(tree):
    merged = cpe.merge([open_gates(tree, seed) for seed in (1, 2)])
    expected = erased(tree, merged, context())
    hooks.attach(tree, merged)
    torch.testing.assert_close(tree(context()), expected)


@pytest.fixture
def calls(gates, monkeypatch) -> list[int]:
    """One entry for every evaluation of the gates."""
    calls, evaluate = [], gates.gated
    monkeypatch.setattr(gates, "gated", lambda E: calls.append(1) or evaluate(E))
    return calls


@torch.inference_mode()
def test_the_two_projections_of_a_layer_share_an_evaluation_and_nothing_else_does(tree, gates, calls):
    hooks.attach(tree, gates)
    E = context()
    for passes in (1, 2):
        tree(E)
        assert len(calls) == passes * len(tree.blocks)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_new_context_never_gets_an_old_gate(tree, gates, mode):
    """Neither written into the old tensor, nor with gates that changed."""
    with mode():
        never_old(tree, gates)


def never_old(tree: Tree, gates: cpe.ResAG) -> None:
    hooks.attach(tree, gates)
    E = context("a")
    tree(E)
    E.copy_(context("b"))
    for change in (None, gates.scale, gates.lora_up[0], gates.w_qs):
        if change is not None:
            change.mul_(0.5)
        got = tree(E)
        hooks.detach(tree)
        torch.testing.assert_close(got, erased(tree, gates, E))
        hooks.attach(tree, gates)
        tree(E)


def test_gradients_pass_through_the_gates_to_the_prompt_and_stop_at_them(tree, gates):
    gates.requires_grad_()
    E = context().requires_grad_()
    (expected,) = torch.autograd.grad(erased(tree, gates, E).sum(), E)
    hooks.attach(tree, gates)
    for _ in range(2):
        drawn = tree(E)
        (got,) = torch.autograd.grad(drawn.sum(), E)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    tree(E).sum().backward()
    assert all(parameter.grad is None for parameter in gates.parameters())


@torch.no_grad()
def test_threads_may_share_a_network(tree, gates):
    expected = {name: erased(tree, gates, context(name)) for name in "ab"}
    hooks.attach(tree, gates)

    def wrong(name: str) -> int:
        with torch.no_grad():
            return sum(not torch.allclose(tree(context(name)), expected[name], atol=1e-5) for _ in range(100))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(wrong, "ab")) == [0, 0]
    finally:
        sys.setswitchinterval(before)


@torch.no_grad()
def test_the_residual_takes_the_dtype_of_the_model(tree, gates):
    expected = erased(tree, gates, context())
    hooks.attach(tree.bfloat16(), gates)
    got = tree(context().bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_gates_compute_where_the_network_lies(tree, gates, monkeypatch):
    """On a graphics card, or its stand-in, which refuses tensors of two devices in one operation."""
    card = pytest.importorskip("card", exc_type=ImportError)
    expected = erased(tree, gates, context())
    card.install(monkeypatch)
    for block in tree.blocks:
        for layer in block["attn2"].children():
            layer.weight = nn.Parameter(layer.weight.data.to("card"), requires_grad=False)
    hooks.attach(tree, gates)
    (hook,) = tree.blocks[0]["attn2"].to_k._forward_hooks.values()
    assert {hook.down.device.type, hook.up.device.type, hook.layer.gates.w_qs.device.type} == {"card"}
    torch.testing.assert_close(tree(context().to("card")).cpu(), expected)


def test_gates_of_another_model_are_refused_and_nothing_is_attached(tree, gates):
    wide = cpe.ResAG(gates.widths, 33)
    some = cpe.ResAG(dict(list(gates.widths.items())[:-1]), 32)
    cases = [(tree, wide, "another shape"), (tree, some, "in one of the two only"), (tree, nn.Linear(2, 2), "a ResAG")]
    for network, wrong, sentence in [*cases, (nn.Linear(2, 2), gates, "this has none")]:
        with pytest.raises(ValueError, match=sentence):
            hooks.attach(network, wrong)
    assert not any(module._forward_hooks for module in tree.modules())


def test_a_controlnet_has_no_way_up_and_a_unet_must(tree):
    """The names tell: a network without `up_blocks` may take gates of one that has them."""
    unet = nn.ModuleDict({"mid_block": Tree(), "up_blocks": Tree()})
    gates = open_gates(unet)
    hooks.attach(nn.ModuleDict({"mid_block": Tree()}), gates)
    unet["up_blocks"].blocks.pop(0)
    with pytest.raises(ValueError, match=r"up_blocks\.blocks\.2\.attn2\.to_k is in one of the two only"):
        hooks.attach(unet, gates)


@torch.no_grad()
def test_a_pipeline_is_every_part_that_reads_the_prompt(tree, gates):
    class Pipeline:
        components = {"unet": tree, "text_encoder": nn.Linear(2, 2), "controlnet": None, "tokenizer": object()}

    many = nn.Module()  # as diffusers' MultiControlNetModel
    many.nets = nn.ModuleList([reference.filled(Tree()), reference.filled(Tree())])
    Pipeline.components["controlnet"] = many
    expected = erased(tree, gates, context())
    hooks.attach(Pipeline(), gates)
    for part in (tree, *many.nets):
        torch.testing.assert_close(part(context()), expected)
    hooks.detach(Pipeline())
    assert not any(module._forward_hooks for part in (tree, many) for module in part.modules())


@torch.no_grad()
def test_hooks_follow_a_projection_that_is_replaced_and_miss_no_layer_that_is(tree, gates):
    expected = erased(tree, gates, context())
    hooks.attach(tree, gates)
    layer = tree.blocks[1]["attn2"]
    old, layer.to_k = layer.to_k, copy.deepcopy(layer.to_k)
    torch.testing.assert_close(tree(context()), expected)
    assert not old._forward_hooks
    layer.forward = lambda E: nn.functional.linear(E, layer.to_k.weight) * layer.to_v(E)
    with pytest.raises(ValueError, match=r"not asked at blocks\.1\.attn2"):
        tree(context())
    tree.blocks[1]["attn2"] = Attention()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn2 was replaced"):
        tree(context())


def saved(tree: nn.Module) -> None:
    torch.save(tree.state_dict(), io.BytesIO())


@pytest.mark.parametrize(
    "take",
    [
        lambda tree: Tree().load_state_dict(tree.state_dict()),
        lambda tree: Tree().load_state_dict(tree.state_dict(), strict=False),
        lambda tree: Tree().blocks.load_state_dict(tree.blocks.state_dict()),
        lambda tree: {key: tensor.clone() for key, tensor in tree.state_dict().items()},
        lambda tree: copy.deepcopy(tree.state_dict()),
        saved,
    ],
)
def test_weights_do_not_leave_without_their_gates(tree, gates, take):
    hooks.attach(tree, gates)
    assert len(tree.state_dict()) == 6  # its keys may be read
    with pytest.raises(ValueError, match="gates are hooks, not weights"):
        take(tree)
    hooks.detach(tree)
    take(tree)


@torch.no_grad()
@pytest.mark.parametrize("way", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_a_copy_of_the_whole_takes_its_gates_with_it(tree, gates, way):
    expected, plain = erased(tree, gates, context()), tree(context())
    hooks.attach(tree, gates)
    again = way(tree)
    hooks.detach(tree)
    torch.testing.assert_close(again(context()), expected)
    hooks.detach(again)
    assert torch.equal(again(context()), plain)


def compiled(tree: Tree) -> Callable:
    return torch.compile(tree, backend="eager", fullgraph=True)


GRAPHS = {
    "jit.trace": lambda tree, E: torch.jit.trace(tree, E, check_trace=False),
    "export, strict": lambda tree, E: torch.export.export(tree, (E,), strict=True).module(),
    "export": lambda tree, E: torch.export.export(tree, (E,), strict=False).module(),
    "make_fx": lambda tree, E: torch.fx.experimental.proxy_tensor.make_fx(tree)(E),
    "compile": lambda tree, E: compiled(tree),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("how", GRAPHS)
def test_a_graph_computes_the_gates_of_the_prompt_it_is_given(tree, gates, how, learning):
    expected, seen = erased(tree, gates, context("new")), context("seen")
    hooks.attach(tree, gates.requires_grad_(learning))
    tree(seen)  # a pass before the graph is recorded
    graph = GRAPHS[how](tree, seen)
    for _ in range(2):
        torch.testing.assert_close(graph(context("new")), expected)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["jit.trace", "export"])
def test_a_graph_that_was_recorded_before_takes_no_gates(tree, gates, how):
    """It would not call their hooks."""
    with pytest.raises(ValueError, match=r"of another model|this has none"):
        hooks.attach(GRAPHS[how](tree.requires_grad_(False), context()), gates)


@torch.no_grad()
def test_what_was_compiled_before_notices_gates(tree, gates):
    graph, plain, expected = compiled(tree), tree(context()), erased(tree, gates, context())
    for _ in range(2):
        torch.testing.assert_close(graph(context()), plain)
        hooks.attach(graph, gates)
        torch.testing.assert_close(graph(context()), expected)
        hooks.detach(graph)
    torch.compiler.reset()


@torch.no_grad()
def test_what_was_compiled_and_then_wrapped_raises_until_hooks_follow(tree, gates):
    expected, other = erased(tree, gates, context()), copy.deepcopy(tree.blocks[1]["attn2"].to_k)
    hooks.attach(tree, gates)
    graph = compiled(tree)
    torch.testing.assert_close(graph(context()), expected)
    tree.blocks[1]["attn2"].to_k = nn.Sequential(other)
    with pytest.raises(Exception, match="was replaced"):  # torch.compile wraps it in one of its own
        graph(context())
    torch.compiler.reset()
    torch.testing.assert_close(tree(context()), expected)  # hooks follow
    torch.testing.assert_close(graph(context()), expected)
    torch.compiler.reset()
