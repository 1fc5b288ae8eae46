"""The patchified UNet: equal to the published one, and the ways to run it."""

import copy

import pytest
import torch
from conftest import Vectors, assert_matches, randomised
from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline
from diffusers.hooks.group_offloading import ModuleGroup

from diffusers_dmp import ClassConditionalPipeline, PatchedUNet2DModel, convert_checkpoint

TINY = {
    "sample_size": 16,
    "patch_size": 2,
    "model_channels": 32,
    "channel_multipliers": (1, 2),
    "layers_per_block": 1,
    "attention_levels": (1,),
    "attention_head_dim": 16,
}


@pytest.fixture(params=["conditional", "unconditional", "super-resolution"])
def unet(request) -> PatchedUNet2DModel:
    config = {
        "conditional": {"num_classes": 10, "out_channels": 6},
        "unconditional": {},
        "super-resolution": {"low_res_channels": 3},
    }[request.param]
    return randomised(PatchedUNet2DModel(**TINY | config))


@pytest.fixture
def inputs(unet) -> dict:
    """Four samples of different timesteps and classes, the last without a label."""
    generator = torch.Generator().manual_seed(1)
    inputs = {"sample": torch.randn(4, 3, 16, 16, generator=generator), "timestep": torch.tensor([3, 250, 600, 999])}
    if unet.config.num_classes is not None:
        inputs["class_labels"] = torch.tensor([0, 4, 9, 10])
    if unet.config.low_res_channels:
        inputs["low_res"] = torch.randn(4, 3, 5, 5, generator=generator)
    return inputs


@pytest.mark.parametrize("name", ["patch_unet_class_p2", "patch_unet_uncond_p4"])
@pytest.mark.parametrize("case", ["a", "b"])
@torch.no_grad()
def test_published_vectors(name, case):
    vectors = Vectors(name)
    model = convert_checkpoint("patch_diffusion", vectors.state_dict, vectors.config)
    labels = {} if vectors.config["num_classes"] is None else {"class_labels": vectors[f"case.{case}.y"]}
    output = model(vectors[f"case.{case}.x"], vectors[f"case.{case}.t"], **labels).sample
    assert_matches(output, vectors[f"case.{case}.out"])


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(unet, inputs):
    together = unet(**inputs).sample
    for i in range(4):
        alone = unet(**{name: value[i : i + 1] for name, value in inputs.items()}).sample
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_shared_timestep(unet, inputs):
    expected = unet(**inputs | {"timestep": torch.full((4,), 250)}).sample
    for timestep in (250, torch.tensor(250), torch.tensor(250).expand(4)):
        torch.testing.assert_close(unet(**inputs | {"timestep": timestep}).sample, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_round_trip(unet, inputs, tmp_path):
    unet.save_pretrained(tmp_path)
    for loaded in (PatchedUNet2DModel.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(loaded) is PatchedUNet2DModel
        torch.testing.assert_close(loaded(**inputs).sample, unet(**inputs).sample)


def test_the_variance_does_not_shape_the_features():
    """Its loss trains its head and the timestep embedding only."""
    unet = randomised(PatchedUNet2DModel(**TINY | {"out_channels": 6}))
    variance = unet(torch.randn(2, 3, 16, 16), 500).sample[:, 3:]
    assert (variance >= 0).all() and (variance <= 1).all()
    variance.sum().backward()
    learning = {name.split(".")[0] for name, parameter in unet.named_parameters() if parameter.grad.any()}
    assert learning == {"variance_out", "variance_time_proj", "time_embedding"}


@torch.no_grad()
def test_a_new_model_predicts_zero(unet, inputs):
    assert PatchedUNet2DModel(**unet.config)(**inputs).sample[:, :3].abs().max() == 0  # products with zero are exact


@torch.no_grad()
def test_other_sizes(unet, inputs):
    inputs["sample"] = torch.randn(4, 3, 24, 8)
    assert unet(**inputs).sample.shape == (4, unet.out_channels, 24, 8)


def test_gradient_checkpointing(unet, inputs):
    def gradients() -> dict[str, torch.Tensor]:
        unet.zero_grad()
        unet(**inputs).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}

    plain = gradients()
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(unet, inputs, dtype, tmp_path):
    expected = unet(**inputs).sample
    unet.save_pretrained(tmp_path)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    for model in (copy.deepcopy(unet).to(dtype), PatchedUNet2DModel.from_pretrained(tmp_path, dtype=dtype)):
        output = model(**inputs).sample
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, atol=0.2, rtol=0.1)


