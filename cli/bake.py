"""bake: a model whose text encoder does what gates did, so that no add-on is left to delete (deploy/bake.py).

A folder in the diffusers layout, or one file in the original layout if --out ends in .safetensors. Then it is measured
what baking loses against the gates, in the text encoder and, on the embedded model, in pictures.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import cpe
import sampler
from cli.common import GateFile, check_out, command, forecast, merge_gates, open_model, settle, slug
from cli.runs import Run, going_on, remove_state, state_file
from deploy.bake import HELD_OUT, Baker, Recipe, token_figures
from deploy.export import export
from deploy.targets import Concept, read_concept, training_prompts
from loading.files import UserError
from loading.prompts import PRESETS, Prompts, anchor_words, fewer, read_prompts
from token_space import TokenSpace, context_gate, spectral_norm
from weights import Model, save_model

VERSION = 3  # raise it when the same settings come to give another text encoder


def run(args: argparse.Namespace) -> str | None:
    """`bake`. UserError if --out exists already, or where gates cannot be baked."""
    if args.texts or not args.gates:
        raise UserError("which gates? Give files that end in .safetensors: bake gates/red-heart.safetensors")
    files = settle(args)
    preset = args.preset or common_preset(files, args.model)
    concepts, prompts = [concept_of(file, preset) for file in files], read_prompts(preset)
    out = args.out or Path("models") / slug("-".join(concept.names[0] for concept in concepts))
    if os.path.lexists(out):
        raise UserError(f"--out: {out} exists already: choose another name, or remove it.")
    for path in (out, state_file(out)):
        check_out(path)
    model = open_model(args, ("text_encoder", "unet", "vae"))
    gates = merge_gates(files, model)
    space = TokenSpace(cpe.Layers.of(model.cross_attention(), spectral_norm))
    baker = build(args, model, gates, space, concepts, prompts)
    bake = Run(baker, state_file(out), run_name(args, model, gates, prompts, concepts, baker.recipe), "baking")
    bake.train(args.resume)
    baked = model.with_text_encoder(baker.changed())
    with going_on(bake.path, bake.name):
        export(baked, out) if out.suffix == ".safetensors" else save_model(baked, out)
    remove_state(bake.path, bake.name)
    print(f"wrote   {out}: {model.name} without {', '.join(name for c in concepts for name in c.names)}")
    print(f"{baker.unreachable:.1%} of what the gates do is out of reach: the text encoder ends in a LayerNorm")
    measure(args, space, model, baked, gates, concepts, prompts)
    return command("generate", f"a picture of a {concepts[0].names[0]}", "--model", out)


def common_preset(files: Sequence[GateFile], model: str) -> str:
    """The preset that gates were trained with; UserError where they differ, or do not say it."""
    presets = list(dict.fromkeys(file.metadata.get("preset") for file in files))
    if len(presets) > 1:
        raise UserError(
            f"these gates were trained with different presets ({', '.join(map(str, presets))}): say --preset."
        )
    if presets[0] in PRESETS:
        return presets[0]
    known = ", ".join(PRESETS)
    raise UserError(f"{files[0].path} does not say how it was trained: say --preset (one of {known}).")


def concept_of(file: GateFile, preset: str) -> Concept:
    """What a gate file erases; UserError if it does not say it, or in letters that no prompt has."""
    try:
        concept = read_concept(file.metadata, PRESETS[preset])
    except ValueError as error:
        raise UserError(f"{file.path}: {error}.") from error
    for name in (*concept.names, concept.surrogate):
        if any(unicodedata.category(letter) == "Cc" for letter in name):  # a terminal would obey it
            raise UserError(f"{file.path}: the name {name!r} in its metadata is no prompt.")
    return concept


def build(args: argparse.Namespace, model: Model, gates: cpe.ResAG, space: TokenSpace, concepts: Sequence[Concept],
          prompts: Prompts) -> Baker:  # fmt: skip
    """Encode the prompts that shall change and those that shall stay; UserError when there is nothing to learn."""
    recipe = Recipe().of(len(concepts), args.steps_scale)
    try:
        texts = training_prompts(concepts, prompts, args.seed)
        targets, others = (model.tokenizer(part, model.tokens).to(model.device) for part in texts)
        return Baker(model.text_encoder, context_gate(space, gates), space, targets, others, recipe, args.seed)
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, args.gates))}: {error}.") from error


def run_name(args: argparse.Namespace, model: Model, gates: cpe.ResAG, prompts: Prompts, concepts: Sequence[Concept],
             recipe: Recipe) -> str:  # fmt: skip
    """All that decides on the outcome: a state of another name is not gone on with."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(prompts)).encode())
    for tensor in (*gates.state_dict().values(), *model.cross_attention().values()):
        digest.update(tensor.float().cpu().contiguous().numpy())
    settings = {"inputs": digest.hexdigest()[:16], "fingerprint": model.fingerprint, "seed": args.seed}
    settings |= {"version": VERSION, "concepts": [dataclasses.asdict(concept) for concept in concepts]}
    return json.dumps(settings | dataclasses.asdict(recipe), sort_keys=True)


def measure(args: argparse.Namespace, space: TokenSpace, model: Model, baked: Model, gates: cpe.ResAG,
            concepts: Sequence[Concept], prompts: Prompts) -> None:  # fmt: skip
    """Print what baking loses."""
    words = fewer(anchor_words(prompts, [name for concept in concepts for name in concept.names])).domain
    print("\nleft: the share of the erasure still missing on the target. near, others: how far other concepts move,")
    print(f"relative to it. 0 is best everywhere.\n{'':52}{'gates':>10}{'baked':>10}")
    for concept in concepts:
        rows = {}
        for template in HELD_OUT:
            found = token_figures(space, gates, concept, words, model.encode, baked.encode, template)
            rows |= {f"{name}, {template!r}": row for name, row in found.items()}
        if args.images and model.has_clip:
            rows |= changes(args, model, baked, gates, concept.names[0], words)
        for name, row in rows.items():
            print(f"{f'{concept.names[0]}: {name}':52}{row['gates']:10.2g}{row['baked']:10.2g}")


def changes(args: argparse.Namespace, model: Model, baked: Model, gates: cpe.ResAG, target: str,
            words: Sequence[str]) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mean change of images, of 2, by gates and by the baked model: of the target, and of others."""
    others = words[:: max(1, len(words) // 20)][:20]
    names = [target] * 8 + [word for word in others for _ in range(args.images)]
    texts, seeds = [f"a picture of a {name}" for name in names], [args.seed + i for i in range(len(names))]

    def draw(model: Model, gates: cpe.ResAG | None, text: str) -> Tensor:
        how = (args.steps, args.guidance, args.sampler)
        return sampler.draw(model, texts, seeds, gates, *how, progress=partial(forecast, text=text))

    before = draw(model, None, "before")
    after = {"gates": draw(model, gates, "gates"), "baked": draw(baked, None, "baked")}
    moved = {kind: (before - images).abs().flatten(1).mean(dim=1) for kind, images in after.items()}
    rows = {"target": torch.arange(8), "others": torch.arange(8, len(names))}
    return {
        f"image change, {group}": {kind: change[i].mean().item() for kind, change in moved.items()}
        for group, i in rows.items()
    }
