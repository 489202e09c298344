"""Contexts that were encoded before: anchors are the same for every target, and take longest to encode.

Files are named by the text encoder's fingerprint and the tokens: one is stale only where the config's heads change.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loading.files import UserError, load_tensors, save_tensors

if TYPE_CHECKING:
    from weights import Model


def cache_folder() -> Path:
    """Where encoded anchors are stored: $CPE_CACHE, else ~/.cache/cpe."""
    return Path(os.environ.get("CPE_CACHE") or os.path.expanduser("~/.cache/cpe"))


def cached_contexts(model: "Model", prompts: Sequence[str], progress: Callable[[list], Any] = list, chunk: int = 64,
                    tokens: int | None = None) -> Tensor:  # fmt: skip
    """Contexts [A, 77, d] of prompts in half precision, or of their first `tokens`. UserError as for `Model.encode`.

    They are stored in chunks, which `progress` wraps: an interrupted encoding goes on where it stopped.
    """
    contexts = []
    for part in progress([list(prompts[i : i + chunk]) for i in range(0, len(prompts), chunk)]):
        ids = model.tokenizer(part, model.tokens)[:, :tokens]
        key = hashlib.sha256(f"{model.fingerprint} {ids.tolist()}".encode()).hexdigest()[:32]
        path = cache_folder() / f"contexts-{key}.safetensors"
        try:
            contexts.append(load_tensors(path)[0]["contexts"])
        except (UserError, KeyError):  # not there yet, or damaged
            contexts.append(model.encode(part, tokens=tokens).half().cpu())
            with suppress(UserError):  # a folder that cannot be written costs time, and nothing else
                save_tensors(path, {"contexts": contexts[-1]})
    return torch.cat(contexts) if contexts else model.encode([]).half().cpu()
