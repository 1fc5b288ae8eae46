"""Decoders of latents: which patches are where, which frames guide, which VAE decodes, and who knows which pipeline."""

import copy
import gc
import inspect
import re
import weakref

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import REPOSITORY
from diffusers import AutoencoderKLWan, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from peft import LoraConfig
from test_guided_pipelines import guide, seen, tiny
from tiny_pipelines import RECIPES, flux, generate, image_vae, randn, sd3, wan

from diffusers_dmp import (
    _PIPELINES,
    ClassConditionalPipeline,
    DenoiserExperts,
    DiTModel,
    LatentDecoder,
    LoraExperts,
    NoiseIntervals,
    SentenceToImagePipeline,
    VideoDecoder,
    decoder_of,
    register_decoder,
)
from diffusers_dmp.diffusion.latents import decode_latents, pack_latents
from diffusers_dmp.guidance import PackedLatentDecoder, pipeline_decoders
from diffusers_dmp.guidance.patch_positions import PatchPositions

FLUX_SIZES = [(8, 16), (4, 32), (16, 8)]  # 32 patches each


def flux_sample(pipe, size: tuple[int, int]) -> torch.Tensor:
    return generate("flux", pipe, 2, height=size[0], width=size[1])


# Where the patches are


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_images_of_equally_many_patches_are_told_apart(name):
    """In one pipeline after the other, the experts see images of the height and width that were asked for."""
    pipe = tiny(name)
    experts = guide(pipe)
    for height, width in [(32, 64), (64, 32), (16, 128)]:
        generate(name, pipe, 2, height=height, width=width)
        assert seen(experts)[-1] == (1, 3, height, width)


def test_without_the_denoiser_packed_latents_are_refused():
    decoder = decoder_of(tiny("flux"))
    with pytest.raises(ValueError, match="Expected the denoiser to be told the positions"):
        decoder(randn(1, 32, 4))


