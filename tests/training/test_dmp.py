"""DMP's training: a frozen base, a patch of its own in the pipeline and beside it, and the paper's baselines."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, randomised
from diffusers import AutoencoderKL, DiffusionPipeline
from runs import TINY, launch_script, logged, train_here, weights
from safetensors.torch import load_file

from diffusers_dmp import DiTModel, PromptPatch, RemixDiTModel
from diffusers_dmp.evaluation.digits import TRAINING_IMAGES, VALIDATION_IMAGES, write_image_folder
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.data.images import load_images, to_tensors
from diffusers_dmp.training.data.latents import EncodingArguments, encode_latents
from diffusers_dmp.training.data.training_data import TrainingData
from diffusers_dmp.training.objectives.from_arguments import make_objective, make_scheduler
from diffusers_dmp.training.objectives.objective import NoisedBatch
from diffusers_dmp.training.preparation import prepare_run
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.validation import validation_losses

SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
TINY_DMP = {name: value for name, value in TINY.items() if name not in SIZES}


@pytest.fixture(scope="module")
def base_run(digits, tmp_path_factory) -> Path:
    """Two steps of a plain DiT."""
    output_dir = tmp_path_factory.mktemp("dit")
    train_here(DiTModel, digits, output_dir, max_train_steps=2, ema_decay=0.0)
    return output_dir


@pytest.fixture(scope="module")
def validation_digits(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("validation"), range(30))


@pytest.fixture(scope="module")
def dmp_run(digits, validation_digits, base_run, tmp_path_factory) -> Path:
    """Four steps of a patch for it, as users start them."""
    output_dir = tmp_path_factory.mktemp("dmp")
    launch_dmp(output_dir, digits, base_run, topk=0.5, validation_dataset=validation_digits, ema_decay=0.0)
    return output_dir


def launch_dmp(output_dir: Path, digits: Path, base_run: Path, num_processes: int = 1, **arguments) -> None:
    defaults = TINY_DMP | {"dataset": digits, "pretrained_model_name_or_path": base_run / "pipeline"}
    launch_script("train_dmp.py", output_dir, num_processes, defaults | arguments)


@pytest.fixture
def train_dmp_here(digits, base_run, monkeypatch):
    """The same in this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_dmp import DMPTrainingArguments, train_dmp

    def train(output_dir: Path, **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = TINY_DMP | {"dataset": str(digits), "report_to": "none", "output_dir": str(output_dir)}
        defaults |= {"pretrained_model_name_or_path": str(base_run / "pipeline"), "ema_decay": 0.0}
        train_dmp(DMPTrainingArguments(**defaults | arguments))

    return train


def patch_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "pipeline" / "prompt_patch" / "diffusion_pytorch_model.safetensors")


def summary(output_dir: Path) -> dict:
    return json.loads((output_dir / "training_summary.json").read_text())


def test_from_a_dit_to_a_patched_pipeline(dmp_run, base_run):
    pipeline = DiffusionPipeline.from_pretrained(dmp_run / "pipeline")
    assert pipeline.prompt_patch.transformer is pipeline.transformer
    assert pipeline("7", num_inference_steps=3).images[0].size == (8, 8)
    trained = pipeline.prompt_patch.state_dict()
    assert all(weight.abs().max() > 0 for weight in trained.values())

    alone = PromptPatch.from_pretrained(dmp_run / "patch")
    assert all(torch.equal(weight, trained[name]) for name, weight in alone.state_dict().items())
    assert alone.config.base_model_name_or_path == str(base_run / "pipeline")
    alone.attach(DiffusionPipeline.from_pretrained(base_run / "pipeline").transformer)


def test_the_base_is_saved_as_it_was(dmp_run, base_run):
    base = weights(base_run)
    assert all(torch.equal(weight, base[name]) for name, weight in weights(dmp_run).items())


def test_checkpoints_hold_the_patch_alone(dmp_run):
    (model,) = (dmp_run / "checkpoint-4").glob("model*.safetensors")
    assert {name.removeprefix("patch.") for name in load_file(model)} == set(patch_weights(dmp_run))


def test_the_validation_loss_before_is_the_bases(dmp_run, base_run, validation_digits, train_dmp_here, tmp_path):
    run = summary(dmp_run)
    before = run["before"]["validation_loss"]
    assert run["after"]["validation_loss"] != pytest.approx(before, rel=1e-5)
    # before its first step, fine-tuning has the model without prompts
    train_dmp_here(tmp_path, method="full_finetuning", max_train_steps=1, validation_dataset=str(validation_digits))
    # another computation (new prompts add zeros), in another number of threads: equal up to float32's rounding
    assert summary(tmp_path)["before"]["validation_loss"] == pytest.approx(before, rel=1e-6)


