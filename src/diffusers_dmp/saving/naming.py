"""Names in saved configurations, and this package's classes by name.

A pipeline that is loaded without this package is executed from the code in its repository, once for each component. The
`DiTModel` that a prompt patch knows is then another class than that of the transformer, with the same name.
"""

PACKAGE = "diffusers_dmp"
# entries in configurations
EDGES_KEY = "interval_edges"  # of models and guidance experts
EXPERTS_KEY = "expert_configs"  # of `DenoiserExperts`: the descriptions of its experts


def full_name(cls: type) -> str:
    """Return the name of a class with its module, such as 'diffusers_dmp.DiTModel'."""
    return f"{cls.__module__}.{cls.__qualname__}"


def descends_from(instance: object, name: str) -> bool:
    """
    Tell whether an object is an instance of a class of this package.

    Args:
        instance (`object`): Any object.
        name (`str`): The name of the class, such as 'DiTModel'.
    """
    return any(full_name(cls) == f"{PACKAGE}.{name}" for cls in type(instance).__mro__)
