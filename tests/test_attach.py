"""Gates on other people's pipelines: hooks on any tree with attn2.to_k and to_v, or prompt embeddings alone."""

import copy
import gc
import pickle
import re
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny as reference
import torch

import old_cpe as cpe
import weights
from loading import files
from loading.prompts import read_prompts
from unet import UNet

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "emoji"


def open_gates(projections: dict[str, torch.Tensor], seed: int = 0, scale: float = 1.0) -> cpe.ResAG:
    """Random gates, open somewhere, with corrections that are not zero."""
    d = next(iter(projections.values())).shape[1]
    generator = torch.Generator().manual_seed(seed)
    gates = cpe.ResAG({name: len(W) for name, W in projections.items()}, d, r=4, k=2)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(0, scale * parameter.shape[1] ** -0.5, generator=generator)
    return gates.requires_grad_(False)


@pytest.fixture
def unet() -> UNet:
    """Ours reads contexts through attn2.to_k and to_v as well, in `keys_values`."""
    return reference.filled(UNet(reference.UNET))


@pytest.fixture
def gates(unet) -> cpe.ResAG:
    return open_gates(projections(unet))


def projections(unet: UNet) -> dict[str, torch.Tensor]:
    return {f"{p}.{k}": getattr(a, k).weight for p, a in unet.cross_attentions().items() for k in ("to_k", "to_v")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def context(name: str = "context", rows: int = 2) -> torch.Tensor:
    return reference.draw(name, rows, 9, 32)


@torch.no_grad()
def test_attached_gates_give_the_keys_and_values_of_the_erased_model(unet, gates):
    expected = gates(context(), unet.keys_values(context()))
    cpe.attach(unet, gates)
    assert equal(unet.keys_values(context()), expected)


@torch.no_grad()
def test_detach_restores_exactly(unet, gates):
    before, plain = unet.keys_values(context()), copy.deepcopy(unet.__dict__)
    cpe.attach(unet, gates)
    assert not equal(unet.keys_values(context()), before)
    cpe.detach(unet)
    assert equal(unet.keys_values(context()), before)
    assert unet.__dict__.keys() == plain.keys()
    assert not any(module._forward_hooks for module in unet.modules())
    cpe.detach(unet)  # nothing there: nothing happens


@pytest.fixture
def calls(gates, monkeypatch) -> list[int]:
    """One entry for every evaluation of the gates."""
    calls, evaluate = [], gates.corrections
    monkeypatch.setattr(gates, "corrections", lambda E: calls.append(1) or evaluate(E))
    return calls


@torch.no_grad()
def test_a_gate_is_evaluated_once_per_context(unet, gates, calls):
    cpe.attach(unet, gates)
    first = context()
    for _ in range(3):  # denoising steps
        unet.keys_values(first)
    assert len(calls) == 1
    unet.keys_values(context("another"))
    assert len(calls) == 2


@torch.no_grad()
def test_a_new_context_never_gets_an_old_gate(unet, gates):
    """Neither in the memory of a freed one, nor written into the old tensor; nor with gates that changed."""
    expected = {}
    for name in ("a", "b", "c"):
        expected[name] = gates(context(name), unet.keys_values(context(name)))
    cpe.attach(unet, gates)
    for name in ("a", "b", "c"):
        assert equal(unet.keys_values(context(name)), expected[name])
        gc.collect()
    E = context("a")
    assert equal(unet.keys_values(E), expected["a"])
    E.copy_(context("b"))
    assert equal(unet.keys_values(E), expected["b"])
    gates.zone = 0.99
    zone = unet.keys_values(E)
    assert not equal(zone, expected["b"])
    gates.zone = 0.0
    for change in (gates.scale, gates.lora_up):  # a buffer, and a parameter
        kept = change.clone()
        assert equal(unet.keys_values(E), expected["b"])
        change.zero_()
        shut = unet.keys_values(E)
        change.copy_(kept)
        cpe.detach(unet)
        assert equal(shut, unet.keys_values(E))
        cpe.attach(unet, gates)


@torch.no_grad()
def test_threads_may_share_a_unet(unet, gates):
    expected = {name: gates(context(name), unet.keys_values(context(name))) for name in "ab"}
    cpe.attach(unet, gates)

    def wrong(name: str) -> int:
        with torch.no_grad():
            return sum(not equal(unet.keys_values(context(name)), expected[name]) for _ in range(200))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(wrong, "ab")) == [0, 0]
    finally:
        sys.setswitchinterval(before)


