"""evaluate.py: zero-shot recognition follows CLIP's cosines."""

import torch
import torch.nn.functional as F

import evaluate
import weights
from clip import preprocess


def test_names_are_unit_vectors_averaged_over_templates(tiny):
    model = weights.load_model(tiny)
    features = evaluate.name_features(model.clip, model.tokenizer, ["cat", "dog"], ["{}", "a {}"])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    each = F.normalize(model.clip.encode_text(model.tokenizer(["cat", "a cat"])), dim=-1)
    torch.testing.assert_close(features[0], F.normalize(each.mean(dim=0), dim=-1))


def test_recognition_is_the_most_likely_caption_of_clip(tiny):
    model = weights.load_model(tiny)
    names, images = ["cat", "dog", "red heart", "robot"], torch.rand(5, 3, 32, 32) * 2 - 1
    features = evaluate.name_features(model.clip, model.tokenizer, names, ["{}"])
    logits = model.clip(preprocess(images, model.clip.image_size), model.tokenizer(names))
    assert torch.equal(evaluate.recognise(model.clip, images, features), logits.argmax(dim=-1))


def test_nearest_never_names_itself_and_is_sorted():
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.5]]), dim=-1)
    assert evaluate.nearest(features, 0, 3) == [1, 3, 2]
