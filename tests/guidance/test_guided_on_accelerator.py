"""Guided steps on an accelerator, seen on a pretended one: the CPU does not wait for it."""

import inspect
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from networks import linear_experts
from tiny_pipelines import RECIPES

from diffusers_dmp import ClassTarget, GuidedScheduler

COUNT_STEPS = ["DEISMultistep", "DPMSolverSinglestep", "EulerDiscrete", "FlowMatchLCM", "LCM", "SASolver", "TCD"]
LOOK_FOR_TIMESTEPS = ["DDIM", "PNDM"]


def guided(accelerator, scheduler: Any, **settings: Any) -> GuidedScheduler:
    return GuidedScheduler(scheduler, accelerator.put(linear_experts()), ClassTarget(1), **settings)


@pytest.mark.parametrize("name", COUNT_STEPS + LOOK_FOR_TIMESTEPS)
@torch.no_grad()
def test_no_step_waits(pretended, accelerator, name):
    """One of the first moves the target there, and the last one looks whether all gradients were finite."""
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    is_flow = "use_flow_sigmas" in inspect.signature(scheduler_class.__init__).parameters
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if is_flow else {}
    scheduler, waits = guided(accelerator, scheduler_class(**flow), timestep_range=(0, 1001)), []
    with accelerator:
        scheduler.set_timesteps(6, device=pretended.DEVICE)
        assert (scheduler.timesteps.device == pretended.DEVICE) == (name in COUNT_STEPS)
        x_t = accelerator.put(torch.randn(2, 3, 8, 8))
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                x_t = scheduler.scale_model_input(x_t, t)
            before = len(accelerator.waits)
            x_t = scheduler.step(0.5 * x_t, t, x_t).prev_sample
            waits.append(len(accelerator.waits) - before)
    assert len(scheduler.timesteps) == len(waits) and sum(waits[3:-1]) == 0 and waits[-1] == 1


@pytest.mark.parametrize("name", ["LTXEulerAncestralRF", "FlowMapEulerDiscrete", "UniPCMultistep", "CogVideoXDDIM"])
@torch.no_grad()
def test_no_step_waits_more_often_than_without_guidance(pretended, accelerator, name):
    """These wait themselves."""
    scheduler_class, waits = getattr(diffusers, f"{name}Scheduler"), []
    for scheduler in (scheduler_class(), guided(accelerator, scheduler_class(), timestep_range=(0, 1001))):
        with accelerator:
            scheduler.set_timesteps(6, device=pretended.DEVICE)
            assert scheduler.timesteps.device == pretended.DEVICE
            x_t = accelerator.put(torch.randn(2, 3, 8, 8))
            for step, t in enumerate(scheduler.timesteps):
                if step == 4:
                    waits.append(-len(accelerator.waits))
                x_t = scheduler.step(0.5 * x_t, t, x_t).prev_sample
                if step == 4:
                    waits[-1] += len(accelerator.waits)
    assert waits[1] <= waits[0] and x_t.device == pretended.DEVICE


@pytest.mark.parametrize("name", ["sd3", "flux"])
@torch.no_grad()
def test_real_pipelines(pretended, accelerator, name):
    """They get their timesteps where they ask for them, and wait in no step."""
    pipe = RECIPES[name].pipe(getattr(tiny_pipelines, name)())
    pipe.set_progress_bar_config(disable=True)
    for component in (pipe.transformer, pipe.vae):
        accelerator.put(component)
    pipe.scheduler = guided(accelerator, pipe.scheduler, decoder=lambda x0: x0.flatten(1)[:, :192].view(-1, 3, 8, 8))
    waits = []

    def count(pipe, step, timestep, tensors):
        assert timestep.device == pretended.DEVICE
        waits.append(len(accelerator.waits))
        return {}

    with accelerator:
        size = {"height": 16, "width": 16}
        call = accelerator.put(RECIPES[name].call()) | size | {"num_inference_steps": 6, "output_type": "latent"}
        latents = pipe(**call, callback_on_step_end=count).images.cpu()
    assert waits[1:5] == [waits[1]] * 4 and waits[5] == waits[1] + 1 and latents.isfinite().all()
