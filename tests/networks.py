"""Small vision networks: classes of transformers with random weights, and the linear classifier of the published vectors."""

import torch
from conftest import Vectors, randomised
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DPTConfig,
    DPTForDepthEstimation,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from diffusers_dmp import GuidanceExperts

TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # images stay in [-1, 1]


class LinearClassifier(PreTrainedModel):
    """The network of the published guidance vectors: logits = W·x."""

    config_class = PreTrainedConfig

    def __init__(self, weight: torch.Tensor):
        super().__init__(PreTrainedConfig(num_labels=len(weight)))
        self.linear = nn.Linear(weight.shape[1], len(weight), bias=False)
        self.linear.weight = nn.Parameter(weight)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.linear(pixel_values.flatten(1)))


def linear_experts(weight: torch.Tensor | None = None) -> GuidanceExperts:
    weight = Vectors("diffusion")["guidance.W"] if weight is None else weight
    return GuidanceExperts(LinearClassifier(weight), **PLAIN, method="finetune", num_experts=1)


def trained(experts: GuidanceExperts) -> GuidanceExperts:
    """Let experts differ from their network and from one another, as after training; also in their statistics."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in experts.expert_tensors().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return experts


def make_resnet(layer_type: str = "bottleneck", **config) -> ResNetForImageClassification:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 10} | config
    return with_statistics(ResNetForImageClassification(ResNetConfig(layer_type=layer_type, **sizes)))


def make_vit() -> ViTForImageClassification:
    return randomised(ViTForImageClassification(ViTConfig(**TRANSFORMER, num_labels=10)))


def make_deit() -> DeiTForImageClassification:
    return randomised(DeiTForImageClassification(DeiTConfig(**TRANSFORMER, num_labels=10)))


def make_segformer() -> SegformerForSemanticSegmentation:
    sizes = {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 16, "num_labels": 10}
    return with_statistics(SegformerForSemanticSegmentation(SegformerConfig(**sizes)))


def make_dpt() -> DPTForDepthEstimation:
    config = DPTConfig(
        **TRANSFORMER | {"num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    network = randomised(DPTForDepthEstimation(config))
    network.head.head[4].bias.data.add_(1)  # otherwise its last ReLU is zero everywhere
    return network


def with_statistics(network: PreTrainedModel) -> PreTrainedModel:
    """Give a network random weights, and BatchNorm statistics that fit them."""
    network = randomised(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
            module.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
            module.weight.data.add_(1)
    return network


NETWORKS = {
    "ResNet-50": make_resnet,
    "ResNet-18": lambda: make_resnet("basic"),
    "ViT": make_vit,
    "DeiT": make_deit,
    "Segformer": make_segformer,
    "DPT": make_dpt,
}
