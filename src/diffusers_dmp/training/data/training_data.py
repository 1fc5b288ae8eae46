"""The data that a training runs on: data sets, class names and the VAE, checked against the arguments and one another."""

from dataclasses import dataclass
from typing import Any

import datasets
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from ...diffusion.latents import vae_downsampling
from ..arguments import SharedTrainingArguments, TrainingArguments
from .images import class_names, load_images
from .latents import check_latents, load_vae


@dataclass(kw_only=True)
class TrainingData:
    """
    What a training runs on.

    Args:
        dataset (`datasets.Dataset`): The training images, as [`load_images`] returns them.
        sample_shape (`tuple[int, ...]`): The shape of one sample that the model learns, (C, S, S): channels and size of
            the images, or of their latents.
        label_names (`list[str]`, *optional*): The names of the classes; None for unconditional training.
        vae ([`AutoencoderKL`], *optional*): Frozen, for training on its latents.
        validation (`datasets.Dataset`, *optional*): Held-out images, as [`load_images`] returns them.
    """

    dataset: datasets.Dataset
    sample_shape: tuple[int, ...]
    label_names: list[str] | None = None
    vae: AutoencoderKL | None = None
    validation: datasets.Dataset | None = None

    def model_config(self, args: TrainingArguments) -> dict[str, Any]:
        """The arguments of a model's constructor that the data decide: channels, size and number of classes."""
        channels, size = self.sample_shape[:2]
        return {
            "in_channels": channels,
            "out_channels": channels * (2 if args.learn_sigma else 1),
            "sample_size": size,
            "num_train_timesteps": args.num_train_timesteps,
            "num_classes": len(self.label_names) if self.label_names else 1,
        }


def load_training_data(accelerator: Accelerator, args: SharedTrainingArguments) -> TrainingData:
    """
    Load what a training runs on, and set the seed of all global random states.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        args ([`SharedTrainingArguments`]): Names the data sets, their columns and the VAE.

    Raises:
        ValueError: if a data set cannot be read, or does not fit the arguments or the other data set.
    """
    set_seed(args.seed)  # for the new weights, and the model's own dropout
    vae = None
    if args.vae is not None:
        vae = load_vae(args.vae)
    validation = None
    with accelerator.main_process_first():  # the other processes then read its cache
        dataset = load_images(args.dataset, args.image_column, args.dataset_split)
        if args.validation_dataset is not None:
            validation = load_images(args.validation_dataset, args.image_column, args.validation_split)
    label_names = class_names(dataset, args.label_column)
    channels = args.image_channels if vae is None else vae.config.latent_channels
    sample_size = args.image_size // vae_downsampling(vae)
    sample_shape = (channels, sample_size, sample_size)
    check_latents(dataset, args.dataset, vae, sample_shape)
    if validation is not None and args.validation_dataset is not None:
        check_latents(validation, args.validation_dataset, vae, sample_shape)
        validation_names = class_names(validation, args.label_column)
        if validation_names != label_names:
            raise ValueError(
                f"Expected `validation_dataset` to have the classes {label_names}, but got {validation_names}."
            )
    return TrainingData(
        dataset=dataset, sample_shape=sample_shape, label_names=label_names, vae=vae, validation=validation
    )
