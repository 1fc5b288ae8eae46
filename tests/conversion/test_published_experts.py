"""PPAP's published adapters, exactly."""

import copy
import json
import re

import pytest
import torch
from conftest import FIXTURES, Vectors
from networks import make_resnet
from torch.nn import functional as F

from diffusers_dmp import GuidanceExperts, convert_checkpoint
from diffusers_dmp.conversion.ppap import peft_factors

RANK, ALPHA = 2, 8
ORIGINAL = (  # transformers' names → the original's
    (r"^classifier\.1", "fc"),
    (r"^resnet\.embedder\.embedder\.convolution", "conv1"),
    (r"^resnet\.embedder\.embedder\.normalization", "bn1"),
)


def original_name(name: str) -> str:
    for pattern, original in ORIGINAL:
        name = re.sub(pattern, original, name)
    match = re.match(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.(layer\.(\d)|shortcut)\.(\w+)\.(\w+)$", name)
    if not match:
        return name
    stage, layer, place, index, kind, part = match.groups()
    if place == "shortcut":
        return f"layer{int(stage) + 1}.{layer}.downsample.{['convolution', 'normalization'].index(kind)}.{part}"
    return f"layer{int(stage) + 1}.{layer}.{'conv' if kind == 'convolution' else 'bn'}{int(index) + 1}.{part}"


@pytest.fixture
def published():
    """Checkpoints of two experts as the published code writes them, and the networks that they stand for."""
    base = make_resnet()
    checkpoints, networks = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        network = copy.deepcopy(base)
        checkpoint = {}
        for name, tensor in network.state_dict().items():
            if "normalization" in name and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))  # each expert's own
            original = original_name(name)
            adapted = re.search(r"^conv1|conv[12]\.weight", original)
            if adapted:
                out, inside, k, _ = tensor.shape
                lora_a = 0.1 * torch.randn(RANK * k, inside * k, generator=generator)
                lora_b = 0.1 * torch.randn(out * k, RANK * k, generator=generator)
                module = original.removesuffix(".weight")
                checkpoint |= {f"resnet.{module}.lora_A": lora_a, f"resnet.{module}.lora_B": lora_b}
                checkpoint[f"resnet.{module}.conv.weight"] = tensor.clone()
                tensor.add_((lora_b @ lora_a).view(tensor.shape) * ALPHA / RANK)
            else:
                checkpoint[f"resnet.{original}"] = tensor.clone()
        checkpoints.append(checkpoint)
        networks.append(network)
    return checkpoints, networks


def test_published_convolution():
    vectors = Vectors("diffusion")
    assert "r=2, alpha=8" in json.loads((FIXTURES / "diffusion.json").read_text())["ppap.lora_conv.note"]
    lora_a, lora_b = vectors["ppap.lora_conv.A"], vectors["ppap.lora_conv.B"]
    delta = vectors["ppap.lora_conv.delta_scaled"]
    for num_out in (6, 100):  # of full rank, and of less
        rows = lora_b if num_out == 6 else torch.randn(3 * num_out, 6)
        expected = delta if num_out == 6 else 4 * (rows @ lora_a).view(num_out, 4, 3, 3)
        factor_a, factor_b = peft_factors(lora_a, rows, (num_out, 4, 3, 3))
        assert len(factor_a) == min(num_out, 2 * 3**2)
        product = F.conv2d(factor_a.transpose(0, 1), factor_b).transpose(0, 1)  # as PEFT multiplies them
        torch.testing.assert_close(4 * product, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_published_experts(published, tmp_path):
    checkpoints, networks = published
    config = {"gamma": RANK, "lora_alpha": ALPHA, "base_model_folder": tmp_path / "base"}
    experts = convert_checkpoint("ppap", checkpoints, config)
    images = torch.randn(2, 3, 32, 32)
    for expert, network in enumerate(networks):
        expected = network(images).logits
        for merged in (False, True):
            logits = experts.run_expert(expert, images, merged=merged).logits
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert experts.intervals.edges == (0, 500, 1000)
    experts.save_pretrained(tmp_path / "experts")
    loaded = GuidanceExperts.from_pretrained(tmp_path / "experts")
    torch.testing.assert_close(loaded.run_expert(1, images).logits, expected, atol=2e-5, rtol=1e-4)


def test_checkpoints_that_do_not_fit(published):
    checkpoints, _ = published
    with pytest.raises(ValueError, match="a ResNet's weights, but got 'blocks.0.attn'"):
        convert_checkpoint("ppap", [{"blocks.0.attn.weight": torch.zeros(1)}])
    with pytest.raises(ValueError, match="'classifier.1.bias' is missing"):
        convert_checkpoint("ppap", [{key: each for key, each in checkpoints[0].items() if "fc.bias" not in key}])
    other = checkpoints[1] | {"resnet.fc.weight": torch.zeros_like(checkpoints[1]["resnet.fc.weight"])}
    with pytest.raises(ValueError, match="'classifier.1.weight' to be the same for all experts, .* expert 1"):
        convert_checkpoint("ppap", [checkpoints[0], other], {"gamma": RANK})
