"""Finding, reading, checking and writing models: the only file that touches disk or network for them.

A model is a folder in the diffusers layout (`tokenizer/`, `text_encoder/`, `unet/`, `vae/`, `scheduler/`, sometimes
`clip/`), or one `.safetensors` checkpoint in the key layout of the original Stable Diffusion code (LDM). Nothing is
guessed: the architecture comes from `config.json`, what it asks for and we do not have is an error, and every tensor
must be there with its shape and no other. Nothing is unpickled: safetensors files only, read by memory map.

    model = load_model("sd14")             # finds (or downloads) the files; reads no tensor yet
    context = model.encode(["a cat"])      # builds the text encoder, and only that
    weights = model.cross_attention()      # all that training needs of the U-Net; never builds one

Whatever a user can mend raises `UserError`. Built on torch and safetensors; huggingface_hub downloads.
"""

import difflib
import errno
import filecmp
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip import CLIP, TextEncoder, Tokenizer
from old_cpe import Prompts, parse_prompts
from sampler import Schedule
from unet import UNet
from vae import VAE


class UserError(Exception):
    """Something the user can mend; the message says what was wrong, where, and what to do next."""


class Unwritten(UserError):
    """A file or folder that could not be written, and the `error` that says why; also a full disk."""

    def __init__(self, path: Path, error: Exception):
        reason = getattr(error, "strerror", None) or error
        hint = "the disk is full: make room" if disk_full(error) else f"{reason}: check the folder, or choose another"
        super().__init__(f"{path} could not be written: {hint}")
        self.path, self.error = path, error

    def __reduce__(self) -> tuple[type["Unwritten"], tuple[Path, Exception]]:
        """How it comes from one process to another."""
        return Unwritten, (self.path, self.error)


SD14 = "CompVis/stable-diffusion-v1-4"

# The networks of a model: the folder each lies in, its class, and the stem of its weights file.
PARTS: dict[str, tuple[type[nn.Module], str]] = {
    "text_encoder": (TextEncoder, "model"),
    "unet": (UNet, "diffusion_pytorch_model"),
    "vae": (VAE, "diffusion_pytorch_model"),
    "clip": (CLIP, "model"),
}
TOKENIZER = ("vocab.json", "merges.txt")
SCHEDULER = "scheduler/scheduler_config.json"

# Stable Diffusion 1.4's own config.json files, for checkpoints that come as one file without any.
SD14_CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 49408,
    },
    "unet": {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler": {
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}

# --- Writing -----------------------------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """A new name beside `path` to write under; UserError if `path` itself can be no name.

    Removes what runs that were killed left under such names: whatever nobody has touched for an hour.
    """
    if path.name in ("", "..") or "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be written: it is no name of a file")
    # The suffix stays last: some writers choose the format by it.
    stem, suffix = f".{path.stem[:40]}.", path.suffix
    for old in path.parent.glob(glob.escape(stem) + "[0-9a-f]" * 8 + glob.escape(suffix)):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path.with_name(f"{stem}{secrets.token_hex(4)}{suffix}")


def disk_full(error: Exception) -> bool:
    """Whether an error says that there is no room left; safetensors says so in words only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def make_empty(path: Path, tries: int = 5) -> None:
    """An empty file at a new path, with its folders; OSError if it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    except FileNotFoundError:  # another process's `check_writable` has removed the folder that it had made
        if tries == 1:
            raise
        make_empty(path, tries - 1)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """An empty file beside `path` while the block runs; UserError when something there cannot be written."""
    temporary = temporary_name(path)
    try:
        make_empty(temporary)
        yield temporary
    except (OSError, safetensors.SafetensorError) as error:
        raise Unwritten(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to: takes its place when the block ends well, vanishes when it does not.

    UserError when it cannot be written or the disk is full; whatever was at `path` before is then still there.
    What a link at `path` points to is what is replaced.
    """
    path = followed(path)
    with beside(path) as temporary:
        refuse_special(path)
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors lets nobody else read what it writes
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def followed(path: str | Path) -> Path:
    """Where a link points to; a path that is none as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def refuse_special(path: Path) -> None:
    """UserError for a folder, and for a device or a pipe: a file in its place would be in everybody's way."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a device or a pipe: give the name of a file")


