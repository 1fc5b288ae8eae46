"""A pipeline of a training's checkpoint, without the training's data; for PPAP the guidance experts, for others what they save."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import yaml
from torch import nn

from ..guidance import GuidanceExperts
from ..pipelines import ClassConditionalPipeline
from ..saving.finite import expect_finite_weights
from ..saving.mixins import is_component
from ..saving.reading import read_json
from ..saving.weight_files import read_safetensors
from ..saving.whole import written_whole
from .checkpoints import PREFIX, checkpoint_step, checkpoints, expect_readable, is_named_like_one, read_record
from .data.latents import load_vae
from .dit_family import load_dit_family
from .guidance_experts import WEIGHTS_NAME, make_experts
from .objectives.distillation import ExpertStudent
from .pipeline_output import CONFIGURATIONS
from .prompted import PromptedTransformer
from .resuming import ARGUMENTS_NAME, OF_ONE_COMMAND, recorded_arguments
from .text_to_image import TextToImageArguments
from .text_to_image.training import prepare_model

MODEL_NAME = "model.safetensors"  # as Accelerate names the weights of a checkpoint's first model
INDEX_NAME = "model_index.json"
_WRAPPERS = ("module.", "_orig_mod.")  # of several processes, and of compiled models


def export_checkpoint(checkpoint: Path, folder: Path, use_ema: bool = True) -> None:
    """
    Make a pipeline of a training's checkpoint, as the end of the training would; for PPAP the guidance experts, and of a
    text-to-image training what its method saves: LoRA, prompts, or a pipeline.

    Args:
        checkpoint (`Path`): A folder `checkpoint-<step>` where its training wrote it.
        folder (`Path`): The folder to write, which must not exist yet.
        use_ema (`bool`): Use the averaged weights, if the training has them.

    Raises:
        ValueError: if the checkpoint, or what belongs to it, is missing or incomplete, or if `folder` is not empty.
    """
    _check(checkpoint, folder)
    arguments = _read_arguments(checkpoint)
    save: Callable[[Path], Any]
    if "base_model" in arguments:
        save = _experts(checkpoint, arguments, use_ema).save_pretrained
    elif "prompt_dropout_prob" in arguments:  # of text-to-image trainings alone
        save = _text_to_image(checkpoint, arguments, use_ema)
    else:
        save = _pipeline(checkpoint, arguments, use_ema).save_pretrained
    with written_whole(folder) as unfinished:
        save(unfinished)
        # the steps that were done, for the model card
        arguments |= {"max_train_steps": checkpoint_step(checkpoint)}
        arguments = {name: value for name, value in arguments.items() if name not in OF_ONE_COMMAND}
        (unfinished / ARGUMENTS_NAME).write_text(yaml.safe_dump(arguments, sort_keys=False), encoding="utf-8")


def _check(checkpoint: Path, folder: Path) -> None:
    if not checkpoint.is_dir() or not is_named_like_one(checkpoint):
        present = ", ".join(path.name for path in checkpoints(checkpoint.parent)) or "none"
        raise ValueError(
            f"Expected `checkpoint` to be a folder {PREFIX}<step>, but got {str(checkpoint)!r}; in {str(checkpoint.parent)!r} "
            f"there are {present}."
        )
    expect_readable(checkpoint)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected `folder` to be new or empty, but got {str(folder)!r}, which is not.")


def _read_arguments(checkpoint: Path) -> dict[str, Any]:
    """The arguments of the training, which are in the checkpoint's record, or else in the training's folder."""
    arguments = read_record(checkpoint).get("arguments") or recorded_arguments(checkpoint.parent)
    if arguments is None:
        raise ValueError(f"Expected the {ARGUMENTS_NAME} of its training beside {str(checkpoint)!r}, but got none.")
    return arguments


def _pipeline(checkpoint: Path, arguments: Mapping[str, Any], use_ema: bool) -> ClassConditionalPipeline:
    """The pipeline that the training would save, with the weights of the checkpoint."""
    candidates = [checkpoint.parent / name for name in (CONFIGURATIONS, "pipeline")]
    saved = next((folder for folder in candidates if (folder / INDEX_NAME).is_file()), None)
    if saved is None:
        raise ValueError(
            f"Expected the folder {CONFIGURATIONS} beside {str(checkpoint)!r}, which trainings write since 0.3, or a "
            "pipeline, but got neither; resume the training for a step."
        )
    index = read_json(saved / INDEX_NAME)
    classes = {name: value[1] for name, value in index.items() if is_component(value) and value[1] is not None}
    classes.pop("_class_name", None)
    components: dict[str, Any] = {"scheduler": _from_config(classes["scheduler"], saved / "scheduler")}
    if "vae" in classes:
        components["vae"] = load_vae(arguments["vae"])
    if "prompt_patch" in classes:
        components["transformer"] = load_dit_family(arguments["pretrained_model_name_or_path"]).eval()
        patch = _from_config(classes["prompt_patch"], saved / "prompt_patch")
        patch.attach(components["transformer"])
        components["prompt_patch"] = patch.eval()
        load_checkpoint_weights(PromptedTransformer(patch), checkpoint, use_ema)
    else:
        components["transformer"] = _from_config(classes["transformer"], saved / "transformer").eval()
        load_checkpoint_weights(components["transformer"], checkpoint, use_ema)
    accepted = inspect.signature(ClassConditionalPipeline).parameters.keys() - components.keys()
    settings = {name: index[name] for name in accepted & index.keys() if not is_component(index[name])}
    return ClassConditionalPipeline(**components, **settings)


def _text_to_image(checkpoint: Path, arguments: Mapping[str, Any], use_ema: bool) -> Callable[[Path], Any]:
    """What saves the trained part of a text-to-image pipeline, as its method does, with the weights of the checkpoint."""
    own = {name: value for name, value in arguments.items() if name not in OF_ONE_COMMAND}
    args = TextToImageArguments(**own | {"sample_steps": 0, "validation_prompts": []})
    trained = prepare_model(args, torch.float32)
    load_checkpoint_weights(trained.model, checkpoint, use_ema)
    assert trained.recipe.save_to is not None  # all methods have it
    return functools.partial(trained.recipe.save_to, trained.model)


def _experts(checkpoint: Path, arguments: Mapping[str, Any], use_ema: bool) -> GuidanceExperts:
    """All experts: this checkpoint's, and the others' of the same step, or as their trainings left them."""
    experts = make_experts(SimpleNamespace(**arguments))
    for expert in range(experts.config.num_experts):
        folder = checkpoint.parent.with_name(f"expert_{expert}")
        student = ExpertStudent(experts, expert)
        if (folder / checkpoint.name).is_dir():
            expect_readable(folder / checkpoint.name)
            load_checkpoint_weights(student, folder / checkpoint.name, use_ema)
        elif (folder / WEIGHTS_NAME).is_file():
            _load_expert(student, folder / WEIGHTS_NAME)
        else:
            raise ValueError(
                f"Expected {checkpoint.name} or {WEIGHTS_NAME} of every expert, but got neither in {str(folder)!r}."
            )
    return experts.eval()


def _load_expert(student: ExpertStudent, path: Path) -> None:
    """Load what a finished training of one expert left."""
    tensors = {name.replace(".", "/"): tensor for name, tensor in read_safetensors(path).items()}
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected {str(path)!r} to hold the weights of this expert, but got {reason}") from error
    expect_finite_weights(tensors, path)


def load_checkpoint_weights(module: nn.Module, checkpoint: Path, use_ema: bool) -> None:
    """
    Load what a checkpoint holds of the trained module.

    Args:
        module (`nn.Module`): As it was trained.
        checkpoint (`Path`): The folder.
        use_ema (`bool`): Load the averaged weights over it, if there are any.

    Raises:
        ValueError: if the weights are missing, cannot be read or are those of another module.
    """
    path = checkpoint / MODEL_NAME
    try:
        module.load_state_dict({_without_wrappers(name): tensor for name, tensor in read_safetensors(path).items()})
        average = _average(checkpoint) if use_ema else None
    except Exception as error:  # of safetensors, pickle and PyTorch, which have no class in common
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected {str(checkpoint)!r} to hold the weights of a {type(module).__name__}, but got {reason}"
        ) from error
    if average is not None:
        parameters = list(module.parameters())
        if [parameter.shape for parameter in parameters] != [tensor.shape for tensor in average]:
            raise ValueError(f"Expected the averaged weights in {str(checkpoint)!r} to fit, but got other shapes.")
        with torch.no_grad():
            for parameter, tensor in zip(parameters, average):
                parameter.copy_(tensor)


def _average(checkpoint: Path) -> list[torch.Tensor] | None:
    """The averaged weights, in the order of the module's parameters; None if the training has none."""
    for path in sorted(checkpoint.glob("custom_checkpoint_*.pkl")):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and "shadow_params" in state:
            return state["shadow_params"]
    return None


def _from_config(class_name: str, folder: Path) -> Any:
    """A new instance from the configuration in a folder."""
    cls = getattr(diffusers, class_name)  # this package's classes too: see hub/registration.py
    return cls.from_config(cls.load_config(folder))


def _without_wrappers(name: str) -> str:
    """A parameter's name without the prefixes that wrappers of the module gave it."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
