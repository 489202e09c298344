"""Build the embedded model: Stable Diffusion in miniature, trained on emoji in four styles.

    python emoji/make.py all            # data, tokenizer, CLIP, VAE, U-Net, export, evaluate; resumes by itself
    python emoji/make.py all --out emoji/build/new     # the same from nothing, in a folder of its own
    python emoji/make.py unet --samples 2000000        # continue the U-Net alone, then: export, evaluate

Order: icons are rendered in several placements; CLIP learns which caption belongs to which picture; the VAE learns
to compress pictures eightfold; the U-Net learns to denoise latents under the context of a frozen copy of CLIP's text
tower, taken when its own training begins: CLIP itself is then only a judge, and may be trained on.
The model lies in `--out`, this folder unless told otherwise, and everything intermediate in its `build/` (here ignored
by git). What is there is used: training goes on from a checkpoint in `build/`, else from exported weights, else it
starts at random ones; tokenizer and text encoder are made where there is none. `export` writes float16 weights.

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
import shlex
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import grammar  # noqa: E402

import clip  # noqa: E402
import sampler  # noqa: E402
import unet  # noqa: E402
import vae  # noqa: E402
from weights import UserError  # noqa: E402

OUT = HERE  # where the model lies: --out
BUILD = OUT / "build"  # and what it is made from
SIZE = 64  # pixels

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
KINDS = (3, 1, 4, 6)  # how often CLIP's batches are bare, named, of styles, of colours (see clip_batch)
MERGES, MORE = 1200, 450  # of the tokenizer, besides 2 x 256 bytes: learned on names, and then on sentences
SENTENCES = 40_000  # that it is learned on


@cache
def concepts() -> list[str]:
    """The names in concepts.txt: Unicode CLDR short names, lower-cased."""
    lines = (HERE / "concepts.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def caption(name: str, template: str = "a picture of a {}", style: str = "", colour: str = "") -> str:
    """The one form of captions: "{...name...} on a {colour} background, {style} style"."""
    text = template.format(name)
    text += f" on a {colour} background" if colour else ""
    return text + (f", {style} style" if style else "")


# Data: npm packages -> icons, and icons -> pictures.


def package_file(package: str, name: str) -> dict:
    """A JSON file of an npm package; the ordinary npm client fetches the package once.

    FileNotFoundError without npm, CalledProcessError when it fails.
    """
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
    """Render every concept in every style and placement into build/icons.safetensors.

    ValueError for a concept that is no CLDR short name; else the errors of `package_file`.
    """
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
    """The rendered icons; calling it composes them over backgrounds. UserError as in `found`."""

    def __init__(self):
        self.icons = load_file(found(BUILD / "icons.safetensors", "data"))["icons"]
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
    """Train byte-level BPE on names and captions, go on with sentences, and write it in CLIP's file format."""
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
    first = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"][:MERGES]]
    counts = Counter(
        symbols
        for text in sentence_corpus()
        for symbols, _ in bpe.pre_tokenizer.pre_tokenize_str(bpe.normalizer.normalize_str(text))
    )
    write_tokenizer(more_merges(first, counts, MORE))


def sentence_corpus() -> Iterator[str]:
    """Every word of the grammar, and sentences about every concept."""
    chance, names, sentences = random.Random(3), concepts(), grammar.Grammar(concepts())
    yield from sorted(sentences.vocabulary())
    yield from (text for name in names for text in (name, grammar.plural(name), *STYLES, *COLOURS))
    for i in range(SENTENCES):
        name = names[i % len(names)]
        yield sentences.sentence(chance, name, style=chance.choice(("", *STYLES)), colour=chance.choice(("", *COLOURS)))


def more_merges(first: list[tuple[str, str]], counts: dict[str, int], more: int) -> list[tuple[str, str]]:
    """Merges of BPE for words of given counts: those of `first` that any word needs, and `more` learned on top.

    Since new merges come last, a word whose pieces `first` had made splits as before unless it is now one piece more
    often; what none of the words needs would be dead weight in the vocabulary. A word counts as the square root of
    its count: all of them shall be short, not only "the".
    """
    rank = {pair: i for i, pair in enumerate(first)}
    split, weight, used = {}, {word: math.sqrt(count) for word, count in counts.items()}, set()
    for word in counts:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while pairs := [pair for pair in pairwise(pieces) if pair in rank]:
            best = min(pairs, key=rank.__getitem__)
            used.add(best)
            pieces = merged(pieces, best)
        split[word] = pieces
    merges = [pair for pair in first if pair in used]
    for _ in range(more):
        totals: Counter = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                totals[pair] += weight[word]
        if not totals:
            break
        best = max(totals, key=lambda pair: (totals[pair], pair))
        merges.append(best)
        split = {word: merged(pieces, best) if best[0] in pieces else pieces for word, pieces in split.items()}
    return merges


def merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Pieces of a word, every occurrence of a pair made one."""
    done: list[str] = []
    for piece in pieces:
        if done and (done[-1], piece) == pair:
            done[-1] += piece
        else:
            done.append(piece)
    return done


def write_tokenizer(merges: list[tuple[str, str]]) -> None:
    """The tokenizer's files in CLIP's format."""
    symbols = byte_symbols()
    words = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(pair) for pair in merges),
        clip.BOS,
        clip.EOS,
    ]
    folder = OUT / "tokenizer"
    folder.mkdir(exist_ok=True)
    special = {"bos_token": clip.BOS, "eos_token": clip.EOS, "unk_token": clip.EOS, "pad_token": clip.EOS}
    settings = {"model_max_length": 77, "do_lower_case": True, "add_prefix_space": False}
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | settings | {"tokenizer_class": "CLIPTokenizer"})


@cache
def tokenizer() -> clip.Tokenizer:
    """The tokenizer that `make_tokenizer` wrote."""
    files = (OUT / "tokenizer" / name for name in ("vocab.json", "merges.txt"))
    return clip.Tokenizer(*(found(file, "tokenizer") for file in files))


# Files.


def found(path: Path, step: str) -> Path:
    """`path` itself; UserError that names the step which writes it when there is none."""
    if not path.exists():
        where = "" if OUT == HERE else f" --out {shlex.quote(str(OUT))}"
        raise UserError(f"{path} does not exist: run `python emoji/make.py {step}{where}` first")
    return path


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_part(lambda part: save_file(tensors, part, metadata), path)


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_json(path: Path, value: dict) -> None:
    """Write JSON the way the official repositories do: two spaces, one entry a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_part(write: Callable[[Path], None], path: Path) -> None:
    """Let `write` fill a temporary file, then put it in place: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    write(part)
    os.replace(part, path)


# Training: one loop for the three networks.


@dataclass
class Recipe:
    """How long and how fast a network is trained; a sample is one picture."""

    samples: int
    batch: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    ema: float  # decay of the averaged weights, the ones that are kept
    flat: float  # the part of the budget before the learning rate falls linearly to zero
    warmup: int  # steps

    minutes: float = math.inf  # a budget by the clock instead, for cores that are shared

    def done(self, seen: int, seconds: float) -> float:
        """The part of the budget that is used up, in pictures or in time."""
        return max(seen / self.samples, seconds / (60 * self.minutes))

    def rate(self, seen: int, seconds: float = 0.0) -> float:
        """Learning rate after `seen` samples: linear warm-up, flat, linear decay."""
        rise = (seen / self.batch + 1) / self.warmup
        fall = (1 - self.done(seen, seconds)) / (1 - self.flat)
        return self.lr * max(0.0, min(1.0, rise, fall))


RECIPES = {
    "clip": Recipe(260_000, 96, 1e-3, 0.05, (0.9, 0.98), 0.99, 0.5, 100),
    "sentences": Recipe(150_000, 48, 6e-4, 0.02, (0.9, 0.98), 0.98, 0.4, 40),
    "vae": Recipe(75_000, 16, 2e-3, 0.01, (0.9, 0.99), 0.99, 0.4, 100),
    "unet": Recipe(160_000, 32, 3e-4, 0.01, (0.9, 0.99), 0.995, 0.4, 30),
}
EXPORTED = {
    "clip": "clip/model.safetensors",
    "sentences": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
}
CHECKPOINT_SECONDS = 120


class Training:
    """A network, its optimiser, averaged weights and random numbers, kept in build/; iterating trains to the budget.

    The loss takes the size of a batch and the generator that it must draw everything from: a training that was
    stopped goes on with the numbers it would have drawn.
    """

    def __init__(self, name: str, network: nn.Module, loss: Callable[[int, torch.Generator], Tensor], recipe: Recipe):
        self.name, self.network, self.loss, self.recipe = name, network, loss, recipe
        # fused: one pass over memory instead of a dozen
        self.optimizer = torch.optim.AdamW(
            network.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        self.average = {key: value.clone() for key, value in network.state_dict().items()}
        self.seen, self.seconds = 0, 0.0
        self.chance = torch.Generator().manual_seed(2)  # 0 draws the first weights, 1 what is measured on
        self.path = BUILD / f"{name}.safetensors"
        exported = OUT / EXPORTED[name]
        if self.path.exists():
            self.load()
        elif exported.exists():
            # No checkpoint, but weights that were trained before: a far better start than chance.
            network.load_state_dict({key: value.float() for key, value in load_file(exported).items()})
            self.average = {key: value.clone() for key, value in network.state_dict().items()}
            self.chance.seed()  # not once more the batches that these weights began with

    def load(self) -> None:
        """Continue from the last checkpoint."""
        with safe_open(self.path, "pt") as file:
            state, progress = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        self.network.load_state_dict(part_of(state, "network."))
        average = part_of(state, "average.")
        self.average = {name: average[name] for name in self.average}  # a file has an order of its own
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.network.parameters())
        for name, tensor in part_of(state, "optimizer.").items():
            i, moment = name.split(".")
            if moment != "step":
                # The fused step pairs numbers by their place in memory, and files know no channels_last.
                tensor = torch.empty_like(parameters[int(i)]).copy_(tensor)
            moments.setdefault(int(i), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.seen, self.seconds = int(progress["seen"]), float(progress["seconds"])
        if "chance" in state:
            self.chance.set_state(state["chance"])
        else:  # a checkpoint of before they were kept
            self.chance.seed()

    def freeze(self, *parts: str) -> None:
        """Keep parts that later stages were built on at their averaged weights."""
        for name, parameter in self.network.named_parameters():
            if name.startswith(parts):
                parameter.requires_grad_(False).copy_(self.average[name])

    def save(self) -> None:
        """Write a checkpoint."""
        state = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        state |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        state["chance"] = self.chance.get_state()
        save(state, self.path, {"seen": str(self.seen), "seconds": str(self.seconds)})

    def step(self) -> float:
        """One step of AdamW and of the average; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.seen, self.seconds)
        value = self.loss(self.recipe.batch, self.chance)
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        steps = self.seen // self.recipe.batch
        decay = min(self.recipe.ema, (1 + steps) / (10 + steps))
        with torch.no_grad():
            # average <- d average + (1 - d) weights
            kept, now = list(self.average.values()), list(self.network.state_dict().values())
            torch._foreach_lerp_(kept, now, 1 - decay)
        self.seen += self.recipe.batch
        return value.item()

    def __iter__(self) -> Iterator[str]:
        """Train to the budget; yields a line of progress after each checkpoint."""
        begun, mark, losses = time.time() - self.seconds, time.time(), []
        while self.recipe.done(self.seen, self.seconds) < 1:
            losses.append(self.step())
            self.seconds = time.time() - begun
            done = self.recipe.done(self.seen, self.seconds) >= 1
            if done or time.time() - mark > CHECKPOINT_SECONDS:
                self.save()
                speed = len(losses) * self.recipe.batch / (time.time() - mark)
                mean = sum(losses) / len(losses)
                yield f"{self.name} {self.seen:,} samples {self.seconds / 60:.1f} min {speed:.0f}/s loss {mean:.4f}"
                mark, losses = time.time(), []


# CLIP: which caption belongs to which picture.


def text_config() -> dict:
    """Configuration of the text tower, SD's layout in miniature."""
    words = len(json.loads(found(OUT / "tokenizer" / "vocab.json", "tokenizer").read_text(encoding="utf-8")))
    ids = {
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
        "vocab_size": words,
    }
    return transformer_config(192, 4) | ids | {"max_position_embeddings": 77, "model_type": "clip_text_model"}


