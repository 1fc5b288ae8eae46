"""Guidance experts of networks that are not of transformers: of torchvision, timm, torch.hub, or of one's own."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from networks import PLAIN, make_resnet, trained
from plain_networks import ANIMALS, PLAIN_NETWORKS, Depth, MeanColour, ResNet, VisionTransformer, make_plain, out
from torch import nn
from torch.nn.utils import parametrizations
from transformers.utils import ModelOutput

from diffusers_dmp import ClassTarget, DepthTarget, GuidanceExperts, GuidedScheduler, SegmentationTarget
from diffusers_dmp.models.vision import ImagePreprocessor
from diffusers_dmp.training.objectives.distillation import DistillationObjective, ExpertStudent
from diffusers_dmp.training.objectives.objective import NoisedBatch

TIMESTEPS = torch.tensor([950, 10, 250, 390, 30])  # experts 4, 0, 1, 1, 0


@pytest.fixture(params=PLAIN_NETWORKS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make_experts(kind: str, **settings) -> GuidanceExperts:
    network_class, told = PLAIN_NETWORKS[kind]
    return GuidanceExperts(
        make_plain(network_class), **{**PLAIN, "rank": 2, "base_model_name_or_path": kind} | told | settings
    )


def adapted(kind: str, **settings) -> GuidanceExperts:
    """Experts that differ from one another, as after training."""
    return trained(make_experts(kind, **settings))


def load(kind: str, folder, **given) -> GuidanceExperts:
    network_class, told = PLAIN_NETWORKS[kind]
    function = {"outputs": told["outputs"]} if callable(told["outputs"]) else {}
    return GuidanceExperts.from_pretrained(folder, **{"network": make_plain(network_class)} | function | given)


def result(output: ModelOutput) -> torch.Tensor:
    return output.predicted_depth if "predicted_depth" in output else output.logits


# What experts compute


@pytest.mark.parametrize("method", ["ppap", "multi_experts"])
@torch.no_grad()
def test_fresh_experts_are_the_network(kind, method, images):
    network_class, told = PLAIN_NETWORKS[kind]
    expected = make_plain(network_class)(ImagePreprocessor([0.5] * 3, [0.5] * 3, None)(images))
    expected = told["outputs"](expected) if callable(told["outputs"]) else expected
    experts = make_experts(kind, method=method)
    for expert in (0, 4):
        predicted = result(experts.run_expert(expert, images))
        torch.testing.assert_close(predicted.view(expected.shape), expected)


@torch.no_grad()
def test_merged_is_unmerged(kind, images):
    """A dilated convolution included."""
    experts = adapted(kind)
    outputs = []
    for expert in (1, 3):
        unmerged = result(experts.run_expert(expert, images, merged=False))
        torch.testing.assert_close(result(experts.run_expert(expert, images)), unmerged, atol=1e-5, rtol=1e-4)
        outputs.append(unmerged)
    assert not torch.allclose(*outputs, atol=1e-3)


@torch.no_grad()
def test_each_image_gets_its_own_expert(kind, images):
    experts = adapted(kind)
    together = result(experts(images, TIMESTEPS))
    for index, expert in enumerate([4, 0, 1, 1, 0]):
        alone = result(experts.run_expert(expert, images[index : index + 1]))
        torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-4)


def test_the_head_of_a_classifier_is_not_adapted():
    for kind, head in (("torchvision ResNet", "fc"), ("timm ViT", "head")):
        own = make_experts(kind).expert_tensors(0)
        assert not [name for name in own if name.startswith(f"{head}.")]
        with_bias = make_experts(kind, adapt_head_bias=True).expert_tensors(0)
        assert with_bias.keys() - own.keys() == {f"{head}.bias"}
    own = make_experts("torchvision ResNet").expert_tensors(0)
    for name in ("bn1.running_var", "layer2.0.downsample.1.weight", "layer1.0.conv2.lora_B.weight"):
        assert name in own
    assert "head.bias" in make_experts("depth").expert_tensors(0)  # not a classifier's


def test_a_function_may_return_anything(images):
    """An output of transformers, or tensors under any names, for a target of one's own."""
    network = make_plain(ResNet)
    settings = PLAIN | {"method": "finetune", "num_experts": 1}
    experts = GuidanceExperts(network, **settings, outputs=lambda logits: ModelOutput(logits=logits))
    expected = experts.run_expert(0, images)["logits"]
    experts = GuidanceExperts(
        network, **settings, outputs=lambda logits: {"image_embeds": logits, "first": logits[:, 0]}
    )
    output = experts(images, torch.tensor(1))
    torch.testing.assert_close(output.image_embeds, expected)
    assert output.first.shape == (5,) and "logits" not in output


# Guiding


