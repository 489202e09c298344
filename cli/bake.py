"""bake: a model whose text encoder does what gates did, so that no add-on is left to delete (deploy/bake.py).

A folder, or one file in the original layout if --out ends in .safetensors. What baking loses is measured at the end.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import cpe
from cli.common import GateFile, command, duration, merge_gates, open_model, settle, slug, space_of
from cli.runs import digest, state_file, train
from deploy.bake import HELD_OUT, Baker, Recipe, token_figures
from deploy.export import export
from deploy.targets import Concept, read_concept, training_prompts
from loading.files import UserError, check_writable
from loading.prompts import PRESETS, anchor_words, fewer, read_prompts
from token_space import TokenSpace, context_gate
from weights import Model, save_model

VERSION = 5  # raise it when the same settings come to give another text encoder


def run(args: argparse.Namespace) -> str | None:
    """`bake`. UserError if --out exists already, or where gates cannot be baked."""
    files = settle(args)
    preset = args.preset or common_preset(files)
    # What a file leaves open is as the preset has it.
    concepts = [read_concept({"prompts": file.target} | file.metadata, PRESETS[preset]) for file in files]
    names, prompts = [name for concept in concepts for name in concept.names], read_prompts(preset)
    out = args.out or Path("models") / slug("-".join(concept.names[0] for concept in concepts))
    if os.path.lexists(out):
        raise UserError(f"--out: {out} exists already: choose another name, or remove it.")
    for path in (out, state_file(out)):
        check_writable(path)
    model = open_model(args, ("text_encoder", "unet", "vae"), files)
    gates, space, recipe = merge_gates(files, model), space_of(model), Recipe().of(len(concepts), args.steps_scale)
    try:
        texts = training_prompts(concepts, prompts, args.seed)
        targets, others = (model.tokenizer(part, model.tokens).to(model.device) for part in texts)
        count = len(targets) + len(others)
        for _ in range(2):  # the first warms up
            begun = time.perf_counter()
            model.encode(texts[0][:16])
        reading = duration((time.perf_counter() - begun) / 16 * count)
        print(f"time    reading {count:,} prompts: about {reading}; then come {recipe.steps:,} steps", flush=True)
        baker = Baker(model.text_encoder, context_gate(space, gates), space, targets, others, recipe, args.seed)
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, args.gates))}: {error}.") from error
    # All that decides on the outcome: a state of another name is not gone on with.
    inputs = digest(prompts, gates.state_dict() | model.cross_attention())
    settings = {"version": VERSION, "inputs": inputs, "fingerprint": model.fingerprint, "seed": args.seed}
    settings |= {"concepts": [dataclasses.asdict(concept) for concept in concepts]} | dataclasses.asdict(recipe)
    name, state = json.dumps(settings, sort_keys=True), state_file(out)
    train(baker, state, name, "baking")
    baked = model.with_text_encoder(baker.changed())
    export(baked, out) if out.suffix == ".safetensors" else save_model(baked, out)
    state.unlink(missing_ok=True)
    print(f"wrote   {out}: {model.name} without {', '.join(names)}")
    measure(space, model, baked, gates, concepts, fewer(anchor_words(prompts, names)).domain)
    return command("generate", files[0].caption, "--model", out)


def common_preset(files: Sequence[GateFile]) -> str:
    """The preset that gates were trained with; UserError where they differ, or one does not say it: none is guessed."""
    if silent := [file.path for file in files if file.metadata.get("preset") != file.preset]:
        raise UserError(f"{silent[0]} does not say how it was trained: say --preset (one of {', '.join(PRESETS)}).")
    if len(presets := list(dict.fromkeys(file.preset for file in files))) > 1:
        raise UserError(f"these gates were trained with different presets ({', '.join(presets)}): say --preset.")
    return presets[0]


def measure(space: TokenSpace, model: Model, baked: Model, gates: cpe.ResAG, concepts: Sequence[Concept],
            words: Sequence[str]) -> None:  # fmt: skip
    """Print what baking loses of the targets, and how far it moves other words."""
    print("\nleft: the share of the erasure still missing on the target. near, others: how far other concepts move,")
    print(f"relative to it. 0 is best everywhere.\n{'':52}{'gates':>10}{'baked':>10}")
    for concept in concepts:
        for template in HELD_OUT:
            found = token_figures(space, gates, concept, words, model.encode, baked.encode, template)
            for name, row in found.items():
                title = f"{concept.names[0]}: {name}, {template!r}"
                print(f"{title:52}{row['gates']:10.2g}{row['baked']:10.2g}")
