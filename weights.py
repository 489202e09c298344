"""Models: official weights in our networks, read strictly, part by part, when they are first used.

    model = load_model("sd14")             # finds (or downloads) the files; reads no tensor yet
    context = model.encode(["a cat"])      # builds the text encoder, and only that
    weights = model.cross_attention()      # all that training needs of the U-Net; never builds one

A model is a folder in the diffusers layout (`tokenizer/`, `text_encoder/`, `unet/`, `vae/`, `scheduler/`, sometimes
`clip/`), or one `.safetensors` checkpoint in the original layout (LDM). Every tensor of its config must be there with
its shape, and no other. Tensors are memory maps. What stands behind this file is in loading/; whatever a user can mend
raises `UserError`.
"""

import difflib
import filecmp
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip import BOS, CLIP, EOS, TextEncoder, Tokenizer
from loading.configs import SD14_CONFIGS, check_config, check_schedule
from loading.files import Unwritten, UserError, opened, read_json, refuse_pickles, shipped, temporary_name
from loading.files import save_tensors, write_text
from loading.hub import SD14, fetch, is_repository, snapshot
from loading.ldm import IGNORED, PREFIXES, ldm_names
from loading.tokens import TOKENIZER, read_tokenizer, tokenizer_files
from sampler import Schedule
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
CLIP_LARGE = "openai/clip-vit-large-patch14"

# --- One network -------------------------------------------------------------------------------------------------


