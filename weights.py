"""Models on disk: find, download, read, check and write them; the only file that touches disk or network for models.

A model is a folder in the diffusers layout (tokenizer/, text_encoder/, unet/, vae/, scheduler/, perhaps clip/), or one
safetensors file in the original layout of Stable Diffusion. Its architecture is read from config.json, its tensors
must be exactly those of the modules in clip.py, unet.py and vae.py. Parts are loaded when they are first used, by
memory map. Only safetensors are read: a pickle can run any code.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from clip import CLIP, TextEncoder, Tokenizer
from sampler import Schedule
from unet import UNet
from vae import VAE

SD14 = "CompVis/stable-diffusion-v1-4"
EMOJI = Path(__file__).resolve().parent / "emoji"
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")

# Old files have these besides, or under other names; nothing else may differ.
IGNORED = re.compile(r".*text_model\.embeddings\.position_ids|.*vision_model\.embeddings\.position_ids")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class UserError(Exception):
    """Something the user can mend: what is wrong, with which file or argument, and what to do next."""


# --- Writing -----------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place only when all went well; UserError on a full disk."""
    path = Path(path)
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        raise UserError(f"{path} cannot be written: {reason or error}. Choose another place for it.") from error
    finally:
        with suppress(OSError):  # in a folder we cannot write to there is nothing of ours
            part.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with writing(path) as part:
        part.write_bytes(content)


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, to_bytes(tensors, metadata=metadata))


# --- Reading -----------------------------------------------------------------------------------------------------


def refuse_pickle(path: Path) -> None:
    """UserError for a file that is no safetensors."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any code when it is read: only .safetensors are. Get the model in "
            "that format (most are published in both), or convert it where you trust it."
        )


@contextmanager
def opened(path: str | Path) -> Iterator["safe_open"]:
    """A memory-mapped safetensors file; UserError if it is missing, truncated or something else."""
    path = Path(path)
    refuse_pickle(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path} is not a whole safetensors file ({error}): get it again.") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_json(path: Path) -> dict:
    """A JSON object; UserError if it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is this a whole model in the diffusers layout?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


def check_config(config: dict, fixed: dict, path: Path) -> None:
    """UserError naming the first key that asks for something this project does not implement."""
    for key, allowed in fixed.items():
        value = config.get(key, allowed)
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        values = value if isinstance(value, list | tuple) else (value,)
        if any(v not in choices for v in values):
            raise UserError(f"{path}: {key} = {value!r} is not implemented here (only {allowed!r} is).")


def check_sizes(config: dict, keys: Iterable[str], path: Path) -> None:
    """UserError naming the first size that is missing or no positive whole number (or a list of such)."""
    for key in keys:
        value = config.get(key)
        values = value if isinstance(value, list) and value else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= 2**20 for v in values):
            raise UserError(f"{path}: {key} must be a positive whole number or a list of such, not {value!r}.")


TRANSFORMER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_SIZES = ("vocab_size", *TRANSFORMER)
VISION_SIZES = ("image_size", "patch_size", *TRANSFORMER)
CONVOLUTIONS = ("block_out_channels", "layers_per_block", "in_channels", "out_channels", "norm_num_groups")
SIZES = {
    TextEncoder: TEXT_SIZES,
    UNet: (*CONVOLUTIONS, "cross_attention_dim", "attention_head_dim", "sample_size"),
    VAE: (*CONVOLUTIONS, "latent_channels"),
    CLIP: ("projection_dim",),
}


def check(kind: type[nn.Module], config: dict, path: Path) -> None:
    """UserError if a module of this kind cannot be built from `config`."""
    check_sizes(config, SIZES[kind], path)
    parts = [config]
    if kind is CLIP:
        parts = [config.get("text_config"), config.get("vision_config")]
        for part, sizes in zip(parts, (TEXT_SIZES, VISION_SIZES), strict=True):
            if not isinstance(part, dict):
                raise UserError(f"{path}: text_config and vision_config must be there.")
            check_sizes(part, sizes, path)
    for part in parts:
        check_config(part, kind.FIXED, path)
        heads = part.get("num_attention_heads")
        if heads and part["hidden_size"] % heads:
            raise UserError(f"{path}: num_attention_heads = {heads} does not divide hidden_size.")
    if "block_out_channels" in config:
        check_blocks(config, path)


def check_blocks(config: dict, path: Path) -> None:
    """UserError if the levels of a U-Net or autoencoder do not fit together."""
    channels, groups = config["block_out_channels"], config["norm_num_groups"]
    if not isinstance(channels, list):
        raise UserError(f"{path}: block_out_channels must be a list.")
    for key in ("down_block_types", "up_block_types"):
        if len(config.get(key, channels)) != len(channels):
            raise UserError(f"{path}: {key} and block_out_channels must be of one length.")
    heads = config.get("attention_head_dim", 1)
    for key, n in (("norm_num_groups", groups), ("attention_head_dim", heads)):
        if not isinstance(n, int) or any(c % n for c in channels):
            raise UserError(f"{path}: {key} = {n!r} must be one number that divides every block_out_channels.")


