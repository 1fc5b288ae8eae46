"""Small vision networks that are not of transformers, under the names of torchvision and timm."""

import torch
import torch.nn.functional as F
from networks import with_statistics
from torch import nn

ANIMALS = ["cat", "zebra", "horse"]


class BasicBlock(nn.Module):
    """torchvision's."""

    def __init__(self, num_in: int, num_out: int, stride: int, dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, dilation, dilation, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False), nn.BatchNorm2d(num_out)
        shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
        self.downsample = shortcut if (num_in, stride) != (num_out, 1) else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """torchvision's, with two stages: images → logits."""

    def __init__(self, num_classes: int = len(ANIMALS)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = nn.Sequential(BasicBlock(8, 8, 1)), nn.Sequential(BasicBlock(8, 16, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.avgpool(x).flatten(1))


class DeepLab(nn.Module):
    """torchvision's, with a dilated convolution, and a head with statistics: images → {"out": logits (B, K, H, W), …}."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 16, 1, dilation=2)
        )
        self.classifier = nn.Sequential(
            nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, len(ANIMALS), 1)
        )

    def forward(self, x):
        logits = F.interpolate(self.classifier(self.backbone(x)), x.shape[-2:], mode="bilinear")
        return {"out": logits, "aux": None}


class Attention(nn.Module):
    """timm's."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionTransformerBlock(nn.Module):
    """timm's."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """timm's: images → logits."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 16, 8, 8)
        self.blocks, self.norm = (
            nn.Sequential(VisionTransformerBlock(16), VisionTransformerBlock(16)),
            nn.LayerNorm(16),
        )
        self.head = nn.Linear(16, len(ANIMALS))

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).mT
        return self.head(self.norm(self.blocks(x)).mean(1))


class Depth(nn.Module):
    """Images → depth (B, 1, H, W)."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        return self.head(F.relu(self.encoder(x)))


class MeanColour(nn.Module):
    """Images → their mean red, green and blue, without any parameters."""

    def forward(self, x):
        return x.mean((2, 3))


def out(returned: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of torchvision's segmentation networks."""
    return returned["out"]


# how each is made, and what `GuidanceExperts` is told about it
PLAIN_NETWORKS = {
    "torchvision ResNet": (ResNet, {"outputs": "logits", "target_modules": ["conv1", "conv2"]}),
    "torchvision DeepLab": (DeepLab, {"outputs": out, "target_modules": r"backbone\..*(conv1|conv2)"}),
    "timm ViT": (VisionTransformer, {"outputs": "logits", "target_modules": ["attn.qkv", "attn.proj"]}),
    "depth": (Depth, {"outputs": "depth", "target_modules": ["encoder"]}),
}


def make_plain(network_class: type[nn.Module]) -> nn.Module:
    """A network with random weights and statistics, always the same."""
    return with_statistics(network_class())
