"""Upload what a training makes while it runs: `--push_to_hub`.

The repository is made, or checked, before anything else; an upload that fails later costs no training.
"""

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token

from ..saving.lora_files import LORA_CONFIG, read_lora_config
from ..training.arguments import LoopArguments
from ..training.checkpoints import checkpoints
from .folders import ARGUMENTS
from .publishing import publish, write_card

FOLDER = ".hub_upload"  # in `output_dir`: what is being uploaded
LORAS = "loras"  # in `output_dir`

logger = logging.getLogger(__name__)


def with_hub(train: Callable[..., Any], along_the_way: bool = True) -> Callable[[Any], None]:
    """
    Add `--push_to_hub` to an entry point.

    Args:
        train (`Callable`): Takes the arguments of a training, which end up in a pipeline or experts in `output_dir`.
        along_the_way (`bool`): Whether it takes a `publisher` as well, for what there is before the end.

    Returns:
        `Callable`: Takes the arguments of the training, too.
    """

    def train_and_push(args: LoopArguments) -> None:
        if not args.push_to_hub:
            train(args)
            return
        with HubPush(args) as push:
            train(args, **({"publisher": push} if along_the_way else {}))

    return train_and_push


def with_card(train: Callable[..., Any]) -> Callable[..., None]:
    """
    Let an entry point write the model card of LoRA, with their noise intervals, beside them, when all of them are there.

    Args:
        train (`Callable`): Takes the arguments of a training, and perhaps others.
    """

    def train_and_describe(args: LoopArguments, **others: Any) -> None:
        train(args, **others)
        folder = Path(args.output_dir, LORAS)
        is_main_process = int(os.environ.get("RANK", 0)) == 0
        if is_main_process and (folder / LORA_CONFIG).is_file():
            files = read_lora_config(folder)["files"].values()
            if all((folder / file).is_file() for file in files):
                write_card(args.output_dir, args.hub_license)

    return train_and_describe


class HubPush:
    """
    A context manager that uploads a training's `output_dir` when the training ends without an error, and takes what there is
    before the end as a [`Publisher`].

    Only the first of several processes does anything. Uploads before the end are made in a thread of their own; while one
    takes its time, others are left out. The first that fails is warned about.

    Args:
        args ([`LoopArguments`]): For the repository, its licence, and the output folder.
        token (`str`, *optional*): By default the token of `hf auth login` or HF_TOKEN.
        endpoint (`str`, *optional*): The address of another Hub.

    Raises:
        ValueError: if there is no token that can write, or if the repository cannot be made or belongs to something else.
    """

    def __init__(self, args: LoopArguments, token: str | None = None, endpoint: str | None = None):
        self.args = args
        self.is_main_process = int(os.environ.get("RANK", 0)) == 0
        self.to_hub: dict[str, Any] = {
            "license": args.hub_license,
            "update": True,
            "token": token,
            "endpoint": endpoint,
        }
        self.repo_id = prepare_repository(args, token, endpoint) if self.is_main_process else ""
        self.uploads = ThreadPoolExecutor(max_workers=1)
        self.latest: Future[None] | None = None
        self.has_failed = False

    def __call__(self, save: Callable[[Path], object], step: int) -> None:
        """Upload a pipeline of a training that goes on, unless the upload before it is not done."""
        if not self.is_main_process or (self.latest is not None and not self.latest.done()):
            return
        folder = Path(self.args.output_dir, FOLDER)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            save(folder / "pipeline")
            shutil.copy(Path(self.args.output_dir, ARGUMENTS), folder)
        except torch.OutOfMemoryError:  # the training's, which says what helps
            raise
        except Exception as error:  # a full disk, for one; the training goes on
            self._warn(error, step)
            shutil.rmtree(folder, ignore_errors=True)  # half a pipeline takes the room of a checkpoint
            return
        self.latest = self.uploads.submit(self._upload, folder, step)

    def _upload(self, folder: Path, step: int) -> None:
        try:
            publish(folder, self.repo_id, **self.to_hub)
        except Exception as error:  # whatever it is, the training goes on
            self._warn(error, step)

    def _warn(self, error: Exception, step: int) -> None:
        if not self.has_failed:
            logger.warning("The upload to %s after step %d failed, training goes on: %s", self.repo_id, step, error)
        self.has_failed = True

    def __enter__(self) -> "HubPush":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        self.uploads.shutdown(wait=error_type is None, cancel_futures=True)
        if not self.is_main_process:
            return
        args = self.args
        shutil.rmtree(Path(args.output_dir, FOLDER), ignore_errors=True)
        if error_type is not None:
            return
        try:
            url = publish(args.output_dir, self.repo_id, **self.to_hub).url
        except Exception as failure:
            raise ValueError(
                f"Expected to upload {args.output_dir} to {self.repo_id}, but got: {_one_line(failure)}. The training is complete; "
                f"`diffusers-dmp publish {args.output_dir} {self.repo_id} --license {args.hub_license} --update` uploads it."
            ) from failure
        print(f"Published at {url}", flush=True)


def prepare_repository(args: LoopArguments, token: str | None = None, endpoint: str | None = None) -> str:
    """
    Make the repository of a training, or check the one that there is.

    Args:
        args, token, endpoint: See [`HubPush`].

    Returns:
        `str`: Its name: `hub_model_id`, in the user's own namespace if it has none; by default that of `output_dir`.

    Raises:
        ValueError: if there is no token that can write, or if the repository cannot be made or belongs to something else.
    """
    base = getattr(args, "base_model", None)
    if base is not None and os.path.exists(base):
        raise ValueError(
            "Expected `base_model` to be the id of a model on the Hub for `push_to_hub`, since experts cannot be loaded "
            f"without it, but got the folder {base!r}."
        )
    if (token or get_token()) is None:
        raise ValueError(
            "Expected a token to write with for `push_to_hub`, from `hf auth login` or HF_TOKEN, but got none."
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        user = api.whoami()
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        repo_id = name if "/" in name else f"{user['name']}/{name}"
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError(f"Expected a token to write to {repo_id!r} with, but got one that can only read.")
        if api.repo_exists(repo_id):
            _check_repository(api, repo_id, args)
        else:
            api.create_repo(repo_id, private=args.hub_private_repo)
    except OSError as error:  # the Hub's refusals, among others
        raise ValueError(f"Expected to write to `hub_model_id` on the Hub, but got: {_one_line(error)}") from error
    return repo_id


def _check_repository(api: HfApi, repo_id: str, args: LoopArguments) -> None:
    """Check that a repository may be overwritten, and is private if it is to be."""
    files = sorted(set(api.list_repo_files(repo_id)) - {".gitattributes"})
    # `latest` without a checkpoint is a new training, too
    if files and (args.resume_from_checkpoint is None or not _has_checkpoints(Path(args.output_dir))):
        raise ValueError(
            f"Expected `hub_model_id` to be a new or an empty repository, unless a training is resumed, but got {repo_id!r} "
            f"with {len(files)} files."
        )
    if args.hub_private_repo and not api.repo_info(repo_id).private:
        raise ValueError(
            f"Expected {repo_id!r} to be private already, or a new name, but got a public repository; its settings on the "
            "Hub make it private."
        )


def _has_checkpoints(output_dir: Path) -> bool:
    """Whether a training, or one of its experts in a folder of its own, has left a checkpoint."""
    return bool(checkpoints(output_dir)) or any(checkpoints(folder) for folder in output_dir.glob("*/"))


def _one_line(error: BaseException) -> str:
    """An error's text; the Hub's have several lines."""
    return " ".join(str(error).split())