def test_another_denoiser_is_not_mistaken_for_the_one_that_is_watched():
    pipe = tiny("flux")
    guide(pipe)
    flux_sample(pipe, FLUX_SIZES[0])
    pipe.transformer = flux(seed=1)
    with pytest.raises(ValueError, match="call `GuidedScheduler.for_pipeline` again"):
        flux_sample(pipe, FLUX_SIZES[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_ids": torch.zeros(32, 3)}, "whole image"),
        ({"img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(7.0), torch.arange(5.0))}, "whole image"),
        ({"img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(4.0)).flip(0)}, "whole image"),
        ({"img_shapes": [[(1, 4, 4), (1, 4, 8)]]}, "1 x 4 x 4"),
        ({"img_shapes": [[(2, 4, 4)]]}, "2 x 4 x 4"),
        ({"hidden_states": randn(1, 32, 4)}, "told the positions"),
    ],
)  # fmt: skip
def test_positions_that_are_not_those_of_the_latents_are_refused(arguments, message):
    positions = PatchPositions()
    positions.note(arguments)
    with pytest.raises(ValueError, match=message):
        positions.grid(randn(1, 32, 4))


@pytest.mark.parametrize("shapes", [[[(1, 4, 8), (1, 2, 2)]], [(1, 4, 8)]])
def test_the_first_of_the_image_shapes_is_that_of_the_latents(shapes):
    """Qwen-Image-Edit goes on with its references; the ControlNet's pipeline has a list the less."""
    positions = PatchPositions()
    positions.note({"img_shapes": shapes * 2})
    assert positions.grid(randn(2, 32, 4)) == (4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(1, 300), (300, 1), (260, 3), (3, 260), (1, 1)])
def test_positions_are_read_as_they_are_rounded(grid, dtype):
    """From 256 on, bfloat16 does not have all whole numbers."""
    rows, columns = torch.arange(grid[0]).float(), torch.arange(grid[1]).float()
    reference = torch.tensor([[1.0, 0.0, 0.0]])  # of a reference image, whose patches come afterwards
    ids = torch.cartesian_prod(torch.zeros(1), rows, columns)
    positions = PatchPositions()
    positions.note({"img_ids": torch.cat([ids, reference]).to(dtype)})
    assert positions.grid(torch.empty(2, len(ids), 4)) == grid


def _experts(pipe) -> None:
    pipe.transformer = DenoiserExperts([flux(0), flux(1)], NoiseIntervals.from_sigmas([0.7]))


def _loras(pipe) -> None:
    torch.manual_seed(1)
    for name in ("low", "high"):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    LoraExperts(["low", "high"], NoiseIntervals.from_sigmas([0.7])).attach(pipe.transformer)


def _compiled(pipe) -> None:
    pipe.transformer.compile(backend="eager", fullgraph=True)


def _compiled_blocks(pipe) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)


def _model_offload(pipe) -> None:
    cpu_offload_with_hook(pipe.vae, "cpu", cpu_offload_with_hook(pipe.transformer, "cpu")[1])


def _layer_offload(pipe) -> None:
    cpu_offload(pipe.transformer, "cpu")
    cpu_offload(pipe.vae, "cpu")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        _experts,
        _loras,
        pytest.param(_compiled, marks=pytest.mark.slow),
        pytest.param(_compiled_blocks, marks=pytest.mark.slow),
        _model_offload,
        _layer_offload,
    ],
)
def test_what_else_a_denoiser_carries_does_not_matter(change, before):
    """Noise experts, compilation and offloading, added before or after; guided as without offloading and compilation."""
    pipe = tiny("flux")
    if before or change is _experts:
        change(pipe)
        flux_sample(pipe, FLUX_SIZES[0])
    experts = guide(pipe, scale=3e4)
    if not before and change is not _experts:
        change(pipe)
    sample = flux_sample(pipe, FLUX_SIZES[1])
    assert seen(experts)[-1] == (1, 3, *FLUX_SIZES[1])
    if change not in (_experts, _loras):
        pipe = tiny("flux")
        guide(pipe, scale=3e4)
        torch.testing.assert_close(sample, flux_sample(pipe, FLUX_SIZES[1]))


def test_a_copied_pipeline_has_positions_of_its_own():
    pipe = tiny("flux")
    guide(pipe)
    flux_sample(pipe, FLUX_SIZES[0])
    copied = copy.deepcopy(pipe)
    expected = [flux_sample(pipe, size) for size in FLUX_SIZES]
    pipe.scheduler = pipe.scheduler.scheduler
    for size, sample in zip(FLUX_SIZES, expected):
        torch.testing.assert_close(flux_sample(copied, size), sample)


def test_nothing_stays_behind_on_the_denoiser():
    pipe = tiny("flux")
    unguided = flux_sample(pipe, FLUX_SIZES[0])
    names = set(vars(pipe.transformer))
    for _ in range(2):
        guide(pipe)
        flux_sample(pipe, FLUX_SIZES[0])
        pipe.scheduler = pipe.scheduler.scheduler
    assert not pipe.transformer._forward_pre_hooks
    assert set(vars(pipe.transformer)) == names
    assert torch.equal(flux_sample(pipe, FLUX_SIZES[0]), unguided)


def test_a_decoder_keeps_no_denoiser_in_memory():
    pipe = tiny("flux")
    decoder = decoder_of(pipe)
    denoiser = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert denoiser() is None
    assert isinstance(decoder, LatentDecoder)


# Reference images, images to images: latents of the same layout


def test_flux_kontext_is_guided_by_the_image_not_by_its_reference():
    pipe = tiny("flux")
    kontext = diffusers.FluxKontextPipeline(**pipe.components)
    experts = guide(kontext)
    call = RECIPES["flux"].call() | {
        "height": 8,
        "width": 16,
        "_auto_resize": False,
        "image": torch.rand(1, 3, 16, 16),
    }
    kontext.set_progress_bar_config(disable=True)
    kontext(**call, max_area=128, num_inference_steps=2, output_type="latent")
    assert seen(experts)[-1] == (1, 3, 8, 16)


