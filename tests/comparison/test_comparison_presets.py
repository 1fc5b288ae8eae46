"""The files of the comparison say everything once: of two entries of one name, YAML would silently take the last."""

import pytest
import yaml
from benchmarks.comparison.plan import PRESETS, load_plan


def repeated(node: yaml.Node, path: str = "") -> list[str]:
    """Name the keys that a mapping has twice, in all mappings below a node."""
    if isinstance(node, yaml.SequenceNode):
        return [name for item in node.value for name in repeated(item, path)]
    if not isinstance(node, yaml.MappingNode):
        return []
    names = [f"{path}.{key.value}".strip(".") for key, _ in node.value]
    below = [name for (_, value), own in zip(node.value, names) for name in repeated(value, own)]
    return sorted({name for name in names if names.count(name) > 1}) + below


def test_a_repeated_key_is_found():
    assert repeated(yaml.compose("a: {b: 1, c: [{d: 1, d: 2}], b: 3}")) == ["a.b", "a.c.d"]


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_nothing_is_said_twice(path):
    assert repeated(yaml.compose(path.read_text())) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": None}, "to have `seeds`, but it has not"),
        (
            {"number": 5},
            "to have data, num_images, num_inference_steps, output_dir, seeds, settings and readings, but got `number`, too",
        ),
        ({"settings": {"dit": {}}}, "to have `dtr` among its `settings`, for 'dtr', but it has not"),
    ],
)
def test_a_preset_that_lacks_a_part_is_refused_by_name(tmp_path, change, message):
    preset = yaml.safe_load((PRESETS / "gpu.yaml").read_text()) | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in preset.items() if value is not None}))
    with pytest.raises(ValueError, match=f"^Expected {path} {message}"):
        load_plan(str(path))


def test_what_is_compared_is_no_preset(monkeypatch):
    monkeypatch.chdir(PRESETS)
    with pytest.raises(ValueError, match="`preset` to be a YAML file or one of cpu, gpu, but got 'comparisons.yaml'"):
        load_plan("comparisons.yaml")


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_baseline_is_a_measured_run(preset):
    for comparison in load_plan(preset).comparisons:
        names = {comparison.baseline, *comparison.against, *comparison.against.values()}
        assert names <= set(comparison.measured), comparison.name
