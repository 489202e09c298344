"""The command line of the Concept Pinpoint Eraser: demo, train, generate, inspect, compare, bake.

    python cpe.py demo                                        # see it work on the embedded model
    python cpe.py train --target "Brad Pitt"                  # train a gate that erases it from SD 1.4
    python cpe.py generate "a portrait of Brad Pitt" --gates gates/brad-pitt.safetensors --before-after
    python cpe.py inspect gates/brad-pitt.safetensors --prompt "a portrait of Brad Pitt"

Many targets or prompts from a file, perhaps split by torchrun, are in many.py.
Arguments are read before torch is imported. An error that the user can mend is one line, and exit code 2.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from bake import Baker, Concept
    from compare import Method, Scenario
    from old_cpe import Objective, Progress, Prompts, ResAG, Trainer
    from unet import UNet
    from weights import Model

PRESET_NAMES = ("celebrity", "style", "explicit", "object", "emoji", "emoji-style")
CHECKPOINT_SECONDS = 10.0
# Of what trains gates, and of what bakes them: raise it when the same settings come to give, by more than rounding,
# other gates, another text encoder, or states that go on differently. Gates of any version can be used; only those of
# this one count as finished.
VERSIONS = {"train": 2, "bake": 2}
LARGEST_GATES = 2**26  # numbers in a gate file: a hundred times what the paper's largest recipe makes
GO_ON = "go on with --resume"  # what an interruption says where a state was saved


# --- Arguments ---------------------------------------------------------------------------------------------------


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of `kind` between low and high, ArgumentTypeError for any other."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    parser.add_argument(
        "--seed", type=number(int, 0, 2**31), default=0, help="of all chance: the same seed repeats a run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of this command to FILE")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that choose the model and where it runs."""
    parser.add_argument(
        "--model",
        default="sd14",
        help="sd14, emoji (embedded), a folder in the diffusers layout, or one .safetensors checkpoint",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that chooses where to compute."""
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="where to compute")


def add_zone(parser: argparse.ArgumentParser) -> None:
    """The option for gates of several files."""
    text = "how far a gate must open before it acts: 0 the paper's, 0.5 where many are merged"
    parser.add_argument("--zone", type=number(float, 0, 0.99), default=0.0, help=text)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option for commands that only read: what trains or measures does so in float32."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")


def add_sampling(parser: argparse.ArgumentParser, steps: int, guidance: float) -> None:
    """Options of generation."""
    parser.add_argument("--steps", type=number(int, 1, 1000), default=steps, help="denoising steps")
    parser.add_argument("--guidance", type=number(float, 0, 100), default=guidance, help="guidance scale")
    parser.add_argument("--sampler", choices=("ddim", "dpm"), default="ddim", help="DDIM or DPM-Solver++(2M)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says what an option is if it is not given, where that is anything."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    formatter = Help
    top = argparse.ArgumentParser(prog="cpe.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], dict], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        sub.set_defaults(run=run)
        add_common(sub)
        return sub

    sub = add("demo", demo, "erase a concept from the embedded model, and measure and show what became of the others")
    sub.add_argument("--target", default="red heart", help="what to erase")
    sub.add_argument("--images", type=number(int, 1, 100), default=4, help="images per concept that are judged")
    add_device(sub)
    add_sampling(sub, 20, 4.0)
    sub.set_defaults(sampler="dpm", model="emoji")
    sub.add_argument("--out", type=Path, default=Path("images/demo.png"), help="the picture; its gates beside it")

    sub = add("train", train, "train a gate that erases a concept")
    target = sub.add_mutually_exclusive_group(required=True)
    target.add_argument("--target", help="what to erase")
    many = "file of many targets: one a line, its other names after commas (torchrun splits them)"
    target.add_argument("--targets", type=Path, metavar="FILE", help=many)
    sub.add_argument("--alias", action="append", default=[], help="another name of it, erased too (repeatable)")
    sub.add_argument("--surrogate", help="what it becomes (default: the preset's)")
    sub.add_argument("--preset", choices=PRESET_NAMES, help="recipe (default: celebrity; emoji for --model emoji)")
    sub.add_argument("--gate", choices=("resag", "context"), default="resag", help="the paper's, or one for all layers")
    sub.add_argument("--steps-scale", type=number(float, 1e-4, 100), default=1.0, help="multiplies the recipe's steps")
    sub.add_argument("--out", type=Path, help="gate file, of --targets a folder (default: gates/<target>.safetensors)")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run (--targets always does)")
    add_model(sub)

    sub = add("generate", generate, "make images, with or without gates")
    sub.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, from seeds SEED, SEED + 1, ...")
    many = "file of prompts, one a line: a picture each, all from SEED (torchrun splits them)"
    sub.add_argument("--prompts", type=Path, dest="prompt_file", metavar="FILE", help=many)
    sub.add_argument("--gates", action="append", type=Path, default=[], help="gate file to apply (repeatable)")
    sub.add_argument("--before-after", action="store_true", help="also without the gates, on the same seeds")
    out = "the picture (default: images/generated.png); of --prompts a folder (default: images/generated)"
    sub.add_argument("--out", type=Path, help=out)
    add_zone(sub)
    add_model(sub)
    add_dtype(sub)
    add_sampling(sub, 50, 7.5)

    sub = add("inspect", inspect, "show which tokens of a prompt open a gate")
    sub.add_argument("files", nargs="*", type=Path, metavar="GATES", help="gate files")
    sub.add_argument("--gates", action="append", type=Path, default=[], help="the same, as for generate (repeatable)")
    sub.add_argument("--prompt", required=True, help="the prompt to read")
    add_zone(sub)
    add_model(sub)
    add_dtype(sub)

    add_measuring(add)
    return top


def add_measuring(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that measure, and the one that bakes; `add(name, run, text)` makes a parser."""
    sub = add("compare", compare, "measure CPE against the linear erasers: one table, figures and a picture")
    sub.add_argument("--target", action="append", default=[], help="instead of the scenarios: erase these at once")
    sub.add_argument("--preset", choices=PRESET_NAMES, default="emoji", help="of --target: its words and recipe")
    text = "only these (repeatable); '50 at once' runs only when named"
    sub.add_argument("--scenario", action="append", default=[], metavar="NAME", help=text)
    sub.add_argument("--eraser", action="append", default=[], metavar="NAME", help="only these (repeatable)")
    sub.add_argument("--ablations", action="store_true", help="variants of CPE and of its anchors instead of peers")
    sub.add_argument("--quick", action="store_true", help="one target, few images, no attacks")
    sub.add_argument("--clip", metavar="FOLDER", help="the judge (default: the model's own CLIP)")
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    sub.add_argument("--out", type=Path, default=Path("images/compare.png"), help="the picture")
    add_model(sub)
    sub.set_defaults(model="emoji")

    sub = add("bake", bake, "write an erased model whose text encoder does what gates did: no add-on to delete")
    sub.add_argument("--gates", action="append", type=Path, required=True, help="gate file to bake in (repeatable)")
    sub.add_argument("--out", type=Path, required=True, help="folder to write, in the diffusers layout")
    sub.add_argument("--preset", choices=PRESET_NAMES, help="prompts to train on (default: those of the gates)")
    sub.add_argument("--steps-scale", type=number(float, 1e-4, 100), default=1.0, help="multiplies the recipe's steps")
    sub.add_argument("--images", type=number(int, 0, 100), default=1, help="images per concept for the comparison")
    add_zone(sub)
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    add_model(sub)
    add_sampling(sub, 20, 4.0)
    sub.set_defaults(sampler="dpm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    try:
        import many
        from loading.files import UserError  # imports torch: only now
    except KeyboardInterrupt:
        print("\ncpe.py: interrupted before it began", file=sys.stderr)
        return 130

    warnings.formatwarning = lambda message, *_: f"cpe.py: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="replace")  # terminals that know fewer letters
    begun = time.perf_counter()
    try:
        check_text(arguments)
        check_apart(args)
        if args.json:
            check_out(args.json, "--json")
        figures = args.run(args)
        figures["seconds"] = round(time.perf_counter() - begun, 1)
        if args.json:
            from loading.files import write_text

            write_text(args.json, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        if many.this_process().rank == 0:
            print(f"took    {figures['seconds']} s")
            if figures.get("next"):
                print(f"next    {figures['next']}")
        if sys.stdout:  # it may have been closed
            sys.stdout.flush()
    except UserError as error:
        complain(str(error))
        return 2
    except OSError as error:  # files raise UserError: what is left is that nobody reads on, or a full disk does
        if error.filename is not None:
            complain(f"{error.filename}: {error.strerror}")
            return 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again as it ends
        complain(f"standard output cannot be written: {error.strerror}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        complain(memory_advice(args))
        return 2
    except KeyboardInterrupt as interrupt:
        of_lines = getattr(args, "targets", None) or getattr(args, "prompt_file", None)
        more = f" ({interrupt})" if str(interrupt) and args.command != "demo" else ""
        more = " (the same command goes on)" if of_lines else more
        complain(f"interrupted; nothing half-written is left{more}", start="\n")
        return 130
    return 0


def check_text(arguments: Sequence[str]) -> None:
    """UserError for an argument that no prompt and no file name can be: not UTF-8, or with a NUL in it."""
    from loading.files import UserError

    for text in arguments:
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{text[:80]!r} is not text: it holds bytes that are no letters.")


def check_apart(args: argparse.Namespace) -> None:
    """UserError for an output that would replace another output of the same command, or what it reads."""
    from loading.files import UserError

    read = [getattr(args, name, None) for name in ("targets", "prompt_file")]
    read += [path for name in ("gates", "files") for path in getattr(args, name, ())]
    seen = {os.path.realpath(path) for path in read if path}
    for option in ("out", "markdown", "json"):
        if path := getattr(args, option, None):
            real = os.path.realpath(path)
            if option != "out" and path.suffix.lower() in (".safetensors", ".png"):
                raise UserError(f"--{option}: {path} would be text under the name of something else: choose another.")
            if real in seen:
                raise UserError(f"--{option}: {path} is read or written by this command already: choose another name.")
            if option != "out" and not is_ours(path, option):
                raise UserError(
                    f"--{option}: {path} is there already, and no file of this command: choose another name."
                )
            seen.add(real)


def is_ours(path: Path, option: str) -> bool:
    """Whether what is at a path may be replaced by --json or --markdown: nothing, or what they wrote before."""
    with suppress(OSError, ValueError, RecursionError):
        if os.path.isfile(path):
            text = path.read_text(encoding="utf-8")
            if option == "markdown":
                return text.startswith("**")
            figures = json.loads(text)
            return isinstance(figures, dict) and "seconds" in figures
        return True
    return False


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the computer's memory or the graphics card's is too small."""
    said = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in said)


def memory_advice(args: argparse.Namespace) -> str:
    """What to try when there is too little memory, of what this command has not tried yet."""
    ways = ["close other programs"]
    if getattr(args, "dtype", "") == "float32":
        ways.append("--dtype bfloat16 (half the memory)")
    if len(getattr(args, "prompts", ())) > 1:
        ways.append("fewer prompts at once")
    device = getattr(args, "device", "cpu")
    if device != "cpu":
        ways.append("--device cpu")
    return f"out of memory on {device}. Try: {', '.join(ways)}"


# --- Shared steps ------------------------------------------------------------------------------------------------


def command(*words: object) -> str:
    """A command to copy into a shell: `words` after `python cpe.py`, quoted where they need it."""
    return shlex.join(["python", "cpe.py", *map(str, words)])


def drawing_of(name: str, model: str, *options: object) -> str:
    """The command that draws a concept, as its model knows it best."""
    from old_cpe import normalised

    own = is_emoji(model)
    prompt = f"a picture of a {name}" if own else f"a picture of {name}"
    if own and normalised(name) in style_names(read_prompts("emoji")):
        prompt = f"a picture of a robot on a white background, {name}"
    return command("generate", prompt, *options, "--model", model, *(["--guidance", 4] if own else []))


def bar(iterable: Iterable | None, total: int, text: str) -> "tqdm":
    """A progress bar on the terminal; of torchrun's processes only the first shows one."""
    from tqdm import tqdm

    from many import this_process

    quiet = this_process().rank > 0 or sys.stderr is None
    often = 0.1 if quiet or sys.stderr.isatty() else 5.0  # a log is not to be filled with it
    return tqdm(
        iterable, total=total, desc=text, leave=False, mininterval=often, file=Unfailing(sys.stderr), disable=quiet
    )


class Unfailing:
    """A stream for what may go unsaid: hours of work do not end because a log's disk is full."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> None:
        """Write it if that is possible."""
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        """As `write`."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's own."""
        return getattr(self.stream, name)


def complain(text: str, start: str = "") -> None:
    """Say what went wrong, on standard error if anybody can read it."""
    with suppress(OSError, ValueError):
        print(f"{start}cpe.py: {text}", file=sys.stderr, flush=True)


def open_model(args: argparse.Namespace, parts: Sequence[str], dtype: str = "float32") -> "Model":
    """The model of --model on --device; only the files of `parts` are looked for. UserError as of `load_model`."""
    import torch

    from weights import load_model

    return load_model(args.model, getattr(torch, dtype), args.device, parts)


def load_gates(paths: Sequence[Path], model: "Model | None" = None, zone: float = 0.0) -> "ResAG":
    """Gates of all files merged, with a dead `zone`; UserError for a file that holds none, or one of another model."""
    import old_cpe as cpe
    from loading.files import UserError, load_tensors, read_shapes

    gates, names, unet = [], [], model and model.part("unet").empty()
    for path in paths:
        if not os.path.exists(path):
            first = command("train", "--target", "...")
            raise UserError(f"the gate file {path} does not exist: check its name, or train it first: {first}")
        if (size := sum(map(math.prod, read_shapes(path).values()))) > LARGEST_GATES:  # before memory is taken for them
            raise UserError(f"{path} has {size:,} numbers: that is no gate file, as `train` writes it.")
        tensors, metadata = load_tensors(path)
        try:
            gates.append(cpe.from_tensors(tensors))
        except ValueError as error:
            raise UserError(f"{path}: {error}. Give a gate file, as `train` writes it.") from error
        name = metadata.get("target") or metadata.get("prompts") or path.stem
        names.append("".join(letter if letter.isprintable() else "?" for letter in name))  # no terminal obeys it
        if model:
            check_fits(gates[-1], unet, model.name, path)
            made_for = metadata.get("fingerprint")
            if made_for and made_for != model.fingerprint:
                warnings.warn(f"{path} was trained for another model (its text encoder differs)", stacklevel=2)
    try:
        merged = cpe.merge(gates, zone)
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, paths))}: {error}.") from error
    if model:
        merged = merged.to(model.device, model.dtype)
    merged.targets = names
    return merged


def check_gates(paths: Sequence[Path], model: str) -> None:
    """UserError for gate files that are damaged, do not fit --model, or come twice: before a model is downloaded."""
    from loading.files import UserError
    from weights import expected_unet

    real = [os.path.realpath(path) for path in paths]
    if twice := [path for i, path in enumerate(paths) if real[i] in real[:i]]:
        raise UserError(f"the gate file {twice[0]} is given twice: give it once.")
    unet = expected_unet(model) if paths and model in ("sd14", "emoji") else None  # others are not downloaded
    for path in paths:
        gates = load_gates([path])
        if unet:
            check_fits(gates, unet, model, path)


def sizes(gates: "ResAG") -> tuple[int, dict[str, int]]:
    """The width of the context that gates read, and that of every projection that they correct."""
    return gates.w_qs.shape[1], dict(zip(gates.names, gates.widths, strict=True))


def wanted_sizes(unet: "UNet") -> tuple[int, dict[str, int]]:
    """The sizes of gates that fit a U-Net."""
    layers = unet.cross_attentions()
    widths = {f"{p}.{k}": getattr(a, k).out_features for p, a in layers.items() for k in ("to_k", "to_v")}
    return unet.config["cross_attention_dim"], widths


def check_fits(gates: "ResAG", unet: "UNet", name: str, path: Path) -> None:
    """UserError if the gates' projections are not those of the U-Net of the model `name`: says of which they are."""
    from loading.files import UserError
    from weights import expected_unet

    if sizes(gates) == wanted_sizes(unet):
        return
    advice = "Use the --model that it was trained for, or train gates for this one"
    for known, what in (("emoji", "the embedded model"), ("sd14", "Stable Diffusion 1.x")):
        if sizes(gates) == wanted_sizes(expected_unet(known)):
            advice = f"It fits {what}: use --model {known}"
    (width, corrected), (d, widths) = sizes(gates), wanted_sizes(unet)
    raise UserError(
        f"{path} is of another model: it corrects {len(corrected)} projections of a context of width {width}, "
        f"{name} has {len(widths)} of width {d}. {advice}."
    )


def read_prompts(preset: str) -> "Prompts":
    """`loading.prompts.read_prompts`; torch comes with that module, so it is imported only when a command needs it."""
    from loading.prompts import read_prompts

    return read_prompts(preset)


def slug(name: str, empty: str = "target") -> str:
    """A file name for a target: letters, digits and hyphens, at most 80 bytes, so that it cannot leave its folder.

    `empty` is the name of what has neither letters nor digits.
    """
    words = "-".join(re.findall(r"\w+", name.casefold())) or empty
    if re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", words):  # Windows keeps these to itself
        words += "-target"
    if len(words.encode()) > 80:  # cut, but not to the name of another target
        digest = hashlib.sha256(words.encode()).hexdigest()[:8]
        words = f"{words.encode()[:71].decode(errors='ignore')}-{digest}"
    return words


def check_out(path: Path, option: str = "--out") -> None:
    """`weights.check_writable`, whose UserError names the option that the path comes from."""
    from loading.files import UserError, check_writable

    try:
        check_writable(path)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def check_new(path: Path) -> None:
    """UserError unless a path can become a gate file, and its state lie beside it; before a model is downloaded.

    One that is there is for `is_finished` to judge.
    """
    from loading.files import UserError

    if path.suffix != ".safetensors" or path.name.endswith(".state.safetensors"):
        raise UserError(f"--out: {path}: give a name that ends in .safetensors, and not in .state.safetensors.")
    if not os.path.isfile(path):
        check_out(path)
        check_out(state_file(path))  # its name is longer


def check_prompts(prompts: Sequence[str]) -> None:
    """UserError for a blank prompt: what a shell makes of a variable that is not set. Files skip such lines."""
    from loading.files import UserError

    if not all(prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give some words. (`generate` draws without a prompt at --guidance 0.)")


def check_picture(path: Path) -> None:
    """UserError unless the name of a picture is one of a PNG."""
    from loading.files import UserError

    if path.suffix.lower() not in (".png", ""):
        raise UserError(f"{path}: pictures are written as PNG, choose a name that ends in .png.")


def grid(rows: "Sequence[Tensor]", path: Path, scale: int = 1, labels: Sequence[str] = (), settings: str = "") -> None:
    """Write rows of images [B, 3, H, W] in [-1, 1] as one PNG; with `labels`, the name of each row on its left.

    `settings` are kept in the file, under "cpe", for `drawn_with`.
    """
    import torch
    from PIL import Image, ImageDraw, ImageOps
    from PIL.PngImagePlugin import PngInfo

    from loading.files import atomic

    picture = torch.cat([torch.cat(list(row.float().cpu()), dim=-1) for row in rows], dim=-2)
    pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if labels:
        margin, height = 8 * max(map(len, labels)), image.height // len(rows)
        image = ImageOps.expand(image, (margin, 0, 0, 0), "white")
        for i, label in enumerate(labels):
            ImageDraw.Draw(image).text((4, (i + 0.5) * height), label, "black", anchor="lm")
    info = PngInfo()
    if settings:
        info.add_itxt("cpe", settings)
    with atomic(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def drawn_with(path: Path) -> str:
    """The settings that `grid` kept in a PNG; "" if it is not there, damaged, or says none."""
    from PIL import Image

    with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), Image.open(path) as image:
        image.load()
        return image.info.get("cpe", "")
    return ""


def check_sampling(args: argparse.Namespace, model: "Model | None" = None) -> None:
    """UserError for --steps that the --sampler cannot take: of a model, or before one is opened of those with a name.

    Others' schedules are in their files.
    """
    from loading.files import UserError
    from sampler import Schedule, check_steps

    if model is None and args.model not in ("sd14", "emoji"):
        return
    try:
        check_steps(model.schedule if model else Schedule(), args.steps, args.sampler)
    except ValueError as error:
        raise UserError(f"--steps: {error}.") from error


def draw(
    model: "Model",
    prompts: Sequence[str],
    seeds: Sequence[int],
    gates: "ResAG | None",
    args: argparse.Namespace,
    text: str,
) -> "Tensor":
    """Images [B, 3, H, W] of prompts, batched, with a progress bar; UserError if they are not finite numbers."""
    import torch

    import old_cpe as cpe
    from loading.files import UserError

    check_sampling(args, model)
    batch = 16 if model.unet.config["sample_size"] <= 16 else 1
    starts = range(0, len(prompts), batch)

    def steps() -> "Iterator[tuple[int, Tensor]]":
        for i in starts:
            run = cpe.denoise(
                model, prompts[i : i + batch], seeds[i : i + batch], gates, args.steps, args.guidance, args.sampler
            )
            for latents in run:
                yield i, latents

    latest = dict(bar(steps(), len(starts) * args.steps, text))
    images = torch.cat([cpe.decode(model, latest[i]) for i in starts])
    if not images.isfinite().all():
        full = model.dtype == torch.float32
        advice = "the weights or the gates are damaged" if full else "try --dtype float32"
        raise UserError(f"the model's images are not finite numbers: {advice}.")
    return images


# --- train -------------------------------------------------------------------------------------------------------


class Training:
    """What the training of all targets of one command shares: recipe, prompts, model, and what is read of them once."""

    def __init__(self, args: argparse.Namespace):
        """UserError when the preset's prompts cannot be read; the model is opened when it is first used."""
        import old_cpe as cpe

        self.args, self.preset = args, args.preset or ("emoji" if is_emoji(args.model) else "celebrity")
        recipe = cpe.PRESETS[self.preset]
        surrogate = recipe.surrogate if args.surrogate is None else args.surrogate
        self.recipe = dataclasses.replace(recipe, surrogate=surrogate).scaled(args.steps_scale)
        self.prompts = read_prompts(self.preset)
        self.kept: dict[tuple[str, ...], Tensor] = {}

    @cached_property
    def model(self) -> "Model":
        """The model of --model."""
        return open_model(self.args, ("text_encoder", "unet"))

    @cached_property
    def objective(self) -> "Objective":
        """The layers that the losses look through."""
        import old_cpe as cpe

        return cpe.Objective(self.model.cross_attention())

    @cached_property
    def inputs(self) -> str:
        """What else decides on the gates."""
        return digest_inputs(self.prompts, self.model.cross_attention())

    def settings(self, names: Sequence[str]) -> dict:
        """All that the gates of a target depend on: who has the same settings has the same gates, to rounding."""
        settings = {"target": names[0], "aliases": names[1:], "gate": self.args.gate, "seed": self.args.seed}
        settings |= {"version": VERSIONS["train"]}
        settings |= {"preset": self.preset, "fingerprint": self.model.fingerprint, "inputs": self.inputs}
        return settings | dataclasses.asdict(self.recipe)

    def anchors(self, wanted: list[str]) -> "Tensor":
        """Contexts [A, 77, d] in half precision, of the cache; kept, as every target asks for the same."""
        from loading.cache import cached_contexts

        key = tuple(wanted)
        if key not in self.kept:
            show = "encoding anchors"
            self.kept[key] = cached_contexts(self.model, wanted, lambda parts: bar(parts, len(parts), show))
        return self.kept[key]

    def own(self, wanted: list[str]) -> "Tensor":
        """Contexts [P, 77, d] of the target's own prompts: from the cache when it is trained again, or goes on."""
        from loading.cache import cached_contexts

        return cached_contexts(self.model, wanted).to(self.model.device, self.model.dtype)

    def forget(self) -> None:
        """Drop what only encodes: no target comes after. Half a gigabyte in SD 1.4, and the anchors."""
        self.kept.clear()
        self.model.__dict__.pop("text_encoder", None)


def digest_inputs(prompts: "Prompts", tensors: Mapping[str, "Tensor"]) -> str:
    """16 hexadecimal digits of a preset's prompts and of some weights."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(prompts)).encode())
    for name, weight in tensors.items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def check_names(names: Sequence[str], shared: Training) -> list[str]:
    """The names to erase; UserError if they are empty, equal to the surrogate, or unknown to the embedded model."""
    from loading.files import UserError
    from old_cpe import normalised

    names = list(dict.fromkeys(" ".join(name.split()) for name in names))
    for name in names:
        if not normalised(name):
            raise UserError('the target is empty: say what to erase, for example --target "Brad Pitt".')
        if normalised(name) == normalised(shared.recipe.surrogate):
            raise UserError(f"{name!r} is both target and surrogate: choose another --surrogate.")
    if not normalised(shared.recipe.surrogate):
        raise UserError("the surrogate is empty: say what the target becomes, or leave --surrogate out.")
    if is_emoji(shared.args.model):
        check_emoji_words(names)
        if shared.args.surrogate is None and shared.preset not in ("emoji", "emoji-style"):
            raise UserError(f"--preset {shared.preset} is for Stable Diffusion: give --surrogate, or --preset emoji.")
        check_emoji_words([shared.recipe.surrogate])
        check_style(names[0], shared)
    return names


def check_style(name: str, shared: Training) -> None:
    """UserError for a style of the embedded model without the preset for styles, or another name with it."""
    from loading.files import UserError
    from old_cpe import normalised

    styles = style_names(shared.prompts)
    if f"{normalised(name)} style" in styles:
        raise UserError(f'{name!r} is a style: say --target "{normalised(name)} style" --preset emoji-style.')
    if shared.preset == "emoji-style" and normalised(name) not in styles:
        known = ", ".join(styles)
        raise UserError(f"--preset emoji-style erases styles ({known}), and {name!r} is none: leave --preset out.")
    if shared.preset == "emoji" and normalised(name) in styles:
        raise UserError(f"{name!r} is a style: give --preset emoji-style (in a file of targets, styles alone).")


def style_names(prompts: "Prompts") -> list[str]:
    """The styles that the embedded model knows, of prompts that were written for it."""
    return [word for word in prompts.general if word.endswith(" style")]


def is_emoji(model: str) -> bool:
    """Whether --model names the embedded model, or a folder with its vocabulary and U-Net: a copy, or a baked one."""
    from loading.files import UserError, read_json, shipped
    from loading.tokens import vocabulary

    if model == "emoji":
        return True
    folder, ours = Path(os.path.expanduser(model)), shipped("emoji")
    with suppress(UserError):  # there is no such folder: what is wrong with it is said when it is opened
        if vocabulary(folder / "tokenizer") == vocabulary(ours / "tokenizer"):
            return read_json(folder / "unet/config.json") == read_json(ours / "unet/config.json")
    return False


def emoji_words(*, templates: bool = False) -> set[str]:
    """The words of the embedded model's concepts, and those of its captions around them, too, with `templates`."""
    from old_cpe import normalised

    prompts = read_prompts("emoji")
    entries = (*prompts.domain, *prompts.general, *(prompts.templates if templates else ()))
    return {word for entry in entries for word in normalised(entry).split()}


def check_emoji_words(names: Sequence[str]) -> None:
    """UserError for a name with words that the embedded model has never seen."""
    from loading.files import UserError
    from old_cpe import normalised

    concepts = read_prompts("emoji").domain
    for name in names:
        if not set(normalised(name).split()) <= emoji_words():
            near = difflib.get_close_matches(name.casefold(), concepts, 3, cutoff=0.3) or concepts[:3]
            raise UserError(
                f"the embedded model has never seen {name!r}: it only knows emoji, for example {', '.join(near)}. "
                "Real names need --model sd14."
            )


def warn_of_odd_words(args: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Say which words the embedded model's captions never had, where gates are to open: such words may shut them."""
    from old_cpe import normalised

    if not args.gates or not is_emoji(args.model):
        return
    known = emoji_words(templates=True)
    odd = dict.fromkeys(word for prompt in prompts for word in normalised(prompt).split() if word not in known)
    if odd:
        words, more = ", ".join(list(odd)[:5]), f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        warnings.warn(
            f"the embedded model was never taught {words}{more}: gates may stay shut on such prompts. "
            "It was taught captions like 'a picture of a red heart on a blue background, noto style'",
            stacklevel=2,
        )


def build_trainer(shared: Training, names: Sequence[str]) -> "Trainer":
    """Encode the prompts (anchors from the cache) and measure the layers.

    UserError when no anchor words are left, or the preset has a margin and the text encoder no direction for it.
    """
    import old_cpe as cpe
    from loading.files import UserError

    try:
        one = cpe.constant_direction(shared.model.text_encoder.text_model.final_layer_norm)
        if one is None and shared.recipe.margin:
            raise UserError(f"--preset {shared.preset} needs a text encoder with a bias in its final LayerNorm.")
        data = cpe.prepare(shared.recipe, shared.prompts, names, shared.own, shared.anchors, one)
    except ValueError as error:
        raise UserError(f"prompts/{shared.preset}.txt: {error}.") from error
    return cpe.Trainer(shared.objective, data, shared.recipe, shared.args.seed, shared.args.gate)


@contextmanager
def between_steps() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list that is given, for the block to end when it can; a second is a KeyboardInterrupt.

    A state that is saved in the middle of a step has drawn its random numbers already: it would not go on bit for bit.
    """
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


def read_state(state: Path, run: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """What a state holds, tensors and metadata; UserError if it is of another run, or damaged."""
    from loading.files import UserError, load_tensors

    try:
        tensors, metadata = load_tensors(state)
    except UserError as error:
        raise UserError(f"{error}, or remove it to begin anew") from error
    if metadata.get("run") != run:
        what = "of a run with other settings, or of another version of cpe.py"
        raise UserError(f"{state} is {what}: use the same, choose another --out, or remove it to begin anew.")
    return tensors, metadata


def check_state(state: Path, resume: bool, run: str | None = None) -> None:
    """UserError where the state of an unfinished run lies that is not to be gone on with, or as of `read_state`."""
    from loading.files import UserError

    if not os.path.exists(state):
        return
    if not resume:
        said = f"{state} is of an unfinished run: go on with it, by the same settings and --resume, or remove it"
        raise UserError(f"{said} to begin anew.")
    if run is not None:
        read_state(state, run)


@dataclasses.dataclass
class Run:
    """Training that can be interrupted, and gone on with: what trains, and where its state is kept."""

    trainer: "Trainer | Baker"
    state: Path
    name: str  # `run_name` of its settings
    losses: dict[str, float] = dataclasses.field(default_factory=dict)  # the last value of every loss
    saves: bool = True  # whether a state is saved at all

    def begin(self, resume: bool) -> None:
        """Go on where the state was saved, if one was; UserError as of `check_state`, or if it has other shapes."""
        from loading.files import UserError

        check_state(self.state, resume)
        if os.path.exists(self.state):
            tensors, metadata = read_state(self.state, self.name)
            try:
                self.trainer.load_state(tensors)
                self.losses = json.loads(metadata.get("losses", "{}"))
            except ValueError as error:
                raise UserError(f"{self.state}: {error}. Remove it to begin anew.") from error
        elif resume:
            warnings.warn(f"there is no {self.state} to go on with: this run begins anew", stacklevel=3)

    def save(self) -> None:
        """Save the state; UserError if another run has saved its own there meanwhile, or as of `kept`."""
        from loading.files import save_tensors

        if not self.saves:
            return
        with kept(self.state, self.name):
            check_state(self.state, True, self.name)
            save_tensors(self.state, self.trainer.state(), {"run": self.name, "losses": json.dumps(self.losses)})

    def diverged(self, error: Exception) -> Exception:
        """The UserError for cpe.Diverged, the last good state saved."""
        from loading.files import UserError

        self.save()
        advice = f"The last good state is in {self.state}: remove it to begin anew, with another --seed or --preset"
        return UserError(f"{error}. {advice}.")


def save_all(runs: Sequence[Run]) -> None:
    """Save all states; the first UserError when that was tried with each."""
    from loading.files import UserError

    errors = []
    for run in runs:
        try:
            run.save()
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def watch(runs: Sequence[Run], steps: "Iterator[dict[Trainer | Baker, Progress]]", text: str) -> None:
    """Make the steps of all runs behind one progress bar, saving their states every few seconds.

    KeyboardInterrupt after Ctrl-C, the states saved; UserError as of `Run.save`; Diverged as of `steps`.
    """
    saved = time.monotonic()
    progress = bar(None, sum(run.trainer.total for run in runs), text)
    progress.update(sum(run.trainer.done for run in runs))
    try:
        with between_steps() as asked:
            for reports in steps:
                for run in runs:
                    if report := reports.get(run.trainer):
                        run.losses |= report.losses
                        shown = {name: f"{value:.2g}" for name, value in report.losses.items()}
                        progress.set_postfix(stage=report.stage, **shown, refresh=False)
                progress.update(len(reports))
                if asked or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save_all(runs)
                    saved = time.monotonic()
                if asked:
                    raise KeyboardInterrupt(GO_ON)
    finally:
        progress.close()


def run_trainer(run: Run, resume: bool = False, text: str = "training") -> None:
    """Train to the end. UserError when it diverged, or as of `Run.begin`; otherwise as of `watch`."""
    import old_cpe as cpe

    run.begin(resume)
    try:
        watch([run], ({run.trainer: report} for report in run.trainer.steps()), text)
    except cpe.Diverged as error:
        raise run.diverged(error) from error


def finished_gates(trainer: "Trainer", objective: "Objective") -> "ResAG":
    """The trained gates in the form of a gate file."""
    import old_cpe as cpe

    gates = trainer.gates
    return gates.expand(objective.W) if isinstance(gates, cpe.ContextGate) else gates


def in_metadata(settings: dict) -> dict[str, str]:
    """Settings as a gate file keeps them."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def run_name(settings: dict) -> str:
    """Settings as the state of an unfinished run keeps them."""
    return json.dumps(settings, sort_keys=True)


def state_file(out: Path) -> Path:
    """Where the state of an unfinished run lies: beside the gate file, or the folder, that it is to become."""
    name = out.name.removesuffix(".safetensors") if out.suffix == ".safetensors" else f"{out.name}.baking"
    return out.with_name(f"{name}.state.safetensors")


def kept_metadata(path: Path) -> dict[str, str]:
    """The metadata of a whole safetensors file; none if it is not there, or damaged."""
    from loading.files import UserError, load_tensors

    with suppress(UserError):
        return load_tensors(path)[1]
    return {}


def is_of_run(state: Path, run: str) -> bool:
    """Whether there is a state of an unfinished run, and of this one."""
    return kept_metadata(state).get("run") == run


def remove_state(state: Path, run: str) -> None:
    """Remove the state of this run; what else has that name is left alone."""
    if is_of_run(state, run):
        state.unlink(missing_ok=True)


# What a user would call these settings.
PLAINLY = {"fingerprint": "model", "inputs": "prompts or layers", "version": "version of cpe.py"}
PLAINLY |= dict.fromkeys(("first_steps", "later_steps", "attack_steps"), "steps")


def is_finished(out: Path, settings: dict) -> bool:
    """Whether a gate file of the same settings is there already; UserError for any other file: none is replaced.

    Removes the state that is left of a run which was killed after it had written its gate file.
    """
    from loading.files import UserError

    if not os.path.isfile(out):
        return False
    there = kept_metadata(out)
    other = [PLAINLY.get(key, key) for key, value in in_metadata(settings).items() if there.get(key) != value]
    if other:
        named = ", ".join(list(dict.fromkeys(other))[:3])
        how = f"trained with other settings ({named})" if "target" in there else "no finished gate file"
        raise UserError(f"{out} is there already, {how}: choose another --out, or remove it.")
    remove_state(state_file(out), run_name(settings))
    return True


@contextmanager
def kept(state: Path, run: str) -> Iterator[None]:
    """Where the disk is too full for what was trained, UserError says so if the state of this run can go on."""
    from loading.files import Unwritten, UserError, disk_full

    try:
        yield
    except Unwritten as error:
        if disk_full(error.error) and is_of_run(state, run):
            raise UserError(f"{error}, then {GO_ON}") from error
        raise


def write_gates(run: Run, settings: dict, out: Path, replace: bool = False) -> dict:
    """Write the gate file of a run that has come to its end; the settings, losses and place of the gates.

    UserError as of `kept` and, unless they `replace` what is there by then, as of `is_finished`.
    """
    import old_cpe as cpe
    from loading.files import save_tensors

    gates = finished_gates(run.trainer, run.trainer.objective)
    metadata = {"prompts": settings["target"], "rank": str(gates.k), "alpha": str(gates.alpha[0].item())}
    with kept(run.state, run.name):
        if not replace:  # another run may have written there meanwhile
            is_finished(out, settings)
        save_tensors(out, cpe.to_tensors(gates), metadata | in_metadata(settings))
    remove_state(run.state, run.name)
    share = check_reached(run.trainer, settings["target"])
    return {**settings, "losses": run.losses, "reached": share, "out": str(out)}


def train_target(trainer: "Trainer", settings: dict, out: Path, resume: bool) -> dict:
    """Train the gates of one target and write their file; UserError as of `run_trainer` and `write_gates`."""
    run = Run(trainer, state_file(out), run_name(settings))
    run_trainer(run, resume)
    return write_gates(run, settings, out)


def check_reached(trainer: "Trainer", target: str) -> float:
    """The share of its change that trained gates make to the target, as of `cpe.reached`; a warning if it is small."""
    import old_cpe as cpe

    share = cpe.reached(trainer.objective, trainer.gates, trainer.data.targets, trainer.shifts)
    if share < 0.5:  # of the embedded model: whole recipes reach 0.7 to 0.9, a tenth of them 0.2 to 0.3
        warnings.warn(
            f"the gates make only {max(share, 0):.0%} of the change that erases {target!r}: it may not be erased. "
            "`train` can take more steps (--steps-scale), or another --preset",
            stacklevel=2,
        )
    return share


def train(args: argparse.Namespace) -> dict:
    """`train`: one gate file for one target, or with --targets for each of many."""
    if args.targets:
        import many

        return many.train(args)
    shared = Training(args)
    names = check_names((args.target, *args.alias), shared)
    out = args.out or Path("gates") / f"{slug(args.target)}.safetensors"
    check_new(out)
    settings, model = shared.settings(names), shared.model
    if is_finished(out, settings):
        figures = {**settings, "out": str(out), "kept": True}
        print(f"kept    {out}: already finished")
    else:
        check_state(state_file(out), args.resume, run_name(settings))
        trainer = build_trainer(shared, names)
        shared.forget()
        figures = train_target(trainer, settings, out, args.resume)
        print(f"wrote   {out} ({out.stat().st_size / 1024:.0f} KB): erases {', '.join(names)} from {model.name}")
    return figures | {"next": drawing_of(names[0], args.model, "--gates", out, "--before-after")}


# --- generate, inspect -------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> dict:
    """`generate`: one column per prompt; with --before-after the first row is the model without gates.

    UserError for options that do not go together, or as of `load_gates`, `open_model` and `draw`.
    """
    from loading.files import UserError

    if bool(args.prompts) == bool(args.prompt_file):
        raise UserError("say what to draw: either prompts, or a file of them with --prompts FILE.")
    if (args.before_after or args.zone) and not args.gates:
        option = "--before-after compares with" if args.before_after else "--zone is of"
        raise UserError(f"{option} gates: give at least one --gates FILE.")
    if files := [prompt for prompt in args.prompts if prompt.endswith(".safetensors")]:
        raise UserError(f"the prompt {files[0]!r} looks like a gate file: say --gates before each of them.")
    if args.prompt_file:
        import many

        return many.generate(args)
    out = args.out or Path("images/generated.png")
    check_prompts(args.prompts)
    check_picture(out)
    check_out(out)
    check_gates(args.gates, args.model)
    check_sampling(args)
    model = open_model(args, ("text_encoder", "unet", "vae"), args.dtype)
    gates = load_gates(args.gates, model, args.zone) if args.gates else None
    warn_of_odd_words(args, args.prompts)
    import evaluate

    seeds = [args.seed + i for i in range(len(args.prompts))]
    kinds = [None, gates] if args.before_after else [gates]
    rows = [draw(model, args.prompts, seeds, kind, args, "after" if kind else "before") for kind in kinds]
    grid(rows, out)
    what = "one prompt" if len(seeds) == 1 else f"{len(seeds)} prompts"
    rest = f" to {seeds[-1]}" if len(seeds) > 1 else ""
    print(f"wrote   {out}: {what}{' before and after' if len(rows) == 2 else ''}, from seed {seeds[0]}{rest}")
    figures = {"out": str(out), "prompts": args.prompts, "seeds": seeds}
    if len(rows) == 2:
        figures["change"] = evaluate.change(*rows).tolist()
        for prompt, change in zip(args.prompts, figures["change"], strict=True):
            print(f"change  {change:.4f} of 2  {prompt}")
    return figures | {"next": after_drawing(args, args.prompts[0])}


def after_drawing(args: argparse.Namespace, prompt: str) -> str | None:
    """The command that follows `generate`; none for a folder, which may be one that `bake` has erased from already."""
    if args.gates:
        zone = ["--zone", args.zone] if args.zone else []
        return command("inspect", *args.gates, "--prompt", prompt, *zone, "--model", args.model)
    if args.model not in ("sd14", "emoji") and os.path.isdir(os.path.expanduser(args.model)):
        return None
    return command("train", "--target", "...", "--model", args.model)


def inspect(args: argparse.Namespace) -> dict:
    """`inspect`: the gate value of every token of a prompt, one column per concept."""
    import torch

    from loading.files import UserError

    args.gates = [*args.files, *args.gates]
    if not args.gates:
        raise UserError("which gates? Give one gate file or more: inspect gates/red-heart.safetensors --prompt ...")
    check_prompts([args.prompt])
    check_gates(args.gates, args.model)
    model = open_model(args, ("text_encoder", "unet"), args.dtype)
    gates = load_gates(args.gates, model, args.zone)
    warn_of_odd_words(args, [args.prompt])
    with torch.no_grad():
        values = gates.gate(model.encode([args.prompt]))[:, 0]  # [N, T]
    tokens = ["<start>", *model.tokenizer.tokens(args.prompt)[: values.shape[1] - 2], "<end>"]
    width = max(map(len, tokens)) + 2
    columns = [max(16, len(target)) for target in gates.targets]  # a number and ten blocks, or the name above them
    print(" " * width + "  ".join(f"{target:{n}}" for target, n in zip(gates.targets, columns, strict=True)))
    for i, token in enumerate(tokens):
        cells = [
            f"{f'{v:.3f} ' + '█' * round(10 * v):{n}}" for v, n in zip(values[:, i].tolist(), columns, strict=True)
        ]
        print(f"{token:{width}}" + "  ".join(cells))
    print("\n0 is shut, 1 open: at the target's name or after it, but nowhere in a prompt without it.")
    figures = {"tokens": tokens, "targets": gates.targets, "gates": values[:, : len(tokens)].tolist()}
    more = [word for path in args.gates for word in ("--gates", path)] + (["--zone", args.zone] if args.zone else [])
    more += ["--before-after", "--model", args.model] + (["--guidance", 4] if is_emoji(args.model) else [])
    again = command("generate", args.prompt, *more)
    return figures | {"next": again}


# --- demo --------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> dict:
    """`demo`: train gates on the embedded model, then judge images of the target, its neighbours and others.

    UserError for a target that is none of its concepts, an --out that cannot be written, or as of `check_sampling`.
    """
    import evaluate
    from loading.files import UserError

    prompts = read_prompts("emoji")
    concepts = prompts.domain
    if args.target not in concepts:
        raise UserError(f"{args.target!r} is none of the embedded model's concepts (see prompts/emoji.txt).")
    check_picture(args.out)
    check_out(args.out)
    check_sampling(args)
    model = open_model(args, ("text_encoder", "unet", "vae", "clip"))
    gate_file = args.out.with_suffix(".safetensors")
    trained = train_demo(args, gate_file)
    gates = load_gates([gate_file], model)

    features = evaluate.name_features(model.clip, model.tokenizer, concepts)
    target = concepts.index(args.target)
    order = evaluate.nearest(features, target, len(concepts) - 1)
    cases = demo_cases(target, order, args.images)
    texts = [template.replace("{}", concepts[c]) for _, c, _, template in cases]
    seeds = [args.seed + i for _, _, i, _ in cases]
    before = draw(model, texts, seeds, None, args, "before")
    after = draw(model, texts, seeds, gates, args, "after")
    seen = {name: evaluate.recognise(model.clip, x, features) for name, x in (("before", before), ("after", after))}

    figures = {"target": args.target, "losses": trained["losses"], "groups": {}}
    print(f"\n{'recognised by CLIP':22}{'images':>8}{'before':>9}{'after':>9}{'image change':>15}")
    for group in dict.fromkeys(case[0] for case in cases):
        rows = [i for i, case in enumerate(cases) if case[0] == group]
        share = {
            name: sum(seen[name][i].item() == cases[i][1] for i in rows) / len(rows) for name in ("before", "after")
        }
        change = evaluate.change(before[rows], after[rows]).mean().item()
        figures["groups"][group] = {"images": len(rows), **share, "change": change}
        print(f"{group:22}{len(rows):8}{share['before']:9.1%}{share['after']:9.1%}{change:15.4f}")
    first = {case[1]: i for i, case in reversed(list(enumerate(cases)))}  # the first image of every concept
    others = [c for c in sorted(first, key=first.get) if c not in (target, *order[:10])]
    shown = [*range(4), *(first[c] for c in (*order[:5], *others[:4]))]
    grid([before[shown], after[shown]], args.out, scale=2)
    print(f"\nwrote   {gate_file} and {args.out} (above: before, below: after)")
    following = command("inspect", gate_file, "--prompt", texts[0], "--model", "emoji")
    return figures | {"out": str(args.out), "next": following}


def train_demo(args: argparse.Namespace, out: Path) -> dict:
    """Train the gates of `demo`: anew each time, as its picture is drawn anew, so those of an earlier one are replaced.

    UserError if the loss became no number, the gates cannot be written, or there are others.
    """
    import old_cpe as cpe
    from loading.files import UserError

    options = ["--target", args.target, "--model", "emoji", "--device", args.device, "--seed", str(args.seed)]
    shared = Training(parser().parse_args(["train", *options]))
    names = check_names([args.target], shared)
    check_out(out)
    if os.path.exists(out) and "demo" not in kept_metadata(out):
        raise UserError(
            f"--out: {out} is there already, and of no demo, which would replace it: remove it, or choose another."
        )
    settings, trainer = shared.settings(names) | {"demo": True}, build_trainer(shared, names)
    shared.forget()
    run = Run(trainer, state_file(out), run_name(settings), saves=False)  # a minute's work: it begins anew
    try:
        watch([run], ({trainer: report} for report in trainer.steps()), "training")
    except cpe.Diverged as error:
        raise UserError(f"{error}: try another --seed.") from error
    return write_gates(run, settings, out, replace=True)


def demo_cases(target: int, order: Sequence[int], images: int) -> list[tuple[str, int, int, str]]:
    """(group, concept, number of the image, template) of all pictures of `demo`; `order`: nearest concepts first."""
    import attacks
    import evaluate

    rest, odd = order[10:], attacks.UNFAMILIAR["emoji"]
    groups = {"erased": [target], "nearest": order[:10], "others": evaluate.spread(rest, 30)}
    styles, colours = ("noto", "twemoji", "fluent", "blob"), ("white", "blue", "yellow", "green")
    drawn = [
        (group, c, i)
        for group, members in groups.items()
        for c in members
        for i in range(8 * images if group == "erased" else images)
    ]
    cases = [
        (*case, f"a picture of a {{}} on a {colours[n // 4 % 4]} background, {styles[n % 4]} style")
        for n, case in enumerate(drawn)
    ]
    return cases + [("erased, odd words", target, i, odd[i % len(odd)]) for i in range(8 * images)]


# --- compare -----------------------------------------------------------------------------------------------------


def asked_of_compare(args: argparse.Namespace) -> "tuple[dict[str, Scenario], list[Method]]":
    """The scenarios and erasers that `compare` was asked for; UserError for one that is not known."""
    import compare as table
    import old_cpe as cpe
    from loading.files import UserError

    scenarios, methods = table.SCENARIOS, table.METHODS
    if args.ablations:
        scenarios, methods = table.ABLATION_SCENARIOS, table.METHODS | table.ABLATIONS
    names = list(dict.fromkeys(args.eraser)) or (["cpe", "uce"] if args.quick else list(methods))
    if unknown := [name for name in names if name not in methods]:
        known = ", ".join(f'"{name}"' for name in methods)
        raise UserError(f"unknown eraser {unknown[0]!r}: choose among {known}.")
    if args.preset == "style" or (args.preset != "emoji" and not args.target):
        raise UserError("--preset goes with --target, and styles are judged on the embedded model alone: emoji-style.")
    if args.target:
        prompts = read_prompts(args.preset)
        known = style_names(prompts) if args.preset.endswith("style") else prompts.domain
        if unknown := [name for name in args.target if name not in known]:
            raise UserError(f"{unknown[0]!r} is not in prompts/{args.preset}.txt: CLIP could not look for it.")
        if (surrogate := cpe.PRESETS[args.preset].surrogate) in args.target:
            raise UserError(f"{surrogate!r} is what targets of --preset {args.preset} become: choose another --target.")
        targets = tuple(dict.fromkeys(args.target))
        scenarios = {", ".join(targets): table.Scenario(targets, args.preset)}
    if unknown := [name for name in args.scenario if name not in scenarios]:
        raise UserError(f"unknown scenario {unknown[0]!r}: choose among {', '.join(scenarios)}.")
    asked = list(dict.fromkeys(args.scenario)) or [name for name in scenarios if name not in table.LONG]
    scenarios = {name: scenarios[name] for name in asked}
    if args.quick:
        scenarios = dict(list(scenarios.items())[:1])
    return scenarios, [methods[name] for name in names]


def compare(args: argparse.Namespace) -> dict:
    """`compare`: every eraser on every scenario; what an earlier run has measured is not measured again.

    UserError for an eraser, scenario or target that is not known, or an --out that cannot be written.
    """
    from concurrent.futures.process import BrokenProcessPool

    import compare as table
    import old_cpe as cpe
    from loading.files import UserError, write_text

    check_picture(args.out)
    check_out(args.out)
    if args.markdown:
        check_out(args.markdown, "--markdown")
    scenarios, chosen = asked_of_compare(args)
    world = table.World(open_model(args, ("text_encoder", "unet", "vae")), args.clip, args.preset)
    budget = table.QUICK if args.quick else table.Budget()

    figures, pictures = {}, {}
    total = sum(len(table.compared(scenario, chosen)) for scenario in scenarios.values())
    try:
        if args.device == "cpu" and len(scenarios) > 1:
            opened = args.model, args.clip, args.preset
            with bar((), total, "comparing") as progress:
                for done in table.side_by_side(world, opened, scenarios, chosen, budget, args.seed):
                    progress.update(done - progress.n)
        for scenario, method, row, images in bar(
            table.run(world, scenarios, chosen, budget, args.seed), total, "comparing"
        ):
            figures.setdefault(scenario, {})[method] = row
            pictures.setdefault(scenario, []).append(images)
    except cpe.Diverged as error:
        raise UserError(f"{error}: try another --seed.") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("what is measured is kept: the same command goes on") from error
    except BrokenProcessPool as error:
        advice = "perhaps there was too little memory: close other programs, and give the same command again"
        raise UserError(f"a process that measures was killed; {advice}.") from error
    print(table.text(figures))
    for scenario, rows in pictures.items():
        path = args.out if len(pictures) == 1 else args.out.with_stem(f"{args.out.stem}-{slug(scenario)}")
        grid([from_bytes(row) for row in rows], path, labels=list(figures[scenario]))
        print(f"wrote   {path}: {scenario}, a row each: {', '.join(figures[scenario])}")
    if args.markdown:
        write_text(args.markdown, table.markdown(figures))
        print(f"wrote   {args.markdown}")
    following = "python benchmarks/tune.py" if args.ablations else command("compare", "--ablations")
    return {"scenarios": figures, "model": world.fingerprint, "next": following}


def from_bytes(pixels: "Sequence[Tensor]") -> "Tensor":
    """Images [B, 3, H, W] in [-1, 1] of bytes [3, H, W]."""
    import torch

    return torch.stack(list(pixels)).float() / 127.5 - 1


# --- bake --------------------------------------------------------------------------------------------------------


def bake(args: argparse.Namespace) -> dict:
    """`bake`: a model folder whose text encoder says what the gates made of it, and what that loses against them.

    UserError if --out exists already, or as of `check_sampling`, `load_gates`, `read_concepts`, `build_baker` and
    `run_trainer`.
    """
    from loading.files import UserError
    from weights import load_model, save_model

    state, written = state_file(args.out), os.path.lexists(args.out)
    if written and not (args.resume and os.path.exists(state)):
        measures = ", or measure what it loses, with --resume" if os.path.exists(state) else ""
        raise UserError(f"--out: {args.out} exists already: choose another name, or remove it{measures}.")
    if not written:
        check_out(args.out)
        check_out(state)  # its name is longer
    check_state(state, args.resume)
    check_gates(args.gates, args.model)
    preset = args.preset or common_preset(args.gates, "emoji" if is_emoji(args.model) else "celebrity")
    prompts, concepts = read_prompts(preset), read_concepts(args.gates, preset)
    check_sampling(args)
    model = open_model(args, ("text_encoder", "unet", "vae"))
    check_sampling(args, model)
    gates = load_gates(args.gates, model, args.zone)
    baker = build_baker(args, model, gates, concepts, prompts)
    settings = {"gates": digest_inputs(prompts, gates.state_dict()), "fingerprint": model.fingerprint}
    settings |= {"zone": args.zone} if args.zone else {}
    settings |= {"version": VERSIONS["bake"]}
    settings |= {"inputs": digest_inputs(prompts, model.cross_attention()), "seed": args.seed}
    settings |= {"concepts": [dataclasses.asdict(concept) for concept in concepts]} | dataclasses.asdict(baker.recipe)
    run = Run(baker, state, run_name(settings))
    run_trainer(run, args.resume, "baking")
    with kept(state, run.name):
        if not (written and holds(args.out, baker.tensors())):
            save_model(model, args.out, text_encoder=baker.tensors())
    remove_state(state, run.name)

    figures = {"out": str(args.out), "seed": args.seed, **dataclasses.asdict(baker.recipe)}
    baked = load_model(args.out, model.dtype, model.device)
    unmeasured = f"{args.out} is written; what it loses was not measured to the end"
    try:
        figures |= measure_baking(args, baker.objective, model, baked, gates, concepts, prompts)
    except KeyboardInterrupt as error:
        run.save()
        raise KeyboardInterrupt(f"{unmeasured}: that goes on with --resume") from error
    except UserError as error:
        run.save()
        raise UserError(f"{error} ({unmeasured})") from error
    print(f"{baker.unreachable:.1%} of what gates do is out of any text encoder's reach: its last LayerNorm forbids it")
    erased = ", ".join(name for concept in concepts for name in concept.names)
    print(f"\nwrote   {args.out}: {model.name}, with the gates of {erased} in its text encoder: nothing to delete")
    again = drawing_of(concepts[0].names[0], str(args.out), "--out", f"{args.out}.png")
    return figures | {"unreachable": baker.unreachable, "next": again}


def holds(folder: Path, tensors: "Mapping[str, Tensor]") -> bool:
    """Whether a model folder has this text encoder, so that it is what an earlier run has written."""
    import torch

    from loading.files import UserError, load_tensors

    with suppress(UserError):
        there = load_tensors(folder / "text_encoder" / "model.safetensors")[0]
        return there.keys() == tensors.keys() and all(torch.equal(there[n], t.cpu()) for n, t in tensors.items())
    return False


def has_control_characters(name: str) -> bool:
    """Whether a terminal would do something else with a name than to print it."""
    return any(unicodedata.category(letter) == "Cc" for letter in name)


def common_preset(paths: Sequence[Path], default: str) -> str:
    """The preset that gate files were trained with, `default` where none says; UserError where they differ."""
    from loading.files import UserError, load_tensors

    said = [load_tensors(path)[1].get("preset") for path in paths]
    presets = list(dict.fromkeys(name if name in PRESET_NAMES else default for name in said))
    if len(presets) > 1:
        raise UserError(f"--gates were trained with the presets {' and '.join(presets)}: give --preset, one of these.")
    return presets[0]


def read_concepts(paths: Sequence[Path], preset: str) -> "list[Concept]":
    """What each gate file erases; UserError if one does not say it, or in letters that no prompt has."""
    import bake as baking
    import old_cpe as cpe
    from loading.files import UserError, load_tensors

    concepts = []
    for path in paths:
        try:
            concept = baking.read_concept(load_tensors(path)[1], cpe.PRESETS[preset])
        except ValueError as error:
            raise UserError(f"{path}: {error}.") from error
        if odd := [name for name in (*concept.names, concept.surrogate) if has_control_characters(name)]:
            raise UserError(f"{path}: the name {odd[0]!r} in its metadata is no prompt.")
        concepts.append(concept)
    return concepts


def build_baker(
    args: argparse.Namespace, model: "Model", gates: "ResAG", concepts: "Sequence[Concept]", prompts: "Prompts"
) -> "Baker":
    """Encode the prompts that shall change and those that shall stay, up to the last MLP, of which units are trained.

    UserError when no anchor words are left, or there is nothing to learn from these gates.
    """
    import bake as baking
    import old_cpe as cpe
    from loading.files import UserError

    objective, recipe = cpe.Objective(model.cross_attention()), baking.Recipe().of(len(concepts), args.steps_scale)
    length = model.part("text_encoder").config.get("max_position_embeddings", 77)
    try:
        texts = baking.training_prompts(concepts, prompts, args.seed)
        targets, others = (model.tokenizer(part, length).to(model.device) for part in texts)
        gate = objective.context_gate(gates)
        return baking.Baker(model.text_encoder, gate, objective, targets, others, recipe, args.seed)
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, args.gates))}: {error}.") from error


