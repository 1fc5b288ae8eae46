"""Where the training scripts and their presets are: `training/` in a checkout, `entry_points/` in an installation (setup.py)."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
SCRIPTS = next(folder for folder in (_PACKAGE / "entry_points", _PACKAGE.parents[1] / "training") if folder.is_dir())
PRESETS = SCRIPTS / "presets"
ACCELERATE_CONFIGS = SCRIPTS / "accelerate"  # for `accelerate launch --config_file`
SUFFIX = ".yaml"


def script_path(name: str) -> Path:
    """The file of a script, such as 'train_dit'."""
    return SCRIPTS / f"{name}.py"


def preset_names() -> list[str]:
    """The names of the presets that come with the package, sorted."""
    return sorted(path.stem for path in PRESETS.glob(f"*{SUFFIX}"))


def find_preset(name_or_path: str) -> Path:
    """
    Find a preset: a YAML file, or else one of the presets that come with the package.

    Args:
        name_or_path (`str`): A file, or a preset's name with or without `.yaml`.

    Raises:
        ValueError: if there is neither; for a bare name the message lists the presets.
    """
    shipped = PRESETS / f"{name_or_path.removesuffix(SUFFIX)}{SUFFIX}"
    found = next((path for path in (Path(name_or_path), shipped) if path.is_file()), None)
    if found is None and (name_or_path.endswith(SUFFIX) or Path(name_or_path).name != name_or_path):
        raise ValueError(
            f"Expected `config` to be a YAML file, or the name of a preset, but got {name_or_path!r}: there is no such file."
        )
    if found is None:
        raise ValueError(
            f"Expected `config` to be a YAML file, or one of {', '.join(preset_names())}, but got {name_or_path!r}."
        )
    return found
