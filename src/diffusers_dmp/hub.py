"""Publishing on the Hugging Face Hub what was trained."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader

import diffusers_dmp

from .bundling import source_of
from .folders import MODEL_CONFIG, PIPELINE_CONFIG, FolderContents, expect_no_pickles, read_folder
from .version import __version__

PAPERS = {
    "dit": "2212.09748",
    "dtr": "2310.07138",
    "remix": "2412.05628",
    "dmp": "2405.17825",
    "patch_diffusion": "2207.04316",
    "ppap": "2212.05973",
}
# In a checkout `pipelines/`, in an installation `cards/` (setup.py).
_HERE = Path(__file__).parent
CARDS = next(folder for folder in (_HERE / "cards", _HERE.parents[1] / "pipelines") if folder.is_dir())
SAMPLES = "samples.png"
PIPELINE_TAG = "unconditional-image-generation"
_HOMELESS = (
    "Expected the base model of guidance experts to be on the Hub, without which nobody could load them, but got {!r}; publish it "
    "and give its id as `base_model`."
)


@dataclass(frozen=True)
class Publication:
    """
    What goes up.

    Args:
        repo_id (`str`): Where to.
        files (`dict[str, int]`): Names and sizes in bytes.
        card (`str`): The README.
        url (`str`, *optional*): Of the repository, once it is there.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    url: str | None = None


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
    Upload a pipeline, a model, a patch or guidance experts in one commit: weights, code for those without this package, a
    model card, and the pictures and figures that lie beside them.

    Args:
        folder: See [`read_folder`].
        repo_id (`str`): 'user/name'.
        license (`str`): Of the weights, such as 'apache-2.0', 'mit' or 'cc-by-nc-4.0'.
        private (`bool`): Let only its owners see the repository.
        update (`bool`): Write into a repository that there is already.
        dry_run (`bool`): Only put together what would go up.
        base_model, dataset (`str`, *optional*): Hub ids of what it was made of and trained on; by default what the training's
            arguments say, unless those name folders.
        token (`str`, *optional*): By default that of `hf auth login` or HF_TOKEN.
        endpoint (`str`, *optional*): Another Hub.

    Raises:
        ValueError: if the folder holds nothing of this package, or pickled weights; `repo_id` is no name, or taken and `update`
            is false; there is no token; or guidance experts are of a network that is on the Hub nowhere.
    """
    contents = read_folder(folder)
    expect_no_pickles(contents)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"Expected `repo_id` to be like 'user/name', but got {repo_id!r}: {error}") from error
    base_model = base_model or _base_model(contents)
    if contents.system == "ppap" and base_model is None:
        raise ValueError(_HOMELESS.format(contents.config["base_model_name_or_path"]))
    dataset = dataset or _hub_id(contents.training.get("dataset"))
    card = model_card(contents, repo_id, license, base_model, dataset)
    with tempfile.TemporaryDirectory() as directory:
        staged = Path(directory)
        _stage(contents, staged, base_model)
        (staged / "README.md").write_text(card)
        files = {
            str(file.relative_to(staged)): file.stat().st_size for file in sorted(staged.rglob("*")) if file.is_file()
        }
        publication = Publication(repo_id, files, card)
        if dry_run:
            return publication
        if (token or get_token()) is None:
            raise ValueError(
                "Expected a token to write with, from `hf auth login`, HF_TOKEN or `token`, but got none."
            )
        api = HfApi(endpoint=endpoint, token=token)
        if contents.system == "ppap" and not api.repo_exists(base_model):
            raise ValueError(_HOMELESS.format(base_model))
        if not update and api.repo_exists(repo_id):
            raise ValueError(
                f"Expected `repo_id` to be a new name, or `update` to be true, but got {repo_id!r}, which is taken."
            )
        url = api.create_repo(repo_id, private=private, exist_ok=update)
        message = f"{contents.class_name} by diffusers_dmp {__version__}"
        api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=message)
    return Publication(repo_id, files, card, str(url))


def model_card(
    contents: FolderContents, repo_id: str, license: str, base_model: str | None = None, dataset: str | None = None
) -> str:
    """
    The README of a repository, made of `pipelines/<system>/card.md`; its metadata is checked.

    Args:
        contents ([`FolderContents`]): What is published.
        repo_id, license, base_model, dataset: See [`publish`].
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        license=license,
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        tags=["diffusers-dmp", contents.system, f"arxiv:{PAPERS[contents.system]}"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[_eval_result(result, dataset, contents) for result in contents.evaluation] or None,
    )
    pictures = [picture.name for picture in contents.pictures]
    text = Environment(loader=FileSystemLoader(CARDS), trim_blocks=True, lstrip_blocks=True).get_template(
        f"{contents.system}/card.md"
    ).render(
        card_data=data.to_yaml(),
        repo_id=repo_id,
        name=data.model_name,
        contents=contents,
        license=license,
        base_model=base_model,
        dataset=dataset or contents.training.get("dataset"),
        paper=f"https://arxiv.org/abs/{PAPERS[contents.system]}",
        samples=SAMPLES if SAMPLES in pictures else None,
        pictures=[name for name in pictures if name != SAMPLES],
        training=yaml.safe_dump(_told(contents.training), sort_keys=False) if contents.training else None,
        version=__version__,
    )  # fmt: skip
    ModelCard(text)  # reads the metadata back
    return text


