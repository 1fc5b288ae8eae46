"""Evaluation on a CUDA GPU: each image's noise is its own, and precision is what the GPU has. See test_gpu.py."""

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, randomised
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor

from diffusers_dmp import ClassConditionalPipeline, DiTModel
from diffusers_dmp.models.precision import check_dtype, check_tf32
from diffusers_dmp.training.data.random_numbers import RandomNumbers
from diffusers_dmp.training.data.seeded_sampling import sample_seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and `make test-gpu`, which shows it"),
]

GPU = "cuda"


def pipeline() -> ClassConditionalPipeline:
    found = ClassConditionalPipeline(randomised(DiTModel(**TINY_CONFIG)), DDPMScheduler()).to(GPU)
    found.set_progress_bar_config(disable=True)
    return found


def sample(pipe: ClassConditionalPipeline, indices: range, num_inference_steps: int) -> np.ndarray:
    call = {"class_labels": [1] * len(indices), "output_type": "np", "num_inference_steps": num_inference_steps}
    return np.stack(list(sample_seeded(pipe, 0, indices, **call)))


def test_the_noise_of_an_image_is_the_same_in_batches_of_one_and_five(monkeypatch):
    """Bit for bit, though a GPU makes other numbers when several calls' are made at once."""
    noises: list[torch.Tensor] = []

    def noted(*args, **kwargs) -> torch.Tensor:
        noises.append(randn_tensor(*args, **kwargs).clone())
        return noises[-1]

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noted)
    pipe, by_image = pipeline(), []
    for batches in ([range(5)], [range(i, i + 1) for i in range(5)]):
        images: list[torch.Tensor] = []
        for indices in batches:
            noises.clear()
            sample(pipe, indices, 20)
            images += torch.stack(noises).unbind(1)
        by_image.append(torch.stack(images))
    assert by_image[0].device.type == GPU and len(noises) == 19
    assert torch.equal(*by_image)
    assert by_image[0].flatten(0, 1).unique(dim=0).shape[0] == 5 * 19  # no numbers come twice
    assert by_image[0].mean().abs() < 0.1 and (by_image[0].std() - 1).abs() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_order_of_calls_of_other_images_does_not_matter(dtype):
    """Of latents of several sizes, and with calls between that are of other kinds."""
    sizes = [(1, 4, 32, 32)] * 5 + [(1, 4, 8, 8)] * 3 + [(1, 3, 5, 5)] * 4

    def numbers(generators: list[torch.Generator]) -> list[torch.Tensor]:
        found = []
        with RandomNumbers(generators):
            for size in sizes:
                found += [torch.randn(size, generator=each, device=GPU, dtype=dtype) for each in generators]
            found += [torch.rand(3, generator=each, device=GPU) for each in generators]
        return found

    together = numbers([torch.Generator(GPU).manual_seed(seed) for seed in range(3)])
    for seed in range(3):
        alone = numbers([torch.Generator(GPU).manual_seed(seed)])
        assert all(torch.equal(one, other) for one, other in zip(alone, together[seed::3]))


def test_images_do_not_depend_on_their_batch():
    pipe = pipeline()
    together = sample(pipe, range(5), 6)
    alone = np.concatenate([sample(pipe, range(i, i + 1), 6) for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-3)


def test_the_precision_of_this_gpu():
    """It computes in what is said to be there."""
    capability = torch.cuda.get_device_capability()
    check_dtype(torch.float16, GPU)
    if capability >= (8, 0):
        check_dtype(torch.bfloat16, GPU)
        check_tf32(GPU)
    elif torch.version.hip is None:
        with pytest.raises(ValueError, match=r"float32 or float16 on cuda \(.*\), but got bfloat16"):
            check_dtype(torch.bfloat16, GPU)
        with pytest.raises(ValueError, match="`tf32` on a GPU that has it"):
            check_tf32(GPU)
