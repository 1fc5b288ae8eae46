"""Old import paths of moved modules: they work for one more minor version, with a FutureWarning.

A module that moved is a line in `MOVED`. Where a package has taken the name of a module that moved, its `__init__.py` has the line
`__getattr__ = old_names(__name__)`.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .naming import PACKAGE

REMOVED_IN = "0.4"

# Old module → where its names are now: one module, or several, of which the first that has a name counts.
MOVED: "dict[str, str | tuple[str, ...]]" = {  # up to 0.1
    "bundling": "saving.bundling",
    "caching": "models.caching",
    "costs": "evaluation.costs",
    "digits": "evaluation.digits",
    "drawing": "training.data.seeded_sampling",
    "folders": "hub.folders",
    "guidance.preprocessing": "models.vision",
    "hub": ("hub.publishing", "hub.cards"),
    "models.conditions": "models.inputs",
    "models.dit": "models.dit.model",
    "models.dit_layers": "models.dit.layers",
    "models.stock_layout": "models.dit.stock_layout",
    "naming": "saving.naming",
    "patches": "plugins",
    "patches.attachment": "plugins.attachment",
    "patches.kept_gates": "plugins.gate_cache",
    "patches.layouts": "plugins.blocks",
    "patches.prompts": "plugins.prompts",
    "predictions": "diffusion.predictions",
    "registration": "hub.registration",
    "schedulers": "diffusion.schedulers",
    "standalone": ("saving.mixins", "saving.pipeline_mixin"),
    "training.data": ("training.data.images", "training.data.batches"),
    "training.dit": ("training.data.training_data", "training.dit_family"),
    "training.distillation": "training.objectives.distillation",
    "training.generation": "training.data.generation",
    "training.latents": "training.data.latents",
    "training.objective": ("diffusion.variance", "training.objectives.ddpm", "training.objectives.objective"),
    "training.patched": "training.prompted",
    "training.shards": "training.data.shards",
    "training.timesteps": "training.objectives.timesteps",
    "training.weighting": "training.objectives.weighting",
    "vae": "diffusion.latents",
    "version": "saving.version",
}
# Names that have another name now: (old module, old name) → (new module, new name).
MOVED_NAMES: dict[tuple[str, str], tuple[str, str]] = {
    ("drawing", "DrawingArguments"): ("training.data.seeded_sampling", "SeededSamplingArguments"),
    ("drawing", "draw"): ("training.data.seeded_sampling", "sample_seeded"),
    ("drawing", "load_to_draw"): ("training.data.seeded_sampling", "load_sampling_pipeline"),
    ("models", "TaskRouting"): ("models.channel_routing", "ChannelRouting"),  # another class has this name now
    ("patches.kept_gates", "KeptGates"): ("plugins.gate_cache", "GateCache"),
    ("training.objective", "DiffusionObjectiveOutput"): ("training.objectives.objective", "ObjectiveOutput"),
    ("training.patched", "PatchedTransformer"): ("training.prompted", "PromptedTransformer"),
}


def old_names(module: str) -> Callable[[str], Any]:
    """
    Return the `__getattr__` (PEP 562) of a module whose names have moved; it warns about each name that it finds.

    Args:
        module (`str`): The full name of the module.
    """
    old = module.removeprefix(f"{PACKAGE}.")
    targets = _targets(old)

    def __getattr__(name: str) -> Any:
        places = [MOVED_NAMES[old, name]] if (old, name) in MOVED_NAMES else [(target, name) for target in targets]
        for target, new_name in [] if name.startswith("__") else places:
            new_module = importlib.import_module(f"{PACKAGE}.{target}")
            if hasattr(new_module, new_name):
                warnings.warn(
                    f"`{module}.{name}` is now `{PACKAGE}.{target}.{new_name}`; the old path works until {REMOVED_IN}.",
                    FutureWarning,
                    stacklevel=2,
                )
                return getattr(new_module, new_name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def _targets(old: str) -> tuple[str, ...]:
    """Return the modules in which the names of an old one are looked up."""
    targets = MOVED.get(old, ())
    return (targets,) if isinstance(targets, str) else targets


class _OldModules(MetaPathFinder, Loader):
    """Import a moved module as an empty one that looks its names up at their new place."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        old = name.removeprefix(f"{PACKAGE}.")
        is_package_now = any(target.startswith(f"{old}.") for target in _targets(old))
        if old == name or old not in MOVED or is_package_now:
            return None
        return ModuleSpec(name, self, is_package=any(other.startswith(f"{old}.") for other in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = old_names(module.__name__)  # type: ignore[method-assign]


def answer_old_imports() -> None:
    """Look old modules up in the table before the file system, where a leftover folder with `__pycache__` alone is a package, too."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldModules())
