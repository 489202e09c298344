"""Gates on other people's networks: in every tool that users put around one it draws erased pictures, or raises."""

import copy
import io
import pickle
import sys
import tempfile
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


@pytest.mark.parametrize("grad", [False, True])
def test_gates_are_evaluated_once_per_context(tree, gates, calls, grad):
    hooks.attach(tree, gates)
    first = context()
    with torch.set_grad_enabled(grad):  # where nothing that the gates read wants a gradient
        for _ in range(3):
            tree(first)
        assert len(calls) == 1
        tree(context("another"))
    assert len(calls) == 2


@torch.inference_mode()
def test_a_context_without_versions_is_read_once_in_every_pass(tree, gates, calls):
    expected = {name: erased(tree, gates, context(name)) for name in "ab"}
    calls.clear()
    hooks.attach(tree, gates)
    E = context("a")
    for passes in (1, 2):
        torch.testing.assert_close(tree(E), expected["a"])
        assert len(calls) == passes
    torch.testing.assert_close(tree(E.copy_(context("b"))), expected["b"])


@torch.no_grad()
def test_a_new_context_never_gets_an_old_gate(tree, gates):
    """Neither written into the old tensor, nor with gates that changed."""
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


def test_gradients_pass_through_the_gates_again_and_again(tree, gates, calls):
    gates.requires_grad_()
    E = context().requires_grad_()
    expected = torch.autograd.grad(erased(tree, gates, E).sum(), [E, *gates.parameters()])
    hooks.attach(tree, gates)
    with torch.no_grad():
        tree(E)  # what is remembered from here has no gradient
    calls.clear()
    for _ in range(2):
        got = torch.autograd.grad(tree(E).sum(), [E, *gates.parameters()])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert len(calls) == 2 * 3  # once a layer: its two projections share it


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
    tree(seen)  # remembered, but not in the graph
    graph = GRAPHS[how](tree, seen)
    for _ in range(2):
        torch.testing.assert_close(graph(context("new")), expected)
    torch.compiler.reset()


@torch.no_grad()
def test_what_was_compiled_before_notices_gates(tree, gates):
    graph, plain, expected = compiled(tree), tree(context()), erased(tree, gates, context())
    for _ in range(2):
        torch.testing.assert_close(graph(context()), plain)
        hooks.attach(graph, gates)
        torch.testing.assert_close(graph(context()), expected)
        hooks.detach(graph)
    torch.compiler.reset()


# --- diffusers, and the tools around it ----------------------------------------------------------------------------

WAYS: dict[str, Callable] = {}  # what a user does: (U-Net, attach) -> what then draws, (latents, t, E) -> noise
RAISES: dict[str, tuple[Callable, str]] = {}
LATENTS, T, E = reference.draw("latents", 2, 4, 8, 8), torch.tensor(10), context()


def way(*tools: str, raises: str = "") -> Callable:
    """Registers a way; `tools` are the packages that it needs."""

    def register(do: Callable) -> Callable:
        do.tools = tools
        if raises:
            RAISES[do.__name__] = (do, raises)
        else:
            WAYS[do.__name__] = do
        return do

    return register


def their_unet() -> nn.Module:
    (kind,) = reference.reference("diffusers", "UNet2DConditionModel")
    torch.manual_seed(0)
    return kind(**reference.UNET).eval().requires_grad_(False)


def load_lora(unet: nn.Module) -> None:
    state = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn1.to_q")):
            state[f"{name}.lora_A.weight"] = 0.02 * reference.draw(f"{name} A", 2, module.in_features)
            state[f"{name}.lora_B.weight"] = 0.02 * reference.draw(f"{name} B", module.out_features, 2)
    unet.load_lora_adapter(state, prefix=None, adapter_name="a")


@way("peft")
def lora_attach_unload(unet, attach):
    load_lora(unet)
    attach(unet)
    unet.unload_lora()
    return unet


@way("peft")
def lora_attach_fuse_unload(unet, attach):
    load_lora(unet)
    attach(unet)
    unet.fuse_lora()
    unet.unload_lora()
    return unet


@way("peft")
def attach_lora(unet, attach):
    attach(unet)
    load_lora(unet)
    return unet


@way("peft")
def attach_lora_unload(unet, attach):
    attach(unet)
    load_lora(unet)
    unet(LATENTS, T, E)
    unet.unload_lora()
    return unet


