"""Caches of what was computed from tensors: how to notice that a tensor has changed since."""

from collections.abc import Iterable

import torch


def tensor_state(tensor: torch.Tensor) -> tuple[int, int, int | None]:
    """
    Make a key that changes when the tensor is replaced or modified in place.

    PyTorch counts the in-place changes of a tensor for autograd. It does not count those made through `tensor.data`, nor
    those of a tensor that was created under `torch.inference_mode()`: after these the key stays the same.

    Args:
        tensor (`torch.Tensor`): Must stay alive as long as the key is used, as Python gives the id of a deleted object to
            a new one.

    Returns:
        `tuple`: The tensor's id, its address in memory, and its number of in-place changes, if PyTorch counts them.
    """
    return id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version


class TensorSnapshot:
    """
    Remember several tensors, to notice later that one of them was replaced or modified in place.

    The tensors are kept alive, not copied. See [`tensor_state`] for the changes that are not noticed.

    Args:
        tensors (`Iterable[torch.Tensor]`): The tensors to remember.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._tensors = list(tensors)
        self._states = [tensor_state(tensor) for tensor in self._tensors]

    def matches(self, tensors: Iterable[torch.Tensor]) -> bool:
        """
        Compare with the current tensors.

        Args:
            tensors (`Iterable[torch.Tensor]`): The tensors in the same order.

        Returns:
            `bool`: Whether they are the same tensors, unmodified.
        """
        return self._states == [tensor_state(tensor) for tensor in tensors]
