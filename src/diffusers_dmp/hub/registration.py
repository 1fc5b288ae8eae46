"""How Diffusers finds this package's classes: the only place that touches its loading.

A pipeline's folder names its components as `["diffusers_dmp", "DiTModel"]`, and itself as `["pipeline", "SNRSplitPipeline"]`.
Without this package Diffusers takes both from the code files beside them, if it is trusted to; with it they are found here:
a library is an attribute of `diffusers.pipelines`, which Diffusers asks first; a class that is named without a library is an
attribute of `diffusers`; and a class that would come out of the code of a repository of this package's is its own.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import diffusers
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import try_to_load_from_cache
from packaging.version import Version

from ..saving.naming import PACKAGE

SUPPORTED_VERSIONS = ("0.42", "0.43")  # from, to (exclusive)


def register(package: ModuleType, class_names: list[str]) -> None:
    """
    Make Diffusers' loaders find classes, which are imported when they are first asked for.

    Args:
        package: Whose attributes they are.
        class_names (`list[str]`): Models and pipelines.

    Raises:
        ImportError: if the installed Diffusers is of another version than those whose loading was tested.
    """
    oldest, first_unsupported = map(Version, SUPPORTED_VERSIONS)
    if not oldest <= Version(diffusers.__version__) < first_unsupported:
        raise ImportError(
            f"Expected diffusers >= {oldest} and < {first_unsupported}, whose loading this package "
            f"extends, but got {diffusers.__version__}."
        )
    setattr(diffusers.pipelines, PACKAGE, package)

    class Diffusers(type(diffusers)):
        """The module, which imports its own classes lazily as well."""

        def __getattr__(self, name: str):
            return getattr(package, name) if name in class_names else super().__getattr__(name)

    diffusers.__class__ = Diffusers

    load_code = dynamic_modules_utils.get_class_from_dynamic_module

    def get_class(pretrained_model_name_or_path, module_file, subfolder=None, class_name=None, **kwargs) -> type:
        if class_name in class_names and _is_of_this_package(pretrained_model_name_or_path, module_file, **kwargs):
            return _asked_for(getattr(package, class_name))
        return load_code(pretrained_model_name_or_path, module_file, subfolder, class_name, **kwargs)

    for name, module in list(sys.modules.items()):  # its own, and those that have imported it by name already
        if name.startswith("diffusers.") and vars(module).get(load_code.__name__) is load_code:
            setattr(module, load_code.__name__, get_class)


def _is_of_this_package(name_or_path, module_file: str, revision=None, cache_dir=None, **kwargs) -> bool:
    """Whether a pipeline's code is what this package saved: others' classes may have the same names."""
    from ..saving.mixins import PIPELINE_FILE, VERSION_KEY

    if module_file != PIPELINE_FILE:
        return False
    index = Path(name_or_path, "model_index.json")
    if not index.is_file():  # on the Hub, from where it was fetched ahead of the code
        index = try_to_load_from_cache(str(name_or_path), index.name, cache_dir=cache_dir, revision=revision)
    return isinstance(index, (str, Path)) and VERSION_KEY in json.loads(Path(index).read_text(encoding="utf-8"))


def _asked_for(found: type) -> type:
    """The subclass whose `from_pretrained` is under way, if it is one of what was found."""
    from ..saving.mixins import asked_for

    asked = asked_for.get()
    if asked is None or issubclass(found, asked):
        return found
    if issubclass(asked, found):
        return asked
    raise ValueError(f"Expected a folder or repository of a {asked.__name__}, but got that of a {found.__name__}.")
