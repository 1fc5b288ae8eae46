"""An accelerator without one: tensors that say they are elsewhere, compute on the CPU, and record memory and when the CPU waits.

On a real accelerator the CPU runs ahead, and waits where a value must be known to go on (`item`, `nonzero`) or is moved between the
two. These tensors say that they are on the device 'meta', on which nothing is computed otherwise.
"""

import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta:0")
aten = torch.ops.aten
VALUES_NEEDED = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}


class PretendedTensor(torch.Tensor):
    """A tensor that is on the accelerator as far as anybody can tell, and holds its values on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        strides, offset = held.stride(), held.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=strides, storage_offset=offset, dtype=held.dtype, device=DEVICE
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("Expected to be used inside of a `PretendedAccelerator`.")


class PretendedGenerator(torch.Generator):
    """A generator that says it is on the accelerator, and makes the CPU's random numbers."""

    device = DEVICE

    def __new__(cls, device: Any = None):
        return super().__new__(cls, "cpu")


class PretendedAccelerator(TorchDispatchMode):
    """
    A context in which [`PretendedTensor`]s compute.

    Attributes:
        waits (`list[str]`): The operations so far that a CPU would have waited in.
        num_bytes, peak_bytes (`int`): The memory of the tensors that are on it now, and the most that there has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.num_bytes = self.peak_bytes = 0
        self._storages: set[int] = set()
        self._lists = _Lists()

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._lists.__exit__(*exception)

    def put(self, value: Any) -> Any:
        """Move a tensor, or all tensors of a model or of containers, without waiting."""
        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: self.put(tensor) for name, tensor in tensors.items() if tensor is not None})
            return value
        with torch.no_grad():
            return tree_map(lambda x: self._wrapped(x.detach()) if _is_here(x) else x, value)

    def generator(self, seed: int = 0) -> PretendedGenerator:
        """A generator on the accelerator."""
        return PretendedGenerator().manual_seed(seed)

    def put_to_train(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move a model that is trained: unlike by [`~PretendedAccelerator.put`], its parameters stay parameters."""
        gradients = {id(module): _needing_gradients(module) for module in model.modules()}
        with self:
            for module in self.put(model).modules():
                for name, needs_gradients in gradients[id(module)].items():
                    module._parameters[name] = torch.nn.Parameter(module._parameters[name], needs_gradients)
        return model

    def _wrapped(self, held: torch.Tensor) -> PretendedTensor:
        """Wrap a tensor, and count its memory until it is gone."""
        storage = held.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if address not in self._storages:
            self._storages.add(address)
            self.num_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            weakref.finalize(storage, self._forget, address, num_bytes)
        return PretendedTensor(held)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._storages.remove(address)
        self.num_bytes -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        comes_from = any(isinstance(x, PretendedTensor) for x in inputs)
        goes_to = comes_from
        if kwargs.get("device") is not None:
            goes_to = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = "cpu"
        elif func is aten.copy_.default:
            goes_to, comes_from = (isinstance(x, PretendedTensor) for x in args[:2])
        elif comes_from and any(_is_here(x) and x.ndim > 0 for x in inputs):
            raise RuntimeError(
                f"Expected all tensors of {func} to be on one device, but got some on {DEVICE} and some on the CPU."
            )
        is_moved = bool(inputs) and comes_from != goes_to and not kwargs.get("non_blocking")
        if comes_from and not goes_to and kwargs.get("non_blocking"):
            raise RuntimeError(
                f"Expected {func} to wait for what it copies to the CPU, where it would be read too early."
            )
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            index.dtype == torch.bool for index in args[1] if index is not None
        )
        if is_moved or (comes_from and (func in VALUES_NEEDED or by_mask)):
            self.waits.append(str(func))
        if func is aten._fused_sdp_choice.default:
            return 0  # the one attention that is written in operations of its own
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, PretendedTensor) else x, (args, kwargs))
        outputs = func(*args, **kwargs)
        if not goes_to or func is aten._local_scalar_dense.default:
            return outputs
        return tree_map(lambda x: self._wrapped(x) if isinstance(x, torch.Tensor) else x, outputs)


def _needing_gradients(module: torch.nn.Module) -> dict[str, bool]:
    """Of a module's own parameters, which require gradients."""
    return {name: each.requires_grad for name, each in module._parameters.items() if each is not None}


def _is_here(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, PretendedTensor)


class _Lists(TorchFunctionMode):
    """What PyTorch does not do for tensors of such classes: move from lists and to them, by way of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if func is torch.Tensor.tolist and isinstance(args[0], PretendedTensor):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)
