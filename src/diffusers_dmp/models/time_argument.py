"""How a denoiser is told the time: which argument holds it, in which unit, and which training timestep t it means.

Every class of Diffusers denoisers is told the noise level in its own way: as t from 1000 to 0, as a fraction from 1 to 0, from 0
to 1, or once for each token. A `TimeArgument` turns what a class is told into t in [0, T], and `NoiseIntervals` alone turns t into
an expert.

Legend: B batch, N tokens, T training timesteps, K known timesteps.
"""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..intervals import NoiseIntervals
from ..saving.naming import full_name

_SINGLE_PRECISION = 4 * torch.finfo(torch.float32).eps  # pipelines order the same operations differently


@dataclass(frozen=True, kw_only=True)
class TimeArgument:
    """
    How one class of denoisers is told the time.

    Args:
        name (`str`): The argument of `forward`.
        at_pure_noise (`float`, *optional*): Its value at t = T, such as 1 where it is t/T; by default T itself, which means
            that it is t. Where the argument is `flipped`, its value at t = 0.
        flipped (`bool`): Whether it counts from the noise to the image: 0 at t = T.
        per_token (`bool`): Whether it may be of shape (B, N), one value for each token. The sample's t is that of its noisiest
            token, as the others belong to a given image.
        setting (`str`, *optional*): An entry of the model's configuration that the argument was multiplied by.

    Example:
        >>> TimeArgument(at_pure_noise=1.0).timesteps(torch.tensor([0.25]), 1000)
        tensor([250.], dtype=torch.float64)
    """

    name: str = "timestep"
    at_pure_noise: float | None = None
    flipped: bool = False
    per_token: bool = False
    setting: str | None = None

    def told(self, timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
        """
        Compute what a model is told at some timesteps, the inverse of [`~TimeArgument.timesteps`].

        Args:
            timesteps (`torch.Tensor` of any shape): t in [0, T].
            num_train_timesteps (`int`): T.

        Returns:
            `torch.Tensor` of the same shape and, if it is a floating one, dtype.
        """
        if self.at_pure_noise is None:
            return num_train_timesteps - timesteps if self.flipped else timesteps
        remaining = num_train_timesteps - timesteps if self.flipped else timesteps
        return remaining / num_train_timesteps * self.at_pure_noise

    def timesteps(
        self, value: torch.Tensor | float, num_train_timesteps: int, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Turn what a model is told into training timesteps.

        Some pipelines round the time to the latents' dtype first: in bfloat16 the timesteps 898 to 902 are one number. Where
        timesteps are `known`, the one that is rounded to the value is returned (of several, the noisiest).

        Args:
            value (`torch.Tensor` of shape (), (1,), (B,) or (B, N), or a number): What the model is told.
            num_train_timesteps (`int`): T.
            known (`torch.Tensor` of shape (K,), *optional*): Exact timesteps, such as those of a scheduler.

        Returns:
            `torch.Tensor` of shape (1,) or (B,), float64 where the device has it, on the device of `value`.

        Raises:
            ValueError: if there is a value for each token, but the class is not told the time in this way.
        """
        value = torch.as_tensor(value)
        if value.ndim > 1 and not self.per_token and value.shape[1:].numel() > 1:
            raise ValueError(
                f"Expected `{self.name}` to hold one value for each sample, but got the shape {tuple(value.shape)}."
            )
        timesteps = self.token_timesteps(value, num_train_timesteps, known)
        return timesteps.flatten(1).amax(1) if timesteps.ndim > 1 else timesteps

    def token_timesteps(
        self, value: torch.Tensor, num_train_timesteps: int, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As [`~TimeArgument.timesteps`], but of each token where there is a value for each: (B, N)."""
        exact_dtype = torch.float32 if value.device.type == "mps" else torch.float64
        told = value.reshape(1) if value.ndim == 0 else value
        timesteps = told.to(exact_dtype)
        if self.at_pure_noise is not None:
            timesteps = timesteps / self.at_pure_noise * num_train_timesteps
        if self.flipped:
            timesteps = num_train_timesteps - timesteps
        if known is not None and len(known) and told.is_floating_point():
            timesteps = self._snapped(timesteps, told, num_train_timesteps, known.to(timesteps))
        return timesteps

    def _snapped(
        self, timesteps: torch.Tensor, told: torch.Tensor, num_train_timesteps: int, known: torch.Tensor
    ) -> torch.Tensor:
        """Replace timesteps by the known ones that are rounded to what was told; the others stay."""
        # pipelines round the time before they change its unit, or after, or both
        rounded_before = self.told(known.to(told.dtype), num_train_timesteps)
        rounded_after = self.told(known, num_train_timesteps).to(told.dtype)
        candidates = torch.stack([rounded_before, rounded_after]).to(timesteps)  # (2, K)
        scale = num_train_timesteps if self.at_pure_noise is None else self.at_pure_noise
        apart = (told.to(timesteps)[..., None, None] - candidates).abs()  # (…, 2, K)
        same = (apart <= _SINGLE_PRECISION * scale).any(-2)  # (…, K)
        noisiest = torch.where(same, known, -torch.inf).amax(-1)
        return torch.where(same.any(-1), noisiest, timesteps)


_TIMESTEP = TimeArgument()
_FRACTION = TimeArgument(at_pure_noise=1.0)
_FLIPPED_FRACTION = TimeArgument(at_pure_noise=1.0, flipped=True)
_SANA = TimeArgument(setting="timestep_scale")
_PER_TOKEN = TimeArgument(per_token=True)

# From the pipelines of Diffusers, by the full names of classes, which are not imported: that would take seconds.
_DIFFUSERS: dict[str, TimeArgument | None] = {
    "AuraFlowTransformer2DModel": _FRACTION,
    "BriaFibo2Transformer2DModel": _FRACTION,
    "ChromaTransformer2DModel": _FRACTION,
    "Flux2Transformer2DModel": _FRACTION,
    "FluxTransformer2DModel": _FRACTION,
    "HiDreamImageTransformer2DModel": TimeArgument(name="timesteps"),
    "Krea2Transformer2DModel": _FRACTION,
    "LTXVideoTransformer3DModel": _PER_TOKEN,
    "LTX2VideoTransformer3DModel": _PER_TOKEN,
    "LongCatImageTransformer2DModel": _FRACTION,
    "Lumina2Transformer2DModel": _FLIPPED_FRACTION,
    "LuminaNextDiT2DModel": _FLIPPED_FRACTION,
    "MochiTransformer3DModel": TimeArgument(flipped=True),
    "NucleusMoEImageTransformer2DModel": _FRACTION,
    "OvisImageTransformer2DModel": _FRACTION,
    "QwenImage21Transformer2DModel": _FRACTION,
    "QwenImageTransformer2DModel": _FRACTION,
    "SanaTransformer2DModel": _SANA,
    "SkyReelsV2Transformer3DModel": _PER_TOKEN,
    "UNetSpatioTemporalConditionModel": None,  # a quarter of ln σ, without a T
    "WanTransformer3DModel": _PER_TOKEN,
    "ZImageTransformer2DModel": replace(_FLIPPED_FRACTION, name="t"),
}
_REGISTERED: dict[str, TimeArgument] = {}


def register_time_argument(denoiser_class: type[nn.Module], time_argument: TimeArgument) -> None:
    """
    Teach how a class of denoisers is told the time.

    ```py
    register_time_argument(MyTransformer, TimeArgument(name="sigma", at_pure_noise=1.0))
    ```

    Args:
        denoiser_class (`type`): The class. Its subclasses are told the time in the same way unless they are registered
            themselves.
        time_argument ([`TimeArgument`]): How.

    Raises:
        ValueError: if the class's `forward` has no such argument.
    """
    names = _argument_names(denoiser_class)
    if time_argument.name not in names:
        raise ValueError(
            f"Expected `time_argument` to name an argument of {denoiser_class.__name__}'s `forward`, {', '.join(names)}, but "
            f"got {time_argument.name!r}."
        )
    _REGISTERED[full_name(denoiser_class)] = time_argument


def time_argument_of(denoiser: nn.Module) -> TimeArgument:
    """
    Return how a denoiser is told the time.

    A class that is not known is taken to follow the usual convention, if its `forward` has an argument `timestep`: it holds t.

    Args:
        denoiser (`nn.Module`): Any denoiser.

    Raises:
        ValueError: if it is not known; [`register_time_argument`] teaches it.
    """
    argument = _known_argument(type(denoiser))
    if argument is None and "timestep" in _argument_names(type(denoiser)) and not _is_untold(type(denoiser)):
        argument = _TIMESTEP
    if argument is None:
        name = type(denoiser).__name__
        raise ValueError(
            f"Expected a denoiser of which is known how it is told the time, but got a {name}; teach it with "
            f"`register_time_argument({name}, TimeArgument(name=…, at_pure_noise=…))`."
        )
    if argument.setting is not None:
        # Sana: 1000 · timestep_scale at t = T
        scale = denoiser.config[argument.setting]  # type: ignore[index]
        argument = argument if scale == 1 else replace(argument, at_pure_noise=1000 * scale)
    return argument


def _known_argument(denoiser_class: type) -> TimeArgument | None:
    for cls in denoiser_class.__mro__:
        argument = _REGISTERED.get(full_name(cls)) or (_DIFFUSERS.get(cls.__name__) if _is_diffusers(cls) else None)
        if argument is not None:
            return argument
    return None


def _is_untold(denoiser_class: type) -> bool:
    """Whether a class of Diffusers has a time of its own, which is no training timestep."""
    return any(
        _is_diffusers(cls) and _DIFFUSERS.get(cls.__name__, _TIMESTEP) is None for cls in denoiser_class.__mro__
    )


def _is_diffusers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "diffusers"


@functools.cache
def _argument_names(denoiser_class: type) -> tuple[str, ...]:
    """The arguments of a class's `forward`, without `self`."""
    return tuple(inspect.signature(denoiser_class.forward).parameters)[1:]  # type: ignore[attr-defined]


class ExpertFinder:
    """
    Finds the expert that owns each sample of a batch, from the arguments that a denoiser is called with.

    On an accelerator, the CPU waits once for the values of the time: it has to know them to choose.

    Args:
        denoiser (`nn.Module`): The denoiser, of which the class is read.
        intervals ([`NoiseIntervals`]): Which expert owns which timesteps.

    Raises:
        ValueError: if it is not known how the class is told the time.
    """

    def __init__(self, denoiser: nn.Module, intervals: NoiseIntervals):
        self.intervals = intervals
        self.argument = time_argument_of(denoiser)
        self.argument_names = _argument_names(type(denoiser))
        self.class_name = type(denoiser).__name__
        self._is_unverified = _known_argument(type(denoiser)) is None
        self._schedule: tuple[torch.Tensor, torch.Tensor] | None = None

    def value(self, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """
        Return what the denoiser is told, from the arguments of a call.

        Raises:
            ValueError: if the call has no such argument.
        """
        name = self.argument.name
        arguments = dict(zip(self.argument_names, args)) | dict(kwargs)
        if arguments.get(name) is None:
            raise ValueError(f"Expected {self.class_name} to be called with `{name}`, but got none.")
        return torch.as_tensor(arguments[name])

    def __call__(self, args: tuple, kwargs: Mapping[str, Any], schedule: torch.Tensor | None = None) -> list[int]:
        """
        Find the experts of a call.

        Args:
            args, kwargs: The arguments of the denoiser's `forward`.
            schedule (`torch.Tensor` of shape (S,), *optional*): The exact timesteps of the sampling, if they are known:
                `scheduler.timesteps`.

        Returns:
            `list[int]`: One expert for the batch, or one for each of its B samples if they differ.

        Raises:
            ValueError: if tokens of one sample belong to several experts (without those of t = 0, which are given), or the time
                is not in the unit that the class is known by.
        """
        value = self.value(args, kwargs).detach().cpu()
        total = self.intervals.num_train_timesteps
        # a step exactly on an edge, and the ends, which rounding must not move out of [0, T]
        known = torch.tensor(self.intervals.edges, dtype=torch.float64)
        if schedule is not None:
            known = self._values(schedule)
        timesteps = self.argument.timesteps(value, total, known)
        self._check_unit(value, timesteps)
        experts = self.intervals.index(timesteps)
        if value.ndim > 1:
            tokens = self.argument.token_timesteps(value, total, known).flatten(1)
            if ((self.intervals.index(tokens) != experts[:, None]) & (tokens > 0)).any():
                raise ValueError(
                    f"Expected all noisy tokens of a sample to belong to one expert, but got the timesteps "
                    f"{tokens.unique().tolist()} with the edges {self.intervals.edges}."
                )
        first, *others = owners = experts.tolist()
        return [first] if all(other == first for other in others) else owners

    def _values(self, schedule: torch.Tensor) -> torch.Tensor:
        """A schedule on the CPU, which waits for it at the first step only: a scheduler makes another tensor for each sampling."""
        if self._schedule is None or self._schedule[0] is not schedule:
            self._schedule = schedule, schedule.detach().cpu().double()
        return self._schedule[1]

    def _check_unit(self, value: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Look at the first call of a class that is only taken to be told t: a fraction would always be the cleanest expert's."""
        if self._is_unverified and value.is_floating_point() and timesteps.max() <= 1:
            raise ValueError(
                f"Expected `{self.argument.name}` of {self.class_name} to count training timesteps up to "
                f"{self.intervals.num_train_timesteps}, but got {value.max().item():g} in the first call, which looks like a "
                f"fraction; teach it with `register_time_argument({self.class_name}, TimeArgument(at_pure_noise=1.0))`."
            )
        self._is_unverified = False
