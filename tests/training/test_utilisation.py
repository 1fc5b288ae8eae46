"""Floating-point operations, and what a device can do."""

import time

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffusers_dmp.training import utilisation
from diffusers_dmp.training.utilisation import DeviceLimits, count_flops, measure_limits

N, M, D = 16, 24, 8


def attention(needs_grad: bool) -> torch.Tensor:
    query, key = torch.zeros(2, 3, N, D, requires_grad=needs_grad), torch.zeros(2, 3, M, D)
    return nn.functional.scaled_dot_product_attention(query, key, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limits_are_those_of_the_product_and_of_the_copy(dtype, monkeypatch):
    """With a clock of its own: every operation takes 4 ms, so that the first sizes count."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: 4e-3 * next(ticks))
    size, num_bytes = utilisation.MATRIX_SIZES[0], utilisation.COPIED_BYTES[0]
    limits = measure_limits("cpu", dtype)
    assert limits.flops_per_second == pytest.approx(2 * size**3 / 4e-3)
    assert limits.bytes_per_second == pytest.approx(2 * num_bytes / 4e-3)


def test_operations_grow_until_they_take_long_enough(monkeypatch):
    monkeypatch.setattr(utilisation, "_seconds", lambda operation, device: 1e-9)
    monkeypatch.setattr(utilisation, "MATRIX_SIZES", (8, 16))
    monkeypatch.setattr(utilisation, "COPIED_BYTES", (64, 128))
    assert measure_limits("cpu", torch.float32) == DeviceLimits(2 * 16**3 / 1e-9, 2 * 128 / 1e-9)


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    def seconds(operation, device):
        if len(calls) > utilisation.TIMINGS:
            raise torch.OutOfMemoryError("full")
        calls.append(operation)
        return 1e-6

    calls: list = []
    monkeypatch.setattr(utilisation, "_seconds", seconds)
    size, _ = utilisation._largest_timed(lambda size: lambda: size, (8, 16, 32), torch.device("cpu"))
    assert size == 8


def test_measuring_leaves_the_random_numbers_of_others_as_they_are(monkeypatch):
    """How many it takes depends on time: what a training takes after it would be another thing in every run."""
    monkeypatch.setattr(utilisation, "MATRIX_SIZES", (8, 16))
    state = torch.get_rng_state()
    assert utilisation.measure_flops_per_second("cpu", torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dtype_without_fractions_has_no_limits():
    with pytest.raises(ValueError, match="Expected `dtype` to be a floating-point dtype, but got torch.int8"):
        measure_limits("cpu", torch.int8)


def test_training_takes_three_times_the_operations_of_the_forward_pass():
    """The gradients of weights and of inputs are a product each; those of inputs that need none are not computed."""
    model = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 20))
    x = torch.zeros(7, 30)
    forward = 2 * 7 * (30 * 50 + 50 * 20)
    assert count_flops(lambda: model(x)) == forward
    assert count_flops(lambda: model(x).sum().backward()) == 3 * forward - 2 * 7 * 30 * 50
    assert (
        count_flops(lambda: torch.autograd.grad(model(x).sum(), model.parameters())) == 3 * forward - 2 * 7 * 30 * 50
    )


@pytest.mark.parametrize("needs_grad", [False, True])
def test_attention_is_two_products(needs_grad):
    assert count_flops(lambda: attention(needs_grad)) == 2 * 2 * 2 * 3 * N * M * D


def test_the_backward_pass_of_attention_is_five_products():
    forward = count_flops(lambda: attention(True))
    assert count_flops(lambda: attention(True).sum().backward()) == forward + 2.5 * forward


def test_a_compiled_model_is_counted_and_still_compiled_afterwards():
    x = torch.zeros(7, 30)
    counter = CompileCounter()
    model = torch.compile(nn.Linear(30, 50), backend=counter)
    assert count_flops(lambda: model(x)) == 2 * 7 * 30 * 50
    assert counter.frame_count == 0
    model(x)
    assert counter.frame_count == 1