class Undrawn(TorchFunctionMode):
    """Modules built in this mode draw no initial values: on the meta device, that imports half of torch's compiler."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@dataclass(frozen=True)
class Part:
    """One network of a model: how it is built, where its tensors are, and what the file calls them.

    `rename` gives our name of a file's key, or None where it is to be ignored.
    """

    build: type[nn.Module]
    config: dict[str, Any]
    path: Path
    rename: Callable[[str], str | None]

    def empty(self) -> nn.Module:
        """The module without any memory behind its tensors."""
        with torch.device("meta"), Undrawn():
            return self.build(self.config)

    def keys(self) -> dict[str, str]:
        """Our name -> the file's key, of every tensor that is this part's; UserError when one is there twice."""
        names: dict[str, str] = {}
        with opened(self.path) as file:
            for key in file.keys():  # noqa: SIM118
                name = self.rename(key)
                if name in names:
                    raise UserError(f"{self.path}: the tensor {key} is there twice, under two names: get it again")
                if name is not None:
                    names[name] = key
        return names

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """UserError that names every kind of mismatch between the tensors `expected` and those in the file."""
        keys, unfit = self.keys(), []
        with opened(self.path) as file:
            for name in sorted(expected.keys() & keys.keys()):
                entry = file.get_slice(keys[name])
                shape, want = entry.get_shape(), list(expected[name].shape)
                if shape != want and shape != [*want, 1, 1]:  # LDM writes some linear layers as 1x1 convolutions
                    unfit.append(f"{keys[name]} is {shape}, not {want}")
                elif "F" not in entry.get_dtype():  # F32, BF16 and their like; not I64, BOOL
                    unfit.append(f"{keys[name]} holds {entry.get_dtype()}, not floating-point numbers")
        problems = {
            "missing": sorted(expected.keys() - keys.keys()),
            "not part of this architecture": sorted(keys[name] for name in keys.keys() - expected.keys()),
            "unfit": unfit,
        }
        lines = [
            f"{len(found)} tensor{'s' * (len(found) > 1)} {what}: {', '.join(found[:3])}{', ...' * (len(found) > 3)}"
            for what, found in problems.items()
            if found
        ]
        if lines:
            advice = "Likely the weights do not belong to its config.json, or the file is of another kind of model"
            if any(re.search(r"\.base_layer\.|lora_(A|B|up|down)\b", key) for key in keys.values()):
                advice = "It holds a LoRA that is not merged: load it in diffusers, fuse_lora(), unload, and save it"
            raise UserError(f"{self.path} is not this {self.build.__name__}: {'; '.join(lines)}. {advice}")

    def stream(
        self, expected: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors `expected` names, in its shapes, one after another; call `check` first.

        On a CPU and in the file's own dtype they ARE the memory map: not copied, and paged in on first use.
        """
        keys = self.keys()
        for name, like in expected.items():
            # Opened anew for each, so that what was read only to be converted does not stay in memory.
            with opened(self.path) as file:
                tensor = file.get_tensor(keys[name]).to(device, dtype).reshape(like.shape)
            yield name, tensor

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The network with its weights, frozen; UserError unless the file holds exactly its tensors."""
        module = self.empty()
        expected = module.state_dict()
        self.check(expected)
        module.load_state_dict(dict(self.stream(expected, dtype, device)), strict=True, assign=True)
        return module.requires_grad_(False).eval()


def diffusers_name(key: str, part: str) -> str | None:
    """Our name of a tensor in the diffusers layout: the same, but for what older or newer libraries wrote.

    This is the complete list of exceptions.
    """
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
    for file in sorted(folder.iterdir()):
        if file.name.endswith(".safetensors.index.json"):
            advice = "save it again in one file, in diffusers with save_pretrained(..., max_shard_size='10GB')"
            raise UserError(f"{file}: this network comes in several files, which are not read: {advice}")
        if re.fullmatch(rf"{stem}\.\w+\.safetensors", file.name):  # .bf16, .non_ema
            raise UserError(f"{missing}, only the variant {file.name}: rename it to {stem}.safetensors to use it")
    for file in sorted(folder.iterdir()):
        refuse_pickles(file)
    raise UserError(f"{missing}: is this a whole model in the diffusers layout?")


def ldm_part(path: Path, part: str) -> Part:
    """A part of a one-file checkpoint; UserError where that is none, or has no such part."""
    if part not in PREFIXES:
        raise UserError(f"{path} is a one-file checkpoint, which has no {part}: load one with `load_clip`")
    with opened(path) as file:
        keys = [key for key in file.keys() if not IGNORED.match(key)]  # noqa: SIM118
    odd = [key for key in keys if not key.startswith(tuple(PREFIXES.values()))]
    if odd or not any(key.startswith(PREFIXES[part]) for key in keys):
        found = f"{odd[0]} does not belong there ({len(odd)} such tensors)" if odd else f"it has no {PREFIXES[part]}*"
        advice = "A model in several files is given as the folder that holds unet/, vae/ and text_encoder/"
        if any(re.search(r"lora_(A|B|up|down)\b", key) for key in odd):
            advice = "It is a LoRA: fuse it into its model in diffusers, and give the folder that you save"
        raise UserError(f"{path} is not a checkpoint of Stable Diffusion 1.x in one file: {found}. {advice}")
    build, config = PARTS[part][0], SD14_CONFIGS[part]
    ours = {theirs: name for name, theirs in ldm_names(part, config, Part(build, config, path, str).empty().state_dict()).items()}

    def rename(key: str) -> str | None:
        if not key.startswith(PREFIXES[part]) or IGNORED.match(key):
            return None
        if part == "text_encoder":  # text encoders of transformers 5
            key = PREFIXES[part] + diffusers_name(key.removeprefix(PREFIXES[part]), part)
        return ours.get(key, key)

    return Part(build, config, path, rename)


def wanted_files(parts: Sequence[str], dtype: torch.dtype, repository: str = SD14) -> list[tuple[str, ...]]:
    """What to fetch of a repository in the diffusers layout: for each file its possible names, the best first."""
    wanted: list[tuple[str, ...]] = [(SCHEDULER,)]
    wanted += [(f"tokenizer/{file}", "tokenizer/tokenizer.json") for file in TOKENIZER]
    wanted += [("tokenizer/tokenizer_config.json",)] * (repository != SD14)  # SD 1.4's says nothing new
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


# --- The model ---------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A Stable Diffusion model whose parts are read when they are first used, and then kept in memory.

    `path` is a folder in the diffusers layout or a one-file checkpoint; `repository` is where missing files of a
    folder may be fetched from. Whatever reads a file raises UserError when it is missing, damaged, or asks for what
    is not implemented.
    """

    name: str
    path: Path
    dtype: torch.dtype
    device: torch.device
    repository: str | None = None
    parts: dict[str, Part] = field(default_factory=dict, repr=False)
    edits: frozenset[str] = frozenset()  # parts that are no longer as their files have them

    def part(self, name: str) -> Part:
        """Where a network is, found and its config checked, but not read; UserError if it does not fit the others."""
        if name not in self.parts:
            if self.path.is_file():
                found = ldm_part(self.path, name)
            else:
                if self.repository and name != "clip":
                    fetch(self.repository, wanted_files([name], self.dtype, self.repository))
                found = folder_part(self.path / name, name, self.dtype)
            check_agreement(self.parts | {name: found}, self.name)
            self.parts[name] = found
        return self.parts[name]

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text tower of CLIP."""
        return self.part("text_encoder").load(self.dtype, self.device)

    @cached_property
    def unet(self) -> UNet:
        """The U-Net."""
        return self.part("unet").load(self.dtype, self.device)

    @cached_property
    def vae(self) -> VAE:
        """The autoencoder."""
        return self.part("vae").load(self.dtype, self.device)

    @property
    def has_clip(self) -> bool:
        """Whether it is a folder with a CLIP of its own."""
        return (self.path / "clip").is_dir()

    @cached_property
    def clip(self) -> CLIP:
        """The CLIP model that evaluates this model's images; UserError if it brings none: `load_clip` has others."""
        if not self.has_clip:
            raise UserError(f"{self.name} has no clip/ folder to evaluate with: name a CLIP model, {CLIP_LARGE} say")
        return self.part("clip").load(self.dtype, self.device)

    @property
    def tokens(self) -> int:
        """How many tokens T the text encoder reads: 77."""
        return self.part("text_encoder").config.get("max_position_embeddings", 77)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return read_tokenizer(self.tokenizer_folder, self.tokens)

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Where vocab.json and merges.txt are: a one-file checkpoint has none, SD 1.4's serves every SD 1.x."""
        if self.path.is_dir():
            return self.path / "tokenizer"
        for folder in (self.path.parent / "tokenizer", self.path.parent):
            if all((folder / file).is_file() for file in TOKENIZER):
                return folder
        try:
            return fetch(SD14, [(f"tokenizer/{file}",) for file in TOKENIZER]) / "tokenizer"
        except UserError as error:
            advice = f"put {' and '.join(TOKENIZER)} beside it"
            raise UserError(f"{self.path} brings no tokenizer: {advice}. (SD 1.4's: {error})") from error

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule. UserError, or a warning, as of `check_schedule`."""
        path = self.path / SCHEDULER
        config = SD14_CONFIGS["scheduler"] if self.path.is_file() else read_json(path)
        return Schedule(check_schedule(config, path))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Context E [B, 77, d] of B prompts.

        UserError when the tokenizer is of another model, ValueError for a prompt that is not Unicode text.
        """
        tower, known = self.text_encoder, self.part("text_encoder").config["vocab_size"]
        tokens = self.tokenizer(prompts, self.tokens)
        if (tokens >= known).any():
            raise UserError(f"{self.tokenizer_folder} is of another model: its text encoder knows {known} tokens")
        return torch.cat([tower(batch) for batch in tokens.to(self.device).split(batch_size)])

    def with_unet(self, changed: dict[str, Tensor]) -> "Model":
        """The same model, other parts shared, with tensors of its U-Net replaced, by name; errors as for `edited`."""
        return self.edited("unet", changed)

    def with_text_encoder(self, changed: dict[str, Tensor]) -> "Model":
        """The same with tensors of its text encoder replaced, and a fingerprint of its own; errors as for `edited`."""
        twin = self.edited("text_encoder", changed)
        twin.fingerprint = fingerprint_of(sorted(twin.text_encoder.state_dict().items()))  # as when saved and loaded
        return twin

    def edited(self, name: str, changed: dict[str, Tensor]) -> "Model":
        """A twin whose part `name` has some tensors replaced; what is not replaced is shared, not copied.

        `changed` has tensors of the shapes that they have there, under the names of that part's `state_dict`. KeyError
        for a tensor that the part does not have, RuntimeError for one of another shape.
        """
        twin, state = copy(self), dict(getattr(self, name).state_dict())
        if unknown := changed.keys() - state.keys():
            raise KeyError(f"the model's {name} has no {sorted(unknown)[0]}")
        network = self.part(name).empty()
        network.load_state_dict(state | {key: W.to(state[key]) for key, W in changed.items()}, assign=True)
        setattr(twin, name, network.eval().requires_grad_(False))
        twin.edits = self.edits | {name}
        return twin

    def cross_attention(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights of to_q, to_k, to_v and to_out.0 of every cross-attention layer, under the checkpoint's keys.

        to_k and to_v are [C, d], the others [C, C]; in the order of `UNet.cross_attentions`. Nothing else of the U-Net
        is read, and none is built; of a U-Net that is in memory, perhaps edited, they are the present ones.
        """
        part = self.part("unet")
        module = part.empty()
        part.check(module.state_dict())  # of the header, so free
        expected = {
            f"{path}.{matrix}.weight": layer.get_submodule(matrix).weight
            for path, layer in module.cross_attentions().items()
            for matrix in ("to_q", "to_k", "to_v", "to_out.0")
        }
        if "unet" in self.__dict__:
            state = self.unet.state_dict()
            return {key: state[key].to(dtype) for key in expected}
        return dict(part.stream(expected, dtype, self.device))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell text encoders apart: what gates were trained for, what was cached with it.

        See `fingerprint_of`; takes half a second for SD 1.4. The U-Net stays out: its fine-tunes share the text
        encoder, and gates carry over to them.
        """
        part = self.part("text_encoder")
        expected = part.empty().state_dict()
        part.check(expected)
        in_order = {name: expected[name] for name in sorted(expected)}
        return fingerprint_of(part.stream(in_order, torch.float16, torch.device("cpu")))


def check_agreement(parts: Mapping[str, Part], name: str) -> None:
    """UserError unless the parts of a model fit together."""
    for one, key, other, other_key in (
        ("unet", "cross_attention_dim", "text_encoder", "hidden_size"),
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "out_channels", "vae", "latent_channels"),
    ):
        if one in parts and other in parts and parts[one].config[key] != parts[other].config[other_key]:
            values = f"{key} is {parts[one].config[key]}, {other_key} is {parts[other].config[other_key]}"
            raise UserError(f"{name}: {one} and {other} do not fit together: {values}")


