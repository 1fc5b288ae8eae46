"""Folders, publishing on the Hugging Face Hub, and how Diffusers finds this package's classes."""

from typing import TYPE_CHECKING

from ..saving.moved import old_names

if TYPE_CHECKING:
    from .publishing import publish as publish


def __getattr__(name: str):
    if name == "publish":  # imported when it is first used: the package itself imports this one
        from .publishing import publish

        return publish
    return old_names(__name__)(name)
