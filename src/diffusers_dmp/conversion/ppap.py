"""PPAP's published experts in (https://github.com/riiid/PPAP): ResNets with the LoRA of loralib on their convolutions.

Its factors of a k x k convolution are (out·k, r·k) and (r·k, in·k), of a rank up to r·k² where PEFT's are (out, r) and
(r, in·k²): they become PEFT's of that rank, or of the full one if that is less, without rounding.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from ..guidance import GuidanceExperts

_MODULES = (  # original → transformers'
    (r"^conv1$", "resnet.embedder.embedder.convolution"),
    (r"^bn1$", "resnet.embedder.embedder.normalization"),
    (r"^fc$", "classifier.1"),
    (r"^layer(\d)\.(\d+)\.downsample\.0$", "resnet.encoder.stages.{0}.layers.{1}.shortcut.convolution"),
    (r"^layer(\d)\.(\d+)\.downsample\.1$", "resnet.encoder.stages.{0}.layers.{1}.shortcut.normalization"),
    (r"^layer(\d)\.(\d+)\.conv(\d)$", "resnet.encoder.stages.{0}.layers.{1}.layer.{2}.convolution"),
    (r"^layer(\d)\.(\d+)\.bn(\d)$", "resnet.encoder.stages.{0}.layers.{1}.layer.{2}.normalization"),
)


def convert_ppap(state_dicts: "Sequence[dict[str, torch.Tensor]]", config: dict[str, Any]) -> GuidanceExperts:
    """
    Args:
        state_dicts (a list of E `dict[str, torch.Tensor]`): Each expert's checkpoint, the cleanest images' first.
        config (`dict`): `gamma` (16) and `lora_alpha` (8) of its LoRA; `num_train_timesteps` (1000); `base_model_folder`, where to
            write the network, without which the experts cannot be saved: they only name it.

    Returns:
        [`GuidanceExperts`] of a network that is made of their frozen weights. As published, it sees images in [-1, 1] without
        normalisation, at their own size.

    Raises:
        ValueError: if a weight is missing or unknown, or the frozen ones of the experts differ.
    """
    rank, lora_alpha = config.pop("gamma", 16), config.pop("lora_alpha", 8)
    experts = [
        _split({key.removeprefix("resnet."): tensor.float() for key, tensor in each.items()}) for each in state_dicts
    ]
    plain = experts[0][0]
    if "classifier.1.weight" not in plain:
        raise ValueError("Expected `state_dict` to hold a ResNet's experts, with 'fc.weight', but got none.")
    network = ResNetForImageClassification(_resnet_config(plain)).eval()
    missing, unknown = network.load_state_dict(plain, strict=False)
    if missing or unknown:
        name = (missing or unknown)[0]
        raise ValueError(
            f"Expected `state_dict` to hold the ResNet's weights, but {name!r} is {'missing' if missing else 'unknown'}."
        )

    base_model_folder = config.pop("base_model_folder", None)
    if base_model_folder is not None:
        network.save_pretrained(base_model_folder)

    factors = [
        {name: peft_factors(lora_a, lora_b, _conv_shape(plain, name)) for name, (lora_a, lora_b) in lora.items()}
        for _, lora in experts
    ]
    ranks = {name: len(lora_a) for name, (lora_a, _) in factors[0].items()}
    converted = GuidanceExperts(
        network,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        num_experts=len(experts),
        num_train_timesteps=config.pop("num_train_timesteps", 1000),
        base_model_name_or_path=base_model_folder and str(base_model_folder),
        rank=rank,
        lora_alpha=lora_alpha,
        target_modules="|".join(re.escape(name) for name in ranks),
        rank_pattern={f"^{re.escape(name)}": own_rank for name, own_rank in ranks.items()},
        # PEFT counts α over each layer's own rank
        alpha_pattern={f"^{re.escape(name)}": lora_alpha * own_rank / rank for name, own_rank in ranks.items()},
    )
    tensors = {}
    for expert, ((weights, _), lora) in enumerate(zip(experts, factors)):
        for name in converted.expert_tensors(expert):
            if ".lora_" in name:
                module, part = name.split(".lora_")
                tensors[f"expert_{expert}.{name}"] = lora[module]["AB".index(part[0])]
            else:
                tensors[f"expert_{expert}.{name}"] = weights[name]
        frozen = [name for name in plain if name not in converted.expert_tensors(expert)]
        for name in frozen:
            if not torch.equal(weights[name], plain[name]):
                raise ValueError(
                    f"Expected {name!r} to be the same for all experts, but got another for expert {expert}."
                )
    converted.load_expert_tensors(tensors)
    return converted


def peft_factors(
    lora_a: torch.Tensor, lora_b: torch.Tensor, shape: "tuple[int, ...]"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    PEFT's A (R, in, k, k) and B (out, R, 1, 1) of a convolution with the published product
    ΔW = (B·A) viewed as (out, in, k, k), before any scale.

    Args:
        lora_a (`torch.Tensor` of shape (r·k, in·k)), lora_b (`torch.Tensor` of shape (out·k, r·k)): The published factors.
        shape: (out, in, k, k).
    """
    num_out, num_in, k = shape[:3]
    inner = len(lora_a)  # r·k
    if k * inner >= num_out:  # of full rank: ΔW itself
        return (lora_b @ lora_a).view(num_out, num_in, k, k), torch.eye(num_out).view(num_out, num_out, 1, 1)
    # Row o of ΔW is, for a = 0 … k - 1, the in·k numbers of row o·k + a of B·A: A in k blocks along a diagonal.
    factor_b = lora_b.view(num_out, k * inner, 1, 1)
    factor_a = torch.block_diag(*[lora_a] * k).view(k * inner, num_in, k, k)
    return factor_a, factor_b


