"""The records of the systems: each is complete, finds its part in a pipeline, and knows its intervals."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY, randomised
from diffusers import DDIMScheduler, DDPMScheduler
from networks import PLAIN, make_resnet
from peft import LoraConfig
from small_pipelines import DIT, PIPELINES, with_one
from tiny_pipelines import RECIPES, sd3_pipe, wan, wan_pipe

import diffusers_dmp
from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    GuidanceExperts,
    GuidedScheduler,
    LoraExperts,
    NoiseIntervals,
    PromptPatch,
    RemixDiTModel,
)
from diffusers_dmp.hub.cards import CARDS
from diffusers_dmp.hub.folders import read_folder
from diffusers_dmp.plots import specialisation, specialisation_figures
from diffusers_dmp.saving.naming import EDGES_KEY
from diffusers_dmp.systems import SYSTEMS, responsibility, saved_intervals, system_of_classes, systems_in

LAST = {"remix": 284, "ppap": 285}  # the second edge of 7 experts for 1000 timesteps, by each class's own rule
EXPECTED = {  # by the names of `small_pipelines`
    "dit": "dit",
    "dtr": "dtr",
    "remix": "remix",
    "dmp": "dmp",
    "experts": "experts",
    "unet": "dit",  # a UNet alone divides nothing
    "split": "patch_diffusion",
}


def guided() -> ClassConditionalPipeline:
    """An unconditional pipeline with 7 guidance experts, of the class with the most general rule for its intervals."""
    pipeline = with_one(DiTModel(**DIT | {"num_classes": 1, "class_dropout_prob": 0.0}))
    experts = GuidanceExperts(make_resnet(num_channels=1), image_mean=[0.5], image_std=[0.5], num_experts=7)
    pipeline.scheduler = GuidedScheduler(pipeline.scheduler, experts, ClassTarget(0))
    return pipeline


def without_edges(folder) -> None:
    """Make a configuration like those that version 0.1.0 saved."""
    config = json.loads((folder / "config.json").read_text())
    config.pop(EDGES_KEY, None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("key", SYSTEMS)
def test_a_record_names_what_there_is(key):
    system = SYSTEMS[key]
    assert system.key == key
    assert all(isinstance(getattr(diffusers_dmp, name), type) for name in system.classes)
    assert system.figures is None or callable(getattr(specialisation, system.figures))
    assert (CARDS / system.card).is_file()
    assert system.training_script is None or (REPOSITORY / "training" / f"{system.training_script}.py").is_file()


@pytest.mark.parametrize("name, key", EXPECTED.items())
def test_the_system_of_a_pipeline(name, key):
    pipeline = PIPELINES[name]()
    system, _ = systems_in(pipeline)[0]
    assert system.key == key
    sentence = responsibility(pipeline, 300)
    assert sentence.startswith("At timestep 300") and sentence.endswith(".")
    assert [f"{name}.png" for name in specialisation_figures(pipeline)] == [
        f"{name}.png" for name in system.pictures if name != "training_share"
    ]


def test_guidance_experts_are_found_in_the_scheduler():
    pipeline = guided()
    assert [system.key for system, _ in systems_in(pipeline)] == ["ppap", "dit"]
    assert responsibility(pipeline, 285) == "At timestep 285 expert 2 of 7 guides; it owns the timesteps 285 to 427."
    assert list(specialisation_figures(pipeline)) == ["guidance_experts"]


def test_guidance_experts_are_found_by_the_noise_that_they_were_trained_on():
    """At σ = 0.5, x_t is half image and half noise; with the linear schedule of diffusion it is so at t = 259."""
    pipeline = sd3_pipe(RECIPES["sd3"].denoiser())
    experts = GuidanceExperts(make_resnet(), **PLAIN, num_experts=7, noise_schedule={"beta_schedule": "linear"})
    pipeline.scheduler = GuidedScheduler.for_pipeline(pipeline, experts, ClassTarget(0))
    alphas_cumprod = DDPMScheduler().alphas_cumprod
    assert alphas_cumprod[258] > 0.5 > alphas_cumprod[259]
    assert responsibility(pipeline, 500) == (
        "At timestep 500 expert 1 of 7 guides; it owns the timesteps 142 to 284 of the noise that it was trained on."
    )
    (axes,) = specialisation_figures(pipeline, timestep=500)["guidance_experts"].axes
    share = axes.lines[0].get_ydata()
    assert share[259] == pytest.approx(alphas_cumprod[259].item())
    assert axes.lines[1].get_xdata()[0] in (258, 259)


@pytest.mark.parametrize("name", RECIPES)
def test_experts_are_found_in_every_pipeline_of_diffusers(name):
    recipe = RECIPES[name]
    denoisers = [recipe.denoiser(seed) for seed in range(3)]
    pipeline = recipe.pipe(DenoiserExperts(denoisers, NoiseIntervals.from_timesteps([250, 600.5])))
    system, part = systems_in(pipeline)[0]
    assert system.key == "experts" and system.intervals(part).edges == (0, 250, 600.5, 1000)
    assert [model for model, _ in system.experts(pipeline, part)] == denoisers
    owned = ["below 250", "from 250 to below 600.5", "from 600.5 on"]
    for expert, timestep in enumerate((249, 600, 601)):
        assert responsibility(pipeline, timestep) == (
            f"At timestep {timestep} expert {expert} of 3 denoises, a {type(denoisers[0]).__name__}; it owns the timesteps "
            f"{owned[expert]}."
        )
    assert "the whole model" in responsibility(recipe.pipe(denoisers[0]), 300)


def test_lora_experts_are_found_where_they_are_attached():
    pipeline = sd3_pipe(RECIPES["sd3"].denoiser())
    for name in ("low", "high"):
        pipeline.transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"]), name)
    assert systems_in(pipeline)[0][0].key == "dit"
    experts = LoraExperts([None, [("low", 0.5), "high"]], NoiseIntervals.from_sigmas([0.875])).attach(pipeline)
    system, part = systems_in(pipeline)[0]
    assert system.key == "lora_experts" and part is experts
    assert responsibility(pipeline, 874) == "At timestep 874 no LoRA acts."
    assert responsibility(pipeline, 875) == "At timestep 875 the LoRA 0.5 times low and high acts."


def test_the_two_transformers_of_wan22_are_experts():
    pipeline = wan_pipe(wan(0), transformer_2=wan(1), boundary_ratio=0.875)
    system, part = systems_in(pipeline)[0]
    assert system.key == "experts"
    assert [*part.experts] == [pipeline.transformer_2, pipeline.transformer]
    assert "expert 0 of 2" in responsibility(pipeline, 874) and "expert 1 of 2" in responsibility(pipeline, 875)


def test_refuses_a_pipeline_without_a_denoiser():
    with pytest.raises(ValueError, match="with a `transformer` or `unet`, but got a StableDiffusion3Pipeline"):
        responsibility(sd3_pipe(None), 0)


def test_sentences():
    remix = PIPELINES["remix"]()
    shares = ", ".join(f"{share:.0%} of basis {k}" for k, share in enumerate(remix.transformer.mixing_coefficients[1]))
    expected = f"At timestep 300 expert 1 denoises, mixed of {shares}; it owns the timesteps 250 to 499."
    assert responsibility(remix, 300) == expected
    dtr = with_one(DTRTransformer2DModel(**DIT, sharing_ratio=0.5))  # the last window of 8 among 16 channels
    assert responsibility(dtr, 999) == "At timestep 999 each block works on 8 of 16 channels, from 8 to 15."
    split = PIPELINES["split"]()
    edges = split.intervals().edges
    assert f"denoiser 1 denoises; it owns the timesteps {edges[1]} to {edges[2] - 1}." in responsibility(
        split, edges[1]
    )
    assert "prompt" in responsibility(PIPELINES["dmp"](), 0) and "the whole model" in responsibility(
        PIPELINES["dit"](), 0
    )


def test_the_sentence_about_prompts_says_how_far_they_depend_on_the_timestep():
    pipeline = PIPELINES["dmp"]()
    gates = torch.full((1000, 2, 4), 0.25)  # (T, L, M)
    gates[300, 1, 2] = 0.5
    gates[300:, 0, 3] = 0.375
    pipeline.prompt_patch.gate_weights = lambda timesteps: gates[timesteps]
    assert responsibility(pipeline, 300) == (
        "At timestep 300 prompt 2 of 4 has the largest weight, in block 1: 2.00 times an equal share. Over all timesteps some "
        "weights change by up to 1.00 of an equal share."
    )
    gates[:] = 0.25
    gates[500:, 0, 3] = 0.26
    assert responsibility(pipeline, 999) == (
        "At timestep 999 prompt 3 of 4 has the largest weight, in block 0: 1.04 times an equal share. Over all timesteps the "
        "weights hardly change, by at most 0.04 of an equal share."
    )


def test_prompts_come_before_the_model_unless_they_ignore_the_timestep():
    model = randomised(DTRTransformer2DModel(**DIT))
    prompts = PromptPatch.for_transformer(model)
    pipeline = ClassConditionalPipeline(model, DDIMScheduler(), prompt_patch=prompts)
    assert [system.key for system, _ in systems_in(pipeline)] == ["dmp", "dtr", "dit"]
    prompts.detach()
    pipeline.prompt_patch = PromptPatch.for_transformer(model, gate="none")
    assert [system.key for system, _ in systems_in(pipeline)] == ["dtr", "dit"]


def test_the_system_of_a_folder():
    assert system_of_classes(["ClassConditionalPipeline", "DiTModel", "PromptPatch"]) is SYSTEMS["dmp"]
    assert system_of_classes(["SNRSplitPipeline", "RemixDiTModel"]) is SYSTEMS["patch_diffusion"]
    assert system_of_classes(["UNet2DModel", None]) is None


@pytest.mark.parametrize("release", ["0.1.0", "now"])
@pytest.mark.parametrize("key", LAST)
def test_saved_intervals_are_those_of_the_model(tmp_path, key, release):
    """With 7 experts, which do not divide 1000 timesteps: the two classes have different rules."""
    if key == "remix":
        model = RemixDiTModel(**DIT, num_bases=2, num_experts=7)
    else:
        model = GuidanceExperts(make_resnet(), **PLAIN, num_experts=7, base_model_name_or_path="somewhere")
    model.save_pretrained(tmp_path)
    if release == "0.1.0":
        without_edges(tmp_path)
    contents = read_folder(tmp_path)
    assert saved_intervals(contents.config) == model.intervals
    assert model.intervals.edges[2] == LAST[key]
    begins = ", ".join(f"{edge:g}" for edge in model.intervals.edges[:-1])
    assert contents.intervals() == f"7 experts, whose intervals begin at the timesteps {begins}"


def test_saved_edges_decide():
    """Also of a class without a rule of its own: a new system need not be known here."""
    assert (
        saved_intervals({"_class_name": "RemixDiTModel", "num_experts": 2, EDGES_KEY: [0, 100, 1000]}).edges[1] == 100
    )
    assert saved_intervals({"_class_name": "Other", EDGES_KEY: [0, 1.5, 10]}) == NoiseIntervals((0, 1.5, 10))
    assert saved_intervals({"_class_name": "Other", "num_experts": 2}) is None
    assert saved_intervals({"_class_name": "DiTModel"}) is None


def test_info_of_a_pipeline_with_uneven_intervals(tmp_path):
    with_one(RemixDiTModel(**DIT, num_bases=2, num_experts=7)).save_pretrained(tmp_path)
    without_edges(tmp_path / "transformer")
    begins = "0, 142, 284, 426, 568, 710, 852"
    assert read_folder(tmp_path).intervals() == f"7 experts, whose intervals begin at the timesteps {begins}"
    code = f"""
