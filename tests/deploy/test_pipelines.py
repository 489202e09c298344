"""Pipelines of diffusers as people call them: with gates they draw what the definition draws."""

import copy
from collections.abc import Callable

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


# -------------------------------------------------------------------------------------------------------------------


def hang_definition(unet: nn.Module, gates: cpe.ResAG) -> list:
    """Keys and values W_l E + R_l(E), with nothing of deploy/hooks.py."""
    return [
        unet.get_submodule(name).register_forward_hook(
            lambda module, given, output, l=l: output + gates.residual(l, gates.gated(given[0].float())).to(output)
        )
        for l, name in enumerate(gates.names)
    ]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WAYS)
def test_a_pipeline_with_gates_draws_what_the_definition_draws(name):
    plain, pipes = WAYS[name](pipeline("SD 1.x")), [pipeline("SD 1.x") for _ in range(2)]
    gates = open_gates(pipes[0].unet, d=768)
    hang_definition(pipes[0].unet, gates)
    attach(pipes[1], gates)
    expected, got = (WAYS[name](pipe) for pipe in pipes)
    change = (expected - plain).norm()
    assert change > 0.05 * plain.norm()
    assert (got - expected).norm() < (0.3 if name in ("bfloat16", "autocast") else 1e-3) * change
    detach(pipes[1])
    torch.compiler.reset()
