"""The diagnosis of a text pipeline's LoRA experts on encoded images and captions."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import RECIPES, randn, sd3, sd3_pipe, wan, wan_pipe
from tiny_text import with_text
from typer.testing import CliRunner

from diffusers_dmp import LoraExperts, NoiseIntervals
from diffusers_dmp.cli import app
from diffusers_dmp.evaluation.digits import digit_images
from diffusers_dmp.evaluation.text_diagnostics import diagnose_text_pipeline
from diffusers_dmp.training.data.encoded_text import load_encoded
from diffusers_dmp.training.data.prompt_encoding import PromptEncodingArguments, encode_prompts

HALVES = NoiseIntervals.from_sigmas([0.5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, LoRA experts for it, and images of two sizes with captions, encoded with it."""
    folder = tmp_path_factory.mktemp("text")
    pipeline = with_text("sd3", RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser()))
    pipeline.save_pretrained(folder / "sd3")
    (folder / "images").mkdir()
    images, labels = digit_images()
    for number in range(10):
        size = (16, 16) if number % 3 else (24, 12)
        Image.fromarray(images[number]).resize(size).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"a handwritten {labels[number]}")
    encode_prompts(
        PromptEncodingArguments(
            dataset=str(folder / "images"), pipeline=str(folder / "sd3"), resolution=16, aspect_ratio_buckets=True,
            output_dir=str(folder / "encoded"),
        )
    )  # fmt: skip
    _, experts = with_loras(["low", "high"], HALVES)
    experts.save_pretrained(folder / "experts")
    return folder


def with_loras(names, intervals):
    """The tiny SD3, and experts attached to it: LoRAs with random weights, the same for the same name."""
    transformer = sd3()
    for name in ("low", "high"):
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), name)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    pipeline = sd3_pipe(transformer)
    return pipeline, LoraExperts(names, intervals).attach(pipeline)


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    columns = {"mean": randn(count, 1, 4, 8, 8, seed=5), "std": randn(count, 1, 4, 8, 8, seed=6).abs()}
    return [columns | {"prompt_embeds": randn(count, 7, 32), "pooled_prompt_embeds": randn(count, 64)}]


def test_the_losses_of_one_denoiser_written_by_hand():
    """The mean of (v - (ε - x0))² at timesteps that cover each band evenly."""
    pipeline = RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())
    (columns,) = batches()
    in_latents, noise = (torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 0))
    x0 = columns["mean"][:, 0] + columns["std"][:, 0] * in_latents
    expected = []
    for low in (0, 500):
        time = low + (torch.arange(6) + 0.5) / 6 * 500
        sigma = (time / 1000).view(-1, 1, 1, 1)
        x_t = (1 - sigma) * x0 + sigma * noise
        with torch.no_grad():
            velocity = pipeline.transformer(
                x_t, columns["prompt_embeds"], columns["pooled_prompt_embeds"], time, return_dict=False
            )[0]
        expected.append((velocity - (noise - x0)).square().mean().item())
    diagnosis = diagnose_text_pipeline(pipeline, [columns], num_bands=2)
    assert diagnosis.band_losses[0] == pytest.approx(expected, rel=1e-4)
    assert diagnosis.base_losses is None and diagnosis.sampling_steps == [50]


def test_each_lora_and_none_of_them_everywhere(folder):
    """As alone on the denoiser; the owners come out where they act."""
    pipeline = RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())
    experts = LoraExperts.from_pretrained(folder / "experts")
    diagnosis = diagnose_text_pipeline(pipeline, batches(), experts, num_bands=2, num_inference_steps=20)
    plain = diagnose_text_pipeline(pipeline, batches(), num_bands=2)  # the LoRAs are gone
    assert diagnosis.base_losses == diagnosis.base_band_losses == plain.band_losses[0]
    for index, name in enumerate(("low", "high")):
        one, _ = with_loras([name], NoiseIntervals.uniform(1))
        alone = diagnose_text_pipeline(one, batches(), num_bands=2).band_losses[0]
        assert diagnosis.band_losses[index] == pytest.approx(alone, rel=1e-4)
        assert [row[index] for row in diagnosis.swap_losses] == pytest.approx(alone, rel=1e-4)
        assert abs(torch.tensor(alone) / torch.tensor(diagnosis.base_losses) - 1).min() > 1e-3
    assert sum(diagnosis.sampling_steps) == 20 and diagnosis.edges == [0, 500, 1000]