@torch.no_grad()
@pytest.mark.group_offload
def test_layers_offloaded_in_groups(unet, inputs, monkeypatch):
    """Every weight is moved with a group of blocks; on a CPU nothing moves, so the calls that would move it are recorded."""
    expected, moved, onload = unet(**inputs).sample, set(), ModuleGroup.onload_

    def remember(group):
        moved.update(id(parameter) for module in group.modules for parameter in module.parameters())
        moved.update(map(id, group.parameters))
        return onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", remember)
    unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    torch.testing.assert_close(unet(**inputs).sample, expected)
    missed = [name for name, parameter in unet.named_parameters() if id(parameter) not in moved]
    assert missed == []


@torch.no_grad()
def test_weights_stored_in_eight_bits(unet, inputs):
    expected = unet(**inputs).sample
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == torch.float8_e4m3fn
    cast = unet(**inputs).sample
    assert torch.corrcoef(torch.stack([cast.flatten(), expected.flatten()]))[0, 1] > 0.9


def test_positions_are_exact_in_half_precision(tmp_path):
    unet = PatchedUNet2DModel(**TINY)
    unet.save_pretrained(tmp_path)
    loaded = PatchedUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(loaded.positions.float(), unet.positions, atol=2**-8, rtol=0)


@torch.no_grad()
def test_compiled(unet, inputs):
    compiled = torch.compile(copy.deepcopy(unet), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).sample, unet(**inputs).sample)


def test_labels_are_dropped_in_training():
    unet = randomised(PatchedUNet2DModel(**TINY | {"num_classes": 4, "class_dropout_prob": 0.5}))
    sample, labels = torch.randn(1, 3, 16, 16).expand(64, 3, 16, 16), torch.zeros(64, dtype=torch.long)
    with torch.no_grad():
        labelled, dropped = unet(sample[:1], 5, labels[:1]).sample, unet(sample[:1], 5).sample
        outputs = unet.train()(sample, 5, labels).sample
    is_dropped = torch.isclose(outputs, dropped, atol=1e-5).flatten(1).all(1)
    is_labelled = torch.isclose(outputs, labelled, atol=1e-5).flatten(1).all(1)
    assert (is_dropped ^ is_labelled).all() and 16 < is_dropped.sum() < 48
    forced = unet(sample, 5, labels, force_drop_ids=torch.ones(64, dtype=torch.bool)).sample
    torch.testing.assert_close(forced, dropped.expand_as(forced), atol=1e-5, rtol=1e-4)


def test_in_a_pipeline(tmp_path):
    unet = randomised(PatchedUNet2DModel(**TINY | {"num_classes": 10}))
    pipeline = ClassConditionalPipeline(unet, DDIMScheduler(prediction_type="sample"))
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    images = [
        each(
            [3, 5], guidance_scale=1.5, num_inference_steps=3, output_type="pt", generator=torch.manual_seed(0)
        ).images
        for each in (pipeline, loaded)
    ]
    torch.testing.assert_close(*images)
    assert images[0].shape == (2, 3, 16, 16)


@torch.no_grad()
def test_a_low_resolution_image_joins_the_patches():
    """It is upsampled, and its channels come after the image's: each patch lists the pixels of one channel after another."""
    unet = randomised(PatchedUNet2DModel(**TINY | {"low_res_channels": 3}))
    sample, low_res, patches = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4), []
    unet.conv_in.register_forward_pre_hook(lambda module, args: patches.append(args[0]))
    unet(sample, 5, low_res=low_res)
    upsampled = torch.nn.functional.interpolate(low_res, scale_factor=4, mode="bilinear")
    expected = torch.stack([each[:, :, 2:4, 4:6].flatten(2) for each in (sample, upsampled)], dim=1).flatten(1)
    torch.testing.assert_close(patches[0][:, :, 1, 2], expected)
    plain = unet(sample, 5, low_res=torch.zeros_like(low_res)).sample
    assert not torch.allclose(unet(sample, 5, low_res=low_res).sample, plain)


# Conversion


@pytest.mark.parametrize("name", ["patch_unet_class_p2", "patch_unet_uncond_p4"])
def test_shapes_determine_all_but_image_size_and_heads(name):
    vectors = Vectors(name)
    config = {"image_size": vectors.config["image_size"], "num_head_channels": 32}
    from_shapes = convert_checkpoint("patch_diffusion", vectors.state_dict, config).config
    given = convert_checkpoint("patch_diffusion", vectors.state_dict, vectors.config).config
    assert {k: v for k, v in from_shapes.items() if k[0] != "_"} == {k: v for k, v in given.items() if k[0] != "_"}