# --- Finding models ----------------------------------------------------------------------------------------------

NAMED = ("sd14", "emoji")
MODELS = "sd14, emoji, owner/name of the hub, a folder in the diffusers layout, or one .safetensors checkpoint"


def nickname(name: str | Path) -> str | None:
    """Which of the models with a short name this is: "sd14", "emoji", or None, also where a local folder is so named."""
    folder = Path(name)
    local = (folder / "unet").is_dir() and not (name == "emoji" and folder.resolve() == shipped("emoji"))
    return str(name) if str(name) in NAMED and not local else None


def find_model(name: str) -> tuple[Path | None, str | None]:
    """The path of a model on this machine, or its repository on the hub: one of the two. UserError if it is none."""
    if short := nickname(name):
        return (shipped("emoji"), None) if short == "emoji" else (None, SD14)
    path = Path(os.path.expanduser(name))
    refuse_pickles(path)
    if os.path.isdir(path):
        return snapshot(path), None
    if os.path.isfile(path) and path.suffix == ".safetensors":
        return path, None
    if not os.path.exists(path) and is_repository(name):
        return None, name
    said = f"{name} is no model" if os.path.exists(path) else f"there is no model {name}"
    near = "".join(f"did you mean {known}? " for known in difflib.get_close_matches(name.lower(), NAMED, 1))
    raise UserError(f"{said}: {near}--model takes {MODELS}")


