"""One honest table: every eraser on the same targets, prompts, seeds and judge.

    world = World(load_model("emoji"))
    figures, pixels = measure(world, SCENARIOS["object"], METHODS["cpe"])    # one cell: on disk, so a run resumes

A cell counts, in every group of pictures (world.py), how many CLIP still recognises; how far they moved from the
unerased model's, of the same seeds; and what attacks get back.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import sampler
from loading.cache import cache_folder
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import PRESETS
from solve import Settings
from study import evaluate
from study.attacks import Victim
from study.erased import NONE, Method, settings_of
from study.searches import ATTACKS, RANDOM
from study.world import GONE, GROUPS, Budget, Case, Scenario, World, cases
from weights import Model

FULL = Budget()
VERSION = 11  # of all measurements: raise it when a change of the code makes stored figures wrong

# --- One cell ----------------------------------------------------------------------------------------------------


def cell_path(world: World, scenario: Scenario, method: Method, budget: Budget, seed: int) -> Path:
    """The file of a cell: its name is made of everything that decides its figures, but the code."""
    parts = [VERSION, world.fingerprint, world.concepts, method.name, settings_of(method, scenario), seed]
    recipe = PRESETS[scenario.preset]
    solved = Settings.of(recipe, scenario.style)
    parts += [asdict(each) for each in (scenario, recipe, solved, world.listed(scenario), budget)]
    parts += [asdict(case) for case in cases(world, scenario, budget)]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "compare" / f"{name}.safetensors"


class Originals:
    """Images of the unerased model, drawn once for all erasers of a scenario."""

    def __init__(self, world: World, scenario: Scenario, budget: Budget):
        self.cases = cases(world, scenario, budget)
        self.contexts = world.model.encode([case.prompt for case in self.cases])
        self.seeds = [case.seed for case in self.cases]
        self.images = drawn(self, world.model, None, budget)
        self.hits = recognised(world, self.cases, self.images)
        self.features = evaluate.image_features(world.clip, self.images)
        self.prompts = evaluate.text_features(world.clip, world.tokenizer, [case.prompt for case in self.cases])


def drawn(asked: Originals, model: Model, gates: sampler.Gates | None, budget: Budget) -> Tensor:
    """Images [B, 3, H, W] of all cases; of a wide picture of two things the right half."""

    def some(rows: list[int], **size: tuple[int, int]) -> Tensor:
        given = asked.contexts[rows], [asked.seeds[i] for i in rows], gates, *budget.sampling
        return sampler.draw(model, *given, **size)

    pairs = [i for i, case in enumerate(asked.cases) if case.judge == "right"]
    alone = [i for i in range(len(asked.cases)) if i not in pairs]
    images = some(alone)
    H, W = images.shape[2:]
    if pairs:
        images = torch.cat([images, some(pairs, size=(H, 2 * W))[..., W:]])
    return images[torch.tensor([*alone, *pairs]).argsort()]


def recognised(world: World, all_cases: Sequence[Case], images: Tensor) -> list[bool]:
    """Whether CLIP sees in each image what its case expects."""
    seen = {judge: world.see(images, judge).tolist() for judge in {case.judge for case in all_cases}}
    return [seen[case.judge][i] == case.expected for i, case in enumerate(all_cases)]


def measure(
    world: World, scenario: Scenario, method: Method, budget: Budget = FULL, seed: int = 0,
    originals: Callable[[], Originals] | None = None,
) -> tuple[dict, Tensor]:  # fmt: skip
    """Figures of one cell and its images as bytes [B, 3, H, W], from disk if they are there.

    FloatingPointError where the eraser's training diverges; UserError for a disk that cannot be written.
    """
    path = cell_path(world, scenario, method, budget, seed)
    with suppress(UserError, KeyError, ValueError):  # not there yet, or damaged
        tensors, metadata = load_tensors(path)
        return json.loads(metadata["figures"]), tensors["images"]
    begun = time.perf_counter()
    victim = method.build(world, scenario, seed, **settings_of(method, scenario))
    seconds = time.perf_counter() - begun
    before = originals() if originals else Originals(world, scenario, budget)
    images = before.images if method is NONE else drawn(before, victim.erased, victim.gates, budget)
    figures = figures_of(world, before, images) | {"seconds": seconds}
    if budget.attacked:
        figures["counts"] |= under_attack(world, scenario, victim, budget, seed)
    figures["H"] = H(figures["counts"])
    pixels = ((images + 1) * 127.5).round().byte()
    save_tensors(path, {"images": pixels}, {"figures": json.dumps(figures)})
    return figures, pixels


def figures_of(world: World, before: Originals, images: Tensor) -> dict:
    """Of all cases' images [B, 3, H, W]: "counts" of (recognised, all) by column; and how what should stay has changed.

    Strange words count only where the model itself draws the thing. "style": of captions that should stay and name one.
    """
    hits, all_cases, counts = recognised(world, before.cases, images), before.cases, {}
    for group in dict.fromkeys(case.group for case in all_cases):
        rows = [i for i, case in enumerate(all_cases) if case.group == group]
        rows = [i for i in rows if before.hits[i]] if group == "strange words" else rows
        counts[group] = [sum(hits[i] for i in rows), len(rows)]
    kept = [i for i, case in enumerate(all_cases) if case.group not in GONE]
    seen, captions = world.see(images, "style").tolist(), [i for i in kept if all_cases[i].group in GROUPS[:4]]
    styled = [seen[i] == s for i in captions for s, style in enumerate(world.styles)
              if f"{style} style" in all_cases[i].prompt]  # fmt: skip
    features = evaluate.image_features(world.clip, images[kept])
    return {
        "counts": counts | {"style": [sum(styled), len(styled)]},
        "change": evaluate.change(before.images[kept], images[kept]).mean().item(),
        "CLIP score": evaluate.clip_score(features, before.prompts[kept]).mean().item(),
        "CMMD": evaluate.cmmd(before.features[kept], features),
    }


def under_attack(world: World, scenario: Scenario, victim: Victim, budget: Budget, seed: int) -> dict[str, list[int]]:
    """By attack on the first target: images that are recognised as it, and all."""
    found, target = {}, scenario.targets[0]
    known, judge = (world.styles, "style") if scenario.style else (world.concepts, "concept")
    template = "a picture of a robot, {}" if scenario.style else "a picture of a {}"
    for name, attack in ATTACKS.items():
        searches = budget.searches if name in RANDOM else 1
        each = torch.arange(max(1, budget.attacked // searches))
        tried = [attack(victim, target, (template,), seed + i).contexts for i in range(searches)]
        contexts = torch.cat([E[each % len(E)] for E in tried])
        images = sampler.draw(victim.erased, contexts, range(len(contexts)), victim.gates, *budget.sampling)
        seen = world.see(images, judge)
        found[name] = [(seen == known.index(target.removesuffix(" style"))).sum().item(), len(contexts)]
    return found


# --- The table ---------------------------------------------------------------------------------------------------

NUMBERS = {"H": ".2f", "CLIP score": ".1f", "CMMD": ".2f", "change": ".3f", "seconds": ".0f"}
COLUMNS = (*GROUPS, "style", *NUMBERS, *ATTACKS)
QUICK_COLUMNS = ("erased", "sentences", "near, unlisted", "others", "kept in sentences", "H")


def H(counts: dict[str, list[int]]) -> float:
    """MACE's H (Lu et al. 2024, 2403.06135) in [0, 1], of (recognised, all) by group; 0 if any of the three fails.

    3 / (1 / (1 - erased) + 1 / (1 - erased in sentences) + 1 / mean kept); without sentences captions stand for them.
    """
    shares = {name: counts[name][0] / counts[name][1] for name in GROUPS if counts.get(name, [0, 0])[1]}
    kept = [share for name, share in shares.items() if name not in GONE]
    parts = (1 - shares["erased"], 1 - shares.get("sentences", shares["erased"]), sum(kept) / len(kept))
    return 0.0 if min(parts) <= 0 else len(parts) / sum(1 / part for part in parts)


def cells(figures: dict) -> dict[str, str]:
    """Figures as the table prints them: shares in per cent with 95 % intervals, numbers; no cell where not measured."""
    shown = {name: format(figures[name], how) for name, how in NUMBERS.items() if name in figures}
    for name, (hits, images) in figures["counts"].items():
        if images:
            low, high = evaluate.interval(hits, images)
            shown[name] = f"{100 * hits / images:.0f} ({100 * low:.0f}–{100 * high:.0f})"
    return shown


def pooled(table: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """The figures {method: figures} of all scenarios together, of methods that each has."""
    scenarios, total = list(table.values()), {}
    for method in (name for name in scenarios[0] if all(name in scenario for scenario in scenarios)):
        rows = [scenario[method] for scenario in scenarios]
        counts = {}
        for name, (hits, images) in (pair for row in rows for pair in row["counts"].items()):
            before = counts.get(name, [0, 0])
            counts[name] = [before[0] + hits, before[1] + images]
        means = {name: statistics.mean(row[name] for row in rows) for name in NUMBERS}
        total[method] = {"counts": counts} | means | {"H": H(counts)}
    return total


def markdown(figures: dict[str, dict[str, dict]], columns: Sequence[str] = COLUMNS, most: int = len(COLUMNS)) -> str:
    """Tables of {scenario: {method: figures}}, all pooled first: aligned, `most` columns side by side, none empty."""
    pool, lines = {f"All {len(figures)} scenarios": pooled(figures)} if len(figures) > 1 else {}, []
    for scenario, rows in (pool | figures).items():
        shown = {method: cells(row) for method, row in rows.items()}
        used = [c for c in columns if any(c in row for row in shown.values())]
        lines += [f"**{scenario}**", ""]
        for part in (used[i : i + most] for i in range(0, len(used), most)):
            table = [["", *part], *([method, *(row.get(c, "") for c in part)] for method, row in shown.items())]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            head, *body = (" | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table)
            lines += [f"| {head} |", "|" + "---:|" * len(widths), *(f"| {row} |" for row in body), ""]
    return "\n".join(lines)


# --- A whole run -------------------------------------------------------------------------------------------------


def shown_columns(all_cases: Sequence[Case]) -> list[int]:
    """The images of a scenario that its picture shows: three of the target, two of each other group."""
    rows = {group: [i for i, case in enumerate(all_cases) if case.group == group] for group in GROUPS}
    return [i for group in GROUPS for i in evaluate.spread(rows[group], 3)[: 3 if group == "erased" else 2]]


def forecast(world: World, scenarios: dict[str, Scenario], methods: Sequence[Method], budget: Budget, seed: int) -> str:
    """How many cells are to be measured yet, of how many images, and about how long that takes: some are timed."""
    left = [
        len(cases(world, scenario, budget)) for scenario in scenarios.values() for method in (NONE, *methods)
        if not cell_path(world, scenario, method, budget, seed).is_file()
    ]  # fmt: skip
    if not left:
        return "every cell is on disk"
    context, seconds = world.model.encode(["a picture"] * 8), 0.0
    for _ in range(2):  # the first is slower
        begun = time.perf_counter()
        sampler.draw(world.model, context, range(8), None, *budget.sampling)
        seconds = time.perf_counter() - begun
    minutes, more = sum(left) * seconds / 8 / 60, "training and attacks" if budget.attacked else "training"
    return f"{len(left)} cells, {sum(left)} images: about {max(1, round(minutes))} min to draw, {more} on top"


def run(
    world: World, scenarios: dict[str, Scenario], methods: Sequence[Method], budget: Budget, seed: int = 0
) -> Iterable[tuple[str, str, dict, list[Tensor]]]:
    """Measure every cell, the unerased model first: yields (scenario, method, figures, images [3, H, W] to show)."""
    for name, scenario in scenarios.items():
        originals = cache(partial(Originals, world, scenario, budget))
        columns = shown_columns(cases(world, scenario, budget))
        for method in (NONE, *methods):
            figures, pixels = measure(world, scenario, method, budget, seed, originals)
            yield name, method.name, figures, [pixels[i] for i in columns]
