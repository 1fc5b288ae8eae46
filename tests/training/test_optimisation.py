"""Every optimiser and learning-rate schedule trains, or is refused in words before anything else happens."""

import importlib.util
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import train_here, weights
from safetensors.torch import load_file
from transformers.trainer_utils import SchedulerType

from diffusers_dmp import DiTModel, RemixDiTModel
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.optimisation import (
    averaged_weights,
    hyperparameters,
    make_ema,
    make_lr_scheduler,
    make_optimizer,
    set_hyperparameters,
)
from diffusers_dmp.training.optimisers import METRIC_SCHEDULES, OPTIMISERS, SCHEDULES

STEPS = 20
OPTIMISER_ARGUMENTS = {
    "adamw_8bit": {},
    "prodigy": {"learning_rate": 1.0},
    "schedule_free_adamw": {"ema_decay": 0.0, "learning_rate": 1e-2, "lr_warmup_steps": 2},
}


def learning_rates(**arguments) -> list[float]:
    """The learning rate of each of twenty steps, as a share of the one asked for."""
    args = DiTTrainingArguments(max_train_steps=STEPS, learning_rate=0.5, **arguments)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = make_lr_scheduler(args, optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"] / args.learning_rate)
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", [each.value for each in SchedulerType])
def test_every_schedule_of_transformers_runs_or_is_refused(name):
    if name not in SCHEDULES:
        reason = ", which follows a measurement" if name in METRIC_SCHEDULES else ""
        with pytest.raises(ValueError, match=f"`lr_scheduler` to be one of constant, .*got '{name}'{reason}"):
            DiTTrainingArguments(lr_scheduler=name)
        return
    needed = {"lr_decay_steps": 5} if "lr_decay_steps" in SCHEDULES[name] else {}
    rates = learning_rates(lr_scheduler=name, **needed)
    assert len(rates) == STEPS and all(0 <= rate <= 1 for rate in rates) and max(rates) > 0.99
    if "lr_warmup_steps" in SCHEDULES[name]:
        rates = learning_rates(lr_scheduler=name, lr_warmup_steps=4, **needed)
        assert rates[:4] == pytest.approx([0, 0.25, 0.5, 0.75]) or rates[0] < rates[1] < rates[2] < rates[3]


def test_most_schedules_of_transformers_are_there():
    assert {each.value for each in SchedulerType} & SCHEDULES.keys() == SCHEDULES.keys()


def test_what_the_schedules_take():
    cycles = learning_rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert cycles[0] == cycles[10] == 1 and cycles[9] < 0.05
    assert learning_rates(lr_scheduler="polynomial", lr_power=2.0)[10] == pytest.approx(0.25, abs=1e-5)
    decayed = learning_rates(lr_scheduler="warmup_stable_decay", lr_decay_steps=5, min_lr_rate=0.5)
    assert decayed[:16] == [1] * 16 and 0.5 < decayed[-1] < 0.6
    assert learning_rates(lr_scheduler="cosine_with_min_lr", min_lr_rate=0.5)[-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lr_scheduler": "cosin"}, "`lr_scheduler` to be one of constant, .*'cosin'"),
        ({"lr_warmup_steps": 5}, "`lr_warmup_steps` to be 0 for the `lr_scheduler` 'constant'.*constant_with_warmup"),
        ({"min_lr_rate": 0.1, "lr_scheduler": "cosine"}, "`min_lr_rate`.*'cosine'.*cosine_with_min_lr"),
        ({"lr_num_cycles": 3, "lr_scheduler": "cosine"}, "`lr_num_cycles`.*'cosine'.*cosine_with_restarts"),
        ({"lr_scheduler": "warmup_stable_decay"}, "`lr_decay_steps` to be in .1, 400000.*got 0"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 9, "max_train_steps": 8}, "`lr_warmup_steps` to be in .0, 8."),
        ({"lr_scheduler": "cosine_with_min_lr", "min_lr_rate": 1.5}, "`min_lr_rate`.*1.5"),
        ({"optimizer": "adam"}, "`optimizer` to be one of adamw, adamw_8bit.*'adam'"),
        ({"optimizer": "prodigy"}, "`learning_rate` to be about 1.*0.0001"),
        ({"optimizer": "schedule_free_adamw"}, "`ema_decay` to be 0.*0.9999"),
        ({"optimizer": "schedule_free_adamw", "ema_decay": 0, "lr_scheduler": "linear"}, "'constant'.*'linear'"),
        ({"optimizer": "schedule_free_adamw", "ema_decay": 0, "adam_beta1": 0.0}, "`adam_beta1`.*0.0"),
    ],
)
def test_refuses_what_would_have_no_effect_or_another(arguments, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # also where the packages are not installed
    with pytest.raises(ValueError, match=message):
        DiTTrainingArguments(**arguments)


@pytest.mark.parametrize("name", [name for name, package in OPTIMISERS.items() if package])
def test_a_missing_package_is_one_line_with_the_command(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"`pip install {OPTIMISERS[name]}`"):
        DiTTrainingArguments(optimizer=name)


@pytest.mark.parametrize("optimizer", list(OPTIMISER_ARGUMENTS))
def test_optimisers_of_other_packages_resume_bit_for_bit(digits, tmp_path, optimizer):
    pytest.importorskip(OPTIMISERS[optimizer])
    arguments = OPTIMISER_ARGUMENTS[optimizer] | {"optimizer": optimizer, "sample_inference_steps": 2}
    train_here(DiTModel, digits, tmp_path / "whole", **arguments, sample_steps=1, pipeline_steps=2)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    # without the pipelines and samples that the first run had before
    train_here(DiTModel, digits, tmp_path / "resumed", **arguments, resume_from_checkpoint="latest")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "resumed").items())
    start = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in start.items())


