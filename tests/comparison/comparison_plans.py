"""The comparison at four steps, for the tests of its parts."""

from pathlib import Path
from typing import Any

import yaml
from benchmarks.comparison.plan import Plan, load_plan
from conftest import FIXTURES


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
