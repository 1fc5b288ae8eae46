"""What lies in a folder: a pipeline, model, patch or guidance experts, and what the training that made it left beside it."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from ..intervals import NoiseIntervals
from ..models.inputs import class_count
from ..saving.mixins import VERSION_KEY, is_component, listed
from ..saving.naming import PACKAGE

PIPELINE_CONFIG, MODEL_CONFIG = "model_index.json", "config.json"
ARTEFACTS = ("pipeline", "experts", "patch")  # in a training's `output_dir`
ARGUMENTS, SUMMARY, EVALUATION = "training_arguments.yaml", "training_summary.json", "evaluation.json"
SAMPLES = "samples.png"
PICTURES = (SAMPLES, "routing.png", "mixing.png", "training_share.png", "gates.png", "prompt_usage.png", "snr_split.png",
            "ddim25.png", "ddpm50.png")  # fmt: skip
SYSTEMS = {  # by class; of several in a pipeline the first counts
    "GuidanceExperts": "ppap",
    "PromptPatch": "dmp",
    "SNRSplitPipeline": "patch_diffusion",
    "PatchedUNet2DModel": "patch_diffusion",
    "RemixDiTModel": "remix",
    "DTRTransformer2DModel": "dtr",
    "DiTModel": "dit",
}
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class FolderContents:
    """
    Args:
        path (`Path`): Of the pipeline, model, patch or experts.
        config (`dict`): Its `model_index.json` or `config.json`.
        class_name (`str`): What it is.
        system (`str`): One of [`SYSTEMS`].
        training (`dict`): The training's arguments; empty if they are not there.
        evaluation (`list[dict]`): Each with `metric`, `value`, `dataset` and `settings`.
        pictures (`list[Path]`): That were drawn after the training.
    """

    path: Path
    config: dict[str, Any]
    class_name: str
    system: str
    training: dict[str, Any]
    evaluation: list[dict[str, Any]]
    pictures: list[Path]

    @property
    def is_pipeline(self) -> bool:
        """Whether it has components, not weights of its own."""
        return (self.path / PIPELINE_CONFIG).is_file()

    @property
    def components(self) -> dict[str, str]:
        """Of a pipeline: the class of each, by its folder's name."""
        return {name: value[1] for name, value in self._entries().items()}

    @property
    def own_classes(self) -> dict[str, str]:
        """The models of this package, by the folder that each is saved in, '.' for the one that it is itself."""
        if not self.is_pipeline:
            return {".": self.class_name}
        return {name: class_name for name, (library, class_name) in self._entries().items() if library == PACKAGE}

    @property
    def num_classes(self) -> int | None:
        """Of a pipeline: how many classes it can be asked for; None if it takes no labels."""
        for name in self.components:
            config = self.path / name / MODEL_CONFIG
            if config.is_file():
                count = class_count(read_json(config))
                if count is not None:
                    return count
        return None

    def num_parameters(self) -> int | None:
        """As the weights' files say, which are not loaded; None if they are not there. Of variants the first counts."""
        folders = {}
        for file in sorted(self.path.rglob("*.safetensors")):
            folders.setdefault(file.parent, {}).setdefault(_variant(file), []).append(file)
        total = 0
        for variants in folders.values():
            for file in variants[min(variants)]:
                with safe_open(file, "pt") as weights:
                    total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.offset_keys())
        return total or None

    def intervals(self) -> str | None:
        """Who owns which noise, in words; None for a model of one part."""
        configs = [read_json(self.path / name / MODEL_CONFIG) for name in self.own_classes]
        for config in [self.config, *configs]:
            boundaries = listed(config.get("snr_boundaries"))
            if boundaries:
                return f"{len(boundaries) + 1} denoisers, bounded by the signal-to-noise ratio {_listing(boundaries)}"
            if (config.get("num_experts") or 1) > 1:
                edges = NoiseIntervals.uniform(config["num_experts"], config["num_train_timesteps"]).edges
                return f"{config['num_experts']} experts, from the timestep {_listing(edges[:-1])}"
        return None

    def summary(self) -> dict[str, Any]:
        """For people: what is there, by what name it goes."""
        rows = {
            "system": self.system,
            "class": self.class_name,
            "components": self.components or None,
            "intervals": self.intervals(),
            "parameters": self.num_parameters(),
            "saved by": f"{PACKAGE} {self.config[VERSION_KEY]}" if VERSION_KEY in self.config else None,
            "base model": self.config.get("base_model_name_or_path"),
            "training": self.training or None,
            "evaluation": self.evaluation or None,
        }
        return {name: value for name, value in rows.items() if value is not None}

    def _entries(self) -> dict[str, list[str]]:
        """Library and class of each component."""
        return {
            name: value
            for name, value in self.config.items()
            if self.is_pipeline and is_component(value) and value != [None, None] and not name.startswith("_")
        }


