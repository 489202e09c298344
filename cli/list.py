"""list: what there is: models, presets, gates in this folder, and what the embedded model can draw."""

import argparse
import textwrap
from pathlib import Path

from cli.common import NAMED, command, metadata_of
from cli.targets import styles
from loading.hub import SD14
from loading.prompts import PRESETS, read_prompts


def run(args: argparse.Namespace) -> str | None:
    """`list`: four short lists. It reads no weights."""
    print(f"models  --model sd14: {NAMED['sd14']}, {SD14} (downloaded once); emoji: the embedded one; or your own\n")
    for name, recipe in PRESETS.items():
        eta = f"eta {recipe.eta:g}, lambda {recipe.lam:g}, {recipe.stages} stages"
        print(f"preset  {name:12} becomes {recipe.surrogate!r}; {eta}")
    print()
    gates = sorted(Path("gates").glob("*.safetensors"))
    for path, said in ((path, metadata_of(path)) for path in gates):
        erases = f"erases {said.get('target', path.stem)} from {said.get('model', 'its model')}"
        print(f"gates   {path}: {'an unfinished run' if 'run' in said else erases}")
    if not gates:
        print("gates   none in gates/")
    prompts = read_prompts("emoji")
    for name, words in ("things", prompts.domain), ("styles", styles()):
        print(f"\nThe embedded model's {len(words)} {name}:")
        print(textwrap.fill(", ".join(words), 110, initial_indent="  ", subsequent_indent="  "))
    return command("train", prompts.domain[0], "--model", "emoji")
