"""A U-Net of diffusers with gates, in every tool that users put around one: it draws erased pictures, or raises.

A way is what a user does, step after step: "load_lora attach unload_lora". Every step is a function below; a tool that
is not installed skips its ways, by name.
"""

import copy
import importlib
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import safetensors.torch
import tiny as reference
import torch
import torch.nn.utils.prune
from test_hooks import context, open_gates
from torch import Tensor, nn

import cpe
from deploy import hooks

# Every kind of block once: graphs of more take minutes.
UNET = reference.ON_DISK["unet"] | {"sample_size": 8, "cross_attention_dim": 32}
LATENTS, T, E = reference.draw("latents", 2, 4, 8, 8), torch.tensor(10), context()
CPU = torch.device("cpu")
STEPS: dict[str, Callable] = {}


def step(do: Callable) -> Callable:
    """Registers what a user does to a U-Net; what it returns, if anything, is what draws from then on."""
    STEPS[do.__name__] = do
    return do


def theirs_of(name: str) -> type:
    """A class of diffusers, or of its attention processors."""
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name, None) or getattr(diffusers.models.attention_processor, name)


@step
def draw(unet):
    noise(unet)


# --- PEFT ----------------------------------------------------------------------------------------------------------


@step
def load_lora(unet):
    pytest.importorskip("peft")
    state = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn1.to_q")):
            name = name.removeprefix("_orig_mod.")  # of what was compiled
            state[f"{name}.lora_A.weight"] = 0.02 * reference.draw(f"{name} A", 2, module.in_features)
            state[f"{name}.lora_B.weight"] = 0.02 * reference.draw(f"{name} B", module.out_features, 2)
    unet.load_lora_adapter(state, prefix=None, adapter_name="a")


@step
def save_lora(unet):
    unet.save_lora_adapter(tempfile.mkdtemp(), adapter_name="a")


@step
def unload_lora(unet):
    unet.unload_lora()


@step
def fuse_lora(unet):
    unet.fuse_lora()


@step
def disable_lora(unet):
    unet.disable_lora()


@step
def delete_adapters(unet):
    unet.delete_adapters("a")


def wrapped(unet: nn.Module, kind: str = "LoraConfig", **settings: object) -> nn.Module:
    peft, settings = pytest.importorskip("peft"), settings or {"r": 2}
    return peft.get_peft_model(unet, getattr(peft, kind)(target_modules=["to_k", "to_v"], **settings))


@step
def peft_lora(unet):
    return wrapped(unet)


@step
def peft_dora(unet):
    return wrapped(unet, r=2, use_dora=True)


@step
def peft_loha(unet):
    return wrapped(unet, "LoHaConfig", r=2)


@step
def peft_oft(unet):
    return wrapped(unet, "OFTConfig", oft_block_size=4)


@step
def merge_and_unload(model):
    return model.merge_and_unload()


@step
def unload(model):
    return model.unload()


# --- Quantisers ----------------------------------------------------------------------------------------------------


@step
def quanto(unet):
    tool = pytest.importorskip("optimum.quanto")
    tool.quantize(unet, weights=tool.qint8)
    tool.freeze(unet)


@step
def torchao(unet):
    tool = pytest.importorskip("torchao.quantization")
    tool.quantize_(unet, tool.Int8WeightOnlyConfig())


@step
def quantize_dynamic(unet):
    return torch.ao.quantization.quantize_dynamic(unet, {nn.Linear})


@step
def bitsandbytes(unet):
    """Linear layers become Linear4bit, as where a pipeline is loaded with a BitsAndBytesConfig."""
    tool = pytest.importorskip("bitsandbytes")
    for module in [*unet.modules()]:
        for name, layer in [*module.named_children()]:
            if type(layer) is nn.Linear:
                made = tool.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, E.dtype)
                made.weight = tool.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                made.bias = layer.bias
                setattr(module, name, made.to("cpu"))


# --- What changes layers in their place ----------------------------------------------------------------------------


def projections(unet: nn.Module) -> list[nn.Module]:
    return [module for path, module in unet.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))]


@step
def weight_norm(unet):
    for module in projections(unet):
        nn.utils.parametrizations.weight_norm(module)


