"""The arguments of every command, without torch. One function a command: its name and first line are the command's.

One rule for all: what a command is about stands as it is, everything else behind an option. A position that ends in
.safetensors is a gate file; any other is text, a target or a prompt.

    train "red heart" "dog face"        generate "a red heart" gates/red-heart.safetensors
"""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

VERSION = "0.2.0"
PRESETS = ("celebrity", "style", "explicit", "object", "emoji", "emoji-style")
DEVICES, DTYPES = ("cpu", "cuda", "mps"), ("float32", "bfloat16", "float16")
ATTACKS = ("embeddings", "inversion", "tokens", "P4D", "Ring-A-Bell")
MAY_BE_NONE = ("anchors", "nearest", "warmup", "attack_warmup")  # of the recipe's whole numbers


class Parser(argparse.ArgumentParser):
    """Suggests what was meant by an option, or a command, that does not exist."""

    about = "texts"  # where the positions go that are no gate files

    def error(self, message: str) -> None:
        """Print usage and message, and end with exit code 2."""
        for word in map("".join, re.findall(r"unrecognized arguments: (\S+)|COMMAND.*?'(.*?)'", message)[:1]):
            if near := difflib.get_close_matches(word, [*self._option_string_actions, *COMMANDS], 1):
                message = f"there is no {word}: did you mean {near[0]}?"
        super().error(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command; ends the program with help, or with exit code 2 for what is none of them."""
    commands = "commands:\n" + "\n".join(f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items())
    top = Parser(prog="cpe.py", description="Concept Pinpoint Eraser.", epilog=commands, allow_abbrev=False,
                 formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s COMMAND ...")  # fmt: skip
    top.add_argument("--version", action="version", version=f"cpe.py {VERSION}")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="`COMMAND --help` says more")
    if odd := [text for text in arguments if "\0" in text or re.search("[\ud800-\udfff]", text)]:
        top.error(f"{odd[0][:80]!r} is not text: it holds bytes that are no letters")
    command = top.parse_args(arguments[:1] or ["--help"]).command
    parser = Parser(prog=f"cpe.py {command}", description=f"{COMMANDS[command].__doc__}", allow_abbrev=False)
    parser.set_defaults(command=command, gates=[], surrogate=None)
    COMMANDS[command](parser)
    (about,) = [action.metavar for action in parser._get_positional_actions()] or [""]
    parser.usage = f"%(prog)s{about and f' [{about} ...]'} [options]"
    args = parser.parse_intermixed_args(arguments[1:])
    given = getattr(args, "positions", [])
    files = [text for text in given if text.endswith(".safetensors")]
    texts = [text for text in given if text not in files]
    if files and "GATES" not in about and about != "MODEL":
        parser.error(f"{files[0]}: cpe.py {command} takes no gate files")
    if about == "GATES" and (texts or not files):
        parser.error(f"which gates? Give files that end in .safetensors: {command} gates/red-heart.safetensors")
    if "PROMPT" in about and not all(text.strip() for text in texts):  # a shell's variable that is not set
        parser.error("the prompt is empty: give some words. (`generate` draws without a prompt at --guidance 0.)")
    args.gates = [*args.gates, *map(Path, files)]
    vars(args)[parser.about] = [*(getattr(args, parser.about, None) or []), *texts]
    return args


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of `kind` between low and high, ArgumentTypeError for any other."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def size(text: str) -> tuple[int, int]:
    """An argparse type: "128x64", width and height in pixels, as (height, width); ArgumentTypeError for any other."""
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"{text} is no size: say width and height, such as 768x512")
    return int(sides[2]), int(sides[1])


def positions(parser: argparse.ArgumentParser, metavar: str, dest: str, text: str) -> None:
    """Positions: after parsing, `args.gates` and `args.<dest>`; gate files only where the metavar names them."""
    parser.about = dest
    parser.add_argument("positions", nargs="*", metavar=metavar, help=text)


def add_model(parser: argparse.ArgumentParser, default: str | None = None, said: str = "the gates', or sd14") -> None:
    """Which model, and where it runs. `args.model` is None where nobody said it: see `common.settle`."""
    text = f"sd14, emoji, a path, or owner/name (default: {default or said})"
    parser.add_argument("--model", metavar="WHICH", default=default, help=text)
    parser.add_argument("--device", choices=DEVICES, metavar="D", default="cpu", help=", ".join(DEVICES))
    parser.add_argument("--seed", metavar="N", type=number(int, 0, 2**63), default=0, help="of all chance (default: 0)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How pictures are drawn. None: as the model's own defaults say."""
    parser.add_argument("--steps", metavar="N", type=number(int, 1, 1000), help="of denoising (default: the model's)")
    parser.add_argument("--guidance", metavar="W", type=number(float, 0, 100), help="guidance scale (likewise)")
    parser.add_argument("--sampler", choices=("ddim", "dpm"), help="DDIM or DPM-Solver++(2M) (likewise)")


def demo(parser: argparse.ArgumentParser) -> None:
    """Erase a thing of the embedded model, and show what became of it."""
    positions(parser, "TARGET", "targets", "what to erase (default: red heart)")
    add_model(parser, "emoji")
    add_sampling(parser)
    parser.add_argument("--out", type=Path, help="the picture (default: images/demo-<target>.png); its gates likewise")


def recipe_fields() -> list[tuple[str, str, type]]:
    """(field, option, type) of every number of cpe.Recipe, read from its source: importing it takes seconds."""
    source = (Path(__file__).resolve().parent.parent / "cpe.py").read_text(encoding="utf-8")
    found = re.findall(r"^    (\w+): (int|float) = ", source.split("class Recipe:")[1], flags=re.MULTILINE)
    short = {"lam": "lambda", "k": "rank", "r": "gate-rank"}
    return [(name, short.get(name, name.replace("_", "-")), {"int": int, "float": float}[kind]) for name, kind in found]


def train(parser: argparse.ArgumentParser) -> None:
    """Make a gate that erases a concept."""
    positions(parser, "TARGET", "targets", "what to erase: one gate file each")
    parser.add_argument("--target", nargs="+", action="extend", dest="targets", metavar="A", help="the same")
    many = 'one target a line, its other names after commas ("A, B": one name)'
    parser.add_argument("--targets", type=Path, dest="target_file", metavar="FILE", help=many)
    parser.add_argument("--alias", metavar="B", action="append", default=[], help="another name of it (repeatable)")
    parser.add_argument("--one-name", action="store_true", help="a comma or `and` in TARGET belongs to its name")
    parser.add_argument("--surrogate", metavar="S", help="what it becomes (default: the preset's)")
    parser.add_argument("--preset", choices=PRESETS, metavar="P", help="see `list` (default: the model's)")
    parser.add_argument("--how", choices=("train", "solve"), help="by steps, or by formula (default: the model's)")
    parser.add_argument("--literal", action="store_true", help="with the losses as the paper writes them (slow)")
    parser.add_argument("--published", action="store_true", help="in the paper's templates alone, anchors in all")
    parser.add_argument("--steps-scale", metavar="X", type=number(float, 1e-4, 100), default=1.0, help="of all steps")
    parser.add_argument("--out", metavar="FILE", type=Path, help="(default: gates/<target>.safetensors), or a folder")
    parser.add_argument("--report", action="store_true", help="also a page with pictures: <out>.html")
    add_model(parser, "sd14")
    fields = recipe_fields()
    parser.epilog = f"numbers of the recipe (cpe.Recipe explains them): {' '.join(f'--{o}' for _, o, _ in fields)}"
    for name, option, kind in fields:
        low = 1 if kind is int and name not in MAY_BE_NONE else 0
        parser.add_argument(f"--{option}", dest=f"recipe_{name}", type=number(kind, low, 1e9), help=argparse.SUPPRESS)


def generate(parser: argparse.ArgumentParser) -> None:
    """Draw pictures, with or without gates."""
    positions(parser, "PROMPT_OR_GATES", "prompts", "what to draw (from seeds N, N + 1, ...); gates")
    parser.add_argument("--gates", action="append", type=Path, metavar="FILE", help="a gate file, as positions are")
    many = "one prompt a line, or CSV with a column `prompt`"
    parser.add_argument("--prompts", type=Path, dest="prompt_file", metavar="FILE", help=many)
    parser.add_argument("--before-after", action="store_true", help="also without the gates, from the same seeds")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what not to draw (negative prompt)")
    parser.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels (default: the model's)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="or a folder (default: images/<prompt>.png)")
    parser.add_argument("--dtype", choices=DTYPES, metavar="T", default="float32", help=", ".join(DTYPES))
    add_model(parser)
    add_sampling(parser)


def inspect(parser: argparse.ArgumentParser) -> None:
    """Show which words of a prompt open a gate."""
    positions(parser, "PROMPT_OR_GATES", "prompts", "a prompt, and gate files")
    parser.add_argument("--out", type=Path, help="draw the sentence with its openings (PNG)")
    add_model(parser)


def check(parser: argparse.ArgumentParser) -> None:
    """Try gates on some hundred sentences, in the text encoder alone."""
    positions(parser, "GATES", "texts", "gate files")
    parser.add_argument("--sentences", type=Path, metavar="FILE", help="your own: one a line, {} is the target's place")
    add_model(parser)


def compare(parser: argparse.ArgumentParser) -> None:
    """Measure CPE against the linear erasers."""
    positions(parser, "TARGET", "targets", "instead of the scenarios: erase these at once")
    parser.add_argument("--preset", choices=PRESETS, metavar="P", default="emoji", help="of the targets: see `list`")
    parser.add_argument("--scenario", action="append", default=[], metavar="NAME",
                        help="only these (repeatable); '50 at once' is measured only when named")  # fmt: skip
    parser.add_argument("--eraser", action="append", default=[], metavar="NAME", help="only these (repeatable)")
    parser.add_argument("--published", action="store_true", help="the linear erasers as published, and as tuned")
    parser.add_argument("--quick", action="store_true", help="one target, six erasers, six columns, no attacks")
    parser.add_argument("--clip", metavar="FOLDER", help="the judge (default: the model's own CLIP)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--out", type=Path, default=Path("images/compare.png"), help="the picture")
    add_model(parser, "emoji")


def attack(parser: argparse.ArgumentParser) -> None:
    """Look for inputs that bring an erased concept back."""
    positions(parser, "GATES", "texts", "one gate file")
    parser.add_argument("--with", action="append", default=[], dest="attacks", choices=ATTACKS,
                        help="which attack (repeatable; default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("images/attack.png"), help="the picture")
    add_model(parser)
    add_sampling(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Judge pictures in a folder."""
    positions(parser, "FOLDER", "folders", "a folder of pictures: prompts.csv (file,prompt), or a .txt for each")
    parser.add_argument("--name", action="append", default=[], help="count the pictures that show it (repeatable)")
    parser.add_argument("--names", type=Path, metavar="FILE", help="the same, one a line")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="pictures to compare with: CMMD, and --fid")
    parser.add_argument("--fid", action="store_true", help="FID and KID too (pip install clean-fid)")
    parser.add_argument("--nudity", action="store_true", help="count nudity (pip install nudenet)")
    parser.add_argument("--clip", metavar="FOLDER", help="the judge (default: openai/clip-vit-large-patch14)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add_model(parser, said="that of the pictures, if it is the embedded one: its CLIP judges")


def bake(parser: argparse.ArgumentParser) -> None:
    """Write an erased model that needs no gates any more."""
    positions(parser, "GATES", "texts", "gate files to bake in")
    parser.add_argument("--out", type=Path, help="folder, or .safetensors file, to write (default: models/<target>)")
    parser.add_argument("--preset", choices=PRESETS, metavar="P", help="prompts to train on (default: the gates')")
    parser.add_argument("--steps-scale", metavar="X", type=number(float, 1e-4, 100), default=1.0, help="of all steps")
    add_model(parser)


def export(parser: argparse.ArgumentParser) -> None:
    """Write an erased model as one file for other programs."""
    positions(parser, "MODEL", "models", "a folder that `bake` has written, or what else --model takes")
    parser.add_argument("--out", type=Path, help="what to write (default: models/<model>-float16.safetensors)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the file's numbers")
    add_model(parser, said="MODEL")


def list_(parser: argparse.ArgumentParser) -> None:
    """Show models, presets, gates, and what the embedded model knows."""


COMMANDS = {
    "demo": demo, "train": train, "generate": generate, "inspect": inspect, "check": check, "compare": compare,
    "attack": attack, "evaluate": evaluate, "bake": bake, "export": export, "list": list_,
}  # fmt: skip
