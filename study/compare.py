"""One honest table: every eraser on the same targets, prompts, seeds and judge.

    world = World(load_model("emoji"))
    figures = measure(world, SCENARIOS["object"], METHODS["cpe"])      # one cell: cached on disk, so a run resumes

What is measured, on images of the model before and after erasing, from the same seeds:

    erased              images of the target that CLIP still recognises as it
    near, listed        the nearest concepts among those that every eraser was told to preserve
    near, unlisted      the nearest among those that none was told about: what generalises
    others              thirty more that none was told about
    sentences           the target in sentences that no eraser has seen; strange words: in words that nobody has read
    kept in sentences   other things in such sentences; kept beside: the other one of two things in a picture
    style               images of what should stay whose drawing style is still the one asked for

Built on scenarios.py, methods.py, evaluate.py and attacks.py.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import cpe
import sampler
from deploy.bake import Recipe
from loading.cache import cache_folder
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import PRESETS
from study import attacks, evaluate
from study.methods import VERSIONS, Erased, Method, baked, compared, named, tuned
from study.scenarios import Budget, Case, Scenario, World, cases
from weights import Model

ALL = 4  # raise it when a change makes all cached figures wrong


def draw(model: Model, contexts: Tensor, seeds: Sequence[int], gates: cpe.ResAG | None, budget: Budget) -> Tensor:
    """Images [B, 3, H, W] of contexts [B, T, d]."""
    how = budget.steps, budget.guidance_scale, budget.method
    parts = zip(contexts.split(16), (seeds[i : i + 16] for i in range(0, len(seeds), 16)), strict=True)
    latents = [list(sampler.denoise_context(model, E, some, gates, *how))[-1] for E, some in parts]
    return torch.cat([sampler.decode(model, each) for each in latents])


# --- One cell ----------------------------------------------------------------------------------------------------

GROUPS = ("erased", "near, listed", "near, unlisted", "others")
SENTENCES = ("sentences", "strange words", "kept in sentences", "kept beside")
IF_DRAWN = ("strange words", "kept beside")  # shares of what the model itself draws there
FIGURES = {"groups", "style", "clip_score", "cmmd", "seconds", "parameters", "bytes", "attacks", "H"}  # of a cell


def key(world: World, scenario: Scenario, method: Method, budget: Budget, seed: int) -> str:
    """The name under which a cell is kept: of everything that decides its figures, but what `VERSIONS` stands for.

    That is the code, with its constants: attacks, judge, defaults of erasers.
    """
    recipe, eraser = dataclasses.asdict(PRESETS[scenario.preset]), method.name.split(",")[0]
    if eraser not in ("cpe", "lora"):  # of CPE's recipe they use the surrogate, and perhaps its anchors: see VERSIONS
        recipe = {"surrogate": recipe["surrogate"]}
    parts = [ALL, VERSIONS.get(eraser, 1), world.fingerprint, dataclasses.asdict(scenario), method.name]
    parts += [method.settings, recipe, world.concepts, dataclasses.asdict(world.listed(scenario))]
    parts += [dataclasses.asdict(Recipe().of(len(scenario.targets)))] if method.build is baked else []
    parts += [tuned(method, scenario), dataclasses.asdict(budget), seed]
    return named(parts)


def cell_path(world: World, scenario: Scenario, method: Method, budget: Budget, seed: int) -> Path:
    """The file that keeps a cell."""
    return cache_folder() / "compare" / f"{key(world, scenario, method, budget, seed)}.safetensors"


class Originals:
    """Images of the unerased model, drawn once for all erasers of a scenario."""

    def __init__(self, world: World, scenario: Scenario, budget: Budget):
        self.cases = cases(world, scenario, budget)
        self.contexts = world.model.encode([case.prompt for case in self.cases])
        self.seeds = [case.seed for case in self.cases]
        self.images = draw(world.model, self.contexts, self.seeds, None, budget)
        self.seen = {judge: world.see(self.images, judge).tolist() for judge in ("concept", "right half")}
        self.features = evaluate.image_features(world.clip, self.images)
        self.prompts = evaluate.text_features(world.clip, world.tokenizer, [case.prompt for case in self.cases])


def measure(
    world: World,
    scenario: Scenario,
    method: Method,
    budget: Budget,
    seed: int = 0,
    originals: Callable[[], Originals] | None = None,
) -> tuple[dict, Tensor]:
    """Figures of one cell and its images as bytes [B, 3, H, W], kept on disk.

    FloatingPointError where the eraser's training diverges; UserError for a disk that cannot be written.
    """
    path = cell_path(world, scenario, method, budget, seed)
    try:
        tensors, metadata = load_tensors(path)
        figures = json.loads(metadata["figures"])
        if set(figures) >= FIGURES:
            return figures, tensors["images"]
    except (UserError, KeyError, TypeError, ValueError):  # not there yet, or damaged
        pass
    begun = time.perf_counter()
    erased = method.build(world, scenario, seed, **(tuned(method, scenario) | method.settings))
    seconds = time.perf_counter() - begun + erased.spared
    before = originals() if originals else Originals(world, scenario, budget)
    own = erased.model.text_encoder is not world.model.text_encoder
    contexts = erased.model.encode([case.prompt for case in before.cases]) if own else before.contexts
    images = draw(erased.model, contexts, before.seeds, erased.gates, budget)
    figures = figures_of(world, scenario, before, images)
    figures |= {"seconds": seconds, "parameters": erased.parameters, "bytes": erased.bytes}
    figures["attacks"] = under_attack(world, scenario, erased, budget, seed) if budget.attacked else {}
    figures["H"] = harmonic(figures)
    pixels = ((images + 1) * 127.5).round().byte()
    save_tensors(path, {"images": pixels}, {"figures": json.dumps(figures)})
    return figures, pixels


def share(group: dict) -> float:
    """Share of a group's images that are recognised."""
    return group["hits"] / group["images"]


