"""An SNR split and a pipeline with `DenoiserExperts`: one becomes the other, and both generate the same images."""

import pytest
import torch
from conftest import randomised
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from small_pipelines import DIT, UNET, experts

from diffusers_dmp import (
    ClassConditionalPipeline,
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    NoiseIntervals,
    PatchedUNet2DModel,
    SNRSplitPipeline,
)

BOUNDARIES = [4.0, 0.1]


def dit(seed: int, **config) -> DiTModel:
    return randomised(DiTModel(**DIT | config), seed)


def sample(pipeline, **call) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": [3, 5], "num_inference_steps": 8, "guidance_scale": 2.0} | call
    return pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_a_split_becomes_one_model_and_again_a_split(scheduler):
    denoisers = [dit(1), randomised(DTRTransformer2DModel(**DIT)), dit(2, num_layers=1)]
    split = SNRSplitPipeline(denoisers, scheduler, snr_boundaries=BOUNDARIES)
    one = ClassConditionalPipeline.from_pipe(split, transformer=DenoiserExperts.from_pipeline(split))
    assert one.transformer.intervals == split.intervals()
    images = sample(split)
    # modulations are computed for several steps at once in the split alone
    torch.testing.assert_close(sample(one), images)

    again = SNRSplitPipeline.from_pipe(one)
    assert again.denoisers == denoisers
    assert again.intervals().edges == pytest.approx(split.intervals().edges)
    assert torch.equal(sample(again), images)


def test_its_own_boundaries_may_be_given():
    split = SNRSplitPipeline.from_pipe(experts(), snr_boundaries=[1.0])
    assert split.config.snr_boundaries == [1.0]


def test_refuses_a_split_of_different_predictions():
    """A pipeline with one denoiser has one `prediction_type`."""
    kinds = {"prediction_types": ["epsilon", "v_prediction"]}
    split = SNRSplitPipeline([dit(1), dit(2)], DDIMScheduler(), snr_boundaries=[1.0], **kinds)
    with pytest.raises(ValueError, match=r"predict the same.* but got \['epsilon', 'v_prediction'\]"):
        DenoiserExperts.from_pipeline(split)


def test_experts_of_different_predictions_are_refused():
    """They would be read with the type of the first."""
    unet = PatchedUNet2DModel(**UNET, prediction_type="sample")
    with pytest.raises(ValueError, match="same `prediction_type`.* but got None .* a DiTModel, and sample of"):
        DenoiserExperts([dit(1), unet], NoiseIntervals.from_timesteps([500]))
