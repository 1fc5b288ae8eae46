"""Guidance experts (PPAP) in training: how they are made from the arguments, and saved one by one and together."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..diffusion.process import NoiseProcess
from ..guidance import GuidanceExperts
from ..intervals import NoiseIntervals
from ..models.vision import load_network, processor_settings
from ..saving.weight_files import read_safetensors
from ..saving.whole import written_whole
from .arguments import BoundaryArguments
from .objectives.from_arguments import noise_record
from .resources import explained_disk_errors
from .summary import TrainingSummary

WEIGHTS_NAME = "expert.safetensors"


def make_experts(args: Any) -> GuidanceExperts:
    """
    Make untrained experts, which are still equal to the network itself.

    Args:
        args: The arguments of a training, of this version or an older one.

    Raises:
        ValueError: if `base_model` is no network that can guide, or it is not known how it wants its images; see also
            [`expert_intervals`].
    """
    intervals = expert_intervals(args)
    settings = {
        "num_experts": intervals.num_experts,
        "num_train_timesteps": intervals.num_train_timesteps,
        "interval_edges": intervals.to_config(),
        "method": args.method,
        "rank": args.rank,
        "lora_alpha": args.lora_alpha,
        "target_modules": args.target_modules or None,
        "noise_schedule": noise_record(args),
        "sample_size": [args.image_size, args.image_size],
    }
    try:
        network = load_network(args.base_model)
    except (OSError, ValueError) as error:
        raise _wrong_network(args.base_model, str(error)) from error
    # a classifier, a depth or segmentation model, which transformers calls …For…, or an image tower, …VisionModel…
    predicts = any(word in type(network).__name__ for word in ("For", "VisionModel"))
    if network.main_input_name != "pixel_values" or not predicts:
        raise _wrong_network(args.base_model, f"a {type(network).__name__} does not predict anything of images.")
    try:
        settings |= _image_settings(args)
        return GuidanceExperts(network, base_model_name_or_path=args.base_model, **settings)
    except ValueError as error:
        raise _wrong_network(args.base_model, str(error)) from error


def expert_intervals(args: Any) -> NoiseIntervals:
    """
    Return the intervals of the experts.

    Args:
        args: The arguments of a training, of this version or an older one, which has their number alone.

    Raises:
        ValueError: if there is no such noise, or the boundaries do not fit it.
    """
    names = [field.name for field in fields(BoundaryArguments)]
    boundaries = BoundaryArguments(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    return boundaries.intervals(NoiseProcess.from_record(noise_record(args)).scheduler)


def _image_settings(args: Any) -> dict[str, Any]:
    """How the network wants its images: as the arguments say, or else its image processor."""
    size = getattr(args, "image_processor_size", None) or getattr(args, "network_image_size", None)  # up to 0.2
    settings = {"image_size": size} | {name: getattr(args, name, None) for name in ("image_mean", "image_std")}
    given = {name: value for name, value in settings.items() if value}
    if given.keys() == settings.keys():
        return given
    try:
        return processor_settings(args.base_model) | given
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            "its preprocessor_config.json is missing or does not say enough; give `image_mean`, `image_std` and "
            f"`image_processor_size` in its place ({error})."
        ) from error


def _wrong_network(base_model: str, reason: str) -> ValueError:
    return ValueError(
        "Expected `base_model` to be the folder or Hub id of a vision model of transformers, a classifier, depth or "
        f"segmentation model, CLIP or SigLIP, but got {base_model!r}: {reason}"
    )


def save_expert(experts: GuidanceExperts, expert: int, folder: Path) -> None:
    """Write the tensors of one expert."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in experts.expert_tensors(expert).items()}
    path = folder / WEIGHTS_NAME
    with explained_disk_errors(path), written_whole(path) as unfinished:
        save_file(tensors, unfinished)


def save_together(experts: GuidanceExperts, folders: Sequence[Path], output_dir: Path) -> None:
    """Save all experts together, and a summary of their trainings, which may have been separate runs."""
    experts.load_expert_tensors(
        {
            f"expert_{expert}.{name}": tensor
            for expert, folder in enumerate(folders)
            for name, tensor in read_safetensors(folder / WEIGHTS_NAME).items()
        }
    )
    path = output_dir / "experts"
    with explained_disk_errors(path), written_whole(path) as unfinished:
        experts.save_pretrained(unfinished)
    TrainingSummary.of_experts(folders).save(output_dir)
