"""Load LoRA files into a denoiser, check that all of each file arrived, and take them out again without a trace."""

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft, get_peft_kwargs
from safetensors import safe_open
from torch import nn

from ..saving.adapters import adapter_names
from ..saving.weight_files import read_safetensors
from .adapter_switch import adapter_layers, adapters_of_layer
from .lora_files import adapter_settings

logger = logging.getLogger(__name__)

_IS_LOADED = (
    "_hf_peft_config_loaded"  # an attribute that Diffusers' `load_lora_adapter` sets, private and never deleted
)
# what a damaged or unsuitable file leads to in Diffusers, PEFT and PyTorch
_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def component_of(denoiser: nn.Module) -> str:
    """Return the name that a denoiser has in pipelines and LoRA files: 'unet' or 'transformer'."""
    return "unet" if any("UNet" in cls.__name__ for cls in type(denoiser).__mro__) else "transformer"


class LoadedLoras:
    """
    LoRA files that are loaded into a denoiser.

    Their weights require gradients, and those of the denoiser do not, as after `load_lora_weights`.

    Args:
        denoiser (`nn.Module`): The denoiser.
        pipeline ([`DiffusionPipeline`], *optional*): The pipeline that it is part of, which converts other layouts.
    """

    def __init__(self, denoiser: nn.Module, pipeline: DiffusionPipeline | None = None):
        self.denoiser: Any = denoiser
        self.names: list[str] = []
        self._pipeline: Any = pipeline
        self._prefix = component_of(denoiser)
        self._modules = set(denoiser.modules())
        self._active = {layer: list(layer.active_adapters) for layer in adapter_layers(denoiser)}
        self._required = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
        self._attributes = {
            name: vars(denoiser)[name] for name in ("peft_config", _IS_LOADED) if name in vars(denoiser)
        }

    def load(self, path: "str | os.PathLike", name: str) -> None:
        """
        Load a file.

        Args:
            path: A safetensors file, in Diffusers' layout; with a pipeline, in any layout that its `load_lora_weights` reads.
            name (`str`): The adapter's name.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged or in another layout, a part of it fits nothing in the denoiser or is missing, or there is
                an adapter of this name already.
        """
        class_name = type(self.denoiser).__name__
        if name in adapter_names(self.denoiser):
            raise ValueError(
                f"Expected the {class_name} to have no adapter {name!r} yet, but got one; `delete_adapters({name!r})` removes it."
            )
        state_dict, alphas, settings = self._read(path)
        self._check_modules(state_dict, path)
        self.names.append(name)
        try:
            if isinstance(self.denoiser, PeftAdapterMixin):
                self.denoiser.load_lora_adapter(
                    {f"{self._prefix}.{key}": tensor for key, tensor in state_dict.items()},
                    prefix=self._prefix,
                    adapter_name=name,
                    network_alphas=alphas,
                    metadata=settings and {f"{self._prefix}.{key}": value for key, value in settings.items()},
                    low_cpu_mem_usage=True,  # or else random weights are made first
                    _pipeline=self._pipeline,  # whose offloading hooks are removed meanwhile; as its own method does
                )
            else:
                _inject(self.denoiser, state_dict, settings, name)
            loaded = _state_dict_of(self.denoiser, name)
        except _ERRORS as error:
            raise ValueError(
                f"Expected {str(path)!r} to fit a {class_name}, but got {' '.join(str(error).split())[:300]}."
            ) from error
        missing, unexpected = sorted(loaded.keys() - state_dict.keys()), sorted(state_dict.keys() - loaded.keys())
        if missing or unexpected:
            reason = f"{missing[0]!r} is missing" if missing else f"{unexpected[0]!r} fits nothing in it"
            raise ValueError(f"Expected {str(path)!r} to fit a {class_name}, but {reason}.")
        self._finish()

    def remove(self) -> None:
        """Take the adapters out, and restore the denoiser as it was before."""
        for name, layer in list(self.denoiser.named_modules()):
            is_new = hasattr(layer, "adapter_layer_names") and layer not in self._active
            if is_new and adapters_of_layer(layer) <= set(self.names):
                parent, _, child = name.rpartition(".")
                setattr(self.denoiser.get_submodule(parent), child, layer.get_base_layer())
        for layer in adapter_layers(self.denoiser):
            if layer in self._active:
                layer.set_adapter([name for name in self._active[layer] if name in adapters_of_layer(layer)])
        if isinstance(self.denoiser, PeftAdapterMixin):
            self.denoiser.delete_adapters(self.names)
        else:
            for name in self.names:
                for layer in adapter_layers(self.denoiser):
                    layer.delete_adapter(name)
                getattr(self.denoiser, "peft_config", {}).pop(name, None)
        attributes = vars(self.denoiser)
        if not attributes.get("peft_config"):
            attributes.pop("peft_config", None)
        attributes.pop(_IS_LOADED, None)
        attributes.update(self._attributes)
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        self.names = []

    def _read(self, path: "str | os.PathLike") -> tuple[dict[str, torch.Tensor], Any, dict[str, Any] | None]:
        """The weights by the names that PEFT has for them in the denoiser, their alphas and their settings."""
        # copies: the weights in a file are not aligned, with which products of matrices are rounded otherwise
        state_dict = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
        with safe_open(path, framework="pt") as file:
            settings = adapter_settings(file.metadata() or {}, path)
        modules = dict(self.denoiser.named_modules())
        if state_dict and all(
            _module_name(key) in modules for key in state_dict
        ):  # `save_lora_adapter` writes no prefix
            return state_dict, None, settings
        alphas = None
        if hasattr(self._pipeline, "lora_state_dict"):
            state_dict, alphas = self._converted(state_dict, path)
        prefix = f"{self._prefix}."
        others = [key for key in state_dict if not key.startswith(prefix)]
        unknown = [key for key in others if not key.startswith("text_encoder")]
        if unknown or len(others) == len(state_dict):
            hint = "" if self._pipeline is not None else "; attach to the pipeline, which converts other layouts"
            raise ValueError(
                f"Expected {str(path)!r} to be a LoRA of a {type(self.denoiser).__name__}, whose names begin with {prefix!r}, but "
                f"got {next(iter([*unknown, *others]), 'no weights')!r}{hint}."
            )
        if others:
            logger.warning(
                "%s also adapts a text encoder, which no noise level belongs to: that part is not loaded.",
                Path(path).name,
            )
        state_dict = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if not any("lora_A" in key for key in state_dict):
            state_dict = convert_unet_state_dict_to_peft(state_dict)
        if settings is not None:
            settings = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        return state_dict, alphas, settings or None

    def _converted(self, state_dict: dict[str, torch.Tensor], path: "str | os.PathLike") -> tuple[dict, Any]:
        """The weights in Diffusers' layout, and the alphas by module where the weights are not scaled by them."""
        arguments: dict[str, Any] = {"unet_config": self.denoiser.config} if self._prefix == "unet" else {}
        if "return_alphas" in inspect.signature(self._pipeline.lora_state_dict).parameters:
            arguments["return_alphas"] = True
        try:
            converted = self._pipeline.lora_state_dict(state_dict, **arguments)
        except _ERRORS as error:
            raise ValueError(
                f"Expected {str(path)!r} to be a LoRA that a {type(self._pipeline).__name__} reads, but got "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}."
            ) from error
        return converted if isinstance(converted, tuple) else (converted, None)

    def _check_modules(self, state_dict: Mapping[str, torch.Tensor], path: "str | os.PathLike") -> None:
        modules = dict(self.denoiser.named_modules())
        unknown = [key for key in state_dict if _module_name(key) not in modules]
        if unknown:
            raise ValueError(
                f"Expected {str(path)!r} to be a LoRA of a {type(self.denoiser).__name__}, but it has no {_module_name(unknown[0])!r} "
                f"({len(unknown)} of {len(state_dict)} weights fit nothing in it)."
            )

    def _finish(self) -> None:
        """Put new modules into the denoiser's mode, as PEFT makes them for training, and let all adapters require gradients."""
        for module in self.denoiser.modules():
            if module not in self._modules:
                module.training = self.denoiser.training
        own = {parameter for name in self.names for parameter in _parameters_of(self.denoiser, name)}
        for parameter in own:
            parameter.requires_grad_(True)


