"""Each argument has one spelling in the command line, the evaluator and all trainings."""

import dataclasses
import re

import pytest
import typer
import yaml
from conftest import REPOSITORY

from diffusers_dmp.cli import RENAMED, app
from diffusers_dmp.evaluation.evaluate import EvaluationArguments
from diffusers_dmp.evaluation.sample import SamplingArguments
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.data.generation import GenerationArguments
from diffusers_dmp.training.data.latents import EncodingArguments
from diffusers_dmp.training.parsing import parse_arguments

# What is meant → how it is spelled, and how others would spell it. A prefix may say whose it is: `validation_dataset`.
MEANINGS = {
    "number of denoising steps": ("num_inference_steps", "steps|inference_steps|sampling_steps|num_steps|ddim_steps"),
    "number of images": ("num_images", "images|num_samples|samples|number|n_images|count"),
    "images of each class": ("num_images_per_label", "per_class|num_per_class|images_per_class|samples_per_class"),
    "folder to write": ("output_dir", "output_folder|out_dir|outdir|save_dir|output_path|save_directory"),
    "file to write": ("output", "out|output_file|file"),
    "data set": ("dataset", "data|data_dir|dataset_name|train_data_dir|images_dir"),
    "split of the data set": ("dataset_split", "split|train_split"),
    "column of images": ("image_column", "image_key|images_column|image_field"),
    "column of labels": ("label_column", "class_column|label_key|labels_column"),
    "size of images": ("image_size", "resolution|size|pixels"),
    "images at once": ("batch_size", "train_batch_size|per_device_batch_size|bs"),
    "seed": ("seed", "random_seed|manual_seed"),
    "precision of a computation": ("dtype", "precision|torch_dtype|data_type"),
    "scale of classifier-free guidance": ("guidance_scale", "cfg|cfg_scale|guidance"),
    "scale of guidance by a vision network": ("scale", "vision_scale|strength|gradient_scale"),
    "network or pipeline to start from": ("pretrained_model_name_or_path", "pretrained|init_from|model_name_or_path|ckpt"),
    "number of bands": ("num_bands", "bands"),
    "size of a network's images": ("image_processor_size", "network_image_size|processor_size"),
}  # fmt: skip
TWO_MEANINGS = {"prompt", "prompts", "expert", "experts"}  # one, and a file of many
CLASSES = [EvaluationArguments, SamplingArguments, DiTTrainingArguments, GenerationArguments, EncodingArguments]


def command_line_options() -> dict[str, list[str]]:
    """The options of each command of `diffusers-dmp`."""
    commands = typer.main.get_command(app).commands
    return {
        name: [
            option.lstrip("-") for parameter in command.params for option in parameter.opts if option.startswith("--")
        ]
        for name, command in commands.items()
    }


@pytest.fixture
def argument_classes(monkeypatch) -> list[type]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_dmp import DMPTrainingArguments
    from train_dtr import DTRTrainingArguments
    from train_patch_diffusion import PatchDiffusionTrainingArguments
    from train_ppap import PPAPTrainingArguments
    from train_remix import RemixTrainingArguments

    return [*CLASSES, DMPTrainingArguments, DTRTrainingArguments, PatchDiffusionTrainingArguments, PPAPTrainingArguments,
            RemixTrainingArguments]  # fmt: skip


def test_one_spelling_for_one_meaning(argument_classes):
    used = {option: command for command, options in command_line_options().items() for option in options}
    used |= {field.name: cls.__name__ for cls in argument_classes for field in dataclasses.fields(cls)}
    assert {"num_inference_steps", "guidance_scale", "snr_boundaries", "num_bands"} <= used.keys()
    for name, where in used.items():
        assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name), f"{name} of {where}: words joined by underscores"
        for meaning, (spelling, others) in MEANINGS.items():
            assert not re.fullmatch(others, name), f"{name} of {where}: the {meaning} is spelled {spelling}"
    folded: dict[str, str] = {}
    for name in (
        used.keys() - TWO_MEANINGS
    ):  # num_images and numimages, image_columns and image_column, would be two spellings
        other = folded.setdefault(re.sub(r"s?_|s$", "", name), name)
        assert other == name, f"{name} of {used[name]} and {other} of {used[other]}"


def test_the_spellings_are_used(argument_classes):
    used = {option for options in command_line_options().values() for option in options}
    used |= {field.name for cls in argument_classes for field in dataclasses.fields(cls)}
    assert {spelling for spelling, _ in MEANINGS.values()} <= used


def test_old_names_of_options_are_new_ones_now():
    options = command_line_options()
    for command, renamed in RENAMED.items():
        assert set(renamed.values()) <= set(options[command])
        assert not set(renamed) & set(options[command])


def test_an_old_name_works_with_a_warning(tmp_path):
    command_line = ["--pipeline", "user/pipeline", "--num_samples", "7"]
    with pytest.warns(FutureWarning, match="`--num_samples` is now `--num_images`; the old name works until 0.4"):
        assert parse_arguments(SamplingArguments, command_line).num_images == 7
    with pytest.warns(FutureWarning, match="`num_samples` is now `num_images`"):
        args = SamplingArguments(pipeline="user/pipeline", num_samples=8)
    assert args.num_images == args.num_samples == 8
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump({"pipeline": "user/pipeline", "num_samples": 9}))
    with pytest.warns(FutureWarning, match="`num_samples` is now `num_images`"):
        assert parse_arguments(SamplingArguments, ["--config", str(preset)]).num_images == 9


def test_hyphens_are_understood_everywhere():
    args = parse_arguments(SamplingArguments, ["--pipeline", "user/pipeline", "--num-images", "7"])
    assert args.num_images == 7
