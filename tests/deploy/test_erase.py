"""One call for any pipeline: random ones of each kind, and what the embedded model draws."""

import warnings
from pathlib import Path

import pytest
import tiny as reference
import torch
from torch import Tensor

import cpe
from deploy.erase import constant_direction, encode, erase, layers_of
from deploy.hooks import attach, detach
from loading.prompts import Prompts, read_prompts
from solve import Settings, Solver
from token_space import TokenSpace

EMOJI = Path(__file__).resolve().parents[2] / "emoji"
FEW = Prompts(
    ["{}", "a picture of a {}", "{} emoji"], ["house", "tree", "car", "boat", "star"], ["cat", "dog face", "sun"]
)


def encoder(width: int, act: str, projection: bool = False) -> torch.nn.Module:
    names = reference.reference("transformers", "CLIPTextConfig", "CLIPTextModel", "CLIPTextModelWithProjection")
    settings = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "hidden_act": act}
    settings |= {"num_hidden_layers": 3, "projection_dim": 16, "vocab_size": 4000, "eos_token_id": 2}
    torch.manual_seed(width)
    model = names[1 + projection](names[0](**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("bias"):  # as trained ones have
            torch.nn.init.normal_(parameter, std=0.3)
        elif "token_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "position_embedding" in name:
            parameter.data[:, :4] += 3  # a feature that every token has
    return model


def pipeline(kind: str) -> object:
    """A random pipeline: SD 1.x, SD 2.x with a wider encoder and another activation, SDXL with two."""
    sd, xl, unet, vae, scheduler = reference.reference(
        "diffusers", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL",
        "DDIMScheduler",
    )  # fmt: skip
    (tokenizer,) = reference.reference("transformers", "CLIPTokenizer")
    words = tokenizer.from_pretrained(EMOJI / "tokenizer")
    torch.manual_seed(0)
    width = {"SD 1.x": 32, "SD 2.x": 48, "SDXL": 80}[kind]
    config = reference.UNET | {"cross_attention_dim": width}
    if kind == "SDXL":
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        config |= {"projection_class_embeddings_input_dim": 6 * 8 + 16}
    parts = {"unet": unet(**config).eval(), "vae": vae(**reference.VAE).eval(), "scheduler": scheduler()}
    if kind == "SDXL":
        texts = {"text_encoder": encoder(32, "quick_gelu"), "text_encoder_2": encoder(48, "gelu", True)}
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
    """With random weights: how far such gates reach says nothing of trained ones."""
    pipe, target = pipeline(kind), "a picture of a red heart"
    before, E = drawn(pipe, target), encode(pipe, [target, "red heart"])
    layers = layers_of(pipe)
    assert E.shape == (2, 77, next(iter(layers.W.values())).shape[1])
    anchors = encode(pipe, ["", *(f"a {word}" for word in (*FEW.general, *FEW.domain, "book", "moon"))])
    solver = Solver(TokenSpace(layers), constant_direction(anchors), anchors, Settings(lam=1.0))
    gates = solver.solve(E, encode(pipe, ["a picture of a cloud", "cloud"])).requires_grad_(False)
    attach(pipe, gates)
    assert not torch.equal(drawn(pipe, target), before)
    detach(pipe)
    assert torch.equal(drawn(pipe, target), before)
    again, name = cpe.from_tensors(cpe.to_tensors(gates)), gates.names[0]
    torch.testing.assert_close(again.residuals(E)[name], gates.residuals(E)[name])


def test_the_constant_direction_behind_a_layer_norm_is_the_known_one():
    solve = pytest.importorskip("solve")
    norm = torch.nn.LayerNorm(24).requires_grad_(False)
    norm.bias.normal_(generator=torch.Generator().manual_seed(0))
    E = norm(reference.draw("tokens", 40, 9, 24))
    torch.testing.assert_close(E @ constant_direction(E), E @ solve.constant_direction(norm), atol=1e-3, rtol=0)


@pytest.mark.oracle
def test_in_the_embedded_model_the_target_becomes_its_surrogate():
    (kind,) = reference.reference("diffusers", "StableDiffusionPipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind.from_pretrained(EMOJI, local_files_only=True, safety_checker=None)
    gates = erase(pipe, "red heart", "cloud", prompts=read_prompts("emoji"))
    E, cloud = encode(pipe, ["a picture of a red heart"]), encode(pipe, ["a picture of a cloud"])
    _, value = gates.names[:2]
    wanted = 1.3 * (cloud - E) @ pipe.unet.get_submodule(value).weight.T
    assert (gates.residuals(E)[value] - wanted).norm() < 0.5 * wanted.norm()
    kept = encode(pipe, ["a picture of a crab"])
    assert gates.residuals(kept)[value].norm() < 0.1 * wanted.norm()


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(ValueError, match="Linear has none"):
        erase(torch.nn.Linear(2, 2), "red heart")
