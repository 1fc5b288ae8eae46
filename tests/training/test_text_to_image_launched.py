"""Text-to-image training as users start it: several processes, and its files where the package is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from runs import launch_script
from safetensors.torch import load_file, save_file
from text_runs import encode_pipeline
from tiny_pipelines import RECIPES, generate

from diffusers_dmp import LoraExperts, NoiseIntervals

EXPERTS = {"method": "lora_experts", "sigma_boundaries": 0.5, "max_train_steps": 3, "lora_alpha": 3}

PLAIN = """
import importlib.util, sys
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
assert importlib.util.find_spec("diffusers_dmp") is None
pipeline, folder, inputs, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(pipeline)
pipe.load_lora_weights(folder, weight_name="expert_1.safetensors")
call = load_file(inputs)
latents = pipe(**call, height=8, width=8, num_inference_steps=4, output_type="latent", return_dict=False)[0]
save_file({"latents": latents}, output)
"""


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return encode_pipeline("sd3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def one_process(sd3, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("one")
    launch_script("train_text_to_image.py", output_dir, 1, sd3.arguments(output_dir, **EXPERTS))
    return output_dir


@pytest.mark.slow
def test_two_processes_follow_one(sd3, one_process, tmp_path):
    """With mixed batches they train the same experts on the same samples, up to the order of sums."""
    launch_script("train_text_to_image.py", tmp_path, 2, sd3.arguments(tmp_path, **EXPERTS))
    for expert in (0, 1):
        found, expected = (
            load_file(run / "loras" / f"expert_{expert}.safetensors") for run in (tmp_path, one_process)
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)
        changed = torch.cat([tensor.flatten() for name, tensor in expected.items() if "lora_B" in name])  # from zeros
        assert changed.abs().mean() > 5e-3


@pytest.mark.slow
def test_a_file_is_loaded_where_the_package_is_not_installed(sd3, one_process, tmp_path):
    inputs = {name: value for name, value in RECIPES["sd3"].call().items() if isinstance(value, torch.Tensor)}
    inputs["latents"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-S", "-c", PLAIN, sd3.pipeline, one_process / "loras", tmp_path / "inputs.safetensors"]
    # without what site-packages link to, such as the package in a checkout
    environment = os.environ | {"PYTHONPATH": str(Path(diffusers.__file__).parents[1])}
    result = subprocess.run(
        [*map(str, command), str(tmp_path / "latents.safetensors")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    latents = load_file(tmp_path / "latents.safetensors")["latents"]

    pipe = DiffusionPipeline.from_pretrained(sd3.pipeline)
    settings = inputs | {"num_inference_steps": 4}
    base = generate("sd3", pipe, guidance_scale=7.0, **settings)
    expert_1 = one_process / "loras" / "expert_1.safetensors"
    LoraExperts.from_files([expert_1, expert_1], NoiseIntervals.from_sigmas([0.5])).attach(pipe)
    expected = generate("sd3", pipe, guidance_scale=7.0, **settings)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    assert (latents - base).abs().max() > 1e-3
