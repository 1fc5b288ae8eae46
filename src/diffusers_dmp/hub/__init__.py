"""Folders, publishing on the Hugging Face Hub, and how Diffusers finds this package's classes."""


def __getattr__(name: str):
    if name == "publish":  # imported when it is first used: the package itself imports this one
        from .publishing import publish

        return publish
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
