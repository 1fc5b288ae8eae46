"""What is saved beside the weights, and what is refused of what others saved."""

import ast
import json

import pytest
import torch
from conftest import randomised
from systems import DIT, PIPELINES

import diffusers_dmp
from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.bundling import source_of
from diffusers_dmp.standalone import VERSION_KEY

CLASSES = [
    "DTRTransformer2DModel",
    "DiTModel",
    "PatchedUNet2DModel",
    "RemixDiTModel",
    "PromptPatch",
    "ClassConditionalPipeline",
    "SNRSplitPipeline",
]


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_of_its_own(name):
    """It imports nothing of this package, and runs by itself in an empty namespace."""
    source = source_of(getattr(diffusers_dmp, name))
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imported]
    assert not [module for module in modules if module.startswith("diffusers_dmp")]
    assert all(getattr(node, "level", 0) == 0 for node in imported)


def test_subclasses_from_elsewhere_bring_no_code(tmp_path):
    class Mine(DiTModel):
        pass

    Mine(**DIT).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("version, refused", [("0.1.7", False), ("0.0.9", False), ("0.2.0", True), ("1.0", True)])
def test_versions(tmp_path, version, refused):
    DiTModel(**DIT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {VERSION_KEY: version}))
    if refused:
        with pytest.raises(ImportError, match=f"diffusers_dmp {version} or newer.*got {diffusers_dmp.__version__}"):
            DiTModel.from_pretrained(tmp_path)
    else:
        assert DiTModel.from_pretrained(tmp_path).config.num_layers == DIT["num_layers"]


def test_pickled_weights_are_read_when_asked_to_only(tmp_path):
    model = randomised(DTRTransformer2DModel(**DIT))
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="weights as safetensors, but got none.*diffusers-dmp convert"):
        DTRTransformer2DModel.from_pretrained(tmp_path)
    again = DTRTransformer2DModel.from_pretrained(tmp_path, use_safetensors=False)  # by `weights_only=True`
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_a_split_pipelines_lists_are_no_components(tmp_path):
    """The Hub's downloads take every list in `model_index.json` for one."""
    PIPELINES["split"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "model_index.json").read_text())
    lists = {name for name, value in config.items() if isinstance(value, list) and name != "_class_name"}
    assert all((tmp_path / name).is_dir() for name in lists if config[name] != [None, None])
    assert config["snr_boundaries"] == {"0": 4.0, "1": 0.1}
