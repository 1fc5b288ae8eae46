"""Gates that are kept while sampling, where the same timesteps and labels come again."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ..models.caching import tensor_state

MAX_KEPT_BYTES = 64 * 2**20  # for 250 steps, the published number, of DiT-XL/2 up to a batch of 9


class KeptGates:
    """The gates of the last calls, as far as `MAX_KEPT_BYTES` reach, by the inputs that decided them."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Drop all of them."""
        self.gates, self.num_bytes = OrderedDict(), 0
        self.state = self.weights = None

    def __call__(
        self, inputs: list[Any], weights: list[torch.Tensor], device_type: str, compute: Callable[[], Any]
    ) -> Any:
        """
        Args:
            inputs (`list`): What decides the gates besides the weights, the timestep first.
            weights (`list[torch.Tensor]`): When one of them changes, nothing is kept.
            device_type (`str`): Where it is computed, for the precision of autocast there.
            compute (`Callable`): What to call if no gates are kept for these inputs.
        """
        state = [tensor_state(weight) for weight in weights]
        state += [torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)]
        if state != self.state:
            self.forget()
            self.state, self.weights = state, weights  # alive, they are the only ones with their ids
        key, tensors = _key(inputs)
        if key is None:
            return compute()
        if key in self.gates:
            self.gates.move_to_end(key)
            return self.gates[key][0]
        computed = compute()
        self.gates[key] = computed, tensors
        self.num_bytes += computed.gates.nbytes
        while self.num_bytes > MAX_KEPT_BYTES:
            _, (oldest, _) = self.gates.popitem(last=False)
            self.num_bytes -= oldest.gates.nbytes
        return computed


def _key(inputs: list[Any]) -> tuple[tuple | None, list[torch.Tensor]]:
    """
    What stands for these inputs, without waiting for an accelerator: tensors on the CPU for their values, others for
    themselves, and those that have to be kept alive for it. None where the first of them, the timestep, is such a one (there
    is another at every step), or for inputs of other types.
    """
    key, alive = [], []
    for position, value in enumerate(inputs):
        if isinstance(value, dict):
            parts, tensors = _key([None, *value.values()])
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