def test_flux_image_to_image():
    pipe = tiny("flux")
    other = diffusers.FluxImg2ImgPipeline(**pipe.components)
    experts = guide(other)
    call = RECIPES["flux"].call() | {"height": 8, "width": 16, "image": torch.rand(1, 3, 8, 16), "strength": 0.9}
    other.set_progress_bar_config(disable=True)
    other(**call, num_inference_steps=3, output_type="latent")
    assert seen(experts)[-1] == (1, 3, 8, 16)


# Frames of videos


@pytest.fixture(scope="module")
def video_vae() -> AutoencoderKLWan:
    return tiny("wan").vae


@torch.no_grad()
def test_exact_frames_are_those_of_the_whole_video(video_vae):
    latents = randn(2, 16, 3, 2, 4)
    frames = decode_latents(video_vae, latents).transpose(1, 2)  # 9 of them
    decoder = VideoDecoder(video_vae, [0, 3, 8, -4], exact=True)
    torch.testing.assert_close(decoder(latents), frames[:, [0, 3, 8, 5]])
    torch.testing.assert_close(VideoDecoder(video_vae, exact=True)(latents), frames[:, [0, 4, 8]])


@torch.no_grad()
def test_a_frame_on_its_own_is_the_image_of_its_latents(video_vae):
    """Frame 0 is the first latent frame, frames 1 to 4 the second, 5 to 8 the third."""
    latents = randn(2, 16, 3, 2, 4)
    decoder = VideoDecoder(video_vae, [0, 1, 4, 5, -1])
    expected = [decode_latents(video_vae, latents[:, :, [index]])[:, :, 0] for index in (0, 1, 1, 2, 2)]
    torch.testing.assert_close(decoder(latents), torch.stack(expected, 1))
    assert VideoDecoder(video_vae)(latents).shape == (2, 3, 3, 16, 32)
    assert VideoDecoder(video_vae)(latents[:, :, :1]).shape == (2, 1, 3, 16, 32)  # an image


def test_only_chosen_frames_are_guided_and_exact_ones_change_what_is_before_them(video_vae):
    latents = randn(1, 16, 3, 2, 4).requires_grad_()
    for exact, guided in [(False, [False, True, False]), (True, [True, True, False])]:
        images = VideoDecoder(video_vae, [4], exact)(latents)
        (gradient,) = torch.autograd.grad(images.square().sum(), latents)
        assert [bool(gradient[:, :, index].any()) for index in range(3)] == guided


@pytest.mark.parametrize("frame", [9, -10])
def test_frames_that_a_video_does_not_have(video_vae, frame):
    with pytest.raises(ValueError, match=rf"a video of 9 frames, but got {frame}"):
        VideoDecoder(video_vae, [frame])(randn(1, 16, 3, 2, 2))


def test_no_frames(video_vae):
    with pytest.raises(ValueError, match="one frame or more"):
        VideoDecoder(video_vae, [])


def test_a_given_first_frame_does_not_guide(video_vae):
    """Wan 2.2's 5B model puts the given image in the place of the first latent frame at the end."""
    latents = randn(1, 16, 3, 2, 4)
    decoder = VideoDecoder(video_vae, first_is_given=True)
    torch.testing.assert_close(decoder(latents), VideoDecoder(video_vae, [4, 8])(latents))
    with pytest.raises(ValueError, match=r"\[1, 8\].* of which the first is given, but got 0"):
        VideoDecoder(video_vae, [0], first_is_given=True)(latents)
    with pytest.raises(ValueError, match="`exact` to be False"):
        VideoDecoder(video_vae, exact=True, first_is_given=True)
    pipe = diffusers.WanImageToVideoPipeline(
        **tiny("wan").components | {"image_encoder": None, "image_processor": None}, expand_timesteps=True
    )
    assert decoder_of(pipe).first_is_given
    assert not decoder_of(RECIPES["wan"].pipe(wan(), expand_timesteps=True)).first_is_given  # of text alone


