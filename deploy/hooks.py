"""Gates on other people's networks: forward hooks on the U-Nets, ControlNets and motion U-Nets of diffusers.

    attach(pipe, gates)      # every part of a pipeline that reads the prompt; or one network: attach(pipe.unet, gates)
    detach(pipe)             # as before, to the bit; the weights were never touched

Built on torch's hooks alone: any tree of modules with layers `....attn2` whose `to_k` and `to_v` read the prompt will
do. One rule holds: **a network that has gates draws erased pictures, or raises**. So hooks follow layers that a tool
replaces; every layer counts, in each pass, that both of its projections ran with their hooks; a state dict hands out no
weights without their gates; nothing is remembered from one pass to the next. docs/hooks.md lists the tools.
"""

import copy
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpe import ResAG

PROJECTIONS = ("to_k", "to_v")
MOVING = threading.Lock()  # of hooks to another layer
NOT_WEIGHTS = (
    "gates are hooks, not weights: a copy of these weights would draw what they erase. detach() first and attach() to "
    "the copy, or `bake` a model of plain weights; enable_sequential_cpu_offload() comes before attach()"
)


def thread() -> int:
    """Who runs this pass: threads may share a network. In a compiled graph there is one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def constants(gates: ResAG, device: torch.device) -> ResAG:
    """What evaluates the gates, without parameters: a graph to be exported knows those of the network alone."""
    twin = copy.copy(gates)
    twin.__dict__ |= {"_parameters": {}, "_buffers": {}, "_modules": {}}
    for name in ("w_qs", "scaler", "scale"):
        setattr(twin, name, getattr(gates, name).detach().to(device))
    return twin


class Layer:
    """The hooks of one `attn2`: in every pass, both of its projections must have run with their gates.

    That sees whatever goes round them, known by name or not. `passes`, by thread: which ran, what the gates said.
    """

    def __init__(self, path: str, gates: ResAG):
        self.path, self.gates, self.passes = path, gates, {}

    def begin(self, module: nn.Module, inputs: tuple) -> None:
        """Before the layer: nothing has run."""
        self.passes[thread()] = {}

    def end(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """After the layer; ValueError if a projection did not run."""
        if not self.passes.pop(thread(), {}).keys() >= set(PROJECTIONS):
            processor = type(getattr(module, "processor", None)).__name__
            raise ValueError(
                f"the gates were not asked at {self.path}: {processor} does not call its to_k and to_v. Call "
                "unfuse_qkv_projections() if they were fused, set_default_attn_processor() otherwise, or `bake` instead"
            )

    def gated(self, kind: str, context: Tensor) -> Tensor:
        """s g H [N, B, T, d] of a context [B, T, d] of any dtype, for a projection that runs: both share it."""
        ran = self.passes.get(thread(), {})
        ran[kind] = True
        if ran.get("context") is not context:
            ran["context"], ran["gated"] = context, self.gates.gated(context.to(self.gates.w_qs))
        return ran["gated"]


class Projection:
    """The hook of one `to_k` or `to_v`: W_l E becomes W_l E + R_l(E).

    D_l and U_l are its attributes: torch.compile makes one graph for all blocks of a shape, not one for each number l.
    """

    def __init__(self, layer: Layer, kind: str, down: Tensor, up: Tensor):
        self.layer, self.kind, self.down, self.up = layer, kind, down, up
        self.module = None  # that bears the hook

    def follow(self, attention: nn.Module) -> None:
        """Hang the hook on what is the projection now: PEFT wraps it, quantisers replace it."""
        with MOVING:
            for module in {*attention.modules(), self.module or attention}:
                unhook(module, lambda hook: isinstance(hook, Projection) and hook.kind == self.kind)
            self.module = getattr(attention, self.kind)
            self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """What torch calls after the projection; the residual comes in the output's dtype."""
        gated = self.layer.gated(self.kind, inputs[0])
        # R_l(E) = sum_n s g H D_l U_l   [B, T, d_l], as `ResAG.residual`
        return output + torch.einsum("nbtk,nkw->btw", gated @ self.down.unsqueeze(1), self.up).to(output)


class Network:
    """The hook of the whole: before every pass, hooks follow projections that were replaced."""

    def __init__(self, projections: list[tuple[nn.Module, Projection]], alone: bool):
        self.projections, self.alone = projections, alone  # attached without a ControlNet beside it

    def __call__(self, network: nn.Module, inputs: tuple, given: dict[str, object]) -> None:
        """What torch calls; ValueError when a whole layer was replaced, or anything while torch.compile looks."""
        residual = given.get("mid_block_additional_residual", (*inputs, *[None] * 10)[9])  # by name, or tenth
        if self.alone and residual is not None:
            raise ValueError("a ControlNet draws beside this U-Net, not attached with it: attach() to their pipeline")
        for attention, hook in self.projections:
            moved = getattr(attention, hook.kind) is not hook.module
            if network.get_submodule(hook.layer.path) is not attention or (moved and torch.compiler.is_compiling()):
                raise ValueError(f"{hook.layer.path} was replaced, and its gates are gone: call attach() again")
            if moved:
                hook.follow(attention)


