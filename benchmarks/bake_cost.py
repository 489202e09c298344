"""What baking costs at Stable Diffusion 1.4's size: a few steps are measured, the rest is extrapolated.

    python benchmarks/bake_cost.py [--steps 4] [--prompts 64]

The text encoder and the metric M are random, of the official sizes: time and memory do not depend on their values.
Preparing is measured with two numbers of prompts, `--prompts` and four times as many, which tells what each costs and
what does not depend on them. One training step in four sees all 77 tokens (as in bake.py) and the others `--reach` of
them. Time and memory of a whole run are extrapolations, and are printed as such.
"""

import argparse
import time
from dataclasses import replace
from types import SimpleNamespace

import sd14
import torch

import bake
import commands
import old_cpe as cpe
from clip import TextEncoder
from loading.configs import SD14_CONFIGS
from loading.prompts import read_prompts


def main() -> None:
    """Print seconds per part, and their sum over a whole run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps to measure, a multiple of 4")
    parser.add_argument("--prompts", type=int, default=64, help="prompts to encode, of each kind")
    parser.add_argument("--reach", type=int, default=24, help="tokens of the longest prompt, with its first padding")
    parser.add_argument("--preset", default="celebrity", choices=commands.PRESET_NAMES)
    args = parser.parse_args()
    torch.manual_seed(0)
    tower = TextEncoder(SD14_CONFIGS["text_encoder"]).eval().requires_grad_(False)
    d, recipe = 768, bake.Recipe()
    root = torch.randn(d, d) / d**0.5
    objective = SimpleNamespace(M=root @ root.T)
    objective.energy = lambda x: cpe.Objective.energy(objective, x)
    gate = cpe.ContextGate(d, k=32).initialise(torch.Generator().manual_seed(0)).requires_grad_(False)
    torch.nn.init.normal_(gate.inner.lora_up, std=0.01)

    prompts = read_prompts(args.preset)
    others = 4 * (1 + 4 * len([*prompts.general, *prompts.domain]))
    total = max(1200, 2 * len(prompts.templates)) + others  # of one concept, without aliases; as in training_prompts
    eos = 49407

    def prepared(count: int) -> tuple[bake.Baker, float, float]:
        """A Baker of `count` prompts of each kind, the seconds it took, and GB at their peak so far."""
        tokens = torch.randint(eos - 1, (2 * count, 77))
        tokens[:, args.reach - 2 :] = eos
        begun = time.perf_counter()
        baker = bake.Baker(tower, gate, objective, *tokens.split(count), recipe)
        return baker, time.perf_counter() - begun, sd14.peak() / 1024

    prepared(args.prompts)  # the first products of a size are slow
    _, few, _ = prepared(args.prompts)
    baker, many, peak = prepared(4 * args.prompts)
    each = (many - few) / (6 * args.prompts)
    fixed = few - 2 * args.prompts * each
    seconds = []
    baker.recipe = replace(recipe, steps=args.steps)
    begun = time.perf_counter()
    for _ in baker.steps():
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    step = sum(seconds) / len(seconds)
    kept = 77 * d * 2 * 2 / 2**30  # of a prompt: what the last MLP reads of it, and what it adds to
    print(f"measured      {each:.3f} s a prompt to prepare, and {fixed:.1f} s")
    print(f"measured      {step:.2f} s per step, {len(seconds)} steps: {', '.join(f'{s:.2f}' for s in seconds)}")
    print(
        f"measured      {peak:.1f} GB peak memory with {8 * args.prompts} prompts, on {torch.get_num_threads()} threads"
    )
    minutes = (fixed + each * total + step * recipe.steps) / 60
    print(f"extrapolated  {minutes:.1f} minutes for {total} prompts and {recipe.steps} steps")
    whole = peak + kept * (total - 8 * args.prompts)
    print(f"extrapolated  {whole:.1f} GB, of which {kept * total:.1f} are kept of prompts")


if __name__ == "__main__":
    main()
