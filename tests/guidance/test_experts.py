"""One vision network, one adapter per noise interval."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES
from networks import NETWORKS, PLAIN, LinearClassifier, make_resnet, make_vit, trained
from peft.tuners.lora import LoraLayer
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification
from transformers.utils import ModelOutput

from diffusers_dmp import GuidanceExperts, NoiseIntervals
from diffusers_dmp.guidance import bundle
from diffusers_dmp.models.vision import ImagePreprocessor

TIMESTEPS = torch.tensor([950, 10, 250, 390, 30])  # experts 4, 0, 1, 1, 0


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapted(network, **kwargs) -> GuidanceExperts:
    """Experts that differ from the network and from one another, as after training; also in their statistics."""
    return trained(GuidanceExperts(network, **{**PLAIN, "rank": 4, "lora_alpha": 8} | kwargs))


def result(output: ModelOutput) -> torch.Tensor:
    return output.predicted_depth if "predicted_depth" in output else output.logits


# What experts compute


def test_published_intervals():
    table = json.loads((FIXTURES / "diffusion.json").read_text())
    for num_experts in (1, 3, 5):
        ranges = table[f"ppap.train_ranges.{num_experts}"]
        edges = NoiseIntervals.uniform(num_experts).edges
        assert [[low, high] for low, high in zip(edges, edges[1:])] == ranges


@pytest.mark.parametrize("method", ["ppap", "multi_experts"])
@torch.no_grad()
def test_fresh_experts_are_the_network(network, images, method):
    """Up to rounding: without gradients another kernel may run."""
    expected = result(network(ImagePreprocessor([0.5] * 3, [0.5] * 3, None)(images)))
    experts = GuidanceExperts(network, **PLAIN, method=method)
    for expert in (0, 4, 2):
        torch.testing.assert_close(result(experts.run_expert(expert, images)), expected)


@torch.no_grad()
def test_experts_differ(network, images):
    experts = adapted(network)
    outputs = [result(experts.run_expert(expert, images)) for expert in range(5)]
    for one in range(5):
        for other in range(one):
            assert not torch.allclose(outputs[one], outputs[other], atol=1e-3)


@torch.no_grad()
def test_merged_is_unmerged(network, images):
    """With α/γ = 2, which the published code leaves out for linears."""
    experts = adapted(network)
    for expert in (1, 3, 1):
        unmerged = result(experts.run_expert(expert, images, merged=False))
        merged = result(experts.run_expert(expert, images, merged=True))
        torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-4)
    assert all(layer.merged for layer in experts.modules() if isinstance(layer, LoraLayer))


def test_merged_weights_are_those_of_peft():
    experts = adapted(make_resnet())
    for name, layer in experts.experts.layers.items():
        weight = layer.get_base_layer().weight.clone()
        delta = layer.get_delta_weight("expert_1")
        experts.experts.activate(1, merged=True)
        torch.testing.assert_close(layer.get_base_layer().weight, weight + delta, msg=name)
        experts.experts.activate(0, merged=False)


@torch.no_grad()
def test_rounding_errors_of_many_switches(images):
    experts = adapted(make_resnet())
    first = result(experts.run_expert(2, images))
    for switch in range(300):
        experts.experts.activate(switch % 5, merged=True)
    torch.testing.assert_close(result(experts.run_expert(2, images)), first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["ppap", "multi_experts"])
@torch.no_grad()
def test_each_image_gets_its_own_expert(network, images, method):
    experts = adapted(network, method=method)
    together = result(experts(images, TIMESTEPS))
    for i, expert in enumerate([4, 0, 1, 1, 0]):
        torch.testing.assert_close(
            together[i], result(experts(images[i : i + 1], TIMESTEPS[i]))[0], atol=1e-5, rtol=1e-4
        )
        alone = result(experts.run_expert(expert, images[i : i + 1]))
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-4)


def test_gradients_of_a_mixed_batch(images):
    experts = adapted(make_resnet())
    images.requires_grad_()
    (together,) = torch.autograd.grad(result(experts(images, TIMESTEPS)).square().sum(), images)
    for i in range(5):
        alone = result(experts(images[i : i + 1], TIMESTEPS[i])).square().sum()
        torch.testing.assert_close(torch.autograd.grad(alone, images)[0][i], together[i], atol=1e-5, rtol=1e-3)


def test_the_head_is_not_adapted(network):
    own = GuidanceExperts(network, **PLAIN).expert_tensors(0)
    assert not [name for name in own if "classifier" in name]
    assert [name for name in own if name.endswith("lora_A.weight")]


def test_default_target_modules():
    """The paper's: of a ResNet the stem and the first two convolutions of each block, of a ViT the attention."""
    own = GuidanceExperts(make_resnet(), **PLAIN).expert_tensors(0)
    layers = {name.removesuffix(".lora_A.weight") for name in own if name.endswith("lora_A.weight")}
    blocks = [f"resnet.encoder.stages.{stage}.layers.{layer}" for stage, layer in [(0, 0), (1, 0), (1, 1)]]
    expected = {f"{block}.layer.{index}.convolution" for block in blocks for index in (0, 1)}
    assert layers == expected | {"resnet.embedder.embedder.convolution"}
    own = GuidanceExperts(make_vit(), **PLAIN).expert_tensors(0)
    layers = {name.removesuffix(".lora_A.weight") for name in own if name.endswith("lora_A.weight")}
    assert layers == {f"vit.layers.{i}.attention.{part}_proj" for i in (0, 1) for part in "qkvo"}


