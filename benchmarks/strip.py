"""Draw figures/strip.png, the picture of the README: before, with solved gates, and with UCE.

python benchmarks/strip.py
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sampler  # noqa: E402
from cli.pictures import sheet  # noqa: E402
from study.erased import METHODS, NONE, settings_of  # noqa: E402
from study.world import SCENARIOS, World  # noqa: E402
from weights import load_model  # noqa: E402

GROUPS = {
    "erased": ["a picture of a red heart, noto style", "my sister drew a red heart", "a big red heart on the beach"],
    "near": ["a picture of a blue heart, noto style", "a picture of a red apple, fluent style"],
    "others": ["my sister drew a dog face", "a pizza on a wooden table", "a crab in the rain"],
}
PROMPTS = [prompt for group in GROUPS.values() for prompt in group]
COLUMN, ABOVE = 128, 20  # pixels: of a picture, which is shown doubled, and of the brackets


def bracketed(strip: Image.Image) -> Image.Image:
    """With a bracket and its name over the columns of each group."""
    width, height = strip.size
    page = Image.new("RGB", (width, height + ABOVE), "white")
    page.paste(strip, (0, ABOVE))
    draw, left = ImageDraw.Draw(page), width - COLUMN * len(PROMPTS)
    for name, prompts in GROUPS.items():
        right = left + COLUMN * len(prompts)
        draw.text((left + 4, 0), name, fill="black")
        draw.line([(left + 2, ABOVE), (left + 2, ABOVE - 5), (right - 3, ABOVE - 5), (right - 3, ABOVE)], fill="black")
        left = right
    return page


def main() -> None:
    """Draw and write."""
    world = World(load_model("emoji"))
    scenario, rows, names = SCENARIOS["neighbours"], [], ["before", "CPE", "UCE"]
    for method in (NONE, METHODS["cpe, solved"], METHODS["uce"]):
        victim = method.build(world, scenario, 0, **settings_of(method, scenario))
        with torch.no_grad():
            rows.append(sampler.draw(victim.erased, PROMPTS, range(len(PROMPTS)), victim.gates, 30, 4.0, "dpm"))
    out = ROOT / "figures" / "strip.png"
    bracketed(sheet(dict(zip(names, rows, strict=True)), PROMPTS)).save(out)
    print(f"wrote   {out}")


if __name__ == "__main__":
    main()
