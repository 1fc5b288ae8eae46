"""Old import paths work for one more minor version, with a FutureWarning."""

import importlib
import subprocess
import sys

import pytest
from packaging.version import Version

import diffusers_dmp
from diffusers_dmp.saving import moved
from diffusers_dmp.saving.moved import MOVED, REMOVED_IN


@pytest.mark.parametrize("old", MOVED)
def test_every_old_module_is_there(old):
    targets = (MOVED[old],) if isinstance(MOVED[old], str) else MOVED[old]
    importlib.import_module(f"diffusers_dmp.{old}")
    for target in targets:
        importlib.import_module(f"diffusers_dmp.{target}")


@pytest.mark.parametrize(
    "old, name, new",
    [
        ("patches", "PromptPatch", "plugins"),
        ("patches.prompts", "PromptPatch", "plugins.prompts"),
        ("training.data", "load_images", "training.data.images"),
        ("models.dit_layers", "DiTBlock", "models.dit.layers"),
        ("training.dit", "load_training_data", "training.data.training_data"),
        ("training.objective", "VARIANCE_TYPES", "diffusion.variance"),
        ("hub", "Publication", "hub.publishing"),
        ("registration", "register", "hub.registration"),
    ],
)
def test_old_imports(old, name, new):
    expected = getattr(importlib.import_module(f"diffusers_dmp.{new}"), name)
    scope = {}
    message = (
        f"`diffusers_dmp.{old}.{name}` is now `diffusers_dmp.{new}.{name}`; the old path works until {REMOVED_IN}"
    )
    with pytest.warns(FutureWarning, match=message.replace(".", r"\.")) as warnings:
        exec(f"from diffusers_dmp.{old} import {name}", scope)
    assert scope[name] is expected
    assert {warning.filename for warning in warnings} <= {
        "<string>",
        moved.__file__.replace("saving/moved", "hub/__init__"),
    }


def test_a_name_that_is_another_now(monkeypatch):
    monkeypatch.setitem(moved.MOVED_NAMES, ("vae", "downsampling"), ("diffusion.latents", "vae_downsampling"))
    with pytest.warns(FutureWarning, match="`diffusers_dmp.diffusion.latents.vae_downsampling`"):
        from diffusers_dmp.vae import downsampling
    from diffusers_dmp.diffusion.latents import vae_downsampling

    assert downsampling is vae_downsampling


def test_the_table_of_masks_left_its_name_to_the_plugin():
    with pytest.warns(FutureWarning, match="`diffusers_dmp.models.channel_routing.ChannelRouting`"):
        from diffusers_dmp.models import TaskRouting
    assert TaskRouting is diffusers_dmp.models.ChannelRouting is not diffusers_dmp.TaskRouting


def test_what_was_never_there():
    with pytest.raises(ModuleNotFoundError, match="diffusers_dmp.nothing"):
        importlib.import_module("diffusers_dmp.nothing")
    with pytest.raises(ImportError, match="nothing"):
        exec("from diffusers_dmp.vae import nothing")
    with pytest.raises(ImportError, match="nothing"):
        exec("from diffusers_dmp.training.data import nothing")


def test_new_paths_do_not_warn():
    """Neither those of packages that have the name of an old module."""
    script = (
        "import diffusers_dmp; from diffusers_dmp.hub import publish; from diffusers_dmp import DiTModel, PromptPatch; "
        "from diffusers_dmp.training.data.images import load_images; from diffusers_dmp.models.dit.model import DiTModel"
    )
    subprocess.run(
        [sys.executable, "-W", "error::FutureWarning:diffusers_dmp", "-W", "error:`diffusers_dmp", "-c", script],
        check=True,
    )


def test_old_paths_are_removed_in_the_next_minor_version():
    """This test fails then, and both go."""
    assert Version(diffusers_dmp.__version__) < Version(REMOVED_IN)  # as what is developed towards it is, 0.4.0.dev0


def test_old_modules_as_attributes():
    from diffusers_dmp.plugins import PromptPatch

    with pytest.warns(FutureWarning, match="`diffusers_dmp.plugins.PromptPatch`"):
        assert diffusers_dmp.patches.PromptPatch is PromptPatch
