"""What linear erasers can be given that is in none of their papers. All of it is off by default.

    eta        erase past the surrogate, as CPE's erase loss does
    padding    move and preserve the tail of a name, EOS and padding with it, not the last token alone: see common.py
    sentences  put the names into the templates that CPE's gates are trained with

Built on common.
"""

from collections.abc import Sequence

from torch import Tensor

from erasers.common import filled


def further(C: Tensor, G: Tensor, eta: float) -> Tensor:
    """What tokens C [n, d] become: those of the surrogate G [n, d], and eta times the way past them."""
    # C + (1 + eta) (G - C)
    return G + eta * (G - C) if eta else G


def sentences(
    templates: Sequence[str], targets: Sequence[str], surrogates: Sequence[str], together: bool = True
) -> tuple[list[str], list[str]]:
    """Targets in all templates, and the surrogate of each in the same ones; bare if not `together`."""
    bare = [surrogate for surrogate in surrogates for _ in templates]
    return filled(templates, targets), filled(templates, surrogates) if together else bare