def test_the_older_order_of_attention():
    """Query, key and value of one head after the other, where the newer order has all heads' queries first."""
    vectors = Vectors("patch_unet_class_p2")
    older = dict(vectors.state_dict)
    for key, tensor in older.items():
        if ".qkv." in key:  # (3 · heads · d, …)
            older[key] = tensor.unflatten(0, (3, -1, 32)).transpose(0, 1).flatten(0, 2)
    config = vectors.config | {"use_new_attention_order": False}
    model = convert_checkpoint("patch_diffusion", older, config)
    expected = convert_checkpoint("patch_diffusion", vectors.state_dict, vectors.config).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_super_resolution_is_read_from_the_weights():
    vectors = Vectors("patch_unet_uncond_p4")
    weights = vectors.state_dict
    first = weights["input_blocks.0.0.weight"].unflatten(1, (4, 4, 3))  # rows, columns, colours of a patch
    first = torch.cat([first, torch.zeros_like(first)], dim=3).flatten(1, 3)  # three more, without effect
    weights = weights | {"input_blocks.0.0.weight": first}
    model = convert_checkpoint("patch_diffusion", weights, vectors.config)
    assert model.config.low_res_channels == 3
    output = model(vectors["case.a.x"], vectors["case.a.t"], low_res=torch.randn(2, 3, 4, 4)).sample
    assert_matches(output, vectors["case.a.out"])


def test_weights_that_do_not_fit_are_named():
    vectors = Vectors("patch_unet_class_p2")
    missing = {key: tensor for key, tensor in vectors.state_dict.items() if key != "middle_block.1.qkv.bias"}
    with pytest.raises(ValueError, match="'middle_block.1.qkv.bias', but it is missing"):
        convert_checkpoint("patch_diffusion", missing, vectors.config)
    with pytest.raises(ValueError, match="'extra.weight'"):
        convert_checkpoint("patch_diffusion", vectors.state_dict | {"extra.weight": torch.zeros(1)}, vectors.config)
    broken = vectors.state_dict | {"middle_block.0.in_layers.2.weight": torch.zeros(64, 63, 3, 3)}
    with pytest.raises(ValueError, match=r"'middle_block.0.in_layers.2.weight'.*\(64, 64, 3, 3\).*\(64, 63, 3, 3\)"):
        convert_checkpoint("patch_diffusion", broken, vectors.config)
    with pytest.raises(ValueError, match="'input_blocks.0.0.weight'.*4 dimensions, but got the shape None"):
        convert_checkpoint("patch_diffusion", {}, {})
    with pytest.raises(ValueError, match="`use_scale_shift_norm` to be True"):
        convert_checkpoint("patch_diffusion", vectors.state_dict, vectors.config | {"use_scale_shift_norm": False})


# Bad input


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"sample": torch.zeros(1, 4, 16, 16)}, "the 3 channels of `in_channels`, but got 4"),
        ({"sample": torch.zeros(1, 3, 18, 16)}, "divisible by 4, `patch_size` times downsampling, but got 18 x 16"),
        ({"timestep": 1001}, "timestep"),
        ({"timestep": torch.tensor([1, 2])}, "one or 1, but got 2"),
        ({"class_labels": torch.tensor([11])}, r"in \[0, 11\), but got \[11\]"),
        ({"low_res": torch.zeros(1, 3, 8, 8)}, "the 0 channels of `low_res_channels`, but got 3"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    unet = PatchedUNet2DModel(**TINY | {"num_classes": 10})
    with pytest.raises(ValueError, match=message):
        unet(**{"sample": torch.zeros(1, 3, 16, 16), "timestep": 5} | inputs)


@pytest.mark.parametrize(
    ("low_res", "message"),
    [
        (None, "the 3 channels of `low_res_channels`, but got 0"),
        (torch.zeros(2, 1, 8, 8), "the 3 channels of `low_res_channels`, but got 1"),
        (torch.zeros(1, 3, 8, 8), "`low_res` to have one image for each of 2 samples, but got 1"),
    ],
)
def test_low_resolution_images_that_do_not_fit(low_res, message):
    unet = PatchedUNet2DModel(**TINY | {"low_res_channels": 3})
    with pytest.raises(ValueError, match=message):
        unet(torch.zeros(2, 3, 16, 16), 5, low_res=low_res)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 18}, "divisible by 4, `patch_size` times downsampling, but got 18"),
        ({"channel_multipliers": (1, 1.2)}, "multiples of 32 channels, but got 1.2 x 32"),
        ({"attention_levels": (2,)}, r"`attention_levels` to be in \[0, 2\), but got 2"),
        ({"attention_head_dim": 48}, "divide the 64 channels of level 1, but got 48"),
        ({"prediction_type": "x0"}, "one of epsilon, sample, v_prediction, but got 'x0'"),
        ({"out_channels": 5}, "`in_channels`, 3, or twice as many for a learned variance, but got 5"),
        ({"patch_size": 0}, "`patch_size` to be at least 1, but got 0"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        PatchedUNet2DModel(**TINY | config)
