"""What each expert owns in one frozen network: LoRA, biases, and normalisation layers with their statistics.
https://arxiv.org/abs/2212.05973, section 4.2

LoRA is PEFT's. PEFT supports only one adapter with trained biases and does not save the statistics of a BatchNorm, so biases and
normalisation layers are exchanged here.
"""

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from .lora_layers import (
    activate_lora,
    add_lora,
    check_layers_are_called,
    check_mergeable,
    check_not_adapted,
    dilate_lora,
)

CLASSIFIER = r"(^|\.)\w*classifier(\.|$)"  # the head of a network of transformers
ANY_HEAD = r"(^|\.)(\w*classifier|heads?|head_dist|fc|last_linear)(\.|$)"  # also as timm and torchvision name it
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm),
)


@dataclass(frozen=True)
class AdapterSettings:
    """
    What the adapters of all experts have in common.

    Args:
        rank (`int`): γ, the rank of LoRA.
        lora_alpha (`float`): α; LoRA computes W + α/γ·B·A.
        target_modules (`str` or `list[str]`): The layers that get LoRA, as PEFT reads it; see [`LORA_TARGETS`].
        rank_pattern (`dict[str, int]`): Layers with another rank, by regular expression, as PEFT reads it.
        alpha_pattern (`dict[str, float]`): Layers with another α, by regular expression, as PEFT reads it.
        adapt_head_bias (`bool`): Whether each expert owns the bias of the classification head as well.
        head (`str`): A regular expression that is found in the names of the head's modules, and in no others.
        adapt_head_norms (`bool`): Whether each expert owns the head's normalisation layers, too. Otherwise a training changes
            the statistics of those that it has.
    """

    rank: int
    lora_alpha: float
    target_modules: "str | list[str]"
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    adapt_head_bias: bool = False
    head: str = CLASSIFIER
    adapt_head_norms: bool = False

    def lora_config(self) -> LoraConfig:
        """The same settings as PEFT takes them."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            target_modules=self.target_modules,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
        )


class AdapterExperts(nn.Module):
    """
    E adapters in one network, of which one is active at a time.

    Args:
        network (`nn.Module`): The network that is adapted. It is changed in place, and all its parameters are frozen.
        num_experts (`int`): E.
        settings ([`AdapterSettings`]): Where LoRA goes, and its size.

    Raises:
        ValueError: if a target is a layer whose LoRA cannot be merged, or the network is adapted already.
    """

    active: int | None
    merged: bool

    def __init__(self, network: nn.Module, num_experts: int, settings: AdapterSettings):
        super().__init__()
        check_not_adapted(network)
        # Module and attribute of each tensor that every expert has a version of. They are looked up before LoRA is injected, as
        # PEFT's layers take the names of those that they wrap.
        self.slots = dict(_own_slots(network, settings))
        check_mergeable(network, settings.lora_config())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            for expert in range(num_experts):
                inject_adapter_in_model(settings.lora_config(), network, f"expert_{expert}")
        self.network = network
        self.layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
        for layer in self.layers.values():
            dilate_lora(layer)
        # Biases and normalisation layers of all experts; those of the active one are in the network at the same time.
        self.stored = [{name: _copy(getattr(*slot)) for name, slot in self.slots.items()} for _ in range(num_experts)]
        self.active, self.merged = None, False
        network.requires_grad_(False)
        self.activate(0, merged=False)

    def _apply(self, fn, recurse=True):
        """Move or cast the stored tensors together with the module."""
        super()._apply(fn, recurse)
        for tensors in self.stored:
            for name, tensor in tensors.items():
                if isinstance(tensor, nn.Parameter):
                    tensor.data = fn(tensor.data)
                else:
                    tensors[name] = fn(tensor)
        return self

    def activate(self, expert: int, merged: bool) -> nn.Module:
        """
        Make one expert the active one.

        Args:
            expert (`int`): Index of the expert.
            merged (`bool`): Add its LoRA to the network's weights, so that it costs nothing while this expert is active.

        Returns:
            `nn.Module`: The network.
        """
        if (expert, merged) == (self.active, self.merged):
            return self.network
        self._unmerge()
        if expert != self.active:
            self._store_active()
            for name, (module, key) in self.slots.items():
                setattr(module, key, self.stored[expert][name])
            self.active = expert
        adapter = f"expert_{expert}"
        for layer in self.layers.values():
            if merged:
                add_lora(layer, adapter, 1)
                layer.merged_adapters.append(adapter)
            elif layer.active_adapters != [adapter]:
                activate_lora(layer, adapter)
        self.merged = merged
        return self.network

    def _unmerge(self) -> None:
        """Subtract the active expert's LoRA from the network's weights."""
        if self.merged:
            for layer in self.layers.values():
                add_lora(layer, layer.merged_adapters.pop(), -1)
        self.merged = False

    def _store_active(self) -> None:
        """Update the stored tensors of the active expert: moving the network replaces its buffers by new ones."""
        if self.active is not None:
            for name, slot in self.slots.items():
                self.stored[self.active][name] = getattr(*slot)

    def unmerge_active(self) -> None:
        """Subtract the active expert's LoRA from the network's weights; it stays active, computed beside them."""
        if self.active is not None:
            self.activate(self.active, merged=False)

    def check_called(self, images: torch.Tensor) -> None:
        """
        Check that the network calls the adapted layers whose weights it uses.

        Args:
            images (`torch.Tensor` of shape (B, C, H, W)): Images to try it with, preprocessed.

        Raises:
            ValueError: if it reads a layer's weight instead, so that LoRA beside the layer has no effect.
        """
        expert = 0 if self.active is None else self.active
        check_layers_are_called(self.activate(expert, merged=False), self.layers, f"expert_{expert}", images)

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """All tensors that one expert owns, by name: parameters and buffers, not copied."""
        self._store_active()
        adapter = f"expert_{expert}"
        lora = {}
        for name, layer in self.layers.items():
            lora[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight
            lora[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight
        return lora | self.stored[expert]


def _own_slots(network: nn.Module, settings: AdapterSettings) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Biases, and normalisation layers with their statistics, by full name; of the head what the settings say."""
    for module_name, module in network.named_modules():
        in_head = bool(re.search(settings.head, module_name))
        is_norm = isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")
        if in_head:
            is_norm = is_norm and settings.adapt_head_norms
            if not is_norm and not settings.adapt_head_bias:
                continue
        for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if is_norm or key == "bias":
                yield f"{module_name}.{key}", (module, key)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a parameter or buffer, of the same kind, frozen."""
    values = tensor.detach().clone()
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


class NetworkExperts(nn.Module):
    """E copies of a whole network, one per expert."""

    def __init__(self, network: nn.Module, num_experts: int):
        super().__init__()
        network.requires_grad_(False)
        self.networks = nn.ModuleList([network, *(copy.deepcopy(network) for _ in range(num_experts - 1))])

    def activate(self, expert: int, merged: bool) -> nn.Module:
        """The expert's network; there is nothing to merge."""
        return self.networks[expert]

    def unmerge_active(self) -> None:
        """Nothing to do, as nothing is ever merged."""

    def check_called(self, images: torch.Tensor) -> None:
        """Nothing to check without LoRA."""

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """All tensors that one expert owns, by name: parameters and buffers, not copied; those in several places once."""
        tensors = self.networks[expert].state_dict(keep_vars=True)
        first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
        return {name: tensor for name, tensor in tensors.items() if first_names[id(tensor)] == name}
