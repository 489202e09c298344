"""Models: official weights in our networks, read strictly, part by part, when they are first used.

    model = load_model("sd14")             # finds (or downloads) the files; reads no tensor yet
    context = model.encode(["a cat"])      # builds the text encoder, and only that
    weights = model.cross_attention()      # all that training needs of the U-Net; never builds one

A model is a folder in the diffusers layout (`tokenizer/`, `text_encoder/`, `unet/`, `vae/`, `scheduler/`, sometimes
`clip/`), or one `.safetensors` checkpoint in the original layout (LDM). Whatever a user can mend raises `UserError`.
"""

import json
import os
import shutil
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from clip import CLIP, TextEncoder, Tokenizer
from loading import files
from loading.configs import SD14_CONFIGS, SETTINGS, check_agreement, check_schedule
from loading.files import Unwritten, UserError, read_json, shipped
from loading.hub import SD14, fetch, is_repository, snapshot
from loading.parts import PARTS, SCHEDULER, Part, fingerprint_of, folder_part, ldm_part, variants, wanted_files
from loading.tokens import TOKENIZER, read_tokenizer, tokenizer_files
from sampler import Schedule
from unet import UNet
from vae import VAE

CLIP_LARGE = "openai/clip-vit-large-patch14"

# --- The model ---------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A Stable Diffusion model whose parts are read when they are first used, and then kept in memory."""

    name: str
    path: Path  # a folder, or a one-file checkpoint
    dtype: torch.dtype
    device: torch.device
    repository: str | None = None  # where missing files of a folder may be fetched from
    parts: dict[str, Part] = field(default_factory=dict, repr=False)
    edits: frozenset[str] = frozenset()  # parts that are no longer as their files have them
    paddings: ClassVar[int] = 8  # that are computed where prompts are read `briefly`; see benchmarks/README.md

    def part(self, name: str) -> Part:
        """Where a network is: found and its config checked, nothing read. UserError if it does not fit the others."""
        if name not in self.parts:
            if self.repository and name != "clip":
                fetch(self.repository, wanted_files([name], self.dtype))
            one_file = self.path.is_file()
            found = ldm_part(self.path, name) if one_file else folder_part(self.path / name, name, self.dtype)
            check_agreement({key: part.config for key, part in (self.parts | {name: found}).items()}, self.name)
            self.parts[name] = found
        return self.parts[name]

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return self.part("text_encoder").load(self.dtype, self.device)

    @cached_property
    def unet(self) -> UNet:
        return self.part("unet").load(self.dtype, self.device)

    @cached_property
    def vae(self) -> VAE:
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
        return read_tokenizer(self.tokenizer_folder, self.tokens)

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Where vocab.json and merges.txt are. A one-file checkpoint has none: SD 1.4's serves every SD 1.x."""
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
        """The noise schedule; UserError and warnings are those of `check_schedule`."""
        path = self.path / SCHEDULER
        return Schedule(check_schedule(SD14_CONFIGS["scheduler"] if self.path.is_file() else read_json(path), path))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 32, briefly: bool = False) -> Tensor:
        """Context E [B, 77, d] of B prompts.

        `briefly`: only some paddings are computed (`paddings`), the last two stand for the rest by turns, as the emoji
        model reads two things. UserError for a tokenizer of another model, ValueError for what is not Unicode text.
        """
        tower, known = self.text_encoder, self.part("text_encoder").config["vocab_size"]
        ids = self.tokenizer(prompts, self.tokens)
        if (ids >= known).any():
            raise UserError(f"{self.tokenizer_folder} is of another model: its text encoder knows {known} tokens")
        if not briefly or not prompts:
            return torch.cat([tower(batch) for batch in ids.to(self.device).split(batch_size)])
        # the last token that is computed of each prompt: so far behind its words, EOS itself perhaps among them
        words = self.tokens - (ids != self.tokenizer.eos).int().flip(1).argmax(dim=1)
        last = (words + self.paddings).clamp(max=self.tokens - 1)
        order, found = last.argsort(stable=True), []
        for rows in order.split(batch_size):
            E = tower(ids[rows, : last[rows].amax() + 1].to(self.device))
            found.append(E[torch.arange(len(rows))[:, None], self.by_turns(last[rows, None])])
        return torch.cat(found)[order.argsort()]

    def by_turns(self, last: int | Tensor) -> Tensor:
        """Places [..., T] of all tokens' contexts: their own; beyond `last` [..., 1] it and the one before in turn."""
        beyond = (torch.arange(self.tokens) - last).clamp(min=0)
        return torch.arange(self.tokens) - beyond - beyond % 2

    def with_unet(self, changed: dict[str, Tensor]) -> "Model":
        """The same model with tensors of its U-Net replaced; arguments and errors as for `edited`."""
        return self.edited("unet", changed)

    def with_text_encoder(self, changed: dict[str, Tensor]) -> "Model":
        """The same with tensors of its text encoder replaced, and so with a fingerprint of its own."""
        twin = self.edited("text_encoder", changed)
        twin.fingerprint = fingerprint_of(sorted(twin.text_encoder.state_dict().items()))  # as when saved and loaded
        return twin

    def edited(self, name: str, changed: dict[str, Tensor]) -> "Model":
        """A twin whose part `name` has some tensors replaced; what is not replaced is shared, not copied.

        KeyError for a tensor that the part does not have, RuntimeError for one of another shape.
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
        is read, and no U-Net is built. If one is in memory, its present weights are taken, edited or not.
        """
        part = self.part("unet")
        matrices = ("to_q", "to_k", "to_v", "to_out.0")
        unet = part.empty()
        names = [f"{path}.{matrix}.weight" for path in unet.cross_attentions() for matrix in matrices]
        if "unet" in self.__dict__:
            state = self.unet.state_dict()
            return {name: state[name].to(dtype) for name in names}
        return dict(part.read(unet, dtype, self.device, names))

    @cached_property
    def fingerprint(self) -> str:
        """`fingerprint_of` the text encoder: what gates were trained for, what was cached with it.

        The U-Net stays out: its fine-tunes share the text encoder, and gates carry over to them.
        """
        part = self.part("text_encoder")
        return fingerprint_of(part.read(part.empty(), torch.float16, torch.device("cpu")))


