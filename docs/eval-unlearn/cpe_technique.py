"""Gates as a technique of eval-unlearn 1.1.2, under the name "cpe".

    pip install eval-unlearn==1.1.2 diffusers transformers
    pip install -e docs/eval-unlearn      # editable: it finds this repository beside itself

Its configuration: {"model_id": ..., "gates": ["gates/brad-pitt.safetensors"]}, or {"model_id": ..., "erase_concept":
"Brad Pitt", "preset": "celebrity"}, which solves for gates first (deploy/erase.py).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cpe
from deploy.erase import erase
from deploy.hooks import attach


class CPETechnique:
    """A pipeline that draws without a concept; ValueError as for `attach` and `erase`."""

    def __init__(self, model_id: str, gates: Sequence[str] = (), erase_concept: str | None = None,
                 preset: str = "celebrity", device: str = "cpu", **drawing: object):  # fmt: skip
        self.pipe = DiffusionPipeline.from_pretrained(model_id, dtype=torch.float32).to(device)
        self.device, self.drawing = device, drawing  # num_inference_steps, guidance_scale
        if gates:
            attach(self.pipe, cpe.merge([cpe.from_tensors(load_file(path)) for path in gates]))
        elif erase_concept:
            erase(self.pipe, erase_concept, preset=preset)
        else:
            raise ValueError("what shall be erased? Give gates, or erase_concept")

    def generate(self, prompts: list[str], seed: int | None = None, **drawing: object) -> list[Image.Image]:
        """One picture a prompt; the i-th from seed + i, as the techniques that come with eval-unlearn do."""
        images = []
        for i, prompt in enumerate(prompts):
            generator = None if seed is None else torch.Generator(self.device).manual_seed(seed + i)
            images += self.pipe(prompt, generator=generator, **(self.drawing | drawing)).images
        return images
