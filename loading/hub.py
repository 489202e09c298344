"""Models of the Hugging Face hub: found in the local cache, else downloaded.

    folder = fetch("CompVis/stable-diffusion-v1-4", [("unet/config.json",), ("vae/config.json",)])

What the cache has is not asked for again. Every error says what to do without a network. Built on huggingface_hub.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from loading.files import UserError, disk_full, first_line

SD14 = "CompVis/stable-diffusion-v1-4"


def is_repository(name: str) -> bool:
    """Whether a name can be one of a repository on the hub, owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def snapshot(folder: Path) -> Path:
    """The model inside a folder of the hub's cache, models--owner--name; any other folder as it is.

    UserError for the cache itself, which holds many models, and for a model of which nothing was downloaded.
    """
    if models := sorted(path.name for path in folder.glob("models--*--*")):
        example = models[0].removeprefix("models--").replace("--", "/", 1)
        raise UserError(f"{folder} is a cache of {len(models)} models: name one, as in --model {example}")
    if not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs" / "main"
    named = folder / "snapshots" / main.read_text().strip() if main.is_file() else None
    found = [named] if named and named.is_dir() else sorted((folder / "snapshots").iterdir())
    if len(found) != 1:
        raise UserError(f"{folder / 'snapshots'} holds {len(found)} snapshots, none of them the main one: name one")
    return found[0]


def ways_out(repository: str) -> str:
    """What to do when a repository cannot be had."""
    emoji = "`--model emoji` uses the small model that comes with this project; or "
    connect = f"connect once, so that {repository} can be downloaded; or give the folder of a copy"
    return f"Ways out: {emoji if repository == SD14 else ''}{connect} from another machine."


def no_network(repository: str, file: str, error: BaseException) -> UserError:
    """What to say when a file is not in the cache and its repository is not reached."""
    missing = f"{file} of {repository} is not in the Hugging Face cache, and the network cannot be used"
    return UserError(f"{missing} ({first_line(error)}). {ways_out(repository)}")


def check_network(repository: str, file: str, revision: str) -> None:
    """UserError where no connection is made: a download would try, and wait, for half a minute before it says so.

    What the server answers, and whether it takes its time to, is left to the download.
    """
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, revision=revision))
    except Exception as error:  # by name: of another library in every other version of the hub's client
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError"):
            raise no_network(repository, file, error) from error


def find(repository: str, names: tuple[str, ...], revision: str) -> str:
    """The path of the first of `names` that the cache has, or else that the repository has; UserError for neither."""
    for name in names:
        path = hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return path
    check_network(repository, names[0], revision)
    for name in names:
        try:
            return hub.hf_hub_download(repository, name, revision=revision)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # not a 404: the repository was not reached
                raise
    raise UserError(f"{repository} has no {' or '.join(names)}: choose another model. {ways_out(repository)}")


def fetch(repository: str, wanted: Sequence[tuple[str, ...]]) -> Path:
    """The folder of a repository in the local cache, with the wanted files in it: for each its names, the best first.

    A connection that breaks is taken up where it broke; a run that ended early keeps its finished files. UserError
    says what to do when a file is not to be had.
    """
    constants.HF_HUB_DISABLE_XET = True  # all files by way of the endpoint, which HF_ENDPOINT may move
    revision, folder = "main", Path()
    for names in wanted:
        try:
            path = Path(find(repository, names, revision))
        except UserError:
            raise
        except LocalEntryNotFoundError as error:
            raise no_network(repository, names[0], error.__cause__ or error) from error
        except Exception as error:  # the hub's client raises many kinds, and others in its next version
            advice = "try again"
            if type(error).__name__ in ("RepositoryNotFoundError", "GatedRepoError"):
                advice = "check the name; for a model behind a licence, accept it on its page and run `hf auth login`"
            elif disk_full(error):
                advice = "make room on the disk, or set HF_HOME to another"
            elif isinstance(error, OSError) and error.filename:  # of the cache, not of the network
                advice = "check that folder, or set HF_HOME to another"
            failed = f"downloading {names[0]} of {repository} failed ({first_line(error)})"
            raise UserError(f"{failed}: {advice}. {ways_out(repository)}") from error
        folder = path.parents[names[0].count("/")]
        revision = folder.name  # the commit: all files from the same one
    return folder