class Their(torch.nn.Module):
    """A module that can be compiled, with a U-Net inside."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(self, E: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keys and values."""
        return self.unet.keys_values(E)


@torch.no_grad()
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_unet_that_has_run_notices_gates(unet, gates, way):
    contexts = [context(name) for name in "ab"]
    plain = [unet.keys_values(E) for E in contexts]
    erased = [gates(E, kv) for E, kv in zip(contexts, plain, strict=True)]
    theirs = compiled = Their(unet)
    if way == "in place":
        theirs.compile(backend="eager")
    else:
        compiled = torch.compile(theirs, backend="eager")
    gates.names = [f"unet.{name}" for name in gates.names]
    for _ in range(2):
        assert all(equal(compiled(E), kv) for E, kv in zip(contexts, plain, strict=True))
        cpe.attach(compiled, gates)
        assert all(equal(compiled(E), kv) for E, kv in zip(contexts, erased, strict=True))
        cpe.detach(compiled)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_context_gate_takes_contexts_of_a_pipeline_in_half_precision(unet, dtype):
    gate = cpe.ContextGate(32, r=4, k=3)
    for parameter in gate.parameters():
        parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    E = context().to(dtype)
    erased = gate(E)
    assert erased.dtype == dtype
    assert not torch.equal(erased, E)
    torch.testing.assert_close(erased.float(), gate(E.float()), atol=0.05, rtol=0.01)


@torch.inference_mode()
def test_a_context_without_versions_is_read_once_in_every_pass(unet, gates, calls):
    plain = {name: unet.keys_values(context(name)) for name in "ab"}
    expected = {name: gates(context(name), plain[name]) for name in "ab"}
    cpe.attach(unet, gates)
    calls.clear()
    E = context("a")
    for passes in (1, 2, 3):
        assert equal(unet.keys_values(E), expected["a"])
        assert len(calls) == passes
    E.copy_(context("b"))
    assert equal(unet.keys_values(E), expected["b"])
    assert len(calls) == 4
    gates.lora_up.zero_()
    assert equal(unet.keys_values(E), plain["b"])


@torch.inference_mode()
def test_a_pass_that_broke_off_does_not_count(unet, gates, monkeypatch):
    expected = gates(context("b"), unet.keys_values(context("b")))
    cpe.attach(unet, gates)
    E, last = context("a"), unet.get_submodule(gates.names[-1])
    with monkeypatch.context() as broken:
        broken.setattr(last, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            unet.keys_values(E)
    E.copy_(context("b"))
    assert equal(unet.keys_values(E), expected)


def test_gates_without_versions_are_read_once_in_every_pass(unet, gates):
    with torch.inference_mode():
        made = open_gates(projections(unet))
        cpe.attach(unet, made)
    with torch.no_grad():
        E = context()
        first = unet.keys_values(E)
        with torch.inference_mode():
            made.lora_up.zero_()
        shut = unet.keys_values(E)
        cpe.detach(unet)
        assert not equal(first, shut)
        assert equal(shut, unet.keys_values(E))


class Layer(torch.nn.Module):
    """What attach looks for, and nothing else."""

    def __init__(self):
        super().__init__()
        self.attn2 = torch.nn.ModuleDict({name: torch.nn.Linear(32, 6, bias=False) for name in ("to_k", "to_v")})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_tree_of_modules_is_evaluated_once_in_a_pass(mode, monkeypatch):
    tree = torch.nn.Sequential(Layer(), Layer())
    gates = open_gates({f"{i}.attn2.{x}": tree[i].attn2[x].weight for i in (0, 1) for x in ("to_k", "to_v")})
    calls, evaluate = [], gates.corrections
    with mode():
        E = context()
        expected = [x(E) + evaluate(E)[f"{i}.attn2.{name}"] for i in (0, 1) for name, x in tree[i].attn2.items()]
        monkeypatch.setattr(gates, "corrections", lambda E: calls.append(1) or evaluate(E))
        cpe.attach(tree, gates)
        for _ in range(2):
            got = [projection(E) for layer in tree for projection in layer.attn2.values()]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(calls) == (1 if mode is torch.no_grad else 2)


def test_gradients_pass_through_attached_gates_again_and_again(unet, gates):
    cpe.attach(unet, gates)
    E = context().requires_grad_()
    with torch.no_grad():
        unet.keys_values(E)  # what is remembered from here has no gradient
    for _ in range(2):
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in unet.keys_values(E).values()), E)
    cpe.detach(unet)
    kv = gates(E, unet.keys_values(E))
    (expected,) = torch.autograd.grad(sum(x.sum() for x in kv.values()), E)
    torch.testing.assert_close(gradient, expected)