def shares_of_H(figures: dict) -> list[dict]:
    """The groups of images that H is made of: the target in captions, the target in sentences, and all that is to stay.

    Users write sentences; where there are none, the target in captions counts twice.
    """
    groups = figures["groups"]
    stay = [groups[name] for name in (*GROUPS[1:], "kept in sentences") if name in groups]
    return [groups["erased"], groups.get("sentences", groups["erased"]), *stay]


def H(shares: Sequence[float]) -> float:
    """MACE's H of the shares of `shares_of_H`: of erasing, of erasing in other words, of keeping (the mean)."""
    erased, spoken, *stay = shares
    return evaluate.harmonic_mean(erased, sum(stay) / len(stay), spoken)


def harmonic(figures: dict) -> float:
    """H of a cell."""
    return H([share(group) for group in shares_of_H(figures)])


def figures_of(world: World, scenario: Scenario, before: Originals, images: Tensor) -> dict:
    """Of all cases' images [B, 3, H, W]: hits and change per group; style, CLIP score, CMMD of all that should stay."""
    seen = {
        judge: world.see(images, judge).tolist() for judge in ("concept", "right half", *["style"] * bool(world.styles))
    }
    moved, features = evaluate.change(before.images, images), evaluate.image_features(world.clip, images)
    groups = {}
    for group in dict.fromkeys(case.group for case in before.cases):
        rows = [i for i, case in enumerate(before.cases) if case.group == group]
        if group in IF_DRAWN:
            rows = [i for i in rows if before.seen[before.cases[i].judge][i] == before.cases[i].expected]
        hits = sum(seen[before.cases[i].judge][i] == before.cases[i].expected for i in rows)
        groups[group] = {"images": len(rows), "hits": hits, "change": moved[rows].mean().item() if rows else 0.0}
    kept = [i for i, case in enumerate(before.cases) if case.group in GROUPS[1:]]
    styled = [
        (i, s) for i in kept for s, style in enumerate(world.styles) if f"{style} style" in before.cases[i].prompt
    ]
    return {
        "groups": groups,
        "style": {"images": len(styled), "hits": sum(seen["style"][i] == s for i, s in styled)},
        "clip_score": evaluate.clip_score(features[kept], before.prompts[kept]).mean().item(),
        "cmmd": evaluate.cmmd(before.features[kept], features[kept]),
    }


def under_attack(world: World, scenario: Scenario, erased: Erased, budget: Budget, seed: int) -> dict:
    """Images per attack that are recognised as the target; of several the first is searched for."""
    victim, found = attacks.Victim(world.model, erased.model, erased.gates), {}
    known, judge = (world.styles, "style") if scenario.style else (world.concepts, "concept")
    for name in attacks.ATTACKS:
        if name == "odd words" and scenario.preset not in attacks.UNFAMILIAR:
            continue
        tried = attempts(victim, scenario, name, budget, seed)
        contexts, targets = torch.cat([E for E, _ in tried]), [t for E, t in tried for _ in E]
        drawn = draw(erased.model, contexts, range(len(contexts)), erased.gates, budget)
        wanted = [known.index(target.removesuffix(" style")) for target in targets]
        hits = sum(seen == index for seen, index in zip(world.see(drawn, judge).tolist(), wanted, strict=True))
        found[name] = {"images": len(wanted), "hits": hits}
    return found


