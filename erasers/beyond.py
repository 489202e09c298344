"""What linear erasers can be given that is in none of their papers. All of it is off by default.

    eta        erase past the surrogate, as CPE's erase loss does: `further`
    padding    move and preserve the tail of a name, EOS and padding with it, not the last token alone: see common.py
    sentences  targets and surrogates in the templates of CPE's gates: pass `common.filled(templates, names)`; MACE,
               ESD-x and LoRA put names into sentences themselves: pass `templates`

Built on torch.
"""

from torch import Tensor


def further(C: Tensor, G: Tensor, eta: float) -> Tensor:
    """What tokens C [n, d] become: those of the surrogate G [n, d], and eta times the way past them."""
    # C + (1 + eta) (G - C)
    return G + eta * (G - C) if eta else G
