"""Whole denoisers as parts of one model: what they must have in common, and their descriptions in its configuration.

A description is what an expert's own `config.json` would hold, with the library of its class: `{"_library": "diffusers",
"_class_name": "WanTransformer3DModel", "num_layers": 40, …}`.
"""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..intervals import NoiseIntervals
from ..saving.adapters import check_component
from ..saving.naming import EXPERTS_KEY, PACKAGE, full_name
from .time_argument import time_argument_of

LIBRARIES = ("diffusers", PACKAGE)  # whose classes a configuration may name


def check_experts(experts: Sequence[Any], intervals: NoiseIntervals) -> None:
    """
    Check that denoisers can take turns in one pipeline.

    Args:
        experts (`list[ModelMixin]`): The denoisers.
        intervals ([`NoiseIntervals`]): Their intervals.

    Raises:
        ValueError: if their number is not that of the intervals, one of them is no model with a configuration, it is not known
            how one is told the time, or they differ in how they are told the time, in channels, in what they predict or in
            dtype.
    """
    if not hasattr(intervals, "num_experts"):
        raise ValueError(
            f"Expected `intervals` to be NoiseIntervals, such as `NoiseIntervals.from_sigmas([0.875])`, but got {intervals!r}."
        )
    if len(experts) != intervals.num_experts:
        raise ValueError(
            f"Expected as many `experts` as intervals, but got {len(experts)} experts for the {intervals.num_experts} intervals "
            f"with the edges {intervals.edges}."
        )
    for index, expert in enumerate(experts):
        check_component(f"experts[{index}]", expert)
        if not isinstance(expert, ModelMixin) or not hasattr(expert, "config"):
            raise ValueError(
                f"Expected `experts[{index}]` to be a model of Diffusers, with `from_pretrained` and a `config`, but got a "
                f"{type(expert).__name__}."
            )
    _check_equal(experts, "be told the time in the same way", [time_argument_of(expert) for expert in experts])
    _check_equal(experts, "have the same number of input and output channels", [_channels(each) for each in experts])
    _check_equal(
        experts,
        "have the same `prediction_type` in their configuration, which is read once",
        [public_config(expert).get("prediction_type") for expert in experts],  # type: ignore[arg-type]  # just checked
    )
    if not any(getattr(expert, "is_quantized", False) for expert in experts):
        _check_equal(experts, "have the same dtype (`expert.to(dtype)` casts one)", [each.dtype for each in experts])


def description(expert: ModelMixin) -> dict[str, Any]:
    """
    Describe an expert, for [`expert_from_description`].

    Args:
        expert (`ModelMixin`): The expert.

    Returns:
        `dict`: Its configuration, and its class.
    """
    return {
        "_library": type(expert).__module__.partition(".")[0],
        "_class_name": type(expert).__name__,
        **public_config(expert),
    }


def public_config(expert: ModelMixin) -> dict[str, Any]:
    """Return an expert's configuration without what Diffusers notes about this copy of it, and its quantisation."""
    config: Any = expert.config
    return {name: value for name, value in config.items() if name[0] != "_" and name != "quantization_config"}


def class_of_description(described: Mapping[str, Any]) -> type[ModelMixin]:
    """
    Find the class of an expert.

    Args:
        described (`Mapping`): Its description.

    Raises:
        ValueError: if it is no class of Diffusers or this package.
    """
    library, name = described.get("_library"), described.get("_class_name")
    found = _class_in(str(library), str(name))
    if not isinstance(found, type) or not issubclass(found, ModelMixin):
        raise ValueError(
            f"Expected the class of an expert to be a model of {' or '.join(LIBRARIES)}, but got {name!r} of {library!r}."
        )
    return found


def package_classes(descriptions: Sequence[Mapping[str, Any]]) -> list[type[ModelMixin]]:
    """
    Find the classes of this package among those of experts, by name: a code file for those without it has to hold them.

    Args:
        descriptions (`list[Mapping]`): Their descriptions.
    """
    own = {each["_class_name"]: class_of_description(each) for each in descriptions if each["_library"] == PACKAGE}
    return [own[name] for name in sorted(own)]


def expert_from_description(described: Mapping[str, Any]) -> ModelMixin:
    """
    Make an expert with new weights.

    Args:
        described (`Mapping`): Its description.

    Raises:
        ValueError: as [`class_of_description`] does.
    """
    return class_of_description(described).from_config(dict(described))


def descriptions_in(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Return the descriptions of all experts in a configuration.

    Raises:
        ValueError: if it is not the configuration of such a model.
    """
    if not config.get(EXPERTS_KEY):
        raise ValueError(
            f"Expected a folder or repository of a DenoiserExperts, but got that of a {config.get('_class_name', 'model')}."
        )
    return config[EXPERTS_KEY]


def shared_quantizer(experts: Sequence[ModelMixin]) -> Any:
    """
    Return the quantizer of experts that are all quantised in the same way, with which Diffusers saves and loads them as one.

    Returns:
        `DiffusersQuantizer`, or None if they are not.
    """
    quantizers: list[Any] = [getattr(expert, "hf_quantizer", None) for expert in experts]
    if None in quantizers:
        return None
    first, *others = [quantizer.quantization_config.to_dict() for quantizer in quantizers]
    return quantizers[0] if all(other == first for other in others) else None


def check_can_be_loaded(experts: Sequence[ModelMixin]) -> None:
    """
    Check that experts can be loaded again after they were saved.

    Raises:
        ValueError: if a class is not one of Diffusers or this package, experts share weights, or they are not quantised in the
            same way.
    """
    quantised = [getattr(expert, "is_quantized", False) for expert in experts]
    if any(quantised) and shared_quantizer(experts) is None:
        methods = [getattr(expert, "quantization_method", None) for expert in experts]
        raise ValueError(
            f"Expected all `experts` to be quantised in the same way to save them in one model, but got {methods}; "
            "`experts[i].save_pretrained(folder)` saves each by itself."
        )
    for index, expert in enumerate(experts):
        described, name = description(expert), type(expert).__name__
        library = described["_library"]
        found = _class_in(library, name)
        if found is None or full_name(found) != full_name(type(expert)):  # by name: see naming.py
            raise ValueError(
                f"Expected the classes of experts to be those of {' or '.join(LIBRARIES)} to save them in one model, as nobody "
                f"could load it otherwise, but `experts[{index}]` is a {type(expert).__module__}.{name}; "
                f"`experts[{index}].save_pretrained(folder)` saves it by itself."
            )
    parameters = [id(parameter) for expert in experts for parameter in expert.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(
            "Expected experts with weights of their own to save them, but got some that share weights; pass "
            "`copy.deepcopy(expert)`."
        )


def _class_in(library: str, name: str) -> Any:
    """A class of Diffusers or this package; without this package, one of those in the same code file; or None."""
    if library not in LIBRARIES:
        return None
    if library == PACKAGE and name in globals():
        return globals()[name]
    with suppress(ModuleNotFoundError):
        return getattr(importlib.import_module(library), name, None)
    return None


def _channels(expert: Any) -> tuple[int | None, int | None]:
    in_channels, out_channels = expert.config.get("in_channels"), expert.config.get("out_channels")
    return in_channels, in_channels if out_channels is None else out_channels


def _check_equal(experts: Sequence[nn.Module], expected: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"Expected all `experts` to {expected}, but got {values[0]} of `experts[0]`, a {type(experts[0]).__name__}, and "
                f"{value} of `experts[{index}]`, a {type(experts[index]).__name__}."
            )
