"""Text-to-image training: every method through the entry point, and that an expert trains at the noise levels it is used at."""

import dataclasses
import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, EDMEulerScheduler
from huggingface_hub import constants
from safetensors.torch import load_file
from text_runs import encode_pipeline, fresh_processes
from tiny_pipelines import generate, wan, wan_pipe

from diffusers_dmp import LoraExperts, NoiseIntervals, PromptPatch, TaskRouting
from diffusers_dmp.hub.pushing import with_card, with_hub
from diffusers_dmp.models.time_argument import ExpertFinder
from diffusers_dmp.saving.adapters import adapter_names
from diffusers_dmp.training.export import export_checkpoint
from diffusers_dmp.training.loop import training_steps
from diffusers_dmp.training.preparation import prepare_run
from diffusers_dmp.training.run import TrainingRun
from diffusers_dmp.training.text_to_image import TextToImageArguments, train_text_to_image
from diffusers_dmp.training.text_to_image.training import TextToImageParts, prepare_parts
from diffusers_dmp.training.trainer import make_accelerator
from diffusers_dmp.training.validation import validation_losses

FAMILIES = ["sd3", "flux", "pixart", "sdxl"]


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    """Tiny pipelines and what they have encoded, each made when it is first asked for."""
    made = {}

    def of(name: str):
        if name not in made:
            made[name] = encode_pipeline(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def prepared(arguments: dict) -> tuple[TextToImageArguments, TextToImageParts, TrainingRun]:
    """A training before its first step."""
    fresh_processes()
    args = TextToImageArguments(**arguments)
    accelerator = make_accelerator(args)
    parts = prepare_parts(accelerator, args)
    return args, parts, prepare_run(accelerator, args, parts.model, parts.objective, parts.data, parts.recipe)


def do_steps(args: TextToImageArguments, run: TrainingRun) -> list:
    batches = run.data.training_batches(run.parts.accelerator, args, 0)
    return list(training_steps(run.parts, args, batches, 0))


def loras(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_loras(folder: Path, other: Path) -> None:
    assert (folder / "lora_experts.json").read_text() == (other / "lora_experts.json").read_text()
    for name, tensors in loras(folder).items():
        assert all(torch.equal(tensor, loras(other)[name][key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_moves_in_the_interval_of_the_expert_that_is_trained_alone(encoded, tmp_path, name):
    """Both intervals are measured with all experts attached; that of the expert nobody trained gives the very same loss."""
    family = encoded(name)
    arguments = {
        "method": "lora_experts",
        "num_experts": 2,
        "expert": "0",
        "learning_rate": 5e-2,
        "max_train_steps": 6,
    }
    arguments |= {"validation_dataset": str(family.shards), "rank": 8}
    args, _, run = prepared(family.arguments(tmp_path, **arguments))
    everything = dataclasses.replace(run.parts, recipe=dataclasses.replace(run.parts.recipe, expert=None))
    before = validation_losses(everything, args, run.data)
    do_steps(args, run)
    after = validation_losses(everything, args, run.data)
    assert after["validation_loss/500-1000"] == before["validation_loss/500-1000"]
    assert after["validation_loss/0-500"] < before["validation_loss/0-500"] - 1e-5


@pytest.mark.parametrize(
    "name, shares", [*((name, "balanced") for name in FAMILIES), ("sd3", "density"), ("pixart", "density")]
)
def test_a_sample_is_trained_by_the_expert_that_owns_it_in_inference(encoded, tmp_path, monkeypatch, name, shares):
    arguments = {
        "method": "lora_experts",
        "timestep_boundaries": [300, 700],
        "expert_shares": shares,
        "batch_size": 6,
        "max_train_steps": 1,
    }
    args, parts, run = prepared(encoded(name).arguments(tmp_path, **arguments))
    found = []

    class Recorded(ExpertFinder):
        def __call__(self, *arguments):
            experts = super().__call__(*arguments)
            found.append(experts)
            return experts

    attached = LoraExperts.attached_to(parts.source.denoiser)
    (attachment,) = attached._attachments
    monkeypatch.setattr(attachment, "finder", Recorded(parts.source.denoiser, attached.intervals))
    steps = do_steps(args, run)
    first_passes = [
        owners for owners in found if len(owners) == 6
    ]  # the others are those of the parts of a mixed batch
    owners = [attached.intervals.index(step.timesteps).tolist() for step in steps]
    assert first_passes == owners and len({*sum(owners, [])}) >= 2
    if shares == "balanced":
        assert [step.experts.owners for step in steps] == owners
        assert [sorted(each) for each in owners] == [[0, 0, 1, 1, 2, 2]] * len(steps)


def test_a_step_changes_nothing_but_the_experts_that_it_trains(encoded, tmp_path):
    """Neither weight decay nor the momentum of earlier steps moves the others."""
    arguments = {"method": "lora_experts", "num_experts": 2, "expert_batches": "one", "weight_decay": 0.1, "seed": 2}
    args, parts, run = prepared(encoded("sd3").arguments(tmp_path, max_train_steps=4, **arguments))
    batches = run.data.training_batches(run.parts.accelerator, args, 0)
    before, trained = {name: value.clone() for name, value in parts.model.state_dict().items()}, []
    for step in training_steps(run.parts, args, batches, 0):
        after = {name: value.clone() for name, value in parts.model.state_dict().items()}
        changed = {name.split(".")[-2] for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {f"expert_{owner}" for owner in step.experts.owners}
        before, trained = after, trained + step.experts.owners
    assert {*trained[:-1]} == {0, 1}  # each of them after the other


def test_lora_experts_are_saved_and_put_back(encoded, tmp_path):
    """A fresh pipeline with the saved files generates what the training's own pipeline generates."""
    sd3 = encoded("sd3")
    arguments = {"method": "lora_experts", "sigma_boundaries": [0.5], "ranks": [4, 2], "lora_alpha": 3.0}
    args, parts, run = prepared(sd3.arguments(tmp_path, **arguments))
    do_steps(args, run)
    folder = tmp_path / "loras"
    parts.recipe.save_to(parts.model, folder)
    trained = generate("sd3", DiffusionPipeline.from_pretrained(sd3.pipeline, transformer=parts.source.denoiser))
    pipe = DiffusionPipeline.from_pretrained(sd3.pipeline)
    before = generate("sd3", pipe)
    experts = LoraExperts.from_pretrained(folder).attach(pipe)
    assert torch.equal(generate("sd3", pipe), trained) and not torch.equal(trained, before)
    assert experts.intervals == NoiseIntervals((0, 500, 1000))
    ranks = {
        name: {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
        for name, tensors in loras(folder).items()
    }
    assert ranks == {"expert_0": {4}, "expert_1": {2}}  # the first is that for the least noise
    experts.detach()
    assert torch.equal(generate("sd3", pipe), before)


def test_what_is_trained_is_said_before_the_first_step(encoded, tmp_path, capsys):
    sd3 = encoded("sd3")
    sd3.train(tmp_path, method="lora_experts", sigma_boundaries=[0.875], expert="1", ranks=[8, 1], max_train_steps=1)
    said = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":" in line)
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "loras" / "expert_1.safetensors").values())
    assert said["model"].strip() == f"SD3Transformer2DModel, frozen; {count:,} parameters beside it are trained"
    assert said["experts"].strip() == "2, for the timesteps 0 to 875, 875 to 1000; number 1 is trained"


def test_experts_are_trained_one_by_one_into_one_folder(encoded, tmp_path):
    """The folders of two machines, copied together, are what `from_pretrained` reads; each alone names what is missing."""
    sd3 = encoded("sd3")
    arguments = {"method": "lora_experts", "sigma_boundaries": [0.5], "pipeline_steps": 1}
    sd3.train(tmp_path, expert="1", **arguments)
    with pytest.raises((OSError, ValueError), match="expert_0"):
        LoraExperts.from_pretrained(tmp_path / "loras")
    sd3.train(tmp_path, expert="0", **arguments)
    experts = LoraExperts.from_pretrained(tmp_path / "loras").attach(DiffusionPipeline.from_pretrained(sd3.pipeline))
    assert experts.names == ["expert_0", "expert_1"]
    assert loras(tmp_path / "loras-1").keys() == {"expert_0", "expert_1"}  # along the way, too
    for expert in (0, 1):
        recorded = yaml.safe_load((tmp_path / f"expert_{expert}" / "training_arguments.yaml").read_text())
        assert recorded["expert"] == str(expert) and recorded["objective"] == "flow"


def test_two_transformers(tmp_path):
    """Wan2.2: each expert's LoRA is in the transformer that owns its noise, one by one with that transformer alone in memory."""
    pipe = wan_pipe(wan(), transformer_2=wan(seed=1), boundary_ratio=0.875)
    wan22 = encode_pipeline("wan", tmp_path / "encoded", pipe)
    for boundaries, method in (([0.5], "lora_experts"), ([], "lora")):
        with pytest.raises(ValueError, match="changes its denoiser"):
            wan22.train(tmp_path / "refused", method=method, sigma_boundaries=boundaries)
    arguments = {
        "method": "lora_experts",
        "sigma_boundaries": [0.5, 0.875],
        "max_train_steps": 1,
        "checkpointing_steps": 9,
    }
    arguments |= {"batch_size": 6, "ema_decay": 0.0, "learning_rate": 1e-3}
    args, parts, run = prepared(wan22.arguments(tmp_path, **arguments))
    owned = [adapter_names(parts.source.denoisers[name]) for name in ("transformer", "transformer_2")]
    assert owned == [{"expert_2"}, {"expert_0", "expert_1"}]
    do_steps(args, run)
    trained = {
        key.rpartition(".")[0].rpartition(".")[2]
        for key, value in parts.model.state_dict().items()
        if "lora_B" in key and value.any()
    }
    assert trained == {"expert_0", "expert_1", "expert_2"}

    parts.recipe.save_to(parts.model, tmp_path / "loras")
    pipe = DiffusionPipeline.from_pretrained(wan22.pipeline)
    before = generate("wan", pipe)
    LoraExperts.from_pretrained(tmp_path / "loras").attach(pipe)
    assert not torch.equal(generate("wan", pipe), before)

    for expert, component in (("1", "transformer_2"), ("2", "transformer")):
        _, parts, _ = prepared(wan22.arguments(tmp_path, expert=expert, **arguments))
        assert [*parts.source.denoisers] == [component]
        parts.recipe.save_to(parts.model, tmp_path / "apart")
    assert loras(tmp_path / "apart").keys() == {"expert_1", "expert_2"}
    assert loras(tmp_path / "apart")["expert_2"].keys() == loras(tmp_path / "loras")["expert_2"].keys()


def test_one_lora(encoded, tmp_path):
    """In the file that `load_lora_weights(folder)` looks for, and with samples from prompts along the way."""
    sd3 = encoded("sd3")
    samples = {"sample_steps": 1, "validation_prompts": ["left", "top"], "sample_inference_steps": 2}
    arguments = {"method": "lora", "sample_height": 8, "sample_width": 8, "sample_guidance_scale": 3.0} | samples
    sd3.train(tmp_path, **arguments)
    sizes = [PIL.Image.open(tmp_path / "samples" / f"step-{step}.png").size for step in (1, 2)]
    assert sizes == [(16, 8)] * 2
    pipe = DiffusionPipeline.from_pretrained(sd3.pipeline)
    before = generate("sd3", pipe)
    pipe.load_lora_weights(tmp_path / "loras")
    assert not torch.equal(generate("sd3", pipe), before)
    assert LoraExperts.from_pretrained(tmp_path / "loras").intervals.num_experts == 1


def test_samples_have_the_same_noise_every_time(encoded, tmp_path):
    """As from a pipeline with its text encoders; afterwards, training goes on without the timesteps of the sampling."""
    sd3 = encoded("sd3")
    samples = {"sample_steps": 1, "validation_prompts": ["left", "top"], "sample_inference_steps": 2}
    arguments = {"method": "lora_experts", "num_experts": 2, "sample_height": 8, "sample_width": 8} | samples
    args, parts, _ = prepared(sd3.arguments(tmp_path, **arguments))
    rows = []
    for _ in range(2):
        pipeline = parts.recipe.make_pipeline(parts.model)
        rows += parts.recipe.generate(pipeline, torch.Generator().manual_seed(3))
        assert getattr(pipeline.scheduler, "num_inference_steps", None) is None
    own = DiffusionPipeline.from_pretrained(sd3.pipeline)
    settings = {"num_inference_steps": 2, "height": 8, "width": 8}
    expected = own("top", generator=torch.Generator().manual_seed(4), **settings).images[0]
    (left, top), (left_again, top_again) = rows
    assert left == left_again and top == top_again == expected and left != top


def test_samples_of_a_size_that_the_pipeline_does_not_have(encoded, tmp_path):
    samples = {"sample_steps": 1, "validation_prompts": ["left"], "sample_height": 8, "sample_width": 7}
    with pytest.raises(ValueError, match="`sample_width` to be divisible by the 2 pixels .* but got 7"):
        prepared(encoded("flux").arguments(tmp_path, method="lora", **samples))


def test_prompts(encoded, tmp_path):
    sd3 = encoded("sd3")
    arguments = {"num_prompts": 64, "topk": 0.5, "gate_learning_rate": 1e-2}
    sd3.train(tmp_path, method="prompts", **arguments)
    patch = PromptPatch.from_pretrained(tmp_path / "patch")
    assert all(weight.abs().max() > 0 for weight in patch.state_dict().values())
    patch.attach(DiffusionPipeline.from_pretrained(sd3.pipeline).transformer)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"importance_loss", "load_loss"} <= {name.rpartition("/")[2] for each in metrics for name in each}


def test_routing(encoded, tmp_path):
    """The whole pipeline is saved, text encoders included, with the routing in the denoiser's configuration."""
    sd3 = encoded("sd3")
    sd3.train(tmp_path, method="routing", sharing_ratio=0.5)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    (routing,) = TaskRouting.restore(pipe)
    assert routing.sharing_ratio == 0.5 and pipe.text_encoder_3 is not None
    base = DiffusionPipeline.from_pretrained(sd3.pipeline).transformer.state_dict()
    changed = [not torch.equal(weight, base[name]) for name, weight in pipe.transformer.state_dict().items()]
    assert sum(changed) > len(changed) / 2


def test_a_resumed_run_is_the_same(encoded, tmp_path):
    sd3 = encoded("sd3")
    arguments = {"method": "lora_experts", "sigma_boundaries": [0.5], "lora_dropout": 0.2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sd3.train(whole, **arguments)
    sd3.train(cut, max_train_steps=1, **arguments)
    sd3.train(cut, resume_from_checkpoint="latest", **arguments)
    assert_same_loras(whole / "loras", cut / "loras")
    export_checkpoint(whole / "checkpoint-2", tmp_path / "exported")
    assert_same_loras(whole / "loras", tmp_path / "exported")
    # what is saved is averaged, from the zeros that these weights begin with: the last step has moved them further
    export_checkpoint(whole / "checkpoint-2", tmp_path / "latest", use_ema=False)
    averaged, latest = (
        torch.cat(
            [
                tensor.flatten()
                for tensors in loras(folder).values()
                for key, tensor in tensors.items()
                if "lora_B" in key
            ]
        )
        for folder in (whole / "loras", tmp_path / "latest")
    )
    assert 0.1 < averaged.norm() / latest.norm() < 0.99


def test_frozen_weights_take_the_precision_of_the_training(encoded, tmp_path):
    """Adapters stay in float32; gradient checkpointing computes the same."""
    arguments = {"method": "lora_experts", "sigma_boundaries": [0.5], "mixed_precision": "bf16", "max_train_steps": 1}
    trained = []
    for checkpointing in (False, True):
        settings = arguments | {"gradient_checkpointing": checkpointing}
        args, parts, run = prepared(encoded("sd3").arguments(tmp_path, **settings))
        do_steps(args, run)
        trained.append({name: value.clone() for name, value in parts.model.state_dict().items()})
        frozen = [each for each in parts.source.denoiser.parameters() if not each.requires_grad]
        assert {each.dtype for each in frozen} == {torch.bfloat16}
        assert {each.dtype for each in parts.model.parameters()} == {torch.float32}
        assert all(each.requires_grad for each in parts.model.parameters())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


BAD = {
    "method": ({"method": "lorax"}, "`method` to be one of lora, lora_experts, .*'lorax'"),
    "no boundaries": ({}, "exactly one of `sigma_boundaries`, .* got none"),
    "two kinds of boundaries": (
        {"sigma_boundaries": [0.5], "num_experts": 2},
        "got `?sigma_boundaries`? and `?num_experts",
    ),
    "descending boundaries": ({"sigma_boundaries": [0.875, 0.5]}, "`sigmas` to ascend strictly between 0 and 1"),
    "boundaries in another unit": ({"sigma_boundaries": [875.0]}, "`sigmas` to ascend strictly between 0 and 1"),
    "ranks": ({"num_experts": 3, "ranks": [64, 16]}, "one number for each of 3 experts, .* got 2: 64 16"),
    "rank": ({"num_experts": 2, "rank": 0}, "`rank` to be at least 1, but got 0"),
    "expert": ({"num_experts": 2, "expert": "2"}, "`expert` to be one of all, 0, 1, but got '2'"),
    "shares": ({"num_experts": 2, "expert_shares": "equal"}, "`expert_shares` to be one of balanced, density"),
    "one by density": ({"num_experts": 2, "expert_shares": "density", "expert_batches": "one"}, "to be mixed"),
    "an option of another method": (
        {"num_experts": 2, "sharing_ratio": 0.5},
        "`method` to be routing where `sharing_ratio`",
    ),
    "experts of one LoRA": (
        {"method": "lora", "num_experts": 2},
        "`method` to be lora_experts or denoiser_experts where `num_experts` is set",
    ),
    "target module": ({"num_experts": 2, "target_modules": ["to_qq"]}, "got 'to_qq'; close to it are .*to_q"),
    "learned variance": ({"num_experts": 2, "learn_sigma": True}, "`learn_sigma` to be false for flow matching"),
    "prediction type": ({"num_experts": 2, "prediction_type": "epsilon"}, "`prediction_type` to be flow_prediction"),
    "process": ({"num_experts": 2, "objective": "ddpm"}, "`objective` to be flow, as the pipeline's FlowMatchEuler"),
    "no share": (
        {"sigma_boundaries": [1e-6], "expert_shares": "density"},
        "at least 0.0001 of the probability, but got .* for expert 0",
    ),
    "samples without prompts": (
        {"num_experts": 2, "sample_steps": 1},
        "`sample_steps` and `validation_prompts` to be set",
    ),
    "no stream": ({"num_experts": 2, "shuffle_buffer_size": 5}, "`streaming` to be true where `shuffle_buffer_size`"),
    "pipeline": (
        {"num_experts": 2, "pretrained_model_name_or_path": str(Path(__file__).parent)},
        "without a model_index",
    ),
    "data set": ({"num_experts": 2, "dataset": "/nowhere"}, "/nowhere"),
    "steps": ({"num_experts": 2, "max_train_steps": 0}, "`max_train_steps` to be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_first_step(encoded, tmp_path, case):
    arguments, message = BAD[case]
    output_dir = tmp_path / "output"
    with pytest.raises((ValueError, OSError), match=message) as caught:
        encoded("sd3").train(output_dir, **{"method": "lora_experts"} | arguments)
    assert "\n" not in str(caught.value) and not output_dir.exists()


def test_published_with_a_card_of_the_intervals(encoded, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    settings = {"method": "lora_experts", "sigma_boundaries": [0.5], "push_to_hub": True, "hub_license": "mit"}
    fresh_processes()
    arguments = encoded("sd3").arguments(tmp_path / "left-or-top", **settings)
    with_hub(with_card(train_text_to_image))(TextToImageArguments(**arguments))
    files = hub.repos["user/left-or-top"].files
    assert {"README.md", "lora_experts.json", "expert_0.safetensors", "expert_1.safetensors"} <= files.keys()
    beside = (tmp_path / "left-or-top" / "loras" / "README.md").read_text()
    for card in (beside, files["README.md"].decode()):
        assert "expert_0: timesteps 0 to 500 of 1000 (σ 0 to 0.5 in flow matching)" in card and "license: mit" in card
        assert "sigma_boundaries:" in card and str(tmp_path) not in card.replace(
            str(tmp_path / "left-or-top" / "loras"), ""
        )
    with pytest.raises(ValueError, match="`push_to_hub` to be false for the method routing"):
        encoded("sd3").train(tmp_path, method="routing", push_to_hub=True, hub_license="mit")


def test_a_process_without_an_objective_is_refused(encoded, tmp_path):
    """EDM's noise levels are not those of its scheduler's DDPM relatives, although it has a `prediction_type`."""
    source = encoded("sdxl")
    other = tmp_path / "edm"
    shutil.copytree(source.pipeline, other)
    index = json.loads((other / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (other / "model_index.json").write_text(json.dumps(index))
    EDMEulerScheduler().save_pretrained(other / "scheduler")
    with pytest.raises(ValueError, match="noise levels of flow matching, or betas .* got a EDMEulerScheduler"):
        source.train(tmp_path / "output", method="lora", pretrained_model_name_or_path=str(other))
    index["scheduler"] = ["elsewhere", "OwnScheduler"]
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a scheduler of Diffusers, but got 'OwnScheduler'"):
        source.train(tmp_path / "output", method="lora", pretrained_model_name_or_path=str(other))


def test_data_of_another_pipeline_are_refused(encoded, tmp_path):
    with pytest.raises(ValueError, match="FluxPipeline"):
        encoded("sd3").train(tmp_path, method="lora", dataset=str(encoded("flux").shards))