def transformer_config(width: int, layers: int) -> dict:
    """What both towers' configurations share."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    fixed = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
    return sizes | fixed | {"num_attention_heads": 4, "projection_dim": 192}


def clip_config() -> dict:
    """Configuration of CLIP in the layout of openai/clip-vit-*."""
    vision = {"image_size": SIZE, "patch_size": 8, "num_channels": 3, "model_type": "clip_vision_model"}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 192,
        "logit_scale_init_value": 2.6592,
        "text_config": text_config(),
        "vision_config": transformer_config(128, 4) | vision,
    }


def clip_batch(size: int, chance: random.Random) -> tuple[list[Tensor], list[str], bool]:
    """Indices of `size` pictures (concept, style, placement, colour) and captions that no other of them fits.

    Also whether the captions name the colour. The indices are four tensors [size].

    Without such care style and background give the answer away and the concept is never learned: so either all
    concepts differ and captions name nothing else (or the same style and colour everywhere), or a few concepts come
    in every style, or in every colour, and captions must say which.
    """
    names = concepts()
    kind = chance.choices(("bare", "named", "styles", "colours"), KINDS)[0]
    repeat = {"styles": len(STYLES), "colours": len(COLOURS)}.get(kind, 1)
    rows = [c for c in chance.sample(range(len(names)), size // repeat) for _ in range(repeat)]
    style, colour = chance.randrange(len(STYLES)), chance.randrange(len(COLOURS))
    say_style = kind in ("named", "styles") or (kind == "colours" and chance.random() < 0.5)
    say_colour = kind in ("named", "colours") or (kind == "styles" and chance.random() < 0.5)
    indices, captions = [], []
    for i, c in enumerate(rows):
        s, k = style, colour
        if kind == "bare":
            s, k = chance.randrange(len(STYLES)), chance.randrange(len(COLOURS))
        elif kind == "styles":
            s = i % repeat
        elif kind == "colours":
            k = i % repeat
        indices.append((c, s, chance.randrange(TRAINED), k))
        template = chance.choice(TEMPLATES)
        captions.append(caption(names[c], template, STYLES[s] * say_style, COLOURS[k] * say_colour))
    return list(torch.tensor(indices).unbind(1)), captions, say_colour


def colour_loss(features: Tensor, colour: Tensor) -> Tensor:
    """How badly unit features [B, p] of either tower tell the background's colour [B]: cross-entropy.

    Each colour has a fixed direction, the same for both towers. Contrastive batches alone never leave the saddle where
    neither tower sees colours: a tower gains nothing from seeing them as long as the other does not.
    """
    directions = torch.eye(features.shape[1])[: len(COLOURS)]
    return F.cross_entropy(10 * features @ directions.T, colour)


def text_features(model: clip.CLIP, prompts: list[str]) -> Tensor:
    """Unit features [B, p]; padding is cut to the longest prompt, which changes nothing in a causal tower."""
    tokens = tokenizer()(prompts)
    length = int(tokens.argmax(dim=1).max()) + 1
    return F.normalize(model.encode_text(tokens[:, :length]), dim=-1)


def image_features(model: clip.CLIP, pictures: Tensor) -> Tensor:
    """Unit features [B, p] of pictures [B, 3, 64, 64] in [-1, 1]."""
    return F.normalize(model.encode_image(clip.preprocess(pictures, SIZE)), dim=-1)


def train_clip(recipe: Recipe) -> None:
    """Contrastive training: the caption of a picture against all others of the batch, and the reverse."""
    torch.manual_seed(0)
    model, pictures = clip.CLIP(clip_config()), Pictures()

    def loss(size: int, chance: torch.Generator) -> Tensor:
        """Of a batch of `size` pictures and captions: contrastive, and how well each tower sees colours."""
        seed = int(torch.randint(2**62, (), generator=chance))
        indices, captions, colour_named = clip_batch(size, random.Random(seed))
        images, texts = image_features(model, pictures(*indices)), text_features(model, captions)
        # no temperature below 0.01, as in the paper
        scale = model.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * images @ texts.T
        target = torch.arange(size)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        colour = indices[-1]
        seen = colour_loss(images, colour) + (colour_loss(texts, colour) if colour_named else 0)
        return contrast + seen

    training = Training("clip", model, loss, recipe)
    for line in training:
        judge = clip.CLIP(clip_config())
        judge.load_state_dict(training.average)
        print(line, zero_shot_renders(judge, pictures), flush=True)


# Sentences: CLIP, which has read captions, learns that a sentence means what its caption means.


JOINED = 6000  # texts that CLIP's projection is solved on
FITTED = 200  # steps that it is then trained for
# For the U-Net: how many of its batches are wide pictures of two things, and how often any other text is about one
# thing, two or two alike: on a square canvas there is room for one, which is then either of them.
WIDE, SQUARE = 0.5, (94, 4, 2, 0)
# What is added to the paddings of the left one of two things, and taken from those of the right one: a vector [d],
# about half as long as captions lie from their mean. Any would do; this one is a row of a Hadamard matrix.
SIDES = 0.35 * torch.tensor([1.0, -1.0]).repeat(96)


@torch.no_grad()
def cache_meanings() -> None:
    """Write what the U-Net reads in captions: the contexts of a text encoder that has read nothing else.

    `contexts` [concepts, styles + 1, colours + 1, 77, d] with entry 0 for none, `names` [concepts, d] at the last
    token of a name, `ends` [concepts, styles + 1, colours + 1] where EOS stands.
    """
    model, names = exported(clip.TextEncoder, "text_encoder", "model"), concepts()
    prompts = [
        caption(n, style=style, colour=colour) for n in names for style in ("", *STYLES) for colour in ("", *COLOURS)
    ]
    tokens = tokenizer()(prompts)
    contexts = torch.cat([model(part).half() for part in tqdm(tokens.split(128))])
    shape = (len(names), len(STYLES) + 1, len(COLOURS) + 1)
    ends = tokens.argmax(dim=1).unflatten(0, shape)
    contexts = contexts.unflatten(0, shape)
    at_names = contexts[torch.arange(len(names)), 0, 0, ends[:, 0, 0] - 1]
    tensors = {"contexts": contexts, "names": at_names, "ends": ends.int()}
    save(tensors, BUILD / "meanings.safetensors")


@dataclass
class Scene:
    """What a picture shows and what is said of it: things from left to right; -1 for a style or colour not said."""

    things: tuple[int, ...]
    style: int
    colour: int
    text: str
    said_style: int = -1
    said_colour: int = -1

    def caption(self, thing: int) -> str:
        """The caption of one thing that says as much of style and background."""
        style, colour = ("", *STYLES)[self.said_style + 1], ("", *COLOURS)[self.said_colour + 1]
        return caption(concepts()[thing], style=style, colour=colour)


def any_scene(
    chance: random.Random, sentences: grammar.Grammar, things: tuple[int, ...], captions: float = 0.5, say: float = 0.6
) -> Scene:
    """A sentence or a caption (how often: `captions`) about one thing, a sentence about several; all else at random.

    `say` is how often style and background are said, each.
    """
    names = concepts()
    style, colour = chance.randrange(len(STYLES)), chance.randrange(len(COLOURS))
    said_style, said_colour = (i if chance.random() < say else -1 for i in (style, colour))
    words = {"style": STYLES[style] * (said_style >= 0), "colour": COLOURS[colour] * (said_colour >= 0)}
    if len(things) == 1 and chance.random() < captions:
        text = caption(names[things[0]], chance.choice(TEMPLATES), **words)
    elif len(set(things)) == 2:
        text = sentences.sentence(chance, names[things[0]], names[things[1]], **words)
    else:
        text = sentences.sentence(chance, names[things[0]], count=len(things), **words)
    return Scene(things, style, colour, text, said_style, said_colour)


def some_things(chance: random.Random, first: int, often: tuple[int, ...] = (64, 24, 8, 4)) -> tuple[int, ...]:
    """One thing mostly; else two, two alike, or three alike: how often each."""
    kind = chance.choices(("one", "pair", "twice", "thrice"), often)[0]
    if kind == "pair":
        other = chance.randrange(len(concepts()) - 1)
        return first, other + (other >= first)
    alike = concepts()[first] in grammar.ALIKE  # "cherries" are no two
    return (first,) * (1 if alike else {"one": 1, "twice": 2, "thrice": 3}[kind])


def name_ends(text: str, names: tuple[str, ...]) -> list[int]:
    """Tokens, counted from BOS = 0, that end the names of things in a text, in order."""
    pattern, _ = grammar.finder(names)
    encoding = tokenizer().encode(text)
    last = {end: i + 1 for i, (_, end) in enumerate(encoding.offsets)}
    return [last[match.end()] for match in pattern.finditer(text.lower()) if match.end() in last]


class Meanings:
    """What contexts of sentences should be, from the captions that `cache_meanings` wrote."""

    def __init__(self):
        cached = load_file(found(BUILD / "meanings.safetensors", "sentences"))
        self.contexts, self.names, self.ends = cached["contexts"], cached["names"].float(), cached["ends"].long()

    def caption(self, thing: int, scene: Scene) -> tuple[Tensor, int]:
        """Context [77, d] of the caption of one thing of a scene, and where its EOS stands."""
        place = (thing, scene.said_style + 1, scene.said_colour + 1)
        return self.contexts[place].float(), int(self.ends[place])

    def __call__(self, scene: Scene, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts [T, d] that the tokens [T] of a scene's text should have, and weights [T]: 0 where any may be.

        At EOS, at the padding after it and at the end of the name they are what the caption has there. Of two
        things the padding has one by one the captions of the left and of the right thing, each with SIDES added or
        taken away, so that attention can tell where a thing stands; EOS has the mean, every name its own context.
        """
        T, eos = len(tokens), int(tokens.argmax())
        contexts, weights = torch.zeros(T, self.names.shape[1]), torch.zeros(T)
        captions = [self.caption(thing, scene) for thing in scene.things[: 2 if len(scene.things) == 2 else 1]]
        end = max(eos, *(end for _, end in captions))
        # Where the longer caption still has words, anything may be.
        for i, (context, _) in enumerate(captions):
            side = 0 if len(captions) == 1 else SIDES * (1 - 2 * i)
            contexts[i :: len(captions)] = (context + side)[i : T : len(captions)]
        weights[end + 1 :] = 1.0
        contexts[eos], weights[eos] = torch.stack([context[at] for context, at in captions]).mean(dim=0), 3.0
        places = zip(scene.things, name_ends(scene.text, tuple(concepts())), strict=False)
        for thing, place in places:
            contexts[place], weights[place] = self.names[thing], 1.0
        return contexts, weights