import sys
from diffusers_dmp.cli import app
sys.argv = ["diffusers-dmp", "info", {str(tmp_path)!r}]
try:
    app()
except SystemExit:
    pass
loaded = [name for name in ("diffusers_dmp.models", "diffusers_dmp.plots", "matplotlib") if name in sys.modules]
print("loaded:", loaded)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    summary, loaded = output.split("loaded: ")
    assert loaded.strip() == "[]"  # it reads configurations only
    assert begins in yaml.safe_load(summary)["intervals"]


def test_the_split_is_described_by_its_boundaries(tmp_path):
    PIPELINES["split"]().save_pretrained(tmp_path)
    assert read_folder(tmp_path).intervals() == "3 denoisers, bounded by the signal-to-noise ratio 4, 0.1"


def test_a_new_system_is_one_record(monkeypatch):
    """Everything that reads the records knows it: folders, figures and the sentence."""
    part = SimpleNamespace(intervals=NoiseIntervals((0, 100, 1000)))
    new = SYSTEMS["remix"].__class__(
        key="new", title="New", paper="0000.00000", paper_title="A paper", classes=("NewExperts",), training_script="train_new",
        find=lambda pipeline: getattr(pipeline, "new_experts", None),
        sentence=lambda pipeline, part, timestep: f"At timestep {timestep} it is new.",
        figures="new_figures", intervals=lambda part: part.intervals,
    )  # fmt: skip
    monkeypatch.setitem(SYSTEMS, "new", new)
    monkeypatch.setattr(specialisation, "new_figures", lambda pipeline, part, options: {"new": part}, raising=False)
    pipeline = PIPELINES["dtr"]()
    pipeline.new_experts = part
    assert systems_in(pipeline)[0] == (new, part)
    assert specialisation_figures(pipeline) == {"new": part}
    assert responsibility(pipeline, 3) == "At timestep 3 it is new."
    assert system_of_classes(["DiTModel", "NewExperts"]) is new
