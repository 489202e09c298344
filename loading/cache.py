"""Contexts that were encoded before: anchors are the same for every target, and take longest to encode.

Files are named by the text encoder's fingerprint, the tokens, and how many paddings were read: one is stale only where
the config's heads change.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cpe import Data, Recipe
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import Prompts, prepare

if TYPE_CHECKING:
    from weights import Model


def cache_folder() -> Path:
    """Where encoded anchors are stored: $CPE_CACHE, else ~/.cache/cpe."""
    return Path(os.environ.get("CPE_CACHE") or os.path.expanduser("~/.cache/cpe"))


def cached_contexts(model: "Model", prompts: Sequence[str], progress: Callable[[list], Any] = list, chunk: int = 64,
                    briefly: bool = False) -> Tensor:  # fmt: skip
    """Contexts [A, 77, d] of prompts in half precision. `briefly`, and UserError, as for `Model.encode`.

    They are stored in chunks. What is missing is encoded together, batch by batch, and stored as it comes: an
    interrupted encoding goes on where it stopped. `progress` wraps the batches.
    """
    parts = [list(prompts[i : i + chunk]) for i in range(0, len(prompts), chunk)]
    paths = [path_of(model, part, briefly) for part in parts]
    found = {path: contexts for path in paths if (contexts := stored(path)) is not None}
    missing = [each for each in zip(parts, paths, strict=True) if each[1] not in found]
    at_once = max(1, 64 // chunk)
    for batch in progress([missing[i : i + at_once] for i in range(0, len(missing), at_once)]):
        with warnings.catch_warnings():  # `path_of` has warned of what is too long
            warnings.simplefilter("ignore", UserWarning)
            contexts = model.encode([text for part, _ in batch for text in part], briefly=briefly).half().cpu()
        for (_, path), rows in zip(batch, contexts.split([len(part) for part, _ in batch]), strict=True):
            found[path] = trimmed(rows)
            with suppress(UserError):  # a folder that cannot be written costs time, and nothing else
                save_tensors(path, {"contexts": found[path]})
    if not paths:
        return model.encode([]).half().cpu()
    return torch.cat([E[:, model.by_turns(E.shape[1] - 1)] for E in (found[path] for path in paths)])


def encoded(model: "Model", recipe: Recipe, prompts: Prompts, names: Sequence[str], briefly: bool = False,
            progress: Callable[[list], Any] = list) -> Data:  # fmt: skip
    """`prepare` with contexts of a model, from the cache where an earlier run left them; errors as there."""
    cached = partial(cached_contexts, model, progress=progress)
    return prepare(
        recipe, prompts, names,
        lambda texts: cached(texts, briefly=briefly).to(model.device, model.dtype),
        partial(cached, chunk=prompts.per_word, briefly=briefly),
        partial(cached, briefly=True),
    )  # fmt: skip


def trimmed(E: Tensor) -> Tensor:
    """Contexts [B, t, d] without the tokens at the end of [B, T, d] that repeat what stands two before them."""
    changes = (E[:, 2:] != E[:, :-2]).any(dim=2).any(dim=0).nonzero()
    return E[:, : changes.amax() + 3 if len(changes) else 2].clone()


def path_of(model: "Model", prompts: list[str], briefly: bool) -> Path:
    """The file of the contexts of some prompts."""
    ids, how = model.tokenizer(prompts, model.tokens).tolist(), f"{model.paddings} by turns " if briefly else ""
    key = hashlib.sha256(f"{model.fingerprint} {how}{ids}".encode()).hexdigest()[:32]
    return cache_folder() / f"contexts-{key}.safetensors"


def stored(path: Path) -> Tensor | None:
    """Contexts from their file; None where they are not there yet, or damaged."""
    try:
        return load_tensors(path)[0]["contexts"]
    except (UserError, KeyError):
        return None