def guided(target, images: torch.Tensor, experts: GuidanceExperts, scale: float) -> torch.Tensor:
    """Samples after ten steps, of a denoiser for images that are white noise: ε = σ·x_t."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    scheduler = GuidedScheduler(scheduler, experts, target, scale=scale)
    for timestep in scheduler.timesteps:
        sigma = (1 - scheduler.alphas_cumprod[timestep]).sqrt()
        images = scheduler.step(sigma * images, timestep, images).prev_sample
    return images


@pytest.mark.parametrize("names", [ANIMALS, dict(enumerate(ANIMALS)), {"2": "horse", "1": "zebra", "0": "cat"}])
def test_a_class_by_its_name(names, images):
    experts = make_experts("torchvision ResNet", id2label=names)
    assert experts.network_config.num_labels == 3
    target = ClassTarget("zebra")
    target.prepare(experts.network_config)
    before, after = (
        target.log_likelihood(experts(guided(target, images, experts, scale), torch.tensor(0)))
        for scale in (0.0, 30.0)
    )
    assert (after > before + 0.2).all()
    with pytest.raises(ValueError, match=r"`labels` to be among \['cat', 'zebra', 'horse'\], but got 'dog'"):
        GuidedScheduler(DDIMScheduler(), experts, ClassTarget("dog"))


def test_the_number_of_classes_need_not_be_known(images):
    """It shows in the first output."""
    experts = make_experts("torchvision ResNet")
    assert guided(ClassTarget(2), images, experts, 1.0).isfinite().all()
    with pytest.raises(ValueError, match=r"`labels` to be in \[0, 2\].* but got 3"):
        guided(ClassTarget(3), images, experts, 1.0)
    with pytest.raises(ValueError, match="no names"):
        guided(ClassTarget("zebra"), images, experts, 1.0)
    maps = make_experts("torchvision DeepLab")
    assert guided(SegmentationTarget(torch.full((32, 32), 2)), images, maps, 1.0).isfinite().all()
    with pytest.raises(ValueError, match=r"`classes` to be in \[0, 2\].* but got 3"):
        guided(SegmentationTarget(torch.full((32, 32), 3)), images, maps, 1.0)


def test_depth(images):
    experts = make_experts("depth")
    wanted = torch.zeros(32, 32)
    far, near = (guided(DepthTarget(wanted), images, experts, scale) for scale in (0.0, 300.0))
    with torch.no_grad():
        far, near = (experts(each, torch.tensor(0)).predicted_depth.square().mean() for each in (far, near))
    assert near < 0.6 * far


def test_a_network_without_parameters(images, tmp_path):
    """The mean colour, as logits of three colours."""
    settings = {"outputs": "logits", "id2label": ["red", "green", "blue"], "base_model_name_or_path": "mean colour"}
    with pytest.raises(ValueError, match="convolutions or linears for the method 'ppap', but got a MeanColour"):
        GuidanceExperts(MeanColour(), **PLAIN, **settings)
    experts = GuidanceExperts(MeanColour(), **PLAIN, **settings, method="finetune", num_experts=1)
    experts.save_pretrained(tmp_path)
    experts = GuidanceExperts.from_pretrained(tmp_path, network=MeanColour())
    redder = guided(ClassTarget("red"), images, experts, 300.0).mean((2, 3)) - images.mean((2, 3))
    assert (redder[:, 0] > redder[:, 1:].max(1).values).all()


# Training, saving and loading


def test_train_save_and_load(kind, images, tmp_path):
    """What the experts do not own, the head of a segmentation network with its statistics too, no training changes."""
    experts, teacher = make_experts(kind, num_experts=2), make_experts(kind, num_experts=1)
    student = ExpertStudent(experts, 1)
    objective = DistillationObjective(DDIMScheduler(), teacher)
    optimizer = torch.optim.Adam(filter(lambda tensor: tensor.requires_grad, student.parameters()), lr=1e-2)
    first = {name: each.clone() for name, each in experts.expert_tensors(0).items()}
    student.train()
    losses = []
    for _ in range(10):
        batch = NoisedBatch(images, torch.zeros_like(images), torch.zeros(len(images)))
        loss = objective(student(images + 0.3).sample, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[1]
    student.eval()
    assert all(torch.equal(each, first[name]) for name, each in experts.expert_tensors(0).items())
    experts.save_pretrained(tmp_path)
    loaded = load(kind, tmp_path)
    with torch.no_grad():
        for timestep in (torch.tensor(10), torch.tensor(990)):
            expected = result(experts(images, timestep))
            torch.testing.assert_close(result(loaded(images, timestep)), expected, atol=1e-5, rtol=1e-4)


def test_weights_in_several_places(images, tmp_path):
    """Each is owned, saved and loaded once."""
    settings = PLAIN | {"outputs": "logits", "method": "multi_experts", "base_model_name_or_path": "twice"}
    experts = GuidanceExperts(Twice(nn.Conv2d(3, 3, 1)), **settings)
    network = copy.deepcopy(experts.experts.networks[0])
    assert len(experts.expert_tensors(1)) == 3  # a weight and two biases
    with torch.no_grad():
        for tensor in experts.expert_tensors().values():
            tensor.add_(torch.rand_like(tensor))
        experts.save_pretrained(tmp_path)
        loaded = GuidanceExperts.from_pretrained(tmp_path, network=network)
        torch.testing.assert_close(loaded(images, TIMESTEPS).logits, experts(images, TIMESTEPS).logits)


def test_loading_needs_the_network(tmp_path):
    make_experts("torchvision ResNet", id2label=ANIMALS).save_pretrained(tmp_path)
    assert load("torchvision ResNet", tmp_path).network_config.id2label == dict(enumerate(ANIMALS))
    with pytest.raises(
        ValueError, match=r"to be the ResNet .*\('torchvision ResNet'\).* `from_pretrained\(…, network=…\)`"
    ):
        GuidanceExperts.from_pretrained(tmp_path)
    other = make_plain(ResNet)
    other.fc.bias.data.add_(1)
    for network in (other, make_plain(VisionTransformer)):
        with pytest.raises(ValueError, match="`network` to be the ResNet .* with other weights"):
            load("torchvision ResNet", tmp_path, network=network)
    used = make_plain(ResNet)
    load("torchvision ResNet", tmp_path, network=used)
    with pytest.raises(ValueError, match="`network` to have no adapters, but got a ResNet with LoRA"):
        load("torchvision ResNet", tmp_path, network=used)
    with pytest.raises(ValueError, match="`network` to have no adapters, but got a ResNet with LoRA"):
        GuidanceExperts(used, **PLAIN, outputs="logits", target_modules=["conv1"])
    with pytest.raises(ValueError, match="no `outputs`, as .* says it .'logits'."):
        load("torchvision ResNet", tmp_path, outputs=out)


def test_loading_needs_the_function(tmp_path):
    make_experts("torchvision DeepLab").save_pretrained(tmp_path)
    for outputs in (None, "logits"):
        with pytest.raises(ValueError, match="`outputs` to be the function of the network's output"):
            load("torchvision DeepLab", tmp_path, outputs=outputs)
    with pytest.raises(ValueError, match=r"`from_pretrained\(…, network=…, outputs=…\)`"):
        GuidanceExperts.from_pretrained(tmp_path)


def test_a_network_of_transformers_may_be_given_too(tmp_path):
    GuidanceExperts(make_resnet(), **PLAIN, base_model_name_or_path="nowhere").save_pretrained(tmp_path)
    loaded = GuidanceExperts.from_pretrained(tmp_path, network=make_resnet())
    assert loaded.network_config.num_labels == 10
    with pytest.raises(ValueError, match="`network` or `base_model`, but got both"):
        GuidanceExperts.from_pretrained(tmp_path, "somewhere", network=make_resnet())


# Bad input


class Returns(nn.Module):
    """A network that returns what a function makes of the images."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


