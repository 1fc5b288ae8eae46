"""Mixins for models (and pipelines): they save the package's version, and on request the code that loads them without the package."""

import json
import os
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from packaging.version import Version

from .adapters import check_no_adapters
from .bundling import BUNDLE_CODE, source_of
from .naming import PACKAGE
from .version import __version__
from .weight_files import check_saved_folder, expect_all_loaded

VERSION_KEY = f"_{PACKAGE}_version"
PIPELINE_FILE = "pipeline.py"

# What a mixin is mixed into defines the methods that it extends; type checkers do not know that.
_Extended: Any = object


def check_version(config: dict[str, Any]) -> None:
    """
    Check that this version of the package is new enough to read a saved configuration.

    Args:
        config (`dict`): A `config.json` or `model_index.json`.

    Raises:
        ImportError: if a newer minor version of this package saved it.
    """
    saved_by = config.get(VERSION_KEY, __version__)
    if Version(saved_by).release[:2] > Version(__version__).release[:2]:
        raise ImportError(
            f"Expected {PACKAGE} {saved_by} or newer, which saved this {config.get('_class_name', 'repository')}, but got "
            f"{__version__}; `pip install --upgrade diffusers-dmp`."
        )


class VersionedMixin(_Extended):
    """Save the version of this package with a [`ConfigMixin`], and refuse to load what a newer version saved."""

    def to_json_string(self) -> str:
        """See [`ConfigMixin.to_json_string`]."""
        return dumped(json.loads(super().to_json_string()) | {VERSION_KEY: __version__})

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """See [`ConfigMixin.extract_init_dict`], which every way of loading calls."""
        check_version(config_dict)
        return super().extract_init_dict(config_dict, **kwargs)


class StandaloneMixin(VersionedMixin):
    """
    Save the code of a class beside its configuration, for those who load it without this package.

    The file is `diffusers_dmp.py`, where Diffusers looks for a class of a library that is not installed. Subclasses defined
    outside this package are saved without code.
    """

    code_file = f"{PACKAGE}.py"
    # Bound to the class: Diffusers executes the code of all components in modules of one name.
    _source_of = staticmethod(source_of)

    def save_code(self, save_directory: "str | os.PathLike") -> None:
        """
        Add code files to a folder that `save_pretrained` wrote.

        Args:
            save_directory: The folder.
        """
        if type(self).__module__ == PACKAGE:
            code = self._source_of(type(self), *self._parts_with_code())  # type: ignore[arg-type]  # mypy takes a class for unhashable
            Path(save_directory, self.code_file).write_text(code, encoding="utf-8")

    def _parts_with_code(self) -> list[type]:
        """The classes of parts that the code file has to hold as well, in a fixed order."""
        return []

    def _upload_folder(self, working_dir: "str | os.PathLike", *args, **kwargs) -> Any:
        """Add code files to every upload: Diffusers calls this in `push_to_hub` and `save_pretrained(push_to_hub=True)`."""
        self.save_code(working_dir)
        return super()._upload_folder(working_dir, *args, **kwargs)


class StandaloneModelMixin(StandaloneMixin):
    """Save a [`ModelMixin`] with or without code, and load pickled weights only if `use_safetensors` is False."""

    def save_pretrained(
        self,
        save_directory: "str | os.PathLike",
        is_main_process: bool = True,
        *args,
        bundle_code: bool = BUNDLE_CODE,
        **kwargs,
    ) -> None:
        """
        See [`ModelMixin.save_pretrained`].

        Args:
            bundle_code (`bool`): Add the code file with which the model is loaded without this package.

        Raises:
            ValueError: if there are adapters (LoRA) in the model: nobody could load what would be saved.
        """
        check_no_adapters(self, "save it")
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if bundle_code and is_main_process:
            self.save_code(save_directory)

    # for `inspect.signature`, by which a pipeline learns what the `save_pretrained` of its components accepts
    save_pretrained.__wrapped__ = ModelMixin.save_pretrained  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "str | os.PathLike", **kwargs) -> Any:
        """
        See [`ModelMixin.from_pretrained`].

        Raises:
            OSError: if there are no weights, or pickled ones only, and `use_safetensors` is not False.
            ValueError: if a file of a local folder is damaged, or a weight is missing; it is named.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        check_saved_folder(folder, components=False)
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except OSError as error:
            if kwargs["use_safetensors"] and list(folder.glob("*.bin")):
                raise OSError(
                    f"Expected {str(folder)!r} to hold weights as safetensors, but got pickled ones; `diffusers-dmp convert` "
                    "makes safetensors of them, and reads tensors only."
                ) from error
            raise
        expect_all_loaded(info, folder)
        return (model, info) if wants_info else model


def lists_as_objects(config: dict[str, Any]) -> dict[str, Any]:
    """
    Turn lists that are no components into objects by index, since a download takes every list for a component.

    Args:
        config (`dict`): A pipeline's configuration.

    Returns:
        `dict`: What `model_index.json` holds; [`listed`] reads the lists back.
    """
    return {
        name: dict(enumerate(value))
        if isinstance(value, list) and name != "_class_name" and not is_component(value)
        else value
        for name, value in config.items()
    }


def with_code_file(config: dict[str, Any], class_name: str) -> dict[str, Any]:
    """
    Name the code file in which Diffusers finds a pipeline's class: `["pipeline", "SNRSplitPipeline"]`.

    Args:
        config (`dict`): A `model_index.json`.
        class_name (`str`): The pipeline's class.
    """
    return config | {"_class_name": [Path(PIPELINE_FILE).stem, class_name]}


def is_component(value: Any) -> bool:
    """
    Tell whether an entry of `model_index.json` is a component.

    Args:
        value: Such as ["diffusers", "DDIMScheduler"], or [null, null] for one that is left out.
    """
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or value == [None, None]:
        return is_pair
    return all(isinstance(part, str) for part in value) and value[1][:1].isupper()


def listed(values: "list | dict[str, Any] | None") -> "list | None":
    """Read back a list that [`lists_as_objects`] turned into an object by index."""
    return [values[str(index)] for index in range(len(values))] if isinstance(values, dict) else values


def dumped(config: dict[str, Any]) -> str:
    """Format a configuration as the text of its JSON file."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
