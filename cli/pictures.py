"""Grids of pictures that say what they show, prompts over the columns, names before the rows; and what CLIP sees."""

import json
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import sampler
from cli.common import bar, free, is_emoji
from cli.targets import known_as, styles
from loading.files import UserError, atomic, check_writable
from loading.prompts import read_prompts, within
from study.world import QUICK, World
from weights import Model

LINE = 14  # pixels of a line of text


def save(page: Image.Image, path: Path, said: dict | None = None, shows: str = "") -> None:
    """Write a picture as PNG under the first name that is free, and print it. UserError as for `atomic`.

    What is `said` goes into the file, for `evaluate`: its "prompts" are of the last row, those at the right; none of
    them where nothing is to be judged. With it goes the size of one picture where it holds more than that.
    """
    path, info = free(path), PngInfo()
    if said:
        cell = {"cell": page.info["cell"]} if page.size != page.info.get("cell", page.size) else {}
        info.add_itxt("cpe", json.dumps(said | cell, sort_keys=True))
    with atomic(path) as temporary:
        page.save(temporary, "PNG", pnginfo=info)
    print(f"wrote   {path}{shows}")


def sheet(rows: dict[str, Tensor], columns: Sequence[str] = ()) -> Image.Image:
    """Rows of images [B, 3, H, W] in [-1, 1] with a name before each and `columns` above; small images are doubled.

    `info["cell"]` is the width and height of one.
    """
    pixels = [
        ((row.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for row in rows.values()
    ]
    scale = 2 if pixels[0].shape[1] <= 128 else 1
    height, width = scale * pixels[0].shape[1], scale * pixels[0].shape[2]
    wrapped = [textwrap.wrap(text, max(4, width // 7), max_lines=4, placeholder=" ...") for text in columns]
    left, top = 8 * max(map(len, rows)), LINE * max(map(len, wrapped), default=0)
    page = Image.new("RGB", (left + width * len(pixels[0]), top + height * len(rows)), "white")
    page.info["cell"] = (width, height)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for column, lines in enumerate(wrapped):
        draw.multiline_text((left + column * width + 2, 1), "\n".join(lines), "black", font)
    for row, (name, images) in enumerate(zip(rows, pixels, strict=True)):
        draw.text((3, top + (row + 0.5) * height - LINE / 2), name, "black", font)
        for column, image in enumerate(images):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            page.paste(picture, (left + column * width, top + row * height))
    return page


def check_picture(path: Path) -> None:
    """UserError unless a PNG can be written at a path; asked before the work."""
    if path.suffix.lower() not in (".png", ""):
        raise UserError(f"{path}: pictures are written as PNG, choose a name that ends in .png.")
    check_writable(path)


def eyes(model: Model, style: bool = False) -> Callable[[Tensor], list[str]]:
    """What the model's own CLIP sees in images [B, 3, H, W]: a thing that the embedded model knows, or a style."""
    world = World(model)
    names = [f"{style} style" for style in world.styles] if style else world.concepts
    return lambda images: [names[i] for i in world.see(images, "style" if style else "concept")]


def undrawn(target: str, prompts: Sequence[str], model: Model) -> list[str]:
    """Those of the prompts in which the embedded model draws no target, although nothing is erased.

    CLIP looks at two pictures of each that names no other thing. [] of other models, and for an unknown target.
    """
    known = known_as(target) if is_emoji(model.name) else None
    others = [thing for thing in read_prompts("emoji").domain if known and not within(thing, known)]
    prompts = [prompt for prompt in prompts if not any(within(other, prompt) for other in others)]
    if not known or not prompts:
        return []
    texts, progress = [prompt for prompt in prompts for _ in range(2)], partial(bar, text="looking without gates")
    images = sampler.draw(model, texts, range(len(texts)), None, *QUICK.sampling, progress=progress)
    seen = eyes(model, known in styles())(images)
    return [prompt for i, prompt in enumerate(prompts) if known not in seen[2 * i : 2 * i + 2]]


def change(before: Tensor, after: Tensor) -> str:
    """How far an image moved, as people say it, and the mean absolute difference, of 2 at most."""
    moved = (before - after).abs().mean().item()
    words = ((0.01, "unchanged"), (0.05, "hardly changed"), (0.15, "somewhat changed"), (2.1, "another picture"))
    return f"{next(word for limit, word in words if moved < limit)} ({moved:.3f} of 2)"
