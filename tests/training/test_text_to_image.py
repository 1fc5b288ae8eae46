"""Text-to-image training: every method through the entry point, and that an expert trains at the noise levels it is used at."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from text_runs import encode_pipeline
from tiny_pipelines import generate

from diffusers_dmp import LoraExperts, NoiseIntervals


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    """Tiny pipelines and what they have encoded, each made when it is first asked for."""
    made = {}

    def of(name: str):
        if name not in made:
            made[name] = encode_pipeline(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def test_lora_experts_are_trained_saved_and_attached(encoded, tmp_path):
    sd3 = encoded("sd3")
    output = sd3.train(tmp_path, method="lora_experts", sigma_boundaries=[0.5], ranks=[4, 2])
    folder = output / "loras"
    assert sorted(path.name for path in folder.iterdir()) == [
        "expert_0.safetensors",
        "expert_1.safetensors",
        "lora_experts.json",
    ]
    ranks = [
        {
            tensor.shape[0]
            for name, tensor in load_file(folder / f"expert_{expert}.safetensors").items()
            if "lora_A" in name
        }
        for expert in (0, 1)
    ]
    assert ranks == [{4}, {2}]  # the first is that for the least noise
    pipe = DiffusionPipeline.from_pretrained(sd3.pipeline)
    before = generate("sd3", pipe)
    experts = LoraExperts.from_pretrained(folder).attach(pipe)
    assert experts.intervals == NoiseIntervals((0, 500, 1000)) and not torch.equal(generate("sd3", pipe), before)
    assert json.loads((folder / "lora_experts.json").read_text())["denoiser"] == "SD3Transformer2DModel"
