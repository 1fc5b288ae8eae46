"""Experts on noisy images from a network for clean ones, without labels: the network teaches what it sees in the clean image.
https://arxiv.org/abs/2212.05973, section 4.3

Legend: B batch, K classes, C channels, H and W height and width, T diffusion timesteps.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import nn
from transformers.utils import ModelOutput

from ...guidance import GuidanceExperts
from ...intervals import NoiseIntervals
from .ddpm import DiffusionObjectiveOutput

TEACHER_TEMPERATURE = 0.25


def prediction(output: ModelOutput) -> torch.Tensor:
    """What the network is there for: logits (B, K) or (B, K, h, w), or depth (B, h, w)."""
    return output.predicted_depth if "predicted_depth" in output else output.logits


class DistillationObjective(nn.Module):
    """
    How far a student's view of x_t is from its teacher's of x0 (or of `teacher_images`, those in a higher resolution):

        KL(softmax(teacher/0.25) ‖ softmax(student)), averaged over the classes, or
        (teacher - student)², averaged over the pixels, for depth.

    Args:
        teacher ([`GuidanceExperts`]): Untrained experts, which are the network itself.
        num_train_timesteps (`int`): T.
        looks_at_teacher_images (`bool`): Whether the batch has such.
    """

    uncertainty = None

    def __init__(self, teacher: GuidanceExperts, num_train_timesteps: int, looks_at_teacher_images: bool = False):
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()
        self.train_intervals = NoiseIntervals.uniform(1, num_train_timesteps)
        self.columns = ("teacher_images",) if looks_at_teacher_images else ()

    def forward(
        self,
        student: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.LongTensor,
        teacher_images: torch.Tensor | None = None,
    ) -> DiffusionObjectiveOutput:
        """
        Args:
            student (`torch.Tensor`): See [`prediction`].
            x0 (`torch.Tensor` of shape (B, C, H, W)): The clean images.
            noise (`torch.Tensor`), timesteps (`torch.LongTensor`): Not used: the student has seen them.
            teacher_images (`torch.Tensor`, *optional*): What the teacher is shown instead of x0.
        """
        with torch.no_grad():
            output = self.teacher.run_expert(0, x0 if teacher_images is None else teacher_images)
        losses = distillation_losses(student.float(), prediction(output).float(), "predicted_depth" in output)
        return DiffusionObjectiveOutput(loss=losses.mean(), sample_losses=losses, mse=losses)


def distillation_losses(student: torch.Tensor, teacher: torch.Tensor, is_depth: bool) -> torch.Tensor:
    """Each sample's (B,); see [`DistillationObjective`]."""
    if is_depth:
        return ((student - teacher) ** 2).flatten(1).mean(1)
    targets = F.softmax(teacher / TEACHER_TEMPERATURE, dim=1)
    divergence = F.kl_div(F.log_softmax(student, dim=1), targets, reduction="none")
    return divergence.flatten(1).mean(1)


class LabelObjective(nn.Module):
    """The cross-entropy of a student's view of x_t and the image's label: the paper's baselines."""

    uncertainty = None
    columns = ("class_labels",)

    def __init__(self, num_train_timesteps: int):
        super().__init__()
        self.train_intervals = NoiseIntervals.uniform(1, num_train_timesteps)

    def forward(
        self,
        student: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.LongTensor,
        class_labels: torch.LongTensor,
    ) -> DiffusionObjectiveOutput:
        """As [`DistillationObjective.forward`], with `class_labels` (B,)."""
        losses = F.cross_entropy(student.float(), class_labels, reduction="none")
        return DiffusionObjectiveOutput(loss=losses.mean(), sample_losses=losses, mse=losses)


@dataclass
class StudentOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): See [`prediction`]; what the training loop calls the output of any model.
    """

    sample: torch.Tensor


class ExpertStudent(nn.Module):
    """
    One expert as the training loop takes it: its own tensors alone are this module's, so that checkpoints hold no more.

    Args:
        experts ([`GuidanceExperts`]): On the device where it is to be trained.
        expert (`int`): Which.
        in_channels (`int`), sample_size (`int`): Of the images.
    """

    def __init__(self, experts: GuidanceExperts, expert: int, in_channels: int, sample_size: int):
        super().__init__()
        self._experts = (experts,)  # in a tuple it is no submodule
        self.expert = expert
        self.config = SimpleNamespace(in_channels=in_channels, sample_size=sample_size, class_dropout_prob=0.0)
        experts.requires_grad_of_expert(expert)
        for name, tensor in experts.expert_tensors(expert).items():
            own_name = name.replace(".", "/")  # a parameter's name has no dots
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(own_name, tensor)
            else:
                self.register_buffer(own_name, tensor)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.LongTensor | None = None,
        force_drop_ids: torch.BoolTensor | None = None,
    ) -> StudentOutput:
        """
        Args:
            sample (`torch.Tensor` of shape (B, C, H, W)): x_t.
            timestep (`torch.Tensor`), class_labels, force_drop_ids: Not used: the expert is told nothing but the image.
        """
        return StudentOutput(sample=prediction(self._experts[0].run_expert(self.expert, sample, merged=False)))

    def train(self, mode: bool = True) -> "ExpertStudent":
        """The network's own layers, too: batch statistics and dropout."""
        self._experts[0].train(mode)
        return super().train(mode)

    def enable_gradient_checkpointing(self) -> None:
        """Of the network."""
        self._experts[0].experts.activate(self.expert, merged=False).gradient_checkpointing_enable()
