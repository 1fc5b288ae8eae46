"""Models and pipelines that bring their code along when they are saved, for those who load them without this package."""

import json
import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from packaging.version import Version

from .bundling import source_of
from .naming import PACKAGE
from .version import __version__

VERSION_KEY = f"_{PACKAGE}_version"
PIPELINE_FILE = "pipeline.py"

# The pipeline class whose `from_pretrained` is under way, which Diffusers does not tell those who find classes for it.
asked_for: "ContextVar[type | None]" = ContextVar("asked_for", default=None)


def check_version(config: dict[str, Any]) -> None:
    """
    Raises:
        ImportError: if a newer version of this package saved what has this configuration.
    """
    saved_by = config.get(VERSION_KEY, __version__)
    if Version(saved_by).release[:2] > Version(__version__).release[:2]:
        raise ImportError(
            f"Expected {PACKAGE} {saved_by} or newer, which saved this {config.get('_class_name', 'repository')}, but got "
            f"{__version__}; `pip install --upgrade diffusers-dmp`."
        )


class VersionedMixin:
    """For [`ConfigMixin`]s: saves which version of this package they are of, and refuses a newer one's."""

    def to_json_string(self) -> str:
        """See [`ConfigMixin.to_json_string`]."""
        return dumped(json.loads(super().to_json_string()) | {VERSION_KEY: __version__})

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """See [`ConfigMixin.extract_init_dict`], which all loading goes through."""
        check_version(config_dict)
        return super().extract_init_dict(config_dict, **kwargs)


class StandaloneMixin(VersionedMixin):
    """
    And writes `diffusers_dmp.py` beside the configuration, where Diffusers looks for a class of that library if it is not
    installed. Subclasses from elsewhere are saved without.
    """

    code_file = f"{PACKAGE}.py"
    # bound to the class: Diffusers executes a repository's code once for each component, in one and the same module
    _source_of = staticmethod(source_of)

    def save_config(self, save_directory: "str | os.PathLike", push_to_hub: bool = False, **kwargs) -> None:
        """See [`ConfigMixin.save_config`]."""
        if type(self).__module__ == PACKAGE:
            os.makedirs(save_directory, exist_ok=True)
            Path(save_directory, self.code_file).write_text(self._source_of(type(self)), encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **kwargs)


class StandaloneModelMixin(StandaloneMixin):
    """And for [`ModelMixin`]s: reads no pickles unless it is told to."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "str | os.PathLike", **kwargs) -> "StandaloneModelMixin":
        """
        See [`ModelMixin.from_pretrained`].

        Raises:
            OSError: if there are no weights, or pickled ones only, and `use_safetensors` is not False.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if kwargs["use_safetensors"] and list(folder.glob("*.bin")):
                raise OSError(
                    f"Expected {str(folder)!r} to hold weights as safetensors, but got pickled ones; `diffusers-dmp convert` "
                    "makes safetensors of them, and reads tensors only."
                ) from error
            raise


class StandalonePipelineMixin(StandaloneMixin):
    """And for [`DiffusionPipeline`]s: the file is `pipeline.py`, and `model_index.json` says that the pipeline's class is there."""

    code_file = PIPELINE_FILE

    def to_json_string(self) -> str:
        """See [`ConfigMixin.to_json_string`]."""
        config = json.loads(super().to_json_string())
        return dumped(pipeline_config(config) if type(self).__module__ == PACKAGE else config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: "str | os.PathLike", **kwargs
    ) -> "StandalonePipelineMixin":
        """
        See [`DiffusionPipeline.from_pretrained`].

        Raises:
            ValueError: if a local folder holds no pipeline, or another one.
        """
        folder = str(pretrained_model_name_or_path)
        if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, cls.config_name)):
            raise ValueError(
                f"Expected `pretrained_model_name_or_path` to be a pipeline folder with a {cls.config_name}, "
                f"but got {folder!r}, which has none."
            )
        token = asked_for.set(cls)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            asked_for.reset(token)


def pipeline_config(config: dict[str, Any]) -> dict[str, Any]:
    """
    As `model_index.json` has it: the pipeline's class is that of its code file, and lists that are no components are objects by
    index, since the Hub's downloads take every list for a component.
    """
    settings = {
        name: dict(enumerate(value)) if isinstance(value, list) and not is_component(value) else value
        for name, value in config.items()
        if name != "_class_name"
    }
    return settings | {"_class_name": [Path(PIPELINE_FILE).stem, config["_class_name"]]}


def is_component(value: Any) -> bool:
    """Whether an entry of `model_index.json` is one, such as ["diffusers", "DDIMScheduler"], or left out, [null, null]."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or value == [None, None]:
        return is_pair
    return all(isinstance(part, str) for part in value) and value[1][:1].isupper()


def listed(values: "list | dict[str, Any] | None") -> "list | None":
    """The list that an object by index stands for."""
    return [values[str(index)] for index in range(len(values))] if isinstance(values, dict) else values


def dumped(config: dict[str, Any]) -> str:
    """A configuration's file."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