def read_folder(folder: "str | os.PathLike") -> FolderContents:
    """
    Look into a folder.

    Args:
        folder: A training's `output_dir`, that of a pipeline, model, patch or experts, or a repository that was published.

    Raises:
        ValueError: if there is nothing of this package in it, or one of its files is broken.
    """
    folder = Path(folder)
    for path in (*(folder / name for name in ARTEFACTS), folder):
        for config_name in (PIPELINE_CONFIG, MODEL_CONFIG):
            if (path / config_name).is_file():
                return _contents(path, read_json(path / config_name), _records(path))
    raise ValueError(
        f"Expected `folder` to hold a {PIPELINE_CONFIG} or {MODEL_CONFIG}, itself or in {', '.join(ARTEFACTS)}, but got "
        f"{str(folder)!r}, which has none."
    )


def expect_no_pickles(contents: FolderContents) -> None:
    """
    Raises:
        ValueError: if weights are pickled; they are named.
    """
    pickled = [
        os.path.relpath(os.path.join(folder, name), contents.path)
        for folder, _, names in os.walk(contents.path, followlinks=True)
        for name in names
        if name.lower().endswith(PICKLES)
    ]
    if pickled:
        raise ValueError(
            f"Expected weights as safetensors, but got {', '.join(sorted(pickled))} in {str(contents.path)!r}; "
            "`diffusers-dmp convert` makes safetensors of them."
        )


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: if it is none, or no object.
    """
    content = _parsed(path)
    if not isinstance(content, dict):
        raise ValueError(f"Expected {str(path)!r} to hold a JSON object, but got {type(content).__name__}.")
    return content


def _records(path: Path) -> Path:
    """Where a training's records lie: beside the pipeline in its `output_dir`, else with it."""
    beside = path.resolve().parent
    was_trained_there = (
        (beside / ARGUMENTS).is_file() or (beside / SUMMARY).is_file() or (beside / EVALUATION).is_file()
    )
    return beside if path.resolve().name in ARTEFACTS and was_trained_there else path


def _contents(path: Path, config: dict[str, Any], records: Path) -> FolderContents:
    class_name = config.get("_class_name")
    class_name = class_name[1] if isinstance(class_name, list) else class_name
    classes = [class_name, *(value[1] for value in config.values() if is_component(value))]
    system = next((system for own, system in SYSTEMS.items() if own in classes), None)
    if system is None:
        raise ValueError(
            f"Expected {str(path)!r} to hold one of {', '.join(SYSTEMS)}, or a pipeline with one, but got {class_name!r}."
        )
    arguments = [each / ARGUMENTS for each in (records, *sorted(records.glob("expert_*")))]
    arguments = next((file for file in arguments if file.is_file()), None)
    evaluation = records / EVALUATION
    return FolderContents(
        path=path,
        config=config,
        class_name=class_name,
        system=system,
        training=_read_yaml(arguments) if arguments else {},
        evaluation=_read_evaluation(evaluation) if evaluation.is_file() else [],
        pictures=[records / name for name in PICTURES if (records / name).is_file()],
    )


def _variant(file: Path) -> str:
    """'' or such as 'fp16', of diffusion_pytorch_model.fp16-00001-of-00002.safetensors."""
    return file.name.removesuffix(".safetensors").partition(".")[2].partition("-")[0]


def _listing(numbers) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of the encoding
        raise ValueError(f"Expected {str(path)!r} to be JSON, but got {error}.") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"Expected {str(path)!r} to be YAML, but got {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {str(path)!r} to hold names and values, but got {type(content).__name__}.")
    return content


def _read_evaluation(path: Path) -> list[dict[str, Any]]:
    results = _parsed(path)
    keys = {"metric", "value", "dataset", "settings"}
    if not isinstance(results, list) or any(not isinstance(each, dict) or each.keys() < keys for each in results):
        raise ValueError(
            f"Expected {str(path)!r} to be a list of results with {', '.join(sorted(keys))}, but got others."
        )
    return results
