"""One pipeline for any denoiser, any scheduler, any number of classes."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UNet2DModel,
)

from diffusers_dmp import (
    ClassConditionalPipeline,
    DiTModel,
    DTRTransformer2DModel,
    RemixDiTModel,
    convert_checkpoint,
    respaced_timesteps,
)
from diffusers_dmp.pipelines.denoiser_inputs import classifier_free_guidance

SCHEDULERS = [
    getattr(diffusers, name)
    for name in (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    )
]


def make_pipeline(transformer, scheduler=None, **components) -> ClassConditionalPipeline:
    scheduler = scheduler or DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipeline = ClassConditionalPipeline(transformer, scheduler, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def pipeline(tiny_dtr) -> ClassConditionalPipeline:
    return make_pipeline(tiny_dtr, id2label={i: f"class {i}" for i in range(9)} | {9: "nine, neun"})


@pytest.fixture
def latent_pipeline(tiny_dtr) -> ClassConditionalPipeline:
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    return make_pipeline(tiny_dtr, vae=randomised(vae))


@pytest.mark.parametrize("system", ["dit", "dtr", "remix"])
def test_guidance_matches_the_published_code(system):
    vectors = Vectors(f"{system}_tiny")
    model = convert_checkpoint(system, vectors.state_dict, vectors.config)
    output = model(torch.cat([vectors["cfg.x"]] * 2), vectors["cfg.t"], vectors["cfg.y"]).sample
    guidance_channels = {"dit": 3, "dtr": None, "remix": 3}[system]  # DiT's published quirk
    guided = classifier_free_guidance(output, 1.5, 4, guidance_channels)
    # the published code returns both halves: the guided prediction twice, each with its own variance
    assert_matches(guided, vectors["cfg.out"][:2])


def test_samples_what_the_baked_experts_would(tmp_path):
    remix = randomised(RemixDiTModel(**TINY_CONFIG, num_bases=2, num_experts=5))
    pipeline = ClassConditionalPipeline(remix, DDPMScheduler(variance_type="learned_range"))
    pipeline.save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline.transformer) is RemixDiTModel

    def baked_experts(sample, timestep, class_labels):
        assert (timestep == timestep[0]).all()
        return experts[int(timestep[0]) // 200](sample, timestep, class_labels)

    experts = [remix.bake_expert(expert) for expert in range(5)]
    inputs = {"class_labels": [1, 2], "guidance_scale": 2.0, "num_inference_steps": 7, "output_type": "latent"}
    images = pipeline(**inputs, generator=torch.Generator().manual_seed(0)).images
    pipeline.transformer.forward = baked_experts
    expected = pipeline(**inputs, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheduler_class", [each for each in SCHEDULERS if "FlowMatch" not in each.__name__])
def test_any_scheduler(pipeline, scheduler_class, dtype):
    # from the configuration of the saved one, with its learned variance, as users change schedulers
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    pipeline.to(dtype)
    images = pipeline([1, 2], guidance_scale=2.0, num_inference_steps=4, output_type="latent").images
    assert images.shape == (2, 4, 8, 8)
    assert images.dtype == dtype
    assert images.isfinite().all()


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_a_sample_does_not_depend_on_its_batch(pipeline, scheduler_class):
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    arguments = {"num_inference_steps": 5, "output_type": "latent"}
    together = pipeline([0, 5, 9], guidance_scale=[1.0, 2.0, 4.0], generator=generators(0, 1, 2), **arguments).images
    alone = pipeline(5, guidance_scale=2.0, generator=generators(1), **arguments).images
    torch.testing.assert_close(alone, together[1:2], atol=1e-4, rtol=1e-4)


def test_only_ancestral_schedulers_use_a_learned_variance(pipeline):
    def sample() -> torch.Tensor:
        return pipeline([0], num_inference_steps=5, output_type="latent", generator=generators(0)).images

    def change_variance() -> None:
        with torch.no_grad():
            pipeline.transformer.proj_out_2.bias.view(2, 2, 8)[..., 4:] += 1

    learned = sample()
    change_variance()
    assert not torch.allclose(sample(), learned)

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    deterministic = sample()
    change_variance()
    torch.testing.assert_close(sample(), deterministic)


def test_the_users_scheduler_stays_as_it_is(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    before = dict(pipeline.scheduler.config)
    pipeline([0], num_inference_steps=2)
    assert dict(pipeline.scheduler.config) == before
    # so that an ancestral scheduler made from it uses the learned variance again
    assert DDPMScheduler.from_config(pipeline.scheduler.config).variance_type == "learned_range"


def test_ancestral_step_has_the_published_mean_and_variance():
    # Diffusers' own step, with the model output of the published vectors
    vectors = Vectors("diffusion")
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type="sample", clip_sample=True)
    scheduler.set_timesteps(1000)
    for row, timestep in enumerate([400, 10]):
        x, model_output = vectors["ddpm.adm.x"][row : row + 1], vectors["ddpm.adm.model_output"][row : row + 1]
        mean, log_variance = vectors["ddpm.adm.mean"][row : row + 1], vectors["ddpm.adm.log_variance"][row : row + 1]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator)
        step = scheduler.step(model_output, timestep, x, generator=generator.manual_seed(0)).prev_sample
        assert_matches(step, mean + torch.exp(0.5 * log_variance) * noise)


def test_labels_may_be_names(pipeline):
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    by_index = pipeline([9, 9, 0], generator=generators(0, 1, 2), **arguments).images
    by_name = pipeline(["nine", "neun", "class 0"], generator=generators(0, 1, 2), **arguments).images
    assert torch.equal(by_index, by_name)
    tensor = pipeline(torch.tensor([9, 9, 0]), generator=generators(0, 1, 2), **arguments).images
    assert torch.equal(by_index, tensor)


def test_without_labels_samples_are_unconditional(pipeline):
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    null = pipeline([10, 10], generator=generators(0, 1), **arguments).images
    assert torch.equal(pipeline(batch_size=2, generator=generators(0, 1), **arguments).images, null)


@pytest.mark.parametrize(
    "model",
    [
        DiTModel(**TINY_CONFIG | {"num_classes": 1, "class_dropout_prob": 0.0}),
        UNet2DModel(8, 4, 8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, layers_per_block=1),
    ],
    ids=["dit", "unet"],
)  # fmt: skip
def test_unconditional_models(model):
    pipeline = make_pipeline(randomised(model))
    assert pipeline(batch_size=3, num_inference_steps=2, output_type="latent").images.shape == (3, 4, 8, 8)
    with pytest.raises(ValueError, match="guidance_scale.*null class"):
        pipeline(guidance_scale=2.0)


def test_class_conditional_unet():
    unet = UNet2DModel((8, 16), 4, 4, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, layers_per_block=1,
                       num_class_embeds=3)  # fmt: skip
    pipeline = make_pipeline(randomised(unet), DDIMScheduler())
    assert pipeline([0, 2], num_inference_steps=2, output_type="latent").images.shape == (2, 4, 8, 16)
    with pytest.raises(ValueError, match=r"class_labels.*\[0, 2\]"):
        pipeline([3])


def test_labels_may_be_numpy(pipeline):
    images = pipeline(np.array([1, 2]), num_inference_steps=1, output_type="latent").images
    assert len(images) == 2
    assert len(pipeline(np.int64(1), num_inference_steps=1, output_type="latent").images) == 1


def test_the_stock_dit_has_its_own_null_class(batch):
    stock = randomised(
        DiTTransformer2DModel(4, 12, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10)
    )
    images = make_pipeline(stock)([3], guidance_scale=2.0, num_inference_steps=2, output_type="latent").images
    assert images.isfinite().all()


@pytest.mark.parametrize("height, width", [(8, 8), (8, 16), (12, 4)])
def test_other_sizes(pipeline, height, width):
    images = pipeline([1], height=height, width=width, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 4, height, width)


def test_output_types(latent_pipeline):
    arguments = {"class_labels": [0, 1], "num_inference_steps": 2}

    def images(output_type):
        return latent_pipeline(**arguments, generator=generators(0, 1), output_type=output_type).images

    assert images("latent").shape == (2, 4, 8, 8)
    tensors = images("pt")
    assert tensors.shape == (2, 3, 16, 16)
    assert tensors.min() >= 0 and tensors.max() <= 1
    np.testing.assert_allclose(images("np"), tensors.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(images("pil")[1]) / 255, tensors[1].permute(1, 2, 0), atol=1 / 255)
    (first,) = latent_pipeline(**arguments, generator=generators(0, 1), output_type="pt", return_dict=False)
    assert torch.equal(first, tensors)


def test_grey_images_are_grey():
    model = randomised(DiTModel(**TINY_CONFIG | {"in_channels": 1, "out_channels": 1}))
    (image,) = make_pipeline(model, DDIMScheduler())([0], num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (8, 8))


def test_custom_timesteps(pipeline):
    visited = []
    pipeline(
        [0],
        timesteps=respaced_timesteps(1000, "3,2,1"),
        callback_on_step_end=lambda pipe, i, t, tensors: visited.append(int(t)) or tensors,
    )
    assert visited == respaced_timesteps(1000, "3,2,1")
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler, which does not"):
        pipeline([0], timesteps=[500, 100])


def test_callback_may_change_the_latents(pipeline):
    def zero(pipe, i, t, tensors):
        assert pipe.num_timesteps == 3
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipeline([0], num_inference_steps=3, callback_on_step_end=zero, output_type="latent").images
    assert (images == 0).all()


def test_initial_latents_decide_a_deterministic_sample(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sampled = pipeline([0], num_inference_steps=3, generator=generators(3), output_type="latent").images
    given = pipeline([0], num_inference_steps=3, latents=latents, output_type="latent").images
    assert torch.equal(given, sampled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipeline, dtype):
    arguments = {"guidance_scale": [2.3], "num_inference_steps": 2, "output_type": "latent"}
    latents = torch.randn(1, 4, 8, 8)  # in float32, as users have them
    images = pipeline.to(dtype)([0], latents=latents, generator=generators(0), **arguments).images
    assert images.dtype == dtype
    assert images.isfinite().all()
    scalar = pipeline([0], latents=latents, generator=generators(0), **arguments | {"guidance_scale": 2.3}).images
    assert torch.equal(scalar, images)


def test_the_vae_may_have_a_dtype_of_its_own(latent_pipeline):
    latent_pipeline.transformer.to(torch.bfloat16)
    images = latent_pipeline([0], num_inference_steps=2, output_type="pt").images
    assert images.dtype == torch.float32


def test_offloading_hooks_change_nothing(latent_pipeline):
    # the hooks are Diffusers' own; the CPU takes the place of the accelerator
    arguments = {"class_labels": [0], "num_inference_steps": 2, "output_type": "pt"}
    expected = latent_pipeline(**arguments, generator=generators(0)).images
    latent_pipeline.enable_model_cpu_offload(device="cpu")
    assert latent_pipeline.transformer._hf_hook is not None and latent_pipeline.vae._hf_hook is not None
    for _ in range(2):
        torch.testing.assert_close(latent_pipeline(**arguments, generator=generators(0)).images, expected)


def test_progress_bar_counts_the_steps(pipeline, capfd):
    pipeline.set_progress_bar_config(disable=False)
    pipeline([0], num_inference_steps=4)
    assert "4/4" in capfd.readouterr().err


@pytest.mark.parametrize("loader", [DiffusionPipeline, ClassConditionalPipeline])
def test_round_trip_twice(latent_pipeline, tmp_path, loader):
    latent_pipeline.register_to_config(id2label={"0": "zero"})
    latent_pipeline.save_pretrained(tmp_path / "once")
    loader.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    loaded = loader.from_pretrained(tmp_path / "twice")
    assert type(loaded) is ClassConditionalPipeline
    assert type(loaded.transformer) is DTRTransformer2DModel
    loaded.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    expected = latent_pipeline([0], generator=generators(0), **arguments).images
    assert torch.equal(loaded("zero", generator=generators(0), **arguments).images, expected)
    assert not list(tmp_path.rglob("*.bin"))


@pytest.fixture
def stock_folder(tmp_path):
    """A repository of Diffusers' own `DiTPipeline`."""
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 8}
    transformer = randomised(DiTTransformer2DModel(**config, out_channels=8, num_embeds_ada_norm=1000))
    vae = randomised(AutoencoderKL(block_out_channels=[32], norm_num_groups=8, latent_channels=4))
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())  # with class names, as in facebook/DiT-XL-2-256
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": {"207": "golden retriever"}}))
    return tmp_path


