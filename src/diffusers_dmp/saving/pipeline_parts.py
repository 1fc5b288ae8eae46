"""Saved pipelines of Diffusers, of which some components alone are loaded."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from .mixins import is_component


def saved_class(index: Mapping[str, Any]) -> Any:
    """
    Return the class of a saved pipeline; None if Diffusers has no such class.

    Args:
        index (`Mapping`): Its `model_index.json`.
    """
    name = index.get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def load_components(name_or_path: str, is_wanted: Callable[[str], bool], **arguments: Any) -> Any:
    """
    Load a saved pipeline without some of its components, which are None.

    Args:
        name_or_path (`str`): Its folder or Hub id.
        is_wanted (`Callable[[str], bool]`): Whether to load a component, from its name.
        arguments: Further ones of `from_pretrained`, among them components to take instead of those that are saved.

    Returns:
        The pipeline.
    """
    index = DiffusionPipeline.load_config(name_or_path)
    left_out: dict[str, Any] = {
        name: None
        for name, entry in index.items()
        if is_component(entry) and not name.startswith("_") and not is_wanted(name)
    }
    if "requires_safety_checker" in index:  # without it, Diffusers would warn that no safety checker is loaded
        left_out["requires_safety_checker"] = False
    # by its own class: `DiffusionPipeline` loads optional components (Wan's transformers) although they are given
    pipeline_class = saved_class(index) or DiffusionPipeline
    return pipeline_class.from_pretrained(name_or_path, **left_out | arguments)
