"""How many processes a training is started in, by the options of `accelerate launch`."""

from pathlib import Path

import accelerate.commands.launch
import pytest
import torch
from accelerate.commands.config import config_args

from diffusers_dmp.training.launching import launch


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What Accelerate is asked for on a computer with so many devices: the number of processes, and whether on several GPUs."""

    def ask(num_devices: int, *options: str) -> tuple[int | None, bool]:
        asked = []
        monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: num_devices > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: num_devices)
        monkeypatch.setattr(accelerate.commands.launch, "launch_command", asked.append)
        assert launch(Path("train.py"), ["--config", "dtr_rgb32"], list(options)) == 0
        return asked[0].num_processes, asked[0].multi_gpu

    return ask


@pytest.mark.parametrize(
    "options",
    [(), ("--main_process_port", "29501"), ("--mixed_precision", "bf16"), ("--multi_gpu",), ("--gpu_ids=all",)],
)
def test_all_gpus_are_used_whatever_else_is_asked_for(launched, options):
    assert launched(8, *options) == (8, True)
    assert launched(1, "--mixed_precision", "bf16") == launched(0, "--mixed_precision", "bf16") == (1, False)


def test_what_the_user_chose(launched, tmp_path):
    assert launched(8, "--num_processes", "3") == launched(8, "--num-processes=3") == (3, False)
    assert launched(8, "--cpu") == (1, False)
    assert launched(8, "--gpu_ids", "2") == (1, False)
    assert launched(8, "--gpu-ids", "2,5") == (2, True)
    assert launched(8, "--num_machines", "2") == (16, True)
    assert launched(8, "--use_fsdp") == launched(8, "--use_deepspeed") == (8, False)
    assert launched(8, "--config_file", str(tmp_path / "mine.yaml")) == (None, False)


def test_an_unknown_option_is_a_users_error(launched):
    with pytest.raises(ValueError, match="Expected options of `accelerate launch` before `--`, but got others"):
        launched(8, "--nodes", "3")