def measure_baking(
    args: argparse.Namespace,
    objective: "Objective",
    model: "Model",
    baked: "Model",
    gates: "ResAG",
    concepts: "Sequence[Concept]",
    prompts: "Prompts",
) -> dict[str, dict]:
    """Print and return what baking loses: {target: {measure: {"gates", "baked"}}}."""
    import bake as baking
    import old_cpe as cpe

    words = cpe.anchor_words(prompts, [name for concept in concepts for name in concept.names])
    figures = {}
    print("\nleft: the share of the erasure still missing on the target. near, others: how far other concepts move,")
    print("relative to it. 0 is best everywhere. No gate was trained on these templates: beside words new to it")
    print("it may stay shut.")
    print(f"{'':52}{'gates':>10}{'baked':>10}")
    for concept in concepts:
        rows = {}
        for template in baking.HELD_OUT:
            shares = baking.token_figures(objective, gates, concept, words.domain, model.encode, baked.encode, template)
            rows |= {f"{name}, {template!r}": row for name, row in shares.items()}
        if args.images and model.has_clip:
            rows |= image_changes(args, model, baked, gates, concept.names[0], words.domain)
        for name, row in rows.items():
            print(f"{f'{concept.names[0]}: {name}':52}{row['gates']:10.2g}{row['baked']:10.2g}")
        figures[concept.names[0]] = rows
    return figures


def image_changes(
    args: argparse.Namespace, model: "Model", baked: "Model", gates: "ResAG", target: str, words: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Mean change of images, of 2, by gates and by the baked model: of the target, the words nearest to it, others."""
    import evaluate

    names = [target, *words]
    order = evaluate.nearest(evaluate.name_features(model.clip, model.tokenizer, names), 0, len(words))
    rest = order[10:]
    groups = {"target": [0] * 8, "nearest": order[:10], "others": evaluate.spread(rest, 20)}
    cases = [(group, names[i]) for group, members in groups.items() for i in members * args.images]
    texts, seeds = [f"a picture of a {name}" for _, name in cases], [args.seed + i for i in range(len(cases))]
    before = draw(model, texts, seeds, None, args, "before")
    after = {
        "gates": draw(model, texts, seeds, gates, args, "gates"),
        "baked": draw(baked, texts, seeds, None, args, "baked"),
    }
    changes = {kind: evaluate.change(before, images) for kind, images in after.items()}
    return {
        f"image change, {group}": {
            kind: change[[i for i, case in enumerate(cases) if case[0] == group]].mean().item()
            for kind, change in changes.items()
        }
        for group in groups
    }
