"""What the entry points of the DiT family share: data, model, and off to the trainer."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DiffusionPipeline

from ..conversion import convert_checkpoint, load_original_state_dict
from ..diffusion.latents import vae_downsampling
from ..models import DiTModel, DTRTransformer2DModel, RemixDiTModel
from ..models.dit.stock_layout import STOCK_CLASSES
from .arguments import DiTTrainingArguments, TrainingArguments
from .data.images import class_names, load_images
from .data.latents import check_latents
from .recipe import TrainingRecipe
from .trainer import make_accelerator, train


def train_dit(
    model_class: type[DiTModel],
    args: DiTTrainingArguments,
    make_recipe: Callable[[DiTModel], TrainingRecipe] = lambda model: TrainingRecipe(),
    **config: Any,
) -> None:
    """
    Train a new model of `model_class`, or `args.pretrained_model_name_or_path` further.

    Args:
        model_class: [`DiTModel`] or a subclass.
        args ([`DiTTrainingArguments`]): Everything that can be set.
        make_recipe (`Callable[[DiTModel], TrainingRecipe]`): What the system trains differently.
        config: The subclass's own arguments of the constructor.

    Raises:
        ValueError: if the data set cannot be read, or the arguments do not fit it or one another.
    """
    accelerator = make_accelerator(args)
    data = load_training_data(accelerator, args)
    config |= data.config
    if args.pretrained_model_name_or_path is not None:
        sizes = {} if args.preset is None else model_class.preset_config(args.preset)
        model = load_pretrained(model_class, args.pretrained_model_name_or_path, config | sizes)
    else:
        model = new_model(model_class, args, config)
    train(accelerator, args, model, recipe=make_recipe(model), **data.for_training)
    accelerator.end_training()


@dataclass(kw_only=True)
class TrainingData:
    """
    Args:
        dataset, validation (`datasets.Dataset`): As [`load_images`] returns them, the second one optional.
        label_names (`list[str]`, *optional*): The classes' names; None for unconditional training.
        vae (`AutoencoderKL`, *optional*): To train on its latents.
        config (`dict[str, Any]`): See [`data_config`].
    """

    dataset: datasets.Dataset
    validation: datasets.Dataset | None
    label_names: list[str] | None
    vae: AutoencoderKL | None
    config: dict[str, Any]

    @property
    def for_training(self) -> dict[str, Any]:
        """What [`train`] is handed of it."""
        return {name: getattr(self, name) for name in ("dataset", "validation", "label_names", "vae")}


def load_training_data(accelerator: Accelerator, args: TrainingArguments) -> TrainingData:
    """
    What is trained on, and the seed of everything random set.

    Raises:
        ValueError: if a data set cannot be read, or does not fit the arguments or the other one.
    """
    set_seed(args.seed)  # of the weights, and of the model's own dropout
    vae = None
    if args.vae is not None:
        vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).eval()
    validation = None
    with accelerator.main_process_first():  # the others then find its cache
        dataset = load_images(args.dataset, args.image_column, args.dataset_split)
        if args.validation_dataset is not None:
            validation = load_images(args.validation_dataset, args.image_column, args.validation_split)
    label_names = class_names(dataset, args.label_column)
    config = data_config(args, label_names, vae)
    latent_shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    check_latents(dataset, args.dataset, vae, latent_shape)
    if validation is not None:
        check_latents(validation, args.validation_dataset, vae, latent_shape)
        validation_names = class_names(validation, args.label_column)
        if validation_names != label_names:
            raise ValueError(
                f"Expected `validation_dataset` to have the classes {label_names}, but got {validation_names}."
            )
    return TrainingData(dataset=dataset, validation=validation, label_names=label_names, vae=vae, config=config)


def data_config(args: TrainingArguments, label_names: list[str] | None, vae: AutoencoderKL | None) -> dict[str, Any]:
    """The model's arguments that the data and the diffusion process decide: channels, pixels, classes, timesteps."""
    channels = args.image_channels if vae is None else vae.config.latent_channels
    return {
        "in_channels": channels,
        "out_channels": channels * (2 if args.learn_sigma else 1),
        "sample_size": args.image_size // vae_downsampling(vae),
        "num_train_timesteps": args.num_train_timesteps,
        "num_classes": len(label_names) if label_names else 1,
    }


def load_pretrained(model_class: type[DiTModel], name_or_path: str, config: dict[str, Any]) -> DiTModel:
    """
    The model in a folder or Hub repository of its own, in that of a pipeline, or (a DiT) in an original checkpoint's
    file. A class that has a `from_dit` is made from a DiT as well.

    Raises:
        ValueError: if it is of another class, or its configuration is not what `config` asks for.
    """
    model = load_dit_family(name_or_path)
    if type(model) is not model_class:
        if type(model) is not DiTModel or not hasattr(model_class, "from_dit"):
            raise ValueError(
                f"Expected `pretrained_model_name_or_path` to be a {model_class.__name__}, "
                f"but got a {type(model).__name__} in {name_or_path!r}."
            )
        check_config(model, name_or_path, {name: value for name, value in config.items() if name in model.config})
        model = model_class.from_dit(model, **{name: config[name] for name in config if name not in model.config})
    check_config(model, name_or_path, config)
    return model


def load_dit_family(name_or_path: str) -> DiTModel:
    """
    What is there, of whatever class of the family.

    Raises:
        ValueError: if it is none of them.
    """
    if os.path.isfile(name_or_path):
        return convert_checkpoint("dit", load_original_state_dict(name_or_path))
    try:
        is_pipeline = "transformer" in DiffusionPipeline.load_config(name_or_path)
    except OSError:  # no model_index.json
        is_pipeline = False
    subfolder = "transformer" if is_pipeline else None
    saved_class = DiTModel.load_config(name_or_path, subfolder=subfolder)["_class_name"]
    classes = {cls.__name__: cls for cls in (DiTModel, DTRTransformer2DModel, RemixDiTModel)}
    classes |= dict.fromkeys(STOCK_CLASSES, DiTModel)
    if saved_class not in classes:
        raise ValueError(
            f"Expected `pretrained_model_name_or_path` to be one of {', '.join(classes)}, "
            f"but got a {saved_class} in {name_or_path!r}."
        )
    return classes[saved_class].from_pretrained(name_or_path, subfolder=subfolder)


def check_config(model: DiTModel, name_or_path: str, config: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if the model's configuration is not what `config` asks for.
    """
    for name, value in config.items():
        own = model.out_channels if name == "out_channels" else model.config[name]
        if own != value:
            raise ValueError(
                f"Expected `pretrained_model_name_or_path` to have the `{name}` {value} of data and arguments, "
                f"but got {own} in {name_or_path!r}."
            )


def new_model(model_class: type[DiTModel], args: DiTTrainingArguments, config: dict[str, Any]) -> DiTModel:
    """A model of the size asked for."""
    config = config | {"class_dropout_prob": args.class_dropout_prob if config["num_classes"] > 1 else 0.0}
    if args.preset is not None:
        return model_class.from_preset(args.preset, **config)
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
    return model_class(**{name: getattr(args, name) for name in sizes}, **config)
