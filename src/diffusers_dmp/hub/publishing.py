"""Publish a trained model on the Hugging Face Hub, with its code files and a model card."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

import diffusers_dmp

from ..models.expert_configs import package_classes
from ..saving.bundling import source_of
from ..saving.finite import expect_finite_files
from ..saving.mixins import dumped, lists_as_objects, with_code_file
from ..saving.naming import EXPERTS_KEY
from ..saving.reading import read_json
from ..saving.version import __version__
from ..saving.weight_files import check_saved_folder
from ..saving.whole import written_whole
from ..systems import SYSTEMS
from .cards import model_card, network_is_given, published_evaluation, published_settings
from .folders import (
    ARGUMENTS,
    EVALUATION,
    MODEL_CONFIG,
    PIPELINE_CONFIG,
    FolderContents,
    expect_no_pickles,
    read_folder,
)

UPLOADED = (".jinja", ".json", ".model", ".safetensors", ".txt")  # of a pipeline's folder; the code is this version's
_HOMELESS = (
    "Expected the base model of guidance experts to be on the Hub, since they cannot be loaded without it, but got {!r}; "
    "publish it and give its id as `base_model`."
)


@dataclass(frozen=True)
class Publication:
    """
    What is uploaded.

    Args:
        repo_id (`str`): The repository.
        files (`dict[str, Path | bytes]`): From the name of each file in the repository to its local path or its content.
        card (`str`): The model card, which is the README.
        url (`str`, *optional*): The address of the repository; None for a dry run.
    """

    repo_id: str
    files: "dict[str, Path | bytes]"
    card: str
    url: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes, by name."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def publish(
    folder: "str | os.PathLike",
    repo_id: str,
    *,
    license: str,
    private: bool = False,
    update: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
    dataset: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Publication:
    """
    Upload a pipeline, a model, a prompt patch, LoRA experts or guidance experts to the Hub in one commit.

    Weights, code files with which it is loaded without this package, a model card, and the pictures and figures that lie beside
    the weights.

    Args:
        folder: See [`read_folder`].
        repo_id (`str`): The repository, such as 'user/name'.
        license (`str`): The licence of the weights, such as 'apache-2.0', 'mit' or 'cc-by-nc-4.0'.
        private (`bool`): Let only its owners see the repository.
        update (`bool`): If the repository exists, replace everything in it, its card too.
        dry_run (`bool`): Only put together what would be uploaded, without any request to the Hub.
        base_model, dataset (`str`, *optional*): Hub ids of the model it was made of and the dataset it was trained on. By default
            those in the training's arguments, if they exist on the Hub.
        token (`str`, *optional*): By default the token of `hf auth login` or HF_TOKEN.
        endpoint (`str`, *optional*): The address of another Hub.

    Returns:
        [`Publication`]

    Raises:
        ValueError: if the folder holds nothing of this package, or pickled, damaged or non-finite weights; `repo_id` is not a valid name, or exists and
            `update` is false, or is public and `private` is true; there is no token; or the network of guidance experts is not
            on the Hub.
    """
    contents = read_folder(folder)
    expect_no_pickles(contents)
    check_saved_folder(contents.path)
    _check_repo_id(repo_id)
    found_base, found_dataset = (
        base_model or _base_model(contents),
        dataset or _hub_id(contents.training.get("dataset")),
    )
    if _needs_base_model(contents) and found_base is None:
        raise ValueError(_HOMELESS.format(contents.config["base_model_name_or_path"]))
    expect_finite_files(contents.path)
    if dry_run:
        return _publication(contents, repo_id, license, found_base, found_dataset)

    if (token or get_token()) is None:
        raise ValueError("Expected a token to write with, from `hf auth login`, HF_TOKEN or `token`, but got none.")
    api = HfApi(endpoint=endpoint, token=token)
    if base_model is None and found_base is not None and not api.repo_exists(found_base):
        found_base = None
    if _needs_base_model(contents) and (found_base is None or not api.repo_exists(found_base)):
        raise ValueError(_HOMELESS.format(base_model or contents.config["base_model_name_or_path"]))
    if dataset is None and found_dataset is not None and not api.repo_exists(found_dataset, repo_type="dataset"):
        found_dataset = None
    if api.repo_exists(repo_id):
        if not update:
            raise ValueError(
                f"Expected `repo_id` to be a new name, or `update` to be true, but got {repo_id!r}, which is taken."
            )
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"Expected {repo_id!r} to be private already, or a new name, but got a public repository; its settings on the "
                "Hub make it private."
            )
    publication = _publication(contents, repo_id, license, found_base, found_dataset)
    url = api.create_repo(repo_id, private=private, exist_ok=update)
    operations = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
    gone = set(api.list_repo_files(repo_id)) - publication.files.keys() - {".gitattributes"}
    operations += [CommitOperationDelete(name) for name in sorted(gone)]
    message = f"{contents.class_name} by diffusers_dmp {__version__}"
    api.create_commit(repo_id, operations, commit_message=message)
    return Publication(repo_id, publication.files, publication.card, str(url))


def write_card(folder: "str | os.PathLike", license: str | None = None) -> Path:
    """
    Write the model card of what a training has made beside it, as `README.md`.

    Args:
        folder: See [`read_folder`].
        license (`str`, *optional*): The licence of the weights, if it is known.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if the folder holds nothing of this package.
    """
    contents = read_folder(folder)
    dataset = _hub_id(contents.training.get("dataset"))
    name = Path(folder).resolve().name
    card = model_card(contents, contents.path.as_posix(), license, _base_model(contents), dataset, name)
    path = contents.path / "README.md"
    with written_whole(path) as unfinished:
        unfinished.write_text(card, encoding="utf-8")
    return path


def _publication(
    contents: FolderContents, repo_id: str, license: str, base_model: str | None, dataset: str | None
) -> Publication:
    card = model_card(contents, repo_id, license, base_model, dataset)
    files = {
        file.relative_to(contents.path).as_posix(): file
        for file in contents.path.rglob("*")
        if file.suffix in UPLOADED and file.is_file() and not _is_hidden(file.relative_to(contents.path))
    }
    files |= {picture.name: picture for picture in contents.pictures}
    texts = {"README.md": card}
    if contents.training:
        texts[ARGUMENTS] = yaml.safe_dump(published_settings(contents.training), sort_keys=False)
    if contents.evaluation:
        texts[EVALUATION] = json.dumps(published_evaluation(contents), indent=2) + "\n"
    if SYSTEMS[contents.system].is_guidance:
        is_moved = base_model not in (None, contents.config["base_model_name_or_path"])
        moved = {"base_model_name_or_path": base_model, "base_model_revision": None} if is_moved else {}
        texts[MODEL_CONFIG] = dumped(contents.config | moved)
    else:  # the folder holds no code, or that of an older version
        for name, class_name in contents.own_classes.items():
            cls = getattr(diffusers_dmp, class_name)
            experts = read_json(contents.path / name / MODEL_CONFIG).get(EXPERTS_KEY) or []
            parts: list[Any] = package_classes(experts)
            texts[(Path(name) / cls.code_file).as_posix()] = source_of(cls, *parts)
        if contents.is_pipeline and hasattr(diffusers_dmp, contents.class_name):
            cls = getattr(diffusers_dmp, contents.class_name)
            texts[cls.code_file] = source_of(cls)
            texts[PIPELINE_CONFIG] = dumped(with_code_file(lists_as_objects(contents.config), contents.class_name))
    return Publication(repo_id, files | {name: text.encode() for name, text in texts.items()}, card)


def _is_hidden(name: Path) -> bool:
    return any(part.startswith((".", "checkpoint-")) for part in name.parts)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        is_name = repo_id.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise ValueError(f"Expected `repo_id` to be like 'user/name', but got {repo_id!r}.")


def _needs_base_model(contents: FolderContents) -> bool:
    """Whether the Hub has to have the base model: that of guidance experts, if it is loaded by its name."""
    return SYSTEMS[contents.system].is_guidance and not network_is_given(contents)


def _base_model(contents: FolderContents) -> str | None:
    names = [contents.config.get("base_model_name_or_path")]
    names += [contents.training.get(name) for name in ("base_model", "pretrained_model_name_or_path")]
    return next((name for name in map(_hub_id, names) if name), None)


def _hub_id(name: str | None) -> str | None:
    """Return the name if it can be a Hub id and is not that of a local folder or file, else None."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name) else None
