"""The data that a training runs on: data sets, class names and the VAE, checked against the arguments and one another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch.utils.data import ConcatDataset, DataLoader, Subset

from ...diffusion.latents import vae_downsampling
from ..arguments import SharedTrainingArguments, TrainingArguments
from ..interruption import ignore_signals
from .batches import training_batches, with_repeats
from .identity import images_identity, weights_digest
from .images import LATENTS, describe_images, load_checked, training_items
from .labels import class_names
from .latents import check_latents, load_vae
from .listing import shorten
from .loop_data import Batch, LoopData
from .workers import choose_workers, num_bytes_of

VALIDATION_BATCH_SIZE = 64


@dataclass(kw_only=True)
class TrainingData(LoopData):
    """
    Images, with or without labels, or latents of them.

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

    def num_samples(self, args: Any) -> int:
        """See [`LoopData`]."""
        return len(with_repeats(self.dataset, args))

    def training_batches(self, accelerator: Accelerator, args: Any, first_step: int) -> Iterator[Batch]:
        """See [`LoopData`]."""
        return training_batches(accelerator, args, self.dataset, first_step)

    def num_validation_samples(self, args: Any) -> int:
        """See [`LoopData`]."""
        return 0 if self.validation is None else len(self.validation) * args.validation_repeats

    def validation_batches(self, accelerator: Accelerator, args: Any) -> Iterator[tuple[list[int], Batch]]:
        """See [`LoopData`]."""
        items = training_items(self.validation, args)
        own = range(accelerator.process_index, self.num_validation_samples(args), accelerator.num_processes)
        batch_bytes = VALIDATION_BATCH_SIZE * num_bytes_of(items[0])
        loader: DataLoader[Batch] = DataLoader(
            Subset(ConcatDataset([items] * args.validation_repeats), own),
            VALIDATION_BATCH_SIZE,
            num_workers=choose_workers(args.dataloader_num_workers, accelerator.device, batch_bytes),
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # without one, the loader would change the global random state
        )
        for number, batch in enumerate(loader):
            yield list(own[number * VALIDATION_BATCH_SIZE :][:VALIDATION_BATCH_SIZE]), batch

    def identity(self, args: Any) -> dict[str, Any]:
        """See [`LoopData`]."""
        images = images_identity(self.dataset, args.label_column, args.image_column)
        return {
            "images": images.pop("images"),
            "classes": self.label_names,
            **images,
            "weights of the VAE": None if self.vae is None else weights_digest(self.vae),
        }

    def validation_identity(self, args: Any) -> dict[str, Any]:
        """See [`LoopData`]."""
        if self.validation is None:
            return {}
        return {
            **images_identity(self.validation, args.label_column, args.image_column),
            "split": args.validation_split,
            "repeats": args.validation_repeats,
        }

    def describe(self) -> str:
        """See [`LoopData`]."""
        return describe_images(self.dataset, label_column=None)  # its classes are said already

    def describe_validation(self) -> str:
        """See [`LoopData`]."""
        return "none" if self.validation is None else describe_images(self.validation, label_column=None)

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
    is_quiet = not accelerator.is_main_process
    with accelerator.main_process_first():  # the other processes then read its cache
        dataset = load_checked(args, args.dataset, args.dataset_split, is_quiet)
        if args.validation_dataset is not None:
            validation = load_checked(args, args.validation_dataset, args.validation_split, is_quiet)
    label_names = class_names(dataset, args.label_column)
    channels = args.image_channels if vae is None else vae.config.latent_channels
    sample_size = args.image_size // vae_downsampling(vae)
    sample_shape = (channels, sample_size, sample_size)
    fitting = {"image_fit": args.image_fit, "background": args.background}
    check_latents(dataset, args.dataset, vae, sample_shape, fitting)
    if args.color_jitter and LATENTS in dataset.column_names:
        raise ValueError(f"Expected `color_jitter` to be 0 for latents, but got {args.color_jitter}.")
    if validation is not None and args.validation_dataset is not None:
        check_latents(validation, args.validation_dataset, vae, sample_shape, fitting)
        check_validation_classes(validation, args.label_column, label_names)
    return TrainingData(
        dataset=dataset, sample_shape=sample_shape, label_names=label_names, vae=vae, validation=validation
    )


def check_validation_classes(validation: datasets.Dataset, label_column: str, label_names: list[str] | None) -> None:
    """
    Check that held-out images have the training's classes, in the same order.

    Args:
        validation (`datasets.Dataset`): The held-out images. Where their labels are plain integers, some may be missing.
        label_column (`str`): The column of labels.
        label_names (`list[str]`, *optional*): The names of the training's classes; None for unconditional training.

    Raises:
        ValueError: if they have others; those that differ are named.
    """
    names = class_names(validation, label_column)
    if names == label_names:
        return
    if names is None or label_names is None:
        what = ["no labels" if each is None else f"{len(each)} classes" for each in (label_names, names)]
        raise ValueError(f"Expected `validation_dataset` to have {what[0]}, as `dataset` has, but got {what[1]}.")
    is_integer = not isinstance(validation.features[label_column], datasets.ClassLabel)
    if is_integer and names == label_names[: len(names)]:
        return
    missing, unknown = (
        [name for name in one if name not in set(other)] for one, other in ((label_names, names), (names, label_names))
    )
    if not missing and not unknown:
        raise ValueError(
            f"Expected `validation_dataset` to have the classes in the order of `dataset`, {shorten(label_names)}, but "
            f"got {shorten(names)}."
        )
    raise ValueError(
        f"Expected `validation_dataset` to have the {len(label_names)} classes of `dataset`, but got {len(names)}; "
        f"missing: {shorten(missing) or 'none'}; unknown: {shorten(unknown) or 'none'}."
    )
