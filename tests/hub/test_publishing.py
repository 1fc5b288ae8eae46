"""Publishing the folder of a training with one call."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from networks import PLAIN, make_resnet
from peft import LoraConfig
from PIL import Image
from small_pipelines import DIT, PIPELINES, patched, sd3_experts, with_one
from tiny_pipelines import RECIPES, generate

import diffusers_dmp
from diffusers_dmp import DenoiserExperts, DiTModel, GuidanceExperts, LoraExperts, NoiseIntervals, PromptPatch
from diffusers_dmp.hub.folders import read_folder
from diffusers_dmp.hub.publishing import publish
from diffusers_dmp.systems import SYSTEMS

LICENSE = {"license": "apache-2.0"}
SETTINGS = {"samples": 500, "guidance_scale": 1.5}
EVALUATION = [{"metric": "recognised", "value": 0.986, "dataset": "scikit-learn digits", "settings": SETTINGS}]


@pytest.fixture
def training(tmp_path):
    """The output folder of a training, with the report of a demo."""
    folder = tmp_path / "output"
    PIPELINES["remix"]().save_pretrained(folder / "pipeline")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "optimizer.bin").write_bytes(b"pickle")
    arguments = {"dataset": "user/digits", "max_train_steps": 600, "output_dir": str(folder), "vae": str(tmp_path)}
    (folder / "training_arguments.yaml").write_text(yaml.safe_dump(arguments))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    for name in ("samples", "mixing"):
        Image.new("L", (8, 8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def to_hub(hub, monkeypatch):
    """Arguments that publish on the loopback Hub; there is no other token than theirs."""
    monkeypatch.setattr("diffusers_dmp.hub.publishing.get_token", lambda: None)
    return LICENSE | {"endpoint": hub.url, "token": "hf_writer"}


def test_what_goes_up(hub, to_hub, training):
    publication = publish(training, "user/remix-digits", **to_hub, private=True)
    assert publication.url == f"{hub.url}/user/remix-digits"
    repo = hub.repos["user/remix-digits"]
    assert repo.private
    assert len(repo.commits) == 2  # one that the Hub makes, and one with all files
    names = {
        "README.md", "model_index.json", "pipeline.py", "transformer/config.json", "transformer/diffusers_dmp.py",
        "transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "samples.png", "mixing.png",
        "training_arguments.yaml", "evaluation.json",
    }  # fmt: skip
    assert repo.files.keys() - {".gitattributes"} == names == publication.files.keys()
    assert publication.card.encode() == repo.files["README.md"]


def test_a_card_has_what_many_figures_share_once(training):
    """The settings of an evaluation, without the paths of local folders."""
    shared = {"reference": "/home/me/digits", "reference_sha256": "abc", "versions": {"torch": "2.13"}}
    figures = [
        {"metric": name, "value": value, "dataset": "digits", "settings": shared | {"num_samples": number}}
        for name, value, number in (("FID", 1.5, 50_000), ("precision", 0.75, 10_000))
    ]
    (training / "evaluation.json").write_text(json.dumps(figures))
    publication = publish(training, "user/remix-digits", **LICENSE, dry_run=True)
    assert "| FID | 1.5 | num_samples: 50000 |\n| precision | 0.75 | num_samples: 10000 |" in publication.card
    assert publication.card.count("\nreference_sha256: abc\nversions:\n  torch: '2.13'\n```") == 1
    assert "/home/me" not in publication.card
    assert json.loads(publication.files["evaluation.json"])[0]["settings"]["reference"] == "digits"


def test_card(training):
    card = ModelCard(publish(training, "user/remix-digits", **LICENSE, dry_run=True).card)
    data = card.data
    assert (data.library_name, data.license, data.datasets) == ("diffusers", "apache-2.0", ["user/digits"])
    assert data.pipeline_tag == "unconditional-image-generation"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("recognised", 0.986)
    assert (result.dataset_name, result.metric_args) == ("scikit-learn digits", SETTINGS)
    for expected in (
        'DiffusionPipeline.from_pretrained("user/remix-digits")',
        'DiffusionPipeline.from_pretrained("user/remix-digits", trust_remote_code=True)',
        "https://arxiv.org/abs/2412.05628",
        "![Samples](samples.png)",
        "![mixing](mixing.png)",
        "max_train_steps: 600",
        "4 experts, whose intervals begin at the timesteps 0, 250, 500, 750",
        "| recognised | 0.986 | samples: 500, guidance_scale: 1.5 |",
    ):
        assert expected in card.text
    assert str(training.parent) not in card.text  # local paths are private


def test_lora_experts_are_loaded_from_their_repository(hub, to_hub, tmp_path, monkeypatch):
    """By name, over HTTP; every file is an ordinary LoRA as well."""
    recipe = RECIPES["sd3"]
    pipe = recipe.pipe(recipe.denoiser())
    for name in ("low", "high"):
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, name)
    experts = LoraExperts(["low", ("high", 0.5)], NoiseIntervals.from_sigmas([0.875])).attach(pipe)
    experts.save_pretrained(tmp_path / "saved")
    publication = publish(tmp_path / "saved", "user/high-and-low", **to_hub, base_model="user/sd3")
    card = ModelCard(publication.card)
    assert {"lora", "lora_experts", "arxiv:2503.07416"} <= set(card.data.tags) and card.data.base_model == "user/sd3"
    assert 'LoraExperts.from_pretrained("user/high-and-low")' in card.text
    assert "0.5 times high: timesteps 875 to 1000 of 1000" in card.text
    assert set(publication.files) == {"README.md", "lora_experts.json", "high.safetensors", "low.safetensors"}

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    other = recipe.pipe(recipe.denoiser())
    arguments = {"cache_dir": tmp_path / "cache", "token": False}
    loaded = LoraExperts.from_pretrained("user/high-and-low", revision="main", **arguments).attach(other)
    assert repr(loaded) == repr(experts)
    assert torch.equal(generate("sd3", other), generate("sd3", pipe))


def unconditional():
    return with_one(DiTModel(**DIT | {"num_classes": 1, "class_dropout_prob": 0.0}))


@pytest.mark.parametrize("name, make", [*PIPELINES.items(), ("unconditional", unconditional)])
def test_every_card_says_what_runs(tmp_path, monkeypatch, name, make):
    make().save_pretrained(tmp_path / "user" / name)
    publication = publish(tmp_path / "user" / name, f"user/{name}", **LICENSE, dry_run=True)
    contents = read_folder(tmp_path / "user" / name)
    assert f"arxiv:{SYSTEMS[contents.system].paper}" in ModelCard(publication.card).data.tags
    monkeypatch.chdir(tmp_path)  # there the name of the repository is that of a folder
    with_package, _ = re.findall(r"```py\n(.+?)```", publication.card, re.DOTALL)
    scope = {}
    exec(with_package, scope)
    assert scope["image"].size == (8, 8)


def test_the_card_of_experts_in_a_pipeline_of_diffusers(tmp_path):
    sd3_experts().save_pretrained(tmp_path)
    publication = publish(tmp_path, "user/sd3", **LICENSE, dry_run=True)
    card = ModelCard(publication.card)
    assert card.data.pipeline_tag is None  # the Hub finds it in the pipeline's class
    assert "arxiv:2211.01324" in card.data.tags
    assert 'DiffusionPipeline.from_pretrained("user/sd3", trust_remote_code=True)' in card.text
    assert "owns the timesteps from 875 on" in card.text and "StableDiffusion3Pipeline" in card.text
    assert "class_labels" not in card.text
    assert [name for name in publication.files if name.endswith(".py")] == ["transformer/diffusers_dmp.py"]
    assert "model_index.json" in publication.files


def test_experts_alone_take_the_place_of_a_pipelines_denoiser(tmp_path, monkeypatch):
    """The card says how, and what it says runs."""
    pipeline = PIPELINES["experts"]()
    pipeline.transformer.save_pretrained(tmp_path / "user" / "experts")
    PIPELINES["dit"]().save_pretrained(tmp_path / "user" / "base")
    settings = {"base_model": "user/base", "dry_run": True}
    publication = publish(tmp_path / "user" / "experts", "user/experts", **LICENSE, **settings)
    assert "diffusers_dmp.py" in publication.files
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```py\n(.+?)```", publication.card, re.DOTALL)
    scope = {}
    exec(code, scope)
    call = {"class_labels": [3], "num_inference_steps": 4, "output_type": "latent"}
    images = [each(**call, generator=torch.Generator().manual_seed(0)).images for each in (scope["pipe"], pipeline)]
    assert torch.equal(*images)

    make = RECIPES["sdxl"].denoiser
    unets = DenoiserExperts([make(0), make(1)], NoiseIntervals.from_timesteps([500]))
    unets.save_pretrained(tmp_path / "unets")
    assert ", unet=experts)" in publish(tmp_path / "unets", "user/experts", **LICENSE, **settings).card


def test_the_code_of_experts_can_be_added_to_a_saved_pipeline(tmp_path):
    pipeline = sd3_experts()
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    pipeline.transformer.save_code(tmp_path / "transformer")
    code = publish(tmp_path, "user/sd3", **LICENSE, dry_run=True).files["transformer/diffusers_dmp.py"]
    assert (tmp_path / "transformer" / "diffusers_dmp.py").read_bytes() == code


def test_the_code_of_experts_holds_this_packages_classes_among_them(tmp_path):
    PIPELINES["experts"]().save_pretrained(tmp_path, bundle_code=True)
    code = (tmp_path / "transformer" / "diffusers_dmp.py").read_text()
    published = publish(tmp_path, "user/experts", **LICENSE, dry_run=True).files["transformer/diffusers_dmp.py"]
    assert published.decode() == code
    for name in ("DenoiserExperts", "DiTModel", "DTRTransformer2DModel"):
        assert code.count(f"\nclass {name}(") == 1
    assert "class RemixDiTModel" not in code


def test_folders_of_before_get_this_versions_code(hub, to_hub, tmp_path):
    PIPELINES["dtr"]().save_pretrained(tmp_path, bundle_code=True)
    expected = (tmp_path / "transformer" / "diffusers_dmp.py").read_bytes()
    (tmp_path / "transformer" / "diffusers_dmp.py").write_text("older")
    (tmp_path / "pipeline.py").unlink()
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "ClassConditionalPipeline"}))
    publish(tmp_path, "user/dtr", **to_hub)
    files = hub.repos["user/dtr"].files
    assert files["transformer/diffusers_dmp.py"] == expected
    assert json.loads(files["model_index.json"])["_class_name"] == ["pipeline", "ClassConditionalPipeline"]
    assert "pipeline.py" in files


def test_a_patch_alone(hub, to_hub, tmp_path):
    patched().prompt_patch.save_pretrained(tmp_path)
    card = publish(tmp_path, "user/patch", **to_hub, base_model="user/dit").card
    assert ModelCard(card).data.base_model == "user/dit"
    assert 'PromptPatch.from_pretrained("user/patch").attach(pipe.transformer)' in card
    (tmp_path / "again").mkdir()
    HfApi(endpoint=hub.url, token="hf_writer").snapshot_download("user/patch", local_dir=tmp_path / "again")
    assert PromptPatch.from_pretrained(tmp_path / "again").num_parameters() == patched().prompt_patch.num_parameters()


LOAD_EXPERTS = """
import sys, torch
from diffusers_dmp import GuidanceExperts
experts = GuidanceExperts.from_pretrained("user/experts")
assert experts.config.base_model_name_or_path == "user/resnet"
torch.save(experts.run_expert(3, torch.zeros(1, 3, 32, 32)).logits.detach(), sys.argv[1])
"""


def test_guidance_experts_alone(hub, to_hub, tmp_path):
    """The network that they adapt is not uploaded, only named, so it has to be on the Hub itself."""
    network = make_resnet()
    network.save_pretrained(tmp_path / "resnet")
    experts = GuidanceExperts(network, **PLAIN, base_model_name_or_path=str(tmp_path / "resnet"))
    with torch.no_grad():
        for name, tensor in experts.expert_tensors().items():
            if ".lora_" in name:
                tensor.add_(0.1)
    experts.save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match="base model of guidance experts to be on the Hub.*resnet"):
        publish(tmp_path / "experts", "user/experts", **to_hub)
    with pytest.raises(ValueError, match="base model of guidance experts to be on the Hub.*'user/resnet'"):
        publish(tmp_path / "experts", "user/experts", **to_hub, base_model="user/resnet")

    api = HfApi(endpoint=hub.url, token="hf_writer")
    api.create_repo("user/resnet")
    api.upload_folder(repo_id="user/resnet", folder_path=tmp_path / "resnet")
    publish(tmp_path / "experts", "user/experts", **to_hub, base_model="user/resnet")
    environment = os.environ | hub.environment(tmp_path / "home")
    command = [sys.executable, "-c", LOAD_EXPERTS, str(tmp_path / "logits.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = experts.run_expert(3, torch.zeros(1, 3, 32, 32)).logits.detach()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize(("outputs", "given"), [("logits", ""), (None, ""), (torch.nn.Identity(), ", outputs=...")])
def test_guidance_experts_of_a_network_from_elsewhere(tmp_path, outputs, given):
    """It need not be on the Hub; the card says what to load the experts with."""
    settings = PLAIN | {"method": "finetune", "num_experts": 1, "base_model_name_or_path": "torch.hub a/b c"}
    GuidanceExperts(torch.nn.Flatten(), outputs=outputs, **settings).save_pretrained(tmp_path)
    publication = publish(tmp_path, "user/experts", license="mit", dry_run=True)
    assert "network = ...  # torch.hub a/b c\n" in publication.card
    assert f'GuidanceExperts.from_pretrained("user/experts", network=network{given})\n' in publication.card
    assert "base_model:" not in publication.card
    assert json.loads(publication.files["config.json"])["base_model_name_or_path"] == "torch.hub a/b c"


def test_guidance_experts_with_a_function_of_what_a_network_of_transformers_returns(tmp_path):
    """The network is loaded by its name, so it has to be on the Hub; the function is to be given."""
    settings = PLAIN | {"base_model_name_or_path": "user/resnet", "outputs": lambda output: output.logits[:, :2]}
    GuidanceExperts(make_resnet(), **settings).save_pretrained(tmp_path)
    publication = publish(tmp_path, "user/experts", license="mit", dry_run=True)
    assert 'GuidanceExperts.from_pretrained("user/experts", outputs=...)\n' in publication.card
    assert "base_model: user/resnet\n" in publication.card and "loaded from its own repo" in publication.card
    config = json.loads((tmp_path / "config.json").read_text()) | {"base_model_name_or_path": "resnet"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="base model of guidance experts to be on the Hub.*'resnet'"):
        publish(tmp_path, "user/experts", license="mit", dry_run=True)


def test_a_dry_run_leaves_no_trace(hub, to_hub, training):
    publication = publish(training, "user/remix-digits", **to_hub, dry_run=True)
    assert "model_index.json" in publication.files
    assert publication.url is None
    assert not hub.requests


def test_names_that_are_taken(hub, to_hub, training):
    publish(training, "user/remix-digits", **to_hub)
    with pytest.raises(ValueError, match="`repo_id` to be a new name.*'user/remix-digits', which is taken"):
        publish(training, "user/remix-digits", **to_hub)
    (training / "mixing.png").unlink()
    publish(training, "user/remix-digits", **to_hub, update=True)
    assert len(hub.repos["user/remix-digits"].commits) == 3
    assert "mixing.png" not in hub.repos["user/remix-digits"].files


def test_nothing_becomes_public_that_is_to_be_private(hub, to_hub, training):
    publish(training, "user/remix-digits", **to_hub)
    with pytest.raises(ValueError, match="'user/remix-digits' to be private already, .* but got a public repository"):
        publish(training, "user/remix-digits", **to_hub, private=True, update=True)
    assert len(hub.repos["user/remix-digits"].commits) == 2


def test_nothing_goes_up_that_was_not_meant(hub, to_hub, training, tmp_path):
    """Neither files beside the published folder nor hidden ones are uploaded."""
    for name in ("holiday.png", "evaluation.json", "training_arguments.yaml"):
        (tmp_path / name).write_text("[]")
    (training / "pipeline" / ".env").write_text("TOKEN=secret")
    (training / "pipeline" / ".cache").mkdir()
    (training / "pipeline" / ".cache" / "config.json").write_text("{}")
    (training / "pipeline" / "notes.py").write_text("")
    moved = (training / "pipeline").rename(tmp_path / "moved")
    names = publish(moved, "user/dit", **LICENSE, dry_run=True).files.keys()
    assert names == {
        "README.md", "model_index.json", "pipeline.py", "transformer/config.json", "transformer/diffusers_dmp.py",
        "transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
    }  # fmt: skip


def test_what_was_published_is_published_again(hub, to_hub, training, tmp_path):
    first = publish(training, "user/remix-digits", **to_hub)
    api = HfApi(endpoint=hub.url, token="hf_writer")
    folder = api.snapshot_download("user/remix-digits", local_dir=tmp_path / "again")
    summary, expected = read_folder(folder).summary(), read_folder(training).summary()
    for paths in (summary["training"], expected["training"]):
        paths.pop("output_dir", None), paths.pop("vae")
    assert summary == expected
    again = publish(folder, "user/copy", **to_hub)
    assert again.files.keys() == first.files.keys()
    assert again.card == first.card.replace("remix-digits", "copy")


def test_hub_ids_that_the_hub_does_not_know_are_left_out(hub, to_hub, training):
    """They may be names of folders on another machine."""
    assert ModelCard(publish(training, "user/remix-digits", **to_hub).card).data.datasets is None
    HfApi(endpoint=hub.url, token="hf_writer").create_repo("user/digits", repo_type="dataset")
    assert ModelCard(publish(training, "user/more", **to_hub).card).data.datasets == ["user/digits"]


def test_without_a_token(to_hub, training):
    with pytest.raises(ValueError, match="a token to write with.*hf auth login"):
        publish(training, "user/remix-digits", **to_hub | {"token": None})


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "user/na me", "--", ""])
def test_names_that_are_none(to_hub, training, repo_id):
    with pytest.raises(ValueError, match="`repo_id` to be like 'user/name'"):
        publish(training, repo_id, **to_hub)


def test_pickled_weights(training):
    weights = training / "pipeline" / "transformer" / "diffusion_pytorch_model.bin"
    weights.write_bytes(b"pickle")
    with pytest.raises(ValueError, match="safetensors, but got transformer/diffusion_pytorch_model.bin"):
        publish(training, "user/remix-digits", **LICENSE)


def test_folders_of_others(tmp_path):
    with pytest.raises(ValueError, match="to hold a model_index.json, config.json or lora_experts.json"):
        publish(tmp_path, "user/x", **LICENSE)
    make_resnet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="to hold one of .*GuidanceExperts.* but got None"):
        publish(tmp_path, "user/x", **LICENSE)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json' to hold a JSON object, but got list"):
        publish(tmp_path, "user/x", **LICENSE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' to be JSON"):
        publish(tmp_path, "user/x", **LICENSE)


def test_info(training):
    summary = read_folder(training).summary()
    assert summary["system"] == "remix"
    assert summary["parameters"] == PIPELINES["remix"]().transformer.num_parameters()
    assert summary["components"] == {"scheduler": "DDIMScheduler", "transformer": "RemixDiTModel"}
    assert summary["training"]["max_train_steps"] == 600
    assert summary["evaluation"] == EVALUATION
    assert summary["saved by"] == f"diffusers_dmp {diffusers_dmp.__version__}"
