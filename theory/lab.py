"""What the notebooks share: a model, the gates that the command `train` makes for it, and pictures.

    room = open_lab("emoji")            # or "sd14", or a folder
    gates = room.solved()               # those of:      train "red heart" --model emoji
    trainer = room.trainer(0.5)         # the one of:    train "red heart" --model emoji --how train --steps-scale 0.5
    strip({"before": images, "after": others}, prompts, "what is seen")

Recipe, templates and anchors are the command's own. Only every third concept is hidden from it, as in the comparison
(study/world.py): on these one sees what generalises. Letters as in cpe.py: B prompts, T = 77 tokens, d width of a
context.
"""

import argparse
import io
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpe  # noqa: E402
import sampler  # noqa: E402
import solve  # noqa: E402
import weights  # noqa: E402
from cli import check, train  # noqa: E402
from cli.common import is_emoji  # noqa: E402
from cli.options import parse  # noqa: E402
from cli.targets import Target, target_of  # noqa: E402
from erasers import beyond  # noqa: E402
from loading.cache import cached_contexts  # noqa: E402
from loading.prompts import PRESETS, Prompts, anchor_words, nearest_words  # noqa: E402
from study.erased import TUNED  # noqa: E402

# Steps of training, of attacks and of drawing, as a share of what a notebook asks for: the tests run with fewer, and
# all that is asserted must hold.
BUDGET = float(os.environ.get("CPE_THEORY_BUDGET", "1"))

Eraser = Callable[[Tensor, dict[str, Tensor]], dict[str, Tensor]]  # (context, kv) -> kv: gates, or a function


class Workshop(train.Workshop):
    """The command's own, without its progress bars, and without anchors among the concepts that are `hidden`."""

    hidden: Sequence[str] = ()

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.made: dict[str, cpe.Data] = {}

    def data(self, target: Target) -> cpe.Data:
        """Contexts to train on, encoded once for each --how."""
        if self.args.how not in self.made:
            with redirect_stderr(io.StringIO()):
                self.made[self.args.how] = super().data(target)
        return self.made[self.args.how]

    def prompts(self, target: Target) -> Prompts:
        """The prompts of a target's preset; none is of a hidden concept."""
        prompts = super().prompts(target)
        return replace(prompts, domain=[word for word in prompts.domain if word not in self.hidden])

    def anchors(self, wanted: list[str]) -> Tensor:
        """Contexts [A, T, d] in half precision."""
        return cached_contexts(self.model, wanted)


