"""The arguments of `training/train_text_to_image.py`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...diffusion.noise import is_flow_matching, scheduler_setting
from ..arguments import LoopArguments, ObjectiveArguments, PromptArguments, RoutingArguments, option
from ..objectives.shifts import shift_of
from .methods import METHODS
from .option_groups import IntervalArguments, LoraArguments, StreamingArguments

GROUPS = (LoraArguments, IntervalArguments, PromptArguments, RoutingArguments)


@dataclass(kw_only=True)
class TextToImageArguments(
    RoutingArguments,
    PromptArguments,
    LoraArguments,
    IntervalArguments,
    StreamingArguments,
    ObjectiveArguments,
    LoopArguments,
):
    """A text-to-image pipeline of Diffusers, of which the denoiser is trained, or adapters of it."""

    pretrained_model_name_or_path: str | None = option(None, "The pipeline to train: folder or Hub id.")
    method: str = option(
        "lora_experts",
        "lora_experts (a LoRA for each noise interval), lora (one for all), denoiser_experts (a whole denoiser for each noise "
        "interval), full (the whole denoiser), prompts (for a frozen transformer, DMP), routing (the whole denoiser with task "
        "routing, DTR).",
    )
    random_flip: bool = option(
        False, "Mirror half of the images, which `encode_prompts.py --mirror true` encodes as well."
    )
    dataset: str = option("", "Folder of encoded images and captions, from encode_prompts.py of the same pipeline.")
    prompt_dropout_prob: float = option(
        0.1, "How often a prompt is replaced by the empty one, for classifier-free guidance."
    )
    batch_size: int = option(16, "Images per optimiser step, over all processes and accumulation steps.")
    max_train_steps: int = option(2_000, "Optimiser steps.")
    checkpointing_steps: int = option(500, "Write a checkpoint every n-th step, and after the last one.")
    objective: str | None = option(  # type: ignore[assignment]
        None, "The noise process: ddpm, or flow for flow matching; by default that of the pipeline's scheduler."
    )
    shift: str | None = option(
        None,
        "For flow: a shift of the density towards the noise, such as 3; or resolution, by the number of tokens of a sample; by "
        "default as the pipeline's scheduler does it.",
    )
    validation_prompts: list[str] = option(
        [],
        "The prompts of the samples that `sample_steps` asks for. They are encoded before the first step, and the text encoders "
        "then leave the memory.",
    )
    sample_height: int | None = option(None, "Height of the samples in pixels; by default the pipeline's own.")
    sample_width: int | None = option(None, "Width of the samples in pixels; by default the pipeline's own.")
    sample_guidance_scale: float | None = option(None, "Guidance scale of the samples; by default the pipeline's own.")

    def __post_init__(self):
        LoopArguments.__post_init__(self)
        self.check_streaming(self.dataloader_num_workers)
        if not self.pretrained_model_name_or_path:
            raise ValueError("Expected `pretrained_model_name_or_path` to name the pipeline to train, but got none.")
        if not self.dataset:
            raise ValueError("Expected `dataset` to be a folder that encode_prompts.py wrote, but got none.")
        if self.method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {', '.join(METHODS)}, but got {self.method!r}.")
        if not 0 <= self.prompt_dropout_prob <= 1:
            raise ValueError(f"Expected `prompt_dropout_prob` to be in [0, 1], but got {self.prompt_dropout_prob}.")
        if bool(self.sample_steps) != bool(self.validation_prompts):
            raise ValueError(
                "Expected `sample_steps` and `validation_prompts` to be set together, but got "
                f"{self.sample_steps} and {len(self.validation_prompts)} prompts."
            )
        self._check_groups()

    def _check_groups(self) -> None:
        """Check the options of the method, and that those of others are not set."""
        method = METHODS[self.method]
        for group in GROUPS:
            if group in method.groups:
                continue
            for field in dataclasses.fields(group):
                value = getattr(self, field.name)
                if value != _default(field):
                    readers = [name for name, each in METHODS.items() if group in each.groups]
                    raise ValueError(
                        f"Expected `method` to be {' or '.join(readers)} where `{field.name}` is set, but got {self.method!r} and "
                        f"{value!r}."
                    )
        if method.has_experts:
            self.check_intervals()
            if self.push_to_hub and self.expert != "all":
                raise ValueError(
                    "Expected `expert` to be 'all' for `push_to_hub`, which uploads all experts together, but got "
                    f"{self.expert!r}."
                )
        if self.push_to_hub and not method.can_be_published:
            raise ValueError(
                f"Expected `push_to_hub` to be false for the method {self.method}, whose pipeline is one of Diffusers' own: load it and "
                "call its `push_to_hub`; but got true."
            )
        if LoraArguments in method.groups:
            self.check_lora(self.count_experts())

    def resolve_process(self, scheduler: Any) -> None:
        """
        Set the noise process and its shift as the pipeline has them, and check what was asked for.

        Args:
            scheduler ([`SchedulerMixin`]): The pipeline's.

        Raises:
            ValueError: if the pipeline was made for another process or prediction, or a variance is to be learned; or if there is
                no objective for its process.
        """
        is_flow = is_flow_matching(scheduler)
        if not is_flow and scheduler_setting(scheduler, "beta_schedule") is None:
            raise ValueError(
                "Expected the pipeline's scheduler to have the noise levels of flow matching, or betas as DDPM has, but got a "
                f"{type(scheduler).__name__}, for which there is no objective."
            )
        found = "flow" if is_flow else "ddpm"
        if self.objective not in (None, found):
            raise ValueError(
                f"Expected `objective` to be {found}, as the pipeline's {type(scheduler).__name__}, but got {self.objective!r}."
            )
        self.objective = found
        if self.learn_sigma and not is_flow:
            raise ValueError("Expected `learn_sigma` to be false for a text-to-image pipeline, but got true.")
        self.learn_sigma = bool(self.learn_sigma)
        if not is_flow:
            own = scheduler.config["prediction_type"]
            if self.prediction_type not in (None, own):
                raise ValueError(
                    f"Expected `prediction_type` to be {own}, as the pipeline's scheduler says, but got {self.prediction_type!r}."
                )
            self.prediction_type = own
        if is_flow and self.shift is None:
            self.shift = str(shift_of(scheduler))
        self.resolve_objective()

    def samples_in_words(self, count: int) -> str:
        """Say what a number of samples are."""
        return f"{count} encoded images"


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
