"""What PPAP's published checkpoints have in common: LoRA in loralib's layout, and weights that no expert has changed.

The published LoRA of a k x k convolution has factors of shape (out·k, r·k) and (r·k, in·k), as in loralib; their product has a
rank of up to r·k². PEFT's factors have the shapes (out, R) and (R, in·k²). The published factors become PEFT's of the rank
R = r·k², or of the full rank if that is lower, without rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...guidance import GuidanceExperts
from ..renaming import NamedWeights

Weights = dict[str, torch.Tensor]
Lora = dict[str, tuple[torch.Tensor, torch.Tensor]]  # PEFT's A and B of each adapted module

_ALPHA = 8  # of the published experts


@dataclass(frozen=True)
class PublishedExpert:
    """
    One published checkpoint, under the names of the network that it is for.

    Args:
        weights (`dict[str, torch.Tensor]`): The weights without LoRA, in float32.
        lora (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): PEFT's A and B of each adapted module.
    """

    weights: Weights
    lora: Lora


@dataclass(frozen=True)
class PublishedNetwork:
    """
    The network that published experts are for, and how it was used.

    Args:
        network (`nn.Module`): The network.
        frozen (`dict[str, torch.Tensor]`): Its weights, of which those that no expert owns are in every checkpoint.
        settings (`dict`): Arguments of [`GuidanceExperts`]: preprocessing, noise, and what the network returns.
        scale (`float`): α/γ, by which the product of the LoRA's factors is multiplied.
        frozen_source (`str`): What the frozen weights are expected to be, for messages.
    """

    network: nn.Module
    frozen: Weights
    settings: dict[str, Any]
    scale: float
    frozen_source: str


def peft_factors(
    lora_a: torch.Tensor, lora_b: torch.Tensor, shape: "tuple[int, ...]"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Convert the LoRA factors of a convolution from the published layout to PEFT's.

    The product stays the same: B·A, viewed as (out, in, k, k), before any scale.

    Args:
        lora_a (`torch.Tensor` of shape (r·k, in·k)), lora_b (`torch.Tensor` of shape (out·k, r·k)): The published factors.
        shape: The shape (out, in, k, k) of the convolution's weight.

    Returns:
        Two `torch.Tensor`, PEFT's A of shape (R, in, k, k) and B of shape (out, R, 1, 1).
    """
    num_out, num_in, k = shape[:3]
    inner = len(lora_a)  # r·k
    if k * inner >= num_out:  # of full rank: A is the product itself
        return (lora_b @ lora_a).view(num_out, num_in, k, k), torch.eye(num_out).view(num_out, num_out, 1, 1)
    # Row o of the product is, for a = 0 … k - 1, the in·k numbers of row o·k + a of B·A: A in k blocks along a diagonal.
    factor_b = lora_b.view(num_out, k * inner, 1, 1)
    factor_a = torch.block_diag(*[lora_a] * k).view(k * inner, num_in, k, k)
    return factor_a, factor_b


def read_convolutions(weights: NamedWeights) -> tuple[Weights, Lora]:
    """
    Separate the LoRA of convolutions from the other weights.

    Args:
        weights ([`NamedWeights`]): A checkpoint, in which an adapted module has `lora_A`, `lora_B` and `conv.weight`.

    Returns:
        The weights under the names without `conv`, and PEFT's factors of each adapted module.

    Raises:
        ValueError: if one of the three is missing, or the factors' shapes do not fit.
    """
    plain: Weights = {}
    lora: Lora = {}
    for key, tensor in weights.items():
        module, _, part = key.rpartition(".")
        parent = module.removesuffix(".conv")
        if part == "lora_A":
            lora_b, shape = weights[f"{module}.lora_B"], weights[f"{module}.conv.weight"].shape
            _check_factors(module, tensor, lora_b, shape)
            lora[module] = peft_factors(tensor, lora_b, shape)
        elif part != "lora_B":
            if parent != module:
                _ = weights[f"{parent}.lora_A"]  # refused if it is missing
            plain[f"{parent}.{part}"] = tensor
    return plain, lora


