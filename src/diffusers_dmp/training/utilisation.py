"""Floating-point operations, and what a device can do: its limits are measured, not taken from a data sheet."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# rows and columns; three float32 matrices of the last one are 0.8 GB
MATRIX_SIZES = (256, 512, 1024, 2048, 4096, 8192)
COPIED_BYTES = (2**26, 2**28, 2**30)  # more than caches hold
LONG_ENOUGH = 2e-3  # seconds; to launch an operation and to wait for it takes a hundredth of that
TIMINGS = 5


@dataclass(frozen=True)
class DeviceLimits:
    """
    What a device reached in a large matrix product and in a large copy.

    Args:
        flops_per_second (`float`): Floating-point operations per second; an addition and a multiplication are two.
        bytes_per_second (`float`): Bytes per second, read and written.
    """

    flops_per_second: float
    bytes_per_second: float


def measure_limits(device: torch.device | str, dtype: torch.dtype) -> DeviceLimits:
    """
    Measure what a device can do, in less than half a second; see [`measure_flops_per_second`].

    The copy grows as the product does, to 1 GiB.

    Args:
        device (`torch.device`): The device to measure.
        dtype (`torch.dtype`): The dtype of the matrices, a floating-point one.

    Raises:
        ValueError: if `dtype` is not a floating-point one.
    """
    flops_per_second = measure_flops_per_second(device, dtype)
    device = torch.device(device)

    def copy_of(num_bytes: int) -> Callable[[], object]:
        source, target = torch.zeros(2, num_bytes, dtype=torch.uint8, device=device)
        return lambda: target.copy_(source)

    num_bytes, seconds = _largest_timed(copy_of, COPIED_BYTES, device)
    return DeviceLimits(flops_per_second, 2 * num_bytes / seconds)


def measure_flops_per_second(device: torch.device | str, dtype: torch.dtype) -> float:
    """
    Measure the floating-point operations per second of a device, in a large matrix product.

    It grows until it takes 2 ms, or to 8192 × 8192 elements, and the fastest of several counts: other work on the device only makes
    it slower. A product of float32 uses TF32 where PyTorch is allowed to. PyTorch's global random numbers stay as they are.

    Args:
        device (`torch.device`): The device to measure.
        dtype (`torch.dtype`): The dtype of the matrices, a floating-point one.

    Raises:
        ValueError: if `dtype` is not a floating-point one.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"Expected `dtype` to be a floating-point dtype, but got {dtype}.")
    device = torch.device(device)
    # random, as a GPU takes less power for zeros, and is faster with them
    generator = torch.Generator(device).manual_seed(0)

    def product_of(size: int) -> Callable[[], object]:
        a, b = torch.randn(2, size, size, generator=generator, dtype=dtype, device=device)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    size, seconds = _largest_timed(product_of, MATRIX_SIZES, device)
    return 2 * size**3 / seconds


def _largest_timed(
    make: Callable[[int], Callable[[], object]], sizes: tuple[int, ...], device: torch.device
) -> tuple[int, float]:
    """
    Time an operation of the first size that takes long enough, or of the last one that fits into memory.

    Returns:
        The size, and the seconds that it took.
    """
    timed: tuple[int, float] | None = None
    for size in sizes:
        try:
            operation = make(size)
            operation()  # to warm up
            timed = size, min(_seconds(operation, device) for _ in range(TIMINGS))
        except torch.OutOfMemoryError:
            break
        if timed[1] >= LONG_ENOUGH:
            break
    if timed is None:
        raise torch.OutOfMemoryError(f"Expected memory for a few MiB on {device}, but there was none.")
    return timed


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    """The seconds that an operation takes on a device."""
    synchronise(device)
    start = time.perf_counter()
    operation()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count_flops(function: Callable[[], Any], recomputed: bool = True) -> int:
    """
    Count the floating-point operations of a call, backward passes in it included.

    These are matrix products, convolutions and attention, as PyTorch's `FlopCounterMode` counts them: an addition and a
    multiplication are two. Everything else (norms, activations, sums of two tensors) is left out, as usual.

    Args:
        function (`Callable`): Called once, without arguments. What it compiled runs eagerly, since only operations that are
            dispatched are seen.
        recomputed (`bool`): Whether to count what gradient checkpointing computes again, if the call is a backward pass alone.
    """
    # Under a dispatch mode, what is to be compiled would be given up for ever. Importing the compiler takes a second: if
    # nobody has, nothing is compiled.
    eagerly = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eagerly, _FlopCounter(recomputed) as counter:
        function()
    return counter.total


class _FlopCounter(TorchDispatchMode):
    """
    Counts the floating-point operations of everything that is dispatched.

    PyTorch's `FlopCounterMode` does not see what `torch.autograd.grad` computes, which guidance calls; nor does it know the
    attention of CPUs.

    Args:
        recomputed (`bool`): See [`count_flops`].
    """

    def __init__(self, recomputed: bool):
        super().__init__()
        self.recomputed = recomputed
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        # a backward pass has gradients disabled, except where a checkpoint goes forward again
        if formula is not None and (self.recomputed or not torch.is_grad_enabled()):
            self.total += formula(*args, **kwargs, out_val=output)
        return output


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """
    The operations of attention.

    Args:
        query (`torch.Tensor` of shape (B, H, N, d)), key (`torch.Tensor` of shape (B, H, M, d)), value (`torch.Tensor` of shape
            (B, H, M, e)): Its inputs.
    """
    # Q Kᵀ, and the weights times V
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(grad_out: torch.Tensor, *args: torch.Tensor, **kwargs: Any) -> int:
    """The operations of attention's backward pass: the weights once more, then the gradients of V, of the weights, of Q and K."""
    query, key, value = args[:3]
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