@torch.no_grad()
def test_the_vae_of_wan_5b():
    """Latents of patches, and residual blocks."""
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 4, latents_std=[1.2] * 4,
    ).eval()  # fmt: skip
    latents = randn(1, 4, 3, 2, 2)
    frames = decode_latents(vae, latents).transpose(1, 2)
    torch.testing.assert_close(VideoDecoder(vae, [2, 7], exact=True)(latents), frames[:, [2, 7]])
    assert VideoDecoder(vae)(latents).shape == (1, 3, 3, 32, 32)


# The VAE


def image_latents() -> torch.Tensor:
    return randn(1, 4, 8, 8)


def decoding_vae(**config) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return image_vae(4, **config)


def gradient_through(decode, latents: torch.Tensor) -> torch.Tensor:
    latents = latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(decode(latents).square().sum(), latents)
    return gradient


def _sequential(vae) -> None:
    cpu_offload(vae, "cpu")


def _hooked(vae) -> None:
    cpu_offload_with_hook(vae, "cpu", cpu_offload_with_hook(torch.nn.Linear(1, 1), "cpu")[1])


def _groups(vae) -> None:
    vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def _checkpointing(vae) -> None:
    vae.enable_gradient_checkpointing()


def _slices_and_tiles(vae) -> None:
    vae.enable_slicing()
    vae.enable_tiling()


def _fused(vae) -> None:
    vae.fuse_qkv_projections()


