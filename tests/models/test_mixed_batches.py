"""Batches of several experts are split and joined again in order."""

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.models.mixed_batches import run_by_expert, take_samples


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_each_sample_meets_its_own_expert_and_comes_back_in_its_place(experts):
    batch_size = len(experts)
    samples = torch.arange(batch_size * 2.0).view(batch_size, 2)
    seen = []

    def run(expert, args, kwargs):
        (hidden_states,) = args
        seen.append(expert)
        assert [experts[index] for index in kwargs["names"]] == [expert] * len(hidden_states)
        assert len(kwargs["added"]["time_ids"]) == len(hidden_states)
        assert kwargs["img_ids"].shape == (batch_size, 3)  # positions, whatever their number
        assert kwargs["scale"] == 0.5
        return Transformer2DModelOutput(sample=hidden_states + 100 * expert)

    output = run_by_expert(
        experts,
        (samples,),
        {
            "names": list(range(batch_size)),
            "added": {"time_ids": samples},
            "img_ids": torch.zeros(batch_size, 3),
            "scale": 0.5,
        },
        run,
    )
    torch.testing.assert_close(output.sample, samples + 100 * torch.tensor(experts)[:, None])
    assert seen == sorted(set(experts))


def test_lists_of_samples_are_not_lists_of_layers():
    lists = {
        "x": [torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)],  # two images of two channels
        "block_controlnet_hidden_states": [torch.zeros(2, 5, 3), torch.ones(2, 5, 3)],  # two layers of two samples
    }

    def run(expert, args, kwargs):
        assert len(kwargs["x"]) == 1
        assert [len(layer) for layer in kwargs["block_controlnet_hidden_states"]] == [1, 1]
        return (kwargs["x"],)

    (samples,) = run_by_expert([1, 0], (), lists, run)
    assert [sample.mean().item() for sample in samples] == [0, 1]


def test_what_has_no_batch_dimension_is_shared_by_position_too():
    positions = torch.arange(6).view(2, 3)

    def run(expert, args, kwargs):
        samples, img_ids, unnamed = args
        assert torch.equal(img_ids, positions)
        assert unnamed == "scale"
        assert kwargs == {"skip_layers": [7, 9], "shift": 1.0}
        return samples

    args = (torch.tensor([[1.0], [2.0]]), positions, "scale")
    kwargs = {"skip_layers": [7, 9], "shift": 1.0}
    output = run_by_expert([1, 0], args, kwargs, run, ("hidden_states", "img_ids"))
    assert torch.equal(output, args[0])


def test_a_list_of_residuals_as_long_as_the_batch_is_one_of_layers():
    residuals = [torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)] * 2  # two layers of two samples
    prompts = {"ip_adapter_image_embeds": residuals, "shapes": [(1, 4, 4), (1, 8, 8)]}

    def run(expert, args, kwargs):
        (index,) = {1: [0], 0: [1]}[expert]
        for name in ("down_block_additional_residuals", "joint_attention_kwargs"):
            value = kwargs[name]
            layers = value["ip_adapter_image_embeds"] if isinstance(value, dict) else value
            assert [layer.mean().item() for layer in layers] == [index, index]
        assert kwargs["joint_attention_kwargs"]["shapes"] == [prompts["shapes"][index]]
        return args[0]

    kwargs = {"down_block_additional_residuals": residuals, "joint_attention_kwargs": prompts}
    run_by_expert([1, 0], (torch.zeros(2, 1),), kwargs, run)


@pytest.mark.parametrize("num_layers", [3, 2])
def test_hidreams_text_of_each_layer(num_layers):
    text = torch.randn(num_layers, 2, 5, 4)
    assert torch.equal(take_samples(text, [1], 2, "encoder_hidden_states_llama3"), text[:, 1:])
