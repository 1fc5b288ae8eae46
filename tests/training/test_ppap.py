"""PPAP's training: experts on images that a diffusion model generated, or on any others."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TINY_CONFIG, Vectors, assert_matches, randomised
from datasets import Dataset, Features, Image
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from guidance_data import generate, save_unconditional
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import make_dpt, make_resnet
from runs import launch_script
from tiny_clip import save_clip, save_siglip
from tiny_pipelines import RECIPES
from tiny_text import with_text
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import ModelOutput

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DiTModel,
    GuidanceExperts,
    GuidedScheduler,
    NoiseIntervals,
    TextTarget,
)
from diffusers_dmp.evaluation.digits import fit_classifier
from diffusers_dmp.training.arguments import BoundaryArguments, ProcessArguments
from diffusers_dmp.training.data.images import load_images, training_items
from diffusers_dmp.training.guidance_experts import expert_intervals
from diffusers_dmp.training.objectives.densities import DENSITIES
from diffusers_dmp.training.objectives.distillation import LabelObjective, distillation_losses
from diffusers_dmp.training.objectives.from_arguments import make_noising
from diffusers_dmp.training.objectives.noising import FlowNoising
from diffusers_dmp.training.objectives.timesteps import StepExperts
from diffusers_dmp.training.parsing import parse_arguments
from diffusers_dmp.training.resuming import differing_arguments

TINY = {
    "image_size": 8,
    "image_channels": 1,
    "random_flip": False,
    "rank": 2,
    "num_experts": 2,
    "batch_size": 16,
    "max_train_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "checkpointing_steps": 2,
    "report_to": "none",
}


@pytest.fixture
def base(tmp_path) -> Path:
    """A classifier as the Hub has them."""
    make_resnet(num_channels=1).save_pretrained(tmp_path / "base")
    settings = {"image_mean": [0.5], "image_std": [0.5], "size": {"height": 32, "width": 32}}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path / "base"


@pytest.fixture
def pipeline(tmp_path) -> Path:
    return save_unconditional(tmp_path / "pipeline")


@pytest.fixture
def arguments_class(monkeypatch) -> type:
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_ppap import PPAPTrainingArguments

    return PPAPTrainingArguments


@pytest.fixture
def train_ppap_here(digits, base, arguments_class):
    """In this process."""
    from train_ppap import train_ppap

    def train(output_dir: Path, **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = TINY | {"dataset": str(digits), "base_model": str(base), "output_dir": str(output_dir)}
        train_ppap(arguments_class(**defaults | arguments))

    return train


# What is learned


def test_published_distillation():
    vectors = Vectors("diffusion")
    losses = distillation_losses(vectors["ppap.kd.student_logits"], vectors["ppap.kd.teacher_logits"], "logits")
    assert_matches(losses, vectors["ppap.kd.loss_per_sample"])


def test_depth_is_learned_by_squares():
    student, teacher = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    expected = torch.stack([F.mse_loss(student[i], teacher[i]) for i in range(2)])
    torch.testing.assert_close(distillation_losses(student, teacher, "predicted_depth"), expected)


def test_embeddings_are_learned_by_their_angle():
    student, teacher = torch.randn(2, 8), torch.randn(2, 8)
    expected = (F.normalize(student) - F.normalize(teacher)).square().sum(1)
    for name in ("image_embeds", "pooler_output"):
        torch.testing.assert_close(distillation_losses(3 * student, teacher, name), expected)


# Training


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_experts_as_users_start_them(pipeline, base, tmp_path, num_processes):
    generate(pipeline, tmp_path / "data", num_images=32)
    preset = tmp_path / "preset.yaml"
    preset.write_text(json.dumps(TINY | {"dataset": str(tmp_path / "data"), "base_model": str(base)}))
    launch_script("train_ppap.py", tmp_path / "run", num_processes, {"config": preset})
    experts, fresh = (
        GuidanceExperts.from_pretrained(tmp_path / "run" / "experts"),
        GuidanceExperts.from_base(str(base), num_experts=2, rank=2),
    )
    assert experts.config.method == "ppap" and experts.intervals.edges == (0, 500, 1000)
    moved = {
        name
        for name, tensor in experts.expert_tensors().items()
        if not torch.equal(tensor, fresh.expert_tensors()[name])
    }
    for expert in (0, 1):
        for ending in ("lora_B.weight", "normalization.weight", "running_mean"):
            assert [name for name in moved if name.startswith(f"expert_{expert}.") and name.endswith(ending)]
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["steps"] == 4
    assert [each["samples_per_expert"] for each in summary["experts"]] == [[32, 0], [0, 32]]


@pytest.mark.parametrize(("method", "num_experts"), [("multi_experts", 2), ("finetune", 1)])
def test_the_baselines_learn_from_labels(train_ppap_here, base, tmp_path, method, num_experts):
    train_ppap_here(tmp_path / "run", method=method)
    experts = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts")
    assert experts.config.method == method and experts.config.num_experts == num_experts
    network = make_resnet(num_channels=1).state_dict()
    tensors = experts.expert_tensors()
    assert not torch.equal(tensors["expert_0.classifier.1.weight"], network["classifier.1.weight"])  # the head, too


@pytest.mark.slow
def test_one_by_one_is_all(train_ppap_here, tmp_path):
    train_ppap_here(tmp_path / "all")
    for expert in ("1", 0):
        train_ppap_here(tmp_path / "each", expert=expert)
        assert (tmp_path / "each" / "experts").exists() == (expert == 0)
    together, apart = (GuidanceExperts.from_pretrained(tmp_path / name / "experts") for name in ("all", "each"))
    for name, tensor in together.expert_tensors().items():
        torch.testing.assert_close(apart.expert_tensors()[name], tensor)


@pytest.mark.parametrize("process", [{}, {"objective": "flow", "num_experts": None, "sigma_boundaries": [0.875]}])
def test_an_expert_goes_on_where_it_was_stopped(train_ppap_here, tmp_path, process):
    arguments = process | {"checkpointing_steps": 1, "max_train_steps": 3, "checkpoints_total_limit": 3}
    train_ppap_here(tmp_path / "run", **arguments)
    whole = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts").expert_tensors()
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "expert_1" / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="no checkpoints of an earlier run"):
        train_ppap_here(tmp_path / "run", **arguments)
    with pytest.raises(ValueError, match="num_train_timesteps: 1000 → 500"):
        train_ppap_here(tmp_path / "run", resume_from_checkpoint="latest", **arguments | {"num_train_timesteps": 500})
    train_ppap_here(tmp_path / "run", resume_from_checkpoint="latest", **arguments)
    resumed = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts").expert_tensors()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


# Flow matching


@pytest.fixture
def seen_by_students(monkeypatch) -> list:
    """What the students see: the expert, and the batch with its noisy images."""
    seen, add_noise, run_expert = [], FlowNoising.add_noise, GuidanceExperts.run_expert

    def remember_noise(noising, x0, noise, timesteps):
        x_t = add_noise(noising, x0, noise, timesteps)
        seen.append((None, x0, noise, timesteps, x_t))
        return x_t

    def remember_expert(experts, expert, images, merged=None):
        if merged is False and experts.training:  # a student, no teacher, and no count of its operations
            assert images is seen[-1][-1]
            seen[-1] = (expert, *seen[-1][1:])
        return run_expert(experts, expert, images, merged)

    monkeypatch.setattr(FlowNoising, "add_noise", remember_noise)
    monkeypatch.setattr(GuidanceExperts, "run_expert", remember_expert)
    return seen


@pytest.mark.parametrize("method", ["ppap", "multi_experts"])
def test_experts_learn_on_the_noise_of_flow_matching(train_ppap_here, tmp_path, seen_by_students, method):
    """By distillation and from labels: the loss has nothing to do with the noise."""
    arguments = {"density": "logit_normal", "shift": "3", "num_experts": None, "sigma_boundaries": [0.875]}
    train_ppap_here(tmp_path / "run", method=method, objective="flow", **arguments)
    experts = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts")
    assert experts.intervals.edges == (0, 875, 1000)
    assert [expert for expert, *_ in seen_by_students] == [0, 0, 1, 1]  # two steps of each
    for expert, x0, noise, timesteps, x_t in seen_by_students:
        assert (experts.intervals.index(timesteps) == expert).all() and timesteps.unique().numel() == 16
        sigma = (timesteps / 1000).view(-1, 1, 1, 1)
        torch.testing.assert_close(x_t, (1 - sigma) * x0 + sigma * noise)
    # what a guided scheduler compares with its own noise
    assert experts.config.noise_schedule == {"process": "flow_matching", "num_train_timesteps": 1000}
    assert experts.process.is_process_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert not experts.process.is_process_of(DDPMScheduler())
    assert experts.config.sample_size == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "edges"),
    [
        ({"num_experts": None}, (0, 200, 400, 600, 800, 1000)),
        ({"num_experts": 4}, (0, 250, 500, 750, 1000)),
        ({"timestep_boundaries": [100, 600.5]}, (0, 100, 600.5, 1000)),
        ({"objective": "flow", "sigma_boundaries": [0.875]}, (0, 875, 1000)),
        ({"objective": "flow", "snr_boundaries": [9.0, 1.0]}, (0, 250, 500, 1000)),
        ({"snr_boundaries": [1.0]}, (0, 259, 1000)),
        ({"method": "finetune"}, (0, 1000)),
    ],
)
def test_intervals_are_given_as_for_any_experts(arguments, edges, arguments_class):
    args = arguments_class(**arguments)
    assert expert_intervals(args).edges == edges and args.num_experts == len(edges) - 1
    assert dataclasses.replace(args) == args  # as a preset of its own
    older = SimpleNamespace(
        **{name: value for name, value in vars(args).items() if "boundaries" not in name and name != "objective"}
    )
    assert expert_intervals(older).edges == NoiseIntervals.uniform(len(edges) - 1).edges


def test_experts_of_flow_matching_guide_a_model_of_flow_matching(digits, base, arguments_class, tmp_path):
    """By the preset, from the training to the guided pipeline."""
    from train_ppap import train_ppap

    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"dataset": digits, "base_model": base, "output_dir": tmp_path / "run", "max_train_steps": 1}
    command_line = ["--config", "ppap_digits_flow", "--report_to", "none"]
    for name, value in given.items():
        command_line += [f"--{name}", str(value)]
    train_ppap(parse_arguments(arguments_class, command_line))
    experts = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts")
    assert experts.config.num_experts == 5 and experts.process.is_flow_matching
    config = {"in_channels": 1, "out_channels": 1, "num_classes": 1, "class_dropout_prob": 0.0}
    pipe = ClassConditionalPipeline(randomised(DiTModel(**TINY_CONFIG | config)), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = []
    for scale in (0.0, 30.0):
        pipe.scheduler = GuidedScheduler(FlowMatchEulerDiscreteScheduler(), experts, ClassTarget(3), scale=scale)
        output = pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
        images.append(output.images)
    assert images[0].isfinite().all() and images[1].isfinite().all() and not torch.equal(*images)


def test_the_record_of_diffusion_is_the_noise_of_the_training(train_ppap_here, tmp_path):
    train_ppap_here(tmp_path / "run", beta_schedule="linear0.025", num_train_timesteps=500, max_train_steps=1)
    experts = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts")
    assert experts.config.noise_schedule["process"] == "diffusion" and experts.config.sample_size == [8, 8]
    assert experts.process.is_process_of(DDPMScheduler(500, beta_end=0.025))


def test_a_checkpoint_of_before_flow_matching_was_ddpm(arguments_class):
    """As version 0.3 recorded it: with the number of experts, without process and boundaries."""
    ddpm, flow = arguments_class(num_experts=3), arguments_class(num_experts=3, objective="flow")
    new = [field.name for group in (ProcessArguments, BoundaryArguments) for field in dataclasses.fields(group)]
    older = {name: value for name, value in vars(ddpm).items() if name not in new} | {"num_experts": 3}
    assert differing_arguments(older, vars(ddpm), ddpm) == []
    assert differing_arguments(older, vars(flow), flow) == ["objective: 'ddpm' → 'flow'"]


EDGES = st.lists(st.floats(5, 995), min_size=0, max_size=4, unique=True).map(sorted)
PROCESSES = st.fixed_dictionaries(
    {"objective": st.sampled_from(["ddpm", "flow"])},
    optional={"density": st.sampled_from(DENSITIES), "shift": st.floats(0.3, 6)},
)


@given(boundaries=EDGES, process=PROCESSES, seed=st.integers(0, 2**32 - 1))
def test_experts_are_trained_on_what_they_will_see(boundaries, process, seed):
    """Any density, shift and edges: the expert that is trained at a timestep is the one that sees it when it guides."""
    edges = [0, *boundaries, 1000]
    assume(min(high - low for low, high in zip(edges, edges[1:])) > 1.01)
    args = ProcessArguments(**process)
    is_flow = args.objective == "flow"
    scheduler = FlowMatchEulerDiscreteScheduler() if is_flow else DDPMScheduler()
    objective = LabelObjective(make_noising(args, scheduler))
    intervals = NoiseIntervals(tuple(edges))
    assume(not is_flow or min(objective.noising.density.shares(intervals)) > 1e-6)
    experts = experts_that_say_who_they_are()
    experts.intervals = intervals
    for expert in range(intervals.num_experts):
        trained = StepExperts(intervals, [expert])
        timesteps = objective.sample_timesteps(64, torch.Generator().manual_seed(seed), trained)
        assert (experts(torch.zeros(64, 1, 8, 8), timesteps).expert == expert).all()


@functools.cache
def experts_that_say_who_they_are() -> GuidanceExperts:
    experts = GuidanceExperts(make_resnet(num_channels=1), [0.5], [0.5])
    experts.run_expert = lambda expert, images, merged=None: ModelOutput(expert=torch.full((len(images),), expert))
    return experts


@pytest.fixture
def depth_base(tmp_path) -> Path:
    make_dpt().save_pretrained(tmp_path / "depth")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (tmp_path / "depth" / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path / "depth"


@pytest.fixture
def pairs(pipeline, tmp_path) -> dict:
    """A data set of small images, and large ones of something else, so that one can tell who looks at which."""
    images = [image.convert("RGB") for image in generate(pipeline, tmp_path / "small", num_images=16)["image"]]
    columns = {"image": images, "teacher_image": [image.resize((16, 16)).rotate(90) for image in images]}
    (tmp_path / "pairs").mkdir()
    features = Features(dict.fromkeys(columns, Image()))
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "pairs" / "train.parquet")
    arguments = {"image_channels": 3, "teacher_image_column": "teacher_image", "teacher_image_size": 16}
    return {"dataset": str(tmp_path / "pairs")} | arguments


def test_depth_from_pairs_of_resolutions(train_ppap_here, depth_base, pairs, tmp_path, monkeypatch):
    """The student sees the small image, noisy; the teacher the large one."""
    seen, run_expert = {8: [], 16: []}, GuidanceExperts.run_expert

    def remember(experts, expert, images, merged=None):
        if experts.training or images.shape[-1] == 16:  # a student's operations are counted in eval mode
            seen[images.shape[-1]].append(images)
        return run_expert(experts, expert, images, merged)

    monkeypatch.setattr(GuidanceExperts, "run_expert", remember)
    train_ppap_here(tmp_path / "run", base_model=str(depth_base), **pairs)
    assert len(seen[8]) == len(seen[16]) == 4
    from train_ppap import PPAPTrainingArguments

    items = training_items(load_images(pairs["dataset"]), PPAPTrainingArguments(**TINY | pairs))[:]
    large = {image.numpy().tobytes() for image in items["teacher_images"]}
    assert {image.numpy().tobytes() for image in torch.cat(seen[16]).cpu()} == large  # as they are
    small = {image.numpy().tobytes() for image in items["images"]}
    assert not small & {image.numpy().tobytes() for image in torch.cat(seen[8]).cpu()}  # with noise
    monkeypatch.undo()
    experts = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts")
    assert experts(torch.zeros(2, 3, 8, 8), torch.tensor(700)).predicted_depth.shape == (2, 64, 64)


@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_experts_of_an_image_tower(train_ppap_here, tmp_path, save):
    """Of CLIP or SigLIP: they learn embeddings, and guide by prompts."""
    name = save(tmp_path / "base")
    train_ppap_here(tmp_path / "run", base_model=name, image_channels=3)
    experts = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts")
    fresh = GuidanceExperts.from_base(name, num_experts=2, rank=2).expert_tensors()
    moved = [key for key, tensor in experts.expert_tensors().items() if not torch.equal(tensor, fresh[key])]
    for expert in (0, 1):
        assert [key for key in moved if key.startswith(f"expert_{expert}.") and key.endswith("lora_B.weight")]
    guided = GuidedScheduler(DDPMScheduler(), experts, TextTarget.from_pretrained(name, "a seven"), scale=1.0)
    guided.set_timesteps(4)
    x_t = torch.randn(2, 3, 8, 8)
    assert guided.step(x_t, guided.timesteps[1], x_t).prev_sample.isfinite().all()


def test_experts_learn_from_images_of_a_pipeline_of_text(train_ppap_here, depth_base, tmp_path):
    """In pixels, whatever the pipeline denoises."""
    with_text("sd3", RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())).save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    prompts = {"prompts": str(tmp_path / "prompts.txt"), "height": 8, "width": 8}
    generate(tmp_path / "sd3", tmp_path / "data", num_images=16, **prompts)
    arguments = {"dataset": str(tmp_path / "data"), "base_model": str(depth_base), "image_channels": 3}
    train_ppap_here(tmp_path / "run", objective="flow", max_train_steps=1, **arguments)
    experts = GuidanceExperts.from_pretrained(tmp_path / "run" / "experts")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "sd3")
    assert experts.process.is_process_of(pipe.scheduler) and experts.config.sample_size == [8, 8]


@pytest.mark.slow
def test_depth_on_two_processes(depth_base, pairs, tmp_path):
    """Of a network with layers that it never calls, and whose gradients nobody may wait for."""
    arguments = TINY | pairs | {"base_model": depth_base, "expert": 0, "num_experts": 1}
    launch_script("train_ppap.py", tmp_path / "run", 2, arguments)
    assert (tmp_path / "run" / "experts" / "guidance_experts.safetensors").exists()


@pytest.mark.parametrize("method", ["multi_experts", "finetune"])
def test_the_baselines_of_a_depth_model_have_a_teacher(train_ppap_here, depth_base, tmp_path, method):
    """Though the images have classes."""
    train_ppap_here(tmp_path, base_model=str(depth_base), method=method, image_channels=3, max_train_steps=1)
    assert GuidanceExperts.from_pretrained(tmp_path / "experts").config.method == method


@pytest.mark.slow
def test_the_digits_experts_guide_best(digits, tmp_path, monkeypatch):
    """As `make demo-ppap`: better than the classifier that they were made of, and than chance."""
    presets = REPOSITORY / "training" / "presets"
    base = {"config": presets / "dit_digits_unconditional.yaml", "dataset": digits, "report_to": "none"}
    launch_script("train_dit.py", tmp_path / "base", 1, base)
    fit_classifier(tmp_path / "classifier")
    pipeline = {"pipeline": tmp_path / "base" / "pipeline", "num_images": 3000, "batch_size": 500}
    launch_script("generate_guidance_data.py", tmp_path / "data", 1, pipeline)
    experts = {"config": presets / "ppap_digits.yaml", "dataset": tmp_path / "data", "report_to": "none"}
    launch_script("train_ppap.py", tmp_path / "ppap", 1, experts | {"base_model": tmp_path / "classifier"})

    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import digits_demo as demo

    monkeypatch.setattr(demo, "UNCONDITIONAL", tmp_path / "base")
    demo.guidance_report(tmp_path / "ppap")
    report = json.loads((tmp_path / "ppap" / "report.json").read_text())
    for sampler in ("ddim25", "ddpm50"):
        recognised = report[sampler]
        assert recognised["unguided"] < 0.2
        assert recognised["experts"] > recognised["classifier"] + 0.1


# Bad input


def test_the_network_is_said_to_be_the_trouble(train_ppap_here, base, tmp_path):
    text_model, body = tmp_path / "text", tmp_path / "body"
    BertForSequenceClassification(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(text_model)
    make_resnet(num_channels=1).resnet.save_pretrained(body)
    for name, message in [
        (text_model, "a BertForSequenceClassification does not predict anything of images"),
        (body, "a ResNetModel does not predict anything of images"),
        (tmp_path / "nowhere", "nowhere': "),
        (tmp_path, "config.json"),
    ]:
        with pytest.raises(ValueError, match=rf"Expected `base_model` to be .*{message}"):
            train_ppap_here(tmp_path / "run", base_model=str(name))
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="`base_model` .*give `image_mean`, `image_std` and `image_processor_size`"):
        train_ppap_here(tmp_path / "run", image_processor_size=32)
    train_ppap_here(tmp_path / "run", image_mean=[0.5], image_std=[0.5], image_processor_size=32, max_train_steps=1)
    assert GuidanceExperts.from_pretrained(tmp_path / "run" / "experts").config.image_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lora"}, "one of ppap, multi_experts, finetune, but got 'lora'"),
        ({"expert": "2"}, "`expert` to be one of all, 0, 1, but got '2'"),
        ({"sample_steps": 5}, "`sample_steps` to be 0"),
        ({"pipeline_steps": 5}, "`pipeline_steps` to be 0"),
        ({"resume_from_checkpoint": "here"}, "'latest', each expert's own"),
        ({"vae": "vae"}, "no `vae`, as the experts look at images"),
        ({"teacher_image_size": 16}, "both or neither, but got None and 16"),
        ({"teacher_image_size": 16, "teacher_image_column": "t", "random_flip": True}, "`random_flip` to be false"),
        ({"num_experts": 3, "timestep_boundaries": [500]}, "the 2 that `timestep_boundaries` makes, but got 3"),
        ({"timestep_boundaries": [500], "snr_boundaries": [1.0]}, "one kind of boundaries at most"),
        ({"timestep_boundaries": [500], "method": "finetune"}, "no `timestep_boundaries` for the method finetune"),
        ({"num_experts": None, "timestep_boundaries": [1000]}, "ascend strictly between 0 and 1000"),
        ({"sigma_boundaries": [0.5]}, "`objective` to be flow where `sigma_boundaries` is set, but got ddpm"),
        ({"num_experts": 0}, "`num_experts` to be at least 1"),
        ({"objective": "rectified"}, "`objective` to be one of ddpm, flow, but got 'rectified'"),
        ({"shift": "3"}, "`objective` to be flow where `shift` is set, but got ddpm and '3.0'"),
        ({"density": "mode"}, "`objective` to be flow where `density` is set, but got ddpm and 'mode'"),
        ({"objective": "flow", "density": "normal"}, "`density` to be one of uniform, .*'normal'"),
        ({"objective": "flow", "shift": "resolution"}, "a number, as the experts' images have no tokens"),
        ({"objective": "flow", "shift": "0"}, "`shift` to be a positive number"),
        (
            {"objective": "flow", "beta_schedule": "squaredcos_cap_v2"},
            "`beta_schedule` to be left at linear for flow matching, whose noise has no betas, but got 'squaredcos_cap_v2'",
        ),
    ],
)
def test_arguments_that_do_not_fit(train_ppap_here, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_ppap_here(tmp_path, **arguments)
