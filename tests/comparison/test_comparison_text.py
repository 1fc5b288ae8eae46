"""The comparison of LoRA experts: equal terms, and measurements of what the LoRAs and the prompts make of the model."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from benchmarks.comparison import data
from benchmarks.comparison.data import make_data
from benchmarks.comparison.losses import measure_losses
from benchmarks.comparison.measure import accuracy_of_extractor, read_images, recognised
from benchmarks.comparison.plan import PRESETS, Plan, Run, load_plan
from benchmarks.comparison.run import perform
from benchmarks.comparison.sampling import call, load_pipeline, num_parameters
from comparison_plans import arguments_of
from conftest import REPOSITORY
from peft import LoraConfig
from tiny_sentences import sentence_pipe, transformer

from diffusers_dmp import LoraExperts, NoiseIntervals
from diffusers_dmp.evaluation import judge
from diffusers_dmp.evaluation.denoiser_diagnostics import DiagnosisOptions, diagnose_denoiser
from diffusers_dmp.evaluation.digits import DIGIT_PHRASES, DIGITS, ENLARGED_SIZE, enlarged_digits
from diffusers_dmp.evaluation.fashion import captions_of, write_labelled_images
from diffusers_dmp.evaluation.judge import as_pixels
from diffusers_dmp.training.data.encoded_source import load_encoded

pytestmark = pytest.mark.usefixtures("in_the_repository")


def test_the_adaptations_are_on_equal_terms():
    """One LoRA and its rivals differ in their intervals alone; where ranks or steps differ, the title says so."""
    plan = load_plan("cpu")
    runs = {run.name: arguments_of(plan, run) for run in plan.runs if run.comparison == "lora" and run.script}
    base, one = runs.pop("base"), runs["one"]
    assert base.method == "full" and one.method == "lora"
    for name, args in runs.items():
        num_experts = args.count_experts() if args.method == "lora_experts" else 1
        assert args.rank * num_experts == 16 * (4 if "_16" in name else 1)
        assert args.max_train_steps == one.max_train_steps * (3 if "longer" in name else 1)
        own = ("method", "num_experts", "sigma_boundaries", "rank", "max_train_steps", "seed", "output_dir")
        differing = [key for key, value in vars(args).items() if value != vars(one)[key] and key not in own]
        assert not differing


def test_a_preset_without_a_data_set_leaves_out_its_comparisons(tmp_path):
    path = tmp_path / "fashion.yaml"
    preset = yaml.safe_load((PRESETS / "cpu.yaml").read_text())
    del preset["data"]["digits"]
    path.write_text(yaml.safe_dump(preset))
    names, all_names = ([each.name for each in load_plan(preset).comparisons] for preset in (str(path), "cpu"))
    assert names == [name for name in all_names if name != "lora"]


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    """The plan with few images, a tiny pipeline and networks that have learned next to nothing."""
    own = {"num_train": 40, "num_reference": 70, "num_clothes": 20, "patch_size": 4}
    tiny = dataclasses.replace(
        load_plan("cpu"), output_dir=tmp_path / "outputs", num_images=70, num_inference_steps=2, data={"digits": own}
    )
    images = np.random.default_rng(0).integers(256, size=(20, ENLARGED_SIZE, ENLARGED_SIZE), dtype=np.uint8)
    monkeypatch.setattr(data, "fashion_images", lambda: (images, np.arange(20) % 10))
    monkeypatch.setattr(data, "new_pipeline", lambda patch_size: tiny_pipeline())
    monkeypatch.setattr(data, "EXTRACTOR_STEPS", 3)
    monkeypatch.setattr(judge, "NUM_STEPS", 3)
    make_data(tiny, "digits", tmp_path / "results")
    return tiny


def tiny_pipeline():
    return sentence_pipe(transformer(sample_size=ENLARGED_SIZE, pos_embed_max_size=ENLARGED_SIZE // 4))


def trained(plan: Plan, name: str, num_experts: int) -> Run:
    """A run as its training leaves it: with LoRAs beside the base model, which change a lot."""
    run = plan.run(f"lora/{name}-1")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(plan.place(run, run.base))
    names = [f"expert_{index}" for index in range(num_experts)]
    for index, adapter in enumerate(names):
        torch.manual_seed(index)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "ff.net.2"], init_lora_weights=False)
        pipeline.transformer.add_adapter(config, adapter)
    LoraExperts(names, NoiseIntervals.uniform(num_experts)).attach(pipeline).save_pretrained(
        plan.folder(run) / "loras"
    )
    (plan.folder(run) / "trained.json").write_text('{"milliseconds_per_step": 1.5}')
    return run


def test_the_data_for_a_model_of_text(plan):
    folder = plan.data_folder("digits")
    (images, labels), (others, _) = read_images(folder / "train"), read_images(folder / "reference")
    assert images.shape[:3] == (40, 28, 28) and len(others) == 70 and labels[:12].tolist() == [*range(10), 0, 1]
    assert not {each.tobytes() for each in images} & {each.tobytes() for each in others}
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert prompts[3] == "a handwritten three" and len(prompts) == 10
    encoded = load_encoded(str(folder / "captioned"), "train")
    assert len(encoded) == 40 and len(load_encoded(str(folder / "clothes"), "train")) == 20


def test_a_run_is_measured_with_its_loras_and_the_digits_of_its_prompts(plan):
    run, unadapted = trained(plan, "four", 4), plan.run("lora/unadapted-1")
    result, other = perform(plan, run, 1), perform(plan, unadapted, 1)
    images, labels = read_images(plan.folder(run) / "samples" / "600" / "samples.npz")
    assert labels.tolist() == [index % 10 for index in range(70)]
    assert result["milliseconds_per_step"] == 1.5 and 0 <= result["points"][0]["recognised"] <= 1
    assert result["parameters"] > other["parameters"] == tiny_pipeline().transformer.num_parameters()
    assert result["gigaflops_per_image"] > other["gigaflops_per_image"]
    assert max(np.abs(np.subtract(result["losses"], other["losses"]))) > 1e-3
    plain, _ = read_images(plan.folder(unadapted) / "samples" / "0" / "samples.npz")
    assert np.abs(images.astype(int) - plain).mean() > 0.5
    # with the same prompts and noise, one batch is a part of the images that were measured
    pipeline = load_pipeline(plan, run, plan.place(run, run.base), [0])
    again = call(plan, run, pipeline, [3, 4, 5], first=3)
    assert np.abs(np.stack([np.asarray(image.convert("RGB")) for image in again]) - images[3:6].astype(int)).max() <= 1


def test_a_band_of_noise_levels_has_the_loss_of_its_own_lora(plan):
    run = trained(plan, "four", 4)
    pipeline = load_pipeline(plan, run, plan.place(run, run.base), [0])
    named = pipeline.transformer.named_parameters()
    loras = sum(parameter.numel() for name, parameter in named if "lora" in name)
    assert loras > 0 and num_parameters(pipeline) == num_parameters(tiny_pipeline()) + loras
    images, labels = read_images(plan.data_folder("digits") / "reference")
    prompt_embeds, pooled = pipeline.encode_prompt(captions_of(labels, DIGITS, DIGIT_PHRASES))
    inputs = {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled}
    diagnosis = diagnose_denoiser(
        pipeline.transformer, as_pixels(images[..., 0]), inputs, pipeline.scheduler, options=DiagnosisOptions()
    )
    own = [diagnosis.band_losses[band // 2][band] for band in range(8)]
    assert measure_losses(plan, run, pipeline) == pytest.approx(own, rel=1e-4)
    assert measure_losses(plan, run, pipeline) != pytest.approx(diagnosis.band_losses[0], rel=1e-4)


@pytest.mark.slow
def test_a_model_of_text_is_trained_and_adapted(plan):
    """By the training script itself, for a few steps, with each kind of LoRA."""
    few = {"max_train_steps": 3, "lr_warmup_steps": 1, "batch_size": 8}
    quick = [dataclasses.replace(run, arguments=run.arguments | few) if run.script else run for run in plan.runs]
    lora = dataclasses.replace(next(each for each in plan.comparisons if each.name == "lora"), runs=quick)
    plan = dataclasses.replace(plan, comparisons=[lora])
    keys = [f"lora/{name}-0" for name in ("base", "unadapted", "one", "four_by_snr")]
    results = {key: perform(plan, plan.run(key), 1) for key in keys}
    losses = [results[key]["losses"] for key in keys[1:]]
    assert losses[0] != losses[1] != losses[2] != losses[0]
    assert len(list(plan.folder(plan.run("lora/four_by_snr-0")).glob("loras/*.safetensors"))) == 4
    assert results["lora/one-0"]["parameters"] == results["lora/four_by_snr-0"]["parameters"]


def test_the_published_networks_recognise_digits_by_other_writers(tmp_path):
    digits, labels = enlarged_digits()
    rows = slice(-load_plan("cpu").data["digits"]["num_reference"], None)
    write_labelled_images(tmp_path / data.REFERENCE / "images.parquet", digits[rows], labels[rows], DIGITS)
    for name in data.MEASURING:
        (tmp_path / name).symlink_to(REPOSITORY / "docs" / "results" / "extractors" / "digits" / name)
    assert accuracy_of_extractor(tmp_path) == pytest.approx(0.968, abs=0.005)
    assert recognised(tmp_path / data.JUDGE, tmp_path / data.REFERENCE) == pytest.approx(0.948, abs=0.005)