@step
def pruned(unet):
    for module in projections(unet):
        nn.utils.prune.random_unstructured(module, "weight", 0.02)


@step
def patched_forward(unet):
    """As trainers of LoRA do that know no PEFT: a layer's `forward` is wrapped."""
    for module in projections(unet):
        module.forward = lambda x, forward=module.forward: forward(x) + 0.01 * forward(x)


@step
def functional_call(unet):
    weights = dict(unet.named_parameters())
    return lambda *given: torch.func.functional_call(unet, weights, given)


@step
def data_parallel(unet):
    """Without a graphics card, or with one: the U-Net itself."""
    with patch("torch.nn.parallel.data_parallel._get_available_device_type", lambda: None):  # not the stand-in's
        return nn.DataParallel(unet)


@step
def replicas(unet):
    """What DataParallel gives each of several cards, here the CPU: copies of all modules, made in every pass."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    spread = {"_broadcast_coalesced_reshape": lambda tensors, *_, **__: [list(tensors)]}

    def draws(*given: Tensor) -> Tensor:
        with patch.multiple(module, _get_device_index=lambda *_: 0, **spread):
            return module.replicate(unet, [CPU])[0](*given)

    return draws


@step
def align_devices(unet):
    """What accelerate hangs on a model that it spreads over devices."""
    tool = pytest.importorskip("accelerate.hooks")
    tool.add_hook_to_module(unet, tool.AlignDevicesHook(CPU, io_same_device=True))


@step
def remove_hooks(unet):
    """What `pipe.remove_all_hooks()` calls."""
    pytest.importorskip("accelerate.hooks").remove_hook_from_module(unet, recurse=True)


@step
def channels_last(unet):
    unet.to(memory_format=torch.channels_last)


# --- Processors of attention ---------------------------------------------------------------------------------------


def process(unet: nn.Module, where: str, make: Callable[[int], object]) -> None:
    """Give every attention layer of a name a processor, made for its width."""
    chosen = dict(unet.attn_processors)
    for name in chosen:
        if where in name:
            chosen[name] = make(unet.get_submodule(name.removesuffix(".processor")).to_k.out_features)
    unet.set_attn_processor(chosen)


@step
def custom_diffusion(unet, kind="CustomDiffusionAttnProcessor"):
    settings = {"train_kv": True, "train_q_out": False, "cross_attention_dim": 32}
    process(unet, "attn2", lambda width: theirs_of(kind)(hidden_size=width, **settings))


@step
def custom_diffusion_2(unet):
    custom_diffusion(unet, "CustomDiffusionAttnProcessor2_0")


class Reader:
    """A processor that reads the weights of keys and values itself."""

    def __call__(self, attn: nn.Module, x: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        E = encoder_hidden_states
        q, k, v = (y @ to.weight.T for y, to in ((x, attn.to_q), (E, attn.to_k), (E, attn.to_v)))
        return attn.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v))


@step
def reader(unet):
    process(unet, "attn2", lambda _: Reader())


class Hypernetwork:
    """As A1111's: keys and values have networks of their own before them, that change the prompt."""

    def __call__(self, attn: nn.Module, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: object) -> Tensor:
        E = x if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.to_q(x), attn.to_k(E + 0.01 * E.roll(1, -1)), attn.to_v(E - 0.01 * E.roll(1, -1)))
        q, k, v = (attn.head_to_batch_dim(head) for head in heads)
        return attn.to_out[0](attn.batch_to_head_dim(nn.functional.scaled_dot_product_attention(q, k, v)))


@step
def hypernetwork(unet):
    process(unet, "attn2", lambda _: Hypernetwork())


@step
def first_processor(unet):
    unet.set_attn_processor(theirs_of("AttnProcessor")())


@step
def default_processors(unet):
    unet.set_attn_processor(theirs_of("AttnProcessor2_0")())


@step
def xformers(unet):
    """Its processor, as `enable_xformers_memory_efficient_attention` sets it; the kernel, for GPUs, is stood in for."""
    unet.set_attn_processor(theirs_of("XFormersAttnProcessor")())
    kernel = SimpleNamespace(memory_efficient_attention=attention)
    place = importlib.import_module("diffusers.models.attention_processor")

    def draws(*given: Tensor) -> object:
        with patch.object(place, "xformers", SimpleNamespace(ops=kernel)):
            return unet(*given)

    return draws


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, **_: object) -> Tensor:
    """As `xformers.ops.memory_efficient_attention`, of [B heads, T, d]."""
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


