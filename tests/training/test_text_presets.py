"""The presets of LoRA experts fit the architectures of the published checkpoints: on the `meta` device, without weights."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import REPOSITORY
from text_runs import encode_pipeline, fresh_processes

from diffusers_dmp import NoiseIntervals
from diffusers_dmp.training.text_to_image import train_text_to_image
from diffusers_dmp.training.text_to_image.targets import lora_targets_of

PRESETS = ("sd3", "flux", "wan22", "sdxl")
# of the denoiser, and of each expert: rank · (inputs + outputs) of all layers that get LoRA
PARAMETERS = {
    "sd3": (2_028_328_000, [18_776_064, 9_388_032]),
    "sd35": (8_056_627_520, [47_161_344, 23_580_672]),  # by the preset of Stable Diffusion 3
    "flux": (11_901_408_320, [26_148_864, 13_074_432]),
    "wan22": (14_288_491_584, [153_354_240, 76_677_120]),
    "sdxl": (2_567_463_684, [46_448_640, 23_224_320]),
}


@pytest.fixture(autouse=True)
def text_memory(monkeypatch, tmp_path):
    """The module that has the architectures, in a folder with data for the presets."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    from benchmarks import text_memory

    return text_memory


def preset_of(name: str) -> str:
    return f"{name.replace('35', '3')}_lora_experts"


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_target_modules_exist_and_have_so_many_parameters(text_memory, name):
    args = text_memory.text_arguments(preset_of(name))
    denoiser = text_memory.ARCHITECTURES[name].make()
    total, learned = PARAMETERS[name]
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == total
    endings = lora_targets_of(denoiser, args.target_modules)
    layers = [
        module
        for path, module in denoiser.named_modules()
        if any(path == ending or path.endswith(f".{ending}") for ending in endings)
    ]
    assert all(isinstance(layer, torch.nn.Linear) for layer in layers)
    width = sum(layer.in_features + layer.out_features for layer in layers)
    assert [rank * width for rank in args.expert_ranks(args.count_experts())] == learned


def test_the_boundaries_are_those_of_the_pipelines(text_memory):
    found = {}
    for name in PRESETS:
        args = text_memory.text_arguments(preset_of(name))
        found[name] = args.sigma_boundaries or [step / 1000 for step in args.timestep_boundaries]
    assert found == {"sd3": [0.75], "flux": [0.75], "wan22": [0.875], "sdxl": [0.5]}
    # what the presets' comments say about shares
    density = text_memory.text_arguments("wan22_lora_experts").noise_density
    wan = NoiseIntervals.from_sigmas([0.875])
    assert [round(density(shift).shares(wan)[1], 3) for shift in (1.0, 5.0)] == [0.026, 0.368]
    sd3 = text_memory.text_arguments("sd3_lora_experts").noise_density(3.0)
    assert sd3.shares(NoiseIntervals.from_sigmas([0.75])) == pytest.approx([0.5, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_the_adapters_are_injected_and_a_step_takes_the_memory_that_is_said(text_memory, name):
    args = text_memory.text_arguments(preset_of(name))
    model = text_memory.adapted(text_memory.ARCHITECTURES[name], args)
    _, learned = PARAMETERS[name]
    trained = sum(learned) if args.single_expert is None else learned[args.single_expert]
    assert sum(parameter.numel() for parameter in model.parameters()) == trained
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    memory = text_memory.adapted_step_memory(text_memory.ARCHITECTURES[name], model, args)
    text = (REPOSITORY / "training" / "presets" / f"{preset_of(name)}.yaml").read_text()
    said = re.search(
        r"estimated (\d+) GB: (\S+) the weights in bfloat16, (\S+) .* in float32, (\S+)", text.replace("\n# ", " ")
    )
    total, *parts = (float(number) for number in said.groups())
    assert total == round(memory.total / 1e9)
    estimated = [memory.frozen, memory.learned, memory.activations]
    assert parts == pytest.approx([each / 1e9 for each in estimated], abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_a_tiny_pipeline_of_its_family(text_memory, name, tmp_path):
    encoded = encode_pipeline(name.replace("wan22", "wan"), tmp_path)
    small = {
        "ranks": [4, 2],
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 2,
        "lr_warmup_steps": 1,
    }
    paths = {"pretrained_model_name_or_path": str(encoded.pipeline), "dataset": str(encoded.shards)}
    rest = {"checkpointing_steps": 2, "report_to": "none", "dataloader_num_workers": 0, "output_dir": str(tmp_path)}
    fresh_processes()
    train_text_to_image(dataclasses.replace(text_memory.text_arguments(preset_of(name)), **small, **paths, **rest))
    config = json.loads((tmp_path / "loras" / "lora_experts.json").read_text())
    assert config["interval_edges"] == {"wan22": [0, 875, 1000], "sdxl": [0, 500, 1000]}.get(name, [0, 750, 1000])
    assert (tmp_path / "loras" / "expert_1.safetensors").exists()
