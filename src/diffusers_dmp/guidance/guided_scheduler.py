"""Guidance by a vision model, for any pipeline: in the scheduler, which sees x_t, t and the prediction.
https://arxiv.org/abs/2212.05973, after https://arxiv.org/abs/2105.05233, algorithms 1 and 2

Legend: B batch, C channels, H and W height and width, in pixels or latent pixels, T diffusion timesteps.
"""

import copy
import functools
import inspect
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMParallelScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.latents import decode_latents
from ..diffusion.predictions import (
    PREDICTION_TYPES,
    check_noise_levels,
    convert_prediction,
    expected_prediction_type,
    noise_levels,
    posterior_weights,
    to_x0,
)
from .experts import GuidanceExperts
from .targets import GuidanceTarget

NONFINITE = ("raise", "unguided")
MIN_ALPHA = (
    1e-3  # below, there is no image in x_t to be guided: at ᾱ = 0, or the 2⁻²⁴ that some schedulers take for it
)


class GuidedScheduler:
    """
    A scheduler whose steps go where a vision model sees what is asked for.

    ```py
    pipe.scheduler = GuidedScheduler(pipe.scheduler, experts, ClassTarget("zebra"), scale=7.5)
    ```

    It stands for the scheduler that it wraps in everything else: configuration, timesteps, attributes, `isinstance`, and what
    is saved, which is the scheduler without guidance. `GuidedScheduler(…).scheduler` is that scheduler. Schedulers of the DDPM
    kind are guided in the mean of their step, μ + σ²·s·∇log p, the others in the noise, ε - √(1-ᾱ)·s·∇log p, which is that of
    the clipped x̂0 where the scheduler clips, as published. Around another guided scheduler it asks for both things at once.

    Args:
        scheduler ([`SchedulerMixin`]): Any of Diffusers' that has `alphas_cumprod`.
        experts ([`GuidanceExperts`]): Moved to the samples' device, in eval mode. Gradients are in float32.
        target ([`GuidanceTarget`]): What to ask for.
        scale (`float`): s.
        rescale_to_mean (`bool`): Take ∇log p as long as the mean, for each image: the paper's text-to-image case (DDPM kind
            only).
        timestep_range (`tuple[float, float]`, *optional*): Guide only where low <= t < high.
        every (`int`): Guide every so manieth step, from the first on.
        vae ([`AutoencoderKL`], *optional*): For latents: x̂0 is decoded, in float32, and the experts look at that.
        on_nonfinite (`str`): What to do where guidance is infinite or not a number, in the samples' own dtype: 'unguided'
            leaves that image's step without it; 'raise' does too, so that nothing is ever read back from an accelerator, and
            raises a `FloatingPointError` at the last of the timesteps (not where a pipeline is stopped before).

    Raises:
        ValueError: if the scheduler has no ᾱ or other training timesteps than the experts, an argument is out of range, or the
            target does not fit the experts' network.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        experts: GuidanceExperts,
        target: GuidanceTarget,
        scale: float = 7.5,
        *,
        rescale_to_mean: bool = False,
        timestep_range: "tuple[float, float] | None" = None,
        every: int = 1,
        vae: AutoencoderKL | None = None,
        on_nonfinite: str = "raise",
    ):
        experts.intervals.check_scheduler(scheduler)
        check_noise_levels(scheduler)
        kind = expected_prediction_type(scheduler)
        if kind not in PREDICTION_TYPES:
            raise ValueError(
                f"Expected the scheduler's `prediction_type` to be one of {', '.join(PREDICTION_TYPES)}, but got {kind!r}."
            )
        self.guides_mean = isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler))
        if rescale_to_mean and not self.guides_mean:
            raise ValueError(
                f"Expected a DDPMScheduler for `rescale_to_mean`, but got a {type(scheduler).__name__}, which has no mean."
            )
        if every < 1:
            raise ValueError(f"Expected `every` to be at least 1, but got {every}.")
        if on_nonfinite not in NONFINITE:
            raise ValueError(f"Expected `on_nonfinite` to be one of {', '.join(NONFINITE)}, but got {on_nonfinite!r}.")
        self.scheduler = scheduler
        self.__module__ = scheduler.__class__.__module__
        self.experts = experts.float().eval()
        self.target = target
        self.scale = scale
        self.rescale_to_mean = rescale_to_mean
        self.timestep_range = timestep_range
        self.every = every
        self.vae = vae
        if vae is not None and vae.dtype != torch.float32:
            self.vae = copy.deepcopy(vae).float()
        self.on_nonfinite = on_nonfinite
        self._nonfinite, self._noise_levels = [], None

    @property
    def __class__(self) -> type:
        """For `isinstance`, and with `__module__` for what a pipeline's `save_pretrained` writes."""
        return self.scheduler.__class__

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __len__(self) -> int:
        return len(self.scheduler)

    @property
    def target(self) -> GuidanceTarget:
        """What is asked for: a copy, as it looks its names up in this scheduler's network."""
        return self._target

    @target.setter
    def target(self, target: GuidanceTarget) -> None:
        self._target = copy.deepcopy(target)
        self._target.prepare(self.experts.network_config)

    def around(self, scheduler: SchedulerMixin) -> "GuidedScheduler":
        """The same guidance around another scheduler."""
        return GuidedScheduler(
            scheduler,
            self.experts,
            self.target,
            self.scale,
            rescale_to_mean=self.rescale_to_mean,
            timestep_range=self.timestep_range,
            every=self.every,
            vae=self.vae,
            on_nonfinite=self.on_nonfinite,
        )

    @property
    def set_timesteps(self):
        """The scheduler's own, but that the timesteps stay on the CPU, so that no step has to wait to know them."""
        signature = inspect.signature(self.scheduler.set_timesteps)

        @functools.wraps(self.scheduler.set_timesteps)
        def set_timesteps(*args, **kwargs) -> None:
            arguments = signature.bind(*args, **kwargs)
            arguments.arguments["device"] = "cpu"
            self.scheduler.set_timesteps(*arguments.args, **arguments.kwargs)
            self._nonfinite, self._noise_levels = [], None

        return set_timesteps

    @property
    def step(self):
        """The scheduler's own, guided; with its signature, which pipelines look at."""

        @functools.wraps(self.scheduler.step)
        def step(model_output: torch.Tensor, timestep, sample: torch.Tensor, *args, **kwargs):
            position = self._position(timestep)
            if not self._guides(position):
                result = self.scheduler.step(model_output, timestep, sample, *args, **kwargs)
            elif self.guides_mean:
                result = self._step_with_guided_mean(position, model_output, sample, *args, **kwargs)
            else:
                guided = self._guided_prediction(position, model_output, sample)
                with self._unclipped():
                    result = self.scheduler.step(guided, timestep, sample, *args, **kwargs)
            if position == len(self.timesteps) - 1:
                self._raise_nonfinite()
            return result

        return step

    def _position(self, timestep) -> int:
        """Of the step under way; a timestep on an accelerator, which none of ours is, is waited for."""
        if getattr(self.scheduler, "step_index", None) is not None:
            return self.scheduler.step_index  # a second-order scheduler has a timestep twice
        matches = (self.timesteps == torch.as_tensor(timestep).cpu()).nonzero()
        if len(matches) == 0:
            raise ValueError(f"Expected `timestep` to be one of {self.timesteps.tolist()}, but got {timestep}.")
        return int(matches[0])

    def _guides(self, position: int) -> bool:
        low, high = self.timestep_range or (0, float("inf"))
        # both evaluations of a second-order scheduler's step are guided, or neither
        step = position // self.order
        first_step = (getattr(self.scheduler, "begin_index", None) or 0) // self.order
        chosen = low <= self.timesteps[step * self.order] < high and (step - first_step) % self.every == 0
        return chosen and self._level(position)[0] > MIN_ALPHA

    def _level(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of a step's x_t, on the CPU."""
        if self._noise_levels is None:
            self._noise_levels = noise_levels(self.scheduler)
        alphas, sigmas = self._noise_levels
        return alphas[position], sigmas[position]

    def _guided_prediction(self, position: int, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The prediction (B, C or 2C, H, W), of whatever type, for the guided noise."""
        channels = sample.shape[1]
        prediction, rest = model_output[:, :channels].float(), model_output[:, channels:]
        kind = self.config.prediction_type
        alpha, sigma = self._level(position)
        x_t = self.scheduler.scale_model_input(sample, self.timesteps[position]).float()
        gradient = self._gradient(position, prediction, x_t)
        if self.config.get("thresholding") or self.config.get("clip_sample"):
            # before it is guided, as published: the noise that is guided is that of the clipped x̂0
            x0 = self._clipped(to_x0(prediction, x_t, alpha, sigma, kind))
            prediction = convert_prediction(x0, x_t, alpha, sigma, "sample", kind)
        # ε - σ·s·∇log p, and what that makes of x0 = (x_t - σ·ε)/α and v = (ε - σ·x_t)/α
        factor = {"epsilon": 1, "sample": -sigma / alpha, "v_prediction": 1 / alpha}[kind]
        guided = prediction - factor * sigma * self.scale * gradient
        dtype = model_output.dtype
        return torch.cat([self._finite(position, guided.to(dtype), prediction.to(dtype)), rest], dim=1)

    def _finite(self, position: int, guided: torch.Tensor, unguided: torch.Tensor) -> torch.Tensor:
        """Each image's guided tensor, or where that is not finite the unguided one."""
        finite = guided.flatten(1).isfinite().all(1)
        if self.on_nonfinite == "raise":
            self._nonfinite.append((self.timesteps[position], (~finite).any()))
        return torch.where(finite.view(-1, 1, 1, 1), guided, unguided)

    def _clipped(self, x0: torch.Tensor) -> torch.Tensor:
        """As the scheduler itself would."""
        if self.config.get("thresholding"):
            return self.scheduler._threshold_sample(x0)
        return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

    @contextmanager
    def _unclipped(self):
        """The scheduler without clipping, once."""
        switches = {name: self.config[name] for name in ("thresholding", "clip_sample") if name in self.config}
        self.scheduler.register_to_config(**dict.fromkeys(switches, False))
        try:
            yield
        finally:
            self.scheduler.register_to_config(**switches)

    def _step_with_guided_mean(self, position: int, model_output: torch.Tensor, sample: torch.Tensor, *args, **kwargs):
        """The step of the scheduler, whose noise does not depend on its mean, and σ²·s·∇log p on top."""
        channels, t = sample.shape[1], int(self.timesteps[position])
        call = inspect.signature(self.scheduler.step).bind(model_output, t, sample, *args, **kwargs)
        return_dict = call.arguments.get("return_dict", True)
        call.arguments["return_dict"] = True
        output = self.scheduler.step(*call.args, **call.kwargs)
        gradient = self._gradient(position, model_output[:, :channels].float(), sample.float())
        if self.rescale_to_mean:
            # Deviation from reference: as long as each image's own mean, where it takes the first's for the whole batch
            mean = self._mean(output.pred_original_sample.float(), sample.float(), t)
            length, mean_length = (tensor.flatten(1).norm(dim=1) for tensor in (gradient, mean))
            gradient = gradient * torch.where(length > 0, mean_length / length, 0).view(-1, 1, 1, 1)
        guided = output.prev_sample.float() + self._variance(model_output[:, channels:], t) * self.scale * gradient
        output.prev_sample = self._finite(position, guided.to(output.prev_sample.dtype), output.prev_sample)
        return output if return_dict else output.to_tuple()

    def _mean(self, x0: torch.Tensor, x_t: torch.Tensor, t: int) -> torch.Tensor:
        previous = int(self.scheduler.previous_timestep(t))
        alphas_cumprod = self.scheduler.alphas_cumprod
        alpha_prev = alphas_cumprod[previous] if previous >= 0 else torch.ones(())
        x0_weight, xt_weight = posterior_weights(alphas_cumprod[t], alpha_prev)
        return x0_weight * x0 + xt_weight * x_t

    def _variance(self, variance_output: torch.Tensor, t: int) -> torch.Tensor:
        """σ² of the step, learned or not."""
        variance_type = self.scheduler.variance_type
        variance = self.scheduler._get_variance(t, predicted_variance=variance_output.float())
        if variance_type == "learned_range":
            return variance.exp()
        return variance**2 if variance_type == "fixed_small_log" else variance  # which is σ there

    def _gradient(self, position: int, prediction: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """∇ log p(y | x_t) by x_t (B, C, H, W), in float32."""
        device = x_t.device
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            if self.experts.device != device:
                self.experts.to(device)
            x_t = x_t.detach().clone().requires_grad_()
            images = x_t
            if self.vae is not None:
                alpha, sigma = self._level(position)
                x0 = to_x0(prediction.detach().clone(), x_t, alpha, sigma, self.config.prediction_type)
                images = decode_latents(self.vae, x0)
            log_likelihood = self.target.log_likelihood(self.experts(images, self.timesteps[position]))
            (gradient,) = torch.autograd.grad(log_likelihood.sum(), x_t)
        return gradient

    def _raise_nonfinite(self) -> None:
        found, self._nonfinite = self._nonfinite, []
        if not found:
            return
        flags = torch.stack([flag for _, flag in found]).tolist()  # read once, after all steps
        for (timestep, _), flag in zip(found, flags):
            if flag:
                expert = self.experts.intervals.index(timestep).item()
                raise FloatingPointError(
                    f"Expected guidance of scale {self.scale} to have finite gradients, but got others at timestep "
                    f"{timestep.item():g}, from expert {expert}. `on_nonfinite='unguided'` leaves such steps unguided."
                )
