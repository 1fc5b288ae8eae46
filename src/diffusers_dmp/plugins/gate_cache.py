"""A cache of gates for sampling, where the same timesteps and labels come again."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ..models.caching import tensor_state
from .gating import PromptGates

MAX_CACHED_BYTES = 64 * 2**20  # for 250 steps, the published number, of DiT-XL/2 up to a batch of 9


class GateCache:
    """Caches the gates of the latest calls by their inputs, up to `MAX_CACHED_BYTES`."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Empty the cache."""
        # with the tensors of each key: as long as they live, no other tensor gets their ids
        self._gates: OrderedDict[tuple, tuple[PromptGates, list[torch.Tensor]]] = OrderedDict()
        self._num_bytes = 0
        self._state: list[Any] = []  # of the weights and of autocast
        self._weights: list[torch.Tensor] = []

    def get(
        self,
        inputs: list[Any],
        weights: list[torch.Tensor],
        device_type: str,
        compute: Callable[[], PromptGates],
    ) -> PromptGates:
        """
        Return the cached gates for some inputs, or compute and cache them.

        Args:
            inputs (`list`): All that decides the gates besides the weights, the timestep first.
            weights (`list[torch.Tensor]`): The cache is emptied when one of them changes.
            device_type (`str`): Where the gates are computed. The cache is emptied when autocast changes there.
            compute (`Callable[[], PromptGates]`): Computes the gates.

        Returns:
            [`PromptGates`]
        """
        state: list[Any] = [tensor_state(weight) for weight in weights]
        if torch.amp.is_autocast_available(device_type):
            state += [torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)]
        if state != self._state:
            self.clear()
            self._state, self._weights = state, weights
        key, tensors = _cache_key(inputs)
        if key is None:
            return compute()
        if key in self._gates:
            self._gates.move_to_end(key)
            return self._gates[key][0]
        computed = compute()
        self._gates[key] = computed, tensors
        self._num_bytes += computed.gates.nbytes
        while self._num_bytes > MAX_CACHED_BYTES:
            _, (oldest, _) = self._gates.popitem(last=False)
            self._num_bytes -= oldest.gates.nbytes
        return computed


def _cache_key(inputs: list[Any]) -> tuple[tuple | None, list[torch.Tensor]]:
    """
    Return a key for some inputs without waiting for an accelerator, and the tensors that must live as long as the key.

    A tensor on the CPU is represented by its values, another tensor by its identity. The key is None if the first input, the
    timestep, is a tensor on an accelerator, because samplers pass a new one at every step. It is also None for inputs that
    are neither tensors nor plain values.
    """
    key: list[Any] = []
    alive: list[torch.Tensor] = []
    for position, value in enumerate(inputs):
        if isinstance(value, dict):
            parts, tensors = _cache_key([None, *value.values()])
            if parts is None:
                return None, []
            key.append(parts)
            alive += tensors
        elif value is None or isinstance(value, (bool, int, float, str)):
            key.append(value)
        elif not isinstance(value, torch.Tensor):
            return None, []
        elif value.is_cpu:
            key.append((tuple(value.shape), *value.flatten().tolist()))
        elif position == 0:
            return None, []
        else:
            key.append(tensor_state(value))
            alive.append(value)
    return tuple(key), alive