def train_sentences(recipe: Recipe) -> None:
    """Teach the text encoder that sentences have the contexts of captions, which captions keep."""
    torch.manual_seed(0)
    if not (BUILD / "meanings.safetensors").exists():
        cache_meanings()
    model, meanings, sentences = clip.TextEncoder(text_config()), Meanings(), grammar.Grammar(concepts())

    def loss(size: int, seeds: torch.Generator) -> Tensor:
        """Of a batch of `size` texts: mean squared distance from the contexts that they should have."""
        chance = random.Random(int(torch.randint(2**62, (), generator=seeds)))
        things = (some_things(chance, chance.randrange(len(concepts()))) for _ in range(size))
        scenes = [any_scene(chance, sentences, each, captions=0.3) for each in things]
        tokens = tokenizer()([scene.text for scene in scenes])
        # The tower is causal: cutting the padding changes nothing before it, but all of it must be learned at times.
        longest = int(tokens.argmax(dim=1).max()) + 1
        tokens = tokens[:, : 77 if chance.random() < 0.2 else longest + chance.randrange(4, 12)]
        goals, weights = zip(*(meanings(scene, row) for scene, row in zip(scenes, tokens, strict=True)), strict=True)
        weights = torch.stack(weights)
        error = (model(tokens) - torch.stack(goals)).square().mean(dim=-1)
        return (weights * error).sum() / weights.sum()

    training = Training("sentences", model, loss, recipe)
    for line in training:
        print(line, flush=True)
    model.load_state_dict(training.average)
    judge = trained("clip", clip.CLIP(clip_config()))
    join_towers(judge, model)
    fit_projection(judge, sentences)
    write_model("clip", judge, clip_config(), "model")
    export_text_encoder(model.text_model)


