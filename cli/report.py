"""The page of `train --report`: one self-contained HTML file with pictures, openings, worst sentences and settings."""

import argparse
import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from string import Template

from PIL import Image

from cli.check import WORST, Found, held_out
from cli.common import GateFile, defaults_of, free, merge_gates, note
from cli.generate import drawn
from cli.inspect import drawing, look
from cli.pictures import sheet
from loading.prompts import fill
from token_space import TokenSpace
from weights import Model


def write(file: GateFile, model: Model, space: TokenSpace, found: Found, out: Path, seed: int) -> None:
    """Draw and write the page of a gate file that is just trained. UserError where it cannot."""
    worst, moved = found.order()[:WORST], found.moved.argsort(descending=True)[:WORST].tolist()
    prompts = [file.caption, *(fill(line, file.target) for line in held_out(file.preset)[:3])]
    prompts += [found.others[i] for i in moved[:2]]
    how = argparse.Namespace(**defaults_of(model.name), before_after=True)
    rows = drawn(model, prompts, range(seed, seed + len(prompts)), merge_gates([file], model), how, "report, ")
    looked_at = [look(file, text, model, space) for text in (prompts[0], *(found.sentences[i] for i in worst[:3]))]
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        target=html.escape(file.target),
        model=html.escape(model.name),
        line=html.escape(found.in_a_line()),
        pictures=embedded("; ".join(prompts), sheet(rows, prompts)),
        openings="".join(f"<p>{embedded(each.sentence(), drawing([each]))}</p>" for each in looked_at),
        worst=table((f"{found.reached[i]:.0%}", found.sentences[i]) for i in worst),
        moved=table((f"{found.moved[i]:.1%}", found.others[i]) for i in moved),
        settings=table(sorted(file.metadata.items())),
    )
    note(free(out), page)


def embedded(text: str, picture: Image.Image) -> str:
    """A picture inside the page, and what it shows in words."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of an HTML table."""
    return "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
