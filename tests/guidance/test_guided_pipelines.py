"""Guidance of the images that latents are decoded to, in the real pipelines of Diffusers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from networks import PLAIN
from tiny_pipelines import RECIPES, generate, seeded
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler, decoder_of

FLOW_PIPELINES = ["sd3", "flux", "wan", "zimage", "qwen"]
SIZES = {"wan": (16, 32), "zimage": (32, 48), "qwen": (32, 64)}  # height and width; of all others 8 x 16
RED = 0


class RedClassifier(PreTrainedModel):
    """Class 0 are images whose left half is redder than it is green and blue, class 1 the others."""

    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig(num_labels=2))
        self.contrast = nn.Parameter(torch.tensor(3.0))
        self.seen: list[tuple[int, ...]] = []  # the shapes of images

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        self.seen.append(tuple(pixel_values.shape))
        left = pixel_values[..., : pixel_values.shape[-1] // 2].mean((2, 3))
        score = self.contrast * (left[:, 0] - left[:, 1:].mean(1))
        return ImageClassifierOutput(logits=torch.stack([score, -score], 1))


def red_experts(process: str = "flow_matching") -> GuidanceExperts:
    noise = {"process": process} if process == "flow_matching" else {}
    return GuidanceExperts(RedClassifier(), **PLAIN, method="finetune", num_experts=1, noise_schedule=noise)


def tiny(name: str):
    """A pipeline of `RECIPES` with a random VAE, whose latents have a mean and a standard deviation where they can."""
    torch.manual_seed(0)
    pipe = RECIPES[name].pipe(RECIPES[name].denoiser())
    if name == "qwen":
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 0.9])
    return pipe


def guide(
    pipe, experts: GuidanceExperts | None = None, target=RED, scale: float = 50.0, **settings
) -> GuidanceExperts:
    experts = red_experts() if experts is None else experts
    pipe.scheduler = GuidedScheduler.for_pipeline(pipe, experts, ClassTarget(target), scale, **settings)
    return experts


def seen(experts: GuidanceExperts) -> list[tuple[int, ...]]:
    """The shapes of the images that experts were asked about."""
    return experts.experts.activate(0, merged=True).seen


def batch(name: str, count: int, dtype: torch.dtype = torch.float32) -> dict:
    """The arguments of a call for several samples, of one prompt and different noise."""

    def repeated(value):
        if isinstance(value, torch.Tensor):
            return value.repeat(count, *[1] * (value.ndim - 1)).to(dtype if value.is_floating_point() else value.dtype)
        return [each.to(dtype) for each in value] * count if isinstance(value, list) else value

    arguments = {key: repeated(value) for key, value in RECIPES[name].call().items()}
    return arguments | size(name) | {"generator": [seeded(1 + index) for index in range(count)]}


def size(name: str) -> dict[str, int]:
    height, width = SIZES.get(name, (8, 16))
    return {"height": height, "width": width}


def as_decoded_by(name: str, pipe, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) or videos (B, 3, F, H, W), in the words of the pipeline's source."""
    height, width = SIZES.get(name, (8, 16))
    config = pipe.vae.config
    if name in ("flux", "qwen"):
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    if name in ("wan", "qwen"):
        mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1)
        std = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1)
        videos = pipe.vae.decode(latents / std + mean, return_dict=False)[0]
        return videos if name == "wan" else videos[:, :, 0]
    latents = latents / config.scaling_factor
    return pipe.vae.decode(latents + (config.shift_factor or 0), return_dict=False)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_the_decoder_of_a_pipeline_decodes_as_the_pipeline(name):
    """For non-square images, with the decoder that was told of the run, and with what the pipeline itself returns."""
    pipe = tiny(name)
    settings = {"exact": True, "frames": list(range(9))} if name == "wan" else {}
    decoder = decoder_of(pipe, **settings)
    latents = generate(name, pipe, 1, **size(name))
    with torch.no_grad():
        decoded, expected = decoder(latents), as_decoded_by(name, pipe, latents)
    if name == "wan":
        decoded = decoded.transpose(1, 2)
    torch.testing.assert_close(decoded, expected)
    images = generate(name, pipe, 1, **size(name), output_type="pt")
    if name == "wan":
        images = images.transpose(1, 2)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-4, atol=1e-5)


