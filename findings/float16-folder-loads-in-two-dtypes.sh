#!/usr/bin/env bash
# A Stable Diffusion folder saved in float16 and opened with the defaults cannot draw: its parts get two dtypes.
#
# Versions: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0 (CPU).
# A good guess: from_pretrained without a dtype gives one dtype for the whole pipeline, float32 or what the files have.
# Seen: diffusers turns its own parts (unet, vae) into float32, transformers keeps what its file has. The text encoder
# stays float16, and the first prompt ends in
#   RuntimeError: mat1 and mat2 must have the same dtype, but got Half and Float
# A remedy: say torch_dtype in every from_pretrained.
# This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
with open("vocab.json", "w") as file:
    json.dump({word: i for i, word in enumerate(words)}, file)
with open("merges.txt", "w") as file:
    file.write("#version: 0.2\n")
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=16)
text = CLIPTextConfig(
    vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16, projection_dim=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
)
unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16, attention_head_dim=2,
)
pipe = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4), unet=unet,
    text_encoder=CLIPTextModel(text), tokenizer=tokenizer, scheduler=DDIMScheduler(),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)
pipe.to(dtype=torch.float16).save_pretrained("half")

opened = StableDiffusionPipeline.from_pretrained("half")
dtypes = {part: str(getattr(opened, part).dtype) for part in ("text_encoder", "unet", "vae")}
print(dtypes)
assert dtypes == {"text_encoder": "torch.float16", "unet": "torch.float32", "vae": "torch.float32"}
try:
    opened("a crab", num_inference_steps=1, output_type="np")
except RuntimeError as error:
    print("RuntimeError:", error)
    assert "same dtype" in str(error)
else:
    raise SystemExit("it draws: the finding no longer holds")
told = StableDiffusionPipeline.from_pretrained("half", torch_dtype=torch.float32)
assert told("a crab", num_inference_steps=1, output_type="np").images.shape[0] == 1
print("with torch_dtype it draws")
PYTHON
