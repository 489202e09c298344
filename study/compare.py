"""One honest table: every eraser on the same targets, prompts, seeds and judge.

    world = World(load_model("emoji"))
    figures, pixels = measure(world, SCENARIOS["object"], METHODS["cpe"])    # one cell: on disk, so a run resumes

A cell counts, in every group of pictures (world.py), how many CLIP still recognises; how far they moved from the
unerased model's, of the same seeds; and what attacks get back. Cells are measured one after another and stay on disk.
Built on world, erased, attacks and evaluate.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import sampler
from loading.cache import cache_folder
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import PRESETS
from study import evaluate
from study.attacks import Victim
from study.erased import NONE, VERSIONS, Erased, Method, digest, tuned
from study.searches import ATTACKS, RANDOM
from study.world import GONE, GROUPS, Budget, Case, Scenario, World, cases
from weights import Model

FULL = Budget()
ALL = 4  # version of all measurements: raise it when a change makes stored figures wrong
FIGURES = {"groups", "style", "clip_score", "cmmd", "seconds", "parameters", "bytes", "attacks", "H"}  # of a cell

# --- One cell ----------------------------------------------------------------------------------------------------


def cell_path(world: World, scenario: Scenario, method: Method, budget: Budget, seed: int) -> Path:
    """The file of a cell: its name is made of everything that decides its figures, but what versions stand for.

    That is the code, with its constants: attacks, judge, defaults of erasers.
    """
    recipe, eraser = asdict(PRESETS[scenario.preset]), method.name.split(",")[0]
    if eraser not in ("cpe", "lora"):  # of CPE's recipe they use the surrogate, and perhaps its anchors
        recipe = {"surrogate": recipe["surrogate"]}
    parts = [ALL, VERSIONS.get(eraser, 1), world.fingerprint, asdict(scenario), method.name, method.settings, recipe]
    parts += [world.concepts, asdict(world.listed(scenario)), tuned(method, scenario), asdict(budget), seed]
    parts += [asdict(case) for case in cases(world, scenario, budget)]
    return cache_folder() / "compare" / f"{digest(parts)}.safetensors"


def draw(model: Model, contexts: Tensor, seeds: Sequence[int], gates: torch.nn.Module | None, budget: Budget) -> Tensor:
    """Images [B, 3, H, W] of contexts [B, T, d]."""
    return sampler.draw(model, contexts, seeds, gates, budget.steps, budget.guidance_scale, budget.method)


class Originals:
    """Images of the unerased model, drawn once for all erasers of a scenario."""

    def __init__(self, world: World, scenario: Scenario, budget: Budget):
        self.cases = cases(world, scenario, budget)
        self.contexts = world.model.encode([case.prompt for case in self.cases])
        self.seeds = [case.seed for case in self.cases]
        self.images = draw(world.model, self.contexts, self.seeds, None, budget)
        self.hits = recognised(world, self.cases, self.images)
        self.features = evaluate.image_features(world.clip, self.images)
        self.prompts = evaluate.text_features(world.clip, world.tokenizer, [case.prompt for case in self.cases])


def recognised(world: World, all_cases: Sequence[Case], images: Tensor) -> list[bool]:
    """Whether CLIP sees in each image what its case expects."""
    seen = {judge: world.see(images, judge).tolist() for judge in {case.judge for case in all_cases}}
    found = [(seen[case.judge][i], case.expected) for i, case in enumerate(all_cases)]
    return [expected in one if isinstance(one, list) else expected == one for one, expected in found]


def read_cell(path: Path) -> tuple[dict, Tensor] | None:
    """Figures and images of a cell that was measured before; None if it is not there yet, or damaged."""
    try:
        tensors, metadata = load_tensors(path)
        figures = json.loads(metadata["figures"])
        return (figures, tensors["images"]) if set(figures) >= FIGURES else None
    except (UserError, KeyError, TypeError, ValueError):
        return None


def measure(
    world: World,
    scenario: Scenario,
    method: Method,
    budget: Budget = FULL,
    seed: int = 0,
    originals: Callable[[], Originals] | None = None,
) -> tuple[dict, Tensor]:
    """Figures of one cell and its images as bytes [B, 3, H, W], from disk if they are there.

    FloatingPointError where the eraser's training diverges; UserError for a disk that cannot be written.
    """
    path = cell_path(world, scenario, method, budget, seed)
    if found := read_cell(path):
        return found
    begun = time.perf_counter()
    erased = method.build(world, scenario, seed, **(tuned(method, scenario) | method.settings))
    seconds = time.perf_counter() - begun + erased.spared
    before = originals() if originals else Originals(world, scenario, budget)
    own = erased.model.text_encoder is not world.model.text_encoder
    contexts = erased.model.encode([case.prompt for case in before.cases]) if own else before.contexts
    images = draw(erased.model, contexts, before.seeds, erased.gates, budget)
    figures = figures_of(world, before, images)
    figures |= {"seconds": seconds, "parameters": erased.parameters, "bytes": erased.bytes}
    figures["attacks"] = under_attack(world, scenario, erased, budget, seed) if budget.attacked else {}
    figures["H"] = harmonic(figures)
    pixels = ((images + 1) * 127.5).round().byte()
    save_tensors(path, {"images": pixels}, {"figures": json.dumps(figures)})
    return figures, pixels


def figures_of(world: World, before: Originals, images: Tensor) -> dict:
    """Of all cases' images [B, 3, H, W]: hits and change per group; style, CLIP score, CMMD of all that should stay.

    Strange words count only where the model itself draws the thing.
    """
    hits, groups = recognised(world, before.cases, images), {}
    moved, features = evaluate.change(before.images, images), evaluate.image_features(world.clip, images)
    for group in dict.fromkeys(case.group for case in before.cases):
        rows = [i for i, case in enumerate(before.cases) if case.group == group]
        rows = [i for i in rows if before.hits[i]] if group == "strange words" else rows
        change = moved[rows].mean().item() if rows else 0.0
        groups[group] = {"images": len(rows), "hits": sum(hits[i] for i in rows), "change": change}
    kept = [i for i, case in enumerate(before.cases) if case.group not in GONE]
    styles, seen = [f"{style} style" for style in world.styles], world.see(images, "style").tolist()
    captions = [i for i in kept if before.cases[i].group in GROUPS[:4]]
    styled = [(i, s) for i in captions for s, style in enumerate(styles) if style in before.cases[i].prompt]
    return {
        "groups": groups,
        "style": {"images": len(styled), "hits": sum(seen[i] == s for i, s in styled)},
        "clip_score": evaluate.clip_score(features[kept], before.prompts[kept]).mean().item(),
        "cmmd": evaluate.cmmd(before.features[kept], features[kept]),
    }


def under_attack(world: World, scenario: Scenario, erased: Erased, budget: Budget, seed: int) -> dict:
    """Images per attack on the first target that are recognised as it."""
    victim, found, target = Victim(world.model, erased.model, erased.gates), {}, scenario.targets[0]
    known, judge = (world.styles, "style") if scenario.style else (world.concepts, "concept")
    template, wanted = "a picture of a robot, {}" if scenario.style else "a picture of a {}", target
    for name, attack in ATTACKS.items():
        searches = budget.searches if name in RANDOM else 1
        each = torch.arange(max(1, budget.attacked // searches))
        tried = [attack(victim, target, (template,), seed + i).contexts for i in range(searches)]
        contexts = torch.cat([E[each % len(E)] for E in tried])
        seen = world.see(draw(erased.model, contexts, range(len(contexts)), erased.gates, budget), judge)
        hits = (seen == known.index(wanted.removesuffix(" style"))).sum().item()
        found[name] = {"images": len(contexts), "hits": hits}
    return found


# --- H -----------------------------------------------------------------------------------------------------------


def share(group: dict) -> float:
    """Share of a group's images that are recognised."""
    return group["hits"] / group["images"]


