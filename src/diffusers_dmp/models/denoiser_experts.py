"""Whole denoisers as experts, one per noise interval, in the place of a pipeline's one denoiser.

Patch Diffusion (https://arxiv.org/abs/2207.04316), eDiff-I (https://arxiv.org/abs/2211.01324) and Wan2.2 sample in this way. Here it
works in any pipeline of Diffusers, which is not changed:

    >>> pipe.transformer = DenoiserExperts([low, high], NoiseIntervals.from_sigmas([0.875]))

Legend: E experts, B batch.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..intervals import NoiseIntervals
from ..saving.mixins import StandaloneModelMixin
from ..saving.naming import EDGES_KEY, EXPERTS_KEY, PACKAGE
from .compiled_calls import check_no_graphs
from .expert_attributes import QUANTISED, ExpertAttributesMixin
from .expert_configs import (
    check_can_be_loaded,
    check_experts,
    class_of_description,
    description,
    descriptions_in,
    expert_from_description,
    package_classes,
    public_config,
    shared_quantizer,
)
from .loading import HUB_ARGUMENTS
from .mixed_batches import run_by_expert
from .pipeline_experts import PipelineExpertsMixin
from .time_argument import ExpertFinder, next_step

# What Diffusers reads from a model about the classes of its layers.
_CLASS_LISTS = (
    "_keep_in_fp32_modules",
    "_no_split_modules",
    "_repeated_blocks",
    "_skip_layerwise_casting_patterns",
)


class DenoiserExperts(
    PipelineExpertsMixin, ExpertAttributesMixin, StandaloneModelMixin, ModelMixin, ConfigMixin, AttentionMixin
):
    """
    Denoise with the expert that owns the noise level: several denoisers that a pipeline calls as one.

    The experts may differ in class, depth and width, if the pipeline could call each of them. In a batch of several noise
    levels, as in training, each sample is denoised by its own expert, exactly as in a batch without the others.

    What a pipeline reads from its denoiser (`config`, `dtype`, `add_embedding`) is that of the first expert; what it sets
    (attention processors and backends, caching, compilation, checkpointing) reaches all. Adapters (LoRA) belong to one of
    the `experts`: `experts[0].load_lora_adapter(…)`. The model is saved and loaded as one, with the usual arguments. Under
    `enable_model_cpu_offload` only the expert that is called is on the accelerator.

    In half precision some pipelines (Flux, Qwen-Image) round the time before they call their denoiser, so that a step very near
    a boundary may go to the neighbour: `experts.scheduler = pipe.scheduler` tells them the exact timesteps.

    Args:
        experts (`list[ModelMixin]` of length E): The denoisers, the first for the least noise.
        intervals ([`NoiseIntervals`]): Which of them owns which timesteps.

    Raises:
        ValueError: if there are not as many experts as intervals, it is not known how an expert is told the time
            ([`register_time_argument`] teaches it), or the experts differ in that, in channels or in dtype.

    Example:

    ```py
    pipe.transformer = DenoiserExperts([low, high], NoiseIntervals.from_sigmas([0.875]))
    pipe.save_pretrained("two-experts", variant="bf16")
    ```
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    experts: Any  # an `nn.ModuleList` of models

    def __init__(self, experts: list[ModelMixin], intervals: NoiseIntervals):
        super().__init__()
        experts = list(experts)
        check_experts(experts, intervals)
        self.experts = nn.ModuleList(experts)
        self.training = self.experts.training = any(expert.training for expert in experts)
        self.intervals = intervals
        self.scheduler: Any = None
        self._find_experts = ExpertFinder(experts[0], intervals)
        self._register_experts()
        quantizer = shared_quantizer(experts)
        if quantizer is not None:
            self.hf_quantizer = quantizer
            self.register_to_config(quantization_config=quantizer.quantization_config)
        for name in _CLASS_LISTS:
            setattr(self, name, sorted({each for expert in experts for each in getattr(expert, name) or ()}))
        self._supports_gradient_checkpointing = all(expert._supports_gradient_checkpointing for expert in experts)
        self._supports_group_offloading = all(expert._supports_group_offloading for expert in experts)

    def forward(self, *args, **kwargs) -> Any:
        """
        Call the expert that owns the noise level, or each expert with its samples.

        Args:
            args, kwargs: The arguments of the experts' `forward`. They reach a single expert unchanged.

        Returns:
            What the experts return.

        Raises:
            ValueError: as [`ExpertFinder`] does for the time, and [`run_by_expert`] for a batch of several experts.
        """
        owners = self._owners(args, kwargs)
        if len(owners) == 1:
            return self._run(owners[0], args, kwargs)
        return run_by_expert(owners, args, kwargs, self._run, self._find_experts.argument_names)

    @torch.compiler.disable
    def _owners(self, args: tuple, kwargs: dict[str, Any]) -> list[int]:
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            return self._find_experts(args, kwargs)
        return self._find_experts(args, kwargs, self.scheduler.timesteps, next_step(self.scheduler))

    def _run(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        expert = self.experts[index]
        device = self._offloading_device()
        if device is not None:
            check_no_graphs([expert], device)
            for other in self.experts:
                if other is not expert and next(other.parameters()).device.type != "cpu":
                    other.to("cpu")
            expert.to(device)
        if self._cache_context is None:
            return expert(*args, **kwargs)
        names, settings = self._cache_context
        with expert.cache_context(*names, **settings):
            return expert(*args, **kwargs)

    # --- where the weights are ------------------------------------------------------------------------------------------

    def _offloading_device(self) -> Any:
        """The device of `enable_model_cpu_offload`; None without it."""
        hook = vars(self).get("_hf_hook")
        hooks = getattr(hook, "hooks", (hook,))  # several hooks are one with a list
        return next((each.execution_device for each in hooks if isinstance(each, CpuOffload)), None)

    def to(self, *args, **kwargs) -> "DenoiserExperts":
        """See [`ModelMixin.to`]. The hook of `enable_model_cpu_offload` moves each expert when it is called."""
        if args and args == (self._offloading_device(),) and not kwargs:
            return self  # this is the hook, before `forward`, which knows the expert: see `_run`
        return super().to(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """
        See [`nn.Module.parameters`]. Under `enable_model_cpu_offload`, those of the expert on the accelerator come first.

        By the device of the first, Accelerate's hooks decide whether there is anything to move to the CPU before the next component.
        """
        if not recurse or self._offloading_device() is None:
            return super().parameters(recurse)
        experts = sorted(dict.fromkeys(self.experts), key=lambda each: next(each.parameters()).device.type == "cpu")
        return chain.from_iterable(expert.parameters() for expert in experts)

    # --- saving and loading ---------------------------------------------------------------------------------------------

    def _register_experts(self) -> None:
        """Write the configuration: the first expert's, which pipelines read, and the descriptions of all."""
        descriptions = [description(expert) for expert in self.experts]
        own = {EDGES_KEY: self.intervals.to_config(), EXPERTS_KEY: descriptions}
        self.register_to_config(**public_config(self.experts[0]) | own)

    def _parts_with_code(self) -> list[type]:
        """See [`StandaloneMixin`]: the classes of experts that are this package's."""
        return package_classes(self.config[EXPERTS_KEY])

    def to_json_string(self) -> str:
        """See [`ConfigMixin.to_json_string`]."""
        self._register_experts()  # what an expert's configuration has got since
        return super().to_json_string()

    def save_pretrained(self, save_directory: Any, *args, **kwargs) -> None:
        """
        See [`ModelMixin.save_pretrained`] and [`StandaloneModelMixin`].

        Raises:
            ValueError: if an expert's class is not one of Diffusers or this package, experts share weights, or there are
                adapters (LoRA).
        """
        check_can_be_loaded(list(self.experts))
        super().save_pretrained(save_directory, *args, **kwargs)

    save_pretrained.__wrapped__ = ModelMixin.save_pretrained  # type: ignore[attr-defined]  # as in StandaloneModelMixin

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs) -> Any:
        """See [`StandaloneModelMixin.from_pretrained`]."""
        names = (*HUB_ARGUMENTS, "revision", "subfolder")
        config = cls.load_config(
            pretrained_model_name_or_path, **{name: kwargs[name] for name in names if name in kwargs}
        )
        classes = [class_of_description(described) for described in descriptions_in(config)]
        in_float32 = sorted({name for each in classes for name in each._keep_in_fp32_modules or ()})
        # Diffusers reads from the class which weights stay in float32. Here it depends on what is loaded.
        own = {"__module__": cls.__module__, "_keep_in_fp32_modules": in_float32 or None}
        loaded_class: Any = type(cls.__name__, (cls,), own)
        loaded = super(DenoiserExperts, loaded_class).from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.__class__ = cls
        quantised = {name: vars(model)[name] for name in (*QUANTISED, "hf_quantizer") if name in vars(model)}
        for expert in model.experts if quantised else ():
            vars(expert).update(quantised)
            expert.register_to_config(quantization_config=model.config.quantization_config)
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """See [`ConfigMixin.extract_init_dict`]: the experts are made of their descriptions."""
        descriptions = descriptions_in(config_dict)
        about_this_copy = {
            name: value for name, value in config_dict.items() if name[0] == "_" or name == "quantization_config"
        }
        arguments, unused, hidden = super().extract_init_dict(about_this_copy, **kwargs)
        arguments["experts"] = [expert_from_description(described) for described in descriptions]
        arguments["intervals"] = NoiseIntervals(tuple(config_dict[EDGES_KEY]))
        return arguments, unused, hidden
