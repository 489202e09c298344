"""The linear erasers that CPE is compared with: each edits weights of cross-attention, once and for every prompt.

    edited = ERASERS["uce"](model, ["cat"], "an object", ["a dog", "a horse"])   # {"....attn2.to_k.weight": [d_l, d]}
    save_model(model.with_unet(edited), folder)                                  # a plain U-Net, any tool opens it

    uce.py     closed form   to_k, to_v      Gandikota et al. 2024 (arXiv 2308.14761)
    rece.py    closed form   to_k, to_v      Gong et al. 2024 (arXiv 2407.12383)
    speed.py   closed form   to_v            Li et al. 2025 (arXiv 2503.07392)
    mace.py    both forms    to_k, to_v      Lu et al. 2024 (arXiv 2403.06135)
    esd.py     trained       all of attn2    Gandikota et al. 2023 (arXiv 2303.07345), variant x
    lora.py    trained       to_k, to_v      CPE's own losses without its gates: what the nonlinearity is worth

All have one signature, `(model, targets, surrogate, preserved, seed, **settings) -> edited weights`: on the CPU, under
the checkpoint keys of the U-Net, only those that changed. The surrogate is one for all targets, or a list of one each
(ValueError otherwise). `preserved` are prompts that must stay; the caller takes out those that name a target.
Defaults are the authors' code, tested against it written out as loops (tests/erasers/test_published.py); published.json
has their other settings, by what is erased: of MACE keep = 8 is for ten (one 0.8, five 5, a hundred people 20).
"""

import json
from collections.abc import Callable
from pathlib import Path

from erasers import esd, lora, mace, rece, speed, uce
from erasers.common import Weights

ERASERS: dict[str, Callable[..., Weights]] = {
    "uce": uce.uce, "rece": rece.rece, "speed": speed.speed, "lora": lora.lora, "esd": esd.esd, "mace": mace.mace,
}  # fmt: skip

PUBLISHED: dict[str, dict] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
