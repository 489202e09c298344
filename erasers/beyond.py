"""What is ours, and in none of the linear erasers' papers: the table has it where a search found it better.

    edited = erase("uce", model, ["cat"], "an object", ["a dog"], ["a {}", "my {}"], sentences=True, padding=True)

    sentences  targets, surrogates and what stays in the lines of CPE's gates, not as bare names
    padding    of UCE and RECE: the whole tail of a name is moved and stays, EOS and padding, which have seen it, too
    eta        of UCE, RECE and MACE: erase past the surrogate, as CPE's erase loss does

All are off by default.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from erasers import ERASERS
from erasers.common import Weights, filled, one_each
from loading.prompts import anchor_prompts
from weights import Model


def erase(
    name: str, model: Model, targets: list[str], surrogate: str | Sequence[str], words: list[str],
    lines: Sequence[str], seed: int = 0, *, sentences: bool = False, padding: bool = False, eta: float = 0.0,
    **settings: Any,
) -> Weights:  # fmt: skip
    """An eraser of `ERASERS` with its own `settings`, and ours. `words` stay; `lines` are sentences with one {} each.

    TypeError for an eraser that knows nothing of `padding` or `eta`.
    """
    if eta:
        settings["goal"] = partial(further, eta=eta)
    if padding:
        settings["which"] = "tail"
    if padding and name == "rece":  # which then starts as its rounds go on
        settings["start"] = settings.get("lam", 0.1), settings.get("s_p", 0.1)
    if sentences:
        words = anchor_prompts(words, lines)
    if sentences and name in ("mace", "esd"):  # which put names into sentences themselves
        settings["templates"] = lines
    elif sentences:
        targets, surrogate = (filled(lines, names) for names in (targets, one_each(surrogate, targets)))
    return ERASERS[name](model, targets, surrogate, words, seed, **settings)


def further(C: Tensor, G: Tensor, eta: float) -> Tensor:
    """What tokens C [n, d] become: those of the surrogate G [n, d], and eta times the way past them."""
    # C + (1 + eta) (G - C)
    return G + eta * (G - C)