# Training


def test_only_the_expert_in_training_changes(images):
    experts = GuidanceExperts(make_resnet(), **PLAIN, rank=4)
    before = copy.deepcopy({name: tensor.detach().clone() for name, tensor in experts.expert_tensors().items()})
    parameters = experts.requires_grad_of_expert(3)
    trained = {id(tensor) for tensor in experts.parameters() if tensor.requires_grad}
    assert trained <= {id(tensor) for tensor in parameters.values()} and len(parameters) > 10
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    experts.train()
    for _ in range(2):  # B moves first, A after it
        optimizer.zero_grad()
        result(experts.run_expert(3, images)).square().mean().backward()
        optimizer.step()
    experts.eval()
    experts.run_expert(0, images)  # activates another expert
    changed = {name for name, tensor in experts.expert_tensors().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("expert_3.") for name in changed)
    for ending in ("lora_A.weight", "lora_B.weight", "normalization.bias", "running_mean", "num_batches_tracked"):
        assert [name for name in changed if name.endswith(ending)], ending


# Saving and loading


@pytest.mark.parametrize("method", ["ppap", "multi_experts", "finetune"])
@torch.no_grad()
def test_round_trip(images, tmp_path, method):
    make_resnet().save_pretrained(tmp_path / "base")
    settings = {"method": method, "num_experts": 1 if method == "finetune" else 5}
    experts = adapted(type(make_resnet()).from_pretrained(tmp_path / "base"), **settings)
    experts.run_expert(0, images)  # so that its LoRA is merged while it is saved
    experts.save_pretrained(tmp_path / "experts")
    loaded = GuidanceExperts.from_pretrained(tmp_path / "experts")
    assert dict(loaded.config).items() <= dict(experts.config).items() and loaded.config.method == method
    for timestep in (10, 990):
        timestep = torch.tensor(timestep)
        torch.testing.assert_close(result(loaded(images, timestep)), result(experts(images, timestep)))
    for name, tensor in loaded.expert_tensors().items():
        assert torch.equal(tensor, experts.expert_tensors()[name]), name
    if method == "ppap":
        assert [name for name in loaded.expert_tensors() if name.endswith("running_var")]
        own_bytes = sum(tensor.nbytes for tensor in experts.expert_tensors().values())
        size = (tmp_path / "experts" / "guidance_experts.safetensors").stat().st_size
        assert own_bytes < size < own_bytes + 2**17  # tensors and a header: nothing of the network
        loaded.load_expert_tensors(experts.expert_tensors())  # into merged weights
        torch.testing.assert_close(result(loaded(images, timestep)), result(experts(images, timestep)))


@torch.no_grad()
def test_interval_edges(images, tmp_path):
    make_resnet().save_pretrained(tmp_path / "base")
    network = type(make_resnet()).from_pretrained(tmp_path / "base")
    edges = [0, 62.5, 700, 1000]
    experts = adapted(network, num_experts=3, interval_edges=edges)
    experts.save_pretrained(tmp_path / "experts")
    assert json.loads((tmp_path / "experts" / "config.json").read_text())["interval_edges"] == edges
    loaded = GuidanceExperts.from_pretrained(tmp_path / "experts")
    assert loaded.intervals == experts.intervals == NoiseIntervals(edges)
    timesteps = [62, 63, 699, 700, 999]
    together = result(loaded(images, torch.tensor(timesteps)))
    for i, expert in enumerate([0, 1, 1, 2, 2]):
        alone = result(experts.run_expert(expert, images[i : i + 1]))
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-4)
    rounded = torch.tensor(700 - 1e-9, dtype=torch.float64)  # an edge, as computed in float64
    alone = result(experts.run_expert(2, images))
    torch.testing.assert_close(result(experts(images, rounded)), alone, atol=1e-5, rtol=1e-4)


