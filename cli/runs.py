"""Training that can be interrupted, and gone on with bit for bit.

    Run(trainer, state_file(out), name).train(resume=args.resume)

A trainer yields {loss: value} for every step, counts them in `phase` and `step` against `steps`, the length of every
phase, and raises FloatingPointError when it diverges. cpe.Trainer is one, and its state is read and written here; any
other brings `state() -> tensors` and `load_state(tensors)` of its own. The state lies in a safetensors file where the
result will be, saved every few seconds and at Ctrl-C, always between two steps: in the middle of one, random numbers
are drawn already.
"""

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpe
from cli.common import Forecast, bar, metadata_of
from loading.files import Unwritten, UserError, disk_full, load_tensors, save_tensors

SAVE_SECONDS = 10.0
GO_ON = "go on with --resume"  # what an interruption says where a state was saved


# --- The state of a cpe.Trainer as tensors -----------------------------------------------------------------------


def state_of(trainer: cpe.Trainer) -> dict[str, Tensor]:
    """All that a resumed run needs: gates, deltas [J, T, d], moments of the optimiser, generator, position [2]."""
    state = {f"gates.{name}": tensor for name, tensor in trainer.gates.state_dict().items()}
    state["generator"] = trainer.generator.get_state()
    state["position"] = torch.tensor([trainer.phase, trainer.step])
    if trainer.deltas is not None:
        state["deltas"] = trainer.deltas
    if trainer.step:
        for i, moments in trainer.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def restore(trainer: cpe.Trainer, state: Mapping[str, Tensor]) -> None:
    """Go on where `state_of` was taken; ValueError when it is of another run, or damaged."""
    try:
        parts = {name.removeprefix("gates."): t for name, t in state.items() if name.startswith("gates.")}
        trainer.gates.load_state_dict(parts)
        phase, step = (int(number) for number in state["position"])
        if not (0 <= phase < len(trainer.steps) and 0 <= step <= trainer.steps[phase]):
            raise ValueError(f"it has no step {step} of phase {phase}")
        trainer.phase, trainer.step = phase, step
        E = trainer.losses.data.targets
        if "deltas" in state:
            if state["deltas"].shape != (trainer.recipe.deltas, *E.shape[1:]):
                raise ValueError(f"its deltas have the shape {list(state['deltas'].shape)}")
            trainer.deltas = state["deltas"].to(E, copy=True)
        elif phase:
            raise ValueError("it has no deltas")
        if step:
            trainer.begin()
            restore_moments(trainer.optimizer, state)
        trainer.generator.set_state(state["generator"])
    except (KeyError, RuntimeError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"this state is of another run: {error}") from error


def restore_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Give a fresh optimiser the moments among the tensors of a state; KeyError or ValueError if they do not fit."""
    moments: dict[int, dict[str, Tensor]] = {}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        moments[i] = {name: state[f"optimizer.{i}.{name}"].clone() for name in shapes}
        if any(moments[i][name].shape != shape for name, shape in shapes.items()):
            raise ValueError("its optimiser has other shapes")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


# --- A run -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What trains, where its state lies, and the name of its settings, without which no state is taken up."""

    trainer: Any
    path: Path
    name: str
    text: str = "training"
    losses: dict[str, float] = field(default_factory=dict)  # the last value of every loss

    def train(self, resume: bool = False) -> None:
        """Make all steps that are left. UserError as for `begin`, FloatingPointError when the trainer diverges.

        KeyboardInterrupt after Ctrl-C, the state saved.
        """
        self.begin(resume)
        done, steps, saved = self.done, sum(self.trainer.steps), time.monotonic()
        forecast = Forecast(steps - done, self.text)
        with between_steps() as asked, bar(self.trainer, steps, self.text) as progress:
            progress.update(done)
            for losses in progress:
                attack = isinstance(self.trainer, cpe.Trainer) and self.trainer.phase % 2
                self.losses |= {"attack": losses["total"]} if attack else losses
                forecast.step()
                if asked or time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                if asked:
                    raise KeyboardInterrupt(GO_ON)

    @property
    def done(self) -> int:
        """Steps that are done."""
        return sum(self.trainer.steps[: self.trainer.phase]) + self.trainer.step

    def begin(self, resume: bool) -> None:
        """Go on where the state was saved, if one was; UserError as for `check_state`."""
        check_state(self.path, resume, self.name)
        if os.path.exists(self.path):
            tensors, metadata = load_tensors(self.path)
            try:
                own = isinstance(self.trainer, cpe.Trainer)
                restore(self.trainer, tensors) if own else self.trainer.load_state(tensors)
                self.losses = json.loads(metadata.get("losses", "{}"))
            except ValueError as error:
                raise UserError(f"{self.path}: {error}. Remove it to begin anew.") from error
        elif resume:
            warnings.warn(f"there is no {self.path} to go on with: this run begins anew", stacklevel=3)

    def save(self) -> None:
        """Save the state; UserError if another run has saved its own there meanwhile, or as for `going_on`."""
        with going_on(self.path, self.name):
            check_state(self.path, True, self.name)
            own = isinstance(self.trainer, cpe.Trainer)
            tensors = state_of(self.trainer) if own else self.trainer.state()
            save_tensors(self.path, tensors, {"run": self.name, "losses": json.dumps(self.losses)})


def state_file(out: Path) -> Path:
    """Where the state of an unfinished run lies: where the gate file, or the folder, will be that it is to become."""
    name = out.name.removesuffix(".safetensors") if out.suffix == ".safetensors" else f"{out.name}.baking"
    return out.with_name(f"{name}.state.safetensors")


def check_state(path: Path, resume: bool, name: str) -> None:
    """UserError where a state lies that is damaged, of another run, or not to be gone on with."""
    if not os.path.exists(path):
        return
    if not resume:
        said = f"{path} is of an unfinished run: go on with it, by the same settings and --resume, or remove it"
        raise UserError(f"{said} to begin anew.")
    try:
        metadata = load_tensors(path)[1]
    except UserError as error:
        raise UserError(f"{error}, or remove it to begin anew") from error
    if metadata.get("run") != name:
        what = "of a run with other settings, or of another version of cpe.py"
        raise UserError(f"{path} is {what}: use the same, choose another --out, or remove it to begin anew.")


def is_of_run(path: Path, name: str) -> bool:
    """Whether there is a state of an unfinished run, and of this one."""
    return metadata_of(path).get("run") == name


def remove_state(path: Path, name: str) -> None:
    """Remove the state of this run; what else has that name is left alone."""
    if is_of_run(path, name):
        path.unlink(missing_ok=True)


@contextmanager
def going_on(path: Path, name: str) -> Iterator[None]:
    """Where the disk is too full for what was trained, UserError says so if the state of this run can go on."""
    try:
        yield
    except Unwritten as error:
        if disk_full(error.error) and is_of_run(path, name):
            raise UserError(f"{error}, then {GO_ON}") from error
        raise


@contextmanager
def between_steps() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list that is given, for the block to end when it can; a second is a KeyboardInterrupt."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    main_thread = threading.current_thread() is threading.main_thread()  # no other is interrupted
    mine = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    mine = [number for number in mine if signal.getsignal(number) is signal.default_int_handler]
    for number in mine:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number in mine:
            signal.signal(number, signal.default_int_handler)
