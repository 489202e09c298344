"""Contexts that were encoded before: anchors are the same for every target, and take longest to encode.

    anchors = cached_contexts(model, prompts)      # [A, 77, d], half precision; the second target finds them on disk

Files are named by the text encoder's fingerprint, its sizes, the tokenizer and the prompts, so none is ever stale.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loading.configs import SIZES
from loading.files import Unwritten, UserError, load_tensors, save_tensors
from loading.tokens import tokenizer_files

if TYPE_CHECKING:
    from weights import Model


def cache_folder() -> Path:
    """Where encoded anchors are stored: $CPE_CACHE, else ~/.cache/cpe."""
    return Path(os.environ.get("CPE_CACHE") or os.path.expanduser("~/.cache/cpe"))


def stored_contexts(path: Path, model: "Model", prompts: list[str], tokens: int) -> Tensor:
    """Contexts [B, t, d] of prompts in half precision, from the file at `path`; encoded and written if it has none.

    A file that cannot be written is a warning.
    """
    with suppress(UserError, KeyError):  # not there yet, or damaged
        return load_tensors(path)[0]["contexts"]
    tensor = model.encode(prompts, tokens=tokens).half().cpu()
    try:
        save_tensors(path, {"contexts": tensor})
    except Unwritten as error:  # of the folder: once for all its files
        said = Unwritten(path.parent, error.error)
        warnings.warn(f"{said} (CPE_CACHE names the folder). Going on without it", stacklevel=2)
    return tensor


def cached_contexts(model: "Model", prompts: Sequence[str], progress: Callable[[list], Any] = list, chunk: int = 64,
                    tokens: int | None = None) -> Tensor:  # fmt: skip
    """Contexts [A, 77, d] of prompts in half precision, from the cache where an earlier target left them.

    They are stored in chunks, so that an interrupted encoding goes on where it stopped. `progress` wraps the chunks.
    With `tokens`, only of that many. UserError as for `Model.encode`.
    """
    tokens = min(tokens or model.tokens, model.tokens)
    cut = [] if tokens == model.tokens else [tokens]
    words = [path.read_text(encoding="utf-8") for path in tokenizer_files(model.tokenizer_folder)]
    # Tensors, which the fingerprint is of, are the same with any number of heads; the rest of a config says nothing.
    sizes = [model.part("text_encoder").config[key] for key in SIZES["TextEncoder"]]
    contexts = []
    for part in progress([list(prompts[i : i + chunk]) for i in range(0, len(prompts), chunk)]):
        key = hashlib.sha256(json.dumps([model.fingerprint, sizes, words, part, *cut]).encode()).hexdigest()[:32]
        contexts.append(stored_contexts(cache_folder() / f"contexts-{key}.safetensors", model, part, tokens))
    return torch.cat(contexts) if contexts else model.encode([]).half().cpu()
