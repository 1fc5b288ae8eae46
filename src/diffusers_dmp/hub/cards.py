"""The model card of a published repository: its text, its metadata, and the settings and figures that it shows."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from ..saving.version import __version__
from ..systems import SYSTEMS
from .folders import SAMPLES, FolderContents

# In a checkout `pipelines/`, in an installation `cards/` (setup.py).
_PACKAGE = Path(__file__).parents[1]
CARDS = next(folder for folder in (_PACKAGE / "cards", _PACKAGE.parents[1] / "pipelines") if folder.is_dir())


def model_card(
    contents: FolderContents,
    repo_id: str,
    license: str | None,
    base_model: str | None = None,
    dataset: str | None = None,
    name: str | None = None,
) -> str:
    """
    Render the model card of a repository from `pipelines/<system>/card.md`, and check its metadata.

    Args:
        contents ([`FolderContents`]): What is published.
        repo_id, license, base_model, dataset: See [`publish`]; instead of a repository a folder, whose licence may be unknown.
        name (`str`, *optional*): The title; by default the repository's name.
    """
    from ..models.inputs import has_classes  # here, because it loads the models, which folders do not need

    system = SYSTEMS[contents.system]
    evaluation = published_evaluation(contents)
    task = system.pipeline_tag  # without one, the figures are in the text only: the metadata of each name its task
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=license,
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        tags=["diffusers-dmp", system.key, *system.tags, f"arxiv:{system.paper}"],
        model_name=name or repo_id.rpartition("/")[2],
        eval_results=[_eval_result(result, task) for result in evaluation] or None if task else None,
    )
    pictures = [picture.name for picture in contents.pictures]
    training = published_settings(contents.training)
    shared = _shared_settings(evaluation)
    environment = Environment(loader=FileSystemLoader(CARDS, encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(system.card).render(
        card_data=data.to_yaml(),
        repo_id=repo_id,
        name=data.model_name,
        contents=contents,
        evaluation=evaluation,
        shared=shared,
        shared_yaml=yaml.safe_dump(shared, sort_keys=False) if shared else None,
        network_is_given=network_is_given(contents),
        labels="class_labels=0" if has_classes(contents.num_classes) else "",
        license=license,
        base_model=base_model,
        dataset=dataset or training.get("dataset"),
        paper=f"https://arxiv.org/abs/{system.paper}",
        title=system.paper_title,
        samples=SAMPLES if SAMPLES in pictures else None,
        pictures=[name for name in pictures if name != SAMPLES],
        training=yaml.safe_dump(training, sort_keys=False) if training else None,
        version=__version__,
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    ModelCard(text)  # reads the metadata back
    return text


def network_is_given(contents: FolderContents) -> bool:
    """Tell whether guidance experts are published whose network has to be given, as it is not loaded by its name."""
    if not SYSTEMS[contents.system].is_guidance:
        return False
    from ..guidance.bundle import needs_network  # here, because it loads transformers

    return needs_network(contents.config)


def published_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Select the settings of a training or an evaluation that are published; of paths only the last part, since the rest is private."""
    published = {}
    for name, value in settings.items():
        if value is None or name in ("output_dir", "resume_from_checkpoint"):
            continue
        is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value) or value.count("/") > 1)
        published[name] = Path(value).name if is_path else value
    return published


def published_evaluation(contents: FolderContents) -> list[dict[str, Any]]:
    """Return the evaluation as it is published, without private paths."""
    return [result | {"settings": published_settings(result["settings"])} for result in contents.evaluation]


def _shared_settings(evaluation: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that all figures have in common, which the card shows once; none for a single figure."""
    if len(evaluation) < 2:
        return {}
    first, *others = (result["settings"] for result in evaluation)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _eval_result(result: dict[str, Any], task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=result["dataset"],
        dataset_name=result["dataset"],
        metric_type=result["metric"].partition(",")[0],
        metric_name=result["metric"],
        metric_value=result["value"],
        metric_args=result["settings"],
    )
