"""Remix-DiT's training: from a pretrained DiT, one expert per step and process."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TINY_CONFIG, randomised
from diffusers import DDPMScheduler, DiffusionPipeline
from runs import TINY, launch, logged, train_here, weights
from safetensors.torch import load_file

from diffusers_dmp import DiTModel, NoiseIntervals, RemixDiTModel
from diffusers_dmp.conversion.dit import _RENAMED, _rename
from diffusers_dmp.training.objectives.objective import Objective
from diffusers_dmp.training.objectives.timesteps import StepExperts, random_experts

REMIX = {"num_bases": 2, "num_experts": 3, "lr_scheduler": "cosine_with_min_lr", "min_lr_rate": 0.5}


@pytest.fixture(scope="module")
def dit_run(digits, tmp_path_factory) -> Path:
    """Two steps of a plain DiT."""
    output_dir = tmp_path_factory.mktemp("dit")
    train_here(DiTModel, digits, output_dir, max_train_steps=2, ema_decay=0.0)
    return output_dir


@pytest.fixture(scope="module")
def remix_run(digits, dit_run, tmp_path_factory) -> Path:
    """Four steps of Remix-DiT from it, as users start them."""
    output_dir = tmp_path_factory.mktemp("remix")
    launch("train_remix.py", output_dir, dataset=digits, pretrained_model_name_or_path=dit_run / "pipeline", **REMIX)
    return output_dir


@pytest.fixture
def train_remix_here(digits, dit_run, monkeypatch):
    """The same in this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_remix import RemixTrainingArguments, train_remix

    def train(output_dir: Path, **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = TINY | REMIX | {"dataset": str(digits), "report_to": "none", "output_dir": str(output_dir)}
        defaults["pretrained_model_name_or_path"] = str(dit_run / "pipeline")
        train_remix(RemixTrainingArguments(**defaults | arguments))

    return train


def summary(output_dir: Path) -> dict:
    return json.loads((output_dir / "training_summary.json").read_text())


def test_from_a_dit_to_a_pipeline(remix_run):
    pipeline = DiffusionPipeline.from_pretrained(remix_run / "pipeline")
    assert type(pipeline.transformer) is RemixDiTModel
    assert pipeline.transformer.intervals.edges == (0, 333, 666, 1000)
    assert pipeline("7", num_inference_steps=3).images[0].size == (8, 8)


def test_bases_and_coefficients_learn_at_their_own_rates(remix_run, dit_run, train_remix_here, tmp_path):
    # two steps at a constant rate; Adam moves by about its learning rate a step
    train_remix_here(tmp_path, lr_scheduler="constant", min_lr_rate=0.0, max_train_steps=2, ema_decay=0.0,
                     learning_rate=2e-5, coefficient_learning_rate=1e-2)  # fmt: skip
    trained, start = weights(tmp_path), weights(dit_run)
    moved = [(trained[name] - start[name]).abs().max() for name in start]
    assert max(moved) == pytest.approx(2 * 2e-5, rel=0.1)
    run = summary(tmp_path)
    before, after = (torch.tensor(run[when]["mixing_coefficients"]).log() for when in ("before", "after"))
    moved = ((after[:, 0] - after[:, 1]) - (before[:, 0] - before[:, 1])).abs()  # two logits, each by two steps
    assert moved.max() == pytest.approx(4 * 1e-2, rel=0.1)


def test_learning_rates_fall_to_half_by_a_cosine(remix_run):
    expected = [1e-3 * (0.75 + 0.25 * np.cos(np.pi * step / 4)) for step in (1, 2, 3, 4)]
    assert list(logged(remix_run, "lr").values()) == pytest.approx(expected)


def test_the_prior_fades_to_nothing(remix_run, train_remix_here, tmp_path, monkeypatch):
    import train_remix

    recipes = []
    monkeypatch.setattr(train_remix, "train_dit", lambda model_class, args, recipe, publisher: recipes.append(recipe))
    train_remix_here(tmp_path, prior_loss_weight=1e-4, max_train_steps=100)
    weight = recipes[0](RemixDiTModel(**TINY_CONFIG)).auxiliary_weights
    assert [weight(step)["prior_loss"] for step in (0, 50, 100)] == pytest.approx([1e-4, 0.5e-4, 0])
    assert len(logged(remix_run, "prior_loss")) == 4


def test_the_prior_acts_on_every_expert(train_remix_here, tmp_path):
    """With the prior alone in force, the coefficients of experts that were not trained move as well: towards it."""
    train_remix_here(tmp_path, prior_loss_weight=1e6, max_train_steps=1, ema_decay=0.0)
    run = summary(tmp_path)
    before, after = (torch.tensor(run[when]["mixing_coefficients"]) for when in ("before", "after"))
    prior = torch.tensor([0, 0, 1])  # ⌊i·2/3⌋
    assert (after[range(3), prior] > before[range(3), prior]).all()


def test_a_step_trains_one_expert(train_remix_here, tmp_path, monkeypatch):
    chosen, forward = [], RemixDiTModel.forward

    def remember(model, hidden_states, timestep, *args, expert=None, **kwargs):
        if model.training:  # its operations are counted in eval mode
            chosen.append((expert, model.intervals.index(timestep)))
        return forward(model, hidden_states, timestep, *args, expert=expert, **kwargs)

    monkeypatch.setattr(RemixDiTModel, "forward", remember)
    train_remix_here(tmp_path, max_train_steps=6, gradient_accumulation_steps=2)
    experts = [expert for expert, _ in chosen]
    assert experts == [random_experts(0, step, 3, 1)[0] for step in range(6) for _ in range(2)]
    assert len(set(experts)) > 1
    for expert, owners in chosen:
        assert len(owners) == 8 and (owners == expert).all()
    assert summary(tmp_path)["samples_per_expert"] == [16 * experts[::2].count(expert) for expert in range(3)]


def test_experts_are_chosen_evenly():
    chosen = np.array([random_experts(0, step, 8, 2) for step in range(4000)])
    counts = np.stack([(chosen == expert).mean(0) for expert in range(8)])
    assert np.abs(counts - 1 / 8).max() < 0.02
    assert np.abs(np.corrcoef(chosen.T)[0, 1]) < 0.05  # processes do not choose alike
    intervals = NoiseIntervals.uniform(8)
    two = StepExperts(intervals, [5, 2])
    timesteps = Objective(DDPMScheduler()).sample_timesteps(12, torch.Generator().manual_seed(0), two)
    assert intervals.index(timesteps).tolist() == [5] * 6 + [2] * 6


@pytest.mark.slow
def test_two_processes_train_an_expert_each(digits, dit_run, tmp_path):
    launch("train_remix.py", tmp_path, num_processes=2, dataset=digits, max_train_steps=2,
           pretrained_model_name_or_path=dit_run / "pipeline", **REMIX)  # fmt: skip
    assert (tmp_path / "checkpoint-2" / "random_states_1.pkl").exists()  # there was a second process
    chosen = [expert for step in range(2) for expert in random_experts(0, step, 3, 2)]
    assert summary(tmp_path)["samples_per_expert"] == [8 * chosen.count(expert) for expert in range(3)]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_resumes_bit_for_bit(remix_run, digits, dit_run, tmp_path):
    shutil.copytree(remix_run / "checkpoint-2", tmp_path / "checkpoint-2")
    launch("train_remix.py", tmp_path, dataset=digits, pretrained_model_name_or_path=dit_run / "pipeline",
           resume_from_checkpoint="latest", **REMIX)  # fmt: skip
    expected = weights(remix_run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    for name in ("samples_per_expert", "before", "after"):
        assert summary(tmp_path)[name] == summary(remix_run)[name]


@pytest.mark.slow
def test_accumulated_micro_batches_follow_the_whole_batch(train_remix_here, tmp_path):
    train_remix_here(tmp_path / "whole")
    train_remix_here(tmp_path / "parts", gradient_accumulation_steps=2)
    for name, tensor in weights(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "whole")[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_gradient_checkpointing_and_mixed_precision(train_remix_here, tmp_path, mixed_precision):
    train_remix_here(tmp_path, max_train_steps=2, gradient_checkpointing=True, mixed_precision=mixed_precision)
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in weights(tmp_path).values())


def test_goes_on_from_a_remix_dit(remix_run, train_remix_here, tmp_path):
    arguments = {"pretrained_model_name_or_path": str(remix_run / "pipeline"), "max_train_steps": 1, "ema_decay": 0.0}
    train_remix_here(tmp_path, learning_rate=0.0, coefficient_learning_rate=0.0, **arguments)
    expected = weights(remix_run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    with pytest.raises(ValueError, match="num_experts. 8.*got 3"):
        train_remix_here(tmp_path / "other", num_experts=8, **arguments)


def test_starts_from_a_stock_checkpoint(train_remix_here, tmp_path):
    stock = DiTModel(**TINY_CONFIG | {"in_channels": 1, "out_channels": 2}, downscale_freq_shift=1.0, norm_eps=1e-5)
    stock.to_diffusers().save_pretrained(tmp_path / "stock")
    arguments = {"pretrained_model_name_or_path": str(tmp_path / "stock"), "max_train_steps": 1}
    train_remix_here(tmp_path / "run", **arguments)
    trained = RemixDiTModel.from_pretrained(tmp_path / "run" / "pipeline", subfolder="transformer")
    assert trained.config.downscale_freq_shift == 1.0  # so that its experts export exactly
    with pytest.raises(ValueError, match="num_layers. 12.*got 2"):
        train_remix_here(tmp_path / "other", preset="RemixDiT-S/2", **arguments)


def test_starts_from_an_original_checkpoint(train_remix_here, tmp_path):
    dit = randomised(DiTModel.from_preset("DiT-S/4", num_layers=1, in_channels=1, sample_size=8, num_classes=10))
    to_original = [(ours, original) for original, ours in reversed(_RENAMED)]
    state_dict = {_rename(name, to_original): tensor for name, tensor in dit.state_dict().items()}
    state_dict["pos_embed"] = dit.pos_embed.pos_embed
    torch.save({"ema": state_dict}, tmp_path / "DiT.pt")
    train_remix_here(
        tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "DiT.pt"), max_train_steps=1, learning_rate=0.0,
        ema_decay=0.0,
    )  # fmt: skip
    trained = RemixDiTModel.from_pretrained(tmp_path / "run" / "pipeline", subfolder="transformer")
    for name, tensor in trained.bake_expert(2).state_dict().items():
        torch.testing.assert_close(tensor, dit.state_dict()[name])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weighting": "uw"}, "weighting. to leave the choice of timesteps to the experts, but got 'uw'"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_bases": 0}, "num_bases"),
        ({"image_size": 16}, "sample_size. 16.*8"),
        ({"preset": "DiT-S/2"}, "RemixDiT-S/2, .*'DiT-S/2'"),
    ],
)
def test_refuses_bad_arguments(train_remix_here, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_remix_here(tmp_path, **arguments)


def test_trains_from_scratch_too(train_remix_here, tmp_path):
    train_remix_here(tmp_path, pretrained_model_name_or_path=None, max_train_steps=2)
    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors")["mixing_logits"].shape == (3, 2)