def test_the_schedule_free_average():
    pytest.importorskip("schedulefree")
    args = DiTTrainingArguments(
        optimizer="schedule_free_adamw", ema_decay=0.0, learning_rate=0.1, adam_beta1=0.5, max_train_steps=9
    )
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(args, model, torch.nn.Identity(), {})
    average = make_ema(args, model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1)).backward()
        optimizer.step()
    trained = model.weight.detach().clone()  # y = (1 - β1) z + β1 x
    z = optimizer.state[model.weight]["z"]
    with averaged_weights(model, average):
        torch.testing.assert_close(model.weight, (trained - 0.5 * z) / 0.5)
        assert not model.training
    assert torch.equal(model.weight, trained) and model.training
    optimizer.step()  # refused by the package in eval mode


@pytest.mark.parametrize("optimizer", ["prodigy", "schedule_free_adamw"])
def test_a_new_warm_up_and_beta_take_effect_in_a_loaded_optimiser(optimizer):
    pytest.importorskip(OPTIMISERS[optimizer])
    shared = {"optimizer": optimizer, "ema_decay": 0.0, "learning_rate": 1.0, "max_train_steps": 9}
    if optimizer == "prodigy":
        shared["lr_scheduler"] = "constant_with_warmup"

    def make(**arguments):
        args = DiTTrainingArguments(**shared | arguments)
        model = torch.nn.Linear(1, 1, bias=False)
        made = make_optimizer(args, model, torch.nn.Identity(), {})
        return model, made, make_lr_scheduler(args, made), make_ema(args, model, made)

    model, first, _, ema = make()
    for _ in range(3):
        first.zero_grad()
        model(torch.ones(1)).backward()
        first.step()
    with averaged_weights(model, ema):
        average = model.weight.detach().clone()

    resumed, second, schedule, ema = make(lr_warmup_steps=6, adam_beta1=0.5)
    wanted = hyperparameters(second)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    set_hyperparameters(second, schedule, wanted)
    (group,) = second.param_groups
    assert group["betas"][0] == 0.5
    assert group["safeguard_warmup"] if optimizer == "prodigy" else group["warmup_steps"] == 6
    with averaged_weights(resumed, ema):
        torch.testing.assert_close(resumed.weight, average)  # whatever β1 is from now on
    resumed(torch.ones(1)).backward()
    second.step()
    if optimizer == "schedule_free_adamw":
        assert group["scheduled_lr"] == pytest.approx(4 / 6)


def test_pipeline_and_checkpoint_have_the_schedule_free_average(digits, tmp_path):
    pytest.importorskip("schedulefree")
    arguments = OPTIMISER_ARGUMENTS["schedule_free_adamw"] | {"optimizer": "schedule_free_adamw"}
    train_here(DiTModel, digits, tmp_path, **arguments)
    saved, trained = weights(tmp_path), load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    average = torch.load(tmp_path / "checkpoint-4" / "custom_checkpoint_1.pkl", weights_only=True)["shadow_params"]
    names = [
        name for name, _ in DiTModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer").named_parameters()
    ]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in zip(names, average, strict=True))
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in trained.items())


def test_prodigy_takes_one_learning_rate(digits, tmp_path):
    pytest.importorskip("prodigyopt")
    with pytest.raises(ValueError, match="'prodigy', which takes one learning rate.*0.025, 1.0"):
        train_here(DiTModel, digits, tmp_path, optimizer="prodigy", learning_rate=1.0, weighting="uw")
    with pytest.raises(ValueError, match="0.01, 1.0"):
        args = DiTTrainingArguments(optimizer="prodigy", learning_rate=1.0)
        remix = RemixDiTModel(num_layers=1, num_attention_heads=1, attention_head_dim=8, num_bases=2, num_experts=2)
        make_optimizer(args, remix, torch.nn.Identity(), {"mixing_logits": 0.01})
