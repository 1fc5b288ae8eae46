"""What lies in a folder: a pipeline, model, patch or guidance experts, and what the training that made it left beside it."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from .intervals import NoiseIntervals
from .naming import PACKAGE
from .standalone import VERSION_KEY

PIPELINE_CONFIG, MODEL_CONFIG = "model_index.json", "config.json"
ARTEFACTS = ("pipeline", "experts", "patch", ".")  # in a training's `output_dir`, or the folder itself
SYSTEMS = {  # by class; of several in a pipeline the first counts
    "GuidanceExperts": "ppap",
    "PromptPatch": "dmp",
    "SNRSplitPipeline": "patch_diffusion",
    "PatchedUNet2DModel": "patch_diffusion",
    "RemixDiTModel": "remix",
    "DTRTransformer2DModel": "dtr",
    "DiTModel": "dit",
}
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class FolderContents:
    """
    Args:
        path (`Path`): Of the pipeline, model, patch or experts.
        config (`dict`): Its `model_index.json` or `config.json`.
        class_name (`str`): What it is.
        system (`str`): One of [`SYSTEMS`].
        training (`dict`): The training's arguments; empty if they are not there.
        evaluation (`list[dict]`): Each with `metric`, `value` and `settings`.
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
        if not self.is_pipeline:
            return {}
        pairs = {name: value for name, value in self.config.items() if _is_class(value) and not name.startswith("_")}
        return {name: class_name for name, (_, class_name) in pairs.items()}

    def own_classes(self) -> dict[Path, str]:
        """The classes of this package, by the folder that each is saved in."""
        found = {self.path / name: own for name, own in self.components.items() if own in SYSTEMS}
        return found if self.is_pipeline else {self.path: self.class_name}

    def num_parameters(self) -> int:
        """As the weights' files say, which are not loaded."""
        total = 0
        for file in sorted(self.path.rglob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.offset_keys()]
            total += sum(math.prod(shape) for shape in shapes)
        return total

    def intervals(self) -> str | None:
        """Who owns which noise, in words; None for a model of one part."""
        configs = [self.config, *(_read_json(folder / MODEL_CONFIG) for folder in self.own_classes())]
        for config in configs:
            if config.get("snr_boundaries"):
                return f"signal-to-noise ratios, bounded by {', '.join(f'{each:g}' for each in config['snr_boundaries'].values())}"
            if (config.get("num_experts") or 1) > 1:
                edges = NoiseIntervals.uniform(config["num_experts"], config["num_train_timesteps"]).edges
                return f"{config['num_experts']} experts, of the timesteps from {', '.join(f'{edge:g}' for edge in edges[:-1])}"
            if config.get("snr_interval"):
                highest, lowest = config["snr_interval"]
                return f"signal-to-noise ratios from {lowest or 0:g} to {highest or '∞'}"
        return None

    def summary(self) -> dict[str, Any]:
        """For people: what is there, by what name it goes."""
        size = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        rows = {
            "system": self.system,
            "class": self.class_name,
            "components": self.components or None,
            "intervals": self.intervals(),
            "parameters": self.num_parameters(),
            "megabytes": round(size / 1e6, 2),
            "saved by": f"{PACKAGE} {self.config[VERSION_KEY]}" if VERSION_KEY in self.config else None,
            "base model": self.config.get("base_model_name_or_path"),
            "training": self.training or None,
            "evaluation": self.evaluation or None,
        }
        return {name: value for name, value in rows.items() if value is not None}


def read_folder(folder: "str | os.PathLike") -> FolderContents:
    """
    Look into a folder.

    Args:
        folder: A training's `output_dir`, or that of a pipeline, model, patch or experts.

    Raises:
        ValueError: if there is nothing of this package in it.
    """
    folder = Path(folder)
    for name in ARTEFACTS:
        for config_name in (PIPELINE_CONFIG, MODEL_CONFIG):
            path = folder / name
            if (path / config_name).is_file():
                return _contents(path, _read_json(path / config_name), folder if name != "." else folder.parent)
    raise ValueError(
        f"Expected `folder` to hold a {PIPELINE_CONFIG} or {MODEL_CONFIG}, itself or in {', '.join(ARTEFACTS[:-1])}, but got "
        f"{str(folder)!r}, which has none."
    )


def expect_no_pickles(contents: FolderContents) -> None:
    """
    Raises:
        ValueError: if weights are pickled; they are named.
    """
    pickled = [str(file.relative_to(contents.path)) for file in contents.path.rglob("*") if file.suffix in PICKLES]
    if pickled:
        raise ValueError(
            f"Expected weights as safetensors, but got {', '.join(sorted(pickled))} in {str(contents.path)!r}; "
            "`diffusers-dmp convert` makes safetensors of them."
        )


def _contents(path: Path, config: dict[str, Any], outputs: Path) -> FolderContents:
    class_name = config.get("_class_name")
    class_name = class_name[1] if isinstance(class_name, list) else class_name
    classes = [class_name, *(value[1] for value in config.values() if _is_class(value))]
    system = next((system for own, system in SYSTEMS.items() if own in classes), None)
    if system is None:
        raise ValueError(
            f"Expected {str(path)!r} to hold one of {', '.join(SYSTEMS)}, or a pipeline with one, but got {class_name!r}."
        )
    records = [outputs, *sorted(outputs.glob("expert_*"))]
    arguments = next(
        (each / "training_arguments.yaml" for each in records if (each / "training_arguments.yaml").is_file()), None
    )
    evaluation = outputs / "evaluation.json"
    return FolderContents(
        path=path,
        config=config,
        class_name=class_name,
        system=system,
        training=yaml.safe_load(arguments.read_text()) if arguments else {},
        evaluation=json.loads(evaluation.read_text()) if evaluation.is_file() else [],
        pictures=sorted(outputs.glob("*.png")),
    )


def _is_class(value: Any) -> bool:
    """Such as ["diffusers", "DDIMScheduler"]; [null, null] is a component that is left out."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {str(path)!r} to be JSON, but got {error}.") from error
