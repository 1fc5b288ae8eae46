"""The precision of a training, by Accelerate's name."""

import torch

from ..models.precision import check_dtype

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """
    Check that a device computes in the precision of a training by itself.

    Args:
        mixed_precision (`str`): A key of `PRECISIONS`.
        device (`torch.device`): The device of the training.

    Raises:
        ValueError: if it does not, or there is no such precision.
    """
    if mixed_precision not in PRECISIONS:
        raise ValueError(
            f"Expected `mixed_precision` to be one of {', '.join(PRECISIONS)}, but got {mixed_precision!r}."
        )
    try:
        check_dtype(PRECISIONS[mixed_precision], device)
    except ValueError as error:
        raise ValueError(f"Expected another `mixed_precision` than {mixed_precision}. {error}") from error
    if mixed_precision == "fp16" and device.type == "cpu":
        # Accelerate would train in float32 without a word
        raise ValueError(
            "Expected `mixed_precision` to be no or bf16 on cpu, but got fp16, which needs an accelerator."
        )
