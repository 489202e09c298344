"""What tools of others are given: a technique of eval-unlearn, and erased words that compel weighs."""

import importlib.util
from pathlib import Path

import pytest
import tiny as reference
import torch
from safetensors.torch import save_file
from test_hooks import open_gates

import cpe
from deploy.erase import layers_of
from deploy.hooks import attach, detach
from token_space import ContextGate, TokenSpace, context_gate

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a picture of a red heart"


@pytest.fixture(scope="module")
def pipe():
    (kind,) = reference.reference("diffusers", "StableDiffusionPipeline")
    pipe = kind.from_pretrained(ROOT / "emoji", dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **how):
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=1, guidance_scale=4.0, output_type="latent", generator=generator, **how).images


def gate_of(pipe) -> ContextGate:
    """A random gate upon the context, open somewhere."""
    gate = ContextGate(pipe.unet.config.cross_attention_dim, r=4, k=2)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return gate.requires_grad_(False)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_gates_are_a_technique_of_eval_unlearn(pipe, tmp_path):
    registry = pytest.importorskip("eval_unlearn.registry")
    path = ROOT / "docs/eval-unlearn/cpe_technique.py"
    assert 'cpe = "cpe_technique:CPETechnique"' in (path.parent / "pyproject.toml").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("cpe_technique", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    registry.register_technique("cpe")(module.CPETechnique)  # what the entry point does
    gates = open_gates(pipe.unet, d=pipe.unet.config.cross_attention_dim)
    save_file(cpe.to_tensors(gates), tmp_path / "gates.safetensors")
    settings = {"model_id": str(ROOT / "emoji"), "gates": [tmp_path / "gates.safetensors"], "num_inference_steps": 1}
    first, second = registry.get_technique("cpe")(**settings).generate([PROMPT] * 2, seed=3)
    attach(pipe, gates)
    expected = pipe(PROMPT, num_inference_steps=1, generator=torch.Generator().manual_seed(4)).images[0]
    detach(pipe)
    assert second.tobytes() == expected.tobytes() != first.tobytes()
    with pytest.raises(ValueError, match="what shall be erased"):
        module.CPETechnique(settings["model_id"])


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_erased_embeddings_are_gates_on_the_positive_rows_alone(pipe):
    """docs/hooks.md, "Negative prompts"."""
    space = TokenSpace(layers_of(pipe))
    gate = context_gate(space, gate_of(pipe).expand(space.layers))
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt="dog face")
    alone = drawn(pipe, prompt_embeds=gate(positive), negative_prompt_embeds=negative)
    attach(pipe, gate.expand(space.layers))
    silent = drawn(pipe, prompt_embeds=positive, negative_prompt_embeds=negative)
    detach(pipe)
    assert not torch.allclose(alone, silent)  # there the negative row is erased, too
    plain = drawn(pipe, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert not torch.allclose(alone, plain)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_words_are_erased_before_compel_weighs_them(pipe):
    """docs/hooks.md, "Weighted prompts"."""
    compel, gate = pytest.importorskip("compel"), gate_of(pipe)
    weigh = compel.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    plain, erased = (gate(weigh(text).float()) for text in (PROMPT, "a picture of a"))

    def hook(module, inputs, output):
        output.last_hidden_state = gate(output.last_hidden_state)

    handle = pipe.text_encoder.register_forward_hook(hook)
    try:
        torch.testing.assert_close(weigh(PROMPT).float(), plain, atol=1e-2, rtol=1e-2)
        half = weigh("a picture of a (red heart)0.5").float()
    finally:
        handle.remove()
    later = gate(weigh("a picture of a (red heart)0.5").float())
    assert not torch.allclose(half, later, atol=1e-2)  # which is what gates on the U-Net would read
    assert erased.shape == half.shape
