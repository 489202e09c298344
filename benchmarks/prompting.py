"""What gates do to weighted prompts (compel) and to negative prompts, in pictures of the embedded model.

    python cpe.py train "red heart" --model emoji
    python benchmarks/prompting.py gates/red-heart.safetensors     # needs `pip install transformers compel`

How many of 8 pictures show the target where compel weighs its name, with gates on the U-Net, or on the text encoder,
whose words are erased before they are weighed; how many of 8 show their thing where the negative prompt names the
target: gates on all rows, on the positive ones alone, or none. Judged by the model's own CLIP.
"""

import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compel import Compel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

import cpe  # noqa: E402
import sampler  # noqa: E402
from study.evaluate import recognise, spread  # noqa: E402
from study.world import World, sentences  # noqa: E402
from token_space import context_gate  # noqa: E402
from weights import load_model  # noqa: E402

TARGET, WEIGHTS = "red heart", (0.5, 0.7, 1.0, 1.3, 1.6)


class Positive:
    """Gates on the second half of the rows, which are the positive ones; the first are the negative."""

    def __init__(self, gates: cpe.ResAG):
        self.gates = gates

    def __call__(self, E: Tensor, kv: dict[str, Tensor]) -> dict[str, Tensor]:
        """Corrected keys and values of contexts E [2B, T, d]."""
        changed, half = self.gates(E, kv), len(E) // 2
        return {name: torch.cat([kv[name][:half], changed[name][half:]]) for name in kv}


def shown(world: World, contexts: list[str] | Tensor, expected: list[int], gates: object, **how: object) -> int:
    """How many pictures show what is expected."""
    images = sampler.draw(world.model, contexts, range(len(expected)), gates, 10, 4.0, "dpm", **how)
    seen = recognise(world.clip, images, world.features)
    return int((seen == torch.tensor(expected)).sum())


def weighted(world: World, gates: cpe.ResAG) -> None:
    """The table of weights."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "emoji/tokenizer")
    encoder = CLIPTextModel.from_pretrained(ROOT / "emoji", subfolder="text_encoder", dtype=torch.float32)
    weigh, gate = Compel(tokenizer=tokenizer, text_encoder=encoder), context_gate(world.space, gates)

    def erase(module: CLIPTextModel, inputs: tuple, output: object) -> None:
        """What docs/hooks.md hangs on a text encoder."""
        output.last_hidden_state = gate(output.last_hidden_state)

    target, frames = world.concepts.index(TARGET), sentences("emoji", "held-out")
    texts = [*(world.prompt("{}", i) for i in range(4)), *frames[:4]]
    print(f"| {len(texts)} pictures each | {' | '.join(map(str, WEIGHTS))} |\n|---{'|---:' * len(WEIGHTS)}|")
    for name, eraser in (("before", None), ("gates on the U-Net", gates), ("on the text encoder", None)):
        if name == "on the text encoder":
            encoder.register_forward_hook(erase)
        cells = []
        for weight in WEIGHTS:
            with torch.no_grad():
                contexts = torch.cat([weigh(text.replace("{}", f"({TARGET}){weight}")) for text in texts])
            cells.append(shown(world, contexts, [target] * len(texts), eraser))
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)


def negative(world: World, gates: cpe.ResAG, count: int = 8) -> None:
    """The table of negative prompts: the target, and one that names it among other things."""
    target, cloud = world.concepts.index(TARGET), world.concepts.index("cloud")
    nearest = (world.features @ world.features[target]).argsort(descending=True).tolist()
    order = [c for c in nearest if c not in (target, cloud)]
    groups = {"clouds": [cloud] * count, "near": order[:count], "others": spread(order[20:], count)}
    print(f"\n| {count} pictures each | {' | '.join(groups)} |\n|---{'|---:' * len(groups)}|")
    rows = [("no negative prompt, no gates", "", None), ("no gates", TARGET, None)]
    rows += [("gates on all rows", TARGET, gates), ("on the positive rows", TARGET, Positive(gates))]
    for name, text, eraser in rows:
        cells = []
        for things in groups.values():
            prompts = [world.prompt(world.concepts[c], i) for i, c in enumerate(things)]
            cells.append(shown(world, prompts, list(things), eraser, negative=text))
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    everything, ours = World(load_model("emoji")), cpe.from_tensors(load_file(sys.argv[1]))
    weighted(everything, ours)
    negative(everything, ours)
