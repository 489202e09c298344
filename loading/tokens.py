"""Reading the folder of a tokenizer: vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes.

What the folder asks for beyond these files (other words, another padding, another length) is an error: here all is
as in Stable Diffusion 1.x, and as in CLIP.
"""

from pathlib import Path

from clip import EOS, Tokenizer
from loading.files import UserError, read_json

TOKENIZER = ("vocab.json", "merges.txt")


def tokenizer_files(folder: Path) -> list[Path]:
    """The two files of a tokenizer, or the one that transformers 5 writes, if there is nothing else."""
    two, one = [folder / file for file in TOKENIZER], folder / "tokenizer.json"
    return [one] if one.is_file() and not any(path.is_file() for path in two) else two


def check_added(path: Path, tokenizer: Tokenizer) -> None:
    """UserError for words that were added to the vocabulary, as textual inversion does: they would be spelt."""
    said = read_json(path)
    added = said if path.name == "added_tokens.json" else [each["content"] for each in said.get("added_tokens", [])]
    if odd := [word for word in added if tokenizer.bpe.token_to_id(word) is None]:
        raise UserError(f"{path} adds the word {odd[0]!r} to the vocabulary, which is not implemented")


def check_padding(path: Path, length: int) -> None:
    """UserError for another padding, or another length, than Stable Diffusion 1.x has."""
    said = read_json(path)
    pad, longest = said.get("pad_token"), said.get("model_max_length", length)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad not in (None, EOS):
        raise UserError(f"{path}: pad_token is {pad!r}, and only {EOS!r} is implemented, as in SD 1.x")
    if longest != length and not (isinstance(longest, (int, float)) and longest > 1e6):  # which means: none
        raise UserError(f"{path}: model_max_length is {longest!r}, but the text encoder reads {length} tokens")


def read_tokenizer(folder: Path, length: int = 77) -> Tokenizer:
    """The tokenizer in a folder, of a text encoder that reads `length` tokens; UserError when it is not to be had."""
    try:
        tokenizer = Tokenizer(*tokenizer_files(folder))
        for name, check, against in (
            ("added_tokens.json", check_added, tokenizer),
            ("tokenizer.json", check_added, tokenizer),
            ("tokenizer_config.json", check_padding, length),
            ("special_tokens_map.json", check_padding, length),
        ):
            if (folder / name).is_file():
                check(folder / name, against)
        return tokenizer
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist: a model needs its {' and '.join(TOKENIZER)}") from error
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"the tokenizer in {folder} could not be read ({error}): get its two files again") from error
