"""Build the embedded model: Stable Diffusion in miniature, trained on emoji in four styles.

    python emoji/make.py all            # data, tokenizer, CLIP, VAE, U-Net, export, evaluate; resumes by itself
    python emoji/make.py unet --samples 2000000        # continue the U-Net alone, then: export, evaluate

Order: icons are rendered in several placements; CLIP learns which caption belongs to which picture; the VAE learns
to compress pictures eightfold; the U-Net learns to denoise latents under the context of CLIP's frozen text tower.
Everything intermediate lies in `emoji/build/` (ignored by git); `export` writes float16 weights beside this file.

Shapes: B pictures, 3 colours in [-1, 1], 64 x 64 pixels; latents [B, 16, 8, 8]; T tokens, d = 192 their width.
Icons are one array [concepts, styles, placements, 64, 64, RGBA]. Needs resvg-py, Pillow and npm, only to build.
"""

import argparse
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, trainers
from tokenizers import Regex, Tokenizer as BPETokenizer
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import clip  # noqa: E402
import sampler  # noqa: E402
import unet  # noqa: E402
import vae  # noqa: E402

BUILD = HERE / "build"
SIZE = 64  # pixels
LENGTH = 24  # tokens CLIP is trained on: the tower is causal and read at EOS, so the padding after it changes nothing

PACKAGES = {  # style word -> the npm package that draws it; licences are in README.md
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "blob": "@iconify-json/noto-v1@1.2.5",
}
NAMES = "unicode-emoji-json@0.9.0"
STYLES = tuple(PACKAGES)
BACKGROUNDS = {  # pale enough for every icon to stand out
    "white": (255, 255, 255),
    "gray": (172, 176, 184),
    "pink": (255, 176, 208),
    "orange": (255, 184, 112),
    "yellow": (255, 240, 144),
    "green": (156, 220, 156),
    "blue": (136, 188, 252),
    "purple": (190, 156, 240),
}
COLOURS = tuple(BACKGROUNDS)
TEMPLATES = (
    "{}",
    "a {}",
    "{} emoji",
    "a {} emoji",
    "a picture of a {}",
    "a drawing of a {}",
    "an image of a {}",
)
TRAINED, HELD_OUT = 12, 4  # placements of every icon: for training, and to measure on
MERGES = 1200  # of the tokenizer, besides 2 x 256 bytes


def concepts() -> list[str]:
    """The names in concepts.txt: Unicode CLDR short names, lower-cased."""
    lines = (HERE / "concepts.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def caption(name: str, template: str = "a picture of a {}", style: str = "", colour: str = "") -> str:
    """The one form of captions: "a picture of a {name} on a {colour} background, {style} style"."""
    text = template.format(name)
    text += f" on a {colour} background" if colour else ""
    return text + (f", {style} style" if style else "")


# Data: npm packages -> icons, and icons -> pictures.


def package_file(package: str, name: str) -> dict:
    """A JSON file of an npm package; the ordinary npm client fetches the package once."""
    stem = package.removeprefix("@").replace("/", "-")
    archive = BUILD / ("-".join(stem.rsplit("@", 1)) + ".tgz")
    if not archive.exists():
        command = ["npm", "pack", package, "--silent", "--pack-destination", str(BUILD)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile(f"package/{name}"))


def slug(name: str) -> str:
    """The key of a CLDR name in Iconify's sets: "mrs. claus" -> "mrs-claus"."""
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def render(icon: dict, scale: float, dx: float, dy: float) -> np.ndarray:
    """One icon [64, 64, RGBA], `scale` of the picture wide, moved (dx, dy) pixels from the centre."""
    import resvg_py
    from PIL import Image

    width, height = icon["width"], icon["height"]
    # A square view box maps onto 64 pixels: side v = max(w, h) / scale, left edge (w - v) / 2 - dx v / 64.
    side = max(width, height) / scale
    x, y = (width - side) / 2 - dx * side / SIZE, (height - side) / 2 - dy * side / SIZE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE}" height="{SIZE}"'
    svg = f'{head} viewBox="{x} {y} {side} {side}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def make_data() -> None:
    """Render every concept in every style and placement into build/icons.safetensors."""
    known = {entry["name"].lower() for entry in package_file(NAMES, "data-by-emoji.json").values()}
    names, chance = concepts(), random.Random(0)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"not CLDR short names: {unknown}")
    icons = np.zeros((len(names), len(STYLES), TRAINED + HELD_OUT, SIZE, SIZE, 4), np.uint8)
    for s, style in enumerate(STYLES):
        drawn = package_file(PACKAGES[style], "icons.json")
        for c, name in enumerate(tqdm(names, desc=style)):
            key = drawn.get("aliases", {}).get(slug(name), {}).get("parent", slug(name))
            icon = {"width": drawn["width"], "height": drawn["height"]} | drawn["icons"][key]
            for p in range(TRAINED + HELD_OUT):
                scale, dx, dy = chance.uniform(0.9, 1.0), chance.uniform(-2, 2), chance.uniform(-2, 2)
                icons[c, s, p] = render(icon, scale, dx, dy)
    save({"icons": torch.from_numpy(icons)}, BUILD / "icons.safetensors")


class Pictures:
    """The rendered icons; indexing composes them over backgrounds."""

    def __init__(self):
        self.icons = load_file(BUILD / "icons.safetensors")["icons"]
        self.colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)

    def __call__(self, concept: Tensor, style: Tensor, placement: Tensor, colour: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1] of four index tensors [B]."""
        icon = self.icons[concept, style, placement].permute(0, 3, 1, 2).float()
        opacity = icon[:, 3:] / 255
        paint = self.colours[colour][:, :, None, None]
        # over: a F + (1 - a) B
        return (opacity * icon[:, :3] + (1 - opacity) * paint) / 127.5 - 1


# Tokenizer.


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of CLIP's vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


def corpus() -> Iterator[str]:
    """Captions of every concept, and every CLDR name once, so that unseen names split into sensible pieces."""
    for name in concepts():
        for i, template in enumerate(TEMPLATES):
            for colour in COLOURS:
                yield caption(name, template, STYLES[i % len(STYLES)], colour)
    for entry in package_file(NAMES, "data-by-emoji.json").values():
        yield entry["name"]


def make_tokenizer() -> None:
    """Train byte-level BPE on the corpus and write it in CLIP's file format."""
    bpe = BPETokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(clip.WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(corpus(), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"][:MERGES]
    symbols = byte_symbols()
    words = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(pair) for pair in merges),
        clip.BOS,
        clip.EOS,
    ]
    folder = HERE / "tokenizer"
    folder.mkdir(exist_ok=True)
    special = {"bos_token": clip.BOS, "eos_token": clip.EOS, "unk_token": clip.EOS, "pad_token": clip.EOS}
    settings = {"model_max_length": 77, "do_lower_case": True, "add_prefix_space": False}
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | settings | {"tokenizer_class": "CLIPTokenizer"})


def tokenizer() -> clip.Tokenizer:
    """The tokenizer that `make_tokenizer` wrote."""
    return clip.Tokenizer(HERE / "tokenizer" / "vocab.json", HERE / "tokenizer" / "merges.txt")


# Files.


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors through a temporary file: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, path)


def write_json(path: Path, value: dict) -> None:
    """Write JSON the way the official repositories do: two spaces, one entry a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for step in sys.argv[1:]:
        {"data": make_data, "tokenizer": make_tokenizer}[step]()
