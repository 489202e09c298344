"""study/variants.py: each is the gate it says, and trains."""

import dataclasses

import pytest
import torch
from torch import Tensor

import cpe
from loading.prompts import PRESETS, Prompts, prepare
from study import variants
from weights import load_model

E = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))


def gates_of(kind: str) -> cpe.ResAG:
    made = variants.GATES[kind]({"a": 3, "b": 4}, 8, r=2, k=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, tensor in enumerate([*made.parameters()]):
            tensor.normal_(generator=torch.Generator().manual_seed(i))
    return made


def test_a_gate_with_zero_bias_is_the_papers_and_a_large_bias_opens_it() -> None:
    gates, plain = gates_of("bias"), cpe.ResAG({"a": 3, "b": 4}, 8, r=2, k=2)
    with torch.no_grad():
        gates.bias.zero_()
    plain.load_state_dict({k: v for k, v in gates.state_dict().items() if k != "bias"})
    torch.testing.assert_close(gates.residuals(E), plain.residuals(E))
    with torch.no_grad():
        gates.bias.fill_(50.0)
    torch.testing.assert_close(gates.gate(E)[0], torch.ones(1, 6, 5, 1))


def test_a_token_wise_gate_sees_each_token_alone() -> None:
    gates = gates_of("token-wise")
    torch.testing.assert_close(gates.gate(E)[0], torch.sigmoid(E @ gates.scaler[0])[None])
    torch.testing.assert_close(gates.residuals(E[:, :1])["a"], gates.residuals(E)["a"][:, :1])


def test_a_hard_gate_is_open_or_shut_and_still_learns() -> None:
    gates = gates_of("hard")
    g, _ = gates.gate(E)
    assert set(g.flatten().tolist()) == {0.0, 1.0}
    g.sum().backward()
    assert gates.scaler.grad.abs().max() > 0


def test_a_perceptron_is_one() -> None:
    gates = gates_of("mlp")
    for l, name in enumerate("ab"):
        hidden = torch.nn.functional.gelu(E @ gates.lora_down[l][0] + gates.bias[l][0, 0, 0])
        torch.testing.assert_close(gates.residuals(E)[name], gates.scale[0] * hidden @ gates.lora_up[l][0])


@pytest.mark.parametrize("kind", ["resag", *variants.GATES, "unmixed"])
def test_every_variant_trains(tiny_original, kind: str) -> None:
    model = load_model(str(tiny_original))
    short = {"stages": 2, "first_steps": 3, "later_steps": 2, "attack_steps": 2, "anchors": 4}
    recipe = dataclasses.replace(PRESETS["emoji"], **short)

    def halved(asked: list[str]) -> Tensor:
        return model.encode(asked).half()

    data = prepare(recipe, Prompts(["{}", "a {}"], ["dog", "sun"], []), ["cat"], model.encode, halved)
    trainer = variants.trainer(cpe.Layers.of(model.cross_attention()), data, recipe, 0, kind)
    before = {name: p.clone() for name, p in trainer.gates.named_parameters()}
    assert len(list(trainer)) == 7
    moved = [name for name, p in trainer.gates.named_parameters() if not torch.equal(p, before[name])]
    assert any("lora_up" in name for name in moved)
    assert kind not in ("bias", "mlp") or any("bias" in name for name in moved)


def test_unmixed_anchors_are_prompts_with_noise_of_their_own_size() -> None:
    data = cpe.Data(E[:2], E[2:4], 10 * E, E[:1])
    recipe = dataclasses.replace(PRESETS["emoji"], anchors=64, noise=1e-3)
    layers = cpe.Layers({"a": torch.eye(8)}, {"a": 1.0})
    drawn = {kind: variants.trainer(layers, data, recipe, 0, kind).draw_anchors() for kind in ("resag", "unmixed")}
    near = {kind: torch.cdist(rows[:-1].flatten(1), data.anchors.flatten(1)).amin(1) for kind, rows in drawn.items()}
    assert all(torch.equal(rows[-1:], data.empty) for rows in drawn.values())
    # noise of 1e-3 |E| in each of 40 elements: about 0.0063 |E| in all
    size = data.anchors.flatten(1).norm(dim=1).mean()
    assert near["unmixed"].mean().item() == pytest.approx(1e-3 * 40**0.5 * size.item(), rel=0.1)
    assert near["resag"].mean() > 20 * near["unmixed"].mean()