# settings that bundles of older versions do not have
SINCE_0_4 = ["sample_size", "outputs", "id2label"]
SINCE_0_3 = ["noise_schedule", "base_model_revision", *SINCE_0_4]
SINCE_0_2 = ["interval_edges", *SINCE_0_3]


@pytest.mark.parametrize("missing", [SINCE_0_2, SINCE_0_3, SINCE_0_4], ids=["0.1", "0.2", "0.3"])
@torch.no_grad()
def test_bundles_of_older_versions(missing, images, tmp_path):
    """Compute what they always did; without edges, their intervals are uniform."""
    make_resnet().save_pretrained(tmp_path / "base")
    experts = adapted(type(make_resnet()).from_pretrained(tmp_path / "base"), num_experts=3)
    experts.save_pretrained(tmp_path / "experts")
    path = tmp_path / "experts" / "config.json"
    config = json.loads(path.read_text())
    assert set(missing) <= config.keys()
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in missing}))
    loaded = GuidanceExperts.from_pretrained(tmp_path / "experts")
    assert loaded.intervals == NoiseIntervals.uniform(3) and loaded.config.interval_edges == [0, 333, 666, 1000]
    assert loaded.process is None and loaded.config.outputs is None
    torch.testing.assert_close(result(loaded(images, TIMESTEPS)), result(experts(images, TIMESTEPS)))


@pytest.mark.parametrize("message", [None, "Five experts"])
def test_upload(monkeypatch, tmp_path, message):
    calls = []
    monkeypatch.setattr(bundle, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=f"user/{repo_id}"))
    monkeypatch.setattr(bundle, "upload_folder", lambda **arguments: calls.append(arguments))
    experts = GuidanceExperts(make_resnet(), **PLAIN, base_model_name_or_path="user/resnet")
    experts.save_pretrained(tmp_path / "experts", push_to_hub=True, private=True, commit_message=message)
    expected = {"repo_id": "user/experts", "folder_path": tmp_path / "experts", "token": None}
    assert calls == [expected | {"commit_message": message or "Upload GuidanceExperts"}]


def test_a_network_in_half_precision(tmp_path):
    make_resnet().half().save_pretrained(tmp_path / "base")
    network = type(make_resnet()).from_pretrained(tmp_path / "base", dtype=torch.float16)
    GuidanceExperts(network, **PLAIN).save_pretrained(tmp_path / "experts")
    experts = GuidanceExperts.from_pretrained(tmp_path / "experts")
    assert result(experts(torch.zeros(1, 3, 32, 32), torch.tensor(5))).dtype == torch.float32


def test_merging_in_another_memory_format(images):
    experts = adapted(make_resnet())
    expected = result(experts.run_expert(1, images, merged=False))
    experts.to(memory_format=torch.channels_last)
    torch.testing.assert_close(result(experts.run_expert(1, images, merged=True)), expected, atol=1e-5, rtol=1e-4)


def test_settings_of_the_image_processor(tmp_path):
    make_resnet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="preprocessor_config.json, or `image_mean`"):
        GuidanceExperts.from_base(str(tmp_path))
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"shortest_edge": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    experts = GuidanceExperts.from_base(str(tmp_path))
    assert (experts.config.image_mean, experts.config.image_size) == ([0.1, 0.2, 0.3], 8)
    white = torch.ones(1, 3, 16, 32)
    assert experts.preprocess(white).shape == (1, 3, 8, 16)
    torch.testing.assert_close(experts.preprocess(white)[0, :, 0, 0], torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6]))
    assert experts.preprocess(torch.ones(1, 1, 16, 16)).shape == (1, 3, 8, 8)  # a grey image
    assert experts.config.base_model_name_or_path == str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"include_top": True}, "include_top"),  # EfficientNet: divided by the deviation twice
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),  # MobileViT: BGR
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True}, "rescale_offset, rescale_factor"),
        ({"do_rescale": False}, "rescale_factor"),
    ],
)
def test_image_processors_that_compute_something_else(settings, found, tmp_path):
    make_resnet().save_pretrained(tmp_path)
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 8}, "rescale_factor": 0.00392}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(normal))
    GuidanceExperts.from_base(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(normal | settings))
    with pytest.raises(ValueError, match=rf"to compute \(pixels/255 - mean\)/std .* but got one with {found}\."):
        GuidanceExperts.from_base(str(tmp_path))
    GuidanceExperts.from_base(str(tmp_path), **PLAIN, image_size=8)


