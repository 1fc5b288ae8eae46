"""A training that starts from a base continues what the base was trained for, or is refused."""

import logging

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TINY_CONFIG, Vectors
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from runs import TINY, train_here

from diffusers_dmp import ClassConditionalPipeline, DiTModel, PromptPatch, RemixDiTModel
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.base_schedule import base_scheduler, check_base_schedule
from diffusers_dmp.training.dit_family import load_dit_family

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
DIT = TINY_CONFIG | {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 1,
    "out_channels": 2,
    "patch_size": 4,
}


def save(folder, scheduler, model=None, **components):
    model = model or DiTModel(**DIT)
    ClassConditionalPipeline(model, scheduler, **components).save_pretrained(folder)
    return str(folder)


def arguments(**changes) -> TrainingArguments:
    return TrainingArguments(**changes)


def test_a_base_of_the_same_kind_is_accepted(tmp_path, caplog):
    """Whatever the scheduler that samples; what counts is how the noise was added."""
    with caplog.at_level(logging.WARNING):
        for index, scheduler in enumerate(
            (DDPMScheduler(), DDIMScheduler(), EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02))
        ):
            folder = save(tmp_path / str(index), scheduler)
            check_base_schedule(arguments(), load_dit_family(folder), folder)
            check_base_schedule(arguments(), load_dit_family(f"{folder}/transformer"), f"{folder}/transformer")
        folder = save(tmp_path / "v", UniPCMultistepScheduler(**COSINE, prediction_type="v_prediction"))
        check_base_schedule(arguments(**COSINE, prediction_type="v_prediction"), load_dit_family(folder), folder)
        check_base_schedule(arguments(beta_schedule="linear0.02"), load_dit_family(f"{tmp_path}/0"), f"{tmp_path}/0")
    assert not caplog.records


@pytest.mark.parametrize(
    ("scheduler", "given", "differences", "advice"),
    [
        (DDPMScheduler(prediction_type="v_prediction"), {}, ["`prediction_type` 'epsilon' for a base of 'v_prediction'"],
         "Give --prediction_type v_prediction."),
        (DDIMScheduler(**COSINE, prediction_type="sample"), {}, ["`prediction_type`", "`beta_schedule` 'linear' for a base of 'squaredcos_cap_v2'"],
         "Give --prediction_type sample --beta_schedule squaredcos_cap_v2."),
        (DDPMScheduler(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012), {}, ["`beta_schedule`"],
         "Give --beta_schedule scaled_linear --beta_start 0.00085 --beta_end 0.012."),
        (DDPMScheduler(beta_end=0.025), {}, ["ᾱ at timestep 500"], "Give --beta_end 0.025."),
        (DDPMScheduler(num_train_timesteps=500), {}, ["`num_train_timesteps` 1000 for a base of 500"], "Give --num_train_timesteps 500."),
        (DDPMScheduler(variance_type="learned"), {}, ["`learn_sigma`"], "No arguments match"),
        (DDIMScheduler(rescale_betas_zero_snr=True), {}, ["`beta_schedule` 'linear' for a base of 'linear'"], "No arguments match"),
        (DDPMScheduler(trained_betas=[0.01] * 1000), {}, ["ᾱ at timestep 500"], "No arguments match"),
        (FlowMatchEulerDiscreteScheduler(), {}, ["FlowMatchEulerDiscreteScheduler, which adds noise in another way"], "Give --objective flow."),
        (DDPMScheduler(), {"objective": "flow"}, ["DDPMScheduler, which adds noise in another way"], "Give --objective ddpm."),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), {"objective": "flow"},
         ["`num_train_timesteps` 1000 for a base of 500"], "Give --num_train_timesteps 500."),
    ],
)  # fmt: skip
def test_a_base_of_another_kind_is_refused_with_what_would_match(tmp_path, scheduler, given, differences, advice):
    model = DiTModel(**DIT)
    model.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError) as refused:
        check_base_schedule(arguments(**given), model, str(tmp_path / "transformer"))
    message = str(refused.value)
    assert str(tmp_path) in message and advice in message
    for difference in differences:
        assert difference in message
    if "Give" in advice:  # and these arguments are accepted
        words = message.partition("Give ")[2].removesuffix(".").split()
        kinds = {"beta_start": float, "beta_end": float, "num_train_timesteps": int}
        names = [word.removeprefix("--") for word in words[::2]]
        given |= {name: kinds.get(name, str)(value) for name, value in zip(names, words[1::2])}
        check_base_schedule(arguments(**given), model, str(tmp_path / "transformer"))


