"""Images enlarged by a `PatchedUNet2DModel` with `low_res_channels`, through both pipelines."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import randomised
from diffusers import DDIMScheduler
from test_snr_split import UNET, quiet

from diffusers_dmp import ClassConditionalPipeline, PatchedUNet2DModel, SNRSplitPipeline

MODEL = UNET | {"in_channels": 3, "low_res_channels": 3}
LABELS = [1, 2]


def make_pipeline(**config) -> ClassConditionalPipeline:
    return quiet(ClassConditionalPipeline(randomised(PatchedUNet2DModel(**MODEL | config)), DDIMScheduler()))


@pytest.fixture
def pipeline() -> ClassConditionalPipeline:
    return make_pipeline()


@pytest.fixture
def images() -> list[PIL.Image.Image]:
    """Two random images of 4 x 4 pixels, half of the model's 8."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(each) for each in pixels]


def generate(pipeline, image, class_labels=LABELS, **kwargs) -> torch.Tensor:
    defaults = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipeline(class_labels, image=image, **defaults | kwargs).images


def as_tensor(images: list[PIL.Image.Image]) -> torch.Tensor:
    """(N, 3, h, w) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) / 255 for each in images])


def test_the_image_decides_the_output(pipeline, images):
    generated = generate(pipeline, images)
    assert generated.shape == (2, 3, 8, 8)
    swapped = generate(pipeline, images[::-1])
    assert ((generated - swapped).abs().flatten(1).amax(1) > 1e-2).all()


def test_equals_a_loop_by_hand(pipeline, images):
    """Classifier-free guidance leaves out the class, not the image."""
    model, scheduler = pipeline.transformer, DDIMScheduler(prediction_type="sample")
    pipeline.scheduler = scheduler
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    generated = generate(pipeline, images, latents=noise, guidance_scale=1.5)

    low_res = 2 * as_tensor(images) - 1
    scheduler.set_timesteps(4)
    latents = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional = model(latents, t, torch.tensor(LABELS), low_res=low_res).sample
            unconditional = model(latents, t, torch.tensor([10, 10]), low_res=low_res).sample
            prediction = unconditional + 1.5 * (conditional - unconditional)
            latents = scheduler.step(prediction, t, latents).prev_sample
    torch.testing.assert_close(generated, latents, atol=1e-4, rtol=1e-4)


def test_the_model_sees_the_image_enlarged_bilinearly_beside_x_t(pipeline, images):
    seen = []
    pipeline.transformer.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generate(pipeline, images)
    channels = F.pixel_shuffle(seen[0], 2)  # (B, 3 + 3, 8, 8)
    enlarged = F.interpolate(2 * as_tensor(images) - 1, (8, 8), mode="bilinear")
    torch.testing.assert_close(channels[:, 3:], enlarged)


@pytest.mark.parametrize("form", ["list of arrays", "array", "list of tensors", "tensor", "half precision"])
def test_images_in_any_form(pipeline, images, form):
    tensor = as_tensor(images)
    array = tensor.permute(0, 2, 3, 1).numpy()
    forms = {
        "list of arrays": list(array),
        "array": array,
        "list of tensors": list(tensor),
        "tensor": tensor,
        "half precision": tensor.half(),
    }
    atol = 1e-2 if form == "half precision" else 1e-4
    torch.testing.assert_close(generate(pipeline, forms[form]), generate(pipeline, images), atol=atol, rtol=1e-4)


def test_a_tensor_may_be_in_the_range_of_the_model(pipeline, images):
    with pytest.warns(FutureWarning, match=r"\[-1,1\]"):  # Diffusers would rather have [0, 1]
        generated = generate(pipeline, 2 * as_tensor(images) - 1)
    torch.testing.assert_close(generated, generate(pipeline, images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pil_images_become_what_the_model_knows(images, channels, mode):
    pipeline = make_pipeline(low_res_channels=channels)
    other = {"L": "RGB", "RGB": "L"}[mode]
    image = images[0].convert("L")  # the same grey in both modes
    expected = generate(pipeline, image.convert(mode))
    torch.testing.assert_close(generate(pipeline, image.convert(other)), expected)


def test_one_image_for_the_whole_batch(pipeline, images):
    torch.testing.assert_close(generate(pipeline, images[0]), generate(pipeline, [images[0]] * 2))


def test_without_labels_there_are_as_many_outputs_as_images(pipeline, images):
    unconditional = make_pipeline(num_classes=None)
    assert len(generate(unconditional, images, class_labels=None)) == 2
    assert len(generate(pipeline, images * 2, class_labels=None)) == 4  # of the null class
    assert len(generate(unconditional, images[0], class_labels=None, batch_size=3)) == 3


def test_a_sample_does_not_depend_on_its_batch(pipeline, images):
    noise = torch.randn(2, 3, 8, 8)
    together = generate(pipeline, images, latents=noise, guidance_scale=1.5)
    alone = generate(pipeline, images[1], LABELS[1], latents=noise[1:], guidance_scale=1.5)
    torch.testing.assert_close(alone, together[1:], atol=1e-4, rtol=1e-3)


def test_in_half_precision(pipeline, images):
    generated = generate(pipeline.to(torch.bfloat16), images, guidance_scale=1.5)
    assert generated.dtype == torch.bfloat16 and generated.isfinite().all()


def test_only_some_denoisers_enlarge(images):
    """The denoiser for much noise enlarges, the one for little noise only refines."""
    plain = randomised(PatchedUNet2DModel(**MODEL | {"low_res_channels": 0}), seed=1)
    enlarging = randomised(PatchedUNet2DModel(**MODEL))
    pipeline = quiet(SNRSplitPipeline([plain, enlarging], DDIMScheduler(), [0.25]))
    called_with = {plain: [], enlarging: []}
    for denoiser, calls in called_with.items():
        denoiser.register_forward_pre_hook(
            lambda model, args, kwargs, calls=calls: calls.append(kwargs.get("low_res")), with_kwargs=True
        )
    generated = generate(pipeline, images)
    assert set(called_with[plain]) == {None} and called_with[enlarging]
    for low_res in called_with[enlarging]:
        torch.testing.assert_close(low_res, 2 * as_tensor(images) - 1)
    assert (generated - generate(pipeline, images[::-1])).abs().max() > 1e-3
    with pytest.raises(ValueError, match="Expected an `image` to enlarge"):
        generate(pipeline, None)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda images: None, "Expected an `image` to enlarge for a model of 3 `low_res_channels`, but got None"),
        (lambda images: [], "`image` to be one or more images of one size"),
        (lambda images: images[:1] * 3, "`image` to be one image or 2 of them, but got 3"),
        (lambda images: [images[0], images[1].resize((8, 8))], r"one size, but got the sizes \[\(4, 4\), \(8, 8\)\]"),
        (lambda images: torch.zeros(2, 1, 4, 4), r"the 3 channels of `low_res_channels`.*\(1, 4, 4\)"),
        (lambda images: torch.zeros(2, 4, 4, 4), r"the 3 channels of `low_res_channels`.*\(4, 4, 4\)"),
        (lambda images: np.array(images[0]), r"values in \[0, 1\]"),  # of 0 to 255
        (lambda images: torch.full((3, 4, 4), torch.nan), r"values in \[0, 1\]"),
        (lambda images: "image.png", "incorrect format"),  # Diffusers' own message
    ],
)
def test_refuses_images_that_do_not_fit(pipeline, images, change, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, change(images))


def test_refuses_an_image_for_a_model_that_does_not_enlarge(images):
    with pytest.raises(ValueError, match="Expected no `image` for a model without `low_res_channels`"):
        generate(make_pipeline(low_res_channels=0), images)
