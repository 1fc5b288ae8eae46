"""How a denoiser is told the time: which argument holds it, in which unit, and which training timestep t it means.

Every class of Diffusers denoisers is told the noise level in its own way: as t from 1000 to 0, as a fraction from 1 to 0, from 0
to 1, or once for each token. A `TimeArgument` turns what a class is told into t in [0, T], and `NoiseIntervals` alone turns t into
an expert.

Legend: B batch, N tokens, T training timesteps, K known timesteps.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..diffusion.timesteps import SINGLE_PRECISION
from ..intervals import NoiseIntervals
from ..saving.naming import full_name
from .caching import CopiesOnCPU


@dataclass(frozen=True, kw_only=True)
class TimeArgument:
    """
    How one class of denoisers is told the time.

    Args:
        name (`str`): The argument of `forward`.
        at_pure_noise (`float`, *optional*): Its value at t = T, such as 1 where it is t/T; by default T itself, which means
            that it is t. Where the argument is `flipped`, its value at t = 0.
        flipped (`bool`): Whether it counts from the noise to the image: 0 at t = T.
        offset (`float`): What is added to it, such as -1 where it is t - 1.
        per_token (`bool`): Whether it may be of shape (B, N), one value for each token (or frame). The sample's t is that of
            its noisiest token, as the others belong to a given image.

    Example:
        >>> TimeArgument(at_pure_noise=1.0).timesteps(torch.tensor([0.25]), 1000)
        tensor([250.], dtype=torch.float64)
    """

    name: str = "timestep"
    at_pure_noise: float | None = None
    flipped: bool = False
    offset: float = 0.0
    per_token: bool = False

    def told(self, timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
        """
        Compute what a model is told at some timesteps, the inverse of [`~TimeArgument.timesteps`].

        Args:
            timesteps (`torch.Tensor` of any shape): t in [0, T].
            num_train_timesteps (`int`): T.

        Returns:
            `torch.Tensor` of the same shape and, if it is a floating one, dtype.
        """
        counted = num_train_timesteps - timesteps if self.flipped else timesteps
        if self.at_pure_noise is not None:
            counted = counted / num_train_timesteps * self.at_pure_noise
        return counted + self.offset if self.offset else counted

    def timesteps(self, value: torch.Tensor | float, num_train_timesteps: int, *known: torch.Tensor) -> torch.Tensor:
        """
        Turn what a model is told into training timesteps.

        Some pipelines round the time to the latents' dtype first: in bfloat16 the timesteps 898 to 902 are one number. Where
        timesteps are `known`, the one that is rounded to the value is returned (of several, the noisiest).

        Args:
            value (`torch.Tensor` of shape (), (1,), (B,) or (B, N), or a number): What the model is told.
            num_train_timesteps (`int`): T.
            known (`torch.Tensor` of shape (K,)): Exact timesteps t, such as those of a scheduler. Of several tensors, the last
                that has one decides.

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
        return self.token_timesteps(value, num_train_timesteps, *known).flatten(1).amax(1)

    def token_timesteps(self, value: torch.Tensor, num_train_timesteps: int, *known: torch.Tensor) -> torch.Tensor:
        """As [`~TimeArgument.timesteps`], but of each token: (B, N), or (B, 1) where a value is one of the whole sample."""
        exact_dtype = torch.float32 if value.device.type == "mps" else torch.float64
        told = value.reshape(len(value) if value.ndim else 1, -1)  # (B, N)
        timesteps = told.to(exact_dtype) - self.offset
        if self.at_pure_noise is not None:
            timesteps = timesteps / self.at_pure_noise * num_train_timesteps
        if self.flipped:
            timesteps = num_train_timesteps - timesteps
        if told.is_floating_point():
            for exact in filter(len, known):
                timesteps = self._snapped(timesteps, told, num_train_timesteps, exact.to(timesteps))
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
        apart = (told.to(timesteps)[..., None, None] - candidates).abs()  # (B, N, 2, K)
        same = (apart <= SINGLE_PRECISION * scale).any(-2)  # (B, N, K)
        noisiest = torch.where(same, known, -torch.inf).amax(-1)
        return torch.where(same.any(-1), noisiest, timesteps)


_TIMESTEP = TimeArgument()
_PER_TOKEN = TimeArgument(per_token=True)
_FRACTION = TimeArgument(at_pure_noise=1.0)
_FLIPPED_FRACTION = TimeArgument(at_pure_noise=1.0, flipped=True)


_Convention = TimeArgument | Callable[[Mapping[str, Any]], TimeArgument]  # or a function of the model's configuration


def _sana(config: Mapping[str, Any]) -> TimeArgument:
    if config.get("guidance_embeds"):
        return _FRACTION  # Sana-Sprint: sin/(sin + cos) of the angle, which is σ
    scale = config.get("timestep_scale", 1.0)
    return _TIMESTEP if scale == 1 else TimeArgument(at_pure_noise=1000.0 * scale)


