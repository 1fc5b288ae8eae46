"""Importing the package makes Diffusers find its classes, adds to Diffusers only, and imports nothing else."""

import os
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


ORDERS = """
import importlib, importlib.util, sys
import diffusers_dmp
assert importlib.util.find_spec("diffusers").loader.get_source("diffusers")
assert "diffusers" not in sys.modules  # a search imports nothing, and does not keep the import from being noticed
import diffusers
assert "diffusers.pipelines" not in sys.modules
assert type(diffusers.__spec__.loader).__name__ == "SourceFileLoader"  # as without this package
assert vars(diffusers)["__getattr__"]
importlib.reload(diffusers)
assert vars(sys.modules["diffusers"])["__getattr__"]
importlib.reload(diffusers_dmp)  # a second finder that asks the others
assert diffusers.pipelines.diffusers_dmp is diffusers_dmp
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
assert "_dict_from_json_file" in vars(DiffusionPipeline)
import diffusers
assert diffusers.DiTModel is diffusers_dmp.DiTModel
"""


def test_the_order_of_imports_does_not_matter():
    """Modules of Diffusers may be imported later, and again; the test above imports them first."""
    subprocess.run([sys.executable, "-c", ORDERS], check=True)


IN_THREADS = """
import importlib, sys, time
from concurrent.futures import ThreadPoolExecutor
import diffusers_dmp

class Slow:  # time for all threads to come while the first one imports
    def find_spec(self, name, *args):
        if name == "diffusers.utils":
            time.sleep(0.3)

def use(name):
    import diffusers
    return getattr(diffusers, name).__name__

sys.meta_path.insert(0, Slow())
names = ["DiTModel", "DDIMScheduler"] * 2
with ThreadPoolExecutor(4) as threads:
    assert [*threads.map(use, names)] == names
"""


def test_threads_may_import_diffusers_at_once():
    """Those that wait for the first one get the module that Diffusers replaces while it is imported."""
    subprocess.run([sys.executable, "-c", IN_THREADS], check=True)


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


def import_beside(version, folder, script="import diffusers_dmp"):
    """Import the package where the installed Diffusers says that it has some version."""
    installed = folder / f"diffusers-{version}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: diffusers\nVersion: {version}\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


def test_the_import_of_the_package_refuses_an_old_diffusers(tmp_path):
    """And not a later one of Diffusers, which other packages use without this one."""
    result = import_beside("0.27.2", tmp_path)
    assert result.stderr.splitlines()[-1].startswith("ImportError: Expected diffusers >= 0.40, but got 0.27.2")


def test_the_warning_names_the_line_that_imports_the_package(tmp_path):
    (tmp_path / "uses.py").write_text("\nimport diffusers_dmp\n")
    result = import_beside("0.50.1", tmp_path, "import uses")
    assert result.returncode == 0
    assert "uses.py:2: UserWarning: Expected diffusers 0.40 to 0.42" in result.stderr
