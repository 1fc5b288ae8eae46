"""The mixin for pipelines: saving with or without code, loading with other components, and sharing components with other pipelines."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from .adapters import check_component, check_no_adapters
from .bundling import BUNDLE_CODE
from .mixins import (
    PIPELINE_FILE,
    VERSION_KEY,
    StandaloneMixin,
    dumped,
    is_component,
    lists_as_objects,
    with_code_file,
)
from .naming import PACKAGE, full_name


class StandalonePipelineMixin(StandaloneMixin):
    """Save a [`DiffusionPipeline`] with or without code, and check that a folder holds the pipeline that is asked for."""

    code_file = PIPELINE_FILE

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            _show_components_without_default(cls.__init__, cls._optional_components)

    def to_json_string(self) -> str:
        """See [`ConfigMixin.to_json_string`]."""
        return dumped(lists_as_objects(json.loads(super().to_json_string())))

    def save_pretrained(
        self, save_directory: "str | os.PathLike", *args, bundle_code: bool = BUNDLE_CODE, **kwargs
    ) -> None:
        """
        See [`DiffusionPipeline.save_pretrained`].

        Args:
            bundle_code (`bool`): Add the code files with which the pipeline is loaded without this package.

        Raises:
            ValueError: if a model is wrapped by PEFT, or there are adapters (LoRA) in it: nobody could load what would be saved.
        """
        for name, component in self.components.items():
            check_component(name, component)
            if isinstance(component, nn.Module):
                check_no_adapters(component, f"save the pipeline's `{name}`")
        super().save_pretrained(save_directory, *args, **kwargs)
        if bundle_code:
            self.save_code(save_directory)

    def save_code(self, save_directory: "str | os.PathLike") -> None:
        """
        Add the code files of the pipeline and its components to a folder, and name the pipeline's in `model_index.json`.

        Args:
            save_directory: The folder that `save_pretrained` wrote.
        """
        super().save_code(save_directory)
        index = Path(save_directory, "model_index.json")
        config = json.loads(index.read_text(encoding="utf-8"))
        for name, value in config.items():
            component = getattr(self, name, None) if is_component(value) and name != "_class_name" else None
            if component is not None and hasattr(component, "save_code"):
                component.save_code(Path(save_directory, name))
        if type(self).__module__ == PACKAGE:
            index.write_text(dumped(with_code_file(config, type(self).__name__)), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: "str | os.PathLike", **kwargs
    ) -> "StandalonePipelineMixin":
        """
        See [`DiffusionPipeline.from_pretrained`].

        Raises:
            ValueError: if a local folder holds no pipeline, or what is loaded is another pipeline.
        """
        folder = str(pretrained_model_name_or_path)
        if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, cls.config_name)):
            raise ValueError(
                f"Expected `pretrained_model_name_or_path` to be a pipeline folder with a {cls.config_name}, "
                f"but got {folder!r}, which has none."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs) -> Any:
        """
        Make a pipeline of the components of another one, which are shared, not copied.

        Args:
            pipeline ([`DiffusionPipeline`]): This package's or Diffusers' own.
            kwargs: Components and settings to use instead of the other pipeline's. Unlike in other pipelines, whose components
                become float32 by default, only a given `dtype` (or `torch_dtype`) casts them, in both pipelines.

        Raises:
            ValueError: if a component is missing.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        shared = dict(pipeline.config) | pipeline.components
        names = inspect.signature(cls.__init__).parameters
        arguments = {name: value for name, value in shared.items() if name in names} | kwargs
        missing = [
            name
            for name, parameter in names.items()
            if parameter.default is parameter.empty and name not in {"self", *cls._optional_components, *arguments}
        ]
        if missing:
            raise ValueError(
                f"Expected a pipeline with {', '.join(missing)} for a {cls.__name__}, but got a {type(pipeline).__name__} with "
                f"{', '.join(sorted(pipeline.components))}; pass `{missing[0]}=…` as well."
            )
        made = cls(**arguments)
        return made if dtype is None else made.to(dtype=dtype)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """See [`ConfigMixin.extract_init_dict`]. Refuses the folder of another pipeline of this package, and models it has no place for."""
        name = config_dict.get("_class_name")
        saved = getattr(diffusers, name, None) if isinstance(name, str) and VERSION_KEY in config_dict else None
        # by name, as the code that comes with a repository defines other classes: see naming.py
        is_other = saved is not None and full_name(saved) not in map(full_name, cls.__mro__)
        if is_other and saved.__module__ == PACKAGE:
            raise ValueError(f"Expected a folder or repository of a {cls.__name__}, but got that of a {name}.")
        # those that it has a place for are not among them
        unknown = [key for key, value in kwargs.items() if isinstance(value, nn.Module)]
        if unknown:
            raise ValueError(
                f"Expected components of a {cls.__name__}, but got {', '.join(f'`{key}`' for key in unknown)}, which it does "
                "not have."
            )
        return super().extract_init_dict(config_dict, **kwargs)


def _show_components_without_default(init: Any, components: list[str]) -> None:
    """
    Show a constructor's optional components to Diffusers as it expects them: without a default, by name.

    `DiffusionPipeline.from_pretrained(folder, vae=…)` tells components from settings by the constructor's signature and by the
    `_optional_components` of the class it is called on. That is the base class: a component with a default would be a setting
    there, and the one from the folder would take its place. The constructor itself still has the defaults.

    Args:
        init (`Callable`): The constructor.
        components (`list[str]`): The names of the optional components.
    """
    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())
    shown = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, annotation=each.annotation)
        for each in parameters
        if each.name in components
    ]
    init.__signature__ = signature.replace(
        parameters=[each for each in parameters if each.name not in components] + shown
    )
