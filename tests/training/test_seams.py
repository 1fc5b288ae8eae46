"""The loop's three seams: it trains what is no image, with conditions that are no labels, by a model of its own signature."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import RECIPES
from torch import nn

from diffusers_dmp import DTRTransformer2DModel, NoiseIntervals, PatchedUNet2DModel
from diffusers_dmp.training import loop
from diffusers_dmp.training.arguments import DiTTrainingArguments, TrainingArguments, model_arguments
from diffusers_dmp.training.conditions import LabelConditions, TextConditions
from diffusers_dmp.training.denoiser import Denoiser, TextDenoiser
from diffusers_dmp.training.loop import TrainingParts, training_steps
from diffusers_dmp.training.objectives.objective import Objective, ObjectiveOutput
from diffusers_dmp.training.objectives.timesteps import StepExperts
from diffusers_dmp.training.recipe import TrainingRecipe

VIDEO = (2, 3, 4, 4)  # channels, frames, height, width


class ContinuousObjective(Objective):
    """A velocity at continuous timesteps, as flow matching has them."""

    def sample_timesteps(self, batch_size, generator, experts=None, sample_shape=None):
        return torch.rand(batch_size, generator=generator) * 1000

    def add_noise(self, x0, noise, timesteps):
        sigma = timesteps.view(-1, 1, 1, 1, 1) / 1000
        return (1 - sigma) * x0 + sigma * noise

    def forward(self, model_output, batch):
        losses = ((model_output - (batch.noise - batch.x0)) ** 2).flatten(1).mean(1)
        return ObjectiveOutput(loss=losses.mean(), sample_losses=losses)


class TextModel(nn.Module):
    """Called by names of its own, with conditions of two tensors."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2))
        self.seen = []

    def forward(self, video, noise_level, text):
        if self.training:  # its operations are counted in eval mode
            self.seen.append((video.shape, noise_level, text))
        shift = text["embeddings"].mean((1, 2)) + text["pooled"].mean(1)
        return {"sample": self.scale.view(2, 1, 1, 1) * video + shift.view(-1, 1, 1, 1, 1)}


class TextCall(Denoiser):
    def __call__(self, model, x_t, timesteps, conditions, expert=None):
        return Output(**model(video=x_t, noise_level=timesteps / 1000, text=conditions))


class Output(dict):
    def __init__(self, sample):
        super().__init__(sample=sample)
        self.sample = sample


def text_conditions(batch, dropout=None):
    kept = (dropout >= 0.5).float()
    return {"embeddings": batch["embeddings"] * kept.view(-1, 1, 1), "pooled": batch["pooled"] * kept.view(-1, 1)}


def test_the_loop_trains_any_denoiser(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "video": torch.randn(4, *VIDEO, generator=generator),
        "embeddings": torch.ones(4, 5, 6),
        "pooled": torch.ones(4, 7),
    }
    monkeypatch.setattr(loop, "clean_samples", lambda batch, flips, latent_noise, vae: batch["video"])
    model = TextModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = TrainingParts(
        accelerator=Accelerator(cpu=True),
        model=model,
        objective=ContinuousObjective(FlowMatchEulerDiscreteScheduler()),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        recipe=TrainingRecipe(),
        denoiser=TextCall(VIDEO),
        conditions=text_conditions,
        vae=None,
    )
    args = TrainingArguments(batch_size=4, max_train_steps=3)
    steps = list(training_steps(parts, args, iter([batch] * 3), first_step=0))
    assert [done.step for done in steps] == [1, 2, 3] and model.scale.abs().min() > 0
    shapes, levels, texts = zip(*model.seen)
    assert set(shapes) == {(4, *VIDEO)}
    assert all(level.is_floating_point() and (level < 1).all() for level in levels)
    kept = torch.cat([text["pooled"][:, 0] for text in texts])
    assert set(kept.tolist()) == {0.0, 1.0}
    assert all(torch.equal(text["pooled"][:, 0], text["embeddings"][:, 0, 0]) for text in texts)


def test_labels_as_conditions():
    batch, dropout = {"class_labels": torch.tensor([1, 2, 3])}, torch.tensor([0.05, 0.1, 0.9])
    conditions = LabelConditions(dropout_prob=0.1)(batch, dropout)
    assert conditions["class_labels"] is batch["class_labels"]
    assert conditions["force_drop_ids"].tolist() == [True, False, False]
    assert LabelConditions(0.1)(batch) == batch  # outside training
    assert LabelConditions(0.0)({}, dropout)["class_labels"] is None  # unconditional data


