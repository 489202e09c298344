"""What is in a picture, judged by CLIP: zero-shot recognition of images among a list of names.

Works with any CLIP that `weights.Model.clip` opens; the embedded model brings its own. Built on clip.py.
Shapes: B images in [-1, 1], C names, p width of CLIP's projection.
Source: zero-shot classification, Radford et al. 2021 (arXiv 2103.00020), section 3.1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clip import CLIP, Tokenizer, preprocess

TEMPLATES = ("{}", "{} emoji", "a picture of a {}")


@torch.no_grad()
def name_features(
    clip: CLIP, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One unit vector per name, the mean over templates: [C, p]."""
    prompts = [template.format(name) for name in names for template in templates]
    tokens = tokenizer(prompts).to(clip.logit_scale.device)
    features = torch.cat([F.normalize(clip.encode_text(t), dim=-1) for t in tokens.split(128)])
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)


@torch.no_grad()
def recognise(clip: CLIP, images: Tensor, names: Tensor) -> Tensor:
    """Index [B] of the name nearest to each image [B, 3, H, W], by cosine with `name_features` [C, p]."""
    return (F.normalize(clip.encode_image(preprocess(images, clip.image_size)), dim=-1) @ names.T).argmax(dim=-1)


def nearest(features: Tensor, index: int, count: int) -> list[int]:
    """The `count` other names whose features [C, p] are nearest to those of name `index`."""
    order = (features @ features[index]).argsort(descending=True).tolist()
    return [i for i in order if i != index][:count]
