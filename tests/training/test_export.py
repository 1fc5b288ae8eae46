"""A pipeline of a checkpoint is the one that the training itself would have saved then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from diffusers import DiffusionPipeline
from networks import make_resnet
from runs import TINY
from safetensors.torch import load_file

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.evaluation.digits import write_image_folder
from diffusers_dmp.training.export import export_checkpoint

TINY_RUN = TINY | {
    "num_layers": 1, "batch_size": 8, "max_train_steps": 2, "checkpointing_steps": 1, "report_to": "none", "ema_decay": 0.9,
    "checkpoints_total_limit": 2,
}  # fmt: skip
UNET = {
    "patch_size": 2, "model_channels": 32, "channel_multipliers": [1], "layers_per_block": 1, "attention_levels": [],
    "attention_head_dim": 16, "snr_boundaries": [0.25], "expert": 1,
}  # fmt: skip
NETWORK = {"image_mean": [0.5], "image_std": [0.5], "image_processor_size": 32, "rank": 2, "num_experts": 2}
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("digits"), range(0, 300, 9))


@pytest.fixture
def run(few_digits, monkeypatch):
    """Train a system for two steps in this process, with a data set that is gone afterwards."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    import train_dmp
    import train_dtr
    import train_patch_diffusion
    import train_ppap
    import train_remix

    from diffusers_dmp import DiTModel, DTRTransformer2DModel
    from diffusers_dmp.training.arguments import DiTTrainingArguments
    from diffusers_dmp.training.dit_family import train_dit

    systems = {
        "dit": (DiTTrainingArguments, lambda args: train_dit(DiTModel, args)),
        "dtr": (train_dtr.DTRTrainingArguments, lambda args: train_dit(DTRTransformer2DModel, args)),
        "remix": (train_remix.RemixTrainingArguments, train_remix.train_remix),
        "dmp": (train_dmp.DMPTrainingArguments, train_dmp.train_dmp),
        "patch": (train_patch_diffusion.PatchDiffusionTrainingArguments, train_patch_diffusion.train_patch_diffusion),
        "ppap": (train_ppap.PPAPTrainingArguments, train_ppap.train_ppap),
    }

    def train(system: str, output_dir: Path, without: tuple[str, ...] = (), **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments_class, function = systems[system]
        dataset = shutil.copytree(few_digits, output_dir.with_name("data"), dirs_exist_ok=True)
        settings = {name: value for name, value in TINY_RUN.items() if name not in without}
        function(arguments_class(**settings | {"dataset": str(dataset), "output_dir": str(output_dir)} | arguments))
        shutil.rmtree(dataset)

    return train


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a pipeline's models, by folder and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.relative_to(folder)}.{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def differing(first: Path, second: Path) -> list[str]:
    tensors, others = saved_weights(first), saved_weights(second)
    assert tensors.keys() == others.keys() and tensors
    return [name for name in tensors if not torch.equal(tensors[name], others[name])]


@pytest.mark.parametrize("system", ["dtr", "remix"])
def test_the_last_checkpoint_is_the_trained_pipeline(run, tmp_path, system):
    run(system, tmp_path / "run")
    export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "last")
    assert not differing(tmp_path / "last", tmp_path / "run" / "pipeline")
    index, trained = (
        json.loads((folder / "model_index.json").read_text())
        for folder in (tmp_path / "last", tmp_path / "run" / "pipeline")
    )
    assert index == trained and index["id2label"]["7"] == "7"
    assert DiffusionPipeline.from_pretrained(tmp_path / "last")(["7"], num_inference_steps=2).images[0].size == (8, 8)

    export_checkpoint(tmp_path / "run" / "checkpoint-1", tmp_path / "first")
    assert differing(tmp_path / "first", tmp_path / "last")
    assert yaml.safe_load((tmp_path / "first" / "training_arguments.yaml").read_text())["max_train_steps"] == 1


def test_the_weights_that_are_not_averaged(run, tmp_path):
    run("dit", tmp_path / "run")
    run("dit", tmp_path / "without", ema_decay=0.0)
    export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "exported", use_ema=False)
    assert not differing(tmp_path / "exported", tmp_path / "without" / "pipeline")
    assert differing(tmp_path / "exported", tmp_path / "run" / "pipeline")


def test_prompts_and_the_model_that_they_are_for(run, tmp_path):
    run("dit", tmp_path / "base")
    base = str(tmp_path / "base" / "pipeline")
    run("dmp", tmp_path / "run", SIZES, pretrained_model_name_or_path=base)
    export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "exported")
    assert not differing(tmp_path / "exported", tmp_path / "run" / "pipeline")


def test_an_expert_of_patch_diffusion(run, tmp_path):
    run("patch", tmp_path / "run", SIZES, **UNET)
    export_checkpoint(tmp_path / "run" / "expert_1" / "checkpoint-2", tmp_path / "exported")
    assert not differing(tmp_path / "exported", tmp_path / "run" / "expert_1" / "pipeline")
    exported = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert exported.transformer.config.snr_interval == [0.25, None]


def test_guidance_experts(run, tmp_path):
    make_resnet(num_channels=1).save_pretrained(tmp_path / "network")  # without a preprocessor_config.json
    run("ppap", tmp_path / "run", (*SIZES, "ema_decay"), base_model=str(tmp_path / "network"), **NETWORK)
    export_checkpoint(tmp_path / "run" / "expert_0" / "checkpoint-2", tmp_path / "exported")
    assert not differing(tmp_path / "exported", tmp_path / "run" / "experts")
    experts = GuidanceExperts.from_pretrained(tmp_path / "exported")
    assert (experts.config.image_size, experts.config.image_mean) == (32, [0.5])

    shutil.rmtree(tmp_path / "run" / "expert_1")
    with pytest.raises(ValueError, match="of every expert, but got neither in '.*expert_1'"):
        export_checkpoint(tmp_path / "run" / "expert_0" / "checkpoint-2", tmp_path / "half")


def test_what_cannot_be_exported(run, tmp_path):
    run("dit", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(ValueError, match="`checkpoint` to be a folder checkpoint-<step>, but got '.*pipeline'"):
        export_checkpoint(tmp_path / "run" / "pipeline", tmp_path / "exported")
    with pytest.raises(ValueError, match="`folder` to be new or empty, but got '.*pipeline'"):
        export_checkpoint(checkpoint, tmp_path / "run" / "pipeline")
    (checkpoint / "model.safetensors").write_bytes(b"half of it")
    with pytest.raises(
        ValueError, match="checkpoint-2 to be a whole checkpoint, but got model.safetensors, which has"
    ):
        export_checkpoint(checkpoint, tmp_path / "exported")
    shutil.rmtree(tmp_path / "run" / "pipeline_config")
    shutil.rmtree(tmp_path / "run" / "pipeline")
    with pytest.raises(ValueError, match="which trainings write since 0.3"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    for folder in (checkpoint, checkpoint.parent):
        (folder / "training_arguments.yaml").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="Expected the training_arguments.yaml of its training"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
