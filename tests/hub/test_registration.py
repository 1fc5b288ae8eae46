"""Importing the package makes Diffusers find its classes, adds to Diffusers only, and imports nothing else."""

import subprocess
import sys

import diffusers
import pytest

import diffusers_dmp
from diffusers_dmp.hub.registration import _lookup, check_diffusers_version


def test_every_public_class_is_found_by_both_ways():
    for name in ("DiTModel", "DTRTransformer2DModel", "PromptPatch", "ClassConditionalPipeline"):
        cls = getattr(diffusers_dmp, name)
        assert getattr(diffusers, name) is cls  # a class named without a library
        assert getattr(diffusers.pipelines.diffusers_dmp, name) is cls  # a component's [library, class]
        assert cls.__module__ == "diffusers_dmp"  # what `save_pretrained` writes as the library


def test_an_import_is_cheap():
    """It imports nothing else but Diffusers' lazy modules; classes, and what they need, are imported when they are first used."""
    script = (
        "import sys, diffusers, packaging.version; before = set(sys.modules); import diffusers_dmp; "
        "print(*sorted(set(sys.modules) - before)); diffusers_dmp.NoiseIntervals; assert 'peft' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    added = [name for name in result.stdout.split() if not name.startswith("diffusers_dmp")]
    assert not [name for name in added if not name.startswith("diffusers.pipelines")]


SHOW_ADDED = """
import sys, diffusers, diffusers.pipelines, diffusers.pipelines.pipeline_utils

def attributes():
    modules = {name: vars(module) for name, module in list(sys.modules.items()) if name.split(".")[0] == "diffusers"}
    classes = {f"{name}.{key}": vars(value) for name, module in modules.items() for key, value in list(module.items())
               if isinstance(value, type) and value.__module__ == name}
    return {f"{owner} {key}": value for owner, names in (modules | classes).items() for key, value in list(names.items())}

kept = type(diffusers)
before = attributes()
import diffusers_dmp
after = attributes()
assert type(diffusers) is kept
assert not [name for name in before if after[name] is not before[name]]
print(*sorted(after.keys() - before.keys()), sep=", ")
"""


def test_diffusers_is_added_to_only():
    """No attribute of its modules and classes is replaced."""
    result = subprocess.run([sys.executable, "-c", SHOW_ADDED], capture_output=True, text=True, check=True)
    assert result.stdout.strip().split(", ") == [
        "diffusers __getattr__",
        "diffusers.pipelines diffusers_dmp",
        "diffusers.pipelines.pipeline_utils.DiffusionPipeline _dict_from_json_file",
    ]


def test_diffusers_pipelines_may_be_imported_later():
    """The test above imports them first."""
    script = (
        "import sys, diffusers_dmp; from diffusers.pipelines.pipeline_utils import DiffusionPipeline; "
        "assert '_dict_from_json_file' in vars(DiffusionPipeline); "
        "assert not [finder for finder in sys.meta_path if type(finder).__module__ == 'diffusers_dmp.hub.registration']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_names_of_others(monkeypatch):
    """Diffusers' own names come first, and those that another package added are still found."""
    assert diffusers.DDIMScheduler.__module__.startswith("diffusers.")
    with pytest.raises(AttributeError, match="Unknown"):
        _ = diffusers.Unknown
    monkeypatch.setattr(diffusers, "__getattr__", {"Other": 1}.__getitem__)
    lookup = _lookup(diffusers_dmp, {"DiTModel"}, vars(diffusers)["__getattr__"])
    assert (lookup("Other"), lookup("DiTModel")) == (1, diffusers_dmp.DiTModel)


@pytest.mark.parametrize("version", ["0.39.0", "0.27.2"])
def test_refuses_an_old_diffusers(version):
    with pytest.raises(ImportError, match=f"diffusers >= 0.40, but got {version}"):
        check_diffusers_version(version)


@pytest.mark.parametrize("version", ["0.43.0", "0.50.1", "1.0.0", "0.43.0.dev0"])
def test_warns_about_a_diffusers_that_nobody_tested(version):
    with pytest.warns(UserWarning, match=f"0.40 to 0.42, .* but got {version}"):
        check_diffusers_version(version)


@pytest.mark.parametrize("version", ["0.40.0", "0.41.0", "0.42.1"])
def test_is_silent_about_a_tested_diffusers(version, recwarn):
    check_diffusers_version(version)
    assert not recwarn
