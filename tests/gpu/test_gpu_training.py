"""Trainings on a CUDA GPU: compiled ones learn what eager ones do, and no step waits. `make test-gpu` runs these tests."""

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import train_here, weights

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.training import compilation, loss_log
from diffusers_dmp.training.metrics_file import read_metrics
from diffusers_dmp.training.utilisation import measure_limits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and `make test-gpu`, which shows it"),
]

SETTINGS = {"max_train_steps": 6, "checkpointing_steps": 6, "learning_rate": 1e-4, "max_grad_norm": 1.0,
            "dataloader_num_workers": 0}  # fmt: skip


@pytest.fixture(autouse=True)
def without_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("model_class", [DiTModel, DTRTransformer2DModel])
def test_a_compiled_training_learns_what_an_eager_one_does(model_class, digits, tmp_path, monkeypatch):
    """
    AdamW moves a weight by about the learning rate in a step, whatever the size of its gradient: where that is all rounding, as at
    the start, compiled and eager steps may go opposite ways. Hence the losses are compared closely, and the weights by the steps.
    """
    graphs = []
    end = compilation.CompiledSteps.end
    monkeypatch.setattr(
        compilation.CompiledSteps, "end", lambda self, now: graphs.append(end(self, now)) or graphs[-1]
    )
    torch.compiler.reset()
    for compile in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_here(model_class, digits, tmp_path / str(compile), compile=compile, **SETTINGS)
    number_by_step = [number for number, seconds in graphs]
    assert number_by_step[0] > 0 and not any(number_by_step[2:])
    eager, compiled = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("False", "True"))
    for one, other in zip(eager, compiled):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    largest = 2 * SETTINGS["max_train_steps"] * SETTINGS["learning_rate"]
    expected = weights(tmp_path / "False")
    for name, value in weights(tmp_path / "True").items():
        torch.testing.assert_close(value, expected[name], atol=largest, rtol=0)


def test_the_log_has_the_utilisation_of_the_gpu(digits, tmp_path):
    train_here(DiTModel, digits, tmp_path, mixed_precision="bf16", **SETTINGS)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert 0 < last["mfu"] < 1 and last["images_per_second"] > 0


def test_what_checkpointing_computes_again_does_not_count(digits, tmp_path, monkeypatch):
    """Backward passes run in a thread of the GPU. Of a device that does an operation per second, `mfu` has all of an image's."""
    monkeypatch.setattr(loss_log, "device_flops", lambda device, precision: 1.0)
    per_image = []
    for gradient_checkpointing in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / str(gradient_checkpointing)
        train_here(DiTModel, digits, folder, gradient_checkpointing=gradient_checkpointing, **SETTINGS)
        last = read_metrics(folder / "metrics.jsonl")[-1]
        per_image.append(last["mfu"] / last["images_per_second"])
    assert per_image[1] == pytest.approx(per_image[0], rel=1e-9) and per_image[0] > 1e5


def test_the_limits_are_those_of_a_gpu():
    """Any GPU that PyTorch supports does more than a trillion operations in half precision, and moves 50 GB, in a second."""
    limits = measure_limits("cuda", torch.float16)
    assert limits.flops_per_second > 1e12 and limits.bytes_per_second > 50e9
    assert measure_limits("cuda", torch.float32).flops_per_second < limits.flops_per_second
