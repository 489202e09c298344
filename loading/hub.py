"""Models of the Hugging Face hub: found in the local cache, else downloaded.

What the cache has is not asked for again. Every error says what to do without a network.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from loading.files import UserError, disk_full

SD14 = "CompVis/stable-diffusion-v1-4"


def is_repository(name: str) -> bool:
    """Whether a name can be one of a repository on the hub, owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def snapshot(folder: Path) -> Path:
    """The model in a folder models--owner--name of the hub's cache, any other as it is; UserError for the cache."""
    if models := sorted(path.name for path in folder.glob("models--*--*")):
        example = models[0].removeprefix("models--").replace("--", "/", 1)
        raise UserError(f"{folder} is a cache of {len(models)} models: name one, as in --model {example}")
    main = folder / "refs" / "main"
    return folder / "snapshots" / main.read_text().strip() if main.is_file() else folder


def find(repository: str, names: tuple[str, ...], revision: str) -> str:
    """The path of the first of `names` that the cache has, or else that the repository has; UserError for neither."""
    for name in names:
        path = hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return path
    for name in names:
        try:  # says at once that nobody answers, where a download would try for half a minute
            hub.get_hf_file_metadata(hub.hf_hub_url(repository, name, revision=revision))
        except EntryNotFoundError:
            continue
        return hub.hf_hub_download(repository, name, revision=revision)
    raise UserError(f"{repository} has no {' or '.join(names)}: choose another model")


def failure(repository: str, file: str, error: Exception) -> UserError:
    """What to say of an error of the hub's client, and what to do about it."""
    advice = "connect to the network and try again"
    if isinstance(error, RepositoryNotFoundError):
        advice = "check the name; for a model behind a licence, accept it on its page and run `hf auth login`"
    elif disk_full(error) or getattr(error, "filename", None):  # of the cache, not of the network
        advice = "make room on the disk, check that folder, or set HF_HOME to another"
    said = f"{file} of {repository} is not in the Hugging Face cache, and downloading it failed"
    emoji = "use --model emoji, " if repository == SD14 else ""
    why = (str(error).splitlines() or [type(error).__name__])[0]
    # without a network the client's own words are those of a socket
    why = "" if re.search("Connect|LocalEntryNotFound", type(error).__name__) else f" ({why})"
    return UserError(f"{said}{why}: {advice}, {emoji}or give the folder of a copy from another machine")


def fetch(repository: str, wanted: Sequence[tuple[str, ...]]) -> Path:
    """The folder of a repository in the local cache, with the wanted files in it: for each its names, the best first.

    A connection that breaks is taken up where it broke; a run that ended early keeps its finished files. UserError
    says what to do when a file is not to be had.
    """
    constants.HF_HUB_DISABLE_XET = True  # all files by way of the endpoint, which HF_ENDPOINT may move
    revision, folder = "main", Path()
    for names in wanted:
        try:
            folder = Path(find(repository, names, revision)).parents[names[0].count("/")]
        except UserError:
            raise
        except Exception as error:  # the hub's client raises many kinds, and others in its next version
            raise failure(repository, names[0], error) from error
        revision = folder.name  # the commit: all files from the same one
    return folder
