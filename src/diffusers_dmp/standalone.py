"""Models and pipelines that bring their code along when they are saved, for those who load them without this package."""

import json
import os
from pathlib import Path
from typing import Any

from packaging.version import Version

from .bundling import source_of
from .naming import PACKAGE
from .version import __version__

VERSION_KEY = f"_{PACKAGE}_version"


class StandaloneMixin:
    """
    For [`ConfigMixin`]s: writes `diffusers_dmp.py` beside the configuration, where Diffusers looks for a class of that library if
    it is not installed, and which version of this package that was. Subclasses from elsewhere are saved without.
    """

    code_file = f"{PACKAGE}.py"
    # bound to the class: Diffusers executes a repository's code once for each component, in one and the same module
    _source_of = staticmethod(source_of)

    def save_config(self, save_directory: "str | os.PathLike", push_to_hub: bool = False, **kwargs) -> None:
        """See [`ConfigMixin.save_config`]."""
        if type(self).__module__ == PACKAGE:
            os.makedirs(save_directory, exist_ok=True)
            Path(save_directory, self.code_file).write_text(self._source_of(type(self)))
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """See [`ConfigMixin.to_json_string`]."""
        return _dumped(json.loads(super().to_json_string()) | {VERSION_KEY: __version__})

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: "str | os.PathLike", **kwargs) -> Any:
        """
        See [`ConfigMixin.load_config`].

        Raises:
            ImportError: if a newer version of this package wrote it.
        """
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        written_by = (loaded[0] if isinstance(loaded, tuple) else loaded).get(VERSION_KEY, __version__)
        if Version(written_by).release[:2] > Version(__version__).release[:2]:
            raise ImportError(
                f"Expected {PACKAGE} {written_by} or newer, by which {str(pretrained_model_name_or_path)!r} was saved, but got "
                f"{__version__}; `pip install --upgrade diffusers-dmp`."
            )
        return loaded


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
            if kwargs["use_safetensors"] and ".safetensors" in str(error):
                raise OSError(
                    f"Expected {str(pretrained_model_name_or_path)!r} to hold weights as safetensors, but got none. Pickled ones are "
                    "converted by `diffusers-dmp convert`, which reads tensors only."
                ) from error
            raise


class StandalonePipelineMixin(StandaloneMixin):
    """And for [`DiffusionPipeline`]s: the file is `pipeline.py`, and `model_index.json` says that the pipeline's class is there."""

    code_file = "pipeline.py"

    def to_json_string(self) -> str:
        """See [`ConfigMixin.to_json_string`]."""
        config = json.loads(super().to_json_string())
        if type(self).__module__ == PACKAGE:
            config["_class_name"] = [Path(self.code_file).stem, config["_class_name"]]
        return _dumped(config)


def _dumped(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
