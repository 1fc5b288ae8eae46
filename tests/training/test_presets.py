"""The digits presets' first losses stay what they are."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from runs import logged

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.dit_family import train_dit
from diffusers_dmp.training.parsing import parse_arguments

PRESETS = REPOSITORY / "training" / "presets"
# Of three steps each, on the images of the fixture `digits`, from version 0.1.0.
LOSSES = {
    "dit_digits": {".": [0.978995, 0.966807, 0.953561]},
    "dtr_digits": {".": [0.978995, 0.966807, 0.953672]},
    "dit_digits_unconditional": {".": [0.978995, 0.967856, 0.956706]},
    "patch_digits": {"expert_0": [7.19929, 20.1286, 22.0917], "expert_1": [0.0951018, 0.116061, 0.0996562]},
    "patch_digits_one": {".": [31.9535, 4.06228, 3.81356]},
    "remix_digits": {".": [0.824137, 0.877216, 0.975529]},
    "dmp_digits": {".": [0.878454, 0.925993, 0.944607]},
}


def train_preset(preset: str, digits: Path, output_dir: Path, **arguments) -> dict[str, list[float]]:
    """Three steps of a preset. Returns the losses by folder of the training."""
    from train_dmp import DMPTrainingArguments, train_dmp
    from train_dtr import DTRTrainingArguments
    from train_patch_diffusion import PatchDiffusionTrainingArguments, train_patch_diffusion
    from train_remix import RemixTrainingArguments, train_remix

    systems = {
        "dit": (DiTTrainingArguments, lambda args: train_dit(DiTModel, args)),
        "dtr": (DTRTrainingArguments, lambda args: train_dit(DTRTransformer2DModel, args)),
        "remix": (RemixTrainingArguments, train_remix),
        "dmp": (DMPTrainingArguments, train_dmp),
        "patch": (PatchDiffusionTrainingArguments, train_patch_diffusion),
    }
    arguments_class, train = systems[preset.split("_")[0]]
    AcceleratorState._reset_state(reset_partial_state=True)
    command_line = ["--config", str(PRESETS / f"{preset}.yaml")]
    arguments |= {"dataset": digits, "output_dir": output_dir, "max_train_steps": 3, "logging_steps": 1}
    for name, value in arguments.items():
        command_line += [f"--{name}", str(value)]
    train(parse_arguments(arguments_class, command_line))
    folders = sorted(path.parent for path in output_dir.rglob("logs"))
    return {folder.relative_to(output_dir).as_posix(): list(logged(folder, "loss").values()) for folder in folders}


@pytest.fixture(scope="module")
def dit_run(digits, tmp_path_factory) -> Path:
    """Three steps of the preset that others start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "training"))
        output_dir = tmp_path_factory.mktemp("dit")
        train_preset("dit_digits", digits, output_dir)
    return output_dir


@pytest.mark.parametrize("preset", LOSSES)
def test_the_losses_of_a_preset_stay(preset, digits, dit_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    arguments = {}
    if preset in ("remix_digits", "dmp_digits"):
        arguments["pretrained_model_name_or_path"] = dit_run / "pipeline"
    if preset == "dmp_digits":
        arguments |= {"validation_dataset": digits, "validation_repeats": 1}
    losses = train_preset(preset, digits, tmp_path, **arguments)
    assert losses.keys() == LOSSES[preset].keys()
    for folder, expected in LOSSES[preset].items():
        assert losses[folder] == pytest.approx(expected, rel=1e-4), folder