@dataclass
class Lab:
    """A model, what is erased from it, and the concepts that remain."""

    shop: Workshop
    erased: Target
    concepts: list[str]  # those that remain

    # --- Names and their contexts ---

    @property
    def model(self) -> weights.Model:
        """The model, with its networks."""
        return self.shop.model

    @property
    def target(self) -> str:
        """The name of what is erased."""
        return self.erased.names[0]

    @property
    def surrogate(self) -> str:
        """The name of what it becomes."""
        return self.erased.surrogate

    @property
    def recipe(self) -> cpe.Recipe:
        """The preset that trains it."""
        return replace(PRESETS[self.erased.preset], surrogate=self.surrogate)

    @property
    def hidden(self) -> list[str]:
        """Every third concept: what makes the gates is never told of it."""
        return list(self.shop.hidden)

    @cached_property
    def listed(self) -> list[str]:
        """The concepts that are anchors: of those that are not hidden, the nearest to the target."""
        prompts, encode = self.shop.prompts(self.erased), lambda names: self.contexts(names)
        return nearest_words(self.recipe, prompts, self.erased.names, encode)

    def contexts(self, names: Sequence[str]) -> Tensor:
        """Contexts [B, T, d] of prompts, those of bare names from the memory."""
        known = self.known
        new = [name for name in dict.fromkeys(names) if name not in known]
        known.update(zip(new, self.model.encode(new) if new else (), strict=True))
        return torch.stack([known[name] for name in names])

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """Contexts [T, d] that were asked for before."""
        return {}

    @cached_property
    def E(self) -> Tensor:
        """Contexts of the bare names of what remains, [concepts, T, d]."""
        return self.contexts(self.concepts)

    @cached_property
    def E_target(self) -> Tensor:
        """Context of the target's bare name, [T, d]."""
        return self.contexts([self.target])[0]

    @cached_property
    def E_surrogate(self) -> Tensor:
        """Context of the surrogate, [T, d]."""
        return self.contexts([self.surrogate])[0]

    def name_token(self, prompt: str) -> int:
        """Position of a prompt's last token before EOS: it has seen the whole prompt."""
        return len(self.model.tokenizer.ids(prompt))

    def words(self, prompt: str) -> list[str]:
        """The tokens of a prompt as one reads them, between <start> and <end>."""
        return ["<start>", *self.model.tokenizer.tokens(prompt), "<end>"]

    def shifts(self) -> Tensor:
        """x = (1 + eta) (E_sur - E_tar) [T, d]: what erasing asks of the bare target's tokens."""
        return (1 + self.recipe.eta) * (self.E_surrogate - self.E_target)

    def sentences(self, most: int = 130) -> tuple[Tensor, Tensor]:
        """Contexts [P, T, d] of the target, and their shifts, in sentences that nothing was made with."""
        lines = check.held_out(self.erased.preset, most)
        E, instead = (self.contexts([line.replace("{}", n) for line in lines]) for n in (self.target, self.surrogate))
        return E, (1 + self.recipe.eta) * (instead - E)

    def near(self, count: int) -> list[str]:
        """The hidden concepts that are nearest to the target, the nearest first."""
        cosine = torch.cosine_similarity(self.contexts(self.hidden).flatten(1), self.E_target.flatten()[None])
        return [self.hidden[i] for i in cosine.topk(count).indices.tolist()]

    # --- Gates: what the command writes ---

    @property
    def solving(self) -> cpe.Data:
        """What the command solves for: the target and its surrogate in templates and sentences, and the anchors."""
        self.shop.args.how = "solve"
        return self.shop.data(self.erased)

    def solver(
        self, layers: cpe.Layers | None = None, kind: type[solve.Solver] = solve.Solver, **settings: float
    ) -> solve.Solver:
        """The command's solver; `settings` changes some of its numbers, `layers` what it looks through."""
        space = self.shop.space if layers is None else solve.TokenSpace(layers)
        one, data = solve.constant_direction(self.model.text_encoder.text_model.final_layer_norm), self.solving
        anchors = torch.cat([data.anchors.to(data.empty), data.empty])
        return kind(space, one, anchors, solve.Settings.of(self.recipe, **settings))

    def solved(self, layers: cpe.Layers | None = None, **settings: float) -> cpe.ResAG:
        """The gates of `train "red heart" --model emoji`: solved for, by default."""
        return self.solver(layers, **settings).solve(self.solving.targets, self.solving.surrogates)

    def trainer(self, scale: float = 1.0, layers: cpe.Layers | None = None, **recipe: float) -> cpe.Trainer:
        """The trainer of `--how train`, at a `scale` of its steps; `recipe` changes numbers of it, after that."""
        steps = {name: max(1, round(BUDGET * scale * getattr(self.recipe, name))) for name in train.STEPS}
        self.shop.args.how = "train"
        trainer = train.trainer_of(self.shop, self.erased)
        trainer = cpe.Trainer(trainer.gates, trainer.losses, replace(self.recipe, **steps | recipe), trainer.generator)
        if layers is not None:
            trainer.losses = train.token_space.Losses(layers, trainer.losses.data, self.recipe.eta)
        return trainer

    def uce(self) -> dict[str, Tensor]:
        """Weights as UCE edits them, with the settings that the comparison found for it; told of the same concepts."""
        self.shop.args.how = "solve"
        prompts, names = (
            anchor_words(self.shop.prompts(self.erased), self.erased.names),
            ([self.target], self.surrogate),
        )
        words = [*prompts.general, *prompts.domain]
        return beyond.erase("uce", self.model, *names, words, prompts.lines, **TUNED["one"]["uce"])

    # --- Pictures ---

    def pictures(
        self, contexts: Tensor, seeds: Sequence[int], eraser: Eraser | None = None, steps: int = 10,
        model: weights.Model | None = None,
    ) -> Tensor:  # fmt: skip
        """Images [B, 3, H, W] in [-1, 1] of contexts [B, T, d] by few steps of DPM-Solver++, guidance 4."""
        images, model, steps = [], model or self.model, round(BUDGET * steps)
        for part in torch.arange(len(contexts)).split(16):
            chosen = contexts[part], [seeds[i] for i in part]
            *_, latents = sampler.denoise_context(model, *chosen, eraser, steps, 4.0, "dpm")
            images.append(sampler.decode(model, latents))
        return torch.cat(images)


def open_lab(model: str, target: str = "red heart") -> Lab:
    """The laboratory on "emoji", "sd14" or a folder; the embedded model's concepts are names that SD knows too.

    UserError as for `weights.load_model`.
    """
    args = parse(["train", target, "--model", model, *([] if is_emoji(model) else ["--preset", "object"])])
    lines = (ROOT / "emoji" / "concepts.txt").read_text(encoding="utf-8").splitlines()
    concepts = [line for line in lines if line and not line.startswith("#") and line != target]
    args.how, shop = "solve", Workshop(args)
    shop.hidden = concepts[1::3]
    return Lab(shop, target_of([target], args), concepts)


def strip(rows: dict[str, Tensor], columns: Sequence[str], title: str, width: float = 1.15) -> None:
    """Draw rows of images [B, 3, H, W] in [-1, 1], their names at the left, and what the columns are above them."""
    across = len(columns)
    fig, axes = plt.subplots(len(rows), across, figsize=(width * across + 1, width * len(rows) + 0.9), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(wrapped(name, 16), rotation=0, ha="right", va="center", fontsize=9)
        for ax, image in zip(line, images, strict=True):
            ax.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).float().numpy())
            ax.set(xticks=[], yticks=[])
    for ax, column in zip(axes[0], columns, strict=True):
        ax.set_title(wrapped(column, 15), fontsize=8)
    fig.suptitle(title, fontsize=11)
    fig.tight_layout()


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most so many letters; its own lines are kept."""
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))
