"""Training that can be interrupted, and gone on with bit for bit.

    train(trainer, state_file(out), name, "training red heart")

A trainer yields something for every step, counts them in `phase` and `step` against `steps`, the length of every
phase, and has `state() -> tensors` and `load_state(tensors)`. The state lies in a safetensors file where the result
will be, saved every few seconds, between two steps: whoever is interrupted, or killed, loses no more than these.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpe
from cli.common import bar, metadata_of
from loading.files import UserError, load_tensors, save_tensors
from loading.prompts import Prompts

SAVE_SECONDS = 5.0


class Trainer(cpe.Trainer):
    """One that says where it is, and goes on there."""

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs: gates, deltas [J, T, d], moments of the optimiser, generator, position [2]."""
        state = {f"gates.{name}": tensor for name, tensor in self.gates.state_dict().items()}
        state |= {"generator": self.generator.get_state(), "position": torch.tensor([self.phase, self.step])}
        state |= {"deltas": self.deltas} if self.phase else {}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state()` was taken, after the first step; ValueError if it is of another run, or damaged."""
        try:
            self.gates.load_state_dict({name: state[f"gates.{name}"] for name in self.gates.state_dict()})
            self.phase, self.step = map(int, state["position"])
            if not 0 < self.step <= self.steps[self.phase] or self.phase < 0:
                raise ValueError(f"it has no step {self.step} of phase {self.phase}")
            if self.phase:
                E = self.losses.data.targets
                self.deltas = E.new_empty(self.recipe.deltas, *E.shape[1:]).copy_(state["deltas"])
            self.begin()
            moments = {}
            for i, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
                likes = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                moments[i] = {n: torch.empty_like(like).copy_(state[f"optimizer.{i}.{n}"]) for n, like in likes.items()}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
            self.generator.set_state(state["generator"])
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"this state is of another run: {error}") from error


def train(trainer: Any, path: Path, name: str, text: str) -> None:
    """Make all steps that are left; begins in the state at `path`, if there is one.

    `name` says the settings: what depends on others has another. UserError for a state that is damaged or of another
    run, or when the trainer diverges.
    """
    if os.path.exists(path):
        if metadata_of(path).get("run") != name:
            said = "is of an unfinished run with other settings, or damaged: give the same, another --out, or remove it"
            raise UserError(f"{path} {said}.")
        try:
            trainer.load_state(load_tensors(path)[0])
        except ValueError as error:
            raise UserError(f"{path}: {error}. Remove it to begin anew.") from error
    done, saved = sum(trainer.steps[: trainer.phase]) + trainer.step, time.monotonic()
    if done:
        print(f"goes on {path}, at step {done:,} of {sum(trainer.steps):,}")
    try:
        for _ in bar(trainer, sum(trainer.steps), text, done):
            if time.monotonic() - saved > SAVE_SECONDS:
                save_tensors(path, trainer.state(), {"run": name})
                saved = time.monotonic()
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("the same command goes on") from interrupt
    except FloatingPointError as error:
        path.unlink(missing_ok=True)  # it would diverge again
        raise UserError(f"{text}: {error}. Try another --seed, or smaller learning rates.") from error


def state_file(out: Path) -> Path:
    """Where the state of an unfinished run lies: where the gate file, or the folder, will be that it is to become."""
    name = out.name.removesuffix(".safetensors") if out.suffix == ".safetensors" else f"{out.name}.baking"
    return out.with_name(f"{name}.state.safetensors")


def digest(prompts: Prompts, tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of a preset's prompts and of some weights: what a result depends on, but its settings."""
    found = hashlib.sha256(json.dumps(dataclasses.asdict(prompts)).encode())
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.float().cpu().contiguous().numpy())
    return found.hexdigest()[:16]
