import pytest
import torch
from torch import nn

from diffusers_dmp.costs import gigaflops


def test_a_linear_layer_is_two_operations_for_each_weight_and_sample():
    assert gigaflops(nn.Linear(30, 50), torch.zeros(7, 30)) == pytest.approx(2 * 30 * 50 * 7 / 1e9)