def check_writable(path: str | Path) -> None:
    """UserError if no file can be written at `path`: asked before the work whose result is to go there.

    Folders that are not there yet are made, and removed again: the work may come to nothing.
    """
    new = [folder for folder in followed(path).parents if not os.path.exists(folder)]  # the innermost first
    try:
        with beside(followed(path)), suppress(FileNotFoundError):
            refuse_special(Path(path))
            os.lstat(followed(path))  # says whether the name is too long, where the one that `beside` tries is cut
    finally:
        for folder in new:
            with suppress(OSError, ValueError):  # it was not made after all, or another run has written there
                folder.rmdir()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one piece, or not at all. UserError as of `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one piece, or not at all; `metadata` maps strings to strings.

    Tensors of any shapes, on any device. UserError as of `atomic`.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        # transformers refuses files that do not say which library their tensors are laid out for.
        save_file(plain, temporary, {"format": "pt", **(metadata or {})})
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order: the library's own changes at random, and equal files would differ."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # as long as before, but for the spaces that fill it up; the tensors stay where they are
            file.seek(8)
            file.write(text.ljust(size))


# --- Reading tensors ---------------------------------------------------------------------------------------------

Rename = Callable[[str], str | None]  # a file's key -> our attribute path, or None: ignore it


def mapped(path: Path) -> Any:
    """What safetensors opens; UserError when there is no room to map it, as where its size is only claimed."""
    try:
        return safetensors.safe_open(path, framework="pt")
    except (MemoryError, RuntimeError) as error:  # of safetensors and of torch, which maps it once more
        advice = "check that it is the right file; if so, close other programs, or raise the limit (ulimit -v)"
        said = f"{path} is larger ({os.path.getsize(path):,} bytes) than the memory that can be mapped here"
        raise UserError(f"{said} ({first_line(error)}): {advice}") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    UserError when it is missing, no file, not safetensors, truncated or otherwise broken, or as of `mapped`.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, True or False of any string
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: give a file in it")
        refuse_special(path)
        raise UserError(f"{path} does not exist: check the path, or get the file again")
    try:
        with mapped(path) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): give another, or get it again") from error
    except OSError as error:
        raise UserError(f"{path} could not be read: {error}") from error


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. UserError for a pickle, or as of `opened`."""
    refuse_pickles(Path(path))
    with opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name: of its header, so that no memory is taken for any tensor.

    UserError as of `load_tensors`.
    """
    refuse_pickles(Path(path))
    with opened(Path(path)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def refuse_pickles(path: Path) -> None:
    """UserError for a file that would have to be unpickled: that can run any code its author liked."""
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth", ".pkl"):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened: only .safetensors files are read. Most models "
            "offer one beside it; else convert it once, where you trust it, with torch.load(..., weights_only=True) "
            "and safetensors.torch.save_file"
        )


def diffusers_name(key: str) -> str | None:
    """Our name of a tensor in the diffusers layout: the same, but for what older or newer libraries wrote.

    This is the complete list of exceptions.
    """
    if key.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: written by transformers before 4.31
        return None
    if re.match(r"(embeddings|encoder\.layers|final_layer_norm)\.", key):  # text encoders of transformers 5
        return f"text_model.{key}"
    # The autoencoder's attention, written by diffusers before 0.18.
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(\.attentions\.0)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", key)


class Undrawn(TorchFunctionMode):
    """Modules built in this mode draw no initial values: on the meta device, that imports half of torch's compiler."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@dataclass(frozen=True)
class Part:
    """One network of a model: how it is built, and where its tensors are."""

    build: type[nn.Module]
    config: dict[str, Any]
    path: Path
    rename: Rename

    def empty(self) -> nn.Module:
        """The module without any memory behind its tensors."""
        with torch.device("meta"), Undrawn():
            return self.build(self.config)

    def keys(self) -> dict[str, str]:
        """Our name -> the file's key, of every tensor in the file that is this part's.

        UserError when a tensor is there under two names, or as of `opened`.
        """
        with opened(self.path) as file:
            pairs = [(self.rename(key), key) for key in file.keys()]  # noqa: SIM118
        names = {name: key for name, key in pairs if name is not None}
        if len(names) < sum(name is not None for name, _ in pairs):
            twice = next(key for name, key in pairs if name is not None and names[name] != key)
            raise UserError(f"{self.path}: the tensor {twice} is there twice, under two names: get the file again")
        return names

    def check(self, expected: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
        """UserError that names every kind of mismatch between the tensors `expected` and those in the file."""
        bad = []
        with opened(self.path) as file:
            for name in expected.keys() & keys.keys():
                entry = file.get_slice(keys[name])
                shape, want = entry.get_shape(), list(expected[name].shape)
                if shape != want and shape != [*want, 1, 1]:  # LDM writes some linear layers as 1x1 convolutions
                    bad.append(f"{keys[name]} is {shape}, not {want}")
                elif "F" not in entry.get_dtype():  # F32, BF16 and their like; not I64, BOOL
                    bad.append(f"{keys[name]} holds {entry.get_dtype()}, not floating-point numbers")
        problems = {
            "missing": sorted(expected.keys() - keys.keys()),
            "not part of this architecture": sorted(keys[name] for name in keys.keys() - expected.keys()),
            "unfit": sorted(bad),
        }
        lines = [
            f"{len(found)} tensor{'s' * (len(found) > 1)} {what}: {', '.join(found[:3])}{', ...' * (len(found) > 3)}"
            for what, found in problems.items()
            if found
        ]
        if lines:
            advice = "the weights do not belong to its config.json, or the file is of another kind of model"
            raise UserError(f"{self.path} is not this {self.build.__name__}: {'; '.join(lines)}. Likely {advice}")

    def stream(
        self, expected: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors `expected` names, one after another, in a dtype on a device; call `check` first.

        In the shapes of `expected`. On a CPU and in the file's own dtype they ARE the memory map: not copied, and
        paged in on first use. UserError as of `opened`, KeyError for a name that the file does not have.
        """
        keys = self.keys()
        for name, like in expected.items():
            # Opened anew for each, so that what was read only to be converted does not stay in memory.
            with opened(self.path) as file:
                tensor = file.get_tensor(keys[name]).to(device, dtype).reshape(like.shape)
            yield name, tensor

    def read(self, expected: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What `stream` yields, all at once."""
        return dict(self.stream(expected, dtype, device))

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The network with its weights, frozen; UserError unless the file holds exactly its tensors."""
        module = self.empty()
        expected = module.state_dict()
        self.check(expected, self.keys())
        module.load_state_dict(self.read(expected, dtype, device), strict=True, assign=True)
        return module.requires_grad_(False).eval()


# --- One-file checkpoints ----------------------------------------------------------------------------------------

LDM_PREFIXES = {
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
# What a one-file checkpoint also holds and inference does not need: the schedule, training's leftovers, the schedule
# once more as k-diffusion wraps it, the words of textual inversion, which no tokenizer here knows.
LDM_IGNORED = re.compile(
    r"model_ema\.|first_stage_model\.loss\.|cond_stage_model\.(logit_scale|text_projection)|"
    r"denoiser\.|embedding_manager\.|"
    r"(betas|alphas_cumprod|log_one_minus|sqrt_|posterior_|logvar|lvlb_weights)"
)
LDM_UNET = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
LDM_RESNET = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
LDM_VAE = {
    ".mid.block_1.": ".mid_block.resnets.0.",
    ".mid.block_2.": ".mid_block.resnets.1.",
    ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
    ".mid.attn_1.q.": ".mid_block.attentions.0.to_q.",
    ".mid.attn_1.k.": ".mid_block.attentions.0.to_k.",
    ".mid.attn_1.v.": ".mid_block.attentions.0.to_v.",
    ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.",
    ".down.": ".down_blocks.",
    ".up.": ".up_blocks.",
    ".block.": ".resnets.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.",
    ".norm_out.": ".conv_norm_out.",
}


def replace_all(key: str, table: Mapping[str, str]) -> str:
    """The key with every entry of the table replaced."""
    for old, new in table.items():
        key = key.replace(old, new)
    return key


def ldm_unet_name(key: str, config: dict[str, Any]) -> str:
    """Our name of a U-Net tensor in the LDM layout, which numbers all blocks of one half of the U in a row."""
    for old, new in LDM_UNET.items():
        if key.startswith(old):
            return replace_all(new + key.removeprefix(old), LDM_RESNET)
    match = re.fullmatch(r"(input|output)_blocks\.(\d{1,3})\.(\d)\.(.+)", key)
    if not match:
        return key
    half, number, slot, rest = match.groups()
    # layers_per_block layers and a change of resolution make a level; going down, conv_in is block 0.
    level, layer = divmod(int(number) - (half == "input"), config["layers_per_block"] + 1)
    block = f"{'down' if half == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    if slot == "0":
        return f"{block}.resnets.{layer}.{replace_all(rest, LDM_RESNET)}"
    return f"{block}.attentions.{layer}.{rest}"


def ldm_vae_name(key: str, config: dict[str, Any]) -> str:
    """Our name of an autoencoder tensor in the LDM layout, which counts the decoder's levels from the image down."""
    last = len(config["block_out_channels"]) - 1
    key = re.sub(r"^decoder\.up\.(\d{1,3})\.", lambda m: f"decoder.up.{last - int(m[1])}.", key)
    return replace_all(key, LDM_VAE)


def ldm_name(key: str, part: str, config: dict[str, Any]) -> str | None:
    """Our name of a tensor in a one-file checkpoint; None if it is of another part."""
    if not key.startswith(LDM_PREFIXES[part]) or LDM_IGNORED.match(key):
        return None
    key = key.removeprefix(LDM_PREFIXES[part])
    if part == "unet":
        return ldm_unet_name(key, config)
    return ldm_vae_name(key, config) if part == "vae" else diffusers_name(key)


def ldm_part(path: Path, part: str) -> Part:
    """A part of a one-file checkpoint; UserError unless it is one of Stable Diffusion, complete and without extras."""
    if part not in LDM_PREFIXES:
        raise UserError(f"{path} is a one-file checkpoint, which has no {part}: load one with `load_clip`")
    with opened(path) as file:
        keys = list(file.keys())
    prefixes = tuple(LDM_PREFIXES.values())
    odd = [key for key in keys if not key.startswith(prefixes) and not LDM_IGNORED.match(key)]
    absent = [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in keys)]
    if absent or odd:
        found = f"it has no {absent[0]}*" if absent else f"{odd[0]} does not belong there ({len(odd)} such tensors)"
        raise UserError(
            f"{path} is not a checkpoint of Stable Diffusion 1.x in one file: {found}. "
            "A model in several files is given as the folder that holds unet/, vae/ and text_encoder/"
        )
    config = SD14_CONFIGS[part]
    return Part(PARTS[part][0], config, path, lambda key: ldm_name(key, part, config))


# --- Configs -----------------------------------------------------------------------------------------------------

# Sizes a config.json must state, as positive integers or lists of them, and what they must be divisible by.
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES: dict[type, tuple[str, ...]] = {
    TextEncoder: (*TOWER, "vocab_size"),
    UNet: (
        *("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "sample_size"),
        *("block_out_channels", "attention_head_dim", "norm_num_groups"),
    ),
    VAE: (
        "in_channels",
        "out_channels",
        "latent_channels",
        "layers_per_block",
        "block_out_channels",
        "norm_num_groups",
    ),
    CLIP: ("projection_dim",),
}
DIVISIBLE = {
    "block_out_channels": ("norm_num_groups", "attention_head_dim"),
    "hidden_size": ("num_attention_heads",),
    "image_size": ("patch_size",),
}
# Sizes that a config may leave out.
OPTIONAL = ("max_position_embeddings", "num_channels")
# Sizes that old config.json files leave out, as diffusers fills them in.
DEFAULTS: dict[type, dict[str, int]] = {UNet: {"norm_num_groups": 32}, VAE: {"norm_num_groups": 32}}

# What the config of a network may say that changes nothing here: of diffusers,
DIFFUSERS = {"addition_embed_type_num_heads", "force_upcast", "sample_size", "scaling_factor"}
# and of transformers, whose older versions wrote every setting of every model into each.
TRANSFORMERS = set(
    """
    add_cross_attention architectures begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id dropout dtype eos_token_id finetuning_task
    gradient_checkpointing id2label initializer_factor initializer_range is_decoder is_encoder_decoder label2id
    model_type num_labels output_attentions output_hidden_states pad_token_id prefix problem_type projection_dim
    pruned_heads return_dict sep_token_id suppress_tokens task_specific_params tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache

    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)
HARMLESS: dict[type, set[str]] = {
    TextEncoder: {"max_position_embeddings", *TRANSFORMERS},
    UNet: DIFFUSERS,
    VAE: DIFFUSERS,
    CLIP: {
        *("text_config", "text_config_dict", "vision_config", "vision_config_dict", "logit_scale_init_value"),
        *TRANSFORMERS,
    },
}

# What the config of a scheduler must say, as the defaults of the classes differ, and are not SD's.
NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
# What it may leave out, with what diffusers then takes in its pipeline of SD; but see `check_schedule`.
STEPPING = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
# What it may say that another solver obeys, or that concerns what `Schedule.FIXED` has turned off.
OTHER_SOLVERS = set(
    """
    algorithm_type corrector_order denoise_final disable_corrector euler_at_final final_sigmas_type interpolation_type
    lambda_min_clipped lower_order_final noise_sampler_seed predict_x0 predictor_order skip_prk_steps solver_order
    solver_p solver_type tau_func tensor_format timestep_values

    clip_sample_range dynamic_thresholding_ratio flow_shift sample_max_value shift_terminal time_shift_type
    use_dynamic_shifting
    """.split()  # noqa: SIM905
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: is this a whole model in the diffusers layout?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} could not be read as JSON ({error}): get it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: get it again")
    return value


def check_sizes(config: dict[str, Any], keys: Sequence[str], path: Path) -> None:
    """UserError unless every key is a sensible size, and widths divide into their heads and groups."""
    for key in keys:
        if key not in config:
            raise UserError(f"{path} does not say {key}: it is not the config.json of this network, or not a whole one")
        value = config[key]
        sizes = value if isinstance(value, list) and key.startswith("block_") else [value]
        limit = 64 if "layers" in key else 1_000_000  # ten times what any model has: building it stays cheap
        if not 0 < len(sizes) <= 8 or any(type(size) is not int or not 0 < size <= limit for size in sizes):
            raise UserError(f"{path}: {key} is {value!r}, where a positive integer is needed: such a model is unknown")
        for divisor in DIVISIBLE.get(key, ()):
            if divisor in keys and type(config.get(divisor)) is int and config[divisor] > 0:
                odd = [size for size in sizes if size % config[divisor]]
                if odd:
                    raise UserError(f"{path}: {key} {odd[0]} is not divisible by {divisor} {config[divisor]}")


def check_fixed(config: dict[str, Any], fixed: dict[str, Any], path: Path) -> None:
    """UserError for a config that asks for something else than the one value we implement."""
    for key, only in fixed.items():
        value = config.get(key)
        if value is None and only is False:  # as diffusers' converter writes it
            continue
        allowed = only if isinstance(only, tuple) else (only,)
        wrong = [v for v in (value if isinstance(value, list) and value else [value]) if v not in allowed]
        if key in config and wrong:
            known = " or ".join(json.dumps(v) for v in allowed)
            raise UserError(f"{path}: {key} is {json.dumps(wrong[0])}, and only {known} is implemented")


def check_known(config: dict[str, Any], known: Collection[str], path: Path) -> None:
    """UserError for a key that we do not know: what a newer library added may change the model, unless it is null."""
    odd = [k for k, v in config.items() if k not in known and not k.startswith("_") and v is not None]
    if odd:
        raise UserError(f"{path}: {odd[0]} is {json.dumps(config[odd[0]])}, a setting that is not implemented")


def check_towers(config: dict[str, Any], path: Path) -> None:
    """UserError unless the config of a CLIP describes two towers that we can build."""
    for tower, more in (("text_config", ("vocab_size",)), ("vision_config", ("image_size", "patch_size"))):
        part, again = config.get(tower), config.get(f"{tower}_dict") or {}  # old files say some of it twice
        if not isinstance(part, dict):
            raise UserError(f"{path} has no {tower}: give the folder of a CLIP model with both towers")
        if not isinstance(again, dict) or any(part.get(key, value) != value for key, value in again.items()):
            raise UserError(f"{path}: {tower}_dict says something else than {tower}: get the file again")
        check_sizes(part, (*TOWER, *more, *(key for key in OPTIONAL if key in part)), path)
        check_fixed(again | part, CLIP.FIXED, path)
        check_known(again | part, {*TOWER, *more, *OPTIONAL, *CLIP.FIXED, *TRANSFORMERS}, path)


def check_config(config: dict[str, Any], build: type, path: Path) -> dict[str, Any]:
    """The config with its defaults filled in; UserError that names the file and the key if we cannot build it."""
    if build is CLIP:
        check_towers(config, path)
    config = DEFAULTS.get(build, {}) | config
    check_sizes(config, (*SIZES[build], *(key for key in OPTIONAL if key in config)), path)
    for key in ("scaling_factor", "logit_scale_init_value"):
        if key in config and not (type(config[key]) in (int, float) and 0 < config[key] < math.inf):
            raise UserError(f"{path}: {key} is {config[key]!r}, where a positive number is needed")
    fixed = build.FIXED if build is not CLIP else {}
    check_fixed(config, fixed, path)
    check_known(config, {*SIZES[build], *fixed, *HARMLESS[build]}, path)
    if build in (UNet, VAE):
        types = [config.get(key) for key in ("down_block_types", "up_block_types")]
        channels = config["block_out_channels"]
        if any(not isinstance(x, list) for x in (channels, *types)) or len({len(x) for x in (channels, *types)}) > 1:
            raise UserError(f"{path}: block_out_channels, down_block_types, up_block_types must be equally long lists")
        if build is UNet and (config["sample_size"] % 2 ** (len(channels) - 1) or channels[0] % 2):
            raise UserError(
                f"{path}: sample_size {config['sample_size']} cannot be halved {len(channels) - 1} times, or "
                f"block_out_channels begins with an odd number: {channels[0]}"
            )
    return config


def check_schedule(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config with `STEPPING` filled in; UserError unless it is of a noise schedule that we have.

    `NOISE` must be there. So must be set_alpha_to_one of a DDIM scheduler: that class takes it to be true, and the
    pipeline lets it. Which solver the file is of does not matter, as we have our own.
    """
    ddim = str(config.get("_class_name")).startswith("DDIM")
    for key in (*NOISE, *(["set_alpha_to_one"] if ddim else [])):
        if key not in config:
            raise UserError(f"{path} does not say {key}: it is not the config of a scheduler, or not a whole one")
    config = STEPPING | config
    check_fixed(config, Schedule.FIXED, path)
    check_known(config, {*NOISE, *STEPPING, *Schedule.FIXED, *OTHER_SOLVERS}, path)
    check_sizes(config, ("num_train_timesteps",), path)
    betas = (config["beta_start"], config["beta_end"])
    if any(type(beta) not in (int, float) for beta in betas) or not 0 < betas[0] < betas[1] < 1:
        raise UserError(f"{path}: beta_start and beta_end are {betas[0]!r} and {betas[1]!r}, not 0 < start < end < 1")
    offset = config["steps_offset"]
    if type(offset) is not int or not 0 <= offset < config["num_train_timesteps"]:
        raise UserError(f"{path}: steps_offset is {offset!r}, not a number of steps")
    alphas = torch.cat([torch.ones(1), Schedule(config).alphas_cumprod])
    if not ((alphas.diff() < 0).all() and alphas[-1] > 0):
        raise UserError(f"{path}: with these betas, a step adds no noise at all, or the last leaves no image at all")
    return config


def check_agreement(parts: Mapping[str, Part], name: str) -> None:
    """UserError unless the parts of a model fit together."""
    pairs = [
        ("unet", "cross_attention_dim", "text_encoder", "hidden_size"),
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "out_channels", "vae", "latent_channels"),
    ]
    for one, key, other, other_key in pairs:
        if one in parts and other in parts and parts[one].config[key] != parts[other].config[other_key]:
            values = f"{key} is {parts[one].config[key]}, {other_key} is {parts[other].config[other_key]}"
            raise UserError(f"{name}: {one} and {other} do not fit together: {values}")


# --- Finding files -----------------------------------------------------------------------------------------------


def variants(stem: str, dtype: torch.dtype) -> tuple[str, str]:
    """The two names a weights file may have, the better one first.

    Rounding float32 to half precision gives the half-precision file bit for bit, so for float16 that one is enough;
    bfloat16 would be rounded twice.
    """
    full, half = f"{stem}.safetensors", f"{stem}.fp16.safetensors"
    return (half, full) if dtype == torch.float16 else (full, half)


def folder_part(folder: Path, part: str, dtype: torch.dtype) -> Part:
    """A network in its own folder: `config.json` and a safetensors file beside it.

    UserError when one is missing or only there as a pickle, or as of `check_config`.
    """
    build, stem = PARTS[part]
    config = check_config(read_json(folder / "config.json"), build, folder / "config.json")
    for name in variants(stem, dtype):
        if (folder / name).exists():
            return Part(build, config, folder / name, diffusers_name)
    for file in sorted(folder.iterdir()):
        refuse_pickles(file)
        if file.name.endswith(".safetensors.index.json"):
            advice = "save it again in one file, in diffusers with save_pretrained(..., max_shard_size='10GB')"
            raise UserError(f"{file}: this network comes in several files, which are not read: {advice}")
    raise UserError(f"{folder / stem}.safetensors does not exist: is this a whole model in the diffusers layout?")


def wanted_files(parts: Sequence[str], dtype: torch.dtype) -> list[tuple[str, ...]]:
    """What to fetch of a repository in the diffusers layout: for each file its possible names, the best first."""
    wanted: list[tuple[str, ...]] = [(SCHEDULER,), *((f"tokenizer/{file}",) for file in TOKENIZER)]
    for part in parts:
        wanted.append((f"{part}/config.json",))
        wanted.append(tuple(f"{part}/{name}" for name in variants(PARTS[part][1], dtype)))
    return wanted


def ways_out(repository: str) -> str:
    """What to do when a repository cannot be had."""
    copy = "the folder of a copy from another machine"
    if repository != SD14:
        return f"Ways out: connect once, so that {repository} can be downloaded; or give {copy}."
    return (
        "Ways out: `--model emoji` uses the small model that comes with this project; or connect once, so that "
        f"`--model sd14` can download {SD14}; or give `--model` {copy}."
    )


def first_line(error: BaseException) -> str:
    """What an error says, without the paragraphs that some libraries add."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def no_network(repository: str, file: str, error: BaseException) -> UserError:
    """What to say when a file is not in the cache and its repository is not reached."""
    return UserError(
        f"{file} of {repository} is not in the Hugging Face cache, and the network cannot be used "
        f"({first_line(error)}). {ways_out(repository)}"
    )


def check_network(repository: str, file: str, revision: str) -> None:
    """UserError where no connection is made: a download would try, and wait, for half a minute before it says so.

    What the server answers, and whether it takes its time to, is left to the download.
    """
    import huggingface_hub as hub

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, revision=revision))
    except Exception as error:  # by name: of another library in every other version of the hub's client
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError"):
            raise no_network(repository, file, error) from error


def fetch(repository: str, wanted: Sequence[tuple[str, ...]]) -> Path:
    """The folder of a Hugging Face repository in the local cache, with the wanted files in it.

    What the cache has is not asked for again; the rest is downloaded, with progress. A connection that breaks is taken
    up where it broke. A run that ended early keeps its finished files, and the next begins anew with the file that was
    under way: huggingface_hub keeps no part of it. UserError says what to do without a network.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"downloading {repository} needs `pip install huggingface_hub`. {ways_out(repository)}"
        ) from error
    constants.HF_HUB_DISABLE_XET = True  # all files by way of the endpoint, which HF_ENDPOINT may move

    def find(names: tuple[str, ...], revision: str) -> str:
        """The path of the first of `names` that the cache has, or else that the repository has."""
        for name in names:
            path = hub.try_to_load_from_cache(repository, name, revision=revision)
            if isinstance(path, str):
                return path
        check_network(repository, names[0], revision)
        for name in names:
            try:
                return hub.hf_hub_download(repository, name, revision=revision)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):  # not a 404: the repository was not reached
                    raise
        raise UserError(f"{repository} has no {' or '.join(names)}: choose another model. {ways_out(repository)}")

    revision, folder = "main", Path()
    for names in wanted:
        try:
            path = Path(find(names, revision))
        except UserError:
            raise
        except LocalEntryNotFoundError as error:
            raise no_network(repository, names[0], error.__cause__ or error) from error
        except Exception as error:  # the hub's client raises many kinds, and others in its next version
            advice = "try again"
            if disk_full(error):
                advice = "make room on the disk, or set HF_HOME to another"
            elif isinstance(error, OSError) and error.filename:  # of the cache, not of the network
                advice = "check that folder, or set HF_HOME to another"
            failed = f"downloading {names[0]} of {repository} failed ({first_line(error)})"
            raise UserError(f"{failed}: {advice}. {ways_out(repository)}") from error
        folder = path.parents[names[0].count("/")]
        revision = folder.name  # the commit: all files from the same one
    return folder


def tokenizer_files(folder: Path) -> list[Path]:
    """The two files of a tokenizer, or the one that transformers 5 writes, if there is nothing else."""
    two, one = [folder / file for file in TOKENIZER], folder / "tokenizer.json"
    return [one] if one.is_file() and not any(path.is_file() for path in two) else two


def vocabulary(folder: Path) -> dict[str, int]:
    """The tokens of a tokenizer and their ids; UserError when they cannot be read."""
    path = tokenizer_files(folder)[0]
    said = read_json(path)
    if path.name == "vocab.json":
        return said
    try:
        return said["model"]["vocab"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds no vocabulary: get the tokenizer again") from error


def check_added(folder: Path, tokenizer: Tokenizer) -> None:
    """UserError for a tokenizer with words beside its vocabulary, as textual inversion adds: they would be spelt."""
    for name in ("added_tokens.json", "tokenizer.json"):
        path = folder / name
        if path.is_file():
            said = read_json(path)
            added = said if name == "added_tokens.json" else [each["content"] for each in said.get("added_tokens", [])]
            if odd := [word for word in added if tokenizer.bpe.token_to_id(word) is None]:
                raise UserError(f"{path} adds the word {odd[0]!r} to the vocabulary, which is not implemented")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder; UserError when its files are missing or are none."""
    try:
        tokenizer = Tokenizer(*tokenizer_files(folder))
        check_added(folder, tokenizer)
        return tokenizer
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist: a model needs its {' and '.join(TOKENIZER)}") from error
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"the tokenizer in {folder} could not be read ({error}): get its two files again") from error


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
    """A Stable Diffusion model whose parts are read when they are first used, and then kept.

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
                    fetch(self.repository, wanted_files([name], self.dtype))
                found = folder_part(self.path / name, name, self.dtype)
            check_agreement(self.parts | {name: found}, self.name)
            self.parts[name] = found
        return self.parts[name]

    @property
    def folder(self) -> Path:
        """The folder the model lies in."""
        return self.path if self.path.is_dir() else self.path.parent

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
        """Whether it is a folder with a CLIP of its own: a one-file checkpoint has none, whatever lies beside it."""
        return self.path.is_dir() and (self.folder / "clip").is_dir()

    @cached_property
    def clip(self) -> CLIP:
        """The CLIP model that evaluates this model's images; UserError if it brings none: `load_clip` has others."""
        if not self.has_clip:
            raise UserError(f"{self.name} has no clip/ folder to evaluate with: name a CLIP model, {CLIP_LARGE} say")
        return self.part("clip").load(self.dtype, self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return read_tokenizer(self.tokenizer_folder)

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Where vocab.json and merges.txt are: a one-file checkpoint has none, SD 1.4's serves every SD 1.x.

        UserError if these are neither beside it nor to be had.
        """
        for folder in (self.folder / "tokenizer", self.folder):
            if self.path.is_dir() or all((folder / file).is_file() for file in TOKENIZER):
                return folder
        try:
            return fetch(SD14, [(f"tokenizer/{file}",) for file in TOKENIZER]) / "tokenizer"
        except UserError as error:
            beside = f"put {' and '.join(TOKENIZER)} beside it"
            raise UserError(f"{self.path} brings no tokenizer: {beside}. (SD 1.4's: {error})") from error

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule. UserError as of `check_schedule`."""
        path = self.path / SCHEDULER
        config = SD14_CONFIGS["scheduler"] if self.path.is_file() else read_json(path)
        return Schedule(check_schedule(config, path))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Context E [B, 77, d] of B prompts.

        UserError when the tokenizer is of another model, ValueError for a prompt that is not Unicode text.
        """
        tower, length = self.text_encoder, self.part("text_encoder").config.get("max_position_embeddings", 77)
        tokens, known = self.tokenizer(prompts, length), self.part("text_encoder").config["vocab_size"]
        if (tokens >= known).any():
            raise UserError(f"{self.tokenizer_folder} is of another model: its text encoder knows {known} tokens")
        return torch.cat([tower(batch) for batch in tokens.to(self.device).split(batch_size)])

    def with_unet(self, changed: dict[str, Tensor]) -> "Model":
        """The same model, other parts shared, with tensors of its U-Net replaced, by name; errors as of `edited`."""
        return self.edited("unet", changed)

    def with_text_encoder(self, changed: dict[str, Tensor]) -> "Model":
        """The same with tensors of its text encoder replaced, and a fingerprint of its own; errors as of `edited`."""
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
        is read, and none is built. Of a U-Net that is already there, edited by `with_unet` perhaps, they are the
        present ones.
        """
        part = self.part("unet")
        module, keys = part.empty(), part.keys()
        part.check(module.state_dict(), keys)  # of the header, so free
        expected = {
            f"{path}.{matrix}.weight": layer.get_submodule(matrix).weight
            for path, layer in module.cross_attentions().items()
            for matrix in ("to_q", "to_k", "to_v", "to_out.0")
        }
        if "unet" in self.__dict__:  # perhaps edited
            state = self.unet.state_dict()
            return {key: state[key].to(dtype) for key in expected}
        return part.read(expected, dtype, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell text encoders apart: what gates were trained for, what was cached with it.

        See `fingerprint_of`; takes half a second for SD 1.4. The U-Net stays out: its fine-tunes share the text
        encoder, and gates carry over to them.
        """
        part = self.part("text_encoder")
        expected = part.empty().state_dict()
        part.check(expected, part.keys())
        in_order = {name: expected[name] for name in sorted(expected)}
        return fingerprint_of(part.stream(in_order, torch.float16, torch.device("cpu")))


def shipped(name: str) -> Path:
    """A folder that comes with the program: beside the modules in a clone, else where pip puts it; or UserError."""
    installed = (sysconfig.get_path("data"), sysconfig.get_path("data", sysconfig.get_preferred_scheme("user")))
    places = (Path(__file__).resolve().parent, *(Path(data, "share", "cpe") for data in installed))
    for place in places:
        if (place / name).is_dir():
            return place / name
    raise UserError(
        f"{places[0]} has no folder {name}/: run from a clone of the repository, or install it anew with pip"
    )


NAMED = ("sd14", "emoji")
MODELS = "sd14, emoji, a folder in the diffusers layout, or one .safetensors checkpoint"


def load_model(
    name: str | Path = "sd14",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    parts: Sequence[str] = ("text_encoder", "unet", "vae"),
) -> Model:
    """The model "sd14", "emoji", or at a path; its tensors are read when a part of it is first used.

    The files of `parts` are found, or downloaded, and their configs checked at once, so that what is missing shows
    before any work is done. UserError says what to do about it.
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0]  # torch goes on with all that it was built without
        there = ["cpu", *(["cuda"] * torch.cuda.is_available()), *(["mps"] * torch.backends.mps.is_available())]
        said = f"the device {device} cannot be used ({reason}): available here: {', '.join(there)}"
        raise UserError(f"{said}. Leave --device out, or install a torch that is built for that device") from error
    name, repository = str(name), None
    if name == "sd14":
        repository, path = SD14, fetch(SD14, wanted_files(parts, dtype))
    elif name == "emoji":
        path = shipped("emoji")
    else:
        path = Path(os.path.expanduser(name))
        refuse_pickles(path)
        if not os.path.isdir(path) and not (os.path.isfile(path) and path.suffix == ".safetensors"):
            said = f"{name} is no model" if os.path.exists(path) else f"there is no model {name}"
            near = "".join(f"did you mean {known}? " for known in difflib.get_close_matches(name.lower(), NAMED, 1))
            raise UserError(f"{said}: {near}--model takes {MODELS}")
    model = Model(name, path, dtype, device, repository)
    for part in parts:
        model.part(part)
    return model


def expected_unet(name: str) -> UNet:
    """The U-Net of "sd14" or "emoji", with no memory behind its tensors: what gates must fit. Downloads nothing."""
    if name == "sd14":
        return Part(UNet, SD14_CONFIGS["unet"], Path(), diffusers_name).empty()
    return folder_part(shipped(name) / "unet", "unet", torch.float32).empty()


CLIP_LARGE = "openai/clip-vit-large-patch14"


def load_clip(
    name: str | Path = CLIP_LARGE, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[CLIP, Tokenizer]:
    """A CLIP model and its tokenizer, from a folder or the Hugging Face repository of any `openai/clip-vit-*`.

    UserError if there is no such folder or repository, or it holds something else.
    """
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
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

# What stock tools want to know of a CLIP tokenizer besides its two files; without a length they do not even start.
TOKENIZER_CONFIG = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "do_lower_case": True,
}


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
        for part in ("text_encoder", "unet", "vae"):
            write_part(model, part, temporary / part, changed.get(part))
        if model.has_clip:
            write_part(model, "clip", temporary / "clip", changed.get("clip"))
        (temporary / "tokenizer").mkdir()
        for path in tokenizer_files(model.tokenizer_folder):
            copy_file(path, temporary / "tokenizer" / path.name)
        length = model.part("text_encoder").config.get("max_position_embeddings", 77)
        tokenizer = {**TOKENIZER_CONFIG, "model_max_length": length}
        write_text(temporary / "tokenizer" / "tokenizer_config.json", json.dumps(tokenizer, indent=2))
        scheduler = {"_class_name": "DDIMScheduler", **model.schedule.config}
        write_text(temporary / SCHEDULER, json.dumps(scheduler, indent=2))
        write_text(temporary / "model_index.json", json.dumps(MODEL_INDEX, indent=2))
        appear(temporary, folder)
    except Unwritten as error:  # a file in it, under a name that the user never gave
        raise Unwritten(folder, error.error) from error
    except OSError as error:
        raise Unwritten(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def appear(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name; UserError if another run has put a different one there meanwhile."""
    try:
        os.replace(temporary, folder)
    except OSError as error:
        if not os.path.exists(folder):
            raise
        if not same_files(temporary, folder):
            raise UserError(
                f"{folder} exists already, written by another run meanwhile: choose another name"
            ) from error


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


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
            part.check(expected, part.keys())
            state = part.read(expected, model.dtype, torch.device("cpu"))
        if {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in expected.items()}:
            raise ValueError(f"these are not the tensors of a {part.build.__name__} of this config")
        save_tensors(target, state)
    write_text(folder / "config.json", json.dumps(part.config, indent=2))


# --- Prompts -----------------------------------------------------------------------------------------------------


def read_prompts(preset: str) -> Prompts:
    """Templates and anchor words of a preset, of prompts/<preset>.txt; UserError when the file is missing or spoilt."""
    path = shipped("prompts") / f"{preset}.txt"
    try:
        return parse_prompts(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error


# --- Cache of contexts -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where encoded anchors are kept: $CPE_CACHE, else ~/.cache/cpe; UserError if there is no home folder either."""
    try:
        return Path(os.environ.get("CPE_CACHE") or Path.home() / ".cache" / "cpe")
    except RuntimeError as error:
        raise UserError("there is no home folder to keep encoded anchors in: set CPE_CACHE to a folder") from error


def kept_contexts(path: Path, model: Model, prompts: list[str]) -> Tensor:
    """Contexts [B, 77, d] of prompts, from the file at `path`; encoded, and written there, if it does not have them.

    In half precision. A file that cannot be written is a warning.
    """
    config = model.part("text_encoder").config
    shape = (len(prompts), config.get("max_position_embeddings", 77), config["hidden_size"])
    with suppress(UserError, KeyError):  # not there yet, or damaged
        tensor = load_tensors(path)[0]["contexts"]
        if tensor.shape == shape and tensor.dtype == torch.float16:
            return tensor
    tensor = model.encode(prompts).half().cpu()
    try:
        save_tensors(path, {"contexts": tensor})
    except Unwritten as error:  # of the folder: once for all its files
        said = Unwritten(path.parent, error.error)
        warnings.warn(f"{said} (CPE_CACHE names the folder). Going on without it", stacklevel=2)
    return tensor


def cached_contexts(
    model: Model, prompts: Sequence[str], progress: Callable[[list], Any] = list, chunk: int = 64
) -> Tensor:
    """Contexts [A, 77, d] of prompts in half precision, from the cache where an earlier target left them.

    They are kept in chunks, so that an interrupted encoding goes on where it stopped. `progress` wraps the chunks.
    Errors as of `Model.encode` and `cache_folder`.
    """
    parts = [list(prompts[i : i + chunk]) for i in range(0, len(prompts), chunk)]
    contexts = []
    words = [path.read_text(encoding="utf-8") for path in tokenizer_files(model.tokenizer_folder)]
    # Tensors, which the fingerprint is of, are the same with any number of heads; the rest of a config says nothing.
    sizes = [model.part("text_encoder").config[key] for key in SIZES[TextEncoder]]
    for part in progress(parts):
        key = hashlib.sha256(json.dumps([model.fingerprint, sizes, words, part]).encode()).hexdigest()[:32]
        path = cache_folder() / f"contexts-{key}.safetensors"
        contexts.append(kept_contexts(path, model, part))
    return torch.cat(contexts) if contexts else model.encode([]).half().cpu()
