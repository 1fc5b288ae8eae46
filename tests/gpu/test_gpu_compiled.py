"""Pipelines that are compiled on a CUDA GPU, in CUDA graphs, compared with themselves: `make test-gpu` runs these tests."""

import pytest
import torch
from compiled_systems import SYSTEMS, dit, pipeline_of, sample
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler
from tiny_pipelines import RECIPES, generate

from diffusers_dmp import DenoiserExperts, NoiseIntervals
from diffusers_dmp.models.compiled_calls import compilation_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and `make test-gpu`, which shows it"),
]

GPU = "cuda"
# The compiler fuses operations, which rounds in other places; see test_gpu.py.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_compiled_system_samples_what_it_samples_eagerly(system):
    """Three times: PyTorch warms up first, then captures, then replays."""
    pipe = SYSTEMS[system][0]().to(GPU)
    expected = sample(pipe)
    pipe.compile()
    for _ in range(3):
        torch.testing.assert_close(sample(pipe), expected, **TOLERANCE)
    (denoiser, *_) = pipe.denoisers
    compilation = compilation_of(getattr(denoiser, "experts", [denoiser])[0])
    with torch.no_grad():
        assert compilation.captures_graphs(torch.device(GPU)) and not compilation.is_eager


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_schedulers_that_keep_earlier_outputs(scheduler, guidance_scale):
    """Without guidance the output of the graph itself is kept."""
    pipe = pipeline_of(dit(), scheduler()).to(GPU)
    expected = sample(pipe, guidance_scale=guidance_scale)
    pipe.compile()
    for _ in range(3):
        torch.testing.assert_close(sample(pipe, guidance_scale=guidance_scale), expected, **TOLERANCE)


def test_sizes_alternate(warned):
    pipe = pipeline_of(dit()).to(GPU)
    calls = [{}, {"height": 12}, {"batch_size": 3}, {}, {"batch_size": 3, "height": 12}]
    calls += [{"batch_size": 1}, {"height": 12}]
    expected = [sample(pipe, **call) for call in calls]
    pipe.compile()
    for _ in range(2):
        for call, images in zip(calls, expected):
            torch.testing.assert_close(sample(pipe, **call), images, **TOLERANCE)
    assert len(warned) == 4  # another height, another batch, both, and one image; the first shape is not said


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode):
    pipe = pipeline_of(dit()).to(GPU)
    expected = sample(pipe)
    pipe.compile(mode=mode)
    for _ in range(3):
        torch.testing.assert_close(sample(pipe), expected, **TOLERANCE)
    assert not compilation_of(pipe.transformer).is_eager


def test_a_pipeline_may_be_moved_after_compiling():
    pipe = pipeline_of(dit())
    pipe.compile()
    pipe.to(GPU)
    with torch.compiler.set_stance("force_eager"):
        expected = sample(pipe)
    for _ in range(3):
        torch.testing.assert_close(sample(pipe), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_experts_in_a_pipeline_of_diffusers(name):
    """Wan's calls its denoiser twice in each step, with the conditional output still to be used."""
    denoisers = [RECIPES[name].denoiser(seed) for seed in range(2)]
    experts = DenoiserExperts(denoisers, NoiseIntervals.from_timesteps([500]))
    pipe = RECIPES[name].pipe(experts).to(GPU)
    call = {name: _on_gpu(value) for name, value in RECIPES[name].call().items()}
    expected = generate(name, pipe, num_inference_steps=4, **call)
    experts.compile()
    for _ in range(3):
        torch.testing.assert_close(generate(name, pipe, num_inference_steps=4, **call), expected, **TOLERANCE)


def _on_gpu(value):
    return value.to(GPU) if isinstance(value, torch.Tensor) else value


def test_offloading_is_refused_after_graphs_and_has_none_before():
    pipe = pipeline_of(dit(), DDIMScheduler()).to(GPU)
    expected = sample(pipe)
    pipe.compile()
    for how in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(ValueError, match="without CUDA graphs, as .*offloading"):
            getattr(pipe, how)()
    pipe = pipeline_of(dit(), DDIMScheduler())
    pipe.enable_model_cpu_offload()
    pipe.compile()
    for _ in range(2):
        torch.testing.assert_close(sample(pipe), expected, **TOLERANCE)
