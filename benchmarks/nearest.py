"""Are the nearest words near? What `nearest_words` chooses among the names of a preset, as anchors of a target.

    python benchmarks/nearest.py "Brad Pitt" --model sd14 --preset celebrity     # the 50, with their cosines
    python benchmarks/nearest.py                                                 # of all things of the embedded model

The second prints, for ever more of the nearest, how many are of the target's own kind (an animal for an animal; kinds
follow one another in prompts/emoji.txt), of all and of those that share no word with it, and their mean cosine. The
last row is of all names: what chance would choose.
"""

import argparse
import sys
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loading.cache import cached_contexts
from loading.prompts import PRESETS, key_words, nearest_words, read_prompts
from weights import load_model

FIRST = ("red heart", "grinning face", "cat face", "rose", "red apple", "soccer ball", "automobile", "baby", "sun")


def cosines(contexts: Tensor) -> Tensor:
    """Those of flattened contexts [n, T, d] with one another, [n, n], as `nearest_words` compares them."""
    flat = contexts[:, :16].float().flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    return flat @ flat.T


def same_kind(names: list[str], near: Tensor, count: int, other: bool) -> float:
    """The mean share of the `count` nearest that are of a name's kind; `other`: of names without one of its words."""
    kinds, shares = list(accumulate(name in FIRST for name in names)), []
    for i, name in enumerate(names):
        order = [j for j in near[i].argsort(descending=True).tolist() if j != i]
        order = [j for j in order if not (other and key_words(name) & key_words(names[j]))][:count]
        shares.append(sum(kinds[j] == kinds[i] for j in order) / len(order))
    return sum(shares) / len(shares)


def main() -> None:
    """Print the table, or the lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--preset", default="emoji")
    args = parser.parse_args()
    if not args.targets and args.preset != "emoji":
        parser.error("kinds are known only for the embedded model's names: give targets")
    model, prompts = load_model(args.model, parts=("text_encoder",)), read_prompts(args.preset)
    names, encode = prompts.domain, partial(cached_contexts, model, briefly=True)
    for target in args.targets:
        near = dict(zip(names, cosines(encode([target, *names]))[0, 1:].tolist(), strict=True))
        chosen = nearest_words(PRESETS[args.preset], prompts, [target], encode)
        means = (sum(near[word] for word in words) / len(words) for words in (chosen, names))
        print("\n{}: mean cosine of the nearest {:.2f}, of all {:.2f}".format(target, *means))
        print(", ".join(f"{word} {near[word]:.2f}" for word in chosen))
    if args.targets:
        return
    near = cosines(encode(names))
    near.fill_diagonal_(-torch.inf)
    print("| nearest | of its kind | among those without its words | mean cosine |\n|---:|---:|---:|---:|")
    for count in (5, 10, 50, len(names) - 1):
        kinds = " | ".join(f"{100 * same_kind(names, near, count, other):.0f} %" for other in (False, True))
        print(f"| {count} | {kinds} | {near.topk(count).values.mean():.2f} |")


if __name__ == "__main__":
    with torch.no_grad():
        main()
