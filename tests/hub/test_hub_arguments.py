"""What is given for the Hub reaches every download of a call: of private repositories, into a cache of one's own, at a revision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomised
from diffusers import DDIMScheduler, DiTPipeline
from huggingface_hub import HfApi
from networks import PLAIN, make_resnet, with_statistics
from small_pipelines import DIT, make_vae, patched

from diffusers_dmp import DiTModel, GuidanceExperts

SCRIPT = """
import json, sys
from diffusers import DiffusionPipeline
from diffusers_dmp import (
    ClassConditionalPipeline, DiTModel, DTRTransformer2DModel, GuidanceExperts, PromptPatch, RemixDiTModel
)

cache, first = sys.argv[1:]
hub = {"token": "hf_writer", "cache_dir": cache}
calls = {
    "base": lambda **given: GuidanceExperts.from_base("user/network", num_experts=2, **given),
    "first base": lambda **given: GuidanceExperts.from_base("user/network", num_experts=2, revision=first, **given),
    "experts": lambda **given: GuidanceExperts.from_pretrained("user/experts", subfolder="experts", **given),
    "model": lambda **given: DiTModel.from_pretrained("user/pipeline", subfolder="transformer", **given),
    "stock model": lambda **given: DTRTransformer2DModel.from_pretrained("user/stock", subfolder="transformer", **given),
    "remix": lambda **given: RemixDiTModel.from_diffusers(
        "user/stock", 2, 4, interval_edges=[0, 10, 20, 30, 1000], subfolder="transformer", **given
    ),
    "prompts": lambda **given: PromptPatch.from_pretrained("user/pipeline", subfolder="prompt_patch", **given),
    "pipeline": lambda **given: DiffusionPipeline.from_pretrained("user/pipeline", **given),
    "stock pipeline": lambda **given: ClassConditionalPipeline.from_pretrained("user/stock", **given),
}
loaded = {}
for name, call in calls.items():
    try:
        call(**hub | {"token": False, "cache_dir": cache + "-without-token"})
    except (OSError, ValueError) as error:
        loaded[name] = call(**hub)
    else:
        raise AssertionError(f"{name} was loaded without a token")
# once more, without any request
for name, call in calls.items():
    call(cache_dir=cache, local_files_only=True)
print(json.dumps({
    "checksums": {name: loaded[name].config.base_model_sha256 for name in ("base", "first base", "experts")},
    "edges": loaded["remix"].config.interval_edges,
    "labels": loaded["stock pipeline"].get_label_ids("class 3"),
}))
"""


def upload(api: HfApi, name: str, folder: Path, path: str | None = None) -> str:
    api.create_repo(f"user/{name}", private=True, exist_ok=True)
    return api.upload_folder(repo_id=f"user/{name}", folder_path=folder, path_in_repo=path).oid


def save_network(folder: Path, network: torch.nn.Module) -> Path:
    network.save_pretrained(folder)
    settings = {"image_mean": PLAIN["image_mean"], "image_std": PLAIN["image_std"], "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_processor_type": "ViTImageProcessor"})
    )
    return folder


@pytest.fixture
def first_revision(hub, tmp_path) -> str:
    """The first of two commits of the network for which the experts were made; it has other weights in the second."""
    api = HfApi(endpoint=hub.url, token="hf_writer")
    first = upload(api, "network", save_network(tmp_path / "first", make_resnet()))
    upload(api, "network", save_network(tmp_path / "second", with_statistics(make_resnet(num_labels=7))))
    experts = GuidanceExperts.from_base(
        str(tmp_path / "first"), num_experts=2, base_model_name_or_path="user/network", base_model_revision=first
    )
    experts.save_pretrained(tmp_path / "experts")
    upload(api, "experts", tmp_path / "experts", "experts")

    patched().save_pretrained(tmp_path / "pipeline")
    upload(api, "pipeline", tmp_path / "pipeline")
    stock = randomised(DiTModel(**DIT, downscale_freq_shift=1.0)).to_diffusers()
    DiTPipeline(stock, make_vae(), DDIMScheduler()).save_pretrained(tmp_path / "stock")
    index = (
        tmp_path / "stock" / "model_index.json"
    )  # as in facebook/DiT-XL-2-256; the stock pipeline does not save names
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"3": "class 3"}}))
    upload(api, "stock", tmp_path / "stock")
    return first


def test_every_download(hub, tmp_path, first_revision):
    home = tmp_path / "home"
    environment = os.environ | hub.environment(home)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache"), first_revision]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    checksums = found["checksums"]
    assert checksums["first base"] == checksums["experts"] != checksums["base"]
    assert found["edges"] == [0, 10, 20, 30, 1000] and found["labels"] == [3]
    assert not list((home / "hub").glob("models--*"))  # nothing went to the default cache
    cached = {path.name.removeprefix("models--user--") for path in (tmp_path / "cache").glob("models--*")}
    assert cached == {"network", "experts", "pipeline", "stock"}