# From the pipelines of Diffusers 0.42, by the names of classes, which are not imported: that would take seconds.
_CONVENTIONS: tuple[tuple[_Convention, str], ...] = (
    (
        _TIMESTEP,
        """
        AllegroTransformer3DModel AudioLDM2UNet2DConditionModel BriaFiboTransformer2DModel BriaTransformer2DModel
        CogVideoXTransformer3DModel CogView3PlusTransformer2DModel CogView4Transformer2DModel ConsisIDTransformer3DModel
        DiTTransformer2DModel DreamLiteUNetModel EasyAnimateTransformer3DModel ErnieImageTransformer2DModel
        HeliosTransformer3DModel HunyuanDiT2DModel HunyuanImageTransformer2DModel HunyuanVideo15Transformer3DModel
        HunyuanVideoFramepackTransformer3DModel HunyuanVideoTransformer3DModel I2VGenXLUNet
        JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel Kandinsky3UNet Kandinsky5Transformer3DModel
        Kandinsky6SRTransformer3DModel Kandinsky6Transformer3DModel LatteTransformer3DModel MotifVideoTransformer3DModel
        PixArtTransformer2DModel PriorTransformer SD3Transformer2DModel UNet2DConditionModel UNet2DModel
        UNet3DConditionModel UNetControlNetXSModel UNetMotionModel WanAnimate2Transformer3DModel
        WanAnimateTransformer3DModel WanVACETransformer3DModel
        """,
    ),
    (
        _PER_TOKEN,
        """
        AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel ChronoEditTransformer3DModel LTX2VideoTransformer3DModel
        LTXVideoTransformer3DModel SanaVideoTransformer3DModel SanaWMLTX2RefinerTransformer3DModel SanaWMTransformer3DModel
        SkyReelsV2Transformer3DModel WanTransformer3DModel
        """,
    ),
    (
        _FRACTION,
        """
        AceStepTransformer1DModel AuraFlowTransformer2DModel BriaFibo2Transformer2DModel ChromaTransformer2DModel
        Flux2Transformer2DModel Flux3Transformer2DModel FluxTransformer2DModel Krea2Transformer2DModel
        LongCatAudioDiTTransformer LongCatImageTransformer2DModel NucleusMoEImageTransformer2DModel
        OvisImageTransformer2DModel PRXTransformer2DModel QwenImage21Transformer2DModel QwenImageTransformer2DModel
        StableAudio3DiTModel
        """,
    ),
    (
        _FLIPPED_FRACTION,
        """
        Ideogram4Transformer2DModel Lumina2Transformer2DModel LuminaNextDiT2DModel MiniMaxMusic3Transformer1DModel
        OmniGenTransformer2DModel
        """,
    ),
    (TimeArgument(name="t", at_pure_noise=1.0, flipped=True), "ZImageTransformer2DModel"),
    (TimeArgument(name="timesteps"), "HiDreamImageTransformer2DModel"),
    (TimeArgument(name="vision_timesteps"), "Cosmos3OmniTransformer"),
    (TimeArgument(flipped=True), "MochiTransformer3DModel"),
    (TimeArgument(offset=-1.0), "GlmImageTransformer2DModel"),
    (_sana, "SanaTransformer2DModel"),
)
_DIFFUSERS = {name: argument for argument, names in _CONVENTIONS for name in names.split()}
# Their time is no t/T: ln σ or one of σ's other functions, several conventions in one class, or several times in one sample.
_TIME_OF_ITS_OWN = {
    "CosmosTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
    "RFD4ProteinaTransformer",
    "StableAudioDiTModel",
    "StableCascadeUNet",
    "UNetSpatioTemporalConditionModel",
    "UVit2DModel",
    "UniDiffuserModel",
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
    names = argument_names_of(denoiser_class)
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
    denoiser_class = type(denoiser)
    argument = _known_argument(denoiser_class)
    if callable(argument):
        config: Any = denoiser.config
        argument = argument(config)
    is_usual = "timestep" in argument_names_of(denoiser_class) and not _has_time_of_its_own(denoiser_class)
    if argument is None and is_usual:
        argument = _TIMESTEP
    if argument is None:
        name = denoiser_class.__name__
        raise ValueError(
            f"Expected a denoiser of which is known how it is told the time, but got a {name}; teach it with "
            f"`register_time_argument({name}, TimeArgument(name=…, at_pure_noise=…))`."
        )
    return argument


def _known_argument(denoiser_class: type) -> _Convention | None:
    for cls in denoiser_class.__mro__:
        argument = _REGISTERED.get(full_name(cls)) or (_DIFFUSERS.get(cls.__name__) if _is_diffusers(cls) else None)
        if argument is not None:
            return argument
    return None


def _has_time_of_its_own(denoiser_class: type) -> bool:
    return any(_is_diffusers(cls) and cls.__name__ in _TIME_OF_ITS_OWN for cls in denoiser_class.__mro__)


def _is_diffusers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "diffusers"


def argument_names_of(denoiser_class: Any) -> tuple[str, ...]:
    """Return the names of the arguments of a class's `forward`, without `self`."""
    return tuple(inspect.signature(denoiser_class.forward).parameters)[1:]


def next_step(scheduler: Any) -> int:
    """
    Return the index, among a scheduler's timesteps, of the step that it makes next.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler whose timesteps are set. One that does not count its steps is taken to be
            at the first.
    """
    # before the first step, only the one to begin with is known, if an image is given (img2img)
    counted = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
    return next((index for index in counted if index is not None), 0)


class ExpertFinder:
    """
    Finds the expert that owns each sample of a batch, from the arguments that a denoiser is called with.

    To choose, the CPU has to know the time, and to read it from an accelerator is to wait. Where the denoiser is called with
    views of one tensor, such as the timesteps of a scheduler, that is once in a sampling; see [`CopiesOnCPU`]. Where the time is
    a new tensor in each call (Flux, Qwen-Image, Z-Image), it is once in each call.

    Args:
        denoiser (`nn.Module`): The denoiser, of which the class is read.
        intervals ([`NoiseIntervals`]): Which expert owns which timesteps.

    Raises:
        ValueError: if it is not known how the class is told the time.
    """

    def __init__(self, denoiser: nn.Module, intervals: NoiseIntervals):
        self.intervals = intervals
        self.argument = time_argument_of(denoiser)
        self.argument_names = argument_names_of(type(denoiser))
        self.class_name = type(denoiser).__name__
        self._is_unverified = _known_argument(type(denoiser)) is None
        self._edges = torch.tensor(intervals.edges, dtype=torch.float64, device="cpu")
        self._copies = CopiesOnCPU()

    def value(self, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """
        Return what the denoiser is told, from the arguments of a call.

        Raises:
            ValueError: if the call has no such argument.
        """
        name = self.argument.name
        arguments = dict(zip(self.argument_names, args)) | dict(kwargs)
        value = arguments.get(name)
        if value is None or (isinstance(value, torch.Tensor) and value.numel() == 0):
            raise ValueError(f"Expected {self.class_name} to be called with `{name}`, but got none.")
        return torch.as_tensor(value)

    def __call__(
        self, args: tuple, kwargs: Mapping[str, Any], schedule: torch.Tensor | None = None, first_step: int = 0
    ) -> list[int]:
        """
        Find the experts of a call.

        Args:
            args, kwargs: The arguments of the denoiser's `forward`.
            schedule (`torch.Tensor` of shape (S,), *optional*): The exact timesteps t of the sampling, if they are known; see
                [`training_timesteps`].
            first_step (`int`): The first of them that is still to be visited, see [`next_step`]: of several that are rounded to
                the same number, the next one is meant.

        Returns:
            `list[int]`: One expert for the batch, or one for each of its B samples if they differ.

        Raises:
            ValueError: if tokens of one sample belong to several experts (without those of t = 0, which are given), or the time
                is not in the unit that the class is known by.
        """
        value = self._copies.shown_by(self.value(args, kwargs))
        total = self.intervals.num_train_timesteps
        known: tuple[torch.Tensor, ...] = (self._edges,)
        if schedule is not None:
            known = (*known, self._copies.whole(schedule)[first_step:])
        timesteps = self.argument.timesteps(value, total, *known)
        self._check_unit(value, timesteps)
        experts = self.intervals.index(timesteps)
        if value.ndim > 1:
            tokens = self.argument.token_timesteps(value, total, *known)
            if ((self.intervals.index(tokens) != experts[:, None]) & (tokens > 0)).any():
                raise ValueError(
                    f"Expected all noisy tokens of a sample to belong to one expert, but got the timesteps "
                    f"{tokens.unique().tolist()} with the edges {self.intervals.edges}."
                )
        first, *others = owners = experts.tolist()
        return [first] if all(other == first for other in others) else owners

    def _check_unit(self, value: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Look at the first call of a class that is only taken to be told t: a fraction would always be the cleanest expert's."""
        if self._is_unverified and value.is_floating_point() and timesteps.max() <= 1:
            raise ValueError(
                f"Expected `{self.argument.name}` of {self.class_name} to count training timesteps up to "
                f"{self.intervals.num_train_timesteps}, but got {value.max().item():g} in the first call, which looks like a "
                f"fraction; teach it with `register_time_argument({self.class_name}, TimeArgument(at_pure_noise=1.0))`."
            )
        self._is_unverified = False
