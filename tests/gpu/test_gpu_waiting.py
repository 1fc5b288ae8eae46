"""A CUDA GPU is never waited for: PyTorch raises an error wherever it would be, in all steps but the first and the last.

In the first ones, tables are made and time is read once; after the last one, somebody wants to see the result. What these tests
say of a real GPU, tests/pipelines/test_steps_waiting.py, tests/test_pretended_accelerator.py and
tests/training/test_training_waiting.py say of a pretended one.
"""

from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, randomised
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from peft import LoraConfig
from runs import train_here
from test_gpu import MODELS, make_prompted, make_unet
from tiny_pipelines import RECIPES, generate, sd3

from diffusers_dmp import (
    ClassConditionalPipeline,
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    LoraExperts,
    NoiseIntervals,
    SNRSplitPipeline,
)
from diffusers_dmp.training import run
from diffusers_dmp.training.loss_log import LossLog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and `make test-gpu`, which shows it"),
]

GPU = "cuda"
STEPS = 6
BOUNDARY = NoiseIntervals.from_sigmas([0.7])  # SD3's fourth step is the first of the other expert


@pytest.fixture(autouse=True)
def waiting_is_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Called after each step: from the second on, waiting is an error; in the last one, it is allowed."""
    torch.cuda.set_sync_debug_mode("error" if step < STEPS - 2 else "default")
    return {}


def test_a_wait_would_be_seen():
    there = torch.ones(2, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        there.sum().item()


PIPELINES = {
    **{name: (lambda make=make: ClassConditionalPipeline(make(), DDIMScheduler())) for name, make in MODELS.items()},
    "DPM-Solver++": lambda: ClassConditionalPipeline(MODELS["DTR"](), DPMSolverMultistepScheduler()),
    "flow matching": lambda: ClassConditionalPipeline(MODELS["DiT"](), FlowMatchEulerDiscreteScheduler()),
    "PNDM": lambda: ClassConditionalPipeline(MODELS["DiT"](), PNDMScheduler(skip_prk_steps=True)),
    "learned variance": lambda: ClassConditionalPipeline(
        randomised(DiTModel(**TINY_CONFIG)), DDPMScheduler(variance_type="learned_range")
    ),
    "split by SNR": lambda: SNRSplitPipeline([MODELS["Remix-DiT"](), make_unet(), make_prompted()], DDIMScheduler(), [1.0, 0.1]),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_no_denoising_step_waits(name):
    """With guidance; random numbers are made there."""
    pipe = PIPELINES[name]().to(GPU)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        class_labels=[1, 3],
        guidance_scale=1.5,
        num_inference_steps=STEPS,
        generator=torch.Generator(GPU).manual_seed(0),
        output_type="latent",
        callback_on_step_end=watch,
    ).images
    assert images.isfinite().all()


def two_denoisers() -> Any:
    return RECIPES["sd3"].pipe(DenoiserExperts([sd3(seed=0), sd3(seed=1)], BOUNDARY))


def two_loras() -> Any:
    pipe = RECIPES["sd3"].pipe(sd3())
    for name in ("low", "high"):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    LoraExperts(["low", "high"], BOUNDARY).attach(pipe)
    return pipe


@pytest.mark.parametrize("make", [two_denoisers, two_loras])
def test_no_step_with_experts_waits_not_even_where_they_take_turns(make):
    """Stable Diffusion 3's own pipeline; the time of all steps is read in the first one."""
    pipe = make().to(GPU)
    given = RECIPES["sd3"].call()
    call = {name: value.to(GPU) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    latents = generate("sd3", pipe, STEPS, callback_on_step_end=watch, **call)
    assert latents.isfinite().all()
    sigmas = pipe.scheduler.timesteps.cpu() / 1000
    assert sigmas[1] > 0.7 > sigmas[STEPS - 2]  # both experts made some of the steps that were watched


@pytest.mark.parametrize("model_class", [DiTModel, DTRTransformer2DModel])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_no_training_step_waits_but_those_that_log(model_class, mixed_precision, digits, tmp_path, monkeypatch):
    """The first and the last log; the real entry point, with averaged weights and clipped gradients."""
    steps, watched = 8, []

    class Watched(LossLog):
        def __call__(self, done, *args, **kwargs):
            super().__call__(done, *args, **kwargs)
            is_watched = 2 <= done.step < steps - 1  # the step that follows
            watched.extend([done.step + 1] * is_watched)
            torch.cuda.set_sync_debug_mode("error" if is_watched else "default")

    monkeypatch.setattr(run, "LossLog", Watched)
    settings = {"logging_steps": 100, "checkpointing_steps": 100, "max_grad_norm": 1.0, "ema_decay": 0.99}
    train_here(model_class, digits, tmp_path, max_train_steps=steps, mixed_precision=mixed_precision, **settings)
    assert watched == [3, 4, 5, 6, 7]
