"""DTR: the published numbers, the plain DiT at full sharing, and samples that do not depend on their batch."""

import copy
import math

import pytest
import torch
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from diffusers import AutoModel
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp import DiTModel, DTRTransformer2DModel, NoiseIntervals, convert_checkpoint
from diffusers_dmp.models import ChannelRouting


@pytest.mark.parametrize("case", ["mixed_t", "same_t"])
def test_matches_the_published_dtr(case):
    vectors = Vectors("dtr_tiny")
    model = convert_checkpoint("dtr", vectors.state_dict, vectors.config)
    output = model(vectors[f"case.{case}.x"], vectors[f"case.{case}.t"], vectors[f"case.{case}.y"]).sample
    assert_matches(output, vectors[f"case.{case}.out"])


def test_windows_match_the_published_ones():
    vectors = Vectors("dtr_tiny")
    masks = ChannelRouting(48, 0.8, 4.0, 1000, "window").masks()
    assert torch.equal(masks.int().argmax(1), vectors["mask_start"])
    assert torch.equal(masks.sum(1), vectors["mask_width"])


@given(
    dim=st.integers(1, 64),
    sharing_ratio=st.floats(0.05, 1.0),
    alpha=st.floats(0.1, 8.0),
    num_train_timesteps=st.integers(1, 300),
)
def test_a_window_slides_from_the_first_channels_to_the_last(dim, sharing_ratio, alpha, num_train_timesteps):
    if int(dim * sharing_ratio) == 0:
        return
    masks = ChannelRouting(dim, sharing_ratio, alpha, num_train_timesteps, "window").masks().int()
    assert (masks.sum(1) == math.floor(dim * sharing_ratio)).all()
    assert (masks.diff(dim=1).abs().sum(1) <= 2).all()  # contiguous
    starts = masks.argmax(1)
    assert starts[0] == 0
    assert (starts.diff() >= 0).all()
    if num_train_timesteps > 1:
        assert masks[-1, -1] == 1


def test_a_task_is_the_finest_noise_interval():
    routing = ChannelRouting(48, 0.5, 1.0, 100, "window")
    timesteps = torch.tensor([0.0, 0.9, 1.0, 50.5, 99.0, 99.9, 100.0])
    tasks = NoiseIntervals.uniform(100, 100).index(timesteps)
    assert torch.equal(routing(timesteps), routing(tasks))


def test_full_sharing_is_the_plain_dit(batch):
    routed = randomised(DTRTransformer2DModel(**TINY_CONFIG, sharing_ratio=1.0))
    plain = DiTModel(**TINY_CONFIG).eval()
    plain.load_state_dict(routed.state_dict())
    torch.testing.assert_close(routed(**batch).sample, plain(**batch).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("routing", ["window", "random"])
def test_routing_does_not_export_to_the_stock_class(routing):
    routed = DTRTransformer2DModel(**TINY_CONFIG, routing=routing, downscale_freq_shift=1.0, sharing_ratio=0.5)
    with pytest.raises(ValueError, match="without routing.*sharing_ratio. 0.5"):
        routed.to_diffusers()
    everything = DTRTransformer2DModel(**TINY_CONFIG, routing=routing, downscale_freq_shift=1.0, sharing_ratio=1.0)
    assert everything.to_diffusers().num_parameters() > 0


def test_adds_no_parameters_and_no_masks(tiny_dit, tiny_dtr):
    assert tiny_dtr.num_parameters() == tiny_dit.num_parameters()
    assert tiny_dtr.state_dict().keys() == tiny_dit.state_dict().keys()
    extra = set(dict(tiny_dtr.named_buffers())) - set(dict(tiny_dit.named_buffers()))
    assert extra == {"task_routing.window_starts"}
    assert tiny_dtr.task_routing.window_starts.shape == (1000,)


def test_a_block_adds_to_inactive_channels_but_does_not_read_them(tiny_dtr):
    block, tokens, conditioning = tiny_dtr.transformer_blocks[0], torch.randn(1, 16, 48), torch.randn(1, 48)
    active, inactive = tiny_dtr.block_inputs(torch.tensor([0]), torch.float32)
    output = block(tokens, conditioning, active, inactive)
    # a change of the inactive channels changes nothing but themselves
    changed = block(tokens + inactive, conditioning, active, inactive)
    torch.testing.assert_close(changed - output, inactive.expand_as(output), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("routing", ["window", "random"])
def test_a_sample_does_not_depend_on_its_batch(batch, routing):
    model = randomised(DTRTransformer2DModel(**TINY_CONFIG, routing=routing))
    together = model(**batch).sample
    for i in range(4):
        alone = model(**{name: value[i : i + 1] for name, value in batch.items()}).sample
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-4)


def test_one_window_for_a_batch_that_shares_its_timestep(tiny_dtr, batch):
    per_sample = tiny_dtr(**batch | {"timestep": torch.full((4,), 700)}).sample
    shared = tiny_dtr(**batch | {"timestep": torch.tensor(700).expand(4)}).sample
    torch.testing.assert_close(shared, per_sample, atol=1e-5, rtol=1e-4)


def test_random_masks_are_random_and_survive_a_checkpoint(tmp_path):
    model = DTRTransformer2DModel(**TINY_CONFIG, routing="random")
    masks = model.task_routing.masks()
    assert (masks.sum(1) == 38).all()
    assert len(masks.unique(dim=0)) > 900

    model.task_routing.random_masks.copy_(masks.flip(0))  # not those of the seed
    model.save_pretrained(tmp_path)
    loaded = DTRTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.task_routing.masks(), masks.flip(0))


