"""Read a folder with a pipeline, model, prompts, LoRA experts or guidance experts, and the records that its training wrote.

Only configurations and the headers of weight files are read: no model is imported or loaded.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..saving.lora_files import LORA_CONFIG
from ..saving.mixins import VERSION_KEY, is_component, listed
from ..saving.naming import EXPERTS_KEY, PACKAGE
from ..saving.reading import parsed_json, read_json, read_yaml
from ..saving.weight_files import safetensors_header
from ..systems import SYSTEMS, owned_timesteps, saved_intervals, system_of_classes
from .lora_info import expert_rows, experts_in_words

PIPELINE_CONFIG, MODEL_CONFIG = "model_index.json", "config.json"
ARTEFACTS = ("pipeline", "experts", "patch", "loras")  # the folders in a training's `output_dir`
ARGUMENTS, SUMMARY, EVALUATION = "training_arguments.yaml", "training_summary.json", "evaluation.json"
SAMPLES = "samples.png"
PICTURES = (SAMPLES, *(f"{name}.png" for system in SYSTEMS.values() for name in system.pictures))
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class FolderContents:
    """
    A folder's content, as far as it is known without loading weights.

    Args:
        path (`Path`): The folder of the pipeline, model, prompts or guidance experts.
        config (`dict`): Its `model_index.json` or `config.json`.
        class_name (`str`): The class that was saved there.
        system (`str`): The key of its record in `systems.SYSTEMS`.
        training (`dict`): The training's arguments; empty if they were not saved.
        evaluation (`list[dict]`): Measured figures, each with `metric`, `value`, `dataset` and `settings`.
        pictures (`list[Path]`): Pictures that were made after the training.
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
        """Whether the folder holds a pipeline with components."""
        return (self.path / PIPELINE_CONFIG).is_file()

    @property
    def is_lora(self) -> bool:
        """Whether the folder holds LoRA experts, which have no code of their own."""
        return self.class_name == "LoraExperts"

    @property
    def components(self) -> dict[str, str]:
        """The class names of a pipeline's components by their folders' names; empty if it is not a pipeline."""
        return {name: value[1] for name, value in self._entries().items()}

    @property
    def own_classes(self) -> dict[str, str]:
        """The class names of this package's models by the folders that they are saved in; '.' is the folder itself."""
        if self.is_lora:
            return {}
        if not self.is_pipeline:
            return {".": self.class_name}
        return {name: class_name for name, (library, class_name) in self._entries().items() if library == PACKAGE}

    @property
    def num_classes(self) -> int | None:
        """The number of classes that a pipeline can generate; None if it takes no labels."""
        from ..models.inputs import class_count  # here, because it loads the models, which `summary` does not need

        for name in self.components:
            config = self.path / name / MODEL_CONFIG
            if config.is_file():
                count = class_count(read_json(config))
                if count is not None:
                    return count
        return None

    def num_parameters(self) -> int | None:
        """The number of parameters from the headers of the weight files; None without any. Of several variants one is counted."""
        folders: dict[Path, dict[str, list[Path]]] = {}
        for file in sorted(self.path.rglob("*.safetensors")):
            folders.setdefault(file.parent, {}).setdefault(_variant(file), []).append(file)
        total = 0
        for variants in folders.values():
            for file in variants[min(variants)]:
                total += sum(math.prod(tensor["shape"]) for tensor in safetensors_header(file).values())
        return total or None

    def intervals(self) -> str | None:
        """Say in words who owns which noise levels; None for a model without experts."""
        if self.is_lora:
            return "; ".join(experts_in_words(self.path))
        configs = [read_json(self.path / name / MODEL_CONFIG) for name in self.own_classes]
        for config in [self.config, *configs]:
            boundaries = listed(config.get("snr_boundaries"))
            if boundaries:
                return f"{len(boundaries) + 1} denoisers, bounded by the signal-to-noise ratio {_listing(boundaries)}"
            intervals = saved_intervals(config)
            if intervals is not None and config.get(EXPERTS_KEY):
                return "; ".join(
                    f"expert {expert}, a {each['_class_name']}, owns the timesteps {owned_timesteps(intervals, expert)}"
                    for expert, each in enumerate(config[EXPERTS_KEY])
                )
            if intervals is not None and intervals.num_experts > 1:
                return f"{intervals.num_experts} experts, whose intervals begin at the timesteps {_listing(intervals.edges[:-1])}"
        return None

    def summary(self) -> dict[str, Any]:
        """Return what is known about the folder, by names for people to read."""
        loras = expert_rows(self.path) if self.is_lora else {}
        rows = {
            "system": self.system,
            "class": self.class_name,
            "components": self.components or None,
            "intervals": None if self.is_lora else self.intervals(),
            **loras,
            "parameters": self.num_parameters(),
            "saved by": f"{PACKAGE} {self.config[VERSION_KEY]}" if VERSION_KEY in self.config else None,
            "base model": self.config.get("base_model_name_or_path"),
            "training": self.training or None,
            "evaluation": self.evaluation or None,
        }
        return {name: value for name, value in rows.items() if value is not None}

    def _entries(self) -> dict[str, list[str]]:
        """The library and class of each component of a pipeline."""
        return {
            name: value
            for name, value in self.config.items()
            if self.is_pipeline and is_component(value) and value != [None, None] and not name.startswith("_")
        }


