"""Time of encoding prompts with Stable Diffusion 1.4's text encoder, and how many `train` has to encode.

    python benchmarks/encode.py
    python benchmarks/encode.py --quality      # are gates as good from prompts in bfloat16, or from more of them?

Random weights at full size. Every figure is per prompt of 77 tokens: the tower is causal, but what a padding token
becomes depends on the prompt before it, so nothing shorter gives the same context. The quality is that of gates of the
embedded model, on two targets of benchmarks/tune.py: shares of images recognised, per cent, and how far images move.
"""

import argparse

import compare
import sd14
import torch
import tune

import old_cpe as cpe
import weights
from clip import TextEncoder
from loading.parts import Undrawn
from loading.prompts import read_prompts

BATCHES = (4, 8, 16, 32)


def asked() -> tuple[int, int]:
    """How many prompts `train --target "Brad Pitt"` encodes with an empty cache, and with a filled one."""
    counts = {"always": 0, "cached": 0}

    def count(kind: str):
        def encode(prompts: list[str]) -> torch.Tensor:
            counts[kind] += len(prompts)
            return torch.ones(len(prompts), 1, 1)

        return encode

    prompts = read_prompts("celebrity")
    cpe.prepare(cpe.PRESETS["celebrity"], prompts, ["Brad Pitt"], count("always"), count("cached"))
    return sum(counts.values()), counts["always"]


@torch.inference_mode()
def per_prompt(tower: TextEncoder, batch: int) -> float:
    """Milliseconds per prompt in batches of `batch`."""
    tokens = torch.randint(49000, (batch, 77))
    return sd14.milliseconds(lambda: tower(tokens), repeats=8, warmup=1) / batch


def quality() -> None:
    """Train gates on prompts in both precisions, and on anchors in 32 templates, not 4; print one row each."""
    world, recipe = compare.World(weights.load_model("emoji")), cpe.PRESETS["emoji"]
    one = cpe.constant_direction(world.model.text_encoder.text_model.final_layer_norm)
    rows = {"float32": (torch.float32, 4), "bfloat16": (torch.bfloat16, 4), "32 templates": (torch.float32, 32)}
    print(f"{'':28}" + "".join(f"{group:>16}" for group in compare.GROUPS) + f"{'change of others':>18}")
    for scenario in tune.TARGETS:
        before, prompts = compare.Originals(world, scenario, compare.Budget()), world.listed(scenario)
        for name, (dtype, templates) in rows.items():
            model = weights.load_model("emoji", dtype)

            def encode(prompts: list[str], model: weights.Model = model) -> torch.Tensor:
                return model.encode(prompts).float()

            given = recipe, prompts, scenario.targets, encode, encode
            data = cpe.prepare(*given, one)
            if templates != 4:
                words = [*prompts.general, *cpe.nearest_words(*given)]
                data.anchors = encode(cpe.anchor_prompts(words, prompts.templates, templates)).half()
            trainer = cpe.Trainer(world.objective, data, recipe)
            for _ in trainer.steps():
                pass
            images = compare.draw(world.model, before.contexts, before.seeds, trainer.gates, compare.Budget())
            groups = compare.figures_of(world, scenario, before, images)["groups"]
            shares = "".join(f"{100 * compare.share(groups[group]):16.0f}" for group in compare.GROUPS)
            print(f"{scenario.targets[0] + ', ' + name:28}{shares}{groups['others']['change']:18.5f}", flush=True)


def main() -> None:
    """Print one row per precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quality", action="store_true", help="of gates, instead of the time")
    if parser.parse_args().quality:
        return quality()
    torch.manual_seed(0)
    print(sd14.machine())
    flags = sd14.flags()
    print(f"bfloat16 products in hardware: {'yes' if flags & {'avx512_bf16', 'amx_bf16'} else 'no'}")
    with torch.device("meta"), Undrawn():
        tower = TextEncoder(sd14.CONFIGS["text_encoder"])
    tower = tower.to_empty(device="cpu").eval().requires_grad_(False)
    for p in tower.parameters():
        p.normal_(std=0.02) if p.ndim > 1 else p.fill_(1.0)

    tokens = torch.randint(49000, (8, 77))
    exact = tower(tokens)
    cold, warm = asked()
    print(f"prompts of train: {cold} with an empty cache, {warm} with the anchors and the surrogate in it\n")
    print(
        "ms a prompt" + "".join(f"{f'batch {b}':>12}" for b in BATCHES) + f"{'cold, s':>12}{'warm, s':>10}{'error':>10}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        tower = tower.to(dtype)
        ms = [per_prompt(tower, b) for b in BATCHES]
        error = ((tower(tokens[:8]).float() - exact).norm() / exact.norm()).item()
        name = str(dtype).removeprefix("torch.")
        row = f"{name:11}" + "".join(f"{m:12.1f}" for m in ms)
        print(row + f"{cold * min(ms) / 1000:12.0f}{warm * min(ms) / 1000:10.1f}{error:10.0e}", flush=True)
    return None


if __name__ == "__main__":
    main()
