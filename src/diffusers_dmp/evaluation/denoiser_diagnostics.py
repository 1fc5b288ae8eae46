"""The diagnosis of any denoiser's experts, given a batch of its inputs.

    >>> diagnosis = diagnose_denoiser(pipe.transformer, latents, {"encoder_hidden_states": prompt_embeds}, pipe.scheduler)
    >>> diagnosis.swap_losses  # row i, column j: the loss in the interval of expert i if expert j denoises there

Legend: N samples, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..diffusion.noise import is_flow_matching, levels_at, noisy_sample
from ..diffusion.predictions import expected_prediction_type
from ..intervals import NoiseIntervals
from ..models.denoiser_experts import DenoiserExperts
from ..models.mixed_batches import take_samples
from ..models.time_argument import argument_names_of, time_argument_of
from ..pipelines.expert_steps import steps_per_expert
from ..plugins.lora_experts import lora_attachment_of
from .diagnostics import BATCH_SIZE, SEED, Diagnosis, diagnosis_of, prediction_error, timesteps_between

Predict = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DiagnosisOptions:
    """
    How a denoiser is diagnosed.

    Args:
        intervals ([`NoiseIntervals`], *optional*): Which expert owns which timesteps; needed for a list of denoisers.
        prediction_type (`str`, *optional*): What the denoiser predicts; by default what the scheduler expects.
        predict (`Callable`, *optional*): Calls a denoiser with x_t, its time and the inputs, and returns the prediction, for
            denoisers that take or return something else than a tensor, or the prediction's negative:
            `lambda denoiser, x_t, time, **inputs: -torch.stack(denoiser(list(x_t), time, **inputs).sample)` for Z-Image.
        num_bands (`int`): The number of bands of timesteps.
        batch_size (`int`): The number of samples in one call.
    """

    intervals: NoiseIntervals | None = None
    prediction_type: str | None = None
    predict: Predict | None = None
    num_bands: int = 8
    batch_size: int = BATCH_SIZE


@torch.no_grad()
def diagnose_denoiser(
    denoiser: nn.Module | Sequence[nn.Module],
    latents: torch.Tensor,
    inputs: Mapping[str, Any],
    scheduler: SchedulerMixin,
    num_inference_steps: int = 50,
    options: DiagnosisOptions = DiagnosisOptions(),
    **schedule: Any,
) -> Diagnosis:
    """
    Measure the loss of every expert of any denoiser at all noise levels.

    Args:
        denoiser (`nn.Module` or a list of them): A [`DenoiserExperts`], a denoiser with [`LoraExperts`] attached, or one denoiser
            for each interval; in eval mode, on the device of the latents. Without experts, the denoiser counts as one.
        latents (`torch.Tensor` of shape (N, …)): Clean samples x0 as `forward` takes noisy ones: scaled, and packed for Flux.
        inputs (`Mapping`): The other arguments of `forward` for these N samples, without the time: prompts and so on.
        scheduler ([`SchedulerMixin`]): The pipeline's, of flow matching or with `alphas_cumprod`.
        num_inference_steps (`int`): The length of the sampling whose steps are counted.
        options ([`DiagnosisOptions`]): What the denoiser predicts, and so on.
        schedule: Further arguments of the scheduler's `set_timesteps`, such as `mu`, as in [`experts_per_step`].

    Returns:
        [`Diagnosis`]: The losses are mean squared errors of the predicted noise, or of the velocity for flow matching.

    Raises:
        ValueError: if the experts' intervals are not known, or the inputs have the time.
    """
    return diagnose_batches(denoiser, [(latents, inputs)], scheduler, num_inference_steps, options, **schedule)


@torch.no_grad()
def diagnose_batches(
    denoiser: nn.Module | Sequence[nn.Module],
    batches: Sequence[tuple[torch.Tensor, Mapping[str, Any]]],
    scheduler: SchedulerMixin,
    num_inference_steps: int = 50,
    options: DiagnosisOptions = DiagnosisOptions(),
    **schedule: Any,
) -> Diagnosis:
    """
    Measure the loss of every expert of any denoiser at all noise levels, on samples of several shapes.

    Args:
        denoiser (`nn.Module` or a list of them): As in [`diagnose_denoiser`].
        batches (of a `torch.Tensor` of shape (n, …) and a `Mapping`): For each shape, the latents and inputs of its samples.
        scheduler, num_inference_steps, options, schedule: As in [`diagnose_denoiser`].

    Returns:
        [`Diagnosis`]: Of all samples together.

    Raises:
        ValueError: as [`diagnose_denoiser`].
    """
    intervals, experts = _experts(denoiser, options.intervals)
    samples = _Samples(batches, scheduler, options)
    for expert in experts:
        samples.check(expert.denoiser)
    steps = steps_per_expert(intervals, scheduler, num_inference_steps, **schedule)
    return diagnosis_of([partial(samples.loss, expert) for expert in experts], intervals, steps, options.num_bands)


@torch.no_grad()
def losses_between(
    denoiser: nn.Module,
    batches: Sequence[tuple[torch.Tensor, Mapping[str, Any]]],
    scheduler: SchedulerMixin,
    edges: Sequence[float],
    options: DiagnosisOptions = DiagnosisOptions(),
) -> list[float]:
    """
    Measure the loss of one denoiser, with the noise and the timesteps that [`diagnose_batches`] measures its experts with.

    Args:
        denoiser (`nn.Module`): Without experts.
        batches, scheduler, options: As in [`diagnose_batches`].
        edges (of `float`): Timesteps in ascending order.

    Returns:
        `list[float]`: The loss between each two of them.
    """
    samples, expert = _Samples(batches, scheduler, options), _Expert(denoiser)
    samples.check(denoiser)
    return [samples.loss(expert, low, high) for low, high in zip(edges, edges[1:])]


class _Expert:
    """One of the experts, which is called at whatever time."""

    def __init__(self, denoiser: Any, attachment: Any = None, index: int = 0):
        self.denoiser = denoiser
        self._attachment, self._index = attachment, index

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Let this expert denoise at every noise level."""
        if self._attachment is None:
            yield
            return
        finder = self._attachment.finder
        self._attachment.finder = lambda *_: [self._index]
        try:
            yield
        finally:
            self._attachment.finder = finder


