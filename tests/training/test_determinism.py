"""`--deterministic true`: the switches, and a run with them."""

import os
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import train_here, weights

from diffusers_dmp import DiTModel
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.determinism import CUBLAS_WORKSPACE, deterministic_algorithms
from diffusers_dmp.training.trainer import make_accelerator


def switches() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


@pytest.fixture
def cublas_unset(monkeypatch):
    """The environment without cuBLAS' setting, and afterwards as it was."""
    monkeypatch.setenv(CUBLAS_WORKSPACE, "")
    monkeypatch.delenv(CUBLAS_WORKSPACE)


def test_the_switches_hold_within_the_run_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = switches()
    with deterministic_algorithms():
        assert switches() == (True, True, False)
    assert switches() == before == (False, False, True)
    with deterministic_algorithms(enabled=False):
        assert switches() == before
    with pytest.raises(KeyboardInterrupt), deterministic_algorithms():
        raise KeyboardInterrupt
    assert switches() == before


@pytest.mark.parametrize("own", [None, ":16:8"])
def test_cublas_is_configured_before_cuda_is_used(cublas_unset, monkeypatch, tmp_path, own):
    if own is not None:
        monkeypatch.setenv(CUBLAS_WORKSPACE, own)
    make_accelerator(DiTTrainingArguments(report_to="none", output_dir=str(tmp_path)))
    assert os.environ.get(CUBLAS_WORKSPACE) == own
    AcceleratorState._reset_state(reset_partial_state=True)
    make_accelerator(DiTTrainingArguments(report_to="none", output_dir=str(tmp_path), deterministic=True))
    assert os.environ[CUBLAS_WORKSPACE] == (own or ":4096:8")


def test_a_deterministic_run_resumes_bit_for_bit(cublas_unset, digits, tmp_path, monkeypatch):
    seen, forward = [], DiTModel.forward

    def remember(*args, **kwargs):
        seen.append(switches())
        return forward(*args, **kwargs)

    monkeypatch.setattr(DiTModel, "forward", remember)
    arguments = {"deterministic": True, "weighting": "uw", "sample_steps": 4, "sample_inference_steps": 2}
    train_here(DiTModel, digits, tmp_path / "whole", **arguments)
    assert set(seen) == {(True, True, False)} and switches()[0] is False
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, digits, tmp_path / "resumed", resume_from_checkpoint="latest", **arguments)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "resumed").items())