@torch.no_grad()
def join_towers(judge: clip.CLIP, encoder: clip.TextEncoder) -> None:
    """Give CLIP the text encoder for its text tower, and the projection that keeps the features its captions had.

    W minimises sum |W h - f|^2 over texts: h at EOS under the new tower; f of the caption under the old one, of two
    things the mean of both.
    """
    chance, sentences, names = random.Random(6), grammar.Grammar(concepts()), concepts()
    features, states = [], []
    for _ in range(JOINED // 50):
        scenes = [any_scene(chance, sentences, some_things(chance, chance.randrange(len(names)))) for _ in range(50)]
        ends = ([scene.caption(scene.things[at]) for scene in scenes] for at in (0, -1))
        features.append(sum(text_features(judge, captions) for captions in ends) / 2)
        tokens = tokenizer()([scene.text for scene in scenes])
        eos = tokens.argmax(dim=1)
        states.append(encoder(tokens[:, : int(eos.max()) + 1])[torch.arange(len(scenes)), eos])
    h, f = torch.cat(states).double(), torch.cat(features).double()
    # W = F^T H (H^T H + r I)^-1; the ridge r only steadies the inverse
    gram = h.T @ h + 1e-3 * len(h) * torch.eye(h.shape[1])
    judge.text_projection.weight.copy_(torch.linalg.solve(gram, h.T @ f).T.float())
    judge.text_model.load_state_dict(encoder.text_model.state_dict())


def fit_projection(judge: clip.CLIP, sentences: grammar.Grammar) -> None:
    """Train the projection of texts alone by CLIP's own loss, on captions and sentences in turn.

    `join_towers` fits it to features that were themselves a fit; this one looks at pictures again.
    """
    pictures, chance, names, steps, size = Pictures(), random.Random(8), concepts(), FITTED, RECIPES["clip"].batch
    W, average = judge.text_projection.weight.detach().clone().requires_grad_(), judge.text_projection.weight.clone()
    optimizer = torch.optim.Adam([W], lr=1e-3, betas=(0.9, 0.98))
    scale = judge.logit_scale.detach().clamp(max=math.log(100)).exp()
    for step in tqdm(range(steps), desc="projection"):
        indices, texts, colour_named = clip_batch(size, chance)
        if chance.random() < 0.5:
            said = ((names[c], caption_words(text)) for c, text in zip(indices[0].tolist(), texts, strict=True))
            texts = [sentences.sentence(chance, name, **words) for name, words in said]
        tokens = tokenizer()(texts)
        with torch.no_grad():
            images, ends = image_features(judge, pictures(*indices)), tokens.argmax(dim=1)
            states = judge.text_model(tokens[:, : int(ends.max()) + 1])[torch.arange(len(texts)), ends]
        features = F.normalize(states @ W.T, dim=-1)
        logits, target = scale * images @ features.T, torch.arange(len(texts))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss = loss + colour_loss(features, indices[-1]) if colour_named else loss
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 1.6 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.data.lerp_(W.detach(), 0.05)
    judge.text_projection.weight.data.copy_(average)


def caption_words(text: str) -> dict[str, str]:
    """The style and the colour that a caption says, '' for none."""
    style = next((style for style in STYLES if text.endswith(f"{style} style")), "")
    return {"style": style, "colour": next((k for k in COLOURS if f" on a {k} background" in text), "")}


def draw(pictures: Pictures, scenes: list[Scene], chance: random.Random) -> Tensor:
    """Pictures [B, 3, 64, 64] of scenes in random placements, of either thing where there are two."""
    things = torch.tensor([chance.choice(scene.things) for scene in scenes])
    style, colour = (torch.tensor([getattr(scene, key) for scene in scenes]) for key in ("style", "colour"))
    return pictures(things, style, torch.tensor([chance.randrange(TRAINED) for _ in scenes]), colour)


def draw_wide(pictures: Pictures, scenes: list[Scene], chance: random.Random) -> Tensor:
    """Pictures [B, 3, 64, 128] of scenes of two things: the first stands on the left."""
    sides = ([replace(scene, things=scene.things[i : i + 1]) for scene in scenes] for i in (0, 1))
    return torch.cat([draw(pictures, side, chance) for side in sides], dim=-1)


# VAE: pictures to latents of an eighth of their side, and back.


def vae_config(scaling_factor: float = 1.0) -> dict:
    """Configuration of the autoencoder; 16 latent channels because 8 x 8 x 4 cannot hold a face."""
    widths = [16, 24, 48, 96]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "scaling_factor": scaling_factor,
    }


def any_pictures(pictures: Pictures, size: int, chance: torch.Generator) -> Tensor:
    """A batch [size, 3, 64, 64] of random training pictures."""
    ends = (len(concepts()), len(STYLES), TRAINED, len(COLOURS))
    return pictures(*(torch.randint(end, (size,), generator=chance) for end in ends))


def gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, across [B, 3, 64, 63] and down [B, 3, 63, 64]."""
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def train_vae(recipe: Recipe) -> None:
    """Reconstruction in colours and in outlines, and a little Kullback-Leibler divergence from N(0, 1)."""
    torch.manual_seed(0)
    pictures, model = Pictures(), vae.VAE(vae_config())

    def loss(size: int, chance: torch.Generator) -> Tensor:
        """Of a batch of `size` pictures."""
        x = any_pictures(pictures, size, chance)
        with fast_training():
            mean, logvar = (each.float() for each in model.encode(x))
            noise = torch.randn(mean.shape, generator=chance)
            y = model.decode(mean + (logvar / 2).exp() * noise).float()
        outlines = sum((a - b).abs().mean() for a, b in zip(gradients(x), gradients(y), strict=True))
        # KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2
        divergence = (mean**2 + logvar.exp() - 1 - logvar).mean() / 2
        return (x - y).abs().mean() + 2 * F.mse_loss(x, y) + 0.5 * outlines + 2e-4 * divergence

    training = Training("vae", model, loss, recipe)
    if (BUILD / "latents.safetensors").exists():
        training.freeze("encoder", "quant_conv")  # the U-Net writes its latents; the decoder may still improve
    for line in training:
        judged = vae.VAE(vae_config())
        judged.load_state_dict(training.average)
        print(line, f"PSNR {psnr(judged, pictures):.2f} dB", flush=True)


@torch.no_grad()
def psnr(model: vae.VAE, pictures: Pictures, count: int = 208, wide: bool = False) -> float:
    """Mean PSNR in dB over pictures, or wide ones, of things in held-out placements; the range of colours is 2."""
    chance = torch.Generator().manual_seed(1)
    ends = ((0, len(concepts())), (0, len(STYLES)), (TRAINED, TRAINED + HELD_OUT), (0, len(COLOURS)))
    c, *rest = (torch.randint(*end, (count,), generator=chance) for end in ends)
    x = pictures(c, *rest)
    x = torch.cat([x, pictures(c.roll(1), *rest)], dim=-1) if wide else x
    y = torch.cat([model.decode(model.encode(part)[0]) for part in x.split(52)]).clamp(-1, 1)
    # PSNR = 10 log10(2^2 / MSE)
    return (10 * (4 / (x - y).square().mean(dim=(1, 2, 3))).log10()).mean().item()


# U-Net: noise in latents under a context.


def unet_config() -> dict:
    """Configuration of the U-Net; as in SD 1.4 the number of heads is called attention_head_dim."""
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 4,
        "block_out_channels": [96, 160, 224],
        "center_input_sample": False,
        "cross_attention_dim": 192,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 16,
        "out_channels": 16,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 16,
        "sample_size": SIZE // 8,
    }


def schedule_config() -> dict:
    """Stable Diffusion's noise schedule."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


