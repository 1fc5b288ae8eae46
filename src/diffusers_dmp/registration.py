"""How Diffusers finds this package's classes: the only place that touches its loading tables.

A pipeline folder names its components as `["diffusers_dmp", "DiTModel"]`. Diffusers looks such a library up as an
attribute of `diffusers.pipelines` first, which needs neither trust in remote code nor code in the repository; and a
class that is named without a library (the pipeline's own, or a model loaded by `AutoModel`) as an attribute of `diffusers`.
"""

import sys

import diffusers
from packaging.version import Version

PACKAGE = __package__
SUPPORTED_VERSIONS = ("0.42", "0.43")  # from, to (exclusive)


def register(*classes: type) -> None:
    """
    Make Diffusers' loaders find `classes`, which the package's top level must export under their own names.

    Raises:
        ImportError: if the installed Diffusers is of another version than those whose loading was tested.
    """
    oldest, first_unsupported = map(Version, SUPPORTED_VERSIONS)
    if not oldest <= Version(diffusers.__version__) < first_unsupported:
        raise ImportError(
            f"Expected diffusers >= {oldest} and < {first_unsupported}, whose loading this package "
            f"extends, but got {diffusers.__version__}."
        )
    setattr(diffusers.pipelines, PACKAGE, sys.modules[PACKAGE])
    for cls in classes:
        # `save_pretrained` takes the library's name from here; a module's own path would not load from the Hub
        cls.__module__ = PACKAGE
        setattr(diffusers, cls.__name__, cls)
