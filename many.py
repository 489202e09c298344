"""Many targets or many prompts: a file of them, one a line, and its division among processes.

    python cpe.py train --targets FILE                          # one gate file a target
    python cpe.py generate --prompts FILE                       # one picture a prompt
    torchrun --nproc_per_node=2 cpe.py train --targets FILE     # the same files, made by two processes

Of n processes each takes a part of the lines (blank ones and comments do not count). They never speak to one another:
every line is worked on as if it stood alone, with the seed of --seed, so it does not matter which process does it. Bit
for bit that holds on one device and one number of threads; torchrun sets OMP_NUM_THREADS=1 where it is not set. What
they share, the cache of contexts, is written whole or not at all. Targets make their steps four at a time, in a
`Batch`, because that is faster.

The first process alone shows progress and says what it wrote; errors and warnings come from all, and --json x.json
becomes x-0.json, x-1.json, ... Errors are `weights.UserError` and name the line.
"""

import argparse
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

import commands
import evaluate
import old_cpe as cpe
from loading.files import UserError
from loading.tokens import tokenizer_files
from weights import Model

# --- Processes ---------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """Which of the processes that torchrun started this is: `rank` of `size`, and the `local`-th on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def this_process() -> Process:
    """What torchrun's variables say; without them, the only one. UserError for values that torchrun never sets."""
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if said["RANK"] is None or said["WORLD_SIZE"] is None:
        return Process()
    with suppress(ValueError):
        process = Process(int(said["RANK"]), int(said["WORLD_SIZE"]), int(said["LOCAL_RANK"] or 0))
        if 0 <= process.rank < process.size and process.local >= 0:
            return process
    words = ", ".join(f"{name}={value}" for name, value in said.items() if value is not None)
    raise UserError(f"{words} in the environment is nothing that torchrun sets: unset them, or start with torchrun.")


def separate(args: argparse.Namespace, process: Process) -> None:
    """Give this process a graphics card and a --json file of its own; UserError if there are too few cards."""
    if args.device == "cuda" and torch.cuda.is_available():
        if process.local >= (cards := torch.cuda.device_count()):
            found = f"{cards} graphics card{'s' * (cards != 1)}"
            raise UserError(f"process {process.local} of this machine finds {found}: start fewer.")
        args.device = f"cuda:{process.local}"
    if args.json and process.size > 1:
        args.json = args.json.with_stem(f"{args.json.stem}-{process.rank}")
        commands.check_apart(args)
        commands.check_out(args.json, "--json")


@contextmanager
def stopped_by_torchrun(process: Process) -> Iterator[None]:
    """Ends as after Ctrl-C (KeyboardInterrupt), the state saved, when torchrun stops this process as another failed."""
    if process.size == 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def told(process: Process) -> str:
    """A remark on what the figures of one of several processes leave out."""
    return f" (process {process.rank} of {process.size}: the others say nothing)" if process.size > 1 else ""


# --- Files of lines ----------------------------------------------------------------------------------------------


LARGEST = 64 << 20  # bytes of a file of lines


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file and their numbers from 1; blank ones and those that begin with # are left out.

    UserError when it cannot be read, is no text in UTF-8, is larger than 64 MiB, or has no other lines.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:  # or endless, as some devices are
            raise UserError(f"{path} is larger than {LARGEST >> 20} MiB: give a text file, one entry a line.")
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its name.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8.") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    for number, line in lines:
        if "\0" in line:
            raise UserError(f"{path}, line {number} is not text: it holds a NUL.")
    if not lines:
        raise UserError(f"{path} has no lines but blank ones and comments: write one entry a line.")
    return lines


def output_folder(args: argparse.Namespace, default: str, suffix: str) -> Path:
    """The folder of --out; UserError for what looks like the one file that --out is without a file of lines."""
    folder = args.out or Path(default)
    if folder.suffix == suffix or os.path.isfile(folder):
        raise UserError(f"--out is a folder here, for many {suffix} files: {folder} is not.")
    return folder


