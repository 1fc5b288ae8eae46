"""Deterministic algorithms: the same computation repeated on one device gives the same bits.
https://pytorch.org/docs/stable/notes/randomness.html
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE_SIZE = ":4096:8"  # either this or the slower ":16:8" makes cuBLAS deterministic


def prepare_determinism() -> None:
    """
    Set what cuBLAS reads when CUDA is first used; to be called before that.

    A value that the user has set in the environment stays.
    """
    os.environ.setdefault(CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_SIZE)


@contextmanager
def deterministic_algorithms(enabled: bool = True) -> Iterator[None]:
    """
    Let PyTorch use deterministic algorithms only, and restore its former settings afterwards.

    Within the context, an operation that has no deterministic algorithm raises a `RuntimeError` that names it.

    Args:
        enabled (`bool`): Whether to change anything at all.
    """
    if not enabled:
        yield
        return
    cudnn = torch.backends.cudnn
    were_enabled = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were_enabled, warn_only=warned_only)
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