@torch.no_grad()
def measure_latents(count: int = 512) -> None:
    """Write the scale at which latents have unit variance; that of the exported VAE where there is one."""
    config = OUT / "vae" / "config.json"
    if config.exists() and not (BUILD / "vae.safetensors").exists():
        scale = torch.tensor(json.loads(config.read_text())["scaling_factor"])
    else:
        pictures, model = Pictures(), trained("vae", vae.VAE(vae_config()))
        shown = any_pictures(pictures, count, torch.Generator().manual_seed(5))
        scale = 1 / torch.cat([model.encode(part)[0] for part in shown.split(64)]).std()
    save({"scale": scale}, BUILD / "latents.safetensors")


class Scenes:
    """Training batches for the U-Net: latents of scenes and contexts of what is said of them, made as they are used."""

    def __init__(self):
        if not (BUILD / "latents.safetensors").exists():
            measure_latents()
        self.scale = load_file(BUILD / "latents.safetensors")["scale"].item()
        self.pictures, self.sentences = Pictures(), grammar.Grammar(concepts())
        self.encoder, self.autoencoder = text_encoder(), trained("vae", vae.VAE(vae_config()))
        self.autoencoder.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, size: int, seeds: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scaled latents [size, 16, 8, 8], or of half as many wide pictures [size / 2, 16, 8, 16], and contexts.

        One text in ten is empty, for guidance. Each scene comes twice: reading it and encoding its picture costs as
        much as a step of the U-Net.
        """
        chance = random.Random(int(torch.randint(2**62, (), generator=seeds)))
        wide = chance.random() < WIDE
        size, often, shown_by = (size // 2, (0, 4, 1, 0), draw_wide) if wide else (size, SQUARE, draw)
        firsts = [some_things(chance, chance.randrange(len(concepts())), often) for _ in range((size + 1) // 2)]
        if wide:  # of "cherries" there are no two
            firsts = [it if len(it) == 2 else some_things(chance, *it, (0, 1, 0, 0)) for it in firsts]
        scenes = [any_scene(chance, self.sentences, things, say=0.8) for things in firsts]
        texts = ["" if chance.random() < 0.1 else scene.text for scene in scenes]
        shown = shown_by(self.pictures, scenes, chance).to(memory_format=torch.channels_last)
        latents = self.autoencoder.encode(shown)[0] * self.scale
        contexts = self.encoder(tokenizer()(texts))
        return latents.repeat(2, 1, 1, 1)[:size], contexts.repeat(2, 1, 1)[:size]


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; where it does not, float32 is the faster."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def fast_training() -> Iterator[None]:
    """Bfloat16 by autocast, but for attention: backwards its bfloat16 kernel is slower than the one in float32."""
    attention = F.scaled_dot_product_attention

    def in_float32(*qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return attention(*(x.float() for x in qkv))

    bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())
    with mock.patch.object(F, "scaled_dot_product_attention", in_float32), bfloat16:
        yield


def train_unet(recipe: Recipe) -> None:
    """Predict the noise; min-SNR weights (Hang et al. 2023, gamma = 5) keep easy timesteps from dominating."""
    torch.manual_seed(0)
    data, schedule = Scenes(), sampler.Schedule(schedule_config())
    model = unet.UNet(unet_config()).to(memory_format=torch.channels_last)
    # SNR_t = a_t / (1 - a_t);   weight of the squared error in eps = min(SNR_t, 5) / SNR_t
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights = snr.clamp(max=5) / snr

    def loss(size: int, chance: torch.Generator) -> Tensor:
        """Of a batch of `size` latents (half as many wide ones), each noised to a timestep of its own."""
        clean, context = data(size, chance)
        noise = torch.randn(clean.shape, generator=chance)
        size = len(clean)
        # One timestep in each of `size` equal parts of 0..999: less variance than independent ones.
        t = ((torch.arange(size) + torch.rand(size, generator=chance)) * schedule.length / size).long()
        noisy = schedule.add_noise(clean, noise, t).to(memory_format=torch.channels_last)
        with fast_training():
            predicted = model(noisy, t, model.keys_values(context))
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (weights[t] * error).mean()

    training = Training("unet", model, loss, recipe)
    for line in training:
        print(line, flush=True)
    export_unet()


# Export: float16 weights in the layout of Stable Diffusion 1.4.


def trained(name: str, network: nn.Module) -> nn.Module:
    """A network with the averaged weights of its last checkpoint, or where there is none, of the exported file.

    UserError as in `found`.
    """
    checkpoint = BUILD / f"{name}.safetensors"
    if checkpoint.exists():
        state = part_of(load_file(checkpoint), "average.")
    else:
        file = found(OUT / EXPORTED[name], name)
        state = {key: value.float() for key, value in load_file(file).items()}
    network.load_state_dict(state)
    return network.eval()


def text_encoder() -> clip.TextEncoder:
    """The text encoder that conditions the U-Net: CLIP's tower, frozen once it is exported; CLIP may train on."""
    if not (OUT / "text_encoder" / "model.safetensors").exists():
        export_text_encoder(trained("clip", clip.CLIP(clip_config())).text_model)
    return exported(clip.TextEncoder, "text_encoder", "model")


def export_text_encoder(tower: clip.TextTransformer) -> None:
    """Write a text tower as the model's text encoder."""
    encoder = clip.TextEncoder(text_config())
    encoder.text_model.load_state_dict(tower.state_dict())
    write_model("text_encoder", encoder, text_config() | {"architectures": ["CLIPTextModel"]}, "model")


def write_model(folder: str, network: nn.Module, config: dict, file: str = "diffusion_pytorch_model") -> None:
    """One part of the model: config.json and float16 safetensors."""
    write_json(OUT / folder / "config.json", config)
    save({k: v.half() for k, v in network.state_dict().items()}, OUT / folder / f"{file}.safetensors")


def export_unet() -> None:
    """Write the U-Net alone, at any moment of its training."""
    write_model("unet", trained("unet", unet.UNet(unet_config())), unet_config())


def export() -> None:
    """Write all that is trained, in the layout of Stable Diffusion 1.4, and CLIP for evaluation."""
    # The scale of latents is known once they are cached for the U-Net.
    scale = load_file(found(BUILD / "latents.safetensors", "unet"))["scale"].item()
    if not (OUT / "clip" / "model.safetensors").exists() or not (BUILD / "sentences.safetensors").exists():
        write_model(
            "clip", trained("clip", clip.CLIP(clip_config())), clip_config(), "model"
        )  # else it has them joined
    write_model("vae", trained("vae", vae.VAE(vae_config())), vae_config(scale))
    write_json(OUT / "scheduler" / "scheduler_config.json", schedule_config())
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline"} | parts | {"requires_safety_checker": False}
    write_json(OUT / "model_index.json", index)
    if (BUILD / "unet.safetensors").exists():
        export_unet()