@contextmanager
def naming(line: str, args: argparse.Namespace) -> Iterator[None]:
    """UserError, also of too little memory, says which line it is of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{line}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not commands.out_of_memory(error):
            raise
        raise UserError(f"{line}: {commands.memory_advice(args)}") from error


# --- train --targets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One line of a file of targets."""

    line: str  # where it stands, for messages
    names: list[str]  # the target, then its other names
    out: Path  # its gate file


def read_targets(path: Path, folder: Path, shared: commands.Training) -> list[Target]:
    """The targets of a file, checked; UserError for a name that cannot be erased, or a target that is there twice."""
    targets: list[Target] = []
    seen: dict[str, Target] = {}
    for number, text in read_lines(path):
        line, (name, *aliases) = f"{path}, line {number}", text.split(",")
        if not all(part.strip() for part in (name, *aliases)):
            raise UserError(f"{line}: a name is missing before or after a comma.")
        with naming(line, shared.args):
            names = commands.check_names((name, *aliases), shared)
        target = Target(f"{line} ({names[0]!r})", names, folder / f"{commands.slug(names[0])}.safetensors")
        for key in (cpe.normalised(names[0]), target.out.name):
            if first := seen.get(key):
                raise UserError(f"{target.line} is the same target as {first.line}, or has the same file: remove one.")
        seen |= {cpe.normalised(names[0]): target, target.out.name: target}
        targets.append(target)
    return targets


TOGETHER = 4  # targets that make their steps at once; benchmarks/many.py measures what it saves


