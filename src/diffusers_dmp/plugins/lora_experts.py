"""LoRA per noise interval: each interval of noise levels owns adapters of one denoiser.

Legend: B batch, E experts.
"""

import logging
import math
import numbers
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..intervals import NoiseIntervals
from ..models.mixed_batches import join_outputs, split_by_expert
from ..models.time_argument import ExpertFinder, next_step, time_argument_of
from ..saving.adapters import adapter_names
from .adapter_switch import AdapterSwitch, adapter_layers
from .hooks import ForwardHooks
from .lora_folders import LoraFoldersMixin, remove_loras
from .lora_targets import LoraTarget, Weighted, lora_targets

logger = logging.getLogger(__name__)

Adapters = str | Weighted | list[str | Weighted] | None


class LoraExperts(LoraFoldersMixin):
    """
    Adapters of a denoiser, such as LoRA, each of which acts in one noise interval.

    ```py
    pipe.load_lora_weights("high_noise.safetensors", adapter_name="high")
    pipe.load_lora_weights("low_noise.safetensors", adapter_name="low")
    experts = LoraExperts(["low", "high"], NoiseIntervals.from_sigmas([0.875])).attach(pipe)
    …
    experts.detach()  # restores the denoiser
    ```

    The adapters are those that PEFT has put into the denoiser: `load_lora_weights`, `add_adapter`, or for models without these
    methods `peft.inject_adapter_in_model`. Or they are in files, of [`save_pretrained`] or of other trainers, which
    [`from_pretrained`] and [`from_files`] attach without loading them before. On a pipeline with two transformers (Wan2.2), each
    adapter belongs into the one that owns its noise. In each forward pass, those named for the interval act, with the weights given here, and
    no others. The pipeline's own `attention_kwargs={"scale": …}` scales them further. Other changes of the adapters
    (`set_adapters`, `delete_adapters`, `fuse_lora`, loading more, hot-swapping a LoRA of another scale) are refused by the next forward pass: detach before.

    A batch with samples of several intervals runs once for each of them, so that a sample's output does not depend on the others.
    Only the owner of a sample gets gradients from it, also under gradient checkpointing. Which adapters require gradients is left
    as it is; PEFT freezes all but the last one added, so call `peft.functional.set_requires_grad(denoiser, ["low", "high"])` to
    train several. A copy of the denoiser has a copy of the experts attached.

    Blocks that are compiled (`compile_repeated_blocks`) are compiled once for each interval. Checkpointing is that of Diffusers
    (`enable_gradient_checkpointing`) or PyTorch (`apply_activation_checkpointing`), enabled before or after; parts that a model
    gives to `torch.utils.checkpoint` by itself are computed again with the adapters of the latest pass. Adapters of others than
    the owners get no gradients, so `DistributedDataParallel` needs `find_unused_parameters=True`.

    Args:
        adapters (`list` of length E): For each interval, the least noise first: the adapter's name; a name and a weight,
            `("low", 0.5)`; a list of these, for several adapters at once; or None, for the denoiser without adapters.
        intervals ([`NoiseIntervals`]): Which of them acts at which noise level.

    Raises:
        ValueError: if there are not as many `adapters` as intervals, or one of them is none of these.
    """

    def __init__(self, adapters: Sequence[Adapters], intervals: NoiseIntervals):
        if isinstance(adapters, str) or len(adapters) != intervals.num_experts:
            got = (
                repr(adapters)
                if isinstance(adapters, str)
                else f"{len(adapters)} for {intervals.num_experts} intervals"
            )
            raise ValueError(f"Expected `adapters` to be a list with one entry for each interval, but got {got}.")
        self.adapters: tuple[tuple[Weighted, ...], ...] = tuple(_weighted(entry) for entry in adapters)
        self.intervals = intervals
        self._attachments: list[LoraAttachment] = []

    @classmethod
    def attached_to(cls, denoiser: nn.Module) -> "LoraExperts | None":
        """Return the experts that are attached to a denoiser, or None."""
        attachment = lora_attachment_of(unwrap_module(denoiser))
        return None if attachment is None else attachment.experts

    @property
    def names(self) -> list[str]:
        """The adapters that occur, each once."""
        return list(dict.fromkeys(name for entry in self.adapters for name, _ in entry))

    def attach(self, target: nn.Module | DiffusionPipeline) -> "LoraExperts":
        """
        Attach to a denoiser.

        Args:
            target (`nn.Module` or [`DiffusionPipeline`]): The denoiser, compiled or not, or a pipeline with one. With a pipeline,
                the exact timesteps of its scheduler are used where the pipeline rounds them (Flux and Qwen-Image, in half
                precision): otherwise a step near a boundary may belong to the neighbour.

        Returns:
            [`LoraExperts`]: the same object.

        Raises:
            ValueError: if these experts or others are attached already, an adapter is not loaded, adapters are fused or switched
                off, or it is not known how the denoiser is told the time.
        """
        if self._attachments:
            raise ValueError(
                "Expected experts that are attached to nothing, but got some that are; `detach()` them first."
            )
        targets = lora_targets(target, self.adapters, self.intervals)
        for each in targets:
            _check_denoiser(each.denoiser)
        self._loaded = self._load_files(targets)
        try:
            for each in targets:
                _check_adapters(each)
            self._attachments = [LoraAttachment(self, each) for each in targets]
        except BaseException:
            remove_loras(self._loaded)
            raise
        return self

    def detach(self) -> "LoraExperts":
        """
        Detach, and let the denoiser use the adapters that it used before.

        Returns:
            [`LoraExperts`]: the same object.

        Raises:
            ValueError: if these experts are attached to nothing.
        """
        if not self._attachments:
            raise ValueError("Expected experts that are attached to a denoiser, but got some that are not.")
        attachments, self._attachments = self._attachments, []
        for attachment in attachments:
            attachment.remove()
        loaded, self._loaded = self._loaded, ()
        remove_loras(loaded)
        return self

    def __repr__(self) -> str:
        entries = [[name if weight == 1 else (name, weight) for name, weight in entry] for entry in self.adapters]
        shown = [None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries]
        return f"LoraExperts({shown}, edges={self.intervals.edges})"

    def __getstate__(self) -> dict:
        # a copy of the experts alone is attached to nothing; where a denoiser is copied, `LoraAttachment` attaches the copy
        return self.__dict__ | {"_attachments": [], "_loaded": ()}