# --- Finding models ----------------------------------------------------------------------------------------------

NAMED = ("sd14", "emoji")
MODELS = "sd14, emoji, owner/name of the hub, a folder in the diffusers layout, or one .safetensors checkpoint"


def find_model(name: str) -> tuple[Path | None, str | None]:
    """The path of a model on this machine, or its repository on the hub: one of the two. UserError if it is none."""
    path = Path(os.path.expanduser(name))
    if name in NAMED and not (path / "unet").is_dir():  # a folder of that name is meant if it holds a model
        return (shipped("emoji"), None) if name == "emoji" else (None, SD14)
    files.refuse_pickles(path)
    if os.path.isdir(path):
        return snapshot(path), None
    if os.path.isfile(path) and path.suffix == ".safetensors":
        return path, None
    if not os.path.exists(path) and is_repository(name):
        return None, name
    said = f"{name} is no model" if os.path.exists(path) else f"there is no model {name}"
    raise UserError(f"{said}: --model takes {MODELS}")


def check_device(device: str | torch.device) -> torch.device:
    """The device; UserError if this machine or this torch has none of that kind."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0]  # torch goes on with all that it was built without
        advice = "leave --device out, or install a torch that is built for that device"
        raise UserError(f"the device {device} cannot be used ({reason}): {advice}") from error


def load_model(
    name: str | Path = "sd14",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    parts: Sequence[str] = ("text_encoder", "unet", "vae"),
) -> Model:
    """The model "sd14", "emoji", owner/name of the hub, or at a path.

    The files of `parts` are found, or downloaded, and their configs checked at once: what is missing is a UserError
    before any work is done.
    """
    device = check_device(device)
    path, repository = find_model(str(name))
    if path is None:
        path = fetch(repository, wanted_files(parts, dtype))
    model = Model(str(name), path, dtype, device, repository)
    for part in parts:
        model.part(part)
    return model


def expected_unet(name: str) -> UNet:
    """The U-Net of "sd14" or "emoji", with no memory behind its tensors: what gates must fit. Downloads nothing."""
    path, _ = find_model(name)
    part = folder_part(path / "unet", "unet", torch.float32) if path else Part(UNet, SD14_CONFIGS["unet"], Path(), str)
    return part.empty()


def load_clip(
    name: str | Path = CLIP_LARGE, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[CLIP, Tokenizer]:
    """A CLIP model and its tokenizer, from a folder or the repository of any `openai/clip-vit-*`; else UserError."""
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        if not is_repository(str(name)):
            raise UserError(f"there is no CLIP model {name}: give a folder, or a repository as in {CLIP_LARGE}")
        folder = fetch(str(name), [("config.json",), *((file,) for file in TOKENIZER), variants("model", dtype)])
    return folder_part(folder, "clip", dtype).load(dtype, torch.device(device)), read_tokenizer(folder)


# --- Writing models ----------------------------------------------------------------------------------------------


def save_model(model: Model, folder: str | Path) -> Path:
    """Write a model, as it is after `with_unet` or `with_text_encoder`, in the diffusers layout.

    The folder appears when it is complete, and not before. UserError when it exists already or cannot be written.
    """
    folder = Path(folder)
    if os.path.exists(folder):
        raise UserError(f"{folder} exists already: choose another name")
    temporary = files.temporary_name(folder)
    try:
        for part in ("text_encoder", "unet", "vae", *["clip"] * model.has_clip):
            write_part(model, part, temporary / part)
        (temporary / "tokenizer").mkdir()
        for path in tokenizer_files(model.tokenizer_folder):
            shutil.copyfile(path, temporary / "tokenizer" / path.name)
        for file, config in (
            ("tokenizer/tokenizer_config.json", SETTINGS["tokenizer_config"] | {"model_max_length": model.tokens}),
            (SCHEDULER, {**model.schedule.config, "_class_name": "DDIMScheduler"}),
            ("model_index.json", SETTINGS["model_index"]),
        ):
            files.write_text(temporary / file, json.dumps(config, indent=2))
        os.replace(temporary, folder)
    except FileNotFoundError as error:  # of the model that is copied
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check the folder of the model") from error
    except (OSError, Unwritten) as error:  # a file in it, under a name that the user never gave
        raise Unwritten(folder, getattr(error, "error", error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_part(model: Model, name: str, folder: Path) -> None:
    """Write one network: a copy of its file, or its tensors if it was edited or shares a file with others."""
    part, target = model.part(name), folder / f"{PARTS[name][1]}.safetensors"
    files.write_text(folder / "config.json", json.dumps(part.config, indent=2))
    if name in model.edits or model.path.is_file():
        files.save_tensors(target, getattr(model, name).state_dict())
    else:
        shutil.copyfile(part.path, target)
