"""Pipelines of diffusers as people call them: with gates they draw what the definition draws."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny as reference
import torch
from test_erase import pipeline
from test_hooks import open_gates
from torch import Tensor, nn

import cpe
from deploy.hooks import attach, detach

WAYS: dict[str, Callable[[object], Tensor]] = {}
HOW = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "height": 16, "width": 16}


def way(do: Callable[[object], Tensor]) -> Callable[[object], Tensor]:
    """Registers how a pipeline is used: from a fresh one, latents."""
    WAYS[do.__name__] = do
    return do


def drawn(pipe: object, *given: object, **how: object) -> Tensor:
    """Latents [B, 4, 8, 8]."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(*given, **{**HOW, "generator": torch.Generator().manual_seed(0), **how}).images


# --- What is given -------------------------------------------------------------------------------------------------


@way
def several_prompts_and_negative_ones(pipe):
    return drawn(pipe, ["a red heart", "a cat"], negative_prompt=["a dog", "a red heart"])


@way
def several_pictures_of_a_prompt(pipe):
    return drawn(pipe, "a red heart", num_images_per_prompt=2)


@way
def embeddings(pipe):
    positive, negative = pipe.encode_prompt("a red heart", "cpu", 1, True)
    return drawn(pipe, prompt_embeds=positive, negative_prompt_embeds=negative)


