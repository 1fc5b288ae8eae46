"""Classes by name.

A pipeline that is loaded without this package brings its code along, which Diffusers executes anew for each component: a
patch then has another `DiTModel` in mind than the transformer is one of, under the same name.
"""

PACKAGE = "diffusers_dmp"


def full_name(cls: type) -> str:
    """Such as 'diffusers_dmp.DiTModel'."""
    return f"{cls.__module__}.{cls.__qualname__}"


def descends_from(instance: object, name: str) -> bool:
    """Whether a class of this package by that name is the instance's, or among those that its class descends from."""
    return any(full_name(cls) == f"{PACKAGE}.{name}" for cls in type(instance).__mro__)