@step
def fuse_qkv(unet):
    unet.fuse_qkv_projections()


@step
def unfuse_qkv(unet):
    unet.unfuse_qkv_projections()


@step
def slicing(unet):
    unet.set_attention_slice("max")


@step
def pag(unet):
    kind = theirs_of("PAGIdentitySelfAttnProcessor2_0")
    process(unet, "mid_block.attentions.0.transformer_blocks.0.attn1", lambda _: kind())


@step
def ip_adapter(unet, weight=0.0):
    """A picture that a random image encoder has read: classes of transformers and diffusers all the way."""
    vision, config = reference.reference("transformers", "CLIPVisionModelWithProjection", "CLIPVisionConfig")
    weights = {"proj.weight": (4 * 32, 16), "proj.bias": (4 * 32,), "norm.weight": (32,), "norm.bias": (32,)}
    state = {"image_proj": {name: 0.25 * reference.draw(name, *shape) for name, shape in weights.items()}}
    layers = [name.removesuffix(".processor") for name in unet.attn_processors]
    state["ip_adapter"] = {
        f"{i}.{kind}_ip.weight": 0.2 * reference.draw(f"{path} {kind}", unet.get_submodule(path).to_k.out_features, 32)
        for i, path in enumerate(layers)
        if path.endswith("attn2")
        for kind in hooks.PROJECTIONS
    }
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)  # what pipe.load_ip_adapter calls
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [weight]
    torch.manual_seed(0)
    picture = vision(config(**reference.VISION, projection_dim=16)).eval()(reference.draw("picture", 1, 3, 16, 16))
    seen = {"image_embeds": [picture.image_embeds.unsqueeze(0).repeat(2, 1, 1)]}
    return lambda x, t, E: unet(x, t, E, added_cond_kwargs=seen)


# --- What leaves out, casts or moves -------------------------------------------------------------------------------


@step
def deepcache(unet):
    """Every second step takes what is deep from the one before."""
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=torch.tensor([10, 9])))
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    return lambda x, t, E: [unet(x, t, encoder_hidden_states=E) for t in pipe.scheduler.timesteps][-1]


@step
def freeu(unet):
    unet.enable_freeu(s1=0.9, s2=0.9, b1=1.05, b2=1.05)


@step
def tomesd(unet):
    pytest.importorskip("tomesd").apply_patch(unet, ratio=0.1, max_downsample=1)


