"""How many processes read data, and that what they read does not depend on it."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusers_dmp.training.arguments import SharedTrainingArguments
from diffusers_dmp.training.data import workers
from diffusers_dmp.training.data.batches import training_batches
from diffusers_dmp.training.data.fitting import to_tensor
from diffusers_dmp.training.data.images import load_images
from diffusers_dmp.training.data.workers import MAX_WORKERS, choose_workers

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BATCH = 100_000_000  # 128 images of 256 pixels
Usage = namedtuple("Usage", "free")


@pytest.fixture
def computer(monkeypatch):
    """A computer with so many cores, processes that train, and bytes of shared memory."""

    def make(cores: int, processes: int = 1, shared_memory: int = 256 * 2**30) -> None:
        monkeypatch.setattr(workers, "num_cores", lambda: cores)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(shared_memory))
        monkeypatch.setattr(workers.os.path, "isdir", lambda path: True)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return make


def test_a_user_decides(computer):
    computer(cores=16)
    for wanted in (0, 3, 64):
        assert choose_workers(wanted, CPU, BATCH) == choose_workers(wanted, GPU, BATCH) == wanted


def test_the_cores_beside_an_accelerator_read(computer):
    computer(cores=16)
    assert choose_workers(None, GPU, BATCH) == 15
    computer(cores=128, processes=8)
    assert choose_workers(None, GPU, BATCH) == 15
    computer(cores=128)
    assert choose_workers(None, GPU, BATCH) == MAX_WORKERS
    computer(cores=1)
    assert choose_workers(None, GPU, BATCH) == 0


def test_a_cpu_has_its_cores_for_the_model(computer):
    computer(cores=16)
    assert choose_workers(None, CPU, BATCH) == 0


def test_batches_fit_into_shared_memory(computer):
    """A container has 64 MB of it, in which a worker with such batches would end with a bus error."""
    computer(cores=16, shared_memory=64 * 2**20)
    assert choose_workers(None, GPU, BATCH) == 0
    assert choose_workers(None, GPU, 1_000_000) == 11
    computer(cores=16, shared_memory=2**31)
    assert choose_workers(None, GPU, BATCH) == 3


def test_what_is_read_does_not_depend_on_the_workers(digits):
    def first_batches(num_workers: int) -> list[dict[str, torch.Tensor]]:
        args = SharedTrainingArguments(
            dataset=str(digits), image_size=8, image_channels=1, batch_size=16, dataloader_num_workers=num_workers
        )
        batches = training_batches(Accelerator(cpu=True), args, load_images(str(digits)), first_step=3)
        return [next(batches) for _ in range(4)]

    for with_two, with_none in zip(first_batches(2), first_batches(0)):
        assert all(torch.equal(with_two[name], column) for name, column in with_none.items())


@given(st.sampled_from(["L", "RGB", "RGBA"]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_pixels_become_numbers_from_minus_one_to_one(mode, width, height, seed):
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert np.array_equal(tensor.numpy(), (pixels.astype(np.float32) / np.float32(127.5) - 1).transpose(2, 0, 1))