def test_a_recipes_experts():
    intervals = NoiseIntervals.uniform(4)
    assert TrainingRecipe().step_experts(0, 0, 2, 8) is None
    assert TrainingRecipe().noise_range(1000) == (0, 1000)
    one = TrainingRecipe(expert_intervals=intervals, expert=2)
    experts = one.step_experts(0, 0, 2, 8)
    assert experts == StepExperts(intervals, [2, 2]) and one.expert_argument(experts, 0) is None
    assert one.noise_range(1000) == (500, 750)
    several = TrainingRecipe(expert_intervals=intervals)
    steps = [several.step_experts(0, step, 2, 8) for step in range(20)]
    assert {owner for experts in steps for owner in experts.owners} == {0, 1, 2, 3}
    assert [[several.expert_argument(experts, process) for process in (0, 1)] for experts in steps] == [
        experts.owners for experts in steps
    ]
    assert steps == [several.step_experts(0, step, 2, 8) for step in range(20)]
    finds_its_expert = TrainingRecipe(expert_intervals=intervals, passes_expert=False)
    assert (
        finds_its_expert.step_experts(0, 0, 2, 8) == steps[0] and finds_its_expert.expert_argument(steps[0], 0) is None
    )


def test_batches_of_all_experts():
    intervals = NoiseIntervals((0, 100, 300, 1000))
    mixed = TrainingRecipe(expert_intervals=intervals, expert_batches="mixed")
    owners = [mixed.step_experts(0, step, 2, 8).owners for step in range(3)]
    assert (
        owners[0] == [0, 1, 2, 0, 1, 2, 0, 1] and [sum(step.count(e) for step in owners) for e in range(3)] == [8] * 3
    )
    objective = Objective(DDPMScheduler())
    experts = StepExperts(intervals, owners[1])
    timesteps = objective.sample_timesteps(8, torch.Generator().manual_seed(0), experts)
    assert intervals.index(timesteps).tolist() == owners[1]
    by_density = TrainingRecipe(expert_intervals=intervals, expert_batches="density")
    assert by_density.step_experts(0, 0, 2, 8) is None


def test_dropped_prompts_are_the_empty_one():
    """Also where the empty prompt has another length; a mask of the text, padded with zeros like it, follows."""
    batch = {
        "mean": torch.zeros(3, 1, 4, 2, 2),
        "std": torch.zeros(3, 1, 4, 2, 2),
        "prompt_embeds": torch.ones(3, 2, 5),
        "prompt_embeds_mask": torch.ones(3, 2),
        "pooled": torch.ones(3, 6),
        "time_ids": torch.ones(3, 6),  # of the image, not of the prompt
    }
    empty = {
        "prompt_embeds": torch.full((1, 4, 5), 7.0),
        "prompt_embeds_mask": torch.ones(1, 4),
        "pooled": torch.full((1, 6), 7.0),
    }
    conditions = TextConditions(empty, dropout_prob=0.5)
    assert conditions(batch).keys() == batch.keys() - {"mean", "std"}
    assert torch.equal(conditions(batch)["prompt_embeds"], batch["prompt_embeds"])  # none is dropped outside training
    dropped = conditions(batch, torch.tensor([0.9, 0.2, 0.5]))
    assert dropped["prompt_embeds"][:, :, 0].tolist() == [[1, 1, 0, 0], [7, 7, 7, 7], [1, 1, 0, 0]]
    assert dropped["prompt_embeds_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert dropped["pooled"][:, 0].tolist() == [1, 7, 1] and torch.equal(dropped["time_ids"], batch["time_ids"])


def test_the_denoiser_of_a_pipeline_is_told_the_time_as_its_class_is():
    transformer = RECIPES["flux"].denoiser()
    batch = {"mean": torch.zeros(2, 1, 1, 8, 6)}
    calls = []

    def call(model, config, x_t, time, conditions):
        calls.append((model, config, time, conditions))
        return x_t

    denoiser = TextDenoiser(call, transformer, 1000)
    assert denoiser.shape_of(batch) == (1, 8, 6)
    x_t = torch.ones(2, 1, 8, 6)
    assert denoiser(transformer, x_t, torch.tensor([250.0, 1000.0]), {"text": 1}).sample is x_t
    model, config, time, conditions = calls[0]
    assert model is transformer and config is transformer.config and conditions == {"text": 1}
    assert time.tolist() == [0.25, 1.0]  # Flux counts from 1 to 0


@pytest.mark.parametrize("low, high, expected", [(0, 1000, [0, 250, 500, 750]), (10.5, 14.5, [11, 12, 13, 14])])
def test_evenly_spaced_timesteps(low, high, expected):
    objective = ContinuousObjective(FlowMatchEulerDiscreteScheduler())
    assert objective.evenly_spaced_timesteps(4, low, high).tolist() == expected


def test_a_models_arguments_are_found_in_its_constructor():
    args = DiTTrainingArguments(num_layers=3)
    sizes = {"num_layers": 3, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 2}
    shared = {"num_train_timesteps": 1000, "class_dropout_prob": 0.1}
    assert model_arguments(DTRTransformer2DModel, args) == sizes | shared
    assert model_arguments(DTRTransformer2DModel, args, without=DiTTrainingArguments) == {}
    assert model_arguments(PatchedUNet2DModel, args).keys() >= {"patch_size", "prediction_type"}

    class Subclass(DTRTransformer2DModel):
        def __init__(self, num_layers: int = 2, **kwargs):
            super().__init__(num_layers=num_layers, **kwargs)

    assert model_arguments(Subclass, args) == sizes | shared  # those of the base class, too