def _split(weights: dict[str, torch.Tensor]) -> "tuple[dict, dict]":
    """By transformers' names: plain weights, and pairs of LoRA factors."""
    plain, lora = {}, {}
    for key, tensor in weights.items():
        module, _, part = key.rpartition(".")
        if part == "lora_A":
            lora[_renamed(module)] = (tensor, weights[f"{module}.lora_B"])
        elif part != "lora_B":
            plain[f"{_renamed(module.removesuffix('.conv'))}.{part}"] = tensor
    return plain, lora


def _renamed(module: str) -> str:
    for pattern, ours in _MODULES:
        match = re.match(pattern, module)
        if match:
            return ours.format(*(int(group) - (place != 1) for place, group in enumerate(match.groups())))
    raise ValueError(f"Expected `state_dict` to hold a ResNet's weights, but got {module!r}.")


def _resnet_config(weights: dict[str, torch.Tensor]) -> ResNetConfig:
    places = {
        tuple(map(int, match.groups()))
        for match in (re.match(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", name) for name in weights)
        if match
    }
    depths = [sum(own == stage for own, _ in places) for stage in range(1 + max(stage for stage, _ in places))]
    bottleneck = "resnet.encoder.stages.0.layers.0.layer.2.convolution.weight" in weights
    last = f"layer.{1 + bottleneck}.convolution.weight"
    return ResNetConfig(
        num_channels=weights["resnet.embedder.embedder.convolution.weight"].shape[1],
        embedding_size=len(weights["resnet.embedder.embedder.convolution.weight"]),
        hidden_sizes=[len(weights[f"resnet.encoder.stages.{stage}.layers.0.{last}"]) for stage in range(len(depths))],
        depths=depths,
        layer_type="bottleneck" if bottleneck else "basic",
        num_labels=len(weights["classifier.1.weight"]),
    )


def _conv_shape(weights: dict[str, torch.Tensor], name: str) -> torch.Size:
    return weights[f"{name}.weight"].shape
