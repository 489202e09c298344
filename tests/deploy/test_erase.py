"""One call for any pipeline: random ones of each kind, and what the embedded model draws."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny as reference
import torch
from torch import Tensor

import cpe
from deploy.erase import constant_direction, encode, erase, layers_of
from deploy.hooks import detach
from loading.prompts import Prompts, read_prompts
from solve import constant_direction as known_direction
from study.evaluate import name_features, recognise
from token_space import TokenSpace
from weights import load_model

EMOJI = Path(__file__).resolve().parents[2] / "emoji"
FEW = Prompts(
    ["{}", "a picture of a {}", "{} emoji", "my {}"],
    ["house", "tree", "car", "boat", "star", "book", "moon", "fish", "ring", "bell"],
    ["cat", "dog face", "sun", "blue heart", "red apple", "crab"],
)


def encoder(width: int, act: str, projection: bool = False) -> torch.nn.Module:
    names = reference.reference("transformers", "CLIPTextConfig", "CLIPTextModel", "CLIPTextModelWithProjection")
    settings = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "hidden_act": act}
    settings |= {"num_hidden_layers": 2, "projection_dim": 16, "vocab_size": 4000, "eos_token_id": 2}
    torch.manual_seed(width)
    model = names[1 + projection](names[0](**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("bias"):  # as trained ones have
            torch.nn.init.normal_(parameter, std=0.3)
        elif "token_embedding" in name:
            torch.nn.init.normal_(parameter, std=2.0)  # words differ, as trained ones do
        elif "position_embedding" in name:
            parameter.data[:, :4] += 3  # a feature that every token has
    return model


def pipeline(kind: str) -> object:
    """A random pipeline with encoders of the true widths: SD 1.x, SD 2.x with another activation, SDXL with two."""
    sd, xl, unet, vae, scheduler = reference.reference(
        "diffusers", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL",
        "DDIMScheduler",
    )  # fmt: skip
    (tokenizer,) = reference.reference("transformers", "CLIPTokenizer")
    words = tokenizer.from_pretrained(EMOJI / "tokenizer")
    torch.manual_seed(0)
    width = {"SD 1.x": 768, "SD 2.x": 1024, "SDXL": 768 + 1280}[kind]
    config = reference.UNET | {"cross_attention_dim": width}
    if kind == "SDXL":
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        config |= {"projection_class_embeddings_input_dim": 6 * 8 + 16}
    parts = {"unet": unet(**config).eval(), "vae": vae(**reference.VAE).eval(), "scheduler": scheduler()}
    if kind == "SDXL":
        texts = {"text_encoder": encoder(768, "quick_gelu"), "text_encoder_2": encoder(1280, "gelu", True)}
        pipe = xl(**parts, **texts, tokenizer=words, tokenizer_2=words)
    else:
        texts = {"text_encoder": encoder(width, "gelu" if kind == "SD 2.x" else "quick_gelu"), "tokenizer": words}
        pipe = sd(**parts, **texts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: object, prompt: str) -> Tensor:
    noise = reference.draw("noise", 1, 4, 8, 8)
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "latents": noise}
    return pipe(prompt, height=16, width=16, **settings).images


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SD 1.x", "SD 2.x", "SDXL"])
def test_every_kind_of_pipeline_is_read_and_takes_solved_gates(kind):
    """Random weights know no meaning: only that gates of every width open where they should is seen here.

    `erase` raises if gates make less than half of the shift on its target: then more of the target is left than gone.
    """
    pipe, target = pipeline(kind), "a picture of a red heart"
    before, E = drawn(pipe, target), encode(pipe, [target, "a picture of a boat"])
    gates = erase(pipe, "red heart", "cloud", prompts=FEW)
    assert E.shape == (2, 77, gates.w_qs.shape[1])
    assert not torch.equal(drawn(pipe, target), before)
    x = 1.3 * (encode(pipe, ["a picture of a cloud"]) - E[:1])
    space = TokenSpace(layers_of(pipe))
    assert space.reached(gates, E[:1], x).item() > 0.5
    moved = space.error(gates, E[1:], torch.zeros_like(x)).sum() / space.energy(x).sum()
    assert moved < 0.05  # of what is asked of the target: a tenth of the least that it must reach
    detach(pipe)
    assert torch.equal(drawn(pipe, target), before)
    again, name = cpe.from_tensors(cpe.to_tensors(gates)), gates.names[0]
    torch.testing.assert_close(again.residuals(E)[name], gates.residuals(E)[name])


def test_the_constant_direction_behind_a_layer_norm_is_the_known_one():
    norm = torch.nn.LayerNorm(24).requires_grad_(False)
    norm.bias.normal_(generator=torch.Generator().manual_seed(0))
    E = norm(reference.draw("tokens", 40, 9, 24))
    torch.testing.assert_close(E @ constant_direction(E), E @ known_direction(norm), atol=1e-3, rtol=0)


@pytest.mark.oracle
@torch.no_grad()
def test_the_embedded_model_draws_the_surrogate_and_all_else_as_before():
    """Drawn in eight steps, and judged by the embedded CLIP among all names that it knows."""
    (kind,) = reference.reference("diffusers", "StableDiffusionPipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind.from_pretrained(EMOJI, dtype=torch.float32, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    judge = load_model(EMOJI)
    names = read_prompts("emoji").domain
    known = name_features(judge.clip, judge.tokenizer, names)
    things = ["red heart", "crab", "pizza", "dog face"] * 2

    def seen() -> list[str]:
        noise = torch.cat([reference.draw(f"noise{i}", 4, 16, 8, 8) for i in "ab"])
        how = {"num_inference_steps": 8, "guidance_scale": 4.0, "latents": noise, "output_type": "pt"}
        images = pipe([f"a picture of a {thing}" for thing in things], **how).images
        return [names[i] for i in recognise(judge.clip, 2 * images - 1, known).tolist()]

    assert seen() == things
    gates = erase(pipe, "red heart", preset="emoji")
    assert seen() == [{"red heart": "cloud"}.get(thing, thing) for thing in things]
    before = encode(pipe, ["a red heart"])
    value = pipe.unet.get_submodule(gates.names[1])
    held = value(before)
    with pytest.raises(ValueError, match="choose another surrogate"):
        erase(pipe, "red heart", "red heart", prompts=FEW)
    assert torch.equal(value(before), held)  # the gates that were there are there still


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(ValueError, match="Linear has none"):
        erase(torch.nn.Linear(2, 2), "red heart")


@pytest.mark.oracle
def test_a_unet_whose_prompt_no_attn2_reads_is_refused():
    """Kandinsky's and DeepFloyd IF's: `to_k` reads the picture, `add_k_proj` the prompt."""
    (kind,) = reference.reference("diffusers", "UNet2DConditionModel")
    simple = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "down_block_types": ["SimpleCrossAttnDownBlock2D"]}
    simple |= {"up_block_types": ["SimpleCrossAttnUpBlock2D"], "block_out_channels": [32]}
    pipe = SimpleNamespace(unet=kind(**reference.UNET | simple), encode_prompt=None)
    with pytest.raises(ValueError, match="this has none"):
        erase(pipe, "red heart", prompts=FEW)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_without_encode_prompt_is_erased_by_way_of_another():
    """InstructPix2Pix: its U-Net reads eight channels, which is nothing to gates."""
    kind, other = reference.reference("diffusers", "StableDiffusionInstructPix2PixPipeline", "StableDiffusionPipeline")
    pipe = pipeline("SD 1.x")
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, in_channels=8).eval()
    edits = kind(**pipe.components, requires_safety_checker=False)
    edits.set_progress_bar_config(disable=True)
    picture = reference.draw("picture", 1, 3, 16, 16).sigmoid()

    def edited() -> Tensor:
        how = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return edits("a picture of a red heart", picture, **how).images

    before = edited()
    with pytest.raises(ValueError, match="StableDiffusionInstructPix2PixPipeline has none"):
        erase(edits, "red heart", "cloud", prompts=FEW)
    erase(other(**edits.components, requires_safety_checker=False), "red heart", "cloud", prompts=FEW)
    assert (edited() - before).norm() > 0.01 * before.norm()
