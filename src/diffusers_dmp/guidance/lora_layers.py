"""Layers with LoRA: which layers of a network get it, which can have it, and how it is added to their weights.

Legend: B batch, C channels, H and W height and width in pixels.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

_PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = r".*\.attention\.[qkvo]_proj"
_NECK = r"neck\.(convs\.\d+|fusion_stage\.layers\.\d+\.(projection|residual_layer\d\.convolution\d))"
LORA_TARGETS = {  # `model_type` → a regular expression that matches the full names of the adapted modules
    "resnet": r".*\.embedder\.convolution|.*\.layer\.[01]\.convolution",  # the stem, and the first two of each block
    "vit": _ATTENTION,
    "deit": _ATTENTION,
    "dinov2": _ATTENTION,
    "segformer": _ATTENTION,
    "depth_anything": rf"{_ATTENTION}|{_NECK}",
    **dict.fromkeys(
        ("clip", "clip_vision_model", "siglip", "siglip_vision_model"), r".*\.self_attn\.(q|k|v|out)_proj"
    ),
    "dpt": rf".*\.attention\.(attention\.(query|key|value)|output\.dense)|{_NECK}",
}


def lora_targets(network: nn.Module) -> str:
    """
    Find the modules that the paper adapts in a network.

    Args:
        network (`nn.Module`): A vision network, of transformers or not.

    Returns:
        `str`: A regular expression that matches their full names.

    Raises:
        ValueError: if the network's family has no default.
    """
    model_type = network.config.model_type if isinstance(network, PreTrainedModel) else type(network).__name__
    if model_type not in LORA_TARGETS:
        layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        if not layers:
            raise ValueError(
                f"Expected a network with convolutions or linears for the method 'ppap', but got a {type(network).__name__} "
                "without; `method='finetune', num_experts=1` takes it as it is."
            )
        raise ValueError(
            f"Expected a network of {', '.join(LORA_TARGETS)}, or `target_modules` to be a regular expression of (or a list of "
            f"endings of) the names of its convolutions and linears, such as {layers[len(layers) // 2]!r}, but got "
            f"{model_type!r} and no `target_modules`."
        )
    return LORA_TARGETS[model_type]


def check_not_adapted(network: nn.Module) -> None:
    """
    Check that nothing is in a network's layers yet.

    Args:
        network (`nn.Module`): A network to make experts of.

    Raises:
        ValueError: if there is LoRA in it, of other experts for example.
    """
    if any(isinstance(module, LoraLayer) for module in network.modules()):
        raise ValueError(
            f"Expected `network` to have no adapters, but got a {type(network).__name__} with LoRA. Experts change their network in "
            "place; load it again for other experts."
        )


def check_mergeable(network: nn.Module, config: LoraConfig) -> None:
    """
    Check that W + α/γ·B·A is what PEFT computes beside each layer.

    Args:
        network (`nn.Module`): A network without LoRA.
        config ([`LoraConfig`]): Where LoRA goes.

    Raises:
        ValueError: if it is not for one of the layers.
    """
    uses = Counter(id(weight) for _, weight in network.named_parameters(remove_duplicate=False))
    for name, module in network.named_modules():
        if not check_target_module_exists(config, name):
            continue
        reason = _why_not_mergeable(module, network.get_submodule(name.rpartition(".")[0]), uses)
        if reason is not None:
            raise ValueError(
                f"Expected `target_modules` to name no {reason}, whose LoRA cannot be merged, but got {name!r}."
            )


def _why_not_mergeable(module: nn.Module, parent: nn.Module, uses: "Counter[int]") -> str | None:
    """What a module is that LoRA cannot be merged into, or None. Of each weight, `uses` says how many modules have it."""
    own_class = next((each for each in _PLAIN_LAYERS if isinstance(module, each)), None)
    if getattr(module, "groups", 1) != 1:
        return "convolution in groups"
    if own_class is None or type(module).forward is not own_class.forward:
        return f"{type(module).__name__}, which computes in its own way"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"convolution with the padding {module.padding_mode!r}"
    if isinstance(parent, nn.MultiheadAttention):
        return "part of an nn.MultiheadAttention, which never calls it"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "layer with a computed weight (weight_norm, spectral_norm)"
    if uses[id(weight)] > 1:
        return "layer with a weight that the network has in several places"
    return None


def check_layers_are_called(
    network: nn.Module, layers: "Mapping[str, LoraLayer]", adapter: str, images: torch.Tensor
) -> None:
    """
    Check that a network calls the layers with LoRA whose weights it uses.

    Some networks read a weight and compute with it themselves; LoRA beside the layer then has no effect.

    Args:
        network (`nn.Module`): The network, with an active adapter that is not merged.
        layers (`Mapping[str, LoraLayer]`): Its layers with LoRA, by name.
        adapter (`str`): The active adapter.
        images (`torch.Tensor` of shape (B, C, H, W)): Images to try it with, preprocessed.

    Raises:
        ValueError: if the output depends on a layer's weight, but not on its LoRA.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # copies of all tensors, as those that were made in inference mode take no part in gradients
        tensors = {
            name: each.detach().clone() for name, each in (*network.named_parameters(), *network.named_buffers())
        }
        weights = [f"{name}.base_layer.weight" for name in layers]
        factors = [f"{name}.lora_B.{adapter}.weight" for name in layers]
        asked = [tensors[name].requires_grad_() for name in (*weights, *factors)]
        returned = functional_call(network, tensors, (images.clone(),))
        total = torch.stack([each.float().sum() for each in _differentiable(returned)] or [images.new_zeros(())]).sum()
        if not total.requires_grad:
            return
        gradients = torch.autograd.grad(total, asked, allow_unused=True)
    for name, of_weight, of_factor in zip(layers, gradients, gradients[len(layers) :]):
        if of_weight is not None and of_factor is None:
            raise ValueError(
                f"Expected `target_modules` to name layers that the network calls, but got {name!r}, whose weight it reads to "
                "compute in its own way: LoRA has no effect there."
            )


def _differentiable(returned: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a network returns that gradients can be taken of."""
    if isinstance(returned, torch.Tensor):
        if returned.requires_grad:
            yield returned
    elif isinstance(returned, Mapping):
        for each in returned.values():
            yield from _differentiable(each)
    elif isinstance(returned, (list, tuple)):
        for each in returned:
            yield from _differentiable(each)


def dilate_lora(layer: LoraLayer) -> None:
    """Give A the dilation of its convolution, which PEFT leaves out."""
    dilation = getattr(layer.get_base_layer(), "dilation", None)
    if dilation is not None:
        for lora_a in layer.lora_A.values():
            lora_a.dilation = dilation


@torch.no_grad()
def add_lora(layer: LoraLayer, adapter: str, sign: int) -> None:
    """W ± α/γ·B·A in place. PEFT's own merging multiplies by a convolution, which is several times slower."""
    lora_a, lora_b = layer.lora_A[adapter].weight.flatten(1), layer.lora_B[adapter].weight.flatten(1)
    weight = layer.get_base_layer().weight
    weight.add_((lora_b @ lora_a).view(weight.shape), alpha=sign * layer.scaling[adapter])


def activate_lora(layer: LoraLayer, adapter: str) -> None:
    """Activate an adapter without PEFT's change of `requires_grad`, which is true for the active one."""
    requires_grad = {name: weight.requires_grad for name, weight in layer.named_parameters()}
    layer.set_adapter(adapter)
    for name, weight in layer.named_parameters():
        weight.requires_grad_(requires_grad[name])
