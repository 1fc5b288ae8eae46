"""How Diffusers finds this package's classes: the only module that touches how Diffusers loads.

A pipeline's `model_index.json` names its components as `["diffusers_dmp", "DiTModel"]` and itself as `"SNRSplitPipeline"`, or as
`["pipeline", "SNRSplitPipeline"]` where a code file `pipeline.py` lies beside it. Three things are added to Diffusers, and
nothing in it is replaced. Each is added when the module in question is imported, before this package or after it, so that
the import of this package alone takes no time:

- a library is an attribute of `diffusers.pipelines`, where Diffusers looks before it looks for code files;
- a class without a library is an attribute of `diffusers`;
- `["pipeline", "SNRSplitPipeline"]` is read as `"SNRSplitPipeline"` (see [`_read_plain_class_name`]).
"""

import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from packaging.version import Version

from ..saving.naming import PACKAGE

SUPPORTED_MINORS = ("0.40", "0.41", "0.42")  # oldest first; `make test-diffusers` runs the tests with each
_Extend = Callable[[Any], None]  # adds something to a module


def register(package: ModuleType, class_names: list[str]) -> None:
    """
    Make Diffusers' loaders find classes, now or when Diffusers is imported. They are imported when they are first used.

    Args:
        package: The module whose attributes they are.
        class_names (`list[str]`): Models and pipelines.

    Raises:
        ImportError: if the installed Diffusers is older than the oldest supported version.
    """
    with suppress(importlib.metadata.PackageNotFoundError):  # a source tree that is not installed
        check_diffusers_version(importlib.metadata.version("diffusers"))
    names = set(class_names)
    _when_imported(
        {
            "diffusers": lambda module: _add_classes(module, package, names),
            "diffusers.pipelines": lambda module: setattr(module, PACKAGE, package),
            "diffusers.pipelines.pipeline_utils": lambda module: _read_plain_class_name(
                vars(module).get("DiffusionPipeline"), _without_own(names)
            ),
        }
    )


def _add_classes(diffusers: Any, package: ModuleType, names: set[str]) -> None:
    """Let `diffusers` have classes as attributes."""
    diffusers.__getattr__ = _lookup(package, _without_own(names), vars(diffusers).get("__getattr__"))


def _without_own(names: set[str]) -> set[str]:
    """Names without those of Diffusers' own classes, which come first, should it ever have one of them."""
    return names - set(getattr(sys.modules["diffusers"], "__all__", ()))


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
            stacklevel=4,  # the import of this package: its `__init__.py` calls `register`, which calls this function
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


def _when_imported(extensions: Mapping[str, _Extend]) -> None:
    """Call functions with modules (by their names): now, where they are imported already, and after each import."""
    sys.meta_path.insert(0, _Finder(extensions))
    for name, extend in extensions.items():
        if name in sys.modules:
            importlib.import_module(name)  # waits, should another thread be importing it
            extend(sys.modules[name])


class _Finder(MetaPathFinder):
    """Finds modules as the finders after it do; it stays, as a module may be imported again (`importlib.reload`)."""

    def __init__(self, extensions: Mapping[str, _Extend]):
        self.extensions = extensions

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.extensions:
            return None
        finders = [*sys.meta_path]
        later = finders[finders.index(self) + 1 :] if self in finders else []
        specs = (each.find_spec(fullname, path, target) for each in later if hasattr(each, "find_spec"))
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.extensions[fullname])
        return spec


class _Loader(Loader):
    """Another loader, after which a function is called with the module."""

    def __init__(self, loader: Any, extend: _Extend):
        self.loader, self.extend = loader, extend

    def __getattr__(self, name: str) -> Any:  # what else a loader may have: `get_source`, `get_data`
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        imported = sys.modules.get(name, module)
        self.extend(imported)
        if imported is not module:
            # Diffusers has put another object in its place, with which threads that waited for the import do not go on
            module.__getattr__ = lambda key: getattr(imported, key)  # type: ignore[method-assign]
