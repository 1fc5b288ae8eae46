"""A small MiDaS small: random weights, the structure and the names of `torch.hub.load("intel-isl/MiDaS", "MiDaS_small")`.

And PPAP's checkpoints of it, with what the published code computes from them.
"""

import torch
import torch.nn.functional as F
from conftest import randomised
from torch import nn
from torch.func import functional_call

FEATURES = 8
GAMMA, ALPHA = 2, 8


def conv(num_in: int, num_out: int, k: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, k, stride, k // 2, groups=groups, bias=bias)


class SeparableBlock(nn.Module):
    """The first block of an EfficientNet-Lite, under timm's names."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_dw, self.bn1 = conv(width, width, 3, groups=width), nn.BatchNorm2d(width, eps=1e-3)
        self.act1, self.se = nn.ReLU6(inplace=True), nn.Identity()
        self.conv_pw, self.bn2 = conv(width, width, 1), nn.BatchNorm2d(width, eps=1e-3)
        self.act2 = nn.Identity()

    def forward(self, x):
        return x + self.act2(self.bn2(self.conv_pw(self.se(self.act1(self.bn1(self.conv_dw(x)))))))


class InvertedResidual(nn.Module):
    """All other blocks of an EfficientNet-Lite, under timm's names."""

    def __init__(self, num_in: int, num_out: int, stride: int):
        super().__init__()
        width = 2 * num_in
        self.conv_pw, self.bn1, self.act1 = conv(num_in, width, 1), nn.BatchNorm2d(width, eps=1e-3), nn.ReLU6()
        self.conv_dw, self.bn2 = conv(width, width, 3, stride, groups=width), nn.BatchNorm2d(width, eps=1e-3)
        self.act2, self.se = nn.ReLU6(), nn.Identity()
        self.conv_pwl, self.bn3 = conv(width, num_out, 1), nn.BatchNorm2d(num_out, eps=1e-3)
        self.has_residual = num_in == num_out and stride == 1

    def forward(self, x):
        y = self.act2(self.bn2(self.conv_dw(self.act1(self.bn1(self.conv_pw(x))))))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return y + x if self.has_residual else y


class ResidualUnit(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = conv(width, width, 3, bias=True), conv(width, width, 3, bias=True)

    def forward(self, x):
        return self.conv2(self.conv1(x.relu()).relu()) + x


class FusionBlock(nn.Module):
    def __init__(self, width: int, num_out: int):
        super().__init__()
        self.out_conv = conv(width, num_out, 1, bias=True)
        self.resConfUnit1, self.resConfUnit2 = ResidualUnit(width), ResidualUnit(width)

    def forward(self, x, skip=None):
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class MidasNet_small(nn.Module):  # noqa: N801  its name
    """Images (B, 3, H, W), normalised → inverse depth (B, H, W)."""

    def __init__(self):
        super().__init__()
        self.pretrained, self.scratch = nn.Module(), nn.Module()
        stem = (conv(3, 8, 3, 2), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU6())
        first = (nn.Sequential(SeparableBlock(8)), nn.Sequential(InvertedResidual(8, 8, 2), InvertedResidual(8, 8, 1)))
        self.pretrained.layer1 = nn.Sequential(*stem, *first)
        self.pretrained.layer2 = nn.Sequential(nn.Sequential(InvertedResidual(8, 12, 2)))
        third = (InvertedResidual(12, 16, 2), InvertedResidual(16, 16, 1))
        self.pretrained.layer3 = nn.Sequential(*(nn.Sequential(each) for each in third))
        self.pretrained.layer4 = nn.Sequential(nn.Sequential(InvertedResidual(16, 24, 2)))
        for level, num_in in enumerate((8, 12, 16, 24)):
            width = FEATURES * 2**level
            setattr(self.scratch, f"layer{level + 1}_rn", conv(num_in, width, 3))
            setattr(self.scratch, f"refinenet{level + 1}", FusionBlock(width, max(FEATURES, width // 2)))
        output = (conv(FEATURES, FEATURES // 2, 3, bias=True), nn.UpsamplingBilinear2d(scale_factor=2))
        output = (*output, conv(FEATURES // 2, 4, 3, bias=True), nn.ReLU(), conv(4, 1, 1, bias=True), nn.ReLU(True))
        self.scratch.output_conv = nn.Sequential(*output)

    def forward(self, x):
        levels = []
        for level in (1, 2, 3, 4):
            x = getattr(self.pretrained, f"layer{level}")(x)
            levels.append(getattr(self.scratch, f"layer{level}_rn")(x))
        path = self.scratch.refinenet4(levels[3])
        for level in (3, 2, 1):
            path = getattr(self.scratch, f"refinenet{level}")(path, levels[level - 1])
        return self.scratch.output_conv(path).squeeze(1)


def make_midas(seed: int = 0) -> MidasNet_small:
    network = randomised(MidasNet_small(), seed)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.add_(1)
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.1, 0.3, generator=generator)
    network.scratch.output_conv[4].bias.data.add_(1)  # otherwise its ReLU is zero everywhere
    return network


def adapted_convolutions(network: MidasNet_small) -> list[str]:
    """The convolutions that the published code gives LoRA."""
    blocks = [name for name, module in network.named_modules() if hasattr(module, "conv_pw")]
    names = [f"{block}.conv_pw" for block in blocks] + [f"scratch.layer{level}_rn" for level in (1, 2, 3, 4)]
    for level in (1, 2, 3, 4):
        units = ("resConfUnit2",) if level == 4 else ("resConfUnit1", "resConfUnit2")
        names += [f"scratch.refinenet{level}.{unit}.{each}" for unit in units for each in ("conv1", "conv2")]
        names.append(f"scratch.refinenet{level}.out_conv")
    return names


def published_midas(network: MidasNet_small, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint as the published code writes it: LoRA, biases and normalisation layers are this expert's own."""
    generator = torch.Generator().manual_seed(seed)
    adapted = adapted_convolutions(network)
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    checkpoint = {}
    for name, tensor in network.state_dict().items():
        module, _, part = name.rpartition(".")
        own = module in norms or part == "bias"
        if own and "refinenet4.resConfUnit1" not in name and tensor.is_floating_point():
            tensor = tensor + 0.05 * torch.rand(tensor.shape, generator=generator)
        if module not in adapted:
            checkpoint[f"midas.{name}"] = tensor.clone()
            continue
        checkpoint[f"midas.{module}.conv.{part}"] = tensor.clone()
        if part == "weight":
            num_out, num_in, k, _ = tensor.shape
            checkpoint[f"midas.{module}.lora_A"] = torch.randn(GAMMA * k, num_in * k, generator=generator) / 8
            checkpoint[f"midas.{module}.lora_B"] = torch.randn(num_out * k, GAMMA * k, generator=generator) / 8
    return checkpoint


def run_published_midas(
    network: MidasNet_small, checkpoint: dict[str, torch.Tensor], images: torch.Tensor
) -> torch.Tensor:
    """The published computation: W + α/γ·B·A, on images (B, 3, H, W) in [-1, 1], resized to 256 x 256 and normalised."""
    weights = {}
    for name, tensor in checkpoint.items():
        module, _, part = name.removeprefix("midas.").rpartition(".")
        if part.startswith("lora_"):
            continue
        lora = f"midas.{module.removesuffix('.conv')}.lora_"
        if part == "weight" and lora + "A" in checkpoint:
            tensor = tensor + (checkpoint[lora + "B"] @ checkpoint[lora + "A"]).view(tensor.shape) * ALPHA / GAMMA
        weights[f"{module.removesuffix('.conv')}.{part}"] = tensor
    images = F.interpolate((images + 1) / 2, (256, 256), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return functional_call(network, weights, ((images - mean) / std,))