def _inject(denoiser: Any, state_dict: dict[str, torch.Tensor], settings: dict[str, Any] | None, name: str) -> None:
    """Load an adapter into a model without Diffusers' `load_lora_adapter`."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if settings is None:
        ranks = {
            f"^{key}": tensor.shape[1] for key, tensor in state_dict.items() if "lora_B" in key and tensor.ndim > 1
        }
        settings = get_peft_kwargs(ranks, network_alpha_dict=None, peft_state_dict=state_dict)
    config = LoraConfig(**settings)
    inject_adapter_in_model(config, denoiser, name, state_dict=state_dict, low_cpu_mem_usage=True)
    set_peft_model_state_dict(denoiser, state_dict, name, low_cpu_mem_usage=True)


def _state_dict_of(denoiser: Any, name: str) -> dict[str, torch.Tensor]:
    """The weights of an adapter, by their names without its own."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(denoiser, adapter_name=name)


def _parameters_of(denoiser: Any, name: str) -> list[nn.Parameter]:
    found = []
    for layer in adapter_layers(denoiser):
        for attribute in layer.adapter_layer_names:
            part = getattr(layer, attribute, {})
            if name in part:
                found += [part[name]] if isinstance(part[name], nn.Parameter) else list(part[name].parameters())
    return found


def _module_name(key: str) -> str:
    """The module that a weight of PEFT adapts."""
    return key.partition(".lora_")[0]