def gradient_by_hand(name: str, pipe, x0: torch.Tensor, frames: tuple[int, ...] = (0, 4, 8), classes=RED):
    """log p (B,) of images, or the mean over frames, and its gradient with respect to latents (B, …)."""
    x0 = x0.float().requires_grad_()
    images = as_decoded_by(name, pipe, x0)
    chosen = [images[:, :, frame] for frame in frames] if name == "wan" else [images]
    classes = torch.as_tensor(classes).expand(len(x0))
    log_p = sum(-F.cross_entropy(RedClassifier()(frame).logits, classes, reduction="none") for frame in chosen)
    (gradient,) = torch.autograd.grad(log_p.sum(), x0)
    return log_p.detach() / len(chosen), gradient / len(chosen)


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_is_that_through_the_pipelines_own_decoding(name):
    """
    The last step ends in x̂0 = x_t - σ·v, guided x̂0 + s·σ²/(1-σ)·∇log p(decode(x̂0)).

    For DDIM x̂0 = (x_t - σ·ε)/α, whose gradient has a further factor 1/α: x̂0 + s·σ²/α²·∇log p(decode(x̂0)).
    """
    pipe, frames = tiny(name), (0, 5)
    is_flow = name in FLOW_PIPELINES
    if is_flow:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        pipe.scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    x0 = generate(name, pipe, 2, **size(name))
    _, gradient = gradient_by_hand(name, pipe, x0, frames)
    if is_flow:
        sigma = pipe.scheduler.sigmas[1]
        change = sigma**2 / (1 - sigma) * gradient
    else:
        alpha_bar = pipe.scheduler.alphas_cumprod[499]
        change = (1 - alpha_bar) / alpha_bar * gradient
    scale = (0.3 * x0.norm() / change.norm()).item()

    decoder = decoder_of(pipe, **({"exact": True, "frames": frames} if name == "wan" else {}))
    experts = red_experts("flow_matching" if is_flow else "ddpm")
    guide(
        pipe, experts, scale=scale, timestep_range=(0, 900 if is_flow else 600), decoder=decoder
    )  # the last step alone
    guided = generate(name, pipe, 2, **size(name))
    torch.testing.assert_close(guided - x0, scale * change, rtol=1e-3, atol=1e-4 * x0.abs().max().item())


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_scale_zero_is_no_guidance(name):
    """The velocity plus zeros: bit for bit what the pipeline does without guidance."""
    pipe = tiny(name)
    expected = generate(name, pipe, 3)
    experts = guide(pipe, scale=0.0)
    assert torch.equal(generate(name, pipe, 3), expected)
    assert seen(experts)  # it has been asked


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_samples_become_what_is_asked_for(name):
    """Two samples of one prompt in bfloat16, each with a class of its own, with classifier-free guidance in either way."""
    dtype = torch.bfloat16
    pipe = tiny(name).to(dtype)

    def log_p(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient_by_hand(name, tiny(name), samples, classes=[0, 1])

    unguided = generate(name, pipe, 3, **batch(name, 2, dtype))
    before, gradient = log_p(unguided)
    scale = (0.5 * unguided.norm() / gradient.norm()).item()
    decoder = decoder_of(pipe, **({"exact": True} if name == "wan" else {}))
    guide(pipe, target=[0, 1], scale=scale, decoder=decoder)
    after, _ = log_p(generate(name, pipe, 3, **batch(name, 2, dtype)))
    assert (after > before).all()
    assert pipe.vae.dtype == dtype


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_a_sample_does_not_depend_on_its_batch(name):
    pipe = tiny(name)
    guide(pipe, scale=1000.0)
    both = generate(name, pipe, 2, **batch(name, 2))
    alone = generate(name, pipe, 2, **batch(name, 1))
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
