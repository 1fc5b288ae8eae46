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
from transformers import PreTrainedModel

_ATTENTION = r".*\.attention\.[qkvo]_proj"
_NECK = r"neck\.(convs\.\d+|fusion_stage\.layers\.\d+\.(projection|residual_layer\d\.convolution\d))"
LORA_TARGETS = {  # `model_type` → a regular expression that matches the full names of the adapted modules
    "resnet": r".*\.embedder\.convolution|.*\.layer\.[01]\.convolution",  # the stem, and the first two of each block
    "vit": _ATTENTION,
    "deit": _ATTENTION,
    "dinov2": _ATTENTION,
    "segformer": _ATTENTION,
    "depth_anything": rf"{_ATTENTION}|{_NECK}",
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), r".*\.self_attn\.(q|k|v|out)_proj"),
    "dpt": rf".*\.attention\.(attention\.(query|key|value)|output\.dense)|{_NECK}",
}
_HEAD = re.compile(r"(^|\.)(\w*classifier)(\.|$)")
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm),
)


def lora_targets(network: PreTrainedModel) -> str:
    """
    Find the modules that the paper adapts in a network.

    Args:
        network (`PreTrainedModel`): A vision network of transformers.

    Returns:
        `str`: A regular expression that matches their full names.

    Raises:
        ValueError: if the network's family has no default.
    """
    model_type = network.config.model_type
    if model_type not in LORA_TARGETS:
        layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        raise ValueError(
            f"Expected a network of {', '.join(LORA_TARGETS)}, or `target_modules` to be a regular expression of (or a list of "
            f"endings of) the names of its convolutions and linears, such as {layers[len(layers) // 2]!r}, but got "
            f"{model_type!r} and no `target_modules`."
        )
    return LORA_TARGETS[model_type]


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
    """

    rank: int
    lora_alpha: float
    target_modules: "str | list[str]"
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    adapt_head_bias: bool = False

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
        network (`PreTrainedModel`): The network that is adapted. It is changed in place, and all its parameters are frozen.
        num_experts (`int`): E.
        settings ([`AdapterSettings`]): Where LoRA goes, and its size.

    Raises:
        ValueError: if a target is a grouped convolution.
    """

    active: int | None
    merged: bool

    def __init__(self, network: PreTrainedModel, num_experts: int, settings: AdapterSettings):
        super().__init__()
        # Module and attribute of each tensor that every expert has a version of. They are looked up before LoRA is injected, as
        # PEFT's layers take the names of those that they wrap.
        self.slots = dict(_own_slots(network, settings.adapt_head_bias))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")  # refused below
            for expert in range(num_experts):
                inject_adapter_in_model(settings.lora_config(), network, f"expert_{expert}")
        self.network = network
        self.layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
        for name, layer in self.layers.items():
            if getattr(layer.get_base_layer(), "groups", 1) > 1:
                raise ValueError(
                    f"Expected `target_modules` to name no convolution in groups, whose LoRA cannot be merged, but got {name!r}."
                )
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
                _add_lora(layer, adapter, 1)
                layer.merged_adapters.append(adapter)
            elif layer.active_adapters != [adapter]:
                _set_active_adapter(layer, adapter)
        self.merged = merged
        return self.network

    def _unmerge(self) -> None:
        """Subtract the active expert's LoRA from the network's weights."""
        if self.merged:
            for layer in self.layers.values():
                _add_lora(layer, layer.merged_adapters.pop(), -1)
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

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """All tensors that one expert owns, by name: parameters and buffers, not copied."""
        self._store_active()
        adapter = f"expert_{expert}"
        lora = {}
        for name, layer in self.layers.items():
            lora[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight
            lora[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight
        return lora | self.stored[expert]


@torch.no_grad()
def _add_lora(layer: LoraLayer, adapter: str, sign: int) -> None:
    """W ± α/γ·B·A in place. PEFT's own merging multiplies by a convolution, which is several times slower."""
    lora_a, lora_b = layer.lora_A[adapter].weight.flatten(1), layer.lora_B[adapter].weight.flatten(1)
    weight = layer.get_base_layer().weight
    weight.add_((lora_b @ lora_a).view(weight.shape), alpha=sign * layer.scaling[adapter])


def _set_active_adapter(layer: LoraLayer, adapter: str) -> None:
    """Activate an adapter without PEFT's change of `requires_grad`, which is true for the active one."""
    requires_grad = {name: weight.requires_grad for name, weight in layer.named_parameters()}
    layer.set_adapter(adapter)
    for name, weight in layer.named_parameters():
        weight.requires_grad_(requires_grad[name])


def _own_slots(network: nn.Module, adapt_head_bias: bool) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Biases, and normalisation layers with their statistics, by full name; of the head its bias at most."""
    for module_name, module in network.named_modules():
        in_head = bool(_HEAD.search(module_name))
        if in_head and not adapt_head_bias:
            continue
        is_norm = not in_head and (isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"))
        for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if is_norm or key == "bias":
                yield f"{module_name}.{key}", (module, key)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a parameter or buffer, of the same kind, frozen."""
    values = tensor.detach().clone()
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


class NetworkExperts(nn.Module):
    """E copies of a whole network, one per expert."""

    def __init__(self, network: PreTrainedModel, num_experts: int):
        super().__init__()
        network.requires_grad_(False)
        self.networks = nn.ModuleList([network, *(copy.deepcopy(network) for _ in range(num_experts - 1))])

    def activate(self, expert: int, merged: bool) -> nn.Module:
        """The expert's network; there is nothing to merge."""
        return self.networks[expert]

    def unmerge_active(self) -> None:
        """Nothing to do, as nothing is ever merged."""

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """All tensors that one expert owns, by name: parameters and buffers, not copied."""
        return self.networks[expert].state_dict(keep_vars=True)