@step
def layerwise_casting(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


@step
def group_offload(unet):
    unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


@step
def model_offload(unet):
    pytest.importorskip("accelerate").cpu_offload_with_hook(unet, "cpu")


@step
def sequential_offload(unet):
    pytest.importorskip("accelerate").cpu_offload(unet, "cpu")


@step
def checkpointing(unet):
    """Backward goes through every layer a second time."""
    unet.enable_gradient_checkpointing()
    unet.train()

    def learn(x: Tensor, t: Tensor, E: Tensor) -> Tensor:
        with torch.enable_grad():
            drawn = unet(x, t, E.clone().requires_grad_()).sample
            drawn.sum().backward()
        return drawn.detach()

    return learn


@step
def broadcast(unet):
    """Pyramid attention broadcast: every second step, attention answers what it did the step before."""
    which = {"cross_attention_block_skip_range": 2, "cross_attention_block_identifiers": ("transformer_blocks",)}
    config = theirs_of("PyramidAttentionBroadcastConfig")(**which, current_timestep_callback=lambda: 500)
    theirs_of("apply_pyramid_attention_broadcast")(unet, config)
    return lambda x, t, E: [unet(x, t, E) for _ in range(2)][-1]


# --- Copies and graphs ---------------------------------------------------------------------------------------------


@step
def save_pretrained(unet):
    unet.save_pretrained(folder := tempfile.mkdtemp())
    return type(unet).from_pretrained(folder)


@step
def copy_weights(unet):
    other = type(unet).from_config(unet.config)
    other.load_state_dict(unet.state_dict(), strict=False)
    return other


@step
def save_model(unet):
    """As safetensors saves a model; accelerate does much the same."""
    safetensors.torch.save_model(unet, f"{tempfile.mkdtemp()}/unet.safetensors")


@step
def controlnet_from_unet(unet):
    return theirs_of("ControlNetModel").from_unet(unet)


@step
def motion_from_unet(unet):
    """AnimateDiff, with a motion adapter that moves nothing."""
    settings = {"motion_layers_per_block": 1, "motion_num_attention_heads": 2, "motion_norm_num_groups": 4}
    adapter = theirs_of("MotionAdapter")(block_out_channels=UNET["block_out_channels"], **settings)
    for module in adapter.modules():
        if hasattr(module, "proj_out"):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    return Motion(theirs_of("UNetMotionModel").from_unet2d(unet, adapter.requires_grad_(False)).eval())


class Motion(nn.Module):
    """A motion U-Net that draws one frame."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, E: Tensor) -> Tensor:
        """Noise [B, 4, 8, 8]."""
        return self.unet(x.unsqueeze(2), t, E).sample.squeeze(2)


class Plain(Motion):
    """A U-Net that returns a tensor, for graphs."""

    def forward(self, x: Tensor, t: Tensor, E: Tensor) -> Tensor:
        """Noise [B, 4, 8, 8]."""
        return self.unet(x, t, E, return_dict=False)[0]


@step
def compile_repeated_blocks(unet):
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")


@step
def compile_whole(unet):
    return torch.compile(unet, fullgraph=True, backend="eager")


@step
def compile_in_place(unet):
    unet.compile(fullgraph=True, backend="eager")


@step
def export(unet, strict=False):
    noise(unet, seen := context("seen"))
    return torch.export.export(Plain(unet), (LATENTS, T, seen), strict=strict).module()


@step
def export_strict(unet):
    return export(unet, strict=True)


@step
def make_fx(unet):
    return torch.fx.experimental.proxy_tensor.make_fx(Plain(unet))(LATENTS, T, context("seen"))


@step
def jit_trace(unet):
    noise(unet, seen := context("seen"))
    return torch.jit.trace(Plain(unet), (LATENTS, T, seen), check_trace=False)


@step
def onnx(unet):
    pytest.importorskip("onnx")
    noise(unet, seen := context("seen"))
    file, names = f"{tempfile.mkdtemp()}/unet.onnx", ["x", "t", "E"]
    torch.onnx.export(Plain(unet), (LATENTS, T, seen), file, dynamo=False, input_names=names)
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    return lambda *given: torch.tensor(session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})[0])


@step
def openvino(unet):
    tool = pytest.importorskip("openvino")
    noise(unet, seen := context("seen"))
    model = tool.compile_model(tool.convert_model(Plain(unet), example_input=(LATENTS, T, seen)), "CPU")
    return lambda *given: torch.tensor(model([t.numpy() for t in given])[0])


# --- The ways ------------------------------------------------------------------------------------------------------

ERASED = [
    "load_lora attach unload_lora", "load_lora attach fuse_lora unload_lora", "attach load_lora",
    "attach load_lora draw unload_lora", "attach load_lora save_lora", "attach load_lora disable_lora",
    "load_lora attach delete_adapters", "peft_lora attach merge_and_unload", "attach peft_lora merge_and_unload",
    "attach peft_lora unload", "attach peft_dora", "attach peft_loha",
    "attach peft_oft", "peft_oft attach",
    "attach quanto", "quanto attach", "attach torchao", "torchao attach",
    "attach quantize_dynamic", "quantize_dynamic attach",
    "attach slicing", "slicing attach", "attach pag", "pag attach", "attach ip_adapter",
    "attach deepcache", "attach freeu", "freeu attach", "attach tomesd", "tomesd attach",
    "peft_dora attach", "peft_loha attach", "weight_norm attach", "model_offload attach", "first_processor attach",
    "hypernetwork attach", "channels_last attach",
    "attach layerwise_casting", "layerwise_casting attach", "attach group_offload", "group_offload attach",
    "attach model_offload", "sequential_offload attach", "attach checkpointing",
    "attach model_offload remove_hooks", "attach data_parallel", "attach pruned", "pruned attach",
    "attach hypernetwork", "attach first_processor", "attach default_processors", "attach xformers",
    "attach fuse_qkv unfuse_qkv", "attach export", "attach export_strict", "attach make_fx",
    "motion_from_unet attach", "attach compile_repeated_blocks", "attach compile_whole", "attach jit_trace",
    "attach onnx", "attach openvino", "attach bitsandbytes", "bitsandbytes attach", "attach weight_norm",
    "attach patched_forward", "patched_forward attach", "attach functional_call",
    "attach align_devices", "align_devices attach", "attach channels_last", "compile_in_place attach",
]  # fmt: skip
RAISES = {
    "custom_diffusion attach": "CustomDiffusionAttnProcessor does not call",
    "attach custom_diffusion_2": r"CustomDiffusionAttnProcessor2_0 does not call",
    "attach reader": "Reader does not call",
    "attach broadcast": "does not call",
    "attach fuse_qkv": "unfuse_qkv_projections",
    "attach sequential_offload": "enable_sequential_cpu_offload",
    "attach replicas": "was replaced",
    "data_parallel attach": "is in one of the two only",
    "jit_trace attach": "is in one of the two only",
    "export attach": "is in one of the two only",
    "attach save_model": "gates are hooks, not weights",
    "attach save_pretrained": "gates are hooks, not weights",
    "attach copy_weights": "gates are hooks, not weights",
    "attach controlnet_from_unet": "gates are hooks, not weights",
    "attach motion_from_unet": "gates are hooks, not weights",
}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    return theirs_of("UNet2DConditionModel")(**UNET).eval().requires_grad_(False)


def noise(draws: Callable, E: Tensor = E) -> Tensor:
    """What is drawn, whatever it is wrapped in."""
    output = draws(LATENTS, T, E)
    return getattr(output, "sample", output)


def after(way: str, unet: nn.Module, gates: cpe.ResAG | None) -> Tensor:
    """What is drawn after all steps of a way; without gates nothing is attached."""
    draws = unet = copy.deepcopy(unet)
    for name in way.split():
        if name != "attach":
            made = STEPS[name](draws)
            draws = draws if made is None else made
        elif gates is not None:
            hooks.attach(draws.unet if isinstance(draws, Motion) else draws, gates)
    drawn = noise(draws)
    torch.compiler.reset()
    return drawn


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ERASED)
@torch.no_grad()
def test_erased(theirs, way):
    """Gates change what a tool draws as they change what the U-Net draws without it; were they gone, by nothing."""
    gates = open_gates(theirs)
    alone = after("attach", theirs, gates) - after("", theirs, None)
    within = after(way, theirs, gates) - after(way, theirs, None)
    assert (within - alone).norm() < 0.3 * alone.norm()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", RAISES)
@torch.no_grad()
def test_raises(theirs, way):
    with pytest.raises(ValueError, match=RAISES[way]):
        after(way, theirs, open_gates(theirs))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["attach", "load"])
@torch.no_grad()
def test_an_ip_adapter_at_half_weight_leaves_the_prompt_erased(theirs, first):
    """Keys and values of the prompt are W_l E + R_l(E), as defined; the picture's are as they were."""
    unet, gates = copy.deepcopy(theirs), open_gates(theirs)
    draws = ip_adapter(unet, 0.5)
    plain = noise(draws)
    assert not torch.allclose(plain, noise(theirs))  # the picture is seen
    handles = [
        unet.get_submodule(name).register_forward_hook(lambda module, inputs, output, R=R: output + R)
        for name, R in gates.residuals(E).items()
    ]
    expected = noise(draws)
    for handle in handles:
        handle.remove()
    if first == "attach":
        unet = copy.deepcopy(theirs)
        hooks.attach(unet, gates)
        draws = ip_adapter(unet, 0.5)
    else:
        hooks.attach(unet, gates)
    torch.testing.assert_close(noise(draws), expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).norm() > 0.1 * plain.norm()


@pytest.mark.oracle
@torch.no_grad()
def test_a_controlnet_takes_the_gates_of_its_unet(theirs):
    net, gates = theirs_of("ControlNetModel").from_unet(theirs).eval(), open_gates(theirs)
    hint = reference.draw("hint", 2, 3, 64, 64)
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        nn.init.normal_(block.weight)
    plain = net(LATENTS, T, E, hint, return_dict=False)[1]
    hooks.attach(net, gates)
    assert (net(LATENTS, T, E, hint, return_dict=False)[1] - plain).norm() > 0.01 * plain.norm()
    hooks.detach(net)
    assert torch.equal(net(LATENTS, T, E, hint, return_dict=False)[1], plain)


@pytest.mark.oracle
@torch.no_grad()
def test_a_unet_draws_beside_no_controlnet_but_the_one_attached_with_it(theirs):
    unet, net, gates = copy.deepcopy(theirs), theirs_of("ControlNetModel").from_unet(theirs).eval(), open_gates(theirs)
    pipe, hint = SimpleNamespace(components={"unet": unet, "controlnet": net}), reference.draw("hint", 2, 3, 64, 64)

    def drawn() -> Tensor:
        down, mid = net(LATENTS, T, E, hint, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(LATENTS, T, E, **added).sample

    plain = drawn()
    hooks.attach(unet, gates)  # as where a ControlNet comes later, with `from_pipe`
    with pytest.raises(ValueError, match="not attached with it: attach"):
        drawn()
    with pytest.raises(ValueError, match="not attached with it: attach"):  # by position, too
        unet(LATENTS, T, E, *[None] * 5, *net(LATENTS, T, E, hint, return_dict=False))
    hooks.attach(pipe, gates)
    erased = drawn()
    assert (erased - plain).norm() > 0.1 * plain.norm()
    hooks.attach(unet, open_gates(theirs, seed=1))  # the ControlNet has gates still, but of another concept
    with pytest.raises(ValueError, match="not attached with it: attach"):
        drawn()
    hooks.attach(pipe, gates)
    assert torch.equal(drawn(), erased)
    hooks.detach(pipe)
    assert torch.equal(drawn(), plain)


@pytest.mark.oracle
@torch.no_grad()
def test_a_controlnet_xs_weaves_a_unet_in_that_no_gates_are_for():
    unet = theirs_of("UNet2DConditionModel")(**UNET | {"layers_per_block": 2}).eval().requires_grad_(False)
    adapter, kind = theirs_of("ControlNetXSAdapter").from_unet(unet, size_ratio=0.5), theirs_of("UNetControlNetXSModel")
    gates = open_gates(unet)
    with pytest.raises(ValueError, match="is in one of the two only"):
        hooks.attach(kind.from_unet(unet, adapter), gates)
    hooks.attach(unet, gates)
    with pytest.raises(ValueError, match="gates are hooks, not weights"):
        kind.from_unet(unet, adapter)


@pytest.mark.oracle
def test_a_unet_that_reads_the_prompt_elsewhere_is_refused(theirs):
    upscaler = type(theirs)(**UNET, only_cross_attention=True)  # as SD's x4 upscaler: attn1 reads it, too
    with pytest.raises(ValueError, match=r"attn1\.to_k is in one of the two only"):
        hooks.attach(upscaler, open_gates(theirs))
    simple = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "block_out_channels": [32, 32]}  # of Kandinsky and IF
    simple |= {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2}
    simple |= {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2}
    kandinsky = type(theirs)(**UNET | simple)  # its to_k reads the picture, add_k_proj the prompt
    with pytest.raises(ValueError, match="this has none"):
        hooks.attach(kandinsky, open_gates(theirs))
    theirs = copy.deepcopy(theirs)
    theirs.position_net = nn.Identity()  # GLIGEN's, for phrases
    with pytest.raises(ValueError, match="GLIGEN reads phrases"):
        hooks.attach(theirs, open_gates(theirs))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_compiled_unet_that_is_wrapped_raises_until_hooks_follow(theirs):
    gates, unet = open_gates(theirs), copy.deepcopy(theirs)
    hooks.attach(unet, gates)
    graph = compile_whole(unet)
    noise(graph)
    load_lora(unet)
    with pytest.raises(Exception, match="was replaced"):  # torch.compile wraps it in one of its own
        noise(graph)
    torch.compiler.reset()
    expected = after("load_lora attach", theirs, gates)
    for draws in (unet, graph):  # an ordinary call, after which the graph is right again
        torch.testing.assert_close(noise(draws), expected)
    torch.compiler.reset()