def test_loads_a_repository_of_diffusers_own_dit(stock_folder):
    """And generates what Diffusers' own pipeline does."""
    arguments = {"guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "np"}
    stock = DiTPipeline.from_pretrained(stock_folder)
    pipeline = ClassConditionalPipeline.from_pretrained(stock_folder)
    from_components = ClassConditionalPipeline(**stock.components)
    for each in (stock, pipeline, from_components):
        each.set_progress_bar_config(disable=True)
    expected = stock([207, 3], generator=generators(0)[0], **arguments).images
    images = pipeline([207, 3], generator=generators(0)[0], **arguments).images
    np.testing.assert_allclose(images, expected, atol=1e-4)
    images = from_components([207, 3], generator=generators(0)[0], **arguments).images
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert pipeline("golden retriever", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 8, 8)


def test_a_stock_dit_is_saved_as_this_pipeline(stock_folder, tmp_path):
    pipeline = ClassConditionalPipeline.from_pretrained(stock_folder)
    pipeline.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again) is ClassConditionalPipeline and type(again.transformer) is DiTTransformer2DModel
    assert again.get_label_ids("golden retriever") == [207]


@pytest.mark.slow
def test_loads_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    code = (
        "import sys, diffusers_dmp; from diffusers import DiffusionPipeline, AutoModel; "
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1]); "
        "model = AutoModel.from_pretrained(sys.argv[1], subfolder='transformer'); "
        "print(type(pipe).__name__, type(pipe.transformer).__name__, type(model).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["ClassConditionalPipeline", "DTRTransformer2DModel", "DTRTransformer2DModel"]
    # no warning that could confuse the user
    assert "Expected types" not in result.stderr


