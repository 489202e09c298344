"""UCE: Unified Concept Editing in Diffusion Models (Gandikota et al., WACV 2024, arXiv 2308.14761).

One least-squares edit of to_k and to_v: what a target's token is read as becomes what the surrogate's is read as, while
the tokens of preserved prompts and the weights themselves change little. By default it is the authors' present code
(2025): one token of every prompt. `first` is their code of 2023, from which RECE starts.
"""

from collections.abc import Sequence

from erasers.common import Goal, Weights, finished, moment, move, one_each, pairs, projections
from weights import Model


def uce(
    model: Model, targets: list[str], surrogate: str | Sequence[str], preserved: list[str], seed: int = 0, *,
    lam: float = 0.5, s_e: float = 1.0, s_p: float = 1.0, first: bool = False, which: str = "last",
    goal: Goal = lambda C, G: G,
) -> Weights:  # fmt: skip
    """The last token of every target is read as the surrogate's. No chance in it. `which` and `goal`: see beyond.py.

    With `first`, so are EOS and all padding after it, and what stays are all tokens of '' and of `preserved`. That code
    took s_p = max(0.1, 1 / n) for n prompts that stay, '' among them: 1 where nothing else is preserved.
    """
    kept = moment(model, ["", *preserved], "all") if first else moment(model, preserved, which)
    C, G = pairs(model, targets, one_each(surrogate, targets), "tail" if first else which)
    return finished(model, move(projections(model), C, goal(C, G), kept, lam, s_e, s_p))
