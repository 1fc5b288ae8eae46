"""The dtypes that a user may choose, and those that a device has."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from diffusers_dmp.models import precision
from diffusers_dmp.models.precision import DTYPES, check_device, check_dtype, check_tf32, dtype_named


def pretend_gpu(monkeypatch, name: str, capability: tuple[int, int]) -> None:
    """Let PyTorch say that there is a GPU, of which it tells the same as of a real one."""
    monkeypatch.setattr(precision, "check_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability[0]))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # every GPU can emulate it


def test_dtypes_have_names():
    assert [dtype_named(name) for name in DTYPES] == [torch.float32, torch.float16, torch.bfloat16]
    assert dtype_named("float64", ("float32", "float64")) is torch.float64


@pytest.mark.parametrize("name", ["bf16", "float8_e4m3fn", "float64", "", "nn"])
def test_another_name_is_refused_with_the_valid_ones(name):
    said = f"Expected `dtype` to be one of float32, float16, bfloat16, but got '{name}'."
    with pytest.raises(ValueError) as refusal:
        dtype_named(name)
    assert str(refusal.value) == said


@pytest.mark.parametrize("name", DTYPES)
def test_a_cpu_has_all_of_them(name):
    check_dtype(dtype_named(name), "cpu")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int64])
def test_a_cpu_has_no_others(dtype):
    said = f"`dtype` to be float32, float16 or bfloat16 on cpu, but got {str(dtype)[6:]}"
    with pytest.raises(ValueError, match=said):
        check_dtype(dtype, torch.device("cpu"))


def test_a_gpu_that_only_emulates_bfloat16_has_none(monkeypatch):
    pretend_gpu(monkeypatch, "Tesla T4", (7, 5))
    check_dtype(torch.float16, "cuda:0")
    with pytest.raises(ValueError, match=r"`dtype` to be float32 or float16 on cuda:0 \(Tesla T4\), but got bfloat16"):
        check_dtype(torch.bfloat16, "cuda:0")
    with pytest.raises(ValueError, match=r"`tf32` on a GPU that has it .*, but got cuda:0 \(Tesla T4\)"):
        check_tf32("cuda:0")


def test_a_newer_gpu_has_both(monkeypatch):
    pretend_gpu(monkeypatch, "NVIDIA H100", (9, 0))
    check_dtype(torch.bfloat16, "cuda")
    check_tf32("cuda")


@pytest.mark.parametrize("is_new", [True, False])
def test_bfloat16_on_a_mac_needs_macos_14(monkeypatch, is_new):
    monkeypatch.setattr(precision, "check_device", torch.device)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: is_new and (major, minor) == (14, 0)
    )
    with nullcontext() if is_new else pytest.raises(ValueError, match="float32 or float16 on mps, but got bfloat16"):
        check_dtype(torch.bfloat16, "mps")


def test_a_cpu_has_no_tf32():
    with pytest.raises(ValueError, match="`tf32` on a GPU that has it .*, but got cpu; leave out `--tf32`"):
        check_tf32("cpu")


def test_a_device_that_is_not_there_is_refused_in_one_line():
    assert check_device("cpu") == torch.device("cpu")
    missing = next(name for name in ("cuda", "mps", "xpu") if not torch.get_device_module(name).is_available())
    for check in (check_device, check_tf32, lambda device: check_dtype(torch.bfloat16, device)):
        for device in (missing, "nonsense", ""):
            with pytest.raises(ValueError) as refusal:
                check(device)
            assert str(refusal.value) == f"Expected `device` to be a device of this computer, but got {device!r}."
