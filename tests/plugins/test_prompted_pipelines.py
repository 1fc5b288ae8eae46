"""Pipelines save, load, offload and run transformers with prompts."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import randomised
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from prompted import SIZES

from diffusers_dmp import ClassConditionalPipeline, PromptPatch

pytest_plugins = ["prompted_fixtures"]


@pytest.fixture
def pipeline(patched_dit) -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline(patched_dit, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], guidance_scale=1.5, num_inference_steps=3, output_type="pt", generator=generator).images


def test_the_pipeline_saves_its_prompts(pipeline, tmp_path):
    """They were attached by hand before the pipeline was made: see the fixture."""
    images = generate(pipeline)
    pipeline.save_pretrained(tmp_path / "patched")
    saved = {path.parent.name for path in (tmp_path / "patched").glob("*/*.safetensors")}
    assert saved == {"transformer", "prompt_patch"}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "patched")
    assert loaded.prompt_patch.transformer is loaded.transformer
    assert torch.equal(generate(loaded), images)
    assert torch.equal(generate(ClassConditionalPipeline(**loaded.components)), images)
    assert torch.equal(generate(copy.deepcopy(loaded)), images)

    loaded.prompt_patch.detach()
    plain = generate(loaded)
    assert not torch.equal(plain, images)
    assert loaded.prompt_patch is None and loaded.components["prompt_patch"] is None
    assert torch.equal(
        generate(ClassConditionalPipeline.from_pretrained(tmp_path / "patched", prompt_patch=None)), plain
    )
    loaded.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "prompt_patch").exists()
    assert torch.equal(generate(DiffusionPipeline.from_pretrained(tmp_path / "plain")), plain)


def test_prompts_given_to_a_pipeline_are_put_into_eval_mode(tiny_dit):
    pipeline = ClassConditionalPipeline(tiny_dit, DDIMScheduler(), prompt_patch=PromptPatch(48, 16, 2))
    assert PromptPatch.attached_to(tiny_dit) is pipeline.prompt_patch and not pipeline.prompt_patch.training


@pytest.mark.slow
def test_the_pipeline_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    torch.save(generate(pipeline), tmp_path / "images.pt")
    script = f"""
import torch
from diffusers import DiffusionPipeline
import diffusers_dmp
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
generator = torch.Generator().manual_seed(0)
images = pipeline([1, 2], guidance_scale=1.5, num_inference_steps=3, output_type="pt", generator=generator).images
assert torch.equal(images, torch.load({str(tmp_path / "images.pt")!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("offload", ["models", pytest.param("groups", marks=pytest.mark.group_offload)])
def test_the_prompts_of_an_offloaded_pipeline_are_not_offloaded(pipeline, tmp_path, offload):
    """Their layers are not called as modules, so that no hook would bring them back."""
    images = generate(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    if offload == "models":
        loaded.enable_model_cpu_offload(device="cpu")
        assert hasattr(loaded.transformer, "_hf_hook")
    else:
        loaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        assert hasattr(loaded.transformer.proj_out_2, "_diffusers_hook")
    for module in loaded.prompt_patch.modules():
        assert not hasattr(module, "_hf_hook") and not hasattr(module, "_diffusers_hook")
    torch.testing.assert_close(generate(loaded), images)
    loaded.prompt_patch.detach()
    assert (generate(loaded) - images).abs().max() > 1e-3


def test_the_pipeline_in_half_precision(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.prompt_patch.dtype == loaded.transformer.dtype == torch.bfloat16
    loaded.set_progress_bar_config(disable=True)
    # bfloat16 rounds by 2⁻⁹ in each layer of three steps; guidance and DDIM amplify this for some pixels, less so on average
    assert (generate(loaded).float() - generate(pipeline)).abs().mean() < 0.02


def test_another_librarys_pipeline_saves_the_base_alone(tmp_path):
    """Its constructor takes no prompts, so that they are saved to a folder of their own."""
    from diffusers import AutoencoderKL

    config = SIZES | {"num_embeds_ada_norm": 1000, "out_channels": 4}
    transformer = randomised(DiTTransformer2DModel(**config))
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), norm_num_groups=8)
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline([1], num_inference_steps=2, output_type="np", generator=generator).images

    plain = images(pipeline)
    patch = randomised(PromptPatch.for_transformer(pipeline.transformer)).attach(pipeline.transformer)
    patched = images(pipeline)
    pipeline.save_pretrained(tmp_path / "pipeline")
    patch.save_pretrained(tmp_path / "patch")

    loaded = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert (images(loaded) == plain).all()
    PromptPatch.from_pretrained(tmp_path / "patch").attach(loaded.transformer)
    assert (images(loaded) == patched).all()
    assert not (patched == plain).all()