@pytest.mark.parametrize("change", [None, _sequential, _hooked, _groups, _checkpointing, _slices_and_tiles, _fused])
def test_the_vae_of_a_pipeline_does_not_change(change):
    """Gradients are those of the plain VAE, which gets none itself."""
    vae, latents = decoding_vae(), image_latents()
    expected = gradient_through(lambda z: decode_latents(vae, z), latents)
    if change is not None:
        change(vae)
    before = [(name, tensor.device, tensor.requires_grad) for name, tensor in vae.named_parameters()]
    torch.testing.assert_close(gradient_through(LatentDecoder(vae), latents), expected)
    assert [(name, tensor.device, tensor.requires_grad) for name, tensor in vae.named_parameters()] == before
    assert all(parameter.grad is None for parameter in vae.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_is_shared_and_one_in_float16_is_copied_for_a_run(dtype):
    vae, latents = decoding_vae().to(dtype), image_latents()
    decoder = LatentDecoder(vae)
    decoder(latents)
    weights = dict(decoder._frozen.named_parameters())
    assert all(weights[name].data_ptr() == tensor.data_ptr() for name, tensor in vae.named_parameters())
    assert not any(tensor.requires_grad for tensor in weights.values())

    vae.half()
    decoder.reset()  # as every run begins
    images = decoder(latents)
    assert decoder._frozen.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(images, decode_latents(copy.deepcopy(vae).float(), latents))
    assert vae.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_through_a_vae_in_half_precision(dtype):
    """Tiny ones do not underflow, and point where those in float32 do."""
    vae, latents = decoding_vae(), image_latents()
    expected = gradient_through(LatentDecoder(vae), latents)
    tiny_gradient = gradient_through(lambda z: 1e-6 * LatentDecoder(vae.to(dtype))(z), latents)
    assert tiny_gradient.dtype == torch.float32
    assert torch.cosine_similarity(tiny_gradient.flatten() * 1e12, expected.flatten(), dim=0) > 0.999


def test_weights_that_are_no_numbers_are_refused():
    vae = decoding_vae()
    vae.decoder.conv_in.weight = torch.nn.Parameter(vae.decoder.conv_in.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"not to be quantised, but got 'decoder.conv_in.weight' in torch.int8"):
        LatentDecoder(vae)(image_latents())


def test_another_vae_of_the_same_latents():
    """A small autoencoder decodes at a fraction of the cost."""
    pipe = tiny("sd3")
    torch.manual_seed(1)
    small = diffusers.AutoencoderTiny(encoder_block_out_channels=(4,), decoder_block_out_channels=(4,), num_encoder_blocks=(1,),
                                      num_decoder_blocks=(1,), latent_channels=4)  # fmt: skip
    experts = guide(pipe, vae=small.eval())
    generate("sd3", pipe, 2)
    assert pipe.scheduler.decoder.vae is small
    assert seen(experts)


@pytest.mark.parametrize("name", ["sd3", "wan", "qwen"])
def test_a_decoder_never_waits_for_an_accelerator(monkeypatch, name):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks.pretended_accelerator import PretendedAccelerator

    pipe, accelerator = tiny(name), PretendedAccelerator()
    shapes = {"sd3": (1, 4, 8, 8), "wan": (1, 16, 3, 2, 2), "qwen": (1, 16, 16)}
    with accelerator, torch.no_grad():
        decoder = decoder_of(pipe)
        if name == "qwen":
            decoder.positions.note({"img_shapes": [[(1, 4, 4)]]})
        decoder._frozen = accelerator.put(decoder.vae)
        latents = accelerator.put(randn(*shapes[name]))
        decoder(latents)
        assert accelerator.waits == []


# Which decoder a pipeline has


def test_pipelines_of_pixels_have_none():
    unet = UNet2DModel(8, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       norm_num_groups=4, layers_per_block=1)  # fmt: skip
    assert decoder_of(DDPMPipeline(unet, DDPMScheduler())) is None
    dit = DiTModel(4, 12, 4, 8, num_layers=2, sample_size=8, num_classes=10)
    assert decoder_of(ClassConditionalPipeline(dit, DDPMScheduler())) is None
    assert decoder_of(SentenceToImagePipeline(sd3(), FlowMatchEulerDiscreteScheduler())) is None
    with pytest.raises(ValueError, match="no `frames` for a DDPMPipeline without a VAE"):
        decoder_of(DDPMPipeline(unet, DDPMScheduler()), frames=[0])


@pytest.mark.parametrize("make", [
    lambda vae: ClassConditionalPipeline(DiTModel(4, 12, 4, 8, num_layers=2, sample_size=8, num_classes=10), DDPMScheduler(), vae=vae),
    lambda vae: SentenceToImagePipeline(sd3(), FlowMatchEulerDiscreteScheduler(), vae=vae),
])  # fmt: skip
def test_pipelines_of_this_package_with_a_vae(make):
    vae, latents = decoding_vae(), image_latents()
    with torch.no_grad():
        torch.testing.assert_close(decoder_of(make(vae))(latents), decode_latents(vae, latents))


def test_a_pipeline_of_latents_that_was_loaded_without_its_vae():
    pipe = tiny("flux")
    vae, pipe.vae = pipe.vae, None
    with pytest.raises(ValueError, match="Expected a FluxPipeline to have a VAE, or another one as `vae`"):
        decoder_of(pipe)
    assert decoder_of(pipe, vae=vae).vae is vae


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 4, 3, 8, 8)])
def test_packed_latents_and_videos_need_their_own_decoder(shape):
    with pytest.raises(ValueError, match="`GuidedScheduler.for_pipeline` finds the decoder"):
        LatentDecoder(decoding_vae())(randn(*shape))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(pipeline_decoders, "_DECODERS", dict(pipeline_decoders._DECODERS))


class PackedStableDiffusion(diffusers.DiffusionPipeline):
    """A pipeline that nobody knows, with packed latents."""

    def __init__(self, vae, transformer):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer)