def modern(name: str) -> str:
    """The key of today for a key of an old file (the autoencoder's attention was named otherwise)."""
    if ".attentions." in name or ".attn_1." in name:
        head, *tail = name.rsplit(".", 2)
        if len(tail) == 2 and tail[0] in OLD_ATTENTION:
            return f"{head}.{OLD_ATTENTION[tail[0]]}.{tail[1]}"
    return name


def load(kind: type[nn.Module], config: dict, source: "Source", dtype: torch.dtype, device: str) -> nn.Module:
    """Build a module and give it the tensors of `source`: exactly its own, each of its shape, or UserError."""
    with torch.device("meta"):
        module = kind(config)
    expected = module.state_dict()
    shapes = source.shapes()
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    odd = [n for n in expected if n in shapes and math.prod(shapes[n]) != expected[n].numel()]
    for problem, names in (("lacks", missing), ("should not have", extra), ("has other shapes for", odd)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{source.path} {problem} {shown}: it does not fit its config.")
    state = {}
    for name, tensor in source.tensors(list(expected)):
        if tensor.shape != expected[name].shape and tensor.squeeze().shape != expected[name].squeeze().shape:
            raise UserError(f"{source.path} has other shapes for {name}: it does not fit its config.")
        # Old files keep the autoencoder's linear layers as 1x1 convolutions.
        state[name] = tensor.reshape(expected[name].shape).to(device, dtype, copy=True)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


class Source:
    """The tensors of one part of a model in a safetensors file, under their names of today."""

    def __init__(self, path: Path, rename=modern):
        self.path, self.rename = path, rename

    def names(self) -> dict[str, str]:
        """Name of today -> name in the file; names that the renaming gives up on (None) belong to other parts."""
        with opened(self.path) as file:
            pairs = {self.rename(name): name for name in file.keys() if not IGNORED.fullmatch(name)}  # noqa: SIM118
        pairs.pop(None, None)
        return pairs

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every tensor, without reading any."""
        names = self.names()
        with opened(self.path) as file:
            return {name: file.get_slice(old).get_shape() for name, old in names.items()}

    def tensors(self, wanted: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The wanted tensors, one after the other."""
        names = self.names()
        with opened(self.path) as file:
            for name in wanted:
                yield name, file.get_tensor(names[name])


# --- Models ------------------------------------------------------------------------------------------------------


class Model:
    """A model in the diffusers layout; every part is read when it is first asked for. UserError if it cannot be."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.name, self.folder, self.dtype, self.device = name, folder, dtype, device

    def config(self, part: str) -> tuple[dict, Path]:
        """The config.json of a part, and where it lies."""
        path = self.folder / part / "config.json"
        return read_json(path), path

    def source(self, part: str) -> Source:
        """The safetensors file of a part: the fp16 variant if it is the only one, or all that is wanted."""
        folder, stem = self.folder / part, "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        files = [folder / f"{stem}.safetensors", folder / f"{stem}.fp16.safetensors"]
        found = [file for file in files if file.exists()]
        if found:
            return Source(found[-1] if self.dtype == torch.float16 else found[0])
        for file in sorted(folder.glob("*")) if folder.is_dir() else []:
            refuse_pickle(file)
        raise UserError(f"{files[0]} does not exist: is {self.folder} a whole model in the diffusers layout?")

    def load(self, kind: type[nn.Module], part: str) -> nn.Module:
        """Build one part from its folder."""
        config, path = self.config(part)
        check(kind, config, path)
        return load(kind, config, self.source(part), self.dtype, self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """CLIP's tokenizer with this model's vocabulary."""
        folder = self.folder / "tokenizer"
        try:
            return Tokenizer(folder / "vocab.json", folder / "merges.txt")
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} does not exist: is this a whole model?") from None
        except Exception as error:  # the tokenizers library raises plain Exception for merges it cannot use
            raise UserError(f"{folder} holds no usable CLIP tokenizer ({error}).") from error

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text tower that conditions the U-Net."""
        return self.load(TextEncoder, "text_encoder")

    @cached_property
    def unet(self) -> UNet:
        """The denoising U-Net."""
        return self.load(UNet, "unet")

    @cached_property
    def vae(self) -> VAE:
        """The autoencoder."""
        return self.load(VAE, "vae")

    @cached_property
    def clip(self) -> CLIP:
        """The CLIP model that lies beside this one, for evaluation."""
        return self.load(CLIP, "clip")

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule; SD 1.4's where the folder has none."""
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = read_json(path) if path.exists() else {}
        check_config(config, Schedule.FIXED, path)
        return Schedule(config)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 16) -> Tensor:
        """Contexts E [B, 77, d] of prompts."""
        if not prompts:
            return torch.zeros(0, 77, self.text_encoder.config["hidden_size"], device=self.device, dtype=self.dtype)
        tokens = self.tokenizer(prompts).to(self.device)
        return torch.cat([self.text_encoder(part) for part in tokens.split(batch_size)])

    def cross_attention(self) -> dict[str, Tensor]:
        """`...attn2.{to_q,to_k,to_v,to_out.0}.weight` of the U-Net, float32; nothing else of the file is read."""
        config, path = self.config("unet")
        check(UNet, config, path)
        with torch.device("meta"):
            names = [n for n in UNet(config).state_dict() if re.search(r"\.attn2\..*weight$", n)]
        source = self.source("unet")
        missing = [name for name in names if name not in source.names()]
        if missing:
            raise UserError(f"{source.path} lacks {missing[0]}: it does not fit its config.")
        return {name: tensor.to(self.device, torch.float32) for name, tensor in source.tensors(names)}

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the text encoder: two models of one fingerprint give prompts the same contexts.

        Hashes a few rows of every tensor: half a gigabyte need not be read to tell two encoders apart.
        """
        digest = hashlib.sha256()
        source = self.source("text_encoder")
        names = sorted(source.names())
        for name, tensor in source.tensors(names):
            rows = tensor.flatten()[:256].float()
            digest.update(f"{name} {list(tensor.shape)}".encode() + rows.numpy().tobytes())
        for file in ("vocab.json", "merges.txt"):
            path = self.folder / "tokenizer" / file
            digest.update(path.read_bytes() if path.exists() else b"")
        return digest.hexdigest()[:16]


def load_model(name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """Open the model `name`: "emoji" (embedded), "sd14" (cache or download) or a folder; UserError if there is none."""
    if str(name) == "emoji":
        return Model("emoji", EMOJI, dtype, device)
    if str(name) == "sd14":
        return Model("sd14", download_sd14(), dtype, device)
    path = Path(name)
    if path.is_file():
        refuse_pickle(path)
        raise UserError(f"{path} is a file: give the folder of a model in the diffusers layout.")
    if not path.is_dir():
        raise UserError(f"there is no model {str(name)!r}: use sd14, emoji, or the folder of a model.")
    return Model(path.resolve().name, path, dtype, device)


def download_sd14() -> Path:
    """The folder of SD 1.4 in the Hugging Face cache; what is not there is downloaded, resuming where it broke off."""
    from huggingface_hub import snapshot_download  # slow to import, and needed by one command alone

    files = ["tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"]
    files += [f"{part}/config.json" for part in ("text_encoder", "unet", "vae")]
    files += ["text_encoder/model.safetensors"]
    files += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    try:
        folder = Path(snapshot_download(SD14, allow_patterns=files))
    except Exception as error:  # huggingface_hub raises a dozen kinds; all mean that the files cannot be had
        raise UserError(
            f"Stable Diffusion 1.4 is not on this machine and cannot be downloaded ({type(error).__name__}). Either "
            f"connect to the internet and try again (or put {SD14} into the Hugging Face cache yourself, or pass "
            "--model FOLDER), or use the embedded model: --model emoji."
        ) from error
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]} and cannot be completed without a network. Connect and try again, or use "
            "the embedded model: --model emoji."
        )
    return folder


# --- Cache of contexts -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where encoded anchors are kept: $CPE_CACHE, else ~/.cache/cpe."""
    return Path(os.environ.get("CPE_CACHE") or Path.home() / ".cache" / "cpe")


def cached_contexts(model: Model, prompts: Sequence[str], progress=lambda x: x, chunk: int = 64) -> Tensor:
    """Contexts [A, 77, d] of prompts in half precision, from the cache where an earlier target left them.

    They are kept in chunks, so that an interrupted encoding goes on where it stopped. `progress` wraps the chunks.
    """
    parts = [list(prompts[i : i + chunk]) for i in range(0, len(prompts), chunk)]
    contexts = []
    for part in progress(parts):
        key = hashlib.sha256(json.dumps([model.fingerprint, part]).encode()).hexdigest()[:32]
        path = cache_folder() / f"contexts-{key}.safetensors"
        try:
            tensor = read_tensors(path)[0]["contexts"]
        except (UserError, KeyError):  # not there yet, or damaged: encode it again
            tensor = model.encode(part).half().cpu()
            write_tensors(path, {"contexts": tensor})
        contexts.append(tensor)
    return torch.cat(contexts) if contexts else model.encode([]).half()
