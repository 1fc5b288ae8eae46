"""Conversion of PPAP's published experts."""

import copy
import json
import re

import pytest
import torch
from conftest import FIXTURES, Vectors
from diffusers import DDPMScheduler
from networks import make_resnet
from torch.nn import functional as F

from diffusers_dmp import GuidanceExperts, convert_checkpoint
from diffusers_dmp.conversion.ppap import peft_factors

RANK, ALPHA = 2, 8
ORIGINAL = (  # names of transformers → published names
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
    """Checkpoints of two experts as the published code writes them, and the networks with their LoRA merged."""
    base = make_resnet()
    checkpoints, networks = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        network = copy.deepcopy(base)
        checkpoint = {}
        for name, tensor in network.state_dict().items():
            if "normalization" in name and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))  # differs between experts
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
    for num_out in (6, 100):  # a product of full rank, and of a lower one
        rows = lora_b if num_out == 6 else torch.randn(3 * num_out, 6)
        expected = delta if num_out == 6 else 4 * (rows @ lora_a).view(num_out, 4, 3, 3)
        factor_a, factor_b = peft_factors(lora_a, rows, (num_out, 4, 3, 3))
        assert len(factor_a) == min(num_out, 2 * 3**2)
        product = F.conv2d(factor_a.transpose(0, 1), factor_b).transpose(0, 1)  # as PEFT multiplies them
        # sums of 6 products of a magnitude of up to 10, times 4
        torch.testing.assert_close(4 * product, expected, atol=2e-5, rtol=1e-5)


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
    adm = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    assert experts.process.is_process_of(adm) and experts.config.sample_size == [256, 256]
    experts.save_pretrained(tmp_path / "experts")
    loaded = GuidanceExperts.from_pretrained(tmp_path / "experts")
    torch.testing.assert_close(loaded.run_expert(1, images).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("num_experts", [1, 2])
@torch.no_grad()
def test_published_baselines(published, num_experts):
    """Whole networks without LoRA: one for all timesteps, or one for each interval."""
    _, networks = published
    checkpoints = [
        {original_name(name): tensor for name, tensor in network.state_dict().items()} for network in networks
    ]
    experts = convert_checkpoint("ppap", checkpoints[:num_experts])
    assert experts.config.method == ("finetune" if num_experts == 1 else "multi_experts")
    images = torch.randn(2, 3, 32, 32)
    for expert, network in enumerate(networks[:num_experts]):
        torch.testing.assert_close(experts.run_expert(expert, images).logits, network(images).logits)


def published_deit(seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint as the published code writes it, with two blocks of two heads. Frozen weights do not depend on the seed."""
    frozen, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    width, layers = (
        128,
        {"attn.qkv": (384, 128), "attn.proj": (128, 128), "mlp.fc1": (256, 128), "mlp.fc2": (128, 256)},
    )
    weights = {
        "cls_token": torch.randn(1, 1, width, generator=frozen),
        "pos_embed": torch.randn(1, 1 + 4, width, generator=frozen),
        "patch_embed.proj.weight": torch.randn(width, 3, 8, 8, generator=frozen) / 14,
        "head.weight": torch.randn(10, width, generator=frozen) / 11,
        "norm.weight": 1 + 0.1 * torch.randn(width, generator=frozen),
    }
    sizes = {"patch_embed.proj": width, "head": 10, "norm": width}
    for block in range(2):
        for norm in ("norm1", "norm2"):
            weights[f"blocks.{block}.{norm}.weight"] = 1 + 0.1 * torch.randn(width, generator=frozen)
            sizes[f"blocks.{block}.{norm}"] = width
        for layer, (rows, columns) in layers.items():
            name = f"blocks.{block}.{layer}"
            inner = f"{name}.linear" if "attn" in layer else name
            weights[f"{inner}.weight"] = torch.randn(rows, columns, generator=frozen) / 11
            sizes[inner] = rows
            if "attn" in layer:
                weights[f"{name}.lora_A"] = torch.randn(RANK, columns, generator=own) / 11
                weights[f"{name}.lora_B"] = torch.randn(rows, RANK, generator=own)
    weights |= {f"{name}.bias": 0.1 * torch.randn(size, generator=own) for name, size in sizes.items()}
    return {f"deit.classifier.{name}": tensor for name, tensor in weights.items()}


def run_published_deit(checkpoint: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The published computation, written out: timm's DeiT-S, LoRA without a scale, images without normalisation."""
    weights = {name.removeprefix("deit.classifier."): tensor for name, tensor in checkpoint.items()}

    def linear(x, name):
        inner = f"{name}.linear" if f"{name}.linear.weight" in weights else name
        y = F.linear(x, weights[f"{inner}.weight"], weights[f"{inner}.bias"])
        return y + x @ weights[f"{name}.lora_A"].T @ weights[f"{name}.lora_B"].T if inner != name else y

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=8)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + weights["pos_embed"]
    for block in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # each (B, heads, tokens, 64)
        x = x + linear(((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@torch.no_grad()
def test_published_deit(tmp_path):
    checkpoints = [published_deit(seed=1), published_deit(seed=2)]
    experts = convert_checkpoint("ppap", checkpoints, {"base_model_folder": tmp_path / "base"})
    images = torch.randn(2, 3, 16, 16)
    for expert, checkpoint in enumerate(checkpoints):
        expected = run_published_deit(checkpoint, images)
        for merged in (False, True):
            logits = experts.run_expert(expert, images, merged=merged).logits
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    larger = torch.randn(2, 3, 32, 32)
    resized = F.interpolate(larger, (16, 16), mode="bilinear", antialias=True)
    expected_of_resized = run_published_deit(checkpoints[1], resized)
    torch.testing.assert_close(experts.run_expert(1, larger).logits, expected_of_resized, atol=2e-5, rtol=1e-4)
    experts.save_pretrained(tmp_path / "experts")
    loaded = GuidanceExperts.from_pretrained(tmp_path / "experts")
    torch.testing.assert_close(loaded.run_expert(1, images).logits, expected, atol=2e-5, rtol=1e-4)


def test_checkpoints_that_do_not_fit(published):
    checkpoints, _ = published
    with pytest.raises(ValueError, match="a ResNet's or a DeiT's weights, but got 'scratch'"):
        convert_checkpoint("ppap", [{"scratch.weight": torch.zeros(1)}])
    with pytest.raises(ValueError, match="`gamma` to be 2, which the shapes of the LoRA show, but got 16"):
        convert_checkpoint("ppap", checkpoints, {"gamma": 16})
    with pytest.raises(ValueError, match="no `network` for the experts of a ResNet"):
        convert_checkpoint("ppap", checkpoints, network=make_resnet())
    factor = {"resnet.layer1.0.conv1.lora_B": torch.zeros(5, RANK)}
    with pytest.raises(ValueError, match=r"LoRA of 'layer1.0.conv1' to fit .* \(5, 2\)"):
        convert_checkpoint("ppap", [checkpoints[0] | factor])
    with pytest.raises(ValueError, match="a DeiT's weights, but got 'blocks.0.ls1.gamma'"):
        convert_checkpoint("ppap", [published_deit(1) | {"deit.classifier.blocks.0.ls1.gamma": torch.zeros(1)}])
    with pytest.raises(ValueError, match="'classifier.1.bias' is missing"):
        convert_checkpoint("ppap", [{key: each for key, each in checkpoints[0].items() if "fc.bias" not in key}])
    other = checkpoints[1] | {"resnet.fc.weight": torch.zeros_like(checkpoints[1]["resnet.fc.weight"])}
    with pytest.raises(ValueError, match="'classifier.1.weight' to be the same for all experts, .* expert 1"):
        convert_checkpoint("ppap", [checkpoints[0], other], {"gamma": RANK})


@pytest.mark.parametrize("expert", [0, 1])
def test_no_part_of_an_experts_lora_is_lost(published, expert):
    """Where one expert lacks a part, the others' would be left out, too."""
    checkpoints, _ = published
    for parts in (["lora_A"], ["lora_B"], ["lora_A", "lora_B"]):
        broken = [dict(checkpoint) for checkpoint in checkpoints]
        for part in parts:
            del broken[expert][f"resnet.layer1.0.conv1.{part}"]
        with pytest.raises(ValueError, match="lora|LoRA"):
            convert_checkpoint("ppap", broken, {})