def attempts(
    victim: attacks.Victim, scenario: Scenario, name: str, budget: Budget, seed: int
) -> list[tuple[Tensor, str]]:
    """What one attack draws: contexts [B, T, d] that should show a target, and that target."""
    template = "a picture of a robot, {}" if scenario.style else "a picture of a {}"
    if name in ("paraphrases", "odd words"):  # no search: some of every target, each in the sentences that follow
        each, tried = max(1, budget.attacked // len(scenario.targets)), []
        for i, target in enumerate(scenario.targets):
            E = attacks.ATTACKS[name](victim, target, (template,), seed, preset=scenario.preset).contexts
            tried.append((E[(i * each + torch.arange(each)) % len(E)], target))
        return tried
    target, searches = scenario.targets[0], budget.searches if name in attacks.RANDOM else 1
    each = max(1, budget.attacked // searches)
    found = [attacks.ATTACKS[name](victim, target, (template,), seed + i).contexts for i in range(searches)]
    return [(E[torch.arange(each) % len(E)], target) for E in found]


# --- The table ---------------------------------------------------------------------------------------------------

COLUMNS = (
    *GROUPS, *SENTENCES, "style", "H", "CLIP score", "CMMD", "change", *attacks.ATTACKS,
    "seconds", "parameters", "bytes",
)  # fmt: skip


def cells(figures: dict) -> dict[str, str]:
    """Figures as the table prints them: shares in per cent and H, with 95 % intervals; empty where not measured."""

    def percent(group: dict | None) -> str:
        if not group or not group["images"]:
            return ""
        low, high = evaluate.interval(group["hits"], group["images"])
        return f"{100 * share(group):.0f} ({100 * low:.0f}–{100 * high:.0f})"

    groups, parts = figures["groups"], shares_of_H(figures)
    low, high = evaluate.combined_interval(H, [(group["hits"], group["images"]) for group in parts])
    known = f" ({low:.2f}–{high:.2f})" if figures["H"] else ""  # what moves one share at a time says nothing of a 0
    kept = [groups[name] for name in GROUPS[1:]]
    moved = sum(g["change"] * g["images"] for g in kept) / max(1, sum(g["images"] for g in kept))
    return (
        {name: percent(groups.get(name)) for name in (*GROUPS, *SENTENCES)}
        | {"style": percent(figures["style"]), "H": f"{figures['H']:.2f}{known}"}
        | {"CLIP score": f"{figures['clip_score']:.1f}", "CMMD": f"{figures['cmmd']:.2f}", "change": f"{moved:.3f}"}
        | {name: percent(figures["attacks"].get(name)) for name in attacks.ATTACKS}
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
        figures = {name: value for name, value in rows[0].items() if name not in ("parameters", "bytes")}
        for name in ("groups", "attacks"):
            figures[name] = {key: added([row[name][key] for row in rows if key in row[name]]) for key in rows[0][name]}
        figures["style"] = added([row["style"] for row in rows])
        for name in ("clip_score", "cmmd", "seconds"):
            figures[name] = sum(row[name] for row in rows) / len(rows)
        total[method] = figures | {"H": harmonic(figures)}
    return total


def with_pool(table: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """The same, before them all scenarios together where there are several."""
    return {f"All {len(table)} scenarios": pooled(table)} | table if len(table) > 1 else table


def markdown(table: dict[str, dict[str, dict]]) -> str:
    """The figures {scenario: {method: figures}} as Markdown tables, one a scenario; empty columns are left out.

    Of several scenarios, all images together come first.
    """
    lines = []
    for scenario, rows in with_pool(table).items():
        shown = {method: cells(figures) for method, figures in rows.items()}
        columns = [c for c in COLUMNS if any(row[c] for row in shown.values())]
        lines += [f"**{scenario}**", "", f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        lines += [f"| {method} | {' | '.join(row[c] for c in columns)} |" for method, row in shown.items()]
        lines += [""]
    return "\n".join(lines)


def text(table: dict[str, dict[str, dict]]) -> str:
    """The same for a terminal: aligned, what an eraser does and below it what it withstands and costs."""
    lines = []
    for scenario, rows in with_pool(table).items():
        shown = {method: cells(figures) for method, figures in rows.items()}
        for columns in (COLUMNS[: COLUMNS.index("change") + 1], COLUMNS[COLUMNS.index("change") + 1 :]):
            used = [c for c in columns if any(row[c] for row in shown.values())]
            widths = [max(len(c), *(len(row[c]) for row in shown.values())) + 2 for c in used]
            first = max(map(len, [scenario, *shown])) + 1
            lines += ["", scenario.ljust(first) + "".join(c.rjust(w) for c, w in zip(used, widths, strict=True))]
            for method, row in shown.items():
                lines += [method.ljust(first) + "".join(row[c].rjust(w) for c, w in zip(used, widths, strict=True))]
    return "\n".join(lines)


def shown_columns(all_cases: Sequence[Case]) -> list[int]:
    """The images of a scenario that its picture shows: three of the target, two of each other group."""
    rows = {group: [i for i, case in enumerate(all_cases) if case.group == group] for group in GROUPS}
    return [i for group in GROUPS for i in evaluate.spread(rows[group], 3)[: 3 if group == "erased" else 2]]


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
        for method in compared(scenario, methods):
            figures, pixels = measure(world, scenario, method, budget, seed, originals)
            yield name, method.name, figures, [pixels[i] for i in columns]
