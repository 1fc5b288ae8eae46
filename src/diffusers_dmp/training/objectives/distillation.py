"""Objectives of experts on noisy images, which learn from a network for clean images, or from labels.
https://arxiv.org/abs/2212.05973 (PPAP), section 4.3

Without labels, the network itself is the teacher: the expert learns to see in the noisy image what the network sees in the
clean one.

Legend: B batch, K classes, D numbers of an embedding, C channels, H and W height and width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...guidance import GuidanceExperts
from ..denoiser import Denoiser
from .noising import Noising
from .objective import NoisedBatch, Objective, ObjectiveOutput

TEACHER_TEMPERATURE = 0.25


def prediction(output: ModelOutput) -> torch.Tensor:
    """What a vision model predicts: depth (B, h, w), logits (B, K) or (B, K, h, w), or embeddings of images (B, D)."""
    return output[_prediction_name(output)]


def _prediction_name(output: ModelOutput) -> str:
    """What the output of a vision model calls its prediction."""
    names = ("predicted_depth", "logits", "image_embeds", "pooler_output")
    found = next((name for name in names if name in output), None)
    if found is None:
        raise ValueError(f"Expected a network whose output has one of {', '.join(names)}, but got {list(output)}.")
    return found


class DistillationObjective(Objective):
    """
    The distance between what a student makes of x_t and what its teacher makes of x0:

        KL(softmax(teacher/0.25) ‖ softmax(student)), averaged over the classes,
        (teacher - student)², averaged over the pixels, for depth, or
        ‖teacher/‖teacher‖ - student/‖student‖‖² = 2 - 2·cos(teacher, student), for embeddings, which are compared by angle.

    Args:
        noising ([`Noising`] or [`SchedulerMixin`]): Adds the noise.
        teacher ([`GuidanceExperts`]): Untrained experts, which are still equal to the network itself.
        uses_teacher_images (`bool`): Whether the teacher sees the batch's `teacher_images`, the same images in a higher
            resolution, instead of x0.
    """

    def __init__(self, noising: Noising | SchedulerMixin, teacher: GuidanceExperts, uses_teacher_images: bool = False):
        super().__init__(noising)
        self.teacher = teacher.requires_grad_(False).eval()
        self.uses_teacher_images = uses_teacher_images

    def forward(self, model_output: torch.Tensor, batch: NoisedBatch) -> ObjectiveOutput:
        """
        The loss of a batch.

        Args:
            model_output (`torch.Tensor`): The student's prediction; see [`prediction`].
            batch ([`NoisedBatch`]): Its x0 are the clean images (B, C, H, W).
        """
        images = batch.columns["teacher_images"] if self.uses_teacher_images else batch.x0
        with torch.no_grad():
            output = self.teacher.run_expert(0, images)
        losses = distillation_losses(model_output.float(), prediction(output).float(), _prediction_name(output))
        return ObjectiveOutput(loss=losses.mean(), sample_losses=losses)


def distillation_losses(student: torch.Tensor, teacher: torch.Tensor, name: str) -> torch.Tensor:
    """The distance (B,) between each pair of predictions, by their name in outputs; see [`DistillationObjective`]."""
    if name == "predicted_depth":
        return ((student - teacher) ** 2).flatten(1).mean(1)
    if name != "logits":
        return 2 - 2 * F.cosine_similarity(student, teacher, dim=1)
    targets = F.softmax(teacher / TEACHER_TEMPERATURE, dim=1)
    divergence = F.kl_div(F.log_softmax(student, dim=1), targets, reduction="none")
    return divergence.flatten(1).mean(1)


class LabelObjective(Objective):
    """The cross-entropy between what a student makes of x_t and the image's label: the paper's baselines."""

    def forward(self, model_output: torch.Tensor, batch: NoisedBatch) -> ObjectiveOutput:
        """
        The loss of a batch.

        Args:
            model_output (`torch.Tensor` of shape (B, K)): The student's logits.
            batch ([`NoisedBatch`]): With the column `class_labels` (B,).
        """
        losses = F.cross_entropy(model_output.float(), batch.columns["class_labels"], reduction="none")
        return ObjectiveOutput(loss=losses.mean(), sample_losses=losses)


@dataclass
class StudentOutput(BaseOutput):
    """
    The output of an [`ExpertStudent`].

    Args:
        sample (`torch.Tensor`): See [`prediction`]; the training loop calls the output of any model so.
    """

    sample: torch.Tensor


class ExpertStudent(nn.Module):
    """
    One expert of several, as a module to train. Its own tensors are this module's only ones, so that checkpoints hold no more.

    Args:
        experts ([`GuidanceExperts`]): On the device of the training.
        expert (`int`): The index of the expert.
    """

    def __init__(self, experts: GuidanceExperts, expert: int):
        super().__init__()
        self._experts = (experts,)  # in a tuple, so that it is no submodule
        self.expert = expert
        experts.requires_grad_of_expert(expert)
        for name, tensor in experts.expert_tensors(expert).items():
            own_name = name.replace(".", "/")  # a parameter's name may have no dots
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(own_name, tensor)
            else:
                self.register_buffer(own_name, tensor)

    def forward(self, images: torch.Tensor) -> StudentOutput:
        """What the expert predicts of noisy images (B, C, H, W) in the range of x_t."""
        return StudentOutput(sample=prediction(self._experts[0].run_expert(self.expert, images, merged=False)))

    def train(self, mode: bool = True) -> "ExpertStudent":
        """Set the mode of the network's own layers as well: batch statistics and dropout depend on it."""
        self._experts[0].train(mode)
        return super().train(mode)

    def enable_gradient_checkpointing(self) -> None:
        """
        Enable gradient checkpointing in the network.

        Raises:
            ValueError: if the network is none of transformers.
        """
        network = self._experts[0].experts.activate(self.expert, merged=False)
        if not isinstance(network, PreTrainedModel):
            raise ValueError(
                "Expected gradient checkpointing to be for a network of transformers, but got a "
                f"{type(network).__name__}."
            )
        network.gradient_checkpointing_enable()


class StudentCall(Denoiser):
    """How the training loop calls an [`ExpertStudent`]: with the noisy images alone."""

    def __call__(self, model: nn.Module, x_t: torch.Tensor, *_: Any) -> StudentOutput:
        """What the expert predicts of `x_t` (B, C, H, W)."""
        return model(x_t)
