"""What is in pictures, and how far they moved: every measure of the comparison, and of a folder, on CLIP alone.

    names = name_features(clip, tokenizer, ["cat", "dog"])        # once per list of names
    recognise(clip, images, names)                                # zero-shot: index of the name each image shows

Shapes: B images [B, 3, H, W] in [-1, 1], C names, p width of CLIP's projection.
Sources: zero-shot recognition, Radford et al. 2021 (arXiv 2103.00020); CLIP score, Hessel et al. 2021 (2104.08718);
CMMD, Jayasumana et al. 2024 (2401.09603).
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip import CLIP, Tokenizer, preprocess
from loading.files import UserError
from loading.prompts import within

TEMPLATES = ("{}", "{} emoji", "a picture of a {}")


@torch.no_grad()
def text_features(clip: CLIP, tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """Unit vectors [B, p] of prompts."""
    tokens = tokenizer(prompts).to(clip.logit_scale.device)
    # The tower is causal and read at EOS, the largest id: cutting the padding after the longest prompt changes nothing.
    tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
    return torch.cat([F.normalize(clip.encode_text(part), dim=-1) for part in tokens.split(128)])


@torch.no_grad()
def image_features(clip: CLIP, images: Tensor) -> Tensor:
    """Unit vectors [B, p] of images [B, 3, H, W]."""
    return F.normalize(clip.encode_image(preprocess(images, clip.image_size)), dim=-1)


def name_features(
    clip: CLIP, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One unit vector per name, the mean over templates: [C, p]."""
    features = text_features(clip, tokenizer, [template.format(name) for name in names for template in templates])
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)


def recognise(clip: CLIP, images: Tensor, names: Tensor) -> Tensor:
    """Index [B] of the name nearest to each image [B, 3, H, W], by cosine with `name_features` [C, p]."""
    return (image_features(clip, images) @ names.T).argmax(dim=-1)


@torch.no_grad()
def recognise_style(clip: CLIP, images: Tensor, captions: Tensor) -> Tensor:
    """Index [B] of the style of each image, whatever it shows; `captions` [C, S, p] names every concept in each style.

    P(style) = sum over concepts of P(concept, style), the softmax of CLIP's logits over all C S captions.
    """
    logits = clip.logit_scale.exp() * torch.einsum("bp,csp->bcs", image_features(clip, images), captions)
    return logits.logsumexp(dim=1).argmax(dim=-1)


def spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    """At most `count` items, evenly spaced from the first; of fewer than twice as many the first `count`."""
    return items[:: max(1, len(items) // count)][:count]


def clip_score(images: Tensor, prompts: Tensor) -> Tensor:
    """CLIP score [B] of unit features of images and of their prompts, [B, p]: 100 max(cos, 0)."""
    return 100 * (images * prompts).sum(dim=-1).clamp(min=0)


def cmmd(before: Tensor, after: Tensor, sigma: float = 10.0) -> float:
    """CMMD of two sets of unit image features [B, p]: 1000 MMD^2 with a Gaussian kernel, 0 for equal sets.

    Sigma and the factor are the paper's; the estimate is the biased one, as in its authors' code.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # k(x, y) = exp(-|x - y|^2 / (2 sigma^2));   float64: all distances are tiny beside sigma
        return torch.exp(-torch.cdist(x, y).square() / (2 * sigma**2)).mean()

    before, after = before.cpu().double(), after.cpu().double()  # Apple's graphics cards have no float64
    # MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)
    return 1000 * (kernel(before, before) + kernel(after, after) - 2 * kernel(before, after)).item()


def change(before: Tensor, after: Tensor) -> Tensor:
    """Mean absolute difference [B] of images or latents [B, ...] made from the same seeds; of images 2 is the most."""
    return (before - after).abs().flatten(1).mean(dim=1)


def interval(successes: int, images: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share, in [0, 1] (Wilson 1927): honest even at 0 of n. `images` > 0."""
    share, n = successes / images, images
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    middle, spread = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (middle - spread) / (1 + z**2 / n)), min(1.0, (middle + spread) / (1 + z**2 / n))


# --- Pictures in a folder ----------------------------------------------------------------------------------------

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def read_folder(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder and the prompt of each: from prompts.csv (file, prompt), a .txt, or `generate`.

    UserError where there is no folder, no picture, or a picture without a prompt.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one with pictures in it")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"{folder} holds no pictures ({', '.join(PICTURES)}): `generate --out` writes some")
    said = read_captions(folder / "prompts.csv")
    for path in files:
        if path.name not in said and path.with_suffix(".txt").is_file():
            said[path.name] = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip()
        said.setdefault(path.name, str(drawn_with(path).get("prompt", "")))
    if missing := [path.name for path in files if not said.get(path.name)]:
        raise UserError(f"{folder}: no prompt for {missing[0]}: name it in prompts.csv (file,prompt), or in a .txt")
    return [(path, said[path.name]) for path in files]


def read_captions(table: Path) -> dict[str, str]:
    """The prompts of a folder's prompts.csv by file name; {} where there is none. UserError if it is no such table."""
    if not table.is_file():
        return {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            if missing := {"file", "prompt"} - {*(reader.fieldnames or [])}:
                raise UserError(f"{table} has no column {min(missing)!r}: it needs file and prompt")
            return {row["file"] or "": row["prompt"] or "" for row in reader}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table} is no CSV in UTF-8 ({error}): check its double quotes") from error


def drawn_with(path: Path) -> dict:
    """The settings that `generate` writes into its pictures, the prompt among them; {} where none can be right."""
    nonsense = (OSError, SyntaxError, ValueError, TypeError, RecursionError, Image.DecompressionBombError)
    with suppress(*nonsense), Image.open(path) as image:
        image.load()
        said = dict(json.loads(image.info.get("cpe", "{}")))
        (width, height), prompts = said.get("cell", image.size), said.get("prompts", [])
        fits = 0 < width <= image.width and 0 < height <= image.height
        fits &= "steps" not in said or "prompts" in said  # an earlier version did not say what a sheet holds
        kinds = [type(each) for each in (width, height, prompts, *prompts)]
        return said if fits and kinds == [int, int, list, *[str] * len(prompts)] else {}
    return {}


def read_image(path: Path, size: int) -> Tensor:
    """A picture [3, size, size] in [-1, 1]; UserError for a file that is none."""
    try:
        with Image.open(path) as image:
            image.load()
            pixels = numpy.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture ({error}): remove it, or get it again") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def judge_folder(clip: CLIP, tokenizer: Tokenizer, found: Sequence[tuple[Path, str]], names: Sequence[str],
                 reference: Sequence[Path] = (), others: Sequence[str] = (),
                 progress: Callable[[list], Iterable] = list) -> dict:  # fmt: skip
    """CLIP score, share of pictures in which CLIP sees each of `names`, the share that shows the name in its prompt
    (of "cat" and "cat face" the longer), and CMMD to the pictures of `reference`; what was not asked for is left out.
    CLIP may see one of `others` instead. `progress` wraps the batches.
    """

    def features(paths: Sequence[Path]) -> Tensor:
        batches = progress([paths[i : i + 8] for i in range(0, len(paths), 8)])
        stacked = (torch.stack([read_image(path, clip.image_size) for path in batch]) for batch in batches)
        return torch.cat([image_features(clip, batch.to(clip.logit_scale.device)) for batch in stacked])

    images = features([path for path, _ in found])
    prompts = text_features(clip, tokenizer, [prompt for _, prompt in found])
    figures: dict = {"images": len(found), "clip_score": clip_score(images, prompts).mean().item()}
    if names:
        seen = (images @ name_features(clip, tokenizer, [*names, *others]).T).argmax(dim=-1).tolist()
        figures["seen"] = {name: seen.count(i) / len(seen) for i, name in enumerate(names)}
        asked = []
        for i, (_, prompt) in enumerate(found):
            there = [name for name in names if within(name, prompt)]
            asked += [(i, names.index(a)) for a in there if not any(len(a) < len(b) and within(a, b) for b in there)]
        if asked:
            figures["accuracy"] = sum(seen[i] == n for i, n in asked) / len(asked)
    if reference:
        figures["cmmd"] = cmmd(features(reference), images)
    return figures