@pytest.mark.parametrize("loader", [DTRTransformer2DModel, AutoModel])
def test_round_trip(tiny_dtr, batch, tmp_path, loader):
    tiny_dtr.save_pretrained(tmp_path)
    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    loaded = loader.from_pretrained(str(tmp_path))
    assert type(loaded) is DTRTransformer2DModel
    assert dict(loaded.config).items() >= {"sharing_ratio": 0.8, "routing_alpha": 4.0, "routing": "window"}.items()
    assert torch.equal(loaded(**batch).sample, tiny_dtr(**batch).sample)


def test_gradient_checkpointing_changes_no_gradient(tiny_dtr, batch):
    gradients, calls = [], []
    for model in (tiny_dtr, copy.deepcopy(tiny_dtr)):
        if gradients:
            model.enable_gradient_checkpointing()
        name = "checkpointed" if gradients else "plain"
        model.transformer_blocks[0].attn.register_forward_hook(lambda *_, name=name: calls.append(name))
        model.train()
        model(**batch, force_drop_ids=torch.zeros(4, dtype=torch.bool)).sample.pow(2).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-5)
    assert calls == ["plain", "checkpointed", "checkpointed"]  # computed again on the way back


@pytest.mark.parametrize("shared", [False, True])
def test_compiles_without_a_graph_break(tiny_dtr, batch, shared):
    if shared:
        batch["timestep"] = torch.tensor(700).expand(4)
    expected = tiny_dtr(**batch).sample
    # the backend "eager" runs the captured graph as it is; `fullgraph` makes a second graph an error
    compiled = torch.compile(tiny_dtr, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).sample, expected, atol=1e-5, rtol=1e-4)


def test_repeated_blocks_compile_without_a_graph_break(tiny_dtr, batch):
    expected = tiny_dtr(**batch).sample
    tiny_dtr.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(tiny_dtr(**batch).sample, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_dtr, batch, dtype):
    expected = tiny_dtr(**batch).sample
    batch["hidden_states"] = batch["hidden_states"].to(dtype)
    output = copy.deepcopy(tiny_dtr).to(dtype)(**batch).sample
    assert (output.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize(
    "config, name",
    [
        ({"sharing_ratio": 0.0}, "sharing_ratio"),
        ({"sharing_ratio": 1.1}, "sharing_ratio"),
        ({"sharing_ratio": 0.001}, "sharing_ratio"),
        ({"routing_alpha": 0.0}, "routing_alpha"),
        ({"routing": "sorted"}, "routing.*'window' or 'random'.*'sorted'"),
    ],
)
def test_refuses_a_bad_routing(config, name):
    with pytest.raises(ValueError, match=name):
        DTRTransformer2DModel(**TINY_CONFIG | config)
