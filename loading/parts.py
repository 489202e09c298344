"""The networks of a model: where each lies, what the file calls its tensors, and reading them, strictly.

Every tensor of the config must be in the file, with its shape, and no other. Tensors are memory maps of the file.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip import CLIP, TextEncoder
from loading.configs import SD14_CONFIGS, check_config
from loading.files import UserError, opened, read_json, refuse_pickles
from loading.ldm import IGNORED, PREFIXES, ldm_names
from loading.tokens import TOKENIZER
from unet import UNet
from vae import VAE

# The networks of a model: the folder each lies in, its class, and the stem of its weights file.
PARTS: dict[str, tuple[type[nn.Module], str]] = {
    "text_encoder": (TextEncoder, "model"),
    "unet": (UNet, "diffusion_pytorch_model"),
    "vae": (VAE, "diffusion_pytorch_model"),
    "clip": (CLIP, "model"),
}
SCHEDULER = "scheduler/scheduler_config.json"
LORA = re.compile(r"\.base_layer\.|(^|[._])lora[._](A|B|up|down)\b")


class Undrawn(TorchFunctionMode):
    """Modules built in this mode draw no initial values: on the meta device, that imports half of torch's compiler."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@dataclass(frozen=True)
class Part:
    """One network of a model: how it is built, where its tensors are, and what the file calls them."""

    build: type[nn.Module]
    config: dict[str, Any]
    path: Path
    rename: Callable[[str], str | None]  # our name of a file's key; None where it is to be ignored

    def empty(self) -> nn.Module:
        """The module without any memory behind its tensors; UserError if its config describes none."""
        try:
            with torch.device("meta"), Undrawn():
                return self.build(self.config)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:  # sizes that do not divide, a missing list
            config = self.path.parent / "config.json"
            raise UserError(f"{config} describes no {self.build.__name__} that can be built ({error})") from error

    def check(self, expected: Mapping[str, Tensor]) -> dict[str, str]:
        """The file's keys by our names; UserError that names every mismatch between `expected` and the file."""
        unfit = []
        with opened(self.path) as file:
            named = {key: self.rename(key) for key in file.keys()}  # noqa: SIM118
            keys = {name: key for key, name in named.items() if name is not None}
            for name in sorted(expected.keys() & keys.keys()):
                entry, want = file.get_slice(keys[name]), list(expected[name].shape)
                shape, dtype = entry.get_shape(), entry.get_dtype()
                # LDM writes some linear layers as 1x1 convolutions; F32, BF16 and their like are floating-point.
                if shape not in (want, [*want, 1, 1]) or "F" not in dtype:
                    unfit.append(f"{keys[name]} is {shape} of {dtype}, not {want} of floating-point numbers")
        surplus = sorted(keys[name] for name in keys.keys() - expected.keys())
        missing = sorted(expected.keys() - keys.keys())
        problems = {"missing": missing, "not part of this architecture": surplus, "unfit": unfit}
        if any(problems.values()):
            said = [f"{len(found)} {what} ({', '.join(found[:3])})" for what, found in problems.items() if found]
            advice = "Likely the weights do not belong to its config.json, or the file is of another kind of model"
            if any(map(LORA.search, keys.values())):
                advice = "It holds a LoRA that is not merged: load it in diffusers, fuse_lora(), unload, and save it"
            raise UserError(f"{self.path} is not this {self.build.__name__}: tensors are {'; '.join(said)}. {advice}")
        return keys

    def read(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, wanted: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the `empty` module, or those `wanted`, by name, one after another. UserError as for `check`.

        On a CPU and in the file's own dtype they ARE the memory map: not copied, and paged in on first use.
        """
        expected = module.state_dict()
        keys = self.check(expected)
        names = sorted(expected) if wanted is None else list(wanted)
        # Opened anew for every few, so that what was read only to be converted does not stay in memory; not for each,
        # as opening a file means to read what is said there of all its tensors.
        for i in range(0, len(names), 8):
            with opened(self.path) as file:
                for name in names[i : i + 8]:
                    yield name, file.get_tensor(keys[name]).to(device, dtype).reshape(expected[name].shape)

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The network with its weights, frozen; UserError unless the file holds exactly its tensors."""
        module = self.empty()
        module.load_state_dict(dict(self.read(module, dtype, device)), strict=True, assign=True)
        return module.requires_grad_(False).eval()


def diffusers_name(key: str, part: str) -> str | None:
    """Our name of a tensor in the diffusers layout: the same, but for what older and newer libraries write."""
    if key.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: written by transformers before 4.31
        return None
    if part == "text_encoder" and key == "text_projection.weight":  # of CLIPTextModelWithProjection
        return None
    if re.match(r"(embeddings|encoder\.layers|final_layer_norm)\.", key):  # text encoders of transformers 5
        return f"text_model.{key}"
    # The autoencoder's attention, written by diffusers before 0.18.
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(\.attentions\.0)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", key)


def variants(stem: str, dtype: torch.dtype) -> tuple[str, str]:
    """The two names a weights file may have, the better one first.

    Rounding float32 to half precision gives the half-precision file bit for bit, so for float16 that one is enough;
    bfloat16 would be rounded twice.
    """
    full, half = f"{stem}.safetensors", f"{stem}.fp16.safetensors"
    return (half, full) if dtype == torch.float16 else (full, half)


def folder_part(folder: Path, part: str, dtype: torch.dtype) -> Part:
    """A network in its own folder: `config.json` and a safetensors file; UserError when one is not to be had."""
    build, stem = PARTS[part]
    config = check_config(read_json(folder / "config.json"), build, folder / "config.json")
    for name in variants(stem, dtype):
        if (folder / name).exists():
            return Part(build, config, folder / name, lambda key: diffusers_name(key, part))
    missing = f"{folder / stem}.safetensors does not exist"
    found = sorted(folder.iterdir())
    for file in found:
        if re.fullmatch(rf"{stem}\.\w+\.safetensors", file.name):  # .bf16, .non_ema
            raise UserError(f"{missing}, only the variant {file.name}: rename it to {stem}.safetensors to use it")
    for file in found:
        refuse_pickles(file)
    raise UserError(f"{missing}: is this a whole model in the diffusers layout?")


def ldm_part(path: Path, part: str) -> Part:
    """A part of a one-file checkpoint; UserError where that is none, or has no such part."""
    if part not in PREFIXES:
        raise UserError(f"{path} is a one-file checkpoint, which has no {part}: load one with `load_clip`")
    prefix, build, config = PREFIXES[part], PARTS[part][0], SD14_CONFIGS[part]
    with opened(path) as file:
        keys = [key for key in file.keys() if not IGNORED.match(key)]  # noqa: SIM118
    odd = [key for key in keys if not key.startswith(tuple(PREFIXES.values()))]
    if odd or not any(key.startswith(prefix) for key in keys):
        found = f"{odd[0]} does not belong there ({len(odd)} such tensors)" if odd else f"it has no {prefix}*"
        advice = "A model in several files is given as the folder that holds unet/, vae/ and text_encoder/"
        if any(map(LORA.search, odd)):
            advice = "It is a LoRA: fuse it into its model in diffusers, and give the folder that you save"
        raise UserError(f"{path} is not a checkpoint of Stable Diffusion 1.x in one file: {found}. {advice}")
    names = ldm_names(part, config, Part(build, config, path, str).empty().state_dict())
    ours = {theirs: name for name, theirs in names.items()}

    def rename(key: str) -> str | None:
        if not key.startswith(prefix) or IGNORED.match(key):
            return None
        if part == "text_encoder":  # text encoders of transformers 5
            key = prefix + diffusers_name(key.removeprefix(prefix), part)
        return ours.get(key, key)

    return Part(build, config, path, rename)


def wanted_files(parts: Sequence[str], dtype: torch.dtype) -> list[tuple[str, ...]]:
    """What to fetch of a repository in the diffusers layout: for each file its possible names, the best first."""
    wanted: list[tuple[str, ...]] = [("tokenizer/tokenizer_config.json", SCHEDULER)]  # or none, as the next is wanted
    wanted += [(SCHEDULER,), *((f"tokenizer/{file}", "tokenizer/tokenizer.json") for file in TOKENIZER)]
    for part in parts:
        wanted += [(f"{part}/config.json",), tuple(f"{part}/{name}" for name in variants(PARTS[part][1], dtype))]
    return wanted


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits of SHA-256 over named tensors: names, shapes, and values rounded to half precision.

    So files in any layout and both precisions of one model agree, and no edit escapes, as it would a sample.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.to("cpu", torch.float16).contiguous().numpy())
    return digest.hexdigest()[:16]
