"""Which modules get LoRA by default, what a name may mean, and what is said of one that means nothing."""

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_pipelines import RECIPES
from torch import nn

from diffusers_dmp.training.objectives.shifts import shift_of
from diffusers_dmp.training.text_to_image.targets import lora_targets_of

SELF = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*SELF, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_attention_gets_them_by_default(name):
    joint = name in ("sd3", "flux", "qwen")  # text and image in one attention
    assert lora_targets_of(RECIPES[name].denoiser()) == (JOINT if joint else SELF)


def test_names_and_ends_of_names():
    denoiser = RECIPES["sd3"].denoiser()
    for name in ("ff.net.0.proj", "attn.to_q", "transformer_blocks.1.attn.to_k", "proj_out"):
        assert lora_targets_of(denoiser, [name]) == [name]
    for name in ("o_q", "to_k.weight", "norm_added_q"):  # half a name, a parameter, a norm
        with pytest.raises(ValueError, match=f"got {name!r}"):
            lora_targets_of(denoiser, ["to_q", name])
    with pytest.raises(ValueError, match="got 'ff.net.0.project'; close to it are ff.net.0.proj, "):
        lora_targets_of(denoiser, ["ff.net.0.project"])
    with pytest.raises(ValueError, match="got 'xyz'; such are to_q, to_k, "):
        lora_targets_of(denoiser, ["xyz"])


def test_a_denoiser_without_the_usual_names():
    with pytest.raises(ValueError, match="`target_modules` to be given for a Sequential, .* it has "):
        lora_targets_of(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "scheduler, expected",
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (FlowMatchEulerDiscreteScheduler(), 1.0),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "resolution"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0), 5.0),
        (DDIMScheduler(), 1.0),
    ],
)
def test_training_is_shifted_as_the_pipeline_samples(scheduler, expected):
    assert shift_of(scheduler) == expected
