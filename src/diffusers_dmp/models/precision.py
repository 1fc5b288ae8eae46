"""The floating-point formats that models compute in: their names, and which of them a device of this computer has."""

from collections.abc import Sequence

import torch

DTYPES = ("float32", "float16", "bfloat16")  # those that a user may choose


def dtype_named(name: str, names: Sequence[str] = DTYPES, argument: str = "dtype") -> torch.dtype:
    """
    Return the dtype of a name.

    Args:
        name (`str`): The name, such as 'bfloat16'.
        names (of `str`): The valid ones.
        argument (`str`): What the argument is called in the error.

    Raises:
        ValueError: if it is none of them.
    """
    if name not in names:
        raise ValueError(f"Expected `{argument}` to be one of {', '.join(names)}, but got {name!r}.")
    return getattr(torch, name)


def check_device(device: "torch.device | str", argument: str = "device") -> torch.device:
    """
    Return a device, if this computer has it.

    Args:
        device (`torch.device` or `str`): The device, such as 'cuda'.
        argument (`str`): What the argument is called in the error.

    Raises:
        ValueError: if it has not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either for a device that it was not compiled for
        raise ValueError(f"Expected `{argument}` to be a device of this computer, but got {str(device)!r}.") from error
    return torch.device(device)


def check_dtype(dtype: torch.dtype, device: "torch.device | str") -> None:
    """
    Check that a device computes in a dtype by itself. A GPU that only emulates bfloat16 is slower in it than in float32.

    Args:
        dtype (`torch.dtype`): The dtype.
        device (`torch.device` or `str`): The device.

    Raises:
        ValueError: if it does not, the dtype is none of `DTYPES`, or this computer has no such device.
    """
    device = check_device(device)
    available = [name for name in DTYPES if name != "bfloat16" or _has_bfloat16(device)]
    name = str(dtype).removeprefix("torch.")
    if name not in available:
        listed = f"{', '.join(available[:-1])} or {available[-1]}"
        raise ValueError(f"Expected `dtype` to be {listed} on {_device_name(device)}, but got {name}.")


def check_tf32(device: "torch.device | str") -> None:
    """
    Check that a device has TF32, the format of 10 bits of precision in which recent GPUs multiply float32 matrices.

    Args:
        device (`torch.device` or `str`): The device.

    Raises:
        ValueError: if it has not, or this computer has no such device.
    """
    device = check_device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_tf32_supported():
                return
    raise ValueError(
        f"Expected `tf32` on a GPU that has it (NVIDIA's since Ampere), but got {_device_name(device)}; leave out `--tf32`."
    )


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def _device_name(device: torch.device) -> str:
    """The device in an error, with the name of a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
