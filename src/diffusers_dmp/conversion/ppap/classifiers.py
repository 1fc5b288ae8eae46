"""PPAP's published classifiers: torchvision's ResNets and timm's DeiT-S, as networks of transformers."""

import math
import re
from typing import Any

from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ..renaming import NamedWeights, in_float32
from .published import Lora, PublishedExpert, PublishedNetwork, Weights, convolution_scale, read_convolutions

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
_SAMPLE_SIZE = 256  # of the images that the published classifiers were trained on


def is_deit(state_dict: Weights) -> bool:
    """Tell whether a checkpoint is that of a DeiT."""
    return any(".attn.qkv." in key for key in state_dict)


def classifier_network(state_dict: Weights, expert: PublishedExpert, config: dict[str, Any]) -> PublishedNetwork:
    """
    Make the network of a classifier's experts.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The checkpoint of the first expert.
        expert ([`PublishedExpert`]): What was read from it.
        config (`dict`): See [`convert_ppap`]; the entries that are used are removed.

    Returns:
        [`PublishedNetwork`]: The network without LoRA, with the weights of this expert.

    Raises:
        ValueError: if a weight is missing or unknown, or `gamma` is not that of the weights.
    """
    deit = is_deit(state_dict)
    network: PreTrainedModel = _make_vit(expert.weights) if deit else _make_resnet(expert.weights)
    missing, unknown = network.load_state_dict(expert.weights, strict=False)
    if missing or unknown:
        name = (missing or unknown)[0]
        raise ValueError(
            f"Expected `state_dict` to hold the network's weights, but {name!r} is {'missing' if missing else 'unknown'}."
        )
    folder = config.pop("base_model_folder", None)
    if folder is not None:
        network.save_pretrained(folder)
    settings = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_size": [network.config.image_size] * 2 if deit else None,
        "base_model_name_or_path": folder and str(folder),
        "adapt_head_bias": deit,
        "sample_size": [config.pop("image_size", _SAMPLE_SIZE)] * 2,
        "noise_schedule": {"process": "diffusion", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    }
    scale = _DEIT_SCALE if deit else convolution_scale(state_dict, config)
    return PublishedNetwork(network, expert.weights, settings, scale, "the same for all experts")


def read_resnet(state_dict: Weights) -> PublishedExpert:
    """Read a torchvision ResNet, which is a ResNet in transformers."""
    weights = NamedWeights({key.removeprefix("resnet."): tensor for key, tensor in in_float32(state_dict).items()})
    plain, lora = read_convolutions(weights)
    renamed = {}
    for key, tensor in plain.items():
        module, _, part = key.rpartition(".")
        renamed[f"{_resnet_module(module)}.{part}"] = tensor
    return PublishedExpert(renamed, {_resnet_module(module): factors for module, factors in lora.items()})


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


def read_deit(state_dict: Weights) -> PublishedExpert:
    """Read timm's DeiT without distillation token, which is a ViT in transformers."""
    weights = NamedWeights(
        {key.removeprefix("deit.").removeprefix("classifier."): each for key, each in in_float32(state_dict).items()}
    )
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
    return PublishedExpert(plain, lora)


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
