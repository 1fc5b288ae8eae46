"""Refuse weights that are infinite or not a number: a training that diverged leaves such, and they sample black images."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .weight_files import saved_files


def expect_finite_weights(weights: "nn.Module | Mapping[str, torch.Tensor]", source: "str | os.PathLike") -> None:
    """
    Check that all weights are finite numbers.

    Args:
        weights (`nn.Module` or `Mapping[str, torch.Tensor]`): A model, with its buffers, or a state dict.
        source: Where they are from, for the error.

    Raises:
        ValueError: if one is not; the first such tensor is named, with how many of its numbers.
    """
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    _check_finite(tensors.items(), source)


def expect_finite_pipeline(pipeline: Any, source: "str | os.PathLike") -> None:
    """
    Check that the weights of all of a pipeline's components are finite.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        source: The folder or Hub id that it is from, for the error.

    Raises:
        ValueError: if a weight is not; see [`expect_finite_weights`].
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            expect_finite_weights(component, os.path.join(source, name))


def expect_finite_files(folder: "str | os.PathLike") -> None:
    """
    Check that the weights of a saved model or pipeline are finite; one tensor is in memory at a time.

    Args:
        folder: Its folder.

    Raises:
        ValueError: if a weight is not; see [`expect_finite_weights`].
    """
    for path in saved_files(folder, "*.safetensors"):
        with safe_open(path, "pt") as file:
            _check_finite(((name, file.get_tensor(name)) for name in file.offset_keys()), path)


@torch.no_grad()
def _check_finite(tensors: "Iterable[tuple[str, torch.Tensor]]", source: "str | os.PathLike") -> None:
    for name, tensor in tensors:
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # A sum keeps every NaN and infinity, and needs no memory. One that overflows is looked at in detail, too.
        exact = tensor if tensor.dtype in (torch.float64, torch.complex64, torch.complex128) else tensor.float()
        if exact.sum().isfinite():
            continue
        count = int((~exact.isfinite()).sum())
        if count:
            raise ValueError(
                f"Expected the weights in {str(source)!r} to be finite, but {count:,} of {tensor.numel():,} numbers in {name!r} "
                "are NaN or infinite; its training diverged: take an earlier checkpoint, or train with a lower learning rate."
            )
