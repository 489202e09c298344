"""Write tests/reference.safetensors: what diffusers and transformers compute for the tiny configs of tiny.py.

Plain `pytest` compares with that file, so it needs neither library. Run again only to change the configs:

    pip install -r requirements-oracle.txt && PYTHONPATH=. python tests/make_reference.py
"""

from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from clip import CLIP, TextEncoder
from unet import UNet
from vae import VAE

PATH = Path(__file__).with_name("reference.safetensors")


def trajectory(scheduler, steps: int) -> torch.Tensor:
    """Latents after every step of a diffusers scheduler on the dummy network, without guidance."""
    scheduler.set_timesteps(steps)
    x, kv, result = tiny.draw("latents", 1, 4, 4, 4), {"shift": torch.zeros(1)}, []
    for t in scheduler.timesteps:
        x = scheduler.step(tiny.dummy(x, t, kv), t, x).prev_sample
        result.append(x)
    return torch.cat(result)


@torch.no_grad()
def activations() -> dict[str, torch.Tensor]:
    """Every tensor of the file by name."""
    ids, images = tiny.tokens(60), tiny.draw("images", 2, 3, 16, 16)
    text = tiny.their_text(tiny.TEXT, tiny.filled(TextEncoder(tiny.TEXT)))
    clip = tiny.their_clip(tiny.CLIP, tiny.filled(CLIP(tiny.CLIP)))
    unet = tiny.their_unet(tiny.UNET, tiny.filled(UNet(tiny.UNET)))
    vae = tiny.their_vae(tiny.VAE, tiny.filled(VAE(tiny.VAE)))
    ddim, dpm = tiny.reference("diffusers", "DDIMScheduler", "DPMSolverMultistepScheduler")
    latents, timesteps = tiny.draw("latents", 1, 4, 8, 8), torch.tensor([701])
    return {
        "text": text(input_ids=ids).last_hidden_state,
        "clip": clip(input_ids=ids, pixel_values=images).logits_per_image,
        "unet": unet(latents, timesteps, tiny.draw("context", 1, 9, 32)).sample,
        "vae.encode": vae.encode(images[:1]).latent_dist.parameters,
        "vae.decode": vae.decode(tiny.draw("latents", 1, 4, 4, 4)).sample,
        "ddim": trajectory(ddim(**tiny.DDIM), 8),
        "dpm": trajectory(dpm(**tiny.BETAS), 8),
    }


if __name__ == "__main__":
    tensors = {name: x.contiguous() for name, x in activations().items()}
    save_file(tensors, PATH)
    print(f"wrote {PATH}: {PATH.stat().st_size} bytes")
