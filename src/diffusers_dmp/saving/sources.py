"""Whether a name that a user gave can be found: a local file or folder that is missing is said to be missing at once."""

import logging
import os
import re

# of files; a Hub id may end in others, as in stable-diffusion-v1.5
_FILE_SUFFIXES = (
    ".bin", ".ckpt", ".json", ".npz", ".parquet", ".pkl", ".png", ".pt", ".pth", ".safetensors", ".tar", ".yaml", ".zip",
)  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)

_SECONDS_FOR_HUB = 5.0

logger = logging.getLogger(__name__)


def check_source(
    argument: str, name_or_path: "str | os.PathLike | None", kind: str = "folder", repo_type: str | None = None
) -> None:
    """
    Check that a file or folder exists, where a name cannot be the id of a repository on the Hub; where it can, say that the
    Hub is asked, which may take a while without a connection.

    Args:
        argument (`str`): The argument that the user gave it in, for the message.
        name_or_path (`str`, *optional*): The name; nothing is checked without one.
        kind (`str`): What else than a Hub id it may be: 'folder', or 'file or folder'.
        repo_type (`str`, *optional*): 'model' or 'dataset', to ask the Hub once whether it has it; the loaders retry several times
            if there is no connection.

    Raises:
        ValueError: if it can be neither, is not on the Hub although asked for, or is a file where a folder is asked for.
    """
    if not name_or_path:
        return
    if os.path.isfile(name_or_path) and kind == "folder":
        raise ValueError(f"Expected `{argument}` to be a folder or a Hub id, but got the file {str(name_or_path)!r}.")
    if os.path.exists(name_or_path):
        return
    name = os.fspath(name_or_path)
    if is_local(name):
        hint = " (a shell replaces ~ only outside of quotes)" if name.startswith("~") else ""
        raise ValueError(
            f"Expected `{argument}` to be an existing {kind} or a Hub id, but got {name!r}: there is no such {kind}{hint}."
        )
    if os.environ.get("RANK", "0") == "0":
        logger.warning("There is no %s %r here: looking for it on the Hub.", kind, name)
    if repo_type is not None:
        _expect_on_hub(argument, name, kind, repo_type)


def _expect_on_hub(argument: str, name: str, kind: str, repo_type: str) -> None:
    """Refuse a repository that the Hub does not have, or that is not in a cache while there is no connection to the Hub."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or _is_cached(name, repo_type):  # the loader reads the cache, or raises its own error
        return
    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=_SECONDS_FOR_HUB)
        return
    except GatedRepoError:  # it exists, and the Hub says what to do
        return
    except RepositoryNotFoundError:
        reason = f"there is no such {kind}, and the Hub has no such {repo_type} that you may read"
    except Exception as error:
        # of the library that the Hub's client talks through, which is another one in other versions
        if not isinstance(error, OSError) and not any(
            base.__name__ == "TransportError" for base in type(error).__mro__
        ):
            raise
        reason = f"there is no such {kind}, and the Hub does not answer ({type(error).__name__})"
    raise ValueError(f"Expected `{argument}` to be an existing {kind} or a Hub id, but got {name!r}: {reason}.")


def _is_cached(name: str, repo_type: str) -> bool:
    from huggingface_hub import constants

    folder = os.path.join(constants.HF_HUB_CACHE, f"{repo_type}s--{name.replace('/', '--')}")
    return os.path.isdir(folder)


def is_local(name: str) -> bool:
    """
    Whether a name is that of a local file or folder, as it cannot be a repository's on the Hub.

    It is not `name` or `user/name`, ends as a file does, or names something in a folder that exists.
    """
    owner, slash, _ = name.partition("/")
    if not _HUB_ID.fullmatch(name) or name.endswith(_FILE_SUFFIXES) or owner in (".", ".."):
        return True
    return bool(slash) and os.path.isdir(owner)
