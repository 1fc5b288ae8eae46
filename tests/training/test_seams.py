"""The loop's three seams: it trains what is no image, with conditions that are no labels, by a model of its own signature."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusers_dmp import DTRTransformer2DModel, PatchedUNet2DModel
from diffusers_dmp.training import loop
from diffusers_dmp.training.arguments import DiTTrainingArguments, TrainingArguments, model_arguments
from diffusers_dmp.training.conditions import LabelConditions
from diffusers_dmp.training.denoiser import Denoiser
from diffusers_dmp.training.loop import TrainingParts, training_steps
from diffusers_dmp.training.objectives.objective import Objective, ObjectiveOutput
from diffusers_dmp.training.objectives.timesteps import StepExperts
from diffusers_dmp.training.recipe import TrainingRecipe

VIDEO = (2, 3, 4, 4)  # channels, frames, height, width


class ContinuousObjective(Objective):
    """A velocity at continuous timesteps, as flow matching has them."""

    def sample_timesteps(self, batch_size, generator, experts=None):
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
    from diffusers_dmp import NoiseIntervals

    intervals = NoiseIntervals.uniform(4)
    assert TrainingRecipe().step_experts(0, 0, 2) is None
    assert TrainingRecipe().noise_range(1000) == (0, 1000)
    one = TrainingRecipe(expert_intervals=intervals, expert=2)
    assert one.step_experts(0, 0, 2) == StepExperts(intervals, [2, 2]) and not one.passes_expert
    assert one.noise_range(1000) == (500, 750)
    several = TrainingRecipe(expert_intervals=intervals)
    owners = [several.step_experts(0, step, 2).owners for step in range(20)]
    assert several.passes_expert and {owner for both in owners for owner in both} == {0, 1, 2, 3}
    assert owners == [several.step_experts(0, step, 2).owners for step in range(20)]


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
