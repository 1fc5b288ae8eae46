"""Conversion of PPAP's published experts (https://github.com/riiid/PPAP): torchvision's ResNets and timm's DeiT with LoRA.

The published LoRA of a k x k convolution has factors of shape (out·k, r·k) and (r·k, in·k), as in loralib; their product has a
rank of up to r·k². PEFT's factors have the shapes (out, R) and (R, in·k²). The published factors become PEFT's of the rank
R = r·k², or of the full rank if that is lower, without rounding.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ..guidance import GuidanceExperts
from .renaming import in_float32

_RESNET_MODULES = (  # torchvision's names → those of transformers
    (r"^conv1$", "resnet.embedder.embedder.convolution"),
    (r"^bn1$", "resnet.embedder.embedder.normalization"),
    (r"^fc$", "classifier.1"),
    (r"^layer(\d)\.(\d+)\.downsample\.0$", "resnet.encoder.stages.{0}.layers.{1}.shortcut.convolution"),
    (r"^layer(\d)\.(\d+)\.downsample\.1$", "resnet.encoder.stages.{0}.layers.{1}.shortcut.normalization"),
    (r"^layer(\d)\.(\d+)\.conv(\d)$", "resnet.encoder.stages.{0}.layers.{1}.layer.{2}.convolution"),
    (r"^layer(\d)\.(\d+)\.bn(\d)$", "resnet.encoder.stages.{0}.layers.{1}.layer.{2}.normalization"),
)
_DEIT_MODULES = {  # timm's names → those of transformers, without the prefix of the block
    "": "vit.embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm": "vit.layernorm",
    "head": "classifier",
}
# The published LoRA of a linear layer is W + B·A. Its α is used only when it is merged, which the code never does.
_DEIT_SCALE = 1.0

Weights = dict[str, torch.Tensor]
Lora = dict[str, tuple[torch.Tensor, torch.Tensor]]  # PEFT's A and B of each adapted module


@dataclass(frozen=True)
class _PublishedExpert:
    """
    One published checkpoint, under the names of transformers.

    Args:
        weights (`dict[str, torch.Tensor]`): The weights without LoRA.
        lora (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): PEFT's A and B of each adapted module.
    """

    weights: Weights
    lora: Lora


def convert_ppap(state_dicts: "Sequence[Weights]", config: dict[str, Any]) -> GuidanceExperts:
    """
    Convert the published checkpoints of PPAP.

    Args:
        state_dicts (a list of E `dict[str, torch.Tensor]`): The experts' checkpoints, beginning with the one for the cleanest
            images.
        config (`dict`): `lora_alpha` (by default 8) and `gamma` (16) of a ResNet's LoRA; `num_train_timesteps` (1000);
            `base_model_folder`, a folder to save the network in, without which the experts cannot be saved. The entries that
            are used are removed.

    Returns:
        [`GuidanceExperts`] of a network with the frozen weights of the checkpoints. As in the published code, the network sees
        images in [-1, 1] without normalisation, a ResNet in their own size and DeiT in the size that it was trained for.

    Raises:
        ValueError: if a weight is missing or unknown, or a frozen weight differs between experts.
    """
    is_deit = any(".attn.qkv." in key for key in state_dicts[0])
    published = [_read_deit(each) if is_deit else _read_resnet(each) for each in state_dicts]
    _check_lora(state_dicts, published)
    scale = _DEIT_SCALE if is_deit else config.pop("lora_alpha", 8) / config.pop("gamma", 16)
    network = _make_network(published[0].weights, is_deit)
    base_model_folder = config.pop("base_model_folder", None)
    if base_model_folder is not None:
        network.save_pretrained(base_model_folder)

    ranks = {re.escape(name): len(lora_a) for name, (lora_a, _) in published[0].lora.items()}
    experts = GuidanceExperts(
        network,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_size=[network.config.image_size] * 2 if is_deit else None,
        num_experts=len(published),
        num_train_timesteps=config.pop("num_train_timesteps", 1000),
        base_model_name_or_path=base_model_folder and str(base_model_folder),
        adapt_head_bias=is_deit,
        target_modules="|".join(ranks),
        rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
        # PEFT divides α by the rank of the layer
        alpha_pattern={f"^{name}": scale * rank for name, rank in ranks.items()},
    )
    _load_published(experts, published)
    return experts


def _check_lora(state_dicts: "Sequence[Weights]", published: list[_PublishedExpert]) -> None:
    """Refuse half a LoRA, and a layer that is adapted by some experts alone."""
    for state_dict in state_dicts:
        for name in state_dict:
            if name.endswith(".lora_B") and name.removesuffix("B") + "A" not in state_dict:
                raise ValueError(f"Expected `state_dict` to hold {name.removesuffix('B') + 'A'!r}, but it is missing.")
    for index, each in enumerate(published):
        for name in sorted(each.lora.keys() ^ published[0].lora.keys()):
            raise ValueError(
                f"Expected all experts to have LoRA in the same layers, but got it in {name!r} of only one of the experts 0 "
                f"and {index}."
            )


def _make_network(weights: Weights, is_deit: bool) -> PreTrainedModel:
    """The network without LoRA, with the given weights."""
    network = _make_vit(weights) if is_deit else _make_resnet(weights)
    missing, unknown = network.load_state_dict(weights, strict=False)
    if missing or unknown:
        name = (missing or unknown)[0]
        raise ValueError(
            f"Expected `state_dict` to hold the network's weights, but {name!r} is {'missing' if missing else 'unknown'}."
        )
    return network


def _load_published(experts: GuidanceExperts, published: list[_PublishedExpert]) -> None:
    """Copy what each expert owns, and check that the other weights are the same for all experts."""
    frozen = published[0].weights
    tensors = {}
    for index, each in enumerate(published):
        own = experts.expert_tensors(index)
        for name in own:
            if ".lora_" in name:
                module, part = name.split(".lora_")
                tensors[f"expert_{index}.{name}"] = each.lora[module]["AB".index(part[0])]
            else:
                tensors[f"expert_{index}.{name}"] = each.weights[name]
        for name in frozen:
            if name not in own and not torch.equal(each.weights[name], frozen[name]):
                raise ValueError(
                    f"Expected {name!r} to be the same for all experts, but got another for expert {index}."
                )
    experts.load_expert_tensors(tensors)


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


def _read_resnet(state_dict: Weights) -> _PublishedExpert:
    weights = {key.removeprefix("resnet."): tensor for key, tensor in in_float32(state_dict).items()}
    plain, lora = {}, {}
    for key, tensor in weights.items():
        module, _, part = key.rpartition(".")
        if part == "lora_A":
            shape = weights[f"{module}.conv.weight"].shape
            lora[_resnet_module(module)] = peft_factors(tensor, weights[f"{module}.lora_B"], shape)
        elif part != "lora_B":
            plain[f"{_resnet_module(module.removesuffix('.conv'))}.{part}"] = tensor
    return _PublishedExpert(plain, lora)


def _resnet_module(module: str) -> str:
    """The name that transformers gives to a module of torchvision's ResNet. Its indices begin with 0, except a layer's."""
    for pattern, name in _RESNET_MODULES:
        match = re.match(pattern, module)
        if match:
            return name.format(*(int(group) - (place != 1) for place, group in enumerate(match.groups())))
    raise ValueError(f"Expected `state_dict` to hold a ResNet's or a DeiT's weights, but got {module!r}.")


def _make_resnet(weights: Weights) -> ResNetForImageClassification:
    """A ResNet of the sizes that the weights have."""
    if "classifier.1.weight" not in weights:
        raise ValueError("Expected `state_dict` to hold a ResNet's experts, with 'fc.weight', but got none.")
    blocks = {
        (int(match[1]), int(match[2]))
        for match in (re.match(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", name) for name in weights)
        if match
    }
    depths = [sum(own == stage for own, _ in blocks) for stage in range(1 + max(stage for stage, _ in blocks))]
    bottleneck = "resnet.encoder.stages.0.layers.0.layer.2.convolution.weight" in weights
    last = f"layer.{1 + bottleneck}.convolution.weight"
    config = ResNetConfig(
        num_channels=weights["resnet.embedder.embedder.convolution.weight"].shape[1],
        embedding_size=len(weights["resnet.embedder.embedder.convolution.weight"]),
        hidden_sizes=[len(weights[f"resnet.encoder.stages.{stage}.layers.0.{last}"]) for stage in range(len(depths))],
        depths=depths,
        layer_type="bottleneck" if bottleneck else "basic",
        num_labels=len(weights["classifier.1.weight"]),
    )
    return ResNetForImageClassification(config).eval()


def _read_deit(state_dict: Weights) -> _PublishedExpert:
    """Read timm's DeiT without distillation token, which is a ViT in transformers."""
    weights = {
        key.removeprefix("deit.").removeprefix("classifier."): tensor for key, tensor in in_float32(state_dict).items()
    }
    plain: Weights = {}
    lora: Lora = {}
    for key, tensor in weights.items():
        module, _, part = key.rpartition(".")
        if part == "lora_B":
            continue
        block = re.match(r"blocks\.(\d+)\.", module)
        prefix = f"vit.layers.{block[1]}." if block else ""
        place = module[block.end() :] if block else module
        place = place.removesuffix(".linear")
        rows = weights[f"{module}.lora_B"] if part == "lora_A" else tensor
        if place == "attn.qkv":  # one layer in timm, with the rows of q, k and v
            names = [f"{prefix}attention.{projection}_proj" for projection in "qkv"]
        elif place in _DEIT_MODULES:
            names = [prefix + _DEIT_MODULES[place]]
        else:
            raise ValueError(f"Expected `state_dict` to hold a DeiT's weights, but got {key!r}.")
        for name, own_rows in zip(names, rows.chunk(3) if len(names) == 3 else [rows]):
            if part == "lora_A":
                lora[name] = (tensor, own_rows)
            else:
                plain[f"{name}.{'position_embeddings' if part == 'pos_embed' else part}"] = own_rows
    return _PublishedExpert(plain, lora)


def _make_vit(weights: Weights) -> ViTForImageClassification:
    """A ViT of the sizes that the weights have, with heads of 64 channels and timm's ε, as every published DeiT."""
    projection = weights["vit.embeddings.patch_embeddings.projection.weight"]
    hidden_size, num_channels, patch_size = projection.shape[:3]
    num_patches = weights["vit.embeddings.position_embeddings"].shape[1] - 1
    config = ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=sum(name.endswith("q_proj.weight") for name in weights),
        num_attention_heads=hidden_size // 64,
        intermediate_size=len(weights["vit.layers.0.mlp.fc1.weight"]),
        layer_norm_eps=1e-6,
        image_size=patch_size * math.isqrt(num_patches),
        patch_size=patch_size,
        num_channels=num_channels,
        num_labels=len(weights["classifier.weight"]),
    )
    return ViTForImageClassification(config).eval()
