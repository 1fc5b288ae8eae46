"""Read the results of a comparison: what is half-written, or not a result, is refused by the name of its file."""

from numbers import Real
from pathlib import Path
from typing import Any

from diffusers_dmp.saving.reading import parsed_json

BOUNDS = "bounds"  # the folder of the metrics of real images and of noise
METRICS = ("FID", "KID", "precision", "recall", "recognised")
# where Inception's weights were at hand
BY_INCEPTION, INCEPTION_FINGERPRINT = "FID_inception", "inception_fingerprint"
OF_EVERY_RUN = ("comparison", "name", "seed", "settings", "seconds", "commit")
OF_MEASURED_RUNS = (
    *("points", "fingerprint", "losses", "parameters", "gigaflops_per_image", "milliseconds_per_image", "hardware"),
)
OF_BOUNDS = ("real", "noise", "accuracy", "settings", "number", "commit")


def read_result(path: Path, measured: bool = False) -> dict[str, Any]:
    """
    Read the result of a run, `<comparison>/<name>-<seed>.json`.

    Args:
        path (`Path`): The file.
        measured (`bool`): Whether the run's images are measured: then there must be metrics. Where there are any, they must
            be complete in any case.

    Returns:
        The file's content, as `run.perform` makes it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not JSON, or lacks a part, or is the result of another run than its name says.
    """
    result = _read(path, OF_EVERY_RUN)
    key, name = f"{result['comparison']}/{result['name']}-{result['seed']}", f"{path.parent.name}/{path.stem}"
    if key != name:
        raise _refused(path, f"that of {key}")
    if measured or "points" in result:
        _expect(path, result, OF_MEASURED_RUNS)
        if not isinstance(result["points"], list) or not result["points"]:
            raise _refused(path, "no list of points")
        for point in result["points"]:
            _expect_metrics(path, point, ("step", *METRICS))
    return result


def read_bounds(path: Path) -> dict[str, Any]:
    """
    Read the metrics of real images and of noise, `bounds/<data set>.json`.

    Args:
        path (`Path`): The file.

    Returns:
        The file's content, as `measure.measure_bounds` makes it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not JSON, or lacks a part.
    """
    bounds = _read(path, OF_BOUNDS)
    for name in ("real", "noise"):
        _expect_metrics(path, bounds[name], (*METRICS, "fingerprint"))
    _expect(path, bounds["accuracy"], ("extractor", "judge"))
    return bounds


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object that must have these entries."""
    try:
        content = parsed_json(path)
    except ValueError as error:
        raise _refused(path, "what is not JSON, or only a part of it") from error
    _expect(path, content, names)
    return content


def _expect(path: Path, content: Any, names: tuple[str, ...]) -> None:
    """Check that there is an object with these entries."""
    if not isinstance(content, dict):
        raise _refused(path, f"{type(content).__name__} in the place of an object")
    missing = [name for name in names if name not in content]
    if missing:
        raise _refused(path, f"one without {', '.join(missing)}")


def _expect_metrics(path: Path, content: Any, names: tuple[str, ...]) -> None:
    """Check that there is an object with these entries, in which metrics are numbers; images without labels have no classes."""
    _expect(path, content, names)
    for metric in METRICS:
        if not isinstance(content[metric], Real) and not (metric == "recognised" and content[metric] is None):
            raise _refused(path, f"one whose {metric} is {content[metric]!r}")


def _refused(path: Path, got: str) -> ValueError:
    return ValueError(
        f"Expected {str(path)!r} to be a complete result, but got {got}; delete it, and the run is repeated."
    )
