"""Trainings of the DiT family: a new model, or one from a pretrained model, pipeline or original checkpoint."""

import logging
import os
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline

from ..conversion.original import convert_file
from ..models import DiTModel, DTRTransformer2DModel, RemixDiTModel
from ..models.dit.stock_layout import STOCK_CLASSES
from ..saving.finite import expect_finite_weights
from ..saving.weight_files import check_saved_folder
from .arguments import DiTTrainingArguments, model_arguments
from .base_schedule import check_base_process, check_base_schedule, take_base_shift
from .data.training_data import TrainingData, load_training_data
from .objectives.from_arguments import make_objective
from .recipe import TrainingRecipe
from .run import Publisher
from .trainer import make_accelerator, train

logger = logging.getLogger(__name__)


def train_dit(
    model_class: type[DiTModel],
    args: DiTTrainingArguments,
    make_recipe: Callable[[DiTModel], TrainingRecipe] = lambda model: TrainingRecipe(),
    publisher: Publisher | None = None,
) -> None:
    """
    Train a new model of `model_class`, or `args.pretrained_model_name_or_path` further.

    Args:
        model_class (`type`): [`DiTModel`] or a subclass.
        args ([`DiTTrainingArguments`]): Everything that can be set; a subclass has the fields of the arguments that the
            model's constructor has beside those of a DiT.
        make_recipe (`Callable[[DiTModel], TrainingRecipe]`): From the model to what the system trains differently.
        publisher ([`Publisher`], *optional*): See [`train`].

    Raises:
        ValueError: if the data set cannot be read, or if the arguments do not fit it or one another.
    """
    accelerator = make_accelerator(args)
    data = load_training_data(accelerator, args)
    model = make_model(model_class, args, data)
    objective = make_objective(args, model, in_latents=data.vae is not None)
    train(accelerator, args, model, objective, data, make_recipe(model), publisher)
    accelerator.end_training()


def make_model(model_class: type[DiTModel], args: DiTTrainingArguments, data: TrainingData) -> DiTModel:
    """
    The model that the training starts from: a new one, or `args.pretrained_model_name_or_path`.

    Args:
        model_class (`type`), args ([`DiTTrainingArguments`]): See [`train_dit`].
        data ([`TrainingData`]): What it is trained on, which decides sizes and classes.

    Raises:
        ValueError: if the pretrained model does not fit the arguments.
    """
    config = data.model_config(args)
    if args.pretrained_model_name_or_path is None:
        return new_model(model_class, args, config)
    check_base_process(args, args.pretrained_model_name_or_path)
    take_base_shift(args, args.pretrained_model_name_or_path)
    sizes = {} if args.preset is None else model_class.preset_config(args.preset)
    own = model_arguments(model_class, args, without=DiTTrainingArguments)
    model = load_pretrained(model_class, args.pretrained_model_name_or_path, own | config | sizes)
    check_base_schedule(args, model, args.pretrained_model_name_or_path, data.vae)
    return model


def new_model(model_class: type[DiTModel], args: DiTTrainingArguments, config: dict[str, Any]) -> DiTModel:
    """
    A new model of the size that the arguments ask for.

    Args:
        model_class (`type`): [`DiTModel`] or a subclass.
        args ([`DiTTrainingArguments`]): For all arguments of the constructor that they have fields for.
        config (`dict[str, Any]`): The arguments that the data decide, which win.
    """
    if config["num_classes"] <= 1:  # nothing to drop
        config = config | {"class_dropout_prob": 0.0}
    if args.preset is None:
        return model_class(**model_arguments(model_class, args) | config)
    own = model_arguments(model_class, args, without=DiTTrainingArguments)
    return model_class.from_preset(args.preset, **{"class_dropout_prob": args.class_dropout_prob} | own | config)


def load_pretrained(model_class: type[DiTModel], name_or_path: str, config: dict[str, Any]) -> DiTModel:
    """
    Load a pretrained model of a class; a class with a `from_dit` can be made from a plain DiT as well.

    Args:
        model_class (`type`): [`DiTModel`] or a subclass.
        name_or_path (`str`): See [`load_dit_family`].
        config (`dict[str, Any]`): Arguments of the constructor that its configuration must have.

    Raises:
        ValueError: if it is of another class, or if its configuration is another.
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
    Load a pretrained model of any class of the DiT family.

    Args:
        name_or_path (`str`): The folder or Hub id of a model or of a pipeline, or the file of an original DiT's checkpoint.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is of a class that does not belong to the family, or damaged, or its weights are not finite.
    """
    check_saved_folder(name_or_path)
    if os.path.isfile(name_or_path):
        return convert_file("dit", name_or_path)
    try:
        pipeline: dict[str, Any] = DiffusionPipeline.load_config(name_or_path)
    except OSError:  # no model_index.json
        pipeline = {}
    is_pipeline = "transformer" in pipeline
    if pipeline.get("prompt_patch") not in (None, [None, None], (None, None)):
        logger.warning("The prompts in %r are left out: only its transformer is loaded.", name_or_path)
    subfolder = "transformer" if is_pipeline else None
    saved_class = DiTModel.load_config(name_or_path, subfolder=subfolder)["_class_name"]
    classes = {cls.__name__: cls for cls in (DiTModel, DTRTransformer2DModel, RemixDiTModel)}
    classes |= dict.fromkeys(STOCK_CLASSES, DiTModel)
    if saved_class not in classes:
        raise ValueError(
            f"Expected `pretrained_model_name_or_path` to be one of {', '.join(classes)}, "
            f"but got a {saved_class} in {name_or_path!r}."
        )
    model = classes[saved_class].from_pretrained(name_or_path, subfolder=subfolder)
    expect_finite_weights(model, name_or_path)
    return model


def check_config(model: DiTModel, name_or_path: str, config: dict[str, Any]) -> None:
    """
    Check a pretrained model's configuration.

    Args:
        model ([`DiTModel`]): The model.
        name_or_path (`str`): Where it is from, for the error.
        config (`dict[str, Any]`): Arguments of the constructor that its configuration must have.

    Raises:
        ValueError: if its configuration is another.
    """
    for name, value in config.items():
        own = model.out_channels if name == "out_channels" else model.config[name]
        if own != value:
            raise ValueError(
                f"Expected `pretrained_model_name_or_path` to have the `{name}` {value} of data and arguments, "
                f"but got {own} in {name_or_path!r}."
            )