def check_device(device: str | torch.device) -> torch.device:
    """The device; UserError if this machine or this torch has none of that kind."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0]  # torch goes on with all that it was built without
        there = ["cpu", *(["cuda"] * torch.cuda.is_available()), *(["mps"] * torch.backends.mps.is_available())]
        said = f"the device {device} cannot be used ({reason}): available here: {', '.join(there)}"
        raise UserError(f"{said}. Leave --device out, or install a torch that is built for that device") from error
    return device


def load_model(
    name: str | Path = "sd14",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    parts: Sequence[str] = ("text_encoder", "unet", "vae"),
) -> Model:
    """The model "sd14", "emoji", owner/name of the hub, or at a path; a part is read when it is first used.

    The files of `parts` are found, or downloaded, and their configs checked at once, so that what is missing shows
    before any work is done. UserError says what to do about it.
    """
    device = check_device(device)
    path, repository = find_model(str(name))
    if path is None:
        path = fetch(repository, wanted_files(parts, dtype, repository))
    model = Model(str(name), path, dtype, device, repository)
    for part in parts:
        model.part(part)
    return model


def expected_unet(name: str) -> UNet:
    """The U-Net of "sd14" or "emoji", with no memory behind its tensors: what gates must fit. Downloads nothing."""
    if name == "sd14":
        return Part(UNet, SD14_CONFIGS["unet"], Path(), str).empty()
    return folder_part(shipped(name) / "unet", "unet", torch.float32).empty()


def load_clip(
    name: str | Path = CLIP_LARGE, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[CLIP, Tokenizer]:
    """A CLIP model and its tokenizer, from a folder or the Hugging Face repository of any `openai/clip-vit-*`.

    UserError if there is no such folder or repository, or it holds something else.
    """
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        if not is_repository(str(name)):
            raise UserError(f"there is no CLIP model {name}: give a folder, or a repository as in {CLIP_LARGE}")
        folder = fetch(str(name), [("config.json",), *((file,) for file in TOKENIZER), variants("model", dtype)])
    part = folder_part(folder, "clip", dtype)
    return part.load(dtype, torch.device(device)), read_tokenizer(folder)


# --- Writing models ----------------------------------------------------------------------------------------------

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def tokenizer_config(length: int) -> dict[str, Any]:
    """What stock tools want to know of a tokenizer besides its two files; without a length they do not even start."""
    ends = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    return {"tokenizer_class": "CLIPTokenizer", **ends, "do_lower_case": True, "model_max_length": length}


def save_model(model: Model, folder: str | Path, **changed: Mapping[str, Tensor]) -> Path:
    """Write a model in the diffusers layout, with other state dicts for the parts named: `unet=edited.state_dict()`.

    Parts edited by `with_unet` or `with_text_encoder` are written as they are. The folder appears when it is complete,
    and not before. UserError when it exists already or cannot be written, or a file of the model cannot be read;
    ValueError for a part that no model has, or tensors that are not that part's.
    """
    if changed.keys() - PARTS.keys():
        raise ValueError(f"a model has no {min(changed.keys() - PARTS.keys())}: only {', '.join(PARTS)}")
    folder = Path(folder)
    if os.path.exists(folder):
        raise UserError(f"{folder} exists already: choose another name")
    temporary = temporary_name(folder)
    try:
        for part in ("text_encoder", "unet", "vae", *["clip"] * model.has_clip):
            write_part(model, part, temporary / part, changed.get(part))
        (temporary / "tokenizer").mkdir()
        for path in tokenizer_files(model.tokenizer_folder):
            copy_file(path, temporary / "tokenizer" / path.name)
        scheduler = {**model.schedule.config, "_class_name": "DDIMScheduler"}
        for file, config in (
            ("tokenizer/tokenizer_config.json", tokenizer_config(model.tokens)),
            (SCHEDULER, scheduler),
            ("model_index.json", MODEL_INDEX),
        ):
            write_text(temporary / file, json.dumps(config, indent=2))
        give_name(temporary, folder)
    except Unwritten as error:  # a file in it, under a name that the user never gave
        raise Unwritten(folder, error.error) from error
    except OSError as error:
        raise Unwritten(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def give_name(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name; UserError if another run has put a different one there meanwhile."""
    try:
        os.replace(temporary, folder)
    except OSError as error:
        if not os.path.exists(folder):
            raise
        names = [{path.relative_to(each) for path in each.rglob("*") if path.is_file()} for each in (temporary, folder)]
        if names[0] != names[1] or not all(filecmp.cmp(temporary / n, folder / n, shallow=False) for n in names[0]):
            said = f"{folder} exists already, written by another run meanwhile: choose another name"
            raise UserError(said) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file. UserError when the source cannot be read, OSError when the target cannot be written."""
    try:
        source.open("rb").close()
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}): check the folder of the model") from error
    shutil.copyfile(source, target)


def write_part(model: Model, name: str, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """One network of a model: its file as it is, unless its tensors changed or lie among others.

    ValueError for a `state` whose names or shapes are not those of the network.
    """
    part = model.part(name)
    if state is None and name in model.edits:
        state = getattr(model, name).state_dict()
    folder.mkdir(parents=True)
    target = folder / f"{PARTS[name][1]}.safetensors"
    if state is None and model.path.is_dir():
        copy_file(part.path, target)
    else:
        expected = part.empty().state_dict()
        if state is None:
            part.check(expected)
            state = dict(part.stream(expected, model.dtype, torch.device("cpu")))
        if {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in expected.items()}:
            raise ValueError(f"these are not the tensors of a {part.build.__name__} of this config")
        save_tensors(target, state)
    write_text(folder / "config.json", json.dumps(part.config, indent=2))