def test_the_validation_loss_is_the_mean_over_all_images(base_run, validation_digits):
    """By its definition: each image noised twice, by its own noise, at timesteps that divide their range evenly."""
    args = TrainingArguments(image_size=8, image_channels=1, validation_repeats=2)
    model = DiTModel.from_pretrained(base_run / "pipeline", subfolder="transformer")
    objective = make_objective(args, model, in_latents=False)
    dataset = load_images(str(validation_digits))
    data = TrainingData(dataset=dataset, validation=dataset, sample_shape=(1, 8, 8))
    run = prepare_run(Accelerator(cpu=True), args, model, objective, data, TrainingRecipe())
    loss = validation_losses(run.parts, args, run.data)["validation_loss"]

    images = to_tensors(dataset, 8, 1)[:]
    x0, labels = torch.stack(images["images"] * 2), torch.tensor(images["class_labels"] * 2)
    timesteps = torch.randperm(60, generator=torch.Generator().manual_seed(0)) * 1000 // 60
    assert sorted(timesteps.tolist()) == [i * 1000 // 60 for i in range(60)]
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1 + i)) for i in range(60)])
    scheduler = make_scheduler(args, in_latents=False)
    with torch.no_grad():
        output = model.eval()(scheduler.add_noise(x0, noise, timesteps), timesteps, class_labels=labels).sample
        losses = objective(output, NoisedBatch(x0, noise, timesteps)).sample_losses
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_validation_loss_on_encoded_latents_is_that_on_images(tmp_path, digits, validation_digits):
    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    arguments = {"image_size": 8, "image_channels": 1, "vae": str(tmp_path / "vae")}
    encode_latents(
        EncodingArguments(dataset=str(validation_digits), output_dir=str(tmp_path / "latents"), **arguments)
    )
    losses = []
    for name in (validation_digits, tmp_path / "latents"):
        AcceleratorState._reset_state(reset_partial_state=True)
        output_dir = tmp_path / f"run{len(losses)}"
        train_here(DiTModel, digits, output_dir, vae=str(tmp_path / "vae"), patch_size=2, max_train_steps=1,
                   validation_dataset=str(name))  # fmt: skip
        losses.append(summary(output_dir)["before"]["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_prompts_and_gate_learn_at_their_own_rates(train_dmp_here, tmp_path):
    # two steps at a constant rate; Adam moves by about its learning rate a step
    train_dmp_here(tmp_path, max_train_steps=2, learning_rate=1e-4, gate_learning_rate=1e-3)
    trained = patch_weights(tmp_path)
    moved = {name: weight.abs().max().item() for name, weight in trained.items()}
    assert moved["prompts"] == pytest.approx(2 * 1e-4, rel=0.1)
    # in the first step the prompts are zero, so that only the balance could move a gate; it is at its best already
    for name in ("gate_proj.weight", "gate_proj.bias"):
        assert 1e-4 < moved[name] < 2.1e-3, name


def test_balancing_losses_are_logged_and_act(dmp_run, train_dmp_here, tmp_path):
    assert len(logged(dmp_run, "importance_loss")) == len(logged(dmp_run, "load_loss")) == 4
    train_dmp_here(tmp_path / "without", max_train_steps=3, importance_loss_weight=0.0)
    train_dmp_here(tmp_path / "with", max_train_steps=3, importance_loss_weight=1.0)
    name = "gate_proj.weight"
    assert not torch.equal(patch_weights(tmp_path / "with")[name], patch_weights(tmp_path / "without")[name])


def test_a_resumed_run_ends_where_the_uninterrupted_one_would(train_dmp_here, dmp_run, tmp_path):
    train_dmp_here(tmp_path / "through", topk=0.5, ema_decay=0.9)
    shutil.copytree(tmp_path / "through" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train_dmp_here(tmp_path / "resumed", topk=0.5, ema_decay=0.9, resume_from_checkpoint="latest")
    through, resumed = patch_weights(tmp_path / "through"), patch_weights(tmp_path / "resumed")
    assert all(torch.equal(weight, through[name]) for name, weight in resumed.items())
    # averaged
    assert not torch.equal(through["prompts"], patch_weights(dmp_run)["prompts"])


def test_prompt_tuning(train_dmp_here, base_run, tmp_path):
    train_dmp_here(tmp_path, method="prompt_tuning", max_train_steps=2)
    assert list(patch_weights(tmp_path)) == ["prompts"]
    base = weights(base_run)
    assert all(torch.equal(weight, base[name]) for name, weight in weights(tmp_path).items())


def test_full_finetuning(train_dmp_here, base_run, tmp_path):
    train_dmp_here(tmp_path, method="full_finetuning", max_train_steps=2)
    assert not (tmp_path / "pipeline" / "prompt_patch").exists() and not (tmp_path / "patch").exists()
    base = weights(base_run)
    assert any(not torch.equal(weight, base[name]) for name, weight in weights(tmp_path).items())


def test_prepended_prompts_and_gradient_checkpointing(train_dmp_here, tmp_path):
    train_dmp_here(
        tmp_path, prompt_mode="prepend", num_prompts=3, depth=1, gradient_checkpointing=True, max_train_steps=2
    )
    assert patch_weights(tmp_path)["prompts"].shape == (1, 3, 32)


def test_a_patch_for_a_remix_dit(digits, tmp_path, train_dmp_here):
    """Whose experts take turns, as in its own training."""
    model = DiTModel(num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=1, out_channels=2,
                     sample_size=8, patch_size=4, num_classes=10)  # fmt: skip
    RemixDiTModel.from_dit(randomised(model), num_bases=2, num_experts=4).save_pretrained(tmp_path / "remix")
    train_dmp_here(tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "remix"), max_train_steps=3)
    assert sum(summary(tmp_path / "run")["samples_per_expert"]) == 48
    assert patch_weights(tmp_path / "run")["prompts"].abs().max() > 0


@pytest.mark.slow
def test_two_processes_follow_one(digits, validation_digits, base_run, tmp_path):
    """Without a gate, whose noise each process draws for itself."""
    for num_processes in (1, 2):
        launch_dmp(tmp_path / str(num_processes), digits, base_run, num_processes, method="prompt_tuning",
                   ema_decay=0.0, validation_dataset=validation_digits)  # fmt: skip
    for when in ("before", "after"):
        losses = [summary(tmp_path / str(num_processes))[when]["validation_loss"] for num_processes in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    states = [
        torch.load(tmp_path / "2" / "checkpoint-4" / f"random_states_{i}.pkl", weights_only=False) for i in range(2)
    ]
    assert not torch.equal(*(state["torch_manual_seed"] for state in states))
    one, two = (patch_weights(tmp_path / str(num_processes))["prompts"] for num_processes in (1, 2))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "name the model that gets prompts, but got None"),
        ({"method": "lora"}, "`method` to be one of dmp, prompt_tuning, full_finetuning, but got 'lora'"),
        ({"topk": 0.0}, r"`topk` to be in \(0, 1\]"),
        ({"depth": 7}, "`depth` to be at most the 2 blocks"),
        ({"image_size": 16}, "the `sample_size` 16 of data and arguments, but got 8"),
    ],
)
def test_arguments_that_do_not_fit(train_dmp_here, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_dmp_here(tmp_path, **arguments)


def test_validation_images_of_other_classes(train_dmp_here, tmp_path):
    shutil.copytree(write_image_folder(tmp_path / "some", range(5)), tmp_path / "few")
    with pytest.raises(
        ValueError, match="`validation_dataset` to have the 10 classes .* but got 5; missing: 5, 6, 7, 8, 9"
    ):
        train_dmp_here(tmp_path / "run", validation_dataset=str(tmp_path / "few"))


@pytest.mark.slow
def test_the_digits_base_improves(tmp_path, train_dmp_here):
    """A base as the presets train it, patched as they do: its loss on held-out digits falls."""
    train = write_image_folder(tmp_path / "train", TRAINING_IMAGES)
    validation = write_image_folder(tmp_path / "validation", VALIDATION_IMAGES)
    presets = REPOSITORY / "training" / "presets"
    base = yaml.safe_load((presets / "dit_digits.yaml").read_text()) | {"output_dir": str(tmp_path / "base")}
    train_here(DiTModel, train, Path(base.pop("output_dir")), **base | {"dataset": str(train), "sample_steps": 0})
    patch = yaml.safe_load((presets / "dmp_digits.yaml").read_text())
    patch |= {"dataset": str(train), "validation_dataset": str(validation), "sample_steps": 0}
    patch |= {"pretrained_model_name_or_path": str(tmp_path / "base" / "pipeline")}
    patch.pop("output_dir")
    train_dmp_here(tmp_path / "patch", **patch)
    run = summary(tmp_path / "patch")
    print({when: run[when]["validation_loss"] for when in ("before", "after")})
    assert run["after"]["validation_loss"] < run["before"]["validation_loss"]
