"""No training step waits for an accelerator but those that log; seen on a pretended one, with Accelerate's own loop."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import TINY_CONFIG, randomised
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from networks import PLAIN, LinearClassifier
from tiny_pipelines import randn
from torch import nn

from diffusers_dmp import (
    DiTModel,
    DTRTransformer2DModel,
    GuidanceExperts,
    NoiseIntervals,
    PromptPatch,
    RemixDiTModel,
)
from diffusers_dmp.training import loss_log
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.conditions import LabelConditions, no_conditions
from diffusers_dmp.training.denoiser import Denoiser
from diffusers_dmp.training.finite import FiniteCheck
from diffusers_dmp.training.interruption import Interruption
from diffusers_dmp.training.loop import TrainingParts, training_steps
from diffusers_dmp.training.loss_log import LossLog
from diffusers_dmp.training.objectives.ddpm import DiffusionObjective
from diffusers_dmp.training.objectives.distillation import DistillationObjective, ExpertStudent, StudentCall
from diffusers_dmp.training.objectives.flow import FlowObjective
from diffusers_dmp.training.optimisation import make_ema, make_lr_scheduler
from diffusers_dmp.training.prompted import PromptedTransformer
from diffusers_dmp.training.recipe import TrainingRecipe

SIZES = TINY_CONFIG | {"num_layers": 1, "attention_head_dim": 8}
HALVES = NoiseIntervals.uniform(2)
STEPS = 4
BATCH_SIZE = 8


@dataclasses.dataclass
class Case:
    """
    Args:
        model: Makes what is trained, on an accelerator.
        objective: What it learns.
        recipe: What the system trains differently.
        arguments: Of the training.
        color_jitter: Of images; latents without it.
    """

    model: Callable[[Any], nn.Module]
    objective: Callable[[], nn.Module] = lambda: DiffusionObjective(DDPMScheduler(), variance_type="learned_range")
    recipe: Callable[[nn.Module], TrainingRecipe] = lambda model: TrainingRecipe()
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    color_jitter: float = 0.0

    def batches(self, accelerator: Any, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Labels, and images or distributions of latents, as shards have them."""
        while True:
            latents = {"mean": torch.randn(size, 2, 4, 8, 8), "std": torch.rand(size, 2, 4, 8, 8)}
            samples = {"images": torch.rand(size, 3, 8, 8)} if self.color_jitter else latents
            yield accelerator.put(samples | {"class_labels": torch.randint(10, (size,))})


def remix_recipe(model: nn.Module) -> TrainingRecipe:
    """As training/train_remix.py has it."""
    return TrainingRecipe(expert_intervals=model.intervals, auxiliary_weights=lambda step: {"prior_loss": 1e-4})


def prompts(accelerator: Any) -> nn.Module:
    """Of a frozen transformer, which is no part of what is trained."""
    base = accelerator.put_to_train(randomised(DiTModel(**SIZES)).requires_grad_(False))
    patch = PromptPatch.for_transformer(base)
    patch.attach(base)
    return accelerator.put_to_train(PromptedTransformer(patch))


def guidance_experts() -> GuidanceExperts:
    network = LinearClassifier(randn(10, 3 * 64))
    return GuidanceExperts(network, **PLAIN, method="multi_experts", num_experts=2)


def student_recipe(model: nn.Module) -> TrainingRecipe:
    """As training/train_ppap.py has it."""
    return TrainingRecipe(denoiser=StudentCall((3, 8, 8)), conditions=no_conditions, expert=1, expert_intervals=HALVES)