class DerivedStableDiffusion(PackedStableDiffusion):
    pass


def test_an_unknown_pipeline_says_how_it_is_made_known(registry):
    pipe = DerivedStableDiffusion(decoding_vae(), sd3())
    with pytest.raises(
        ValueError, match=r"DerivedStableDiffusion with vae\. `register_decoder\(DerivedStableDiffusion, decode\)`"
    ):
        decoder_of(pipe)

    def decode(vae, latents):
        assert vae.dtype == torch.float32  # where it would be float16
        return vae.decode(latents.unflatten(1, (8, 8)).movedim(-1, 1)).sample

    register_decoder(PackedStableDiffusion, decode)
    latents = image_latents()
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample
        pipe.vae.half()
        images = decoder_of(pipe)(latents.flatten(2).mT)
    torch.testing.assert_close(images, expected, rtol=1e-2, atol=1e-2)

    class Inverted(LatentDecoder):
        def decode(self, vae, latents):
            return -decode_latents(vae, latents)

    register_decoder(DerivedStableDiffusion, Inverted)
    assert isinstance(decoder_of(pipe), Inverted)


@pytest.mark.parametrize(
    "arguments", [("StableDiffusionPipeline", lambda *_: None), (PackedStableDiffusion, "decode")]
)
def test_what_cannot_be_registered(arguments):
    with pytest.raises(ValueError, match="Expected `(pipeline_class|decoder)` to be a"):
        register_decoder(*arguments)


def test_frames_are_of_videos():
    with pytest.raises(ValueError, match="no `frames` and no `exact` for a StableDiffusion3Pipeline"):
        guide(tiny("sd3"), frames=[0])
    with pytest.raises(ValueError, match="no `frames` beside a `decoder`"):
        guide(tiny("wan"), frames=[0], decoder=lambda latents: latents)
    pipe = tiny("wan")
    guide(pipe, frames=[0, -1])
    assert pipe.scheduler.decoder.frames == [0, -1]


# formulas of Diffusers' sources: z / scale, with a shift, or with mean and standard deviation of each channel
SCALED = re.compile(
    r"(latents|denoised)(\.to\([^()]*\))? / self\.vae\.config\.scaling_factor"
    r"|latents \* latents_std / self\.vae\.config\.scaling_factor \+ latents_mean"
    r"|1 / self\.vae\.config\.scaling_factor \* latents"
    r"|latents / latents_std \+ latents_mean"
)


@pytest.mark.slow  # 6 s, to import all of them
def test_registered_pipelines_decode_as_their_decoder_does():
    """In their sources: the same scaling, the same unpacking, and a denoiser that is told where the patches are."""
    found = 0
    for name, kind in pipeline_decoders._DECODERS.items():
        pipeline_class = None if name in _PIPELINES else getattr(diffusers, name, None)
        if pipeline_class is None or hasattr(pipeline_class, "_backends"):
            continue  # of this package, newer than this version of Diffusers, or in need of a package that is not installed
        found += 1
        source = inspect.getsource(pipeline_class)
        assert "self.vae.decode(" in source
        assert SCALED.search(source), name
        assert ("_unpack_latents" in source) == (kind is PackedLatentDecoder), name
        if kind is PackedLatentDecoder:
            assert "img_ids=" in source or "img_shapes=" in source, name
            assert "transformer" in inspect.signature(pipeline_class).parameters, name
            packed = randn(2, 32, 16)
            unpacked = pipeline_class._unpack_latents(packed, 128, 64, vae_scale_factor=8)
            assert torch.equal(pack_latents(unpacked.reshape(2, 4, 16, 8)), packed), name
        # no other pipeline is taken for this one
        derived = {
            each.__name__ for each in pipeline_class.__subclasses__() if each.__module__.startswith("diffusers.")
        }
        assert derived <= pipeline_decoders._DECODERS.keys()
    assert found > 80