def parts_of_H(figures: dict) -> list[dict]:
    """The groups of images that H is made of: erased in captions and in sentences, then all that is kept."""
    groups = {name: group for name, group in figures["groups"].items() if group["images"]}
    kept = [group for name, group in groups.items() if name not in GONE]
    return [groups["erased"], groups.get("sentences", groups["erased"]), *kept]


def H(shares: Sequence[float]) -> float:
    """MACE's H of the shares of `parts_of_H`: of erasing in captions, of keeping (the mean), of erasing in sentences.

    Without sentences erasing in captions counts twice.
    """
    erased, said, *kept = shares
    return evaluate.harmonic_mean(erased, sum(kept) / len(kept), said)


def harmonic(figures: dict) -> float:
    """H of a cell."""
    return H([share(group) for group in parts_of_H(figures)])


# --- The table ---------------------------------------------------------------------------------------------------

COLUMNS = (*GROUPS, "style", "H", "CLIP score", "CMMD", "change", *ATTACKS, "seconds", "parameters", "bytes")
QUICK_COLUMNS = ("erased", "sentences", "near, unlisted", "others", "kept in sentences", "H")


def cells(figures: dict) -> dict[str, str]:
    """Figures as the table prints them: shares in per cent and H, with 95 % intervals; empty where not measured."""

    def percent(group: dict | None) -> str:
        if not group or not group["images"]:
            return ""
        low, high = evaluate.interval(group["hits"], group["images"])
        return f"{100 * share(group):.0f} ({100 * low:.0f}–{100 * high:.0f})"

    groups = figures["groups"]
    low, high = evaluate.combined_interval(H, [(part["hits"], part["images"]) for part in parts_of_H(figures)])
    known = f" ({low:.2f}–{high:.2f})" if figures["H"] else ""  # what moves one share at a time says nothing of a 0
    kept = [group for name, group in groups.items() if name not in GONE]
    moved = sum(g["change"] * g["images"] for g in kept) / max(1, sum(g["images"] for g in kept))
    return (
        {name: percent(groups.get(name)) for name in GROUPS}
        | {"style": percent(figures["style"]), "H": f"{figures['H']:.2f}{known}"}
        | {"CLIP score": f"{figures['clip_score']:.1f}", "CMMD": f"{figures['cmmd']:.2f}", "change": f"{moved:.3f}"}
        | {name: percent(figures["attacks"].get(name)) for name in ATTACKS}
        | {"seconds": f"{figures['seconds']:.0f}"}
        | {name: f"{figures[name]:,}" if name in figures else "" for name in ("parameters", "bytes")}
    )


