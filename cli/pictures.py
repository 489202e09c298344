"""Grids of pictures that say what they show: prompts over the columns, names before the rows."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cli.openings import Opening
from loading.files import UserError, atomic, check_writable

LINE = 14  # pixels of a line of text


def grid(rows: Sequence[Tensor], path: Path, columns: Sequence[str] = (), names: Sequence[str] = (),
         said: str = "") -> None:  # fmt: skip
    """Write rows of images [B, 3, H, W] in [-1, 1] as one PNG; small ones doubled. UserError as for `atomic`.

    `columns` stand over them, `names` before the rows; what is `said` goes into the file, for `evaluate`.
    """
    info = PngInfo()
    if said:
        info.add_itxt("cpe", said)
    with atomic(path) as temporary:
        sheet(rows, columns, names).save(temporary, "PNG", pnginfo=info)


def sheet(rows: Sequence[Tensor], columns: Sequence[str], names: Sequence[str]) -> Image.Image:
    """The picture that `grid` writes: small images are doubled."""
    pixels = [
        ((row.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy() for row in rows
    ]
    scale = 2 if pixels[0].shape[1] <= 128 else 1
    height, width = scale * pixels[0].shape[1], scale * pixels[0].shape[2]
    wrapped = [textwrap.wrap(text, max(4, width // 7), max_lines=4, placeholder=" ...") for text in columns]
    left, top = 8 * max(map(len, names), default=0), LINE * max(map(len, wrapped), default=0)
    page = Image.new("RGB", (left + width * len(rows[0]), top + height * len(rows)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for column, lines in enumerate(wrapped):
        draw.multiline_text((left + column * width + 2, 1), "\n".join(lines), "black", font)
    for row, images in enumerate(pixels):
        draw.text((3, top + (row + 0.5) * height - LINE / 2), names[row] if names else "", "black", font)
        for column, image in enumerate(images):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            page.paste(picture, (left + column * width, top + row * height))
    return page


def check_picture(path: Path) -> None:
    """UserError unless a PNG can be written at a path; asked before the work."""
    if path.suffix.lower() not in (".png", ""):
        raise UserError(f"{path}: pictures are written as PNG, choose a name that ends in .png.")
    check_writable(path)


def change(before: Tensor, after: Tensor) -> str:
    """How far an image moved, as people say it, and the mean absolute difference, of 2 at most."""
    moved = (before - after).abs().mean().item()
    words = ((0.01, "unchanged"), (0.05, "hardly changed"), (0.15, "somewhat changed"), (2.1, "another picture"))
    return f"{next(word for limit, word in words if moved < limit)} ({moved:.3f} of 2)"


def sentence(found: Sequence[Opening]) -> Image.Image:
    """A prompt with the opening of every gate behind its words: white 0, red 1; a row a gate."""
    font, tokens = ImageFont.load_default(), found[0].tokens
    widths = [int(font.getlength(token)) + 10 for token in tokens]
    left = 10 + max(int(font.getlength(opening.target)) for opening in found)
    page = Image.new("RGB", (left + sum(widths), 8 + len(found) * 2 * LINE), "white")
    draw = ImageDraw.Draw(page)
    for row, opening in enumerate(found):
        y, x = 4 + row * 2 * LINE, left
        draw.text((4, y + 4), opening.target, "black", font)
        for token, width, value in zip(tokens, widths, opening.values.tolist(), strict=True):
            shade = round(255 * (1 - value))
            draw.rectangle((x, y, x + width - 2, y + 2 * LINE - 4), fill=(255, shade, shade))
            draw.text((x + 4, y + 4), token, "black", font)
            x += width
    return page.resize((2 * page.width, 2 * page.height), Image.Resampling.LANCZOS)
