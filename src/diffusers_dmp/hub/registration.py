"""How Diffusers finds this package's classes: the only module that touches how Diffusers loads.

A pipeline's `model_index.json` names its components as `["diffusers_dmp", "DiTModel"]` and itself as `"SNRSplitPipeline"`, or as
`["pipeline", "SNRSplitPipeline"]` where a code file `pipeline.py` lies beside it. Three things are added to Diffusers, and
nothing in it is replaced. It happens when Diffusers is imported, before this package or after it, so that the import of
this package alone takes no time:

- a library is an attribute of `diffusers.pipelines`, where Diffusers looks before it looks for code files;
- a class without a library is an attribute of `diffusers`;
- `["pipeline", "SNRSplitPipeline"]` is read as `"SNRSplitPipeline"` (see [`_read_plain_class_name`]).
"""

import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from packaging.version import Version

from ..saving.naming import PACKAGE

SUPPORTED_MINORS = ("0.40", "0.41", "0.42")  # oldest first; `make test-diffusers` runs the tests with each
_PIPELINE_MODULE = "diffusers.pipelines.pipeline_utils"
_Extend = Callable[[Any], None]  # adds something to a module


def register(package: ModuleType, class_names: list[str]) -> None:
    """
    Make Diffusers' loaders find classes, now or when Diffusers is imported. They are imported when they are first used.

    Args:
        package: The module whose attributes they are.
        class_names (`list[str]`): Models and pipelines.

    Raises:
        ImportError: if Diffusers is older than the oldest supported version.
    """
    _when_imported("diffusers", lambda diffusers: _extend_diffusers(diffusers, package, class_names))


def _extend_diffusers(diffusers: Any, package: ModuleType, class_names: list[str]) -> None:
    """Add the library and its classes to Diffusers."""
    check_diffusers_version(diffusers.__version__)
    setattr(diffusers.pipelines, PACKAGE, package)
    # Diffusers' own classes come first, should it ever have one of these names
    new_names = set(class_names) - set(getattr(diffusers, "__all__", ()))
    diffusers.__getattr__ = _lookup(package, new_names, vars(diffusers).get("__getattr__"))
    _when_imported(
        _PIPELINE_MODULE, lambda module: _read_plain_class_name(vars(module).get("DiffusionPipeline"), new_names)
    )


def check_diffusers_version(installed: str) -> None:
    """
    Refuse a Diffusers that is too old, and warn about one that is not tested.

    Args:
        installed (`str`): Its version.

    Raises:
        ImportError: if it is older than the oldest supported version.
    """
    oldest, newest = SUPPORTED_MINORS[0], SUPPORTED_MINORS[-1]
    release = Version(installed).release
    if release < Version(oldest).release:
        raise ImportError(f"Expected diffusers >= {oldest}, but got {installed}; `pip install --upgrade diffusers`.")
    if ".".join(map(str, release[:2])) not in SUPPORTED_MINORS:
        warnings.warn(
            f"Expected diffusers {oldest} to {newest}, with which diffusers_dmp is tested, but got {installed}. It may work.",
            stacklevel=2,
        )


def _lookup(package: ModuleType, names: set[str], previous: Callable | None) -> Callable[[str], Any]:
    """
    Return a module's `__getattr__` (PEP 562), which Python calls for attributes that the module does not have.

    Args:
        previous (`Callable`, *optional*): Another package's, which is called for all other names.
    """

    def __getattr__(name: str) -> Any:
        if name in names:
            return getattr(package, name)
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")  # Diffusers imports its own classes then

    return __getattr__


def _read_plain_class_name(pipeline_class: Any, names: set[str]) -> None:
    """
    Let `DiffusionPipeline` read `["pipeline", "SNRSplitPipeline"]` in this package's repositories as `"SNRSplitPipeline"`.

    With the list Diffusers takes the class from `pipeline.py`, for which it demands `trust_remote_code=True`, and it calls no
    other code before that. With the string it finds the installed class, and no code of the repository is executed. So the method that
    reads `model_index.json` is added to `DiffusionPipeline`, in front of the one that it inherits from `ConfigMixin`, which is
    called. All other repositories are read as before; and should a version of Diffusers not call it, it does what it does
    without this package: ask for trust.
    """

    def _dict_from_json_file(cls, *args, **kwargs) -> Any:
        from ..saving.mixins import VERSION_KEY

        config = super(pipeline_class, cls)._dict_from_json_file(*args, **kwargs)
        if isinstance(config, dict) and VERSION_KEY in config:
            match config.get("_class_name"):
                case ["pipeline", str(name)] if name in names:
                    return config | {"_class_name": name}
        return config

    if hasattr(pipeline_class, "_dict_from_json_file") and "_dict_from_json_file" not in vars(pipeline_class):
        pipeline_class._dict_from_json_file = classmethod(_dict_from_json_file)


def _when_imported(name: str, extend: _Extend) -> None:
    """Call a function with a module: now, or after its first import."""
    if name in sys.modules:
        extend(sys.modules[name])
        return

    class Finder(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            if fullname != name:
                return None
            others = (each for each in sys.meta_path if each is not self and hasattr(each, "find_spec"))
            spec = next(filter(None, (each.find_spec(fullname, path, target) for each in others)), None)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module: ModuleType) -> None:
                    execute(module)
                    if self in sys.meta_path:
                        sys.meta_path.remove(self)
                        extend(sys.modules[name])  # Diffusers puts another object there than `module`

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder())