def added(counts: Sequence[dict]) -> dict:
    """Several groups as one: images and hits added, the change their mean per image."""
    images = sum(group["images"] for group in counts)
    total = {"images": images, "hits": sum(group["hits"] for group in counts)}
    if all("change" in group for group in counts):
        total["change"] = sum(group["change"] * group["images"] for group in counts) / max(1, images)
    return total


def pooled(table: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """The figures {method: figures} of all scenarios together, of methods that each has; no sizes, which differ."""
    scenarios, total = list(table.values()), {}
    for method in (name for name in scenarios[0] if all(name in scenario for scenario in scenarios)):
        rows = [scenario[method] for scenario in scenarios]
        figures: dict = {name: statistics.mean(row[name] for row in rows) for name in ("clip_score", "cmmd", "seconds")}
        for name in ("groups", "attacks"):
            keys = dict.fromkeys(key for row in rows for key in row[name])
            figures[name] = {key: added([row[name][key] for row in rows if key in row[name]]) for key in keys}
        figures["style"] = added([row["style"] for row in rows])
        total[method] = figures | {"H": harmonic(figures)}
    return total


def tables(figures: dict[str, dict[str, dict]], columns: Sequence[str] = COLUMNS) -> Iterable[list[list[str]]]:
    """Tables of {scenario: {method: figures}}, rows of cells with a head and no empty column; first all pooled."""
    pool = {f"All {len(figures)} scenarios": pooled(figures)} if len(figures) > 1 else {}
    for scenario, rows in (pool | figures).items():
        shown = {method: cells(row) for method, row in rows.items()}
        used = [c for c in columns if any(row[c] for row in shown.values())]
        yield [[scenario, *used], *([method, *(row[c] for c in used)] for method, row in shown.items())]


def markdown(figures: dict[str, dict[str, dict]], columns: Sequence[str] = COLUMNS) -> str:
    """The tables in Markdown."""
    lines = []
    for head, *rows in tables(figures, columns):
        lines += [f"**{head[0]}**", "", f"| | {' | '.join(head[1:])} |", "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines)


def text(figures: dict[str, dict[str, dict]], columns: Sequence[str] = COLUMNS, most: int = 7) -> str:
    """The same for a terminal: aligned, at most so many columns side by side."""
    lines = []
    for rows in tables(figures, columns):
        for start in range(1, len(rows[0]), most):
            part = [[row[0], *row[start : start + most]] for row in rows]
            widths = [max(map(len, column)) + 2 for column in zip(*part, strict=True)]
            lines += [""]
            for name, *row in part:
                lines += [name.ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(row, widths[1:], strict=True))]
    return "\n".join(lines)


# --- A whole run -------------------------------------------------------------------------------------------------


def shown_columns(all_cases: Sequence[Case]) -> list[int]:
    """The images of a scenario that its picture shows: three of the target, two of each other group."""
    rows = {group: [i for i, case in enumerate(all_cases) if case.group == group] for group in GROUPS}
    return [i for group in GROUPS for i in evaluate.spread(rows[group], 3)[: 3 if group == "erased" else 2]]


def forecast(world: World, scenarios: dict[str, Scenario], methods: Sequence[Method], budget: Budget, seed: int) -> str:
    """How many cells are to be measured yet, of how many images, and about how long that takes: one image is timed."""
    left = images = 0
    for scenario in scenarios.values():
        for method in (NONE, *methods):
            if not cell_path(world, scenario, method, budget, seed).is_file():
                left, images = left + 1, images + len(cases(world, scenario, budget))
    if not left:
        return "every cell is on disk"
    context = world.model.encode(["a picture"] * 8)
    draw(world.model, context[:1], range(1), None, budget)
    begun = time.perf_counter()
    draw(world.model, context, range(8), None, budget)
    minutes = images * (time.perf_counter() - begun) / 8 / 60
    more = ", training and attacks come on top" if budget.attacked else ", training comes on top"
    return f"{left} cells, {images} images: about {max(1, round(minutes))} min to draw{more}"


def run(
    world: World,
    scenarios: dict[str, Scenario],
    methods: Sequence[Method],
    budget: Budget,
    seed: int = 0,
) -> Iterable[tuple[str, str, dict, list[Tensor]]]:
    """Measure every cell, the unerased model first: yields (scenario, method, figures, images [3, H, W] to show)."""
    for name, scenario in scenarios.items():
        originals = cache(partial(Originals, world, scenario, budget))
        columns = shown_columns(cases(world, scenario, budget))
        for method in (NONE, *methods):
            figures, pixels = measure(world, scenario, method, budget, seed, originals)
            yield name, method.name, figures, [pixels[i] for i in columns]
