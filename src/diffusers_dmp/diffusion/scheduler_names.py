"""The schedulers that the command line and the Space offer, by their short names; read at once, without Diffusers."""

SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
}


def scheduler_class(name: str) -> str:
    """
    The class of Diffusers that a name stands for.

    Args:
        name (`str`): A key of `SCHEDULERS` in any case, or the name of the class itself.

    Raises:
        ValueError: if it is none of them.
    """
    classes = {short.lower(): class_name for short, class_name in SCHEDULERS.items()}
    classes |= {class_name.lower(): class_name for class_name in SCHEDULERS.values()}
    if name.lower() not in classes:
        raise ValueError(f"Expected `scheduler` to be one of {', '.join(SCHEDULERS)}, but got {name!r}.")
    return classes[name.lower()]
