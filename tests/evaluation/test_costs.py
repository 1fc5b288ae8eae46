import pytest
import torch
from torch import nn

from diffusers_dmp.evaluation.costs import gigaflops


def test_a_linear_layer_is_two_operations_for_each_weight_and_sample():
    assert gigaflops(nn.Linear(30, 50), torch.zeros(7, 30)) == pytest.approx(2 * 30 * 50 * 7 / 1e9)


def test_attention_counts():
    """Two products of 2·B·H·N²·d operations each, on any device."""

    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert gigaflops(Attention(), torch.zeros(2, 3, 16, 8)) == pytest.approx(2 * 2 * 2 * 3 * 16**2 * 8 / 1e9)