class LoraAttachment:
    """
    The connection of [`LoraExperts`] and one denoiser.

    Args:
        experts ([`LoraExperts`]): The experts.
        target ([`LoraTarget`]): The denoiser.
    """

    switches_adapters = True  # see `lora_attachment_of`
    keeps_conditioning = True  # see `has_fixed_modulations`

    def __init__(self, experts: LoraExperts, target: LoraTarget):
        self.experts = experts
        self.denoiser = target.denoiser
        self.finder = ExpertFinder(target.denoiser, target.intervals)
        self.switch = AdapterSwitch(target.denoiser, target.adapters)
        self.component = target.component
        self._pipeline = None if target.pipeline is None else weakref.ref(target.pipeline)
        self._remaining: tuple[list, torch.Tensor] | None = None  # of a mixed batch, while its first samples pass
        self._has_trained = False
        self.hooks = ForwardHooks()
        # before the hooks of others, which then see passes of one expert
        self.hooks.before(target.denoiser, self._before, first=True)
        self.hooks.after(target.denoiser, self._after)

    @property
    def pipeline(self) -> DiffusionPipeline | None:
        """The pipeline that the denoiser is part of, if it was given and is still there."""
        return None if self._pipeline is None else self._pipeline()

    def remove(self) -> None:
        """Restore the denoiser."""
        self.hooks.remove()
        self.switch.remove()

    @torch.compiler.disable
    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Choose the adapters of a pass. Of a mixed batch, let only the samples of the first expert pass."""
        if not self.switch.is_untouched:
            raise ValueError(
                f"Expected the adapters of {type(denoiser).__name__} to stay as they were when LoraExperts was attached, but some "
                "were loaded, deleted, activated, scaled or fused since; `LoraExperts.attached_to(denoiser).detach()`, and attach again."
            )
        if torch.is_grad_enabled():
            self._prepare_backward_pass(denoiser)
        self._remaining = None
        experts = self.finder(args, kwargs, *self._schedule(denoiser))
        if len(experts) == 1:
            self.switch.use(experts[0])
            return None
        calls, order = split_by_expert(experts, args, kwargs, self.finder.argument_names)
        (expert, args, kwargs), *others = calls
        self._remaining = others, order
        self.switch.use(expert)
        return args, kwargs

    def _prepare_backward_pass(self, denoiser: nn.Module) -> None:
        self.switch.bind_checkpoints()
        if denoiser.training and not self._has_trained and self.switch.frozen_names:
            logger.warning(
                "%s of the %s requires no gradients; `peft.functional.set_requires_grad(denoiser, %s)` trains all adapters.",
                ", ".join(self.switch.frozen_names),
                type(denoiser).__name__,
                self.switch.names,
            )
        self._has_trained = self._has_trained or denoiser.training

    @torch.compiler.disable
    def _after(self, denoiser: nn.Module, args: tuple, output: Any) -> Any:
        """Run the denoiser again for the other experts of a mixed batch."""
        self.switch.keep_scales()
        if self._remaining is None:
            return None
        (others, order), self._remaining = self._remaining, None
        return join_outputs([output, *(denoiser(*args, **kwargs) for _, args, kwargs in others)], order)

    def _schedule(self, denoiser: nn.Module) -> tuple[torch.Tensor, int] | tuple[()]:
        """The exact timesteps of the pipeline and the next of them, while the denoiser is part of it and it samples."""
        pipeline = self.pipeline
        if pipeline is None or unwrap_module(getattr(pipeline, self.component, None)) is not denoiser:
            return ()
        scheduler = pipeline.scheduler
        if getattr(scheduler, "num_inference_steps", None) is None:
            return ()
        return scheduler.timesteps, next_step(scheduler)

    def __getstate__(self) -> dict:
        adapters, intervals = self.experts.adapters, self.experts.intervals
        return self.__dict__ | {
            "experts": (adapters, intervals),
            "_pipeline": None,
            "_remaining": None,
        }

    def __setstate__(self, state: dict) -> None:
        adapters, intervals = state["experts"]
        self.__dict__.update(state)
        self.experts = LoraExperts([list(entry) for entry in adapters], intervals)
        self.experts._attachments = [self]


def lora_attachment_of(denoiser: nn.Module) -> LoraAttachment | None:
    """Return the [`LoraAttachment`] of a denoiser that is not wrapped by `torch.compile`, or None."""
    owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values())
    # by an attribute, as code that comes with a repository defines another class: see saving/naming.py
    return next((owner for owner in owners if getattr(owner, "switches_adapters", False)), None)


def _weighted(entry: Adapters) -> tuple[Weighted, ...]:
    """Write the adapters of an interval as names with weights."""
    entries = [] if entry is None else entry if isinstance(entry, list) else [entry]
    pairs = [(each, 1.0) if isinstance(each, str) else each for each in entries]
    for pair in pairs:
        is_pair = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not is_pair or not isinstance(pair[1], numbers.Real) or not math.isfinite(pair[1]):
            raise ValueError(
                'Expected an entry of `adapters` to be a name, a name and a weight ("low", 0.5), a list of these, or None, '
                f"but got {entry!r}."
            )
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected an entry of `adapters` to name each adapter once, but got {entry!r}.")
    return tuple((name, float(weight)) for name, weight in pairs)


def _check_denoiser(denoiser: nn.Module) -> None:
    class_name = type(denoiser).__name__
    # by name, as code that comes with a repository defines another class
    if any(cls.__name__ == "DenoiserExperts" for cls in type(denoiser).__mro__):
        raise ValueError(
            "Expected a denoiser, but got DenoiserExperts; attach to one of its `experts`, or load a LoRA into each of them."
        )
    time_argument_of(denoiser)
    if lora_attachment_of(denoiser) is not None:
        raise ValueError(
            f"Expected a {class_name} without LoraExperts, but got one with some; `detach()` those first."
        )


def _check_adapters(target: LoraTarget) -> None:
    denoiser, class_name, named = target.denoiser, type(target.denoiser).__name__, target.names
    loaded = adapter_names(denoiser)
    missing = [name for name in named if name not in loaded]
    if missing:
        raise ValueError(
            f"Expected `adapters` to be among the loaded ones of the {class_name}, {', '.join(sorted(loaded)) or 'which has none'}, "
            f"but got {', '.join(missing)}; `load_lora_weights(file, adapter_name=…)` loads more."
        )
    layers = adapter_layers(denoiser)
    if any(layer.merged_adapters for layer in layers):
        raise ValueError(
            f"Expected a {class_name} with adapters that can be switched, but they are fused; `unfuse_lora()` before."
        )
    if any(layer._disable_adapters for layer in layers):
        raise ValueError(
            f"Expected a {class_name} with adapters switched on, but they are off; `enable_lora()` before."
        )
    if not all(hasattr(layer, "set_scale") for layer in layers):
        raise ValueError(f"Expected only adapters that can be scaled, such as LoRA, but the {class_name} has others.")
    active = {name for layer in layers for name in layer.active_adapters if name in loaded}
    if active - set(named):
        logger.warning(
            "The %s uses %s, which no interval of LoraExperts names: inactive until it is detached.",
            class_name,
            ", ".join(sorted(active - set(named))),
        )
