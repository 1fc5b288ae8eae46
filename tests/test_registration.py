"""Importing the package is what makes Diffusers find it, with versions whose loading was tested."""

import diffusers
import pytest

import diffusers_dmp
from diffusers_dmp.registration import register


def test_every_public_class_is_found_by_both_ways():
    for name in ("DiTModel", "DTRTransformer2DModel", "ClassConditionalPipeline"):
        cls = getattr(diffusers_dmp, name)
        assert getattr(diffusers, name) is cls  # a class named without a library
        assert getattr(diffusers.pipelines.diffusers_dmp, name) is cls  # a component's [library, class]
        assert cls.__module__ == "diffusers_dmp"  # what `save_pretrained` writes as the library


@pytest.mark.parametrize("version", ["0.41.0", "0.43.0", "1.0.0"])
def test_refuses_another_diffusers(monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(ImportError, match=f"0.42.*0.43.*{version}"):
        register(diffusers_dmp, [])
