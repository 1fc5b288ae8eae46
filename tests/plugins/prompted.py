"""What several tests of the plugins use besides fixtures."""

import torch

from diffusers_dmp import PromptPatch

SIZES = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2, "sample_size": 8}


def gates_of(conditioning: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, depth: int) -> torch.Tensor:
    """Compute the gates by their formula, one block at a time."""
    blocks = []
    for block in range(depth):
        with_depth = torch.cat([conditioning, torch.full((len(conditioning), 1), float(block))], dim=1)
        blocks.append((with_depth @ weight.T + bias).softmax(-1))
    return torch.stack(blocks)


def count_gatings(patch: PromptPatch) -> list:
    """Return a list that gets one more item each time that gates are computed."""
    computed = []
    patch.register_forward_hook(lambda patch, args, output: computed.append(args))
    return computed