@way
def clip_skip(pipe):
    """By hand, as diffusers 0.42.1 fails at it with transformers 5.23.0: the text encoder without its last layer."""
    encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    seen = pipe.tokenizer(["a red heart", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipe.text_encoder(seen, output_hidden_states=True).hidden_states[-2]
    positive, negative = encoder.final_layer_norm(states).detach().split(1)
    return drawn(pipe, prompt_embeds=positive, negative_prompt_embeds=negative)


@way
def a_long_prompt(pipe):
    """As pipelines for long prompts do, and compel: contexts of several parts, one after another."""
    parts = [pipe.encode_prompt(text, "cpu", 1, True) for text in ("a cat", "a red heart")]
    positive, negative = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return drawn(pipe, prompt_embeds=positive, negative_prompt_embeds=negative)


@way
def textual_inversion(pipe):
    pipe.load_textual_inversion(reference.draw("word", 1, 768), token="<mine>")
    return drawn(pipe, "a <mine>")


@way
def a_callback_that_ends_guidance(pipe):
    def half(pipe: object, step: int, t: int, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": seen["prompt_embeds"].chunk(2)[-1]}

    inputs = ["prompt_embeds"]
    return drawn(pipe, "a red heart", callback_on_step_end=half, callback_on_step_end_tensor_inputs=inputs)


# --- Other pipelines around the same U-Net -------------------------------------------------------------------------


def picture() -> Tensor:
    return reference.draw("picture", 1, 3, 16, 16).sigmoid()


@way
def image_to_image(pipe):
    (kind,) = reference.reference("diffusers", "StableDiffusionImg2ImgPipeline")
    sizes = {"height": None, "width": None}
    how = {name: value for name, value in HOW.items() if name not in sizes}
    other = kind.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other("a red heart", picture(), 1.0, generator=torch.Generator().manual_seed(0), **how).images


@way
def inpainting(pipe):
    (kind,) = reference.reference("diffusers", "StableDiffusionInpaintPipeline")
    other = kind(**pipe.components, requires_safety_checker=False)
    mask = torch.ones(1, 1, 16, 16)
    return drawn(other, "a red heart", image=picture(), mask_image=mask, strength=1.0)


@way
def perturbed_attention(pipe):
    (kind,) = reference.reference("diffusers", "AutoPipelineForText2Image")
    return drawn(kind.from_pipe(pipe, enable_pag=True), "a red heart", pag_scale=2.0)


@way
def panorama(pipe):
    """One prompt, many views."""
    (kind,) = reference.reference("diffusers", "StableDiffusionPanoramaPipeline")
    return drawn(kind.from_pipe(pipe), "a red heart", width=32)


@way
def safe_latent_diffusion(pipe):
    """Guidance with a third row, of what is unsafe."""
    (kind,) = reference.reference("diffusers", "StableDiffusionPipelineSafe")
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    other = kind(**parts, requires_safety_checker=False)
    settings = {"sld_guidance_scale": 100.0, "sld_warmup_steps": 0, "sld_threshold": 1.0}
    return torch.tensor(drawn(other, "a red heart", output_type="np", **settings))


@way
def self_attention_guidance(pipe):
    (kind,) = reference.reference("diffusers", "StableDiffusionSAGPipeline")
    other = kind(**pipe.components, requires_safety_checker=False)
    return drawn(other, "a red heart", sag_scale=0.75)


# --- Copies, numbers, memory ---------------------------------------------------------------------------------------


@way
def a_copy(pipe):
    return drawn(copy.deepcopy(pipe), "a red heart")


@way
def channels_last(pipe):
    pipe.unet.to(memory_format=torch.channels_last)
    return drawn(pipe, "a red heart")


@way
def bfloat16(pipe):
    return drawn(pipe.to(torch.bfloat16), "a red heart").float()


@way
def autocast(pipe):
    with torch.autocast("cpu", torch.bfloat16):
        return drawn(pipe, "a red heart").float()


@way
def compiled_afterwards(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    return drawn(pipe, "a red heart")


# --- Pipelines that have networks of their own ---------------------------------------------------------------------

Around = tuple[object, dict[str, object]]  # a pipeline around the parts of another, and what it is given
AROUND: dict[str, Callable[[object], Around]] = {}


def around(make: Callable[[object], Around]) -> Callable[[object], Around]:
    """Registers a pipeline that is made before gates are attached to it."""
    AROUND[make.__name__] = make
    return make


def control(unet: nn.Module) -> nn.Module:
    """A ControlNet whose first steps are not zero, as trained ones'."""
    (kind,) = reference.reference("diffusers", "ControlNetModel")
    net = kind.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    for i, block in enumerate([*net.controlnet_down_blocks, net.controlnet_mid_block]):
        block.weight.data = 0.2 * reference.draw(f"control {i}", *block.weight.shape)
    return net


def with_control(pipe: object, count: int) -> Around:
    (kind,) = reference.reference("diffusers", "StableDiffusionControlNetPipeline")
    nets = [control(pipe.unet) for _ in range(count)]
    other = kind(**pipe.components, controlnet=nets if count > 1 else nets[0], requires_safety_checker=False)
    return other, {"image": [picture()] * count if count > 1 else picture()}


@around
def a_controlnet(pipe):
    return with_control(pipe, 1)


@around
def several_controlnets(pipe):
    return with_control(pipe, 2)


@around
def animatediff(pipe):
    kind, adapter, scheduler = reference.reference("diffusers", "AnimateDiffPipeline", "MotionAdapter", "DDIMScheduler")
    settings = {"motion_layers_per_block": 2, "motion_num_attention_heads": 2, "motion_norm_num_groups": 8}
    motion = adapter(block_out_channels=reference.UNET["block_out_channels"], **settings)
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    other = kind(**parts, motion_adapter=motion, scheduler=scheduler(clip_sample=False))
    return other, {"num_frames": 2}


@around
def a_t2i_adapter(pipe):
    kind, adapter = reference.reference("diffusers", "StableDiffusionAdapterPipeline", "T2IAdapter")
    net = adapter(channels=reference.UNET["block_out_channels"], num_res_blocks=1, downscale_factor=2)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return kind(**parts, adapter=net, requires_safety_checker=False), {"image": picture()}


def wider(pipe: object, channels: int) -> dict[str, object]:
    """The parts of a pipeline, with a U-Net that reads more channels than noise has."""
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, in_channels=channels).eval()
    return pipe.components | {"requires_safety_checker": False}


@around
def instruct_pix2pix(pipe):
    """Eight channels: noise, and the picture that is to be changed."""
    (kind,) = reference.reference("diffusers", "StableDiffusionInstructPix2PixPipeline")
    return kind(**wider(pipe, 8)), {"image": picture(), "height": None, "width": None}


@around
def inpainting_with_nine_channels(pipe):
    (kind,) = reference.reference("diffusers", "StableDiffusionInpaintPipeline")
    return kind(**wider(pipe, 9)), {"image": picture(), "mask_image": torch.ones(1, 1, 16, 16), "strength": 1.0}


# --- LoRA, from a file ---------------------------------------------------------------------------------------------

ORDERS = [
    "load attach", "load attach unload", "load attach fuse", "load attach fuse unload", "load fuse unload attach",
    "load attach fuse unfuse unload", "load attach disable", "attach load", "attach load unload",
    "attach load fuse", "attach load weaken", "attach load disable", "attach load delete", "attach lcm",
]  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as trainers write it, of layers that read the prompt and of layers that do not."""
    peft, pipe = pytest.importorskip("peft"), pipeline("SD 1.x")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in pipe.unet.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * reference.draw(name, *parameter.shape)
    folder = tmp_path_factory.mktemp("lora")
    pipe.save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return folder


def do(step: str, pipe: object, file: Path, gates: cpe.ResAG | None) -> None:
    """One step of an order; without gates nothing is attached."""
    if step == "lcm":
        (scheduler,) = reference.reference("diffusers", "LCMScheduler")
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if step in ("load", "lcm"):
        pipe.load_lora_weights(file, adapter_name="a")
    elif step == "attach" and gates is not None:
        attach(pipe, gates)
    elif step != "attach":
        {
            "unload": pipe.unload_lora_weights,
            "fuse": pipe.fuse_lora,
            "unfuse": pipe.unfuse_lora,
            "weaken": lambda: pipe.set_adapters(["a"], [0.3]),
            "disable": pipe.disable_lora,
            "delete": lambda: pipe.delete_adapters("a"),
        }[step]()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ORDERS)
def test_a_lora_comes_and_goes_and_the_gates_stay(order, lora):
    """As with the definition hung on what is there in the end, after all steps without gates."""
    pipes = [pipeline("SD 1.x") for _ in range(2)]
    gates = open_gates(pipes[0].unet, d=768)
    for pipe, given in zip(pipes, (None, gates), strict=True):
        for step in order.split():
            do(step, pipe, lora, given)
    plain = drawn(pipes[0], "a red heart")
    if "load" in order and order.split()[-1] in ("load", "attach", "fuse", "weaken"):
        assert (plain - drawn(pipeline("SD 1.x"), "a red heart")).norm() > 0.01 * plain.norm()  # the LoRA is there
    hang_definition(pipes[0].unet, gates)
    assert_same(drawn(pipes[1], "a red heart"), drawn(pipes[0], "a red heart"), plain)


# -------------------------------------------------------------------------------------------------------------------


def hang_definition(network: nn.Module, gates: cpe.ResAG) -> None:
    """Keys and values W_l E + R_l(E), with nothing of deploy/hooks.py; a ControlNet has no way up."""
    for l, name in enumerate(gates.names):
        if hasattr(network, "up_blocks") or not name.startswith("up_blocks"):
            network.get_submodule(name).register_forward_hook(
                lambda module, given, output, l=l: output + gates.residual(l, gates.gated(given[0].float())).to(output)
            )


def assert_same(got: Tensor, expected: Tensor, plain: Tensor, tolerance: float = 1e-3) -> None:
    """What is drawn is what is expected, as seen beside what gates change."""
    change = (expected - plain).norm()
    assert change > 0.05 * plain.norm()
    assert (got - expected).norm() < tolerance * change


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WAYS)
def test_a_pipeline_with_gates_draws_what_the_definition_draws(name):
    plain, pipes = WAYS[name](pipeline("SD 1.x")), [pipeline("SD 1.x") for _ in range(2)]
    gates = open_gates(pipes[0].unet, d=768)
    hang_definition(pipes[0].unet, gates)
    attach(pipes[1], gates)
    expected, got = (WAYS[name](pipe) for pipe in pipes)
    assert_same(got, expected, plain, 0.3 if name in ("bfloat16", "autocast") else 1e-3)
    detach(pipes[1])
    torch.compiler.reset()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AROUND)
def test_a_pipeline_is_all_its_networks(name):
    torch.manual_seed(1)
    pipe, given = AROUND[name](pipeline("SD 1.x"))
    gates, other = open_gates(pipe.unet, d=768), copy.deepcopy(pipe)

    def frames(pipe: object) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        how = {key: value for key, value in {**HOW, **given}.items() if value is not None}
        made = pipe("a red heart", generator=torch.Generator().manual_seed(0), **how)
        return made.frames if hasattr(made, "frames") else made.images

    plain, beside = frames(pipe), other.components.get("controlnet")
    for network in [other.unet, *getattr(beside, "nets", [beside] if beside is not None else [])]:
        hang_definition(network, gates)
    attach(pipe, gates)
    assert_same(frames(pipe), frames(other), plain)
    detach(pipe)
    assert torch.equal(frames(pipe), plain)
