"""Guidance of the images that latents are decoded to, in the real pipelines of Diffusers."""

import pytest
import torch
from networks import PLAIN
from tiny_pipelines import RECIPES, generate
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler

FLOW = {"process": "flow_matching"}
FLOW_PIPELINES = ["sd3", "flux", "wan", "zimage", "qwen"]


class RedClassifier(PreTrainedModel):
    """Class 0 are images that are redder than they are green and blue, in their left half."""

    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig(num_labels=2))
        self.contrast = nn.Parameter(torch.tensor(3.0))

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        left = pixel_values[..., : pixel_values.shape[-1] // 2].mean((2, 3))
        score = self.contrast * (left[:, 0] - left[:, 1:].mean(1))
        return ImageClassifierOutput(logits=torch.stack([score, -score], 1))


def red_experts() -> GuidanceExperts:
    return GuidanceExperts(RedClassifier(), **PLAIN, method="finetune", num_experts=1, noise_schedule=FLOW)


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_scale_zero_is_no_guidance(name):
    """The velocity plus zeros: bit for bit what the pipeline does without guidance."""
    pipe = RECIPES[name].pipe(RECIPES[name].denoiser())
    expected = generate(name, pipe, num_inference_steps=3)
    pipe.scheduler = GuidedScheduler.for_pipeline(pipe, red_experts(), ClassTarget(0), scale=0.0)
    assert torch.equal(generate(name, pipe, num_inference_steps=3), expected)