def test_every_training_from_a_base_checks_it(tmp_path, digits, monkeypatch):
    """DMP, its full fine-tuning, a Remix-DiT and a DiT that goes on: each is refused before its first step."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_dmp import DMPTrainingArguments, train_dmp

    folder = save(tmp_path / "base", DDPMScheduler(**COSINE, prediction_type="v_prediction"))
    advice = "--prediction_type v_prediction --beta_schedule squaredcos_cap_v2"
    run = tmp_path / "run"
    for method in ("dmp", "full_finetuning"):
        AcceleratorState._reset_state(reset_partial_state=True)
        args = DMPTrainingArguments(dataset=str(digits), image_size=8, image_channels=1, report_to="none",
                                    pretrained_model_name_or_path=folder, method=method, output_dir=str(run))  # fmt: skip
        with pytest.raises(ValueError, match=advice):
            train_dmp(args)
    for model_class in (DiTModel, RemixDiTModel):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ValueError, match=advice):
            train_here(model_class, digits, run, pretrained_model_name_or_path=folder)
    assert not (run / "checkpoint-2").exists() and "patch_size" in TINY


def test_without_a_scheduler_the_assumption_is_said(tmp_path, caplog):
    DiTModel(**DIT).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_base_schedule(arguments(prediction_type="sample"), load_dit_family(str(tmp_path)), str(tmp_path))
    (record,) = caplog.records
    assert "it is assumed: prediction_type sample, beta_schedule linear" in record.getMessage()


def test_a_published_file_has_the_published_schedule(tmp_path, caplog):
    published = Vectors("dit_tiny")
    torch.save(published.state_dict | {}, tmp_path / "DiT.pt")
    model = DiTModel(**TINY_CONFIG)
    assert base_scheduler(str(tmp_path / "DiT.pt")).config.beta_end == 0.02
    with caplog.at_level(logging.WARNING):
        check_base_schedule(arguments(), model, str(tmp_path / "DiT.pt"))
    assert not caplog.records
    with pytest.raises(ValueError, match="--prediction_type epsilon"):
        check_base_schedule(arguments(prediction_type="v_prediction"), model, str(tmp_path / "DiT.pt"))


def test_a_bases_prompts_are_not_lost_in_silence(tmp_path, caplog):
    model = DiTModel(**DIT)
    folder = save(tmp_path, DDPMScheduler(), model, prompt_patch=PromptPatch.for_transformer(model))
    with caplog.at_level(logging.WARNING):
        load_dit_family(folder)
    assert "The prompts in" in caplog.text


def test_a_base_that_diverged_is_refused(tmp_path):
    model = DiTModel(**DIT)
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 4,096 numbers in 'transformer_blocks.1.ff.net.2.weight' are NaN"):
        load_dit_family(str(tmp_path))


def test_the_latents_are_those_of_the_bases_vae(tmp_path):
    def vae(**config) -> AutoencoderKL:
        return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **config)

    model = DiTModel(**DIT | {"in_channels": 4, "out_channels": 8})
    folder = save(tmp_path, DDPMScheduler(), model, vae=vae())
    for name in (folder, f"{folder}/transformer"):
        check_base_schedule(arguments(), model, name, vae())
        with pytest.raises(
            ValueError, match="`scaling_factor` 0.13025 for a base of 0.18215. Give the base's own VAE as --vae"
        ):
            check_base_schedule(arguments(), model, name, vae(scaling_factor=0.13025))