def _stage(contents: FolderContents, folder: Path, base_model: str | None) -> None:
    """All that is to lie in the repository, but for the card."""
    shutil.copytree(
        contents.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "checkpoint-*")
    )
    if contents.system == "ppap":
        _write_config(folder / MODEL_CONFIG, contents.config | {"base_model_name_or_path": base_model})
    else:  # the code of this version: what lies there may be an older one's, or none
        for path, class_name in contents.own_classes().items():
            cls = getattr(diffusers_dmp, class_name)
            (folder / path.relative_to(contents.path) / cls.code_file).write_text(source_of(cls))
        cls = getattr(diffusers_dmp, contents.class_name, None)
        if contents.is_pipeline and cls is not None:
            (folder / cls.code_file).write_text(source_of(cls))
            class_name = [Path(cls.code_file).stem, contents.class_name]
            _write_config(folder / PIPELINE_CONFIG, contents.config | {"_class_name": class_name})
    for picture in contents.pictures:
        shutil.copy(picture, folder)
    if contents.training:
        (folder / "training_arguments.yaml").write_text(yaml.safe_dump(contents.training, sort_keys=False))
    if contents.evaluation:
        (folder / "evaluation.json").write_text(json.dumps(contents.evaluation, indent=2) + "\n")


def _write_config(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _base_model(contents: FolderContents) -> str | None:
    names = [contents.config.get("base_model_name_or_path")]
    names += [contents.training.get(name) for name in ("base_model", "pretrained_model_name_or_path")]
    return next((name for name in map(_hub_id, names) if name), None)


def _hub_id(name: str | None) -> str | None:
    """The name, if it can be one on the Hub and is none of a folder or file."""
    is_id = bool(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return name if is_id and not os.path.exists(name) else None


def _told(training: dict[str, Any]) -> dict[str, Any]:
    """Without paths, which say nothing elsewhere."""
    return {name: value for name, value in training.items() if value is not None and name != "output_dir"}


def _eval_result(result: dict[str, Any], dataset: str | None, contents: FolderContents) -> EvalResult:
    trained_on = dataset or str(contents.training.get("dataset", "unknown"))
    return EvalResult(
        task_type=PIPELINE_TAG,
        dataset_type=trained_on,
        dataset_name=Path(trained_on).name,
        metric_type=result["metric"],
        metric_value=result["value"],
        metric_args=result["settings"],
    )