# Evaluation.


class Judge:
    """Zero-shot recognition of concept, style and background."""

    @torch.no_grad()
    def __init__(self, model: clip.CLIP):
        self.model = model
        names = concepts()
        self.concepts = text_features(model, [caption(name) for name in names])
        styled = [caption(name, style=style) for name in names for style in STYLES]
        self.styled = text_features(model, styled).unflatten(0, (len(names), len(STYLES)))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Concept, style and colour [B] of pictures [B, 3, 64, 64]; nothing is known beforehand."""
        features = image_features(self.model, pictures)
        concept = (features @ self.concepts.T).argmax(dim=1)
        logits = self.model.logit_scale.exp() * torch.einsum("bp,csp->bcs", features, self.styled)
        # P(style) = sum over concepts of P(concept, style)
        style = logits.logsumexp(dim=1).argmax(dim=1)
        return concept, style, background(pictures)


def background(pictures: Tensor) -> Tensor:
    """The colour [B] nearest to the median of the outermost pixels."""
    edge = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], dim=-1)
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    return torch.cdist(edge.median(dim=-1).values, colours).argmin(dim=1)


def zero_shot_renders(model: clip.CLIP, pictures: Pictures) -> dict[str, float]:
    """Accuracy on real renders in a held-out placement: every concept in every style, random colours."""
    chance = torch.Generator().manual_seed(1)
    c = torch.arange(len(concepts())).repeat_interleave(len(STYLES))
    s = torch.arange(len(STYLES)).repeat(len(concepts()))
    k, judge = torch.randint(len(COLOURS), c.shape, generator=chance), Judge(model)
    p = torch.randint(TRAINED, TRAINED + HELD_OUT, c.shape, generator=chance)
    guesses = [judge(pictures(*part)) for part in zip(*(x.split(104) for x in (c, s, p, k)), strict=True)]
    return rates(tuple(torch.cat(x) for x in zip(*guesses, strict=True)), (c, s, k))


@torch.no_grad()
def colour_accuracy(model: clip.CLIP, pictures: Pictures) -> float:
    """How often CLIP tells which of eight captions that differ in the background alone is a picture's; chance: 1/8."""
    names, k = concepts(), torch.arange(len(COLOURS))
    right = []
    for c in range(0, len(names), 8):
        rest = (torch.full_like(k, c), torch.full_like(k, c // 8 % len(STYLES)), torch.full_like(k, TRAINED))
        captions = [caption(names[c], style=STYLES[c // 8 % len(STYLES)], colour=colour) for colour in COLOURS]
        logits = image_features(model, pictures(*rest, k)) @ text_features(model, captions).T
        right.append(logits.argmax(dim=1) == k)
    return torch.cat(right).float().mean().item()


@torch.no_grad()
def context_distances(encoder: clip.TextEncoder) -> dict[str, float]:
    """How far the U-Net's contexts of two captions lie apart, on average over concepts: Euclidean, in R^d.

    At the last of 77 tokens, which has seen the whole caption, when concept, style or colour differ; "colour word":
    where two colours differ most.
    """

    def contexts(style: str, colour: str) -> Tensor:
        tokens = tokenizer()([caption(name, style=style, colour=colour) for name in concepts()])
        return torch.cat([encoder(part) for part in tokens.split(52)])

    E, styled, coloured = contexts("noto", "blue"), contexts("blob", "blue"), contexts("noto", "pink")
    pairs = {"concept": (E[1:], E[:-1]), "style": (E, styled), "colour": (E, coloured)}
    distances = {name: (a - b)[:, -1].norm(dim=-1).mean().item() for name, (a, b) in pairs.items()}
    return distances | {"colour word": (E - coloured).norm(dim=-1).amax(dim=1).mean().item()}


@torch.no_grad()
def sentence_accuracy(model: clip.CLIP, pictures: Pictures, file: str) -> float:
    """How often a sentence of a file lies nearest to pictures of its own concept, among those of all concepts."""
    names = concepts()
    n, s = torch.arange(len(names)).repeat_interleave(len(STYLES)), torch.arange(len(STYLES)).repeat(len(names))
    shown = pictures(n, s, torch.full_like(n, TRAINED), torch.zeros_like(n))
    features = torch.cat([image_features(model, part) for part in shown.split(104)])
    features = F.normalize(features.unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)
    frames = grammar.frames(file)
    texts = [grammar.fill(frames[i % len(frames)], name) for i, name in enumerate(names)]
    guesses = torch.cat([text_features(model, texts[i : i + 52]) for i in range(0, len(texts), 52)]) @ features.T
    return (guesses.argmax(dim=1) == torch.arange(len(names))).float().mean().item()


def exported(kind: type[nn.Module], folder: str, file: str = "diffusion_pytorch_model") -> nn.Module:
    """A part of the model from its exported files, in float32. UserError as in `found`."""
    step = "unet" if folder == "unet" else "export"
    config, tensors = (found(OUT / folder / name, step) for name in ("config.json", f"{file}.safetensors"))
    network = kind(json.loads(config.read_text()))
    network.load_state_dict({key: value.float() for key, value in load_file(tensors).items()})
    return network.eval()


@torch.no_grad()
def generate(prompts: list[str], seed: int = 0, wide: bool = False, steps: int = 50) -> Tensor:
    """Pictures [B, 3, 64, 64], or 128 wide, in [-1, 1] of prompts, by DDIM from the exported model at guidance 4."""
    context = exported(clip.TextEncoder, "text_encoder", "model")(tokenizer()([""] * len(prompts) + prompts))
    denoiser, decoder = exported(unet.UNet, "unet"), exported(vae.VAE, "vae")
    kv = denoiser.keys_values(context)
    side, chance = SIZE // 8, torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), 16, side, side * (1 + wide), generator=chance)
    schedule = sampler.Schedule(schedule_config())
    *_, latents = sampler.sample(denoiser, schedule, noise, kv, steps=steps, guidance_scale=4.0)
    return decoder.decode(latents / decoder.scaling_factor).clamp(-1, 1)


def write_grid(pictures: Tensor, path: Path, columns: int = 16) -> None:
    """Pictures [B, 3, 64, W] as one PNG, row by row."""
    from PIL import Image

    rows = [torch.cat(list(row), dim=-1) for row in pictures.split(columns)]
    rows = [F.pad(row, (0, columns * pictures.shape[-1] - row.shape[-1]), value=1.0) for row in rows]
    pixels = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)


def rates(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> dict[str, float]:
    """Shares of concepts, styles and backgrounds, indices [B] each, that were recognised."""
    shares = [(a == b).float().mean().item() for a, b in zip(found, true, strict=True)]
    return dict(zip(("concept", "style", "background"), shares, strict=True))


@dataclass
class Asked:
    """A prompt and what its picture should show, as indices."""

    prompt: str
    things: tuple[int, ...]
    style: int
    colour: int


def asked(kind: str, count: int, chance: random.Random) -> list[Asked]:
    """Prompts of a kind, with style and background: "captions", or sentences of prompts/emoji-{kind}.txt.

    Concepts come in turn, spread over the whole list where `count` is less; styles and backgrounds by chance.
    """
    names, sentences, prompts = concepts(), grammar.Grammar(concepts()), []
    frames = ["a picture of a {}"] if kind == "captions" else grammar.frames(f"emoji-{kind}.txt")
    for i in range(count):
        c, s, k = i * len(names) // count, chance.randrange(len(STYLES)), chance.randrange(len(COLOURS))
        other = (c + 1 + chance.randrange(len(names) - 1)) % len(names)
        things = (c, other) if kind == "beside" else (c,)
        words = {"style": STYLES[s], "colour": COLOURS[k]}
        if kind == "captions":
            text = caption(names[c], **words)
        else:
            frame = grammar.fill(frames[i % len(frames)], names[c], names[other])
            text = sentences.dress(frame, chance, **words)
        prompts.append(Asked(text, things, s, k))
    return prompts


def generated_scores(judge: Judge, kind: str, count: int, steps: int = 50) -> dict[str, float]:
    """Recognition of one picture of each of `count` prompts of a kind; the pictures are written to build/."""
    wanted = asked(kind, count, random.Random(0))
    parts = [wanted[i : i + 16] for i in range(0, count, 16)]
    made = [
        generate([a.prompt for a in part], i, kind == "beside", steps) for i, part in enumerate(tqdm(parts, desc=kind))
    ]
    pictures = torch.cat(made)
    write_grid(pictures, BUILD / f"{kind}.png")
    first, style, colour = (
        torch.tensor([x(a) for a in wanted]) for x in (lambda a: a.things[0], lambda a: a.style, lambda a: a.colour)
    )
    if kind != "beside":
        return rates(judge(pictures), (first, style, colour))
    second = torch.tensor([a.things[1] for a in wanted])
    left, right = (judge(half)[0] for half in pictures.split(SIZE, dim=-1))
    found = {"left": left == first, "right": right == second, "both": (left == first) & (right == second)}
    shares = {key: value.float().mean().item() for key, value in found.items()}
    return shares | {"background": (background(pictures) == colour).float().mean().item()}


def evaluate(json_file: Path | None, count: int | None = None, steps: int = 50) -> None:
    """Measure the exported model: VAE, CLIP on real renders and sentences, contexts, generated pictures."""
    pictures, judge_model = Pictures(), exported(clip.CLIP, "clip", "model")
    autoencoder, files = exported(vae.VAE, "vae"), ("held-out", "strange")
    scores: dict = {"psnr": {kind: psnr(autoencoder, pictures, wide=kind == "wide") for kind in ("square", "wide")}}
    scores["renders"] = zero_shot_renders(judge_model, pictures)
    scores["colour by CLIP"] = colour_accuracy(judge_model, pictures)
    scores["sentences by CLIP"] = {f: sentence_accuracy(judge_model, pictures, f"emoji-{f}.txt") for f in files}
    scores["contexts"] = context_distances(exported(clip.TextEncoder, "text_encoder", "model"))
    judge = Judge(judge_model)
    for kind in ("captions", *files, "beside"):
        scores[kind] = generated_scores(judge, kind, count or len(concepts()), steps)
    begun = time.time()
    generate(["a picture of a " + concepts()[0]])
    scores["seconds"] = time.time() - begun
    print(json.dumps(scores, indent=2))
    if json_file:
        write_json(json_file, scores)


# Command line.


def both(names: tuple[str, ...]) -> None:
    """Train several networks side by side, one core each: no time is lost waiting. UserError when one of them fails."""
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    command, rest = [sys.executable, __file__], ["--threads", "1", "--out", str(OUT)]
    jobs = [subprocess.Popen([*command, name, *rest], env=one_core) for name in names]
    codes = [job.wait() for job in jobs]
    if any(codes):
        raise UserError(f"training of {' or '.join(names)} failed: why stands above; the same command goes on")


def everything(samples: int | None) -> None:
    """From what there is to the evaluated model: what an earlier run has done is not done again."""
    if not (BUILD / "icons.safetensors").exists():
        make_data()
    if not (OUT / "tokenizer" / "vocab.json").exists():
        make_tokenizer()
    both(("clip", "vae"))
    text_encoder()
    train("sentences", None)
    train("unet", samples)
    export()
    evaluate(None)


def train(name: str, samples: int | None, minutes: float = math.inf) -> None:
    """Train one network to its budget, or on to `samples`, but not longer than `minutes`."""
    recipe = replace(RECIPES[name], minutes=minutes)
    recipe = recipe if samples is None else replace(recipe, samples=samples)
    {"clip": train_clip, "sentences": train_sentences, "vae": train_vae, "unet": train_unet}[name](recipe)


def work_in(out: Path) -> None:
    """Read and write the model in `out`, what it is made from in its `build/`; UserError if that can be no folder."""
    global OUT, BUILD
    OUT, BUILD = out, out / "build"
    try:
        BUILD.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be a folder ({error.strerror}): give another one") from error


def main() -> int:
    """Read the command line; exit code 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description="Build the embedded model.")
    commands = ("data", "tokenizer", "clip", "sentences", "vae", "unet", "export", "evaluate", "all")
    parser.add_argument("command", choices=commands, help="a step, or all of them in this order")
    parser.add_argument("--samples", type=int, help="budget of clip, vae or unet (in `all`: unet), in pictures")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop a training after this time in all")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="cores to use (other work on the same ones: give 1)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of the model, read and written; an empty one: from nothing"
    )
    parser.add_argument("--count", type=int, help="pictures of each kind that evaluate draws; all concepts by default")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of evaluate's pictures")
    parser.add_argument("--json", type=Path, help="where evaluate writes its figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {
        "data": make_data,
        "tokenizer": make_tokenizer,
        "export": export,
        "evaluate": lambda: evaluate(arguments.json, arguments.count, arguments.steps),
        "all": lambda: everything(arguments.samples),
    }
    try:
        work_in(arguments.out.resolve())
        steps.get(arguments.command, lambda: train(arguments.command, arguments.samples, arguments.minutes))()
    except UserError as error:
        print(f"make.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