def test_a_component_loads_by_its_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for loader in (AutoModel, DTRTransformer2DModel):
        assert isinstance(loader.from_pretrained(str(tmp_path), subfolder="transformer"), DTRTransformer2DModel)


def test_refuses_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="pipeline folder with a model_index.json.*which has none"):
        ClassConditionalPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="model_index.json"):  # Diffusers' own message
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": [11]}, r"class_labels.*\[0, 10\].*\[11\]"),
        ({"class_labels": [-1]}, "class_labels"),
        ({"class_labels": []}, "class_labels"),
        ({"class_labels": [1.7]}, r"class_labels.*integers or names.*\[1.7"),
        ({"class_labels": None, "batch_size": 0}, "batch_size"),
        ({"guidance_scale": 2.0, "guidance_channels": 5}, r"guidance_channels.*\[1, 4\].*5"),
        ({"guidance_scale": 2.0, "guidance_channels": 0}, "guidance_channels"),
        ({"class_labels": ["zehn"]}, "class_labels.*'class 0'.*'neun'.*'zehn'"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale.*1 of them.*2"),
        ({"height": 7}, "height.*divisible by 2.*7 x 8"),
        ({"width": 0}, "width"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents"),
        ({"generator": [torch.Generator()] * 2}, "generator"),
        ({"output_type": "jpeg"}, "output_type.*'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "callback_on_step_end_tensor_inputs.*prompt"),
    ],
)
def test_refuses_bad_input(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": [0]} | arguments)


def test_refuses_a_scheduler_that_does_not_fit(pipeline):
    pipeline.scheduler = DDIMScheduler(num_train_timesteps=500)
    with pytest.raises(ValueError, match="DDIMScheduler with num_train_timesteps=500"):
        pipeline([0])
    without_variance = randomised(DiTModel(**TINY_CONFIG | {"out_channels": 4}))
    with pytest.raises(ValueError, match="variance_type.*4 input and 4 output channels"):
        make_pipeline(without_variance)([0])
    needs_labels = randomised(DiTModel(**TINY_CONFIG, class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="class_labels.*no null class"):
        make_pipeline(needs_labels)(batch_size=2)
