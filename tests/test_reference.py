"""The API reference has every public name."""

import re

from conftest import REPOSITORY

import diffusers_dmp
from diffusers_dmp import plots

PAGES = REPOSITORY / "docs" / "reference"


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in sorted(PAGES.glob("*.md")))
    documented = re.findall(r"^::: diffusers_dmp\.(\S+)", text, re.M)
    assert len(documented) == len(set(documented))
    public = [name for name in diffusers_dmp.__all__ if not hasattr(getattr(diffusers_dmp, name), "__path__")]
    public += [f"plots.{name}" for name in plots.__all__]
    assert {"NoiseIntervals", "publish", "plots.routing_figure"} <= set(public)
    assert set(public) - {"intervals"} <= set(documented)
