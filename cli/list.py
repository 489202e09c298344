"""list: what there is: models, presets, gates in this folder, and what the embedded model can draw."""

import argparse
import textwrap
from pathlib import Path

from cli.common import NAMED, command, metadata_of, printable
from cli.targets import styles
from loading.hub import SD14
from loading.prompts import PRESETS, read_prompts
from solve import Settings


def run(args: argparse.Namespace) -> str | None:
    """`list`: four short lists. It reads no weights."""
    print(f"models  --model sd14: {NAMED['sd14']}, {SD14} (downloaded once); emoji: the embedded one; or your own\n")
    for name, recipe in PRESETS.items():
        solved = name.startswith("emoji")  # as its model does, where no --how says otherwise
        of = Settings.of(recipe, name.endswith("style")) if solved else recipe
        numbers = f"eta {of.eta:g}, lambda {of.lam:g}, rank {of.k}"
        print(f"preset  {name:12} becomes {recipe.surrogate!r}; {'solved' if solved else 'trained'}: {numbers}")
    print()
    found = [path for where in ("./", "gates/**/", "images/") for path in Path().glob(f"{where}*.safetensors")]
    gates = {path: said for path in sorted(found) if (said := metadata_of(path)).keys() & {"target", "prompts", "run"}}
    for path, said in gates.items():
        becomes = f", which becomes {said['surrogate']!r}" if "surrogate" in said else ""
        erases = f"erases {said.get('target', said.get('prompts'))} from {said.get('model', 'its model')}{becomes}"
        print(f"gates   {path}: {'an unfinished run' if 'run' in said else printable(erases)}")
    if not gates:
        print("gates   none here, in gates/, or in images/ (where `demo` puts them)")
    prompts = read_prompts("emoji")
    for name, words in ("things", prompts.domain), ("styles", styles()):
        print(f"\nThe embedded model's {len(words)} {name}:")
        print(textwrap.fill(", ".join(words), 110, initial_indent="  ", subsequent_indent="  "))
    return command("train", prompts.domain[0], "--model", "emoji")
