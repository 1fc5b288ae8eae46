"""What is saved beside the weights, and which saved folders are refused."""

import ast
import json
from pathlib import Path

import pytest
import torch
from conftest import randomised
from diffusers import DiffusionPipeline
from networks import PLAIN, make_resnet
from small_pipelines import DIT, PIPELINES

import diffusers_dmp
from diffusers_dmp import ClassConditionalPipeline, DiTModel, DTRTransformer2DModel, GuidanceExperts, SNRSplitPipeline
from diffusers_dmp.saving.bundling import source_of
from diffusers_dmp.saving.mixins import VERSION_KEY

CLASSES = [
    "DTRTransformer2DModel",
    "DenoiserExperts",
    "DiTModel",
    "PatchedUNet2DModel",
    "RemixDiTModel",
    "PromptPatch",
    "ClassConditionalPipeline",
    "SNRSplitPipeline",
    "SentenceToImagePipeline",
]


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_of_its_own(name):
    """It imports nothing of this package."""
    source = source_of(getattr(diffusers_dmp, name))
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [name for node in imported for name in [getattr(node, "module", None)] if name]
    modules += [alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names]
    assert modules
    assert not [module for module in modules if module.startswith("diffusers_dmp")]
    assert all(getattr(node, "level", 0) == 0 for node in imported)


def test_files_that_share_a_namespace_share_no_names():
    """Diffusers executes the code of all components in one module, so that the last file's `name` would be everybody's."""
    owners = {}
    for cls in CLASSES:
        for part in source_of(getattr(diffusers_dmp, cls)).split("\n# diffusers_dmp/")[1:]:
            module, _, text = part.partition("\n")
            for statement in ast.parse(text).body:
                targets = getattr(statement, "targets", [getattr(statement, "target", statement)])
                names = [getattr(target, "id", getattr(target, "name", None)) for target in targets]
                for name in filter(None, names):
                    assert owners.setdefault(name, module) == module, name
    assert {"DiTModel", "PromptPatch", "NoiseIntervals", "PREDICTION_TYPES"} <= owners.keys()


def test_subclasses_from_elsewhere_bring_no_code(tmp_path):
    class Mine(DiTModel):
        pass

    Mine(**DIT).save_pretrained(tmp_path, bundle_code=True)
    assert not list(tmp_path.glob("*.py"))


def test_a_model_brings_code_when_asked_to(tmp_path):
    DiTModel(**DIT).save_pretrained(tmp_path / "local")
    assert not list((tmp_path / "local").glob("*.py"))
    DiTModel(**DIT).save_pretrained(tmp_path / "bundled", bundle_code=True)
    assert (tmp_path / "bundled" / "diffusers_dmp.py").read_text() == source_of(DiTModel)


def test_a_pipeline_saves_its_components_as_it_is_told(tmp_path):
    """Diffusers passes on what it finds in the signature of a component's `save_pretrained`."""
    PIPELINES["dit"]().save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    weights = [file.name for file in (tmp_path / "transformer").glob("*.safetensors")]
    assert len(weights) > 1 and all(".fp16-" in name for name in weights)


def make_experts(folder: Path) -> GuidanceExperts:
    make_resnet().save_pretrained(folder / "network")
    return GuidanceExperts.from_base(str(folder / "network"), **PLAIN, image_size=32)


SAVED = {
    "model": (lambda folder: DiTModel(**DIT), DiTModel, "config.json"),
    "pipeline": (lambda folder: PIPELINES["dit"](), DiffusionPipeline, "model_index.json"),
    "experts": (make_experts, GuidanceExperts, "config.json"),
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("version, refused", [("0.1.7", False), ("0.0.9", False), ("0.5.0.dev0", True), ("1.0", True)])
def test_versions(tmp_path, kind, version, refused):
    make, loader, config_name = SAVED[kind]
    make(tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / config_name).read_text())
    assert config[VERSION_KEY] == diffusers_dmp.__version__
    (tmp_path / config_name).write_text(json.dumps(config | {VERSION_KEY: version}))
    if refused:
        with pytest.raises(ImportError, match=f"diffusers_dmp {version} or newer.*got {diffusers_dmp.__version__}"):
            loader.from_pretrained(tmp_path)
    else:
        assert loader.from_pretrained(tmp_path) is not None


def test_pickled_weights_are_read_when_asked_to_only(tmp_path):
    model = randomised(DTRTransformer2DModel(**DIT))
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="weights as safetensors, but got pickled ones.*diffusers-dmp convert"):
        DTRTransformer2DModel.from_pretrained(tmp_path)
    again = DTRTransformer2DModel.from_pretrained(tmp_path, use_safetensors=False)  # by `weights_only=True`
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_a_missing_variant_is_no_pickle(tmp_path):
    DiTModel(**DIT).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="diffusion_pytorch_model.fp16.safetensors"):
        DiTModel.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("bundle_code", [False, True])
def test_the_class_that_is_asked_for(tmp_path, bundle_code):
    """A subclass loads its parent's folder as itself; another pipeline's folder is refused."""

    class Mine(ClassConditionalPipeline):
        pass

    PIPELINES["dit"]().save_pretrained(tmp_path / "one", bundle_code=bundle_code)
    PIPELINES["split"]().save_pretrained(tmp_path / "split", bundle_code=bundle_code)
    assert type(Mine.from_pretrained(tmp_path / "one")) is Mine
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "one")) is ClassConditionalPipeline
    Mine.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "mine", bundle_code=bundle_code)
    assert type(ClassConditionalPipeline.from_pretrained(tmp_path / "mine")) is ClassConditionalPipeline
    with pytest.raises(ValueError, match="of a ClassConditionalPipeline, but got that of a SNRSplitPipeline"):
        ClassConditionalPipeline.from_pretrained(tmp_path / "split")
    assert type(SNRSplitPipeline.from_pretrained(tmp_path / "split")) is SNRSplitPipeline


def test_others_classes_by_the_same_name(tmp_path):
    """A repository that this package did not save is loaded by its own code, if that is trusted."""
    PIPELINES["dit"]().save_pretrained(tmp_path, bundle_code=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index[VERSION_KEY]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_split_pipelines_lists_are_no_components(tmp_path):
    """A download takes every list in `model_index.json` for a component."""
    PIPELINES["split"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "model_index.json").read_text())
    lists = {name for name, value in config.items() if isinstance(value, list) and name != "_class_name"}
    assert all((tmp_path / name).is_dir() for name in lists if config[name] != [None, None])
    assert config["snr_boundaries"] == {"0": 4.0, "1": 0.1}