class Refused:
    """Stands in a state dict for a weight that must not be copied without its gates; any use of it is a ValueError."""

    def refuse(self, *_: object) -> None:
        """ValueError, always."""
        raise ValueError(NOT_WEIGHTS)

    __getattr__ = __reduce_ex__ = refuse


def withhold(layer: nn.Module, state: dict, prefix: str, *_: object) -> None:
    """After `layer.state_dict()`: keys stay, for who loads a LoRA, and Parameters, for who traces; weights do not."""
    for key, value in state.items():
        mine = key.startswith(tuple(f"{prefix}{kind}." for kind in PROJECTIONS)) and ".lora_" not in key
        if mine and not isinstance(value, nn.Parameter):
            state[key] = Refused()


def cross_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that read the prompt, by path. Motion modules have an `attn2` that reads none."""
    return {
        path.replace("_orig_mod.", ""): module
        for path, module in network.named_modules()
        if all(isinstance(getattr(module, kind, None), nn.Module) for kind in PROJECTIONS)
        and getattr(module, "is_cross_attention", path.endswith("attn2"))
        and getattr(module, "add_k_proj", None) is None  # reads the prompt instead, in Kandinsky and DeepFloyd IF
    }


def networks(model: object) -> list[nn.Module]:
    """What reads the prompt, of a pipeline or itself; ValueError if nothing does. What was compiled is forgotten."""
    parts = model.components.values() if hasattr(model, "components") else [model]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    inner = [getattr(module, "get_base_model", lambda module=module: module)() for module in modules]  # PEFT's wrapper
    each = [getattr(net, "_orig_mod", net) for module in inner for net in getattr(module, "nets", [module])]
    if not (found := [net for net in each if cross_attentions(net)]):
        raise ValueError("attach takes a pipeline or a network with layers `attn2` that read the prompt: this has none")
    if "torch._dynamo" in sys.modules:  # what was compiled before would not notice hooks
        torch.compiler.reset()
    return found


def unhook(module: nn.Module, ours: Callable[[object], bool]) -> None:
    """Take away the hooks of a module that are ours."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_hooks):
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            del hooks[key]


def check(layers: dict[str, nn.Module], network: nn.Module, gates: ResAG) -> None:
    """ValueError unless the gates are for this network. A ControlNet is one without the way up."""
    if hasattr(network, "position_net"):
        raise ValueError("GLIGEN reads phrases beside `attn2`, where gates do not see them: use a model without it")
    found = {f"{path}.{kind}" for path in layers for kind in PROJECTIONS}
    lower = {name for name in gates.names if not name.startswith("up_blocks.")}
    wanted = set(gates.names) if hasattr(network, "up_blocks") or not lower else lower
    if odd := sorted(found ^ wanted):
        raise ValueError(f"these gates are of another model: {odd[0]} is in one of the two only")
    for name in found:
        layer = network.get_submodule(name)
        shape = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        if shape != (gates.w_qs.shape[1], gates.widths[name]):
            raise ValueError(f"these gates are of another model: {name} has another shape")


def attach(model: object, gates: ResAG) -> None:
    """Erase from a diffusers pipeline, or from one network of it; N concepts at once if the gates are merged ones.

    They compute where the network lies now: pipe.to(device) comes first. Gates attached before are replaced. ValueError
    when the gates are for another model, and then nothing has changed; at the next call if a layer goes round them.
    Gradients go through the gates to the prompt, none to them. A ContextGate needs no hooks: give its output as
    `prompt_embeds`.
    """
    if not isinstance(gates, ResAG):
        raise ValueError("attach takes a ResAG: give a ContextGate the prompt's embeddings instead, or expand() it")
    found = networks(model)
    for network in found:
        check(cross_attentions(network), network, gates)
    detach(model)
    shares = dict(zip(gates.names, zip(gates.lora_down, gates.lora_up, strict=True), strict=True))
    alone = all(hasattr(network, "up_blocks") for network in found)
    for network in found:
        places = [parameter.device for parameter in network.parameters() if parameter.device.type != "meta"]
        projections, device = [], next(iter(places), gates.w_qs.device)  # all is meta where accelerate offloads
        network.register_forward_pre_hook(Network(projections, alone), with_kwargs=True)
        fixed = constants(gates, device)
        for path, module in cross_attentions(network).items():
            layer = Layer(path, fixed)
            module.register_forward_pre_hook(layer.begin)
            module.register_forward_hook(layer.end)
            module.register_state_dict_post_hook(withhold)
            for kind in PROJECTIONS:
                down, up = (part.detach().to(device) for part in shares[f"{path}.{kind}"])
                projections.append((module, Projection(layer, kind, down, up)))
                projections[-1][1].follow(module)


def detach(model: object) -> None:
    """Take away what `attach` hung there, if anything, wherever a tool has carried it."""
    ours = (Network, Layer, Projection)
    for module in [module for network in networks(model) for module in network.modules()]:
        unhook(module, lambda hook: hook is withhold or isinstance(getattr(hook, "__self__", hook), ours))
