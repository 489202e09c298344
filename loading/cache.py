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

    They are stored in chunks. What is missing is encoded together, batch by batch, and stored as it comes: an
    interrupted encoding goes on where it stopped. `progress` wraps the batches.
    """
    parts = [list(prompts[i : i + chunk]) for i in range(0, len(prompts), chunk)]
    paths = [path_of(model, part, tokens) for part in parts]
    found = {path: contexts for path in paths if (contexts := stored(path)) is not None}
    missing = [each for each in zip(parts, paths, strict=True) if each[1] not in found]
    at_once = max(1, 64 // chunk)
    batches = [missing[i : i + at_once] for i in range(0, len(missing), at_once)]
    for batch in progress(batches):
        contexts = model.encode([text for part, _ in batch for text in part], tokens=tokens).half().cpu()
        for (_, path), rows in zip(batch, contexts.split([len(part) for part, _ in batch]), strict=True):
            found[path] = rows
            with suppress(UserError):  # a folder that cannot be written costs time, and nothing else
                save_tensors(path, {"contexts": rows})
    return torch.cat([found[path] for path in paths]) if paths else model.encode([]).half().cpu()


def path_of(model: "Model", prompts: list[str], tokens: int | None) -> Path:
    """The file of the contexts of some prompts."""
    ids = model.tokenizer(prompts, model.tokens)[:, :tokens]
    key = hashlib.sha256(f"{model.fingerprint} {ids.tolist()}".encode()).hexdigest()[:32]
    return cache_folder() / f"contexts-{key}.safetensors"


def stored(path: Path) -> Tensor | None:
    """Contexts from their file; None where they are not there yet, or damaged."""
    try:
        return load_tensors(path)[0]["contexts"]
    except (UserError, KeyError):
        return None
