"""Importing the package is what makes Diffusers find it, with versions whose loading was tested."""

import subprocess
import sys

import diffusers
import pytest

import diffusers_dmp
from diffusers_dmp.hub.registration import register


def test_every_public_class_is_found_by_both_ways():
    for name in ("DiTModel", "DTRTransformer2DModel", "PromptPatch", "ClassConditionalPipeline"):
        cls = getattr(diffusers_dmp, name)
        assert getattr(diffusers, name) is cls  # a class named without a library
        assert getattr(diffusers.pipelines.diffusers_dmp, name) is cls  # a component's [library, class]
        assert cls.__module__ == "diffusers_dmp"  # what `save_pretrained` writes as the library


def test_an_import_is_cheap():
    """Beside Diffusers' own, which is lazy: classes, and all that they stand on, are imported when they are first used."""
    script = (
        "import sys, diffusers, packaging.version; before = set(sys.modules); import diffusers_dmp; "
        "print(*sorted(set(sys.modules) - before)); diffusers_dmp.NoiseIntervals; assert 'peft' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    added = [name for name in result.stdout.split() if not name.startswith("diffusers_dmp")]
    assert not [name for name in added if not name.startswith("diffusers.pipelines")]


@pytest.mark.parametrize("version", ["0.41.0", "0.43.0", "1.0.0"])
def test_refuses_another_diffusers(monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(ImportError, match=f"0.42.*0.43.*{version}"):
        register(diffusers_dmp, [])