def _experts(denoiser: Any, intervals: NoiseIntervals | None) -> tuple[NoiseIntervals, list[_Expert]]:
    if not isinstance(denoiser, nn.Module) or isinstance(denoiser, nn.ModuleList):
        denoisers = list(denoiser)
        if intervals is None or intervals.num_experts != len(denoisers):
            raise ValueError(
                f"Expected `intervals` with one interval for each of {len(denoisers)} denoisers, but got {intervals}."
            )
        return intervals, [_Expert(each) for each in denoisers]
    denoiser = unwrap_module(denoiser)
    attachment = lora_attachment_of(denoiser)
    if intervals is not None:
        raise ValueError("Expected `intervals` for a list of denoisers only, but got some for one denoiser.")
    if isinstance(denoiser, DenoiserExperts):
        return denoiser.intervals, [_Expert(each) for each in denoiser.experts]
    if attachment is not None:
        intervals = attachment.experts.intervals
        return intervals, [_Expert(denoiser, attachment, index) for index in range(intervals.num_experts)]
    return NoiseIntervals.uniform(1), [_Expert(denoiser)]


class _Samples:
    """Clean samples of one or several shapes with their noise and the denoiser's other inputs."""

    def __init__(
        self,
        batches: Sequence[tuple[torch.Tensor, Mapping[str, Any]]],
        scheduler: SchedulerMixin,
        options: DiagnosisOptions,
    ):
        generator = torch.Generator().manual_seed(SEED)
        self.groups = [
            _Group(latents.float(), torch.randn(latents.shape, generator=generator).to(latents.device), dict(inputs))
            for latents, inputs in batches
        ]
        self.counts = [len(group.x0) for group in self.groups]
        self.scheduler = scheduler
        self.batch_size = options.batch_size
        self.prediction_type = options.prediction_type or expected_prediction_type(scheduler)
        self.predict = options.predict or _predict
        self.has_own_names = options.predict is not None

    def check(self, denoiser: Any) -> None:
        """Check that the inputs are those of a denoiser."""
        names = argument_names_of(type(denoiser))
        own = {names[0], time_argument_of(denoiser).name}
        given = () if self.has_own_names else self.groups[0].inputs
        unknown = [name for name in given if name in own or name not in names]
        if unknown:
            raise ValueError(
                f"Expected `inputs` to hold the other arguments of {type(denoiser).__name__}'s `forward`, "
                f"{', '.join(name for name in names if name not in own)}, but got {', '.join(unknown)}."
            )

    def loss(self, expert: _Expert, low: float, high: float) -> float:
        """The mean loss of an expert at timesteps that cover [low, high) evenly, in each shape and in all together."""
        timesteps = timesteps_between(low, high, sum(self.counts), is_flow_matching(self.scheduler))
        places = torch.cat([(torch.arange(count) + 0.5) / count for count in self.counts])
        ranks = places.argsort(stable=True).argsort()
        with expert.everywhere():
            sums = [
                self._sum_of_losses(expert.denoiser, group, own)
                for group, own in zip(self.groups, timesteps[ranks].split(self.counts))
            ]
        return sum(sums) / sum(self.counts)

    def _sum_of_losses(self, denoiser: Any, group: "_Group", timesteps: torch.Tensor) -> float:
        x0, noise, count = group.x0, group.noise, len(group.x0)
        timesteps = timesteps.to(x0.device)
        shape = (-1, *[1] * (x0.ndim - 1))
        alpha, sigma = (level.view(shape) for level in levels_at(self.scheduler, timesteps))
        x_t = noisy_sample(x0, noise, alpha, sigma)
        times = time_argument_of(denoiser).told(timesteps, self.scheduler.config["num_train_timesteps"])
        dtype = getattr(denoiser, "dtype", x0.dtype)
        total = 0.0
        for rows in torch.arange(count).split(self.batch_size):
            inputs = take_samples(group.inputs, rows.tolist(), count)
            output = self.predict(denoiser, x_t[rows].to(dtype), times[rows], **inputs).float()
            output = output[:, : x0.shape[1]]  # a learned variance follows in further channels
            levels = alpha[rows], sigma[rows]
            errors = prediction_error(output, x_t[rows], x0[rows], noise[rows], levels, self.prediction_type)
            total += float(errors.sum())
        return total


@dataclass(frozen=True)
class _Group:
    """
    Samples of one shape.

    Args:
        x0, noise (`torch.Tensor` of shape (n, …)): Clean samples and ε.
        inputs (`dict`): The denoiser's other inputs for them.
    """

    x0: torch.Tensor
    noise: torch.Tensor
    inputs: dict[str, Any]


def _predict(denoiser: nn.Module, x_t: torch.Tensor, time: torch.Tensor, **inputs: Any) -> torch.Tensor:
    names = argument_names_of(type(denoiser))
    arguments = {names[0]: x_t, time_argument_of(denoiser).name: time}
    return denoiser(**arguments, **inputs, return_dict=False)[0]
