"""How what was computed from a tensor is known to be out of date."""

import torch


def tensor_state(tensor: torch.Tensor) -> tuple[int, int, int | None]:
    """Another one whenever the tensor is replaced or changed in place; as long as it lives, its own."""
    # PyTorch counts a tensor's changes for autograd's sake; of those made under `inference_mode` it does not
    return id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version