@pytest.mark.parametrize(
    ("outputs", "returned", "message"),
    [
        (None, lambda x: x.mean((2, 3)), r"`outputs` to say what it returns .* but got the shape \(2, 3\)"),
        (None, lambda x: (x, x), r"`outputs` to say .* but got a tuple of 2 \(Tensor, Tensor\)"),
        (
            "logits",
            lambda x: x[:, :, 0],
            r"logits for 2 images .* \(B, K\) or \(B, K, h, w\), but got the shape \(2, 3, 8\)",
        ),
        ("logits", lambda x: x.mean((2, 3))[:1], r"but got the shape \(1, 3\)"),
        ("logits", lambda x: {"out": x}, r"but got a dict of 'out'; `outputs` says"),
        ("logits", lambda x: x.mean((2, 3)).argmax(1), "of torch.int64"),
        (
            "depth",
            lambda x: x,
            r"depth for 2 images .* \(B, h, w\) or \(B, 1, h, w\), but got the shape \(2, 3, 8, 8\)",
        ),
        ("depth", lambda x: None, "but got a NoneType"),
        (lambda x: {"pooled": x.sum()}, lambda x: x, r"pooled for 2 images .* but got the shape \(\)"),
        (
            lambda x: ModelOutput(logits=x[:1, :, 0, 0]),
            lambda x: x,
            r"logits for 2 images .* but got the shape \(1, 3\)",
        ),
        (lambda x: [x], lambda x: x, r"but got a list of 1 \(Tensor\)"),
    ],
)
def test_a_network_that_returns_something_else(outputs, returned, message):
    experts = GuidanceExperts(Returns(returned), **PLAIN, method="finetune", num_experts=1, outputs=outputs)
    with pytest.raises(ValueError, match=message):
        experts(torch.zeros(2, 3, 8, 8), torch.tensor(0))