def test_moving_moves_all_experts():
    experts = adapted(make_resnet())
    experts.run_expert(1, torch.zeros(1, 3, 16, 16))
    experts.to(torch.float64)
    assert {tensor.dtype for tensor in experts.expert_tensors().values()} == {torch.float64, torch.int64}


@torch.no_grad()
def test_statistics_of_moved_experts(images):
    """Moving makes new buffers, of which the active expert's are in the network."""
    experts = adapted(make_resnet())
    experts.run_expert(1, images)
    experts.to(torch.float64)
    before = {name: tensor.clone() for name, tensor in experts.expert_tensors(1).items() if "running" in name}
    experts.train().run_expert(1, images.double())
    experts.eval().run_expert(0, images.double())
    after = experts.expert_tensors(1)
    assert before and not [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


@torch.no_grad()
def test_a_copy_has_its_own_experts(images):
    """Also while LoRA is in the weights."""
    experts = adapted(make_resnet())
    expected = {expert: result(experts.run_expert(expert, images)) for expert in (0, 1)}
    copied = copy.deepcopy(experts)
    for expert in (1, 0):
        torch.testing.assert_close(result(copied.run_expert(expert, images)), expected[expert], atol=1e-5, rtol=1e-4)
    for tensor in copied.expert_tensors().values():
        tensor.add_(1)
    for expert in (1, 0):
        assert not torch.allclose(result(copied.run_expert(expert, images)), expected[expert], atol=1e-3)
        torch.testing.assert_close(result(experts.run_expert(expert, images)), expected[expert], atol=1e-5, rtol=1e-4)


# Bad input


def test_another_base_model(tmp_path):
    make_resnet().save_pretrained(tmp_path / "base")
    GuidanceExperts.from_base(str(tmp_path / "base"), **PLAIN, image_size=None).save_pretrained(tmp_path / "experts")
    make_resnet(num_labels=7).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="that the experts in .* were made for .* with other weights in .*other"):
        GuidanceExperts.from_pretrained(tmp_path / "experts", base_model=tmp_path / "other")


def test_families_without_a_default():
    network = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, num_labels=3))
    with pytest.raises(ValueError, match=r"`target_modules` to be .* such as 'mobilenet.*', but got 'mobilenet_v2'"):
        GuidanceExperts(network, **PLAIN)
    experts = adapted(network, target_modules=r".*conv_stem\.first_conv\.convolution")
    assert [name for name in experts.expert_tensors(0) if "lora_A" in name]
    network = MobileNetV2ForImageClassification(network.config)
    with pytest.raises(ValueError, match="no convolution in groups, .* but got '.*conv_3x3.convolution'"):
        GuidanceExperts(network, **PLAIN, rank=32, target_modules=r".*conv_stem\.conv_3x3\.convolution")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lora"}, "one of ppap, multi_experts, finetune, but got 'lora'"),
        ({"method": "finetune"}, "`num_experts` to be 1 for the method 'finetune', but got 5"),
        ({"image_std": [1.0]}, "to have one length"),
        ({"sample_size": 64}, "`sample_size` to be height and width in pixels, but got 64"),
        (
            {"interval_edges": [0, 300, 1000]},
            r"`interval_edges` to be 6 numbers .* 5 experts, but got \[0, 300, 1000\]",
        ),
        ({"num_experts": 2, "interval_edges": [0, 300, 900]}, "from 0 to 1000, for 2 experts, but got"),
        ({"num_experts": 2, "interval_edges": [0, 1000, 1000]}, "to ascend strictly"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        GuidanceExperts(make_resnet(), **PLAIN | arguments)


def test_tensors_that_do_not_fit():
    experts = GuidanceExperts(make_resnet(), **PLAIN)
    tensors = experts.expert_tensors()
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    with pytest.raises(ValueError, match="none by the name"):
        experts.load_expert_tensors({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match="one more by the name 'more'"):
        experts.load_expert_tensors(tensors | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"to have the shape .*, but got \(1,\)"):
        experts.load_expert_tensors(tensors | {name: torch.zeros(1)})


def test_experts_of_a_network_that_was_not_loaded_cannot_be_saved(tmp_path):
    experts = GuidanceExperts(LinearClassifier(torch.ones(2, 3)), **PLAIN, method="multi_experts")
    with pytest.raises(ValueError, match="`base_model_name_or_path` to be given"):
        experts.save_pretrained(tmp_path)