def read_folder(folder: "str | os.PathLike") -> FolderContents:
    """
    Read what a folder holds.

    Args:
        folder: A training's `output_dir`; the folder of a pipeline, model, prompts, LoRA experts or guidance experts; or a copy
            of a published repository.

    Raises:
        ValueError: if the folder holds nothing of this package, or one of its files cannot be read.
    """
    folder = Path(folder)
    for path in (*(folder / name for name in ARTEFACTS), folder):
        for config_name in (PIPELINE_CONFIG, MODEL_CONFIG, LORA_CONFIG):
            if (path / config_name).is_file():
                return _contents(path, read_json(path / config_name), _records(path))
    raise ValueError(
        f"Expected `folder` to hold a {PIPELINE_CONFIG}, {MODEL_CONFIG} or {LORA_CONFIG}, itself or in {', '.join(ARTEFACTS)}, but got "
        f"{str(folder)!r}, which has none."
    )


def expect_no_pickles(contents: FolderContents) -> None:
    """
    Refuse pickled weights, which can execute code when they are loaded.

    Raises:
        ValueError: if weights are pickled; the message names the files.
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


def _records(path: Path) -> Path:
    """The folder with a training's records: its `output_dir` if the pipeline lies in one, else the pipeline's own folder."""
    beside = path.resolve().parent
    records = (ARGUMENTS, SUMMARY, EVALUATION, f"expert_*/{ARGUMENTS}")
    was_trained_there = any(file.is_file() for name in records for file in beside.glob(name))
    return beside if path.resolve().name in ARTEFACTS and was_trained_there else path


def _contents(path: Path, config: dict[str, Any], records: Path) -> FolderContents:
    class_name: Any = config.get("_class_name")
    class_name = class_name[1] if isinstance(class_name, list) else class_name
    classes = [class_name, *(value[1] for value in config.values() if is_component(value))]
    system = system_of_classes(classes)
    if system is None:
        known = ", ".join(name for each in SYSTEMS.values() for name in each.classes)
        raise ValueError(
            f"Expected {str(path)!r} to hold one of {known}, or a pipeline with one, but got {class_name!r}."
        )
    candidates = [each / ARGUMENTS for each in (records, *sorted(records.glob("expert_*")))]
    arguments = next((file for file in candidates if file.is_file()), None)
    evaluation = records / EVALUATION
    return FolderContents(
        path=path,
        config=config,
        class_name=class_name,
        system=system.key,
        training=read_yaml(arguments) if arguments else {},
        evaluation=_read_evaluation(evaluation) if evaluation.is_file() else [],
        pictures=[records / name for name in PICTURES if (records / name).is_file()],
    )


def _variant(file: Path) -> str:
    """The variant of a weight file: 'fp16' for diffusion_pytorch_model.fp16-00001-of-00002.safetensors, else ''."""
    return file.name.removesuffix(".safetensors").partition(".")[2].partition("-")[0]


def _listing(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _read_evaluation(path: Path) -> list[dict[str, Any]]:
    results = parsed_json(path)
    keys = {"metric", "value", "dataset", "settings"}
    if not isinstance(results, list) or any(not isinstance(each, dict) or each.keys() < keys for each in results):
        raise ValueError(
            f"Expected {str(path)!r} to be a list of results, each with {', '.join(sorted(keys))}, but got something else."
        )
    return results