@torch.no_grad()
def test_every_row_of_a_guidance_batch_has_its_own_gate(unet, gates):
    uncond, cond = context("uncond", 1), context("cond", 1)
    cpe.attach(unet, gates)
    both = unet.keys_values(torch.cat([uncond, cond]))
    for i, alone in enumerate((uncond, cond)):
        for name, rows in unet.keys_values(alone).items():
            torch.testing.assert_close(both[name][i : i + 1], rows)


@torch.no_grad()
def test_attaching_again_replaces(unet, gates):
    other = open_gates(projections(unet), seed=1)
    expected = other(context(), unet.keys_values(context()))
    cpe.attach(unet, gates)
    cpe.attach(unet, other)
    assert equal(unet.keys_values(context()), expected)


@torch.no_grad()
def test_gates_take_the_dtype_of_the_model(unet, gates):
    expected = gates(context(), unet.keys_values(context()))
    cpe.attach(unet.bfloat16(), gates)
    for name, values in unet.keys_values(context().bfloat16()).items():
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.float(), expected[name], atol=0.05, rtol=0.05)


def test_gates_of_another_model_are_refused_and_nothing_is_attached(unet):
    wide = open_gates({name: torch.zeros(len(W), 33) for name, W in projections(unet).items()})
    with pytest.raises(ValueError, match="another shape"):
        cpe.attach(unet, wide)
    some = open_gates(dict(list(projections(unet).items())[:-1]))
    with pytest.raises(ValueError, match="to_v is in one of the two only"):
        cpe.attach(unet, some)
    gates = open_gates(projections(unet))
    for wrong in ((unet, cpe.ContextGate(32)), (SimpleNamespace(unet=unet), gates)):  # a whole pipeline, say
        with pytest.raises(ValueError, match="takes a U-Net and a ResAG"):
            cpe.attach(*wrong)
    assert not any(module._forward_hooks for module in unet.modules())


@torch.no_grad()
def test_an_attached_unet_survives_a_pickle(unet, gates):
    cpe.attach(unet, gates)
    again = pickle.loads(pickle.dumps(unet))
    assert equal(again.keys_values(context()), unet.keys_values(context()))


# --- One gate for the context --------------------------------------------------------------------------------------


def objective_of(unet: UNet) -> cpe.Objective:
    return cpe.Objective({k: t.double() for k, t in unet.state_dict().items() if ".attn2." in k and "bias" not in k})


