"""Adapters of PEFT, such as LoRA, inside a model: they change the names of its weights, so it cannot be saved or converted as it is."""

from typing import Any

from torch import nn

LORA_CONFIG = "lora_experts.json"  # what `LoraExperts` saves beside the files of its adapters


def has_adapters(model: nn.Module) -> bool:
    """Tell whether PEFT has put adapters into a model; also those that are fused or switched off count."""
    return any(hasattr(module, "base_layer") for module in model.modules())  # an attribute of all layers of PEFT


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of the adapters in a model's layers, where those of a refused adapter are too."""
    return {
        name
        for module in model.modules()
        for layers in getattr(module, "adapter_layer_names", ())  # an attribute of all layers of PEFT
        for name in getattr(module, layers, {})
    }


def check_no_adapters(model: nn.Module, action: str) -> None:
    """
    Refuse a model with adapters, whose weights have other names and do not hold what it computes.

    Args:
        model (`nn.Module`): The model.
        action (`str`): What the user wants to do, for the message.

    Raises:
        ValueError: if there are adapters.
    """
    if has_adapters(model):
        raise ValueError(
            f"Expected a {type(model).__name__} without adapters (LoRA) to {action}, but got one with some. "
            "`save_lora_adapter(folder)` saves an adapter by itself, `unload_lora()` takes all out, and `fuse_lora()` before "
            "`unload_lora()` puts them into the weights."
        )


def check_component(name: str, component: Any) -> None:
    """
    Refuse a component that PEFT has wrapped: a pipeline calls, saves and loads the model itself.

    Args:
        name (`str`): The component's name in the pipeline.
        component: The component, or None.

    Raises:
        ValueError: if it is a `PeftModel`.
    """
    if any(cls.__module__.startswith("peft.") for cls in type(component).__mro__):
        raise ValueError(
            f"Expected `{name}` to be a model, but got a {type(component).__name__} around one: pass "
            f"`{name}.merge_and_unload()`, or the model itself after its `add_adapter(lora_config)`."
        )
