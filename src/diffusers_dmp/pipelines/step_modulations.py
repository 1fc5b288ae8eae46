"""The modulations of a DiT's blocks for the steps of a sampling, computed before these steps.
https://arxiv.org/abs/2212.09748

A third of a DiT's weights turn timestep and label into what shifts, scales and gates the tokens of each block. A sampling knows
its timesteps and labels beforehand: one product for many steps reads these weights once, where each step would read them again.

Legend: S steps, B batch, L blocks, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..models.caching import TensorSnapshot
from ..plugins.hooks import functions_around

# attributes of PEFT's layers, and of what it puts around a whole module
_OF_ADAPTERS = ("base_layer", "adapter_layer_names")


class StepModulations:
    """
    Computes the modulations of a denoiser's blocks for ⌊D/B⌋ of its steps at a time, when the first of these begins.

    So they take no more memory than the weights that they are made with: L·6·D·S·B numbers, where there are L·6·D·D weights, a
    third of the model's.

    Args:
        denoiser ([`ModelMixin`]): The model.
        timesteps (`torch.Tensor` of shape (S,)): The timesteps of all steps, on the CPU.
        class_labels (`torch.LongTensor` of shape (B,)): The labels of every step; (1,) for a batch that shares its label.
        device (`torch.device`): The device of the samples.
        steps (`list[int]`): Indices of the steps that the denoiser makes.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        device: torch.device,
        steps: list[int],
    ) -> None:
        self._denoiser: Any = denoiser
        self._class_labels = class_labels
        self._device = device
        self._size = timesteps_at_once(denoiser, len(class_labels))
        # a second-order scheduler calls the denoiser twice at most timesteps
        self._timesteps, places = timesteps[steps].unique_consecutive(return_inverse=True)
        self._places = dict(zip(steps, places.tolist()))
        self._part: int | None = None  # which of the parts of ⌊D/B⌋ timesteps is known
        self._modulations: torch.Tensor | None = None
        self._snapshot: TensorSnapshot | None = None

    def at(self, step: int) -> torch.Tensor | None:
        """
        Return the modulations of a step.

        Args:
            step (`int`): One of `steps`.

        Returns:
            `torch.Tensor` of shape (L, 6, B, 1, D), for the denoiser's `forward`. None if what it needs cannot be known before the
            step, see [`has_fixed_modulations`], or the batch is so large that nothing is gained.
        """
        if self._size < 2:
            return None
        part, index = divmod(self._places[step], self._size)
        if part != self._part:
            self._modulations = None  # first, so that there are never two parts in memory
            self._part = part
            if has_fixed_modulations(self._denoiser, self._device):
                self._snapshot = TensorSnapshot(_weights_of_modulations(self._denoiser))
                timesteps = self._timesteps[part * self._size : (part + 1) * self._size]
                self._modulations = self._denoiser.modulations_at(timesteps, self._class_labels)
        return None if self._modulations is None else self._modulations[index]

    def notice_changes(self) -> None:
        """
        Compute them again if weights were changed, or adapters loaded, since: a callback may do so between two steps.

        Changes that PyTorch does not count are not noticed, such as those through `parameter.data`; see [`TensorSnapshot`].
        """
        if self._snapshot is not None and not self._snapshot.matches(_weights_of_modulations(self._denoiser)):
            self._part = self._snapshot = None


def timesteps_at_once(denoiser: Any, batch_size: int) -> int:
    """
    Compute for how many timesteps modulations take as much memory as the weights that they are made with.

    Args:
        denoiser ([`ModelMixin`]): The model, of any class.
        batch_size (`int`): B, or 1 for a batch that shares its label.

    Returns:
        `int`: ⌊D/B⌋; 0 for a model without modulations.
    """
    if not hasattr(type(unwrap_module(denoiser)), "modulations_at"):
        return 0
    return denoiser.config.num_attention_heads * denoiser.config.attention_head_dim // batch_size


def has_fixed_modulations(denoiser: Any, device: torch.device) -> bool:
    """
    Tell whether the modulations of a DiT depend on timestep and label alone, and can be computed where its samples are.

    They may not, if the model is in training mode, which drops labels; has adapters (LoRA) in one of the layers concerned, which
    may be switched or scaled between two steps; is offloaded; or has hooks that may change the timestep or the conditioning.

    Args:
        denoiser ([`DiTModel`]): The model, compiled or not.
        device (`torch.device`): The device of the samples.
    """
    model: Any = unwrap_module(denoiser)
    embedder, blocks = model.time_label_embed, model.transformer_blocks
    layers = [*embedder.children(), *(block.norm1 for block in blocks)]
    inner = [module for layer in layers for module in layer.modules()]
    around = [function for each in (model, embedder, *blocks) for function in functions_around(each)]
    return (
        not torch.is_grad_enabled()
        and all(map(_keeps_conditioning, around))
        and not any(functions_around(module) for module in inner)
        and not any(module.training for module in (embedder, *inner))
        and not any(hasattr(module, name) for module in (embedder, *inner) for name in _OF_ADAPTERS)
        and all(weight.device.type == device.type for weight in _weights_of_modulations(denoiser))
    )


def _keeps_conditioning(function: Callable) -> bool:
    """Whether a hook is one of a plugin's that leaves timesteps and conditioning as they are."""
    while isinstance(function, partial):
        function = function.func
    # by an attribute, as code that comes with a repository defines another class: see saving/naming.py
    return getattr(getattr(function, "__self__", None), "keeps_conditioning", False)


def _weights_of_modulations(denoiser: nn.Module) -> list[torch.Tensor]:
    model: Any = unwrap_module(denoiser)
    modules = (model.time_label_embed, *(block.norm1 for block in model.transformer_blocks))
    return [weight for module in modules for weight in module.parameters()]