@way("peft")
def attach_lora_save(unet, attach):
    attach(unet)
    load_lora(unet)
    unet.save_lora_adapter(tempfile.mkdtemp(), adapter_name="a")
    return unet


def wrapped(unet: nn.Module, **settings: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(unet, peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], **settings))


@way("peft")
def peft_attach_merge_and_unload(unet, attach):
    model = wrapped(unet)
    attach(unet)
    return model.merge_and_unload()


@way("peft")
def attach_peft_merge_and_unload(unet, attach):
    attach(unet)
    return wrapped(unet).merge_and_unload()


@way("peft")
def attach_dora(unet, attach):
    attach(unet)
    return wrapped(unet, use_dora=True)


def quantise(unet: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(unet, weights=quanto.qint8)
    quanto.freeze(unet)


@way("optimum.quanto")
def attach_quanto(unet, attach):
    attach(unet)
    quantise(unet)
    return unet


@way("optimum.quanto")
def quanto_attach(unet, attach):
    quantise(unet)
    attach(unet)
    return unet


@way()
def attach_quantize_dynamic(unet, attach):
    attach(unet)
    return torch.ao.quantization.quantize_dynamic(unet, {nn.Linear})


@way()
def quantize_dynamic_attach(unet, attach):
    unet = torch.ao.quantization.quantize_dynamic(unet, {nn.Linear})
    attach(unet)
    return unet


def custom_diffusion(unet: nn.Module, kind: str) -> None:
    processors = __import__("diffusers").models.attention_processor
    chosen = dict(unet.attn_processors)
    for name in chosen:
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            settings = {"train_kv": True, "train_q_out": False, "hidden_size": width, "cross_attention_dim": 32}
            chosen[name] = getattr(processors, kind)(**settings)
    unet.set_attn_processor(chosen)


@way(raises="CustomDiffusionAttnProcessor does not call")
def custom_diffusion_attach(unet, attach):
    custom_diffusion(unet, "CustomDiffusionAttnProcessor")
    attach(unet)
    return unet


@way(raises="CustomDiffusionAttnProcessor2_0 does not call")
def attach_custom_diffusion(unet, attach):
    attach(unet)
    custom_diffusion(unet, "CustomDiffusionAttnProcessor2_0")
    return unet


@way(raises="unfuse_qkv_projections")
def attach_fuse_qkv(unet, attach):
    attach(unet)
    unet.fuse_qkv_projections()
    return unet


@way()
def attach_sliced(unet, attach):
    attach(unet)
    unet.set_attention_slice("max")
    return unet


@way()
def attach_ip_adapter(unet, attach):
    attach(unet)
    kind, chosen = __import__("diffusers").models.attention_processor.IPAdapterAttnProcessor2_0, unet.attn_processors
    for name in chosen:
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            chosen[name] = kind(width, 32, num_tokens=(4,), scale=0.0)
    unet.set_attn_processor(chosen)
    return lambda x, t, E: unet(x, t, (E, [reference.draw("image", 2, 1, 4, 32)]))


@way()
def attach_freeu(unet, attach):
    attach(unet)
    unet.enable_freeu(s1=1.0, s2=1.0, b1=1.02, b2=1.02)
    return unet


@way("tomesd")
def attach_tomesd(unet, attach):
    attach(unet)
    pytest.importorskip("tomesd").apply_patch(unet, ratio=0.1, max_downsample=1)
    return unet


@way()
def attach_layerwise_casting(unet, attach):
    attach(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    return unet


@way()
def attach_group_offload(unet, attach):
    attach(unet)
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    return unet


@way(raises="enable_sequential_cpu_offload")
def attach_sequential_offload(unet, attach):
    attach(unet)
    pytest.importorskip("accelerate").cpu_offload(unet, "cpu")
    return unet


@way()
def sequential_offload_attach(unet, attach):
    pytest.importorskip("accelerate").cpu_offload(unet, "cpu")
    attach(unet)
    return unet


@way(raises="gates are hooks, not weights")
def attach_save_pretrained(unet, attach):
    attach(unet)
    folder = tempfile.mkdtemp()
    unet.save_pretrained(folder)
    return type(unet).from_pretrained(folder)


@way(raises="gates are hooks, not weights")
def attach_controlnet_from_unet(unet, attach):
    attach(unet)
    return __import__("diffusers").ControlNetModel.from_unet(unet)


@way(raises="gates are hooks, not weights")
def attach_motion_from_unet(unet, attach):
    attach(unet)
    return __import__("diffusers").UNetMotionModel.from_unet2d(unet, motion())


def motion() -> nn.Module:
    """A motion adapter that moves nothing."""
    adapter = __import__("diffusers").MotionAdapter(
        block_out_channels=reference.UNET["block_out_channels"], motion_num_attention_heads=2, motion_norm_num_groups=8
    )
    for module in adapter.modules():
        if hasattr(module, "proj_out"):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    return adapter.requires_grad_(False)


@way()
def motion_from_unet_attach(unet, attach):
    model = __import__("diffusers").UNetMotionModel.from_unet2d(unet, motion()).eval()
    attach(model)
    return lambda x, t, E: model(x.unsqueeze(2), t, E).sample.squeeze(2)


@way()
def attach_compile_repeated_blocks(unet, attach):
    attach(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    return unet


class Plain(nn.Module):
    """A U-Net that returns a tensor, for graphs."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, E: Tensor) -> Tensor:
        """Noise [B, 4, 8, 8]."""
        return self.unet(x, t, E, return_dict=False)[0]


@way()
def attach_jit_trace(unet, attach):
    attach(unet)
    seen = context("seen")
    unet(LATENTS, T, seen)
    return torch.jit.trace(Plain(unet), (LATENTS, T, seen), check_trace=False)


@way("onnx", "onnxruntime")
def attach_torchscript_onnx(unet, attach):
    attach(unet)
    seen, file, names = context("seen"), f"{tempfile.mkdtemp()}/unet.onnx", ["x", "t", "E"]
    unet(LATENTS, T, seen)
    torch.onnx.export(Plain(unet), (LATENTS, T, seen), file, dynamo=False, input_names=names)
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    return lambda *given: torch.tensor(session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})[0])


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return their_unet()


def noise(draws: Callable, E: Tensor = E) -> Tensor:
    """What is drawn, whatever it is wrapped in."""
    output = draws(LATENTS, T, E)
    return getattr(output, "sample", output)


def ready(do: Callable) -> None:
    """The packages of a way must be there: a skip names the one that is not."""
    for tool in do.tools:
        pytest.importorskip(tool)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_erased(theirs, name):
    ready(WAYS[name])
    gates, plain = open_gates(theirs), noise(WAYS[name](copy.deepcopy(theirs), lambda _: None))
    unet = copy.deepcopy(theirs)
    hooks.attach(unet, gates)
    expected = noise(unet)
    got = noise(WAYS[name](copy.deepcopy(theirs), lambda network: hooks.attach(network, gates)))
    torch.compiler.reset()
    # nearer to the erased picture by far; tools that round, and the LoRA, move it a little
    assert (got - expected).norm() < 0.15 * (got - plain).norm()
    assert (expected - plain).norm() > 0.05 * plain.norm()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RAISES)
@torch.no_grad()
def test_raises(theirs, name):
    do, sentence = RAISES[name]
    gates = open_gates(theirs)
    with pytest.raises(ValueError, match=sentence):
        noise(do(copy.deepcopy(theirs), lambda network: hooks.attach(network, gates)))


@pytest.mark.oracle
@torch.no_grad()
def test_a_controlnet_takes_the_gates_of_its_unet(theirs):
    (kind,) = reference.reference("diffusers", "ControlNetModel")
    net, gates = kind.from_unet(theirs).eval(), open_gates(theirs)
    hint = reference.draw("hint", 2, 3, 64, 64)
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        nn.init.normal_(block.weight)
    plain = net(LATENTS, T, E, hint, return_dict=False)[1]
    hooks.attach(net, gates)
    assert (net(LATENTS, T, E, hint, return_dict=False)[1] - plain).norm() > 0.01 * plain.norm()
    hooks.detach(net)
    assert torch.equal(net(LATENTS, T, E, hint, return_dict=False)[1], plain)


@pytest.mark.oracle
def test_a_unet_that_reads_the_prompt_elsewhere_is_refused(theirs):
    upscaler = type(theirs)(**reference.UNET, only_cross_attention=True)  # as SD's x4 upscaler: attn1 reads it, too
    with pytest.raises(ValueError, match=r"attn1\.to_k is in one of the two only"):
        hooks.attach(upscaler, open_gates(theirs))
    theirs = copy.deepcopy(theirs)
    theirs.position_net = nn.Identity()  # GLIGEN's, for phrases
    with pytest.raises(ValueError, match="GLIGEN reads phrases"):
        hooks.attach(theirs, open_gates(theirs))