def test_arguments_that_do_not_fit():
    finetune = PLAIN | {"method": "finetune", "num_experts": 1}
    with pytest.raises(ValueError, match="`outputs` to be one of logits, depth, a function .* but got 'boxes'"):
        GuidanceExperts(ResNet(), **finetune, outputs="boxes")
    with pytest.raises(ValueError, match="`id2label` to be names by index, or a list of names, but got 'zebra'"):
        GuidanceExperts(ResNet(), **finetune, outputs="logits", id2label="zebra")
    with pytest.raises(ValueError, match=r"`target_modules` to be .* such as 'layer.*conv\d', but got 'ResNet'"):
        GuidanceExperts(ResNet(), **PLAIN, outputs="logits")
    experts = make_experts("torchvision ResNet")
    with pytest.raises(ValueError, match="a network of transformers, but got a ResNet"):
        ExpertStudent(experts, 0).enable_gradient_checkpointing()


class StandardisedConvolution(nn.Conv2d):
    """timm's `StdConv2d`: the sum of two weights is not what the two compute."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Twice(nn.Module):
    """A layer under two names, and its weight in a second layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.first = layer
        self.second = nn.ModuleDict({"same": layer, "tied": nn.Conv2d(3, 3, 1)})
        self.second["tied"].weight = layer.weight

    def forward(self, x):
        return self.second["tied"](self.second["same"](self.first(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("layer", "target", "message"),
    [
        (StandardisedConvolution(3, 4, 3), "0", "no StandardisedConvolution, which computes in its own way"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "0", "no convolution with the padding 'reflect'"),
        (nn.MultiheadAttention(4, 2), "out_proj", "no part of an nn.MultiheadAttention"),
        (nn.Embedding(3, 4), "0", "no Embedding"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "0", "no Sequential"),
        (parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "0", "no layer with a computed weight"),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), "0", "no layer with a computed weight"),
        (Twice(nn.Conv2d(3, 3, 1)), "0.first", "no layer with a weight that the network has in several places"),
        (Twice(nn.Conv2d(3, 3, 1)), "0.second.tied", "no layer with a weight that the network has in several places"),
    ],
)
def test_layers_whose_lora_cannot_be_merged(layer, target, message):
    network = nn.Sequential(layer, nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=message):
        GuidanceExperts(network, **PLAIN, outputs="logits", rank=2, target_modules=[target])


class ReadsWeight(nn.Module):
    """Like the attention of torchvision's Swin and timm's BEiT; and with a layer that it never uses."""

    def __init__(self):
        super().__init__()
        self.qkv, self.conv, self.unused = nn.Linear(8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return F.linear(self.conv(x).mean((2, 3)), self.qkv.weight, self.qkv.bias)


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_layers_that_the_network_does_not_call(images, no_gradients):
    """Their LoRA would have no effect, unless it is merged."""
    settings = PLAIN | {"outputs": "logits", "rank": 2}
    with no_gradients():
        experts = GuidanceExperts(ReadsWeight(), **settings, target_modules=["qkv", "conv"])
        with pytest.raises(ValueError, match="layers that the network calls, but got 'qkv'"):
            experts(images, torch.tensor(0))
        experts = GuidanceExperts(ReadsWeight(), **settings, target_modules=["conv", "unused"]).train()
        assert experts(images, torch.tensor(0)).logits.shape == (5, 3) and experts.training


def test_a_refused_network_is_unchanged():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="no convolution in groups, .* but got '1'"):
        GuidanceExperts(network, **PLAIN, outputs="logits", rank=2, target_modules=["0", "1"])
    GuidanceExperts(network, **PLAIN, outputs="logits", rank=2, target_modules=["0"])


def test_tensors_that_are_changed_while_their_lora_is_in_the_weights(images):
    """As a user does who looks at an expert first."""
    experts = make_experts("torchvision ResNet")
    with torch.no_grad():
        first = experts(images, torch.tensor(990)).logits
        for tensor in experts.expert_tensors(0).values():
            tensor.add_(1)
        experts(images, torch.tensor(10))
        torch.testing.assert_close(experts(images, torch.tensor(990)).logits, first, atol=1e-4, rtol=1e-4)


def test_any_depth_network_is_told_by_its_shape():
    """(B, 1, h, w) and (B, h, w) are the same."""
    images = torch.randn(2, 3, 16, 16)
    network = make_plain(Depth)
    settings = PLAIN | {"method": "finetune", "num_experts": 1, "outputs": "depth"}
    with_channel = GuidanceExperts(network, **settings)(images, torch.tensor(0)).predicted_depth
    without = GuidanceExperts(Returns(lambda x: network(x)[:, 0]), **settings)(images, torch.tensor(0)).predicted_depth
    assert with_channel.shape == (2, 16, 16) and torch.equal(with_channel, without)
