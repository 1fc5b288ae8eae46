"""How much memory a computation takes on an accelerator, without computing it: tensors on the `meta` device, counted while they live.

Counted is what PyTorch allocates for tensors, in the forward and the backward pass, at every moment. Not counted are the workspace
of convolutions, and what the allocator loses.
"""

import weakref
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MetaMemory(TorchDispatchMode):
    """
    A context that counts the bytes of the tensors that are made in it, on the `meta` device.

    Attributes:
        num_bytes, peak_bytes (`int`): The memory of the tensors that there are now, and the most that there has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0
        self._storages: set[int] = set()
        self._attention = patch.object(F, "scaled_dot_product_attention", _memory_saving_attention)

    def __enter__(self):
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._attention.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # such as weights, which were there before
        for storage in _storages(outputs):
            if storage._cdata not in given:
                self._count(storage)
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone."""
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.num_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._storages.remove(key)
        self.num_bytes -= num_bytes


def _storages(value: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors on the `meta` device."""
    return [each.untyped_storage() for each in tree_leaves(value) if isinstance(each, torch.Tensor) and each.is_meta]


def _memory_saving_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any):
    """Attention as CUDA computes it in float32; the one for `meta` would store the products of all queries and keys."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
