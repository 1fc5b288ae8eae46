"""Inception-2015, the network whose features FID is defined by, for its weights as they were published for PyTorch.
Architecture: https://arxiv.org/abs/1512.00567, weights: https://github.com/mseitzer/pytorch-fid/releases (fid_weights),
which layers: https://github.com/openai/guided-diffusion/tree/main/evaluations

Legend: B batch, H and W height and width, C channels.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

from ..conversion.original import load_original_state_dict

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SIZE = 299  # pixels that images are scaled to
NUM_CLASSES = 1008  # ImageNet's and eight that were never used


class ConvBlock(nn.Module):
    """Convolution, BatchNorm and ReLU, padded to keep the size unless the stride is 2 or `padded` false."""

    def __init__(self, in_channels: int, out_channels: int, kernel, stride: int = 1, padded: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [size // 2 for size in kernel] if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """
    Branches of convolutions side by side.

    Args:
        in_channels (`int`): Of the input.
        branches (`dict[str, list]`): By the weights' names: each convolution's name, output channels, kernel and, if not 1, stride.
            Convolutions that share a list at the end of a branch both take its output so far.
        pool (`str`): What the last branch does with the input: 'avg' or 'max', both before a convolution by the name
            `branch_pool`, or 'reduce': every second place's maximum.
        pool_channels (`int`): Output channels of that convolution.
    """

    def __init__(self, in_channels: int, branches: dict[str, list], pool: str, pool_channels: int = 0):
        super().__init__()
        self.pool = pool
        self.paths = []  # of names; a tuple at the end for a fork
        for prefix, layers in branches.items():
            path, channels = [], in_channels
            for layer in layers:
                fork = layer if isinstance(layer, list) else [layer]
                for suffix, out_channels, *rest in fork:
                    setattr(self, prefix + suffix, ConvBlock(channels, out_channels, *rest))
                path.append(tuple(prefix + suffix for suffix, *_ in fork))
                channels = fork[0][1]
            self.paths.append(path)
        if pool != "reduce":
            self.branch_pool = ConvBlock(in_channels, pool_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for path in self.paths:
            current = x
            for names in path:
                current = torch.cat([getattr(self, name)(current) for name in names], 1)
            outputs.append(current)
        if self.pool == "reduce":
            outputs.append(F.max_pool2d(x, 3, 2))
        else:  # TensorFlow averages over what is there, without the padding
            pooled = (
                F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if self.pool == "avg" else F.max_pool2d(x, 3, 1, 1)
            )
            outputs.append(self.branch_pool(pooled))
        return torch.cat(outputs, 1)


def _block_35(in_channels: int, pool_channels: int) -> Mixed:
    branches = {
        "branch1x1": [("", 64, 1)],
        "branch5x5": [("_1", 48, 1), ("_2", 64, 5)],
        "branch3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)],
    }
    return Mixed(in_channels, branches, "avg", pool_channels)


def _block_17(width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches = {
        "branch1x1": [("", 192, 1)],
        "branch7x7": [("_1", width, 1), ("_2", width, row), ("_3", 192, column)],
        "branch7x7dbl": [
            ("_1", width, 1),
            ("_2", width, column),
            ("_3", width, row),
            ("_4", width, column),
            ("_5", 192, row),
        ],
    }
    return Mixed(768, branches, "avg", 192)


def _block_8(in_channels: int, pool: str) -> Mixed:
    fork_a, fork_b = [("_2a", 384, (1, 3)), ("_2b", 384, (3, 1))], [("_3a", 384, (1, 3)), ("_3b", 384, (3, 1))]
    branches = {
        "branch1x1": [("", 320, 1)],
        "branch3x3": [("_1", 384, 1), fork_a],
        "branch3x3dbl": [("_1", 448, 1), ("_2", 384, 3), fork_b],
    }
    return Mixed(in_channels, branches, pool, 192)


class InceptionV3(nn.Module):
    """
    The network. Names are those of the published weights.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3, padded=False)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        reduction = {"branch3x3": [("", 384, 3, 2)], "branch3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3, 2)]}
        self.Mixed_6a = Mixed(288, reduction, "reduce")
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        reduction = {
            "branch3x3": [("_1", 192, 1), ("_2", 320, 3, 2)],
            "branch7x7x3": [("_1", 192, 1), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, 3, 2)],
        }
        self.Mixed_7a = Mixed(768, reduction, "reduce")
        self.Mixed_7b = _block_8(1280, "avg")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(2048, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            images (`torch.Tensor` of shape (B, 3, H, W)): In [0, 255].

        Returns:
            Features (B, 2048); features by place (B, 192, 17, 17), of which sFID takes the first 7 channels; logits (B, 1008), without
            the bias, as the Inception Score has them.
        """
        x = (resize_as_tensorflow(images, INCEPTION_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c):
            x = block(x)
        spatial = self.Mixed_6d.branch1x1(x)  # TensorFlow's mixed_6/conv
        for block in (self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        pooled = x.mean((2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T


def resize_as_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Bilinear, (B, C, H, W) → (B, C, size, size), as TensorFlow 1 did and the published features have it: place i of the output
    lies at i·H/size of the input, not at the centre of its pixel, and nothing is blurred before.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        places = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = places.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (places - low).view(-1, *[1] * (3 - dim))
        images = images.index_select(dim, low) * (1 - share) + images.index_select(dim, high) * share
    return images


def load_inception(weights: "str | os.PathLike | None" = None) -> InceptionV3:
    """
    The network with the published weights.

    Args:
        weights (*optional*): The file `pt_inception-2015-12-05-6726825d.pth`; by default it is downloaded from where it was
            published, checked by the hash in its name, and kept in torch's cache.

    Raises:
        ValueError: if there are none, or others.
    """
    if weights is None:
        weights = INCEPTION_URL
        state_dict = torch.hub.load_state_dict_from_url(
            INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True
        )
    elif not os.path.isfile(weights):
        raise ValueError(f"Expected Inception-2015's weights to be a file, but there is none at {str(weights)!r}.")
    else:
        state_dict = load_original_state_dict(weights)
    model = InceptionV3().eval().requires_grad_(False)
    missing, unknown = model.load_state_dict(state_dict, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        raise ValueError(
            f"Expected {str(weights)!r} to hold Inception-2015's weights, but {(missing or unknown)[0]!r} is "
            f"{'missing' if missing else 'unknown'}."
        )
    return model
