"""Colour jitter: as Pillow changes colours, by factors that (seed, step) alone decides."""

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import train_here, weights

from diffusers_dmp import DiTModel
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.data.color_jitter import jitter_colors, jitter_factors
from diffusers_dmp.training.data.fitting import to_tensor

FACTORS = st.floats(0, 2)


@given(brightness=FACTORS, contrast=FACTORS, saturation=FACTORS, mode=st.sampled_from(["L", "RGB"]))
@settings(max_examples=40)
def test_as_pillow(brightness, contrast, saturation, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    image = PIL.Image.fromarray(pixels).convert(mode)
    found = jitter_colors(to_tensor(image)[None], torch.tensor([[brightness, contrast, saturation]]))[0]
    image = PIL.ImageEnhance.Brightness(image).enhance(brightness)
    image = PIL.ImageEnhance.Contrast(image).enhance(contrast)
    image = PIL.ImageEnhance.Color(image).enhance(saturation)
    torch.testing.assert_close(found, to_tensor(image), atol=6 / 127.5, rtol=0)  # Pillow rounds after each


def test_each_image_by_factors_of_its_own():
    images, factors = torch.rand(4, 4, 3, 3) * 2 - 1, jitter_factors(torch.rand(4, 3), 0.5)
    together = jitter_colors(images, factors)
    for i in range(4):
        torch.testing.assert_close(jitter_colors(images[i : i + 1], factors[i : i + 1])[0], together[i])
    assert torch.equal(together[:, 3], images[:, 3])  # alpha stays
    assert together.abs().max() <= 1 and not torch.allclose(together[:, :3], images[:, :3])
    torch.testing.assert_close(jitter_colors(images, torch.ones(4, 3)), images)
    assert factors.min() >= 0.5 and factors.max() < 1.5


def test_the_same_for_any_number_of_slices(digits, tmp_path):
    for name, arguments in {
        "one": {},
        "two": {"gradient_accumulation_steps": 2},
        "none": {"color_jitter": 0.0},
    }.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        train_here(DiTModel, digits, tmp_path / name, **{"color_jitter": 0.5, "max_train_steps": 2} | arguments)
    one, two, none = (weights(tmp_path / name) for name in ("one", "two", "none"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(one[name], none[name]) for name in one)


@pytest.mark.parametrize(
    "arguments",
    [{"color_jitter": -0.1}, {"color_jitter": 1.5}, {"color_jitter": 0.1, "teacher_image_column": "large"}],
)
def test_refused(arguments):
    with pytest.raises(ValueError, match="`color_jitter`"):
        TrainingArguments(**arguments)