CASES = {
    "DiT, uncertainty weighting": Case(
        lambda accelerator: accelerator.put_to_train(randomised(DiTModel(**SIZES))),
        lambda: DiffusionObjective(DDPMScheduler(), "uw", "learned_range"),
        arguments={"gradient_accumulation_steps": 2},
    ),
    "DTR, flow matching": Case(
        lambda accelerator: accelerator.put_to_train(randomised(DTRTransformer2DModel(**SIZES | {"out_channels": 4}))),
        lambda: FlowObjective(FlowMatchEulerDiscreteScheduler()),
    ),
    "Remix-DiT": Case(
        lambda accelerator: accelerator.put_to_train(randomised(RemixDiTModel(**SIZES, num_bases=2, num_experts=4))),
        recipe=remix_recipe,
    ),
    "DMP": Case(prompts),
    "PPAP": Case(
        lambda accelerator: ExpertStudent(accelerator.put_to_train(guidance_experts()), 1),
        lambda: DistillationObjective(DDPMScheduler(), guidance_experts()),
        recipe=student_recipe,
        color_jitter=0.2,
    ),
}


def waits(pretended: Any, monkeypatch: pytest.MonkeyPatch, case: Case, output_dir: Any) -> list[list[str]]:
    """What the CPU waits for in each step of a training, with all that `TrainingRun.train_from` does beside it."""
    there, found = pretended.PretendedAccelerator(), []
    monkeypatch.setattr(torch, "Generator", pretended.PretendedGenerator)
    monkeypatch.setattr(Accelerator, "device", pretended.DEVICE)
    # measured before the first step, by synchronising with a real device
    monkeypatch.setattr(loss_log, "device_flops", lambda device, precision: 1e12)
    args = DiTTrainingArguments(
        dataset="none",
        output_dir=str(output_dir),
        report_to="none",
        batch_size=BATCH_SIZE,
        max_train_steps=STEPS,
        logging_steps=100,
        max_grad_norm=1.0,
        ema_decay=0.99,
        **case.arguments,
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    args.color_jitter = case.color_jitter
    model, objective = case.model(there), there.put_to_train(case.objective())
    learned = [each for module in (model, objective) for each in module.parameters() if each.requires_grad]
    # fused, as trainings have it, only real devices can; Accelerate's `prepare` moves what is there already
    optimizer = torch.optim.AdamW(learned, foreach=True)
    recipe = case.recipe(model)
    parts = TrainingParts(
        accelerator=accelerator,
        model=model,
        objective=objective,
        optimizer=AcceleratedOptimizer(optimizer, device_placement=False),
        lr_scheduler=make_lr_scheduler(args, optimizer),
        recipe=recipe,
        denoiser=recipe.denoiser or Denoiser((4, 8, 8)),
        conditions=recipe.conditions or LabelConditions(0.1),
        vae=None,
    )
    micro_batches = case.batches(there, BATCH_SIZE // args.gradient_accumulation_steps)
    with there, Interruption(accelerator) as interruption:
        ema = make_ema(args, model, optimizer)
        finite, log = FiniteCheck(accelerator, args, 1000), LossLog(accelerator, args, 1000, 0)
        for done in training_steps(parts, args, micro_batches, 0):
            ema.step(model.parameters())
            finite.add(done, args.learning_rate)
            log(done, args.learning_rate)
            interruption.signal_received()
            found.append(list(there.waits))
            there.waits.clear()
        log.close()
    return found


@pytest.mark.parametrize("name", CASES)
def test_only_steps_that_log_wait(pretended, monkeypatch, name, tmp_path):
    first, *others, last = waits(pretended, monkeypatch, CASES[name], tmp_path)
    assert first and last  # both are logged
    assert not any(others), others


def test_a_wait_would_be_seen(pretended, monkeypatch, tmp_path):
    class Looked(DiTModel):
        def forward(self, hidden_states, *args, **kwargs):
            assert hidden_states.isfinite().all()
            return super().forward(hidden_states, *args, **kwargs)

    found = waits(
        pretended,
        monkeypatch,
        Case(lambda accelerator: accelerator.put_to_train(randomised(Looked(**SIZES)))),
        tmp_path,
    )
    assert found[1] == ["aten._local_scalar_dense.default"]
