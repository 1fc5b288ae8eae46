"""PPAP's published experts in (https://github.com/riiid/PPAP): torchvision's ResNets and timm's DeiT with LoRA of their own.

Their factors of a k x k convolution are (out·k, r·k) and (r·k, in·k), as loralib's, of a rank up to r·k² where PEFT's are
(out, r) and (r, in·k²): they become PEFT's of that rank, or of the full one if that is less, without rounding.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from ..guidance import GuidanceExperts

_RESNET_MODULES = (  # original → transformers'
    (r"^conv1$", "resnet.embedder.embedder.convolution"),
    (r"^bn1$", "resnet.embedder.embedder.normalization"),
    (r"^fc$", "classifier.1"),
    (r"^layer(\d)\.(\d+)\.downsample\.0$", "resnet.encoder.stages.{0}.layers.{1}.shortcut.convolution"),
    (r"^layer(\d)\.(\d+)\.downsample\.1$", "resnet.encoder.stages.{0}.layers.{1}.shortcut.normalization"),
    (r"^layer(\d)\.(\d+)\.conv(\d)$", "resnet.encoder.stages.{0}.layers.{1}.layer.{2}.convolution"),
    (r"^layer(\d)\.(\d+)\.bn(\d)$", "resnet.encoder.stages.{0}.layers.{1}.layer.{2}.normalization"),
)
_DEIT_MODULES = {  # original → transformers', by the end of a name
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
# The published linear LoRA adds B·A as it is, whatever its α (it would be scaled when merged, which never happens).
_DEIT_SCALE = 1.0

Lora = dict[str, tuple[torch.Tensor, torch.Tensor]]  # PEFT's A and B of the adapted modules


def convert_ppap(state_dicts: "Sequence[dict[str, torch.Tensor]]", config: dict[str, Any]) -> GuidanceExperts:
    """
    Args:
        state_dicts (a list of E `dict[str, torch.Tensor]`): Each expert's checkpoint, the cleanest images' first.
        config (`dict`): `lora_alpha` (8) and `gamma` (16) of a ResNet's LoRA; `num_train_timesteps` (1000); `base_model_folder`,
            where to write the network, without which the experts cannot be saved: they only name it.

    Returns:
        [`GuidanceExperts`] of a network that is made of their frozen weights. As published, it sees images in [-1, 1] without
        normalisation: a ResNet at their own size, DeiT at 224 pixels.

    Raises:
        ValueError: if a weight is missing or unknown, or the frozen ones of the experts differ.
    """
    is_deit = any(".attn.qkv." in key for key in state_dicts[0])
    if is_deit:
        experts = [_read_deit(each) for each in state_dicts]
        scale = _DEIT_SCALE
    else:
        experts = [_read_resnet(each) for each in state_dicts]
        scale = config.pop("lora_alpha", 8) / config.pop("gamma", 16)
    plain = experts[0][0]
    network = _vit(plain) if is_deit else _resnet(plain)
    missing, unknown = network.load_state_dict(plain, strict=False)
    if missing or unknown:
        name = (missing or unknown)[0]
        raise ValueError(
            f"Expected `state_dict` to hold the network's weights, but {name!r} is {'missing' if missing else 'unknown'}."
        )

    base_model_folder = config.pop("base_model_folder", None)
    if base_model_folder is not None:
        network.save_pretrained(base_model_folder)

    ranks = {name: len(lora_a) for name, (lora_a, _) in experts[0][1].items()}
    converted = GuidanceExperts(
        network,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_size=[network.config.image_size] * 2 if is_deit else None,
        num_experts=len(experts),
        num_train_timesteps=config.pop("num_train_timesteps", 1000),
        base_model_name_or_path=base_model_folder and str(base_model_folder),
        adapt_head_bias=is_deit,
        target_modules="|".join(re.escape(name) for name in ranks),
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items()},
        # PEFT counts α over each layer's own rank
        alpha_pattern={f"^{re.escape(name)}": scale * rank for name, rank in ranks.items()},
    )
    tensors = {}
    for expert, (weights, lora) in enumerate(experts):
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


def _read_resnet(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Lora]:
    """By transformers' names: plain weights, and LoRA."""
    weights = {key.removeprefix("resnet."): tensor.float() for key, tensor in state_dict.items()}
    plain, lora = {}, {}
    for key, tensor in weights.items():
        module, _, part = key.rpartition(".")
        if part == "lora_A":
            shape = weights[f"{module}.conv.weight"].shape
            lora[_resnet_module(module)] = peft_factors(tensor, weights[f"{module}.lora_B"], shape)
        elif part != "lora_B":
            plain[f"{_resnet_module(module.removesuffix('.conv'))}.{part}"] = tensor
    return plain, lora


def _resnet_module(module: str) -> str:
    for pattern, ours in _RESNET_MODULES:
        match = re.match(pattern, module)
        if match:
            return ours.format(*(int(group) - (place != 1) for place, group in enumerate(match.groups())))
    raise ValueError(f"Expected `state_dict` to hold a ResNet's or a DeiT's weights, but got {module!r}.")


def _resnet(weights: dict[str, torch.Tensor]) -> ResNetForImageClassification:
    if "classifier.1.weight" not in weights:
        raise ValueError("Expected `state_dict` to hold a ResNet's experts, with 'fc.weight', but got none.")
    places = {
        tuple(map(int, match.groups()))
        for match in (re.match(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", name) for name in weights)
        if match
    }
    depths = [sum(own == stage for own, _ in places) for stage in range(1 + max(stage for stage, _ in places))]
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


def _read_deit(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Lora]:
    """By the names of transformers' ViT, which is what timm's DeiT without distillation is: plain weights, and LoRA."""
    weights = {
        key.removeprefix("deit.").removeprefix("classifier."): tensor.float() for key, tensor in state_dict.items()
    }
    plain, lora = {}, {}
    for key, tensor in weights.items():
        module, _, part = key.rpartition(".")
        if part == "lora_B":
            continue
        block = re.match(r"blocks\.(\d+)\.", module)
        prefix = f"vit.layers.{block[1]}." if block else ""
        place = module[block.end() :] if block else module
        place = place.removesuffix(".linear")
        if place == "attn.qkv":  # in one: rows of q, of k, of v
            projections = [f"{prefix}attention.{projection}_proj" for projection in "qkv"]
            parts = (weights[f"{module}.lora_B"] if part == "lora_A" else tensor).chunk(3)
        elif place in _DEIT_MODULES:
            projections = [prefix + _DEIT_MODULES[place]]
            parts = [weights[f"{module}.lora_B"] if part == "lora_A" else tensor]
        else:
            raise ValueError(f"Expected `state_dict` to hold a DeiT's weights, but got {key!r}.")
        for projection, rows in zip(projections, parts):
            if part == "lora_A":
                lora[projection] = (tensor, rows)
            else:
                plain[f"{projection}.{'position_embeddings' if part == 'pos_embed' else part}"] = rows
    return plain, lora


def _vit(weights: dict[str, torch.Tensor]) -> ViTForImageClassification:
    """With heads of 64 channels and timm's ε, as every published DeiT has them."""
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
