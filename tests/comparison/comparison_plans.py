"""The comparison's plans as tests read them: at four steps, and with the arguments that its scripts parse."""

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from benchmarks.comparison.plan import Plan, Run, load_plan
from conftest import FIXTURES

from diffusers_dmp.training.parsing import parse_arguments

ARGUMENTS = {
    "train_dit.py": "DiTExpertTrainingArguments",
    "generate_guidance_data.py": "GenerationArguments",
    "train_dtr.py": "DTRTrainingArguments",
    "train_remix.py": "RemixTrainingArguments",
    "train_dmp.py": "DMPTrainingArguments",
    "train_patch_diffusion.py": "PatchDiffusionTrainingArguments",
    "train_ppap.py": "PPAPTrainingArguments",
    "train_text_to_image.py": "TextToImageArguments",
}


def arguments_of(plan: Plan, run: Run) -> Any:
    """The arguments of a run's script, as the script parses them; for a test that is `in_the_repository`."""
    module = importlib.import_module(run.script.removesuffix(".py"))
    with patch("diffusers_dmp.saving.sources.is_local", return_value=False):  # the folders of data are not made yet
        return parse_arguments(getattr(module, ARGUMENTS[run.script]), plan.script(run)[1:])


def write_preset(folder: Path, seeds: tuple[int, ...] = (0,), **groups: dict[str, Any]) -> Path:
    """Write the preset `tiny.yaml`, which works in `folder`; `groups` are added to its settings of these names."""
    content = yaml.safe_load((FIXTURES / "comparison.yaml").read_text())
    settings = content["settings"] | {name: content["settings"][name] | own for name, own in groups.items()}
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(content | {"output_dir": str(folder / "outputs"), "seeds": list(seeds), "settings": settings})
    )
    return path


def tiny_plan(folder: Path, seeds: tuple[int, ...] = (0,), **groups: dict[str, Any]) -> Plan:
    """Load it."""
    return load_plan(str(write_preset(folder, seeds, **groups)))
