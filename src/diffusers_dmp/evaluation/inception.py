"""Inception-2015, the network whose features define FID, for the weights that were published for PyTorch.
Architecture: https://arxiv.org/abs/1512.00567, weights: https://github.com/mseitzer/pytorch-fid/releases (fid_weights),
layers of the features: https://github.com/openai/guided-diffusion/tree/main/evaluations

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
INCEPTION_SIZE = 299  # height and width in pixels that images are resized to
NUM_CLASSES = 1008  # ImageNet's 1,000 and eight unused ones


class ConvBlock(nn.Module):
    """
    Convolution, BatchNorm and ReLU.

    Args:
        in_channels, out_channels (`int`): Channels.
        kernel (`int` or `tuple[int, int]`): Size of the convolution's kernel.
        stride (`int`): Its stride; with a stride of 2 there is no padding.
        padded (`bool`): Whether to pad, so that the size stays the same.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padded: bool = True,
    ):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """
    Several branches of convolutions with the same input, whose outputs are concatenated.

    Args:
        in_channels (`int`): Channels of the input.
        branches (`dict[str, list]`): By prefix of the weights' names, the convolutions of a branch in order. Each is a tuple of
            suffix, output channels, kernel and, if it is not 1, stride. A list of tuples at the end of a branch is a fork:
            convolutions with the same input, whose outputs are concatenated.
        pool (`str`): What the last branch does with the input: average pooling ('avg') or maximum pooling ('max') and then a
            convolution `branch_pool`; or maximum pooling with stride 2 and no convolution ('reduce').
        pool_channels (`int`): Output channels of `branch_pool`.
    """

    def __init__(self, in_channels: int, branches: dict[str, list], pool: str, pool_channels: int = 0):
        super().__init__()
        self.pool = pool
        self.paths: list[list[tuple[str, ...]]] = []  # names of the convolutions; several in a tuple for a fork
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
        else:  # as TensorFlow, which leaves the padding out of averages
            pooled = (
                F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if self.pool == "avg" else F.max_pool2d(x, 3, 1, 1)
            )
            outputs.append(self.branch_pool(pooled))
        return torch.cat(outputs, 1)


def _block_35(in_channels: int, pool_channels: int) -> Mixed:
    branches: dict[str, list] = {
        "branch1x1": [("", 64, 1)],
        "branch5x5": [("_1", 48, 1), ("_2", 64, 5)],
        "branch3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)],
    }
    return Mixed(in_channels, branches, "avg", pool_channels)


def _block_17(width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches: dict[str, list] = {
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
    branches: dict[str, list] = {
        "branch1x1": [("", 320, 1)],
        "branch3x3": [("_1", 384, 1), fork_a],
        "branch3x3dbl": [("_1", 448, 1), ("_2", 384, 3), fork_b],
    }
    return Mixed(in_channels, branches, pool, 192)


class InceptionV3(nn.Module):
    """The network; its modules have the names of the published weights."""

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
        reduction: dict[str, list] = {
            "branch3x3": [("", 384, 3, 2)],
            "branch3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3, 2)],
        }
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
        Compute features and logits.

        Args:
            images (`torch.Tensor` of shape (B, 3, H, W)): In [0, 255], of any size.

        Returns:
            The pooled features (B, 2048); the spatial features (B, 192, 17, 17), of which sFID uses the first 7 channels; the
            logits (B, 1008) without bias, which the published Inception Score uses.
        """
        x = (resize_as_tensorflow(images, INCEPTION_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c):
            x = block(x)
        spatial = self.Mixed_6d.branch1x1(x)  # mixed_6/conv in TensorFlow
        for block in (self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        pooled = x.mean((2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T


def resize_as_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Resize bilinearly as TensorFlow 1 did, which the published features depend on.

    Pixel i of the output is read at position i·H/size of the input. There is no half-pixel offset and no antialiasing.

    Args:
        images (`torch.Tensor` of shape (B, C, H, W)): Floating point.
        size (`int`): Height and width of the output in pixels.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        positions = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = positions.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (positions - low).view(-1, *[1] * (3 - dim))
        images = images.index_select(dim, low) * (1 - share) + images.index_select(dim, high) * share
    return images


def load_inception(weights: "str | os.PathLike | None" = None) -> InceptionV3:
    """
    Load the network with the published weights.

    Args:
        weights (*optional*): The file `pt_inception-2015-12-05-6726825d.pth`. By default it is downloaded from `INCEPTION_URL`,
            checked against the hash in its name, and stored in torch's cache.

    Returns:
        The network in eval mode, without gradients.

    Raises:
        ValueError: if there is no such file, or if it contains other weights.
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