def _check_factors(name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, shape: "tuple[int, ...]") -> None:
    """Refuse factors that are not those of a convolution of a shape (out, in, k, k)."""
    if len(shape) == 4:
        expected = (len(lora_a), shape[1] * shape[2]), (shape[0] * shape[2], len(lora_a))
        if (tuple(lora_a.shape), tuple(lora_b.shape)) == expected:
            return
    raise ValueError(
        f"Expected the LoRA of {name!r} to fit a convolution with weights of shape {tuple(shape)}, but got the shapes "
        f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}."
    )


def convolution_scale(state_dict: Weights, config: dict[str, Any]) -> float:
    """
    Read α/γ of the LoRA of convolutions.

    Args:
        state_dict (`dict[str, torch.Tensor]`): A checkpoint.
        config (`dict`): `lora_alpha`, by default the published 8, and `gamma`, which the weights show; both are removed.

    Raises:
        ValueError: if `gamma` is not that of the weights.
    """
    name = next((name for name in state_dict if name.endswith(".lora_A")), None)
    if name is None:  # whole networks
        return 1.0
    kernel_size = state_dict[f"{name.removesuffix('lora_A')}conv.weight"].shape[-1]
    gamma = len(state_dict[name]) // kernel_size
    given = config.pop("gamma", gamma)
    if given != gamma:
        raise ValueError(f"Expected `gamma` to be {gamma}, which the shapes of the LoRA show, but got {given}.")
    return config.pop("lora_alpha", _ALPHA) / gamma


def check_lora(state_dicts: "Sequence[Weights]", published: list[PublishedExpert]) -> None:
    """
    Check that all experts have LoRA in the same layers.

    Args:
        state_dicts (a list of `dict[str, torch.Tensor]`): The checkpoints.
        published (`list[PublishedExpert]`): What was read from them.

    Raises:
        ValueError: if one has half a LoRA, or a layer is adapted by some experts alone.
    """
    for state_dict in state_dicts:
        for name in state_dict:
            module, _, part = name.rpartition(".")
            other = {"lora_A": "lora_B", "lora_B": "lora_A"}.get(part)
            if other is not None and f"{module}.{other}" not in state_dict:
                raise ValueError(f"Expected `state_dict` to hold {f'{module}.{other}'!r}, but it is missing.")
    for index, each in enumerate(published):
        for name in sorted(each.lora.keys() ^ published[0].lora.keys()):
            raise ValueError(
                f"Expected all experts to have LoRA in the same layers, but got it in {name!r} of only one of the experts 0 "
                f"and {index}."
            )


def load_published(experts: GuidanceExperts, published: list[PublishedExpert], base: PublishedNetwork) -> None:
    """
    Copy what each expert owns, and check that the other weights are those of the network.

    Args:
        experts ([`GuidanceExperts`]): Untrained experts of the network.
        published (`list[PublishedExpert]`): The checkpoints.
        base ([`PublishedNetwork`]): The network.

    Raises:
        ValueError: if a frozen weight is another one; it is named.
    """
    tensors = {}
    for index, each in enumerate(published):
        own = experts.expert_tensors(index)
        for name in own:
            if ".lora_" in name:
                module, part = name.split(".lora_")
                tensors[f"expert_{index}.{name}"] = each.lora[module]["AB".index(part[0])]
            else:
                tensors[f"expert_{index}.{name}"] = each.weights[name]
        for name, weight in base.frozen.items():
            if name not in own and not _is_rounded(each.weights[name], weight):
                raise ValueError(f"Expected {name!r} to be {base.frozen_source}, but got another for expert {index}.")
    experts.load_expert_tensors(tensors)


def _is_rounded(saved: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a saved tensor is a weight, or what half precision makes of it."""
    rounded = (weight, weight.half().float(), weight.bfloat16().float())
    return any(torch.equal(saved, each) for each in rounded)