@torch.no_grad()
def test_the_context_gate_of_merged_gates_is_the_least_squares_answer_to_every_layer(unet):
    """Against torch.linalg.lstsq on all layers stacked, token by token."""
    objective = objective_of(unet)
    merged = cpe.merge([open_gates(objective.W, seed) for seed in range(3)]).double()
    E = context().double()
    corrections = merged.corrections(E)
    root = {name: weight**0.5 for name, weight in objective.w.items()}
    stacked = torch.cat([root[name] * W for name, W in objective.W.items()])  # [sum d_l, d]
    asked = torch.cat([root[name] * corrections[name] for name in objective.W], dim=-1)
    expected = torch.linalg.lstsq(stacked, asked.flatten(0, 1).T).solution.T.view_as(E)
    torch.testing.assert_close(objective.context_gate(merged)(E) - E, expected, atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_the_context_gate_of_an_expanded_one_is_itself(unet):
    objective = objective_of(unet)
    original = cpe.ContextGate(32, r=4, k=3).double()
    for parameter in original.parameters():
        parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    E = context().double()
    again = objective.context_gate(original.expand(objective.W).double())
    torch.testing.assert_close(again(E), original(E), atol=1e-9, rtol=1e-7)


# --- diffusers -----------------------------------------------------------------------------------------------------


def opened(dtype: torch.dtype):
    """The embedded model, opened by diffusers."""
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    kwargs = {"torch_dtype": dtype, "local_files_only": True, "safety_checker": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline.from_pretrained(EMOJI, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return opened(torch.float32)


def emoji_gates() -> tuple[weights.Model, cpe.Objective, cpe.ResAG]:
    model = weights.load_model("emoji")
    objective = cpe.Objective(model.cross_attention())
    return model, objective, open_gates(objective.W, scale=0.3)


def trained_gates(model: weights.Model) -> cpe.ResAG:
    """Gates that a few steps of the preset's recipe have trained on PROMPT, with its margin."""
    recipe, prompts = cpe.PRESETS["emoji"].scaled(0.05), read_prompts("emoji")
    few = cpe.Prompts(prompts.templates, prompts.general[:4], prompts.domain[:20])
    one = cpe.constant_direction(model.text_encoder.text_model.final_layer_norm)
    data = cpe.prepare(recipe, few, ["red heart"], model.encode, model.encode, one)
    trainer = cpe.Trainer(cpe.Objective(model.cross_attention()), data, recipe)
    for _ in trainer.steps():
        pass
    return trainer.gates.requires_grad_(False)


def their_latents(pipe, **prompt) -> torch.Tensor:
    """4 steps of DDIM, guidance 4, from the noise of our seed 3."""
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(3)).to(pipe.unet.dtype)
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent", "latents": noise}
    return pipe(**prompt, **settings).images


PROMPT = "a picture of a red heart"
LATENTS = (16, 8, 8)


@pytest.mark.oracle
def test_attached_to_diffusers_equals_our_pipeline(pipe):
    model, _, gates = emoji_gates()
    before = their_latents(pipe, prompt=PROMPT)
    cpe.attach(pipe.unet, gates)
    gated = their_latents(pipe, prompt=PROMPT)
    cpe.detach(pipe.unet)
    *_, ours = cpe.denoise(model, [PROMPT], [3], gates, steps=4, guidance_scale=4.0)
    assert reference.difference(ours, gated) <= 1e-5
    assert torch.equal(their_latents(pipe, prompt=PROMPT), before)
    assert reference.difference(before, gated) > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_trained_gates_on_diffusers_are_our_pipeline_up_to_rounding(dtype, bound):
    pipe, model = opened(dtype), weights.load_model("emoji", dtype)
    gates = trained_gates(weights.load_model("emoji")).to(dtype)
    before = their_latents(pipe, prompt=PROMPT)
    cpe.attach(pipe.unet, gates)
    gated = their_latents(pipe, prompt=PROMPT)
    *_, ours = cpe.denoise(model, [PROMPT], [3], gates, steps=4, guidance_scale=4.0)
    assert reference.difference(ours, gated) <= bound * gated.abs().max()
    assert reference.difference(before, gated) > 0.1


@pytest.mark.oracle
@torch.no_grad()
def test_a_context_gate_gives_diffusers_its_prompt_embeddings(pipe):
    model, objective, gates = emoji_gates()
    gate = objective.context_gate(gates)
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    gated = their_latents(pipe, prompt_embeds=gate(cond), negative_prompt_embeds=gate(uncond))
    *_, ours = cpe.denoise(model, [PROMPT], [3], gate, steps=4, guidance_scale=4.0)
    assert reference.difference(ours, gated) <= 1e-5
    cpe.attach(pipe.unet, gate.expand(objective.W))
    assert reference.difference(their_latents(pipe, prompt=PROMPT), gated) <= 1e-4
    cpe.detach(pipe.unet)


@pytest.mark.oracle
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_diffusers_unet_gates_are_evaluated_once_in_a_pass(unet, gates, calls, mode):
    theirs = reference.their_unet(reference.UNET, unet)
    cpe.attach(theirs, gates)
    with mode():
        E, latents = context(), reference.draw("latents", 2, 4, 8, 8)
        kv = gates(E, unet.keys_values(E))
        calls.clear()
        for t in (800, 400, 1):
            assert reference.difference(unet(latents, t, kv), theirs(latents, t, E).sample) <= 1e-4
    assert len(calls) == (1 if mode is torch.no_grad else 3)


@pytest.mark.oracle
def test_gates_refuse_layers_whose_keys_and_values_are_one_product(unet, gates):
    theirs = reference.their_unet(reference.UNET, unet)
    latents = reference.draw("latents", 2, 4, 8, 8)
    cpe.attach(theirs, gates)
    theirs.fuse_qkv_projections()
    with torch.no_grad(), pytest.raises(ValueError, match=r"fused into one: call unfuse_qkv_projections\(\)"):
        theirs(latents, 800, context())
    cpe.detach(theirs)
    with pytest.raises(ValueError, match="fused into one"):
        cpe.attach(theirs, gates)
    theirs.unfuse_qkv_projections()
    cpe.attach(theirs, gates)
    with torch.no_grad():
        erased = unet(latents, 800, gates(context(), unet.keys_values(context())))
        assert reference.difference(erased, theirs(latents, 800, context()).sample) <= 1e-4


README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = "".join(
    re.findall(r"^    from diffusers.*?(?=^\S)|^    cpe\.detach.*?(?=^\S)", README, re.MULTILINE | re.DOTALL)
)


@pytest.mark.oracle
def test_the_recipe_for_diffusers_runs_as_it_stands(tmp_path, monkeypatch):
    reference.reference("diffusers", "StableDiffusionPipeline")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").symlink_to(EMOJI)
    objective = emoji_gates()[1]
    context_gate = cpe.ContextGate(192, r=4, k=2)
    for parameter in context_gate.parameters():  # strong enough to be seen
        parameter.data.normal_(0, 3 * parameter.shape[1] ** -0.5, generator=torch.Generator().manual_seed(0))
    files.save_tensors("gates/red-heart.safetensors", cpe.to_tensors(context_gate.expand(objective.W)))
    names, hooks, images = {}, [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for recipe in textwrap.dedent(RECIPES).split("cpe.detach"):
            torch.manual_seed(0)  # the pipeline's noise
            exec(f"cpe.detach{recipe}" if names else recipe, names)
            hooks.append(sum(len(module._forward_hooks) for module in names["pipe"].unet.modules()))
            images.append(names["image"])
    assert hooks == [2 * 7, 0]
    assert [image.size for image in images] == [(64, 64)] * 2
    torch.manual_seed(0)
    cpe.detach(names["pipe"].unet)
    images.append(names["pipe"](PROMPT, num_inference_steps=20, guidance_scale=4).images[0])
    hooked, embedded, plain = (torch.tensor(list(image.convert("L").tobytes())).float() for image in images)
    assert (hooked - plain).abs().mean() > 20  # of 255
    assert (hooked - embedded).abs().mean() < 1  # expanded from one, so that the answer for all layers is exact
