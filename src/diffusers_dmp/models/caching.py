"""Caches of what was computed or copied from tensors: how to notice that a tensor has changed since."""

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


class CopiesOnCPU:
    """
    Copies of tensors on the CPU, each made once as long as its tensor is not modified: it makes the CPU wait for an accelerator.

    Pipelines call their denoiser with views of the scheduler's timesteps, `timesteps[step].expand(B)`. What a view shows is
    known from the copy of the whole tensor and the view's place in it, so that a sampling waits once. Only what is certain is
    taken from a copy. These are read each time: a tensor that is no view of a longer one, and one that was created under
    `torch.inference_mode()`, whose changes PyTorch does not count; see also [`tensor_state`].
    """

    MAX_COPIES = 2  # the time of a call may be seen in one tensor, and the scheduler's timesteps be another
    MAX_VALUES = 2**16  # of a tensor that is copied whole to read a part of it

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, tuple, torch.Tensor]] = []  # the latest first

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        Return a tensor on the CPU, without waiting if it was asked for before.

        Args:
            tensor (`torch.Tensor`): On any device. It is kept alive, as long as it is one of the latest.

        Returns:
            `torch.Tensor`: The same values, without gradients, not to be modified.
        """
        if tensor.is_cpu or tensor.is_inference():
            return tensor.detach().cpu()
        state = tensor_state(tensor)
        known = next((copy for copy in self._copies if copy[0] is tensor and copy[1] == state), None)
        if known is None:
            known = tensor, state, tensor.detach().cpu()
        others = [copy for copy in self._copies if copy[0] is not tensor]
        self._copies = [known, *others][: self.MAX_COPIES]
        return known[2]

    def shown_by(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        Return a tensor on the CPU, without waiting if it is a view of one of which another view was asked for before.

        Args:
            tensor (`torch.Tensor`): On any device.

        Returns:
            `torch.Tensor`: The same values, without gradients, not to be modified.
        """
        # private, but there is no public way to know which tensor a view shows
        base = None if tensor.is_cpu else tensor._base
        is_part = (
            base is not None
            and 1 < base.numel() <= self.MAX_VALUES
            and base.is_contiguous()
            and base.dtype == tensor.dtype
        )
        if base is None or not is_part:
            return tensor.detach().cpu()
        offset = tensor.storage_offset() - base.storage_offset()
        return self.whole(base).as_strided(tensor.shape, tensor.stride(), offset)

    def __getstate__(self) -> dict[str, list]:
        return {"_copies": []}  # the copied or loaded owner meets other tensors