def test_two_denoisers():
    """Wan 2.2: the second transformer owns the little noise."""
    pipeline = wan_pipe(wan(0), transformer_2=wan(1), boundary_ratio=0.5)
    columns = {
        "mean": randn(2, 1, 16, 1, 2, 2),
        "std": randn(2, 1, 16, 1, 2, 2).abs(),
        "prompt_embeds": randn(2, 16, 32),
    }
    diagnosis = diagnose_text_pipeline(pipeline, [columns], num_bands=2)
    by_second = diagnose_text_pipeline(wan_pipe(wan(1)), [columns], num_bands=2).band_losses[0]
    assert diagnosis.edges == [0, 500, 1000]
    assert diagnosis.band_losses[0] == pytest.approx(by_second, rel=1e-4) != diagnosis.band_losses[1]
    with pytest.raises(ValueError, match="no LoRA experts for a pipeline of two denoisers"):
        diagnose_text_pipeline(pipeline, [columns], LoraExperts([None, None], HALVES))


def test_a_shift_by_resolution():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=2.0, max_shift=8.0)
    pipeline = RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())
    pipeline.scheduler = scheduler
    shifted = diagnose_text_pipeline(pipeline, batches(), LoraExperts([None, None], HALVES), num_inference_steps=20)
    assert shifted.sampling_steps[1] > 15


def run(*arguments) -> str:
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command(folder, tmp_path):
    """On shards with two sizes, without the text encoders; beside the LoRAs is how many samples each was trained on."""
    (folder / "training_summary.json").write_text(json.dumps({"samples_per_expert": [70, 30]}))
    said = run(
        folder / "sd3", "--dataset", folder / "encoded", "--output_dir", tmp_path, "--lora_experts", folder / "experts",
        "--num_bands", 2, "--num_images", 8, "--num_inference_steps", 10,
    )  # fmt: skip
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    (low, high), (without, _) = diagnosis["swap_losses"][0], diagnosis["base_losses"]
    assert f"interval of expert 0: {low:.4f} by 0, {high:.4f} by 1, {without:.4f} without LoRA" in said
    assert diagnosis["training_samples"] == [70, 30]
    assert len(diagnosis["base_band_losses"]) == 2 and (tmp_path / "diagnosis.png").is_file()
    assert len(load_encoded(str(folder / "encoded")).sizes) == 2


def test_what_does_not_fit(folder, tmp_path):
    other = with_text("sd15", RECIPES["sd15"].pipe(RECIPES["sd15"].denoiser()))
    other.save_pretrained(tmp_path / "sd15")
    with pytest.raises(ValueError, match="encoded by a StableDiffusionPipeline, .* of a StableDiffusion3Pipeline"):
        run(tmp_path / "sd15", "--dataset", folder / "encoded")
    with pytest.raises(ValueError, match="a folder that encode_prompts.py wrote, but it has no encoding.json"):
        run(folder / "sd3", "--dataset", folder / "images")
    with pytest.raises(ValueError, match="`dtype` to be one of float32, float16, bfloat16, but got 'int8'"):
        run(folder / "sd3", "--dataset", folder / "encoded", "--dtype", "int8")
    changed = DiffusionPipeline.from_pretrained(folder / "sd3")
    changed.vae.config["scaling_factor"] = 1.0
    changed.save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match="encoded by this pipeline's `vae`, but it has the scaling_factor 1.0"):
        run(tmp_path / "sd3", "--dataset", folder / "encoded")