class Batch:
    """Trainers of several targets that make their steps together, so that every W_l is read once for all of them.

    A trainer has one of `size` places. What is multiplied with the W_l has the same shape whether the others are taken
    or not, with zeros for those that are not: the gates of a target are the same to the last bit whoever else is there.
    In a batch of another size, and alone, they are the same to rounding.

    `lost(place, error)` is told who has diverged; that trainer makes no more steps.
    """

    def __init__(self, trainers: dict[int, cpe.Trainer], size: int, lost: Callable[[int, cpe.Diverged], None]):
        """`trainers` by their places, 0..size-1."""
        self.trainers, self.size, self.lost = dict(trainers), size, lost

    def products(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """P [1, L k, d] and G [1, L, k, k] of every place whose next step erases; see `Objective.products`.

        None of context gates, which have no W_l to share.
        """
        ups = {i: t.gates.lora_up for i, t in self.trainers.items() if t.erases and isinstance(t.gates, cpe.ResAG)}
        if not ups:
            return {}
        some, objective = next(iter(ups.values())), next(iter(self.trainers.values())).objective
        P, G = objective.products_of(torch.cat([ups.get(i, torch.zeros_like(some)) for i in range(self.size)]))
        return {i: (P[i : i + 1], G[i : i + 1]) for i in ups}

    def steps(self) -> Iterator[dict[cpe.Trainer, cpe.Progress]]:
        """Train all to the end; what each reports of a step."""
        while trainers := {i: t for i, t in self.trainers.items() if not t.finished}:
            products, reports = self.products(), {}
            losses = {i: t.forward(products.get(i)) for i, t in trainers.items()}
            torch.stack([trainers[i].weighed(each) for i, each in losses.items()]).sum().backward()
            for i, t in trainers.items():
                try:
                    reports[t] = t.advance(losses[i])
                except cpe.Diverged as error:
                    del self.trainers[i]
                    self.lost(i, error)
            yield reports


def batches(targets: Sequence[Target], together: int) -> list[list[Target]]:
    """All targets of a file, so many at a time."""
    return [list(targets[i : i + together]) for i in range(0, len(targets), together)]


def part(whole: Sequence[Sequence[Target]], process: Process) -> list[tuple[int, dict[int, Target]]]:
    """The r-th of n parts of all targets: for each batch its size, and this process's targets by their places in it."""
    mine = share([(b, place) for b, batch in enumerate(whole) for place in range(len(batch))], process)
    grouped = groupby(mine, key=lambda pair: pair[0])
    return [(len(whole[b]), {place: whole[b][place] for _, place in pairs}) for b, pairs in grouped]


def share(everything: Sequence, process: Process) -> Sequence:
    """The r-th of n parts of a sequence, of neighbours."""
    first, end = (-(-len(everything) * r // process.size) for r in (process.rank, process.rank + 1))
    return everything[first:end]


def train_batch(
    size: int, batch: dict[int, Target], shared: commands.Training, text: str, last: bool
) -> Iterator[tuple[Target, dict | None]]:
    """Train targets together, going on where earlier runs with the same settings stopped; finished ones are kept.

    Gives the figures of each, None where it diverged. UserError as of `commands.is_finished`,
    `commands.build_trainer`, `commands.watch` and `commands.write_gates`.
    """
    args, runs, diverged = shared.args, {}, set()
    for place, target in batch.items():
        with naming(target.line, args):
            settings = shared.settings(target.names)
            if not commands.is_finished(target.out, settings):
                trainer = commands.build_trainer(shared, target.names)
                run = commands.Run(trainer, commands.state_file(target.out), commands.run_name(settings))
                run.begin(resume=run.state.exists())
                runs[place] = run
    if last:
        shared.forget()

    def lost(place: int, error: cpe.Diverged) -> None:
        diverged.add(place)
        commands.complain(f"{batch[place].line}: {runs[place].diverged(error)}")

    if runs:
        lines = batch[min(runs)].line + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
        trainers = {place: run.trainer for place, run in runs.items()}
        with naming(lines, args):
            commands.watch(list(runs.values()), Batch(trainers, size, lost).steps(), text)
            commands.save_all(list(runs.values()))  # what stops the first from being written loses none of the others
    for place, target in batch.items():
        if place in diverged:
            yield target, None
        elif place not in runs:
            yield target, {"out": str(target.out), "kept": True}
        else:
            with naming(target.line, args):
                figures = commands.write_gates(runs[place], shared.settings(target.names), target.out)
            yield target, figures


def check_files(target: Target, shared: commands.Training) -> None:
    """UserError if what lies where a target's gates or their state belong is not of the same settings."""
    settings = shared.settings(target.names)
    if not commands.is_finished(target.out, settings):
        commands.check_state(commands.state_file(target.out), True, commands.run_name(settings))


def train(args: argparse.Namespace) -> dict:
    """`train --targets`: one gate file a target; what an earlier run has finished with the same settings is kept.

    UserError, before any is trained, for a file that is none of these and would have to be replaced.
    A target whose loss is no number any more does not hold up the others: UserError names all of them at the end.
    """
    process = this_process()
    if args.alias:
        raise UserError("--alias goes with --target: in a file, other names follow their target after commas.")
    separate(args, process)
    folder, shared = output_folder(args, "gates", ".safetensors"), commands.Training(args)
    together = TOGETHER if args.gate == "resag" else 1
    mine = part(batches(read_targets(args.targets, folder, shared), together), process)
    targets = [target for _, batch in mine for target in batch.values()]
    for target in targets:  # before a model is downloaded
        with naming(target.line, args):
            commands.check_new(target.out)
    for target in targets:  # before hours of training
        with naming(target.line, args):
            check_files(target, shared)
    figures, failed = {}, []
    with stopped_by_torchrun(process):
        for size, batch in mine:
            done = len(figures) + len(failed)
            text = f"training {done + 1} to {done + len(batch)} of {len(targets)}"
            for target, trained in train_batch(size, batch, shared, text, batch is mine[-1][1]):
                if trained is None:
                    failed.append(target.names[0])
                    continue
                figures[target.names[0]] = trained
                if process.rank == 0:
                    what = f"erases {', '.join(target.names)} from {shared.model.name}"
                    new = "kept" not in trained
                    print(f"wrote   {target.out}: {what}" if new else f"kept    {target.out}: already finished")
    if failed:
        raise UserError(f"{len(failed)} of {len(targets)} targets diverged: {', '.join(failed)}.")
    new = sum("kept" not in each for each in figures.values())
    if process.rank == 0:
        print(f"trained {new} targets into {folder}, kept {len(figures) - new}{told(process)}")
    first = next(iter(figures), None)
    again = first and commands.drawing_of(first, args.model, "--gates", figures[first]["out"], "--before-after")
    return {"targets": figures, "out": str(folder), "next": again}


# --- generate --prompts ------------------------------------------------------------------------------------------


def picture_names(prompts: Sequence[str]) -> list[str]:
    """File names in the order of the prompts, by which each can be told: 0001-a-picture-of-a-cat.png, ..."""
    digits = max(4, len(str(len(prompts))))
    return [f"{i:0{digits}}-{commands.slug(prompt, 'prompt')}.png" for i, prompt in enumerate(prompts, 1)]


def generate(args: argparse.Namespace) -> dict:
    """`generate --prompts`: one picture a prompt, all from --seed; with --before-after, below the one without gates.

    What an earlier run with the same settings has drawn is kept. UserError as of `commands.generate`, `read_lines` and
    `output_folder`; if it is of one prompt, it names the line.
    """
    process = this_process()
    separate(args, process)
    folder, lines = output_folder(args, "images/generated", ".png"), read_lines(args.prompt_file)
    names = picture_names([prompt for _, prompt in lines])
    mine = share(list(zip(lines, names, strict=True)), process)
    commands.check_out(folder / names[0])
    commands.check_gates(args.gates, args.model)
    commands.check_sampling(args)
    model = commands.open_model(args, ("text_encoder", "unet", "vae"), args.dtype)
    commands.check_sampling(args, model)
    gates = commands.load_gates(args.gates, model, args.zone) if args.gates else None
    if process.rank == 0:
        commands.warn_of_odd_words(args, [prompt for _, prompt in lines])
    kinds = [None, gates] if args.before_after else [gates]
    settings, pictures = drawing(args, model), []
    with stopped_by_torchrun(process):
        for i, ((number, prompt), name) in enumerate(mine, 1):
            with naming(f"{args.prompt_file}, line {number} ({prompt!r})", args):
                text, said = f"{i} of {len(mine)}", json.dumps(settings | {"prompt": prompt}, sort_keys=True)
                picture = {"prompt": prompt, "out": str(folder / name), "seed": args.seed}
                if commands.drawn_with(folder / name) == said:
                    pictures.append(picture | {"kept": True})
                    continue
                # Alone in its batch: what else is in it moves the last bits of an image.
                rows = [commands.draw(model, [prompt], [args.seed], kind, args, text) for kind in kinds]
                commands.grid(rows, folder / name, settings=said)
            if len(rows) == 2:
                picture["change"] = evaluate.change(*rows).item()
            pictures.append(picture)
            if process.rank == 0:
                change = f"change {picture['change']:.4f} of 2, " if len(rows) == 2 else ""
                print(f"wrote   {folder / name}: {change}{prompt}")
    if process.rank == 0:
        kept = sum("kept" in picture for picture in pictures)
        drew = f"drew    {len(pictures) - kept} prompts into {folder}, each from seed {args.seed}, kept {kept}"
        print(f"{drew}{told(process)}")
        if others := sorted({path.name for path in folder.glob("[0-9][0-9][0-9][0-9]*-*.png")} - set(names)):
            print(f"left    {len(others)} of other prompts there, {others[0]} for one")
    return {"out": str(folder), "pictures": pictures, "next": commands.after_drawing(args, lines[0][1])}


def drawing(args: argparse.Namespace, model: Model) -> dict:
    """All that a picture depends on but its prompt: who has the same settings has the same picture.

    The U-Net and the autoencoder are too large to hash: their files' size and time stand for them.
    """
    names = ("model", "seed", "steps", "guidance", "sampler", "dtype", "before_after")
    drawn = (
        {name: getattr(args, name) for name in names}
        | ({"zone": args.zone} if args.zone else {})
        | {"device": args.device.split(":")[0]}
    )
    files = [os.stat(model.part(name).path) for name in ("unet", "vae")]
    drawn |= {"fingerprint": model.fingerprint, "files": [[file.st_size, file.st_mtime_ns] for file in files]}
    words = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in tokenizer_files(model.tokenizer_folder)]
    configs = [model.part(name).config for name in ("text_encoder", "unet", "vae")]
    drawn |= {"schedule": model.schedule.config, "tokenizer": words, "configs": configs}
    return drawn | {"gates": [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in args.gates]}
