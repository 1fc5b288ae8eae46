"""A preset, and a command line that overrides it."""

from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.parsing import parse_arguments
from diffusers_dmp.training.text_to_image import TextToImageArguments


def test_the_command_line_overrides_the_preset(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("learning_rate: 2e-3\nbatch_size: 8\nvae: some/vae\nrandom_flip: false\n")
    args = parse_arguments(
        DiTTrainingArguments, ["--config", str(preset), "--batch_size", "16", "--random_flip", "true"]
    )
    assert (args.learning_rate, args.batch_size, args.vae, args.random_flip) == (2e-3, 16, "some/vae", True)
    assert args.weight_decay == 0.0  # neither


def test_what_yaml_makes_of_no(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("mixed_precision: no\n")
    assert parse_arguments(DiTTrainingArguments, ["--config", str(preset)]).mixed_precision == "no"
    preset.write_text("# nothing\n")
    assert parse_arguments(DiTTrainingArguments, ["--config", str(preset)]) == DiTTrainingArguments()


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("logging_steps", 0),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
        ("num_train_timesteps", 1),
        ("ema_decay", 1.0),
        ("pipeline_steps", -1),
        ("sample_steps", -1),
        ("report_to", "paper"),
    ],
)
def test_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        DiTTrainingArguments(**{name: value})


def test_an_unknown_argument_lists_the_valid_ones(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("learning_rat: 2e-3\n")
    with pytest.raises(ValueError, match="learning_rate, .*got learning_rat"):
        parse_arguments(DiTTrainingArguments, ["--config", str(preset)])


@pytest.mark.parametrize(
    "preset", sorted(Path(REPOSITORY, "training", "presets").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_preset_parses(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in yaml.safe_load(preset.read_text()).values():
        if str(value).startswith("outputs/"):  # of the demos; a folder that is missing is refused
            (tmp_path / value).mkdir(parents=True, exist_ok=True)
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_dmp import DMPTrainingArguments
    from train_dtr import DTRTrainingArguments
    from train_patch_diffusion import PatchDiffusionTrainingArguments
    from train_ppap import PPAPTrainingArguments
    from train_remix import RemixTrainingArguments

    arguments = {
        "dit": DiTTrainingArguments,
        "dtr": DTRTrainingArguments,
        "remix": RemixTrainingArguments,
        "dmp": DMPTrainingArguments,
        "patch": PatchDiffusionTrainingArguments,
        "ppap": PPAPTrainingArguments,
        **dict.fromkeys(["sd3", "flux", "wan22", "sdxl", "text"], TextToImageArguments),
    }
    args = parse_arguments(arguments[preset.stem.split("_")[0]], ["--config", str(preset)])
    for name, value in yaml.safe_load(preset.read_text()).items():
        assert getattr(args, name) == value


def test_the_arguments_that_an_older_ppap_training_saved(tmp_path, monkeypatch):
    """They have fields that never had an effect."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_ppap import PPAPTrainingArguments

    preset = tmp_path / "training_arguments.yaml"
    preset.write_text("base_model: resnet\nlearn_sigma: false\nweighting: constant\nnum_experts: 3\n")
    with pytest.warns(
        FutureWarning, match="`(learn_sigma|weighting)` in .*training_arguments.yaml never had an effect"
    ):
        args = parse_arguments(PPAPTrainingArguments, ["--config", str(preset)])
    assert args.num_experts == 3


def test_a_preset_by_its_name():
    named = parse_arguments(DiTTrainingArguments, ["--config", "dit_rgb32", "--dataset", "user/images"])
    path = str(REPOSITORY / "training" / "presets" / "dit_rgb32.yaml")
    assert named == parse_arguments(DiTTrainingArguments, ["--config", path, "--dataset", "user/images"])
    assert (named.image_size, named.image_channels) == (32, 3)
    with pytest.raises(ValueError, match="a YAML file, or one of .*dit_rgb32, .*, but got 'dit_rgb31'"):
        parse_arguments(DiTTrainingArguments, ["--config", "dit_rgb31"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- batch_size", "to hold a YAML mapping, but got list"),
        ("batch_size: [8]", r"`batch_size` in .* to be int, but got \[8\]"),
        ("random_flip: 3", "`random_flip` in .* to be bool, but got 3"),
        ("batch_size: some", "argument --batch_size.*: invalid int value: 'some'"),
    ],
)
def test_a_preset_of_other_types(tmp_path, content, message):
    preset = tmp_path / "preset.yaml"
    preset.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_arguments(DiTTrainingArguments, ["--config", str(preset)])
    preset.write_text("learning_rate: 1e-4")  # a string, for YAML
    assert parse_arguments(DiTTrainingArguments, ["--config", str(preset)]).learning_rate == 1e-4


def test_a_mistyped_argument():
    with pytest.raises(ValueError, match="Expected known arguments, but got --datset here; did you mean --dataset?"):
        parse_arguments(DiTTrainingArguments, ["--datset", "here"])
    with pytest.raises(ValueError, match="got --conf"):  # no abbreviation: it would be no preset
        parse_arguments(DiTTrainingArguments, ["--conf", "dit_rgb32"])


def test_what_the_objective_decides_may_be_given(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("objective: flow\nlearn_sigma: false\nshift: 3\n")
    args = parse_arguments(DiTTrainingArguments, ["--config", str(preset), "--density", "mode"])
    assert (args.prediction_type, args.learn_sigma, args.shift) == ("flow_prediction", False, "3.0")
    args = parse_arguments(DiTTrainingArguments, ["--learn_sigma", "false", "--prediction_type", "sample"])
    assert (args.objective, args.prediction_type, args.learn_sigma) == ("ddpm", "sample", False)
