"""What each expert has of its own in a frozen network: LoRA (PEFT's), biases, and normalisation layers with their
statistics (https://arxiv.org/abs/2212.05973, section 4.2).

PEFT keeps one adapter's biases and loses a BatchNorm's statistics, so those are kept here.
"""

import copy
import re
import warnings

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

_ATTENTION = r".*\.attention\.[qkvo]_proj"
_NECK = r"neck\.(convs\.\d+|fusion_stage\.layers\.\d+\.(projection|residual_layer\d\.convolution\d))"
LORA_TARGETS = {  # by `model_type`: regular expressions of the modules' full names
    "resnet": r".*\.embedder\.convolution|.*\.layer\.[01]\.convolution",  # stem, the first two of each block
    "vit": _ATTENTION,
    "deit": _ATTENTION,
    "dinov2": _ATTENTION,
    "segformer": _ATTENTION,
    "depth_anything": rf"{_ATTENTION}|{_NECK}",
    "dpt": rf".*\.attention\.(attention\.(query|key|value)|output\.dense)|{_NECK}",
}
_HEAD = re.compile(r"(^|\.)(\w*classifier)(\.|$)")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def lora_targets(network: PreTrainedModel) -> str:
    """
    The modules that the paper adapts, as a regular expression.

    Raises:
        ValueError: for a model family that has no default.
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


class LoraExperts(nn.Module):
    """
    E adapters in one network, of which one acts at a time. The network is changed in place.

    Args:
        network (`PreTrainedModel`): What they adapt. All its parameters are frozen.
        num_experts (`int`): E.
        rank (`int`), lora_alpha (`float`): γ and α of LoRA; W + α/γ·B·A.
        target_modules (`str` or `list[str]`): See [`LORA_TARGETS`].
        rank_pattern (`dict[str, int]`), alpha_pattern (`dict[str, float]`, *optional*): Where a module's differ, as in PEFT.
        adapt_head_bias (`bool`): Let the head's bias be each expert's own, too.

    Raises:
        ValueError: if a target is a convolution in groups.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        num_experts: int,
        rank: int,
        lora_alpha: float,
        target_modules: "str | list[str]",
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        adapt_head_bias: bool = False,
    ):
        super().__init__()
        slots = list(_own_tensors(network, adapt_head_bias))  # before LoRA's own modules take their modules' names
        config = LoraConfig(
            r=rank,
            lora_alpha=lora_alpha,
            target_modules=target_modules,
            rank_pattern=rank_pattern or {},
            alpha_pattern=alpha_pattern or {},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
            warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")  # refused below
            for expert in range(num_experts):
                inject_adapter_in_model(config, network, f"expert_{expert}")
        self.network = network
        self.layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
        for name, layer in self.layers.items():
            if getattr(layer.get_base_layer(), "groups", 1) > 1:
                raise ValueError(
                    f"Expected `target_modules` to name no convolution in groups, whose LoRA cannot be merged, but got {name!r}."
                )
        self.slots = {name: (module, kind, key) for name, module, kind, key in slots}
        # Those of an expert that does not act; those of the one that does lie in the network itself.
        self.kept = [
            {name: _copy(getattr(module, kind)[key]) for name, (module, kind, key) in self.slots.items()}
            for _ in range(num_experts)
        ]
        self.active, self.merged = None, False
        network.requires_grad_(False)
        self.activate(0, merged=False)

    def _apply(self, fn, recurse=True):
        """Moving the module moves what is kept, too."""
        super()._apply(fn, recurse)
        for tensors in self.kept:
            for name, tensor in tensors.items():
                if isinstance(tensor, nn.Parameter):
                    tensor.data = fn(tensor.data)
                else:
                    tensors[name] = fn(tensor)
        return self

    def activate(self, expert: int, merged: bool) -> nn.Module:
        """
        Let one expert act.

        Args:
            expert (`int`): Which.
            merged (`bool`): Add its LoRA to the weights, which then cost nothing, until another one acts.

        Returns:
            The network.
        """
        if (expert, merged) == (self.active, self.merged):
            return self.network
        self._unmerge()
        if expert != self.active:
            self._put_back()
            for name, (module, kind, key) in self.slots.items():
                getattr(module, kind)[key] = self.kept[expert][name]
            self.active = expert
        adapter = f"expert_{expert}"
        for layer in self.layers.values():
            if merged:
                _add_lora(layer, adapter, 1)
                layer.merged_adapters.append(adapter)
            elif layer.active_adapters != [adapter]:
                requires_grad = {key: weight.requires_grad for key, weight in layer.named_parameters()}
                layer.set_adapter(adapter)
                for key, weight in layer.named_parameters():  # PEFT would train the active one
                    weight.requires_grad_(requires_grad[key])
        self.merged = merged
        return self.network

    def _unmerge(self) -> None:
        if self.merged:
            for layer in self.layers.values():
                _add_lora(layer, layer.merged_adapters.pop(), -1)
        self.merged = False

    def _put_back(self) -> None:
        """Keep what the active expert's tensors have become: statistics are replaced, not written to, when they move."""
        if self.active is not None:
            for name, (module, kind, key) in self.slots.items():
                self.kept[self.active][name] = getattr(module, kind)[key]

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """All that is an expert's own, by name."""
        self._put_back()
        adapter = f"expert_{expert}"
        lora = {}
        for name, layer in self.layers.items():
            lora[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight
            lora[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight
        return lora | self.kept[expert]


@torch.no_grad()
def _add_lora(layer: LoraLayer, adapter: str, sign: int) -> None:
    """W ± α/γ·B·A in place, as PEFT's own merging (which goes through a convolution, several times slower)."""
    lora_a, lora_b = layer.lora_A[adapter].weight.flatten(1), layer.lora_B[adapter].weight.flatten(1)
    weight = layer.get_base_layer().weight
    weight.add_((lora_b @ lora_a).view(weight.shape), alpha=sign * layer.scaling[adapter])


def _own_tensors(network: nn.Module, adapt_head_bias: bool):
    """Name, module, kind (`_parameters` or `_buffers`) and key of what is copied for each expert: none of the head's but its bias."""
    for module_name, module in network.named_modules():
        in_head = bool(_HEAD.search(module_name))
        if in_head and not adapt_head_bias:
            continue
        is_norm = not in_head and (isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"))
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                if tensor is not None and (is_norm or key == "bias"):
                    yield f"{module_name}.{key}", module, kind, key


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    own = tensor.detach().clone()
    return nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own


class FullExperts(nn.Module):
    """E copies of a network, every weight of them an expert's own."""

    def __init__(self, network: PreTrainedModel, num_experts: int):
        super().__init__()
        network.requires_grad_(False)
        self.networks = nn.ModuleList([network, *(copy.deepcopy(network) for _ in range(num_experts - 1))])

    def activate(self, expert: int, merged: bool) -> nn.Module:
        """The expert's network; there is nothing to merge."""
        return self.networks[expert]

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """All that is an expert's own, by name."""
        return self.networks[expert].state_dict(keep_vars=True)
