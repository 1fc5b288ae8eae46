"""Training for Wan2.2, whose pipeline has two transformers: each expert belongs into the one that denoises at its noise."""

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from text_runs import EncodedPipeline, encode_pipeline
from tiny_pipelines import generate, wan

from diffusers_dmp import LoraExperts
from diffusers_dmp.training.data.encoding_pipeline import load_encoding_pipeline
from diffusers_dmp.training.text_to_image.source import load_source


@pytest.fixture(scope="module")
def wan22(tmp_path_factory) -> EncodedPipeline:
    """A tiny Wan2.2, and what its text encoder and VAE have encoded."""
    encoded = encode_pipeline("wan", tmp_path_factory.mktemp("wan"))
    pipe = WanPipeline.from_pretrained(encoded.pipeline)
    folder = encoded.pipeline.with_name("wan22")
    two = {"transformer": wan(0), "transformer_2": wan(1, num_layers=1), "boundary_ratio": 0.875}
    WanPipeline(**{**pipe.components, **two}).save_pretrained(folder)
    return EncodedPipeline("wan", folder, encoded.shards)


def test_each_expert_is_trained_in_the_transformer_that_owns_its_noise(wan22, tmp_path):
    for expert in ("0", "1"):
        wan22.train(tmp_path, method="lora_experts", sigma_boundaries=[0.875], expert=expert)
    layers = [
        {
            name.split("blocks.")[1].split(".")[0]
            for name in load_file(tmp_path / "loras" / f"expert_{expert}.safetensors")
        }
        for expert in (0, 1)
    ]
    assert layers == [{"0"}, {"0", "1"}]  # `transformer_2`, of one layer, below the boundary
    pipe = WanPipeline.from_pretrained(wan22.pipeline)
    before = generate("wan", pipe)
    experts = LoraExperts.from_pretrained(tmp_path / "loras").attach(pipe)
    assert not torch.equal(generate("wan", pipe), before)
    experts.detach()
    assert torch.equal(generate("wan", pipe), before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "lora"},
        {"method": "lora_experts", "sigma_boundaries": [0.875]},
        {"method": "lora_experts", "sigma_boundaries": [0.5], "expert": "1"},
    ],
)
def test_a_training_of_both_at_once_is_refused(wan22, tmp_path, arguments):
    with pytest.raises(ValueError, match=r"of one denoiser of .*transformer from 875 on.*`expert` 0 and 1"):
        wan22.train(tmp_path, **arguments)


def test_samples_that_need_both_are_refused(wan22, tmp_path):
    with pytest.raises(ValueError, match="`sample_steps` to be 0 .* two denoisers"):
        wan22.train(
            tmp_path,
            method="lora_experts",
            sigma_boundaries=[0.875],
            expert="1",
            sample_steps=1,
            validation_prompts=["bright"],
        )


def test_encoding_loads_no_transformer(wan22):
    pipe = load_encoding_pipeline(str(wan22.pipeline), torch.float32)
    assert pipe.transformer is None and pipe.transformer_2 is None and pipe.text_encoder is not None


def test_the_whole_pipeline_has_the_trained_transformer(wan22):
    source = load_source(str(wan22.pipeline), torch.float32, trained_timesteps=lambda scheduler: (0, 875))
    assert source.component == "transformer_2" and source.pipeline.transformer is None
    whole = source.whole_pipeline()
    assert whole.transformer_2 is source.denoiser and whole.transformer is not None
