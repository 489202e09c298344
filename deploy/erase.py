"""One call for any pipeline of diffusers that reads its prompt through `attn2`: SD 1.x, SD 2.x, SDXL, and their kin.

    gates = erase(pipe, "Brad Pitt")                 # seconds to minutes, no training; the pipeline draws without him
    save_tensors("brad-pitt.safetensors", cpe.to_tensors(gates))     # an ordinary gate file, for attach() next time

Prompts are encoded by `pipe.encode_prompt`, with one encoder or two, and the gates are solved for (solve.py). What SDXL
adds to the timestep, the pooled embedding of the prompt, is no part of cross-attention: gates do not reach it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpe import Layers, ResAG
from deploy.hooks import attach, cross_attentions, networks
from loading.prompts import PRESETS, Prompts, anchor_prompts, anchor_words, fewer, own_prompts, read_prompts, to_solve
from solve import Settings, Solver
from token_space import TokenSpace, spectral_norm


@torch.no_grad()
def encode(pipe: object, prompts: Sequence[str], batch: int = 32) -> Tensor:
    """Contexts [B, T, d] in float32, as the pipeline gives them to its U-Net."""
    parts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    device = pipe.unet.device
    settings = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return torch.cat([pipe.encode_prompt(list(part), **settings)[0].float() for part in parts])


def layers_of(pipe: object) -> Layers:
    """The projections that read the prompt, and their weights a_l; ValueError if a quantiser has taken them."""
    tensors = {}
    for path, module in cross_attentions(networks(pipe.unet)[0]).items():
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            weight = getattr(module.get_submodule(name), "weight", None)
            if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or not weight.is_floating_point():
                raise ValueError(f"{path}.{name} is quantised: erase() first, quantise after")
            if weight.is_meta:
                raise ValueError(f"{path}.{name} is offloaded: erase() first, offload after")
            tensors[f"{path}.{name}.weight"] = weight.detach().float()
    return Layers.of(tensors, spectral_norm)


def constant_direction(contexts: Tensor) -> Tensor:
    """u [d] with E u = 1 at every token, nearly: min |E u - 1|^2 + 1e-8 mean |E|^2 |u|^2 over contexts [B, T, d].

    Exact behind a LayerNorm, where `solve.constant_direction` reads it from the weights. SDXL reads the layer before:
    there it is as good as the features are constant that trained transformers carry in every token.
    """
    E = contexts.flatten(0, 1).double()
    G = E.T @ E / len(E)
    ridge = 1e-8 * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return torch.linalg.solve(G + ridge, E.mean(dim=0)).float()


def erase(
    pipe: object,
    target: str,
    surrogate: str | None = None,
    preset: str = "celebrity",
    prompts: Prompts | None = None,
    settings: Settings | None = None,
) -> ResAG:
    """Solve for gates that make the pipeline draw `surrogate` for `target`, attach them, and return them.

    Templates, sentences and anchors are those of the preset, or `prompts`. Gates attached before are replaced: to erase
    several, `attach(pipe, cpe.merge([...]))`. ValueError for a pipeline whose prompt no `attn2` reads, or whose U-Net
    is quantised or offloaded; if the gates reach less than half of their aim; and those of `Solver`. All then stays.
    """
    if not (hasattr(pipe, "encode_prompt") and hasattr(pipe, "unet")):
        raise ValueError(f"erase takes a pipeline with a U-Net and encode_prompt: {type(pipe).__name__} has none")
    style = preset.endswith("style")
    prompts, surrogate = to_solve(prompts or read_prompts(preset), style), surrogate or PRESETS[preset].surrogate
    space = TokenSpace(layers_of(pipe))
    prompts = fewer(anchor_words(prompts, [target]))
    own, instead = zip(*own_prompts([target], prompts, surrogate), strict=True)
    targets, surrogates = encode(pipe, list(own)), encode(pipe, list(instead))
    anchors = encode(pipe, ["", *anchor_prompts(prompts.general + prompts.domain, prompts.lines, prompts.per_word)])
    settings = settings or Settings.of(PRESETS[preset], style)
    solver = Solver(space, constant_direction(anchors), anchors, settings)
    gates = solver.solve(targets, surrogates).requires_grad_(False)
    n = len(prompts.lines)  # in these stands the name itself; in what follows them, other spellings
    reached = space.reached(gates, targets[:n], (1 + solver.settings.eta) * (surrogates - targets)[:n]).mean().item()
    if reached < 0.5:
        raise ValueError(
            f"the gates for {target!r} reach {reached:.0%} of their aim: train them, or choose another surrogate"
        )
    attach(pipe, gates)
    return gates
