"""The page of `train --report`: one self-contained HTML file with pictures, openings, worst sentences and settings."""

import argparse
import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from string import Template

import torch
from PIL import Image

from cli.check import Found, held_out
from cli.common import GateFile, defaults_of, free, merge_gates
from cli.generate import draw
from cli.pictures import openings, sheet
from loading.files import write_text
from weights import Model


def write(file: GateFile, model: Model, found: Found, out: Path, args: argparse.Namespace) -> Path:
    """Draw and write the page of a gate file that is just trained; returns its path. UserError as for `draw`."""
    name, lines = file.names[0], held_out(file.metadata["preset"])
    others = [found.others[i] for i in found.moved.argsort(descending=True)[:2].tolist()]
    prompts = [f"a picture of a {name}", *(line.replace("{}", name) for line in lines[:3]), *others]
    drawing = argparse.Namespace(**defaults_of(args.model))
    gates, seeds = merge_gates([file], model), [args.seed + i for i in range(len(prompts))]
    rows = [draw(model, prompts, seeds, kind, drawing, "report") for kind in (None, gates)]
    worst = [found.sentences[i] for i in found.order()[:8]]
    moved = found.moved.argsort(descending=True)[:8].tolist()
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        target=html.escape(file.target),
        model=html.escape(model.name),
        line=html.escape(found.in_a_line()),
        alt=html.escape("; ".join(prompts)),
        pictures=encoded(sheet(rows, prompts, ("before", "after"))),
        openings="".join(f"<p>{opening(gates, model, text)}</p>" for text in [prompts[0], *worst[:3]]),
        worst=table((f"{found.reached[i]:.0%}", found.sentences[i]) for i in found.order()[:8]),
        moved=table((f"{found.moved[i]:.1%}", found.others[i]) for i in moved),
        settings=table(sorted(file.metadata.items())),
    )
    out = free(out)
    write_text(out, page)
    return out


@torch.no_grad()
def opening(gates: torch.nn.Module, model: Model, prompt: str) -> str:
    """A sentence with the gate's opening behind its words, as an HTML image."""
    values = gates.gate(model.encode([prompt]))[0][:, 0, :, 0].float().cpu()
    tokens = ["<start>", *model.tokenizer.tokens(prompt)[: values.shape[1] - 2], "<end>"]
    picture = openings(tokens, values[:, : len(tokens)], [""] * len(values))
    return f'<img alt="{html.escape(prompt)}" src="data:image/png;base64,{encoded(picture)}">'


def encoded(picture: Image.Image) -> str:
    """A picture as base64 of a PNG."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of an HTML table."""
    return "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
