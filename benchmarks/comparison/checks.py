"""What must hold before anything is trained: the results in one place are of one preset, one extractor and one commit."""

import filecmp
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.scripts import TRAINING_CODE
from benchmarks.timing import commit
from diffusers_dmp.evaluation.features import FeatureExtractor
from diffusers_dmp.saving.reading import read_json

from .data import EXTRACTOR, EXTRACTORS, JUDGE, RECORD
from .plan import Plan
from .results import BOUNDS, INCEPTION_FINGERPRINT, read_bounds, read_result

# What the figures depend on; a changed preset is noticed by its settings.
CODE = [
    *TRAINING_CODE,
    *(f"benchmarks/comparison/{name}.py" for name in ("data", "losses", "measure", "plan", "run", "sampling", "text")),
]
SHORT = 12  # characters of a hash
MOVE_AWAY = "Move it away, or write to another place with `--results`."
BRING_BACK = "Bring it back, or move the results away."
RUN_RECORD = "run.json"  # the settings of what is in a run's folder
BEGUN_RECORD = "begun.json"  # of which commit, and from which weights, that was begun


def code_commit() -> str:
    """
    Name the last commit that changed the code of the comparison, with '-dirty' if files of it were changed since.

    Results and pages may be committed while the comparison goes on. Outside of a repository it is 'unknown', always equal.
    """
    return commit(CODE)


def stored_results(plan: Plan, results: Path) -> dict[Path, dict[str, Any]]:
    """
    Read the results of a plan's runs, and of its bounds, by their files.

    Args:
        plan ([`Plan`]): All runs.
        results (`Path`): The folder of the plan's results.

    Raises:
        ValueError: if a file is half-written, or of a run with other settings.
    """
    stored = {}
    for name, settings in plan.data.items():
        path = results / BOUNDS / f"{name}.json"
        if path.exists():
            stored[path] = read_bounds(path)
            _expect_settings(path, stored[path]["settings"], settings)
    for run in plan.runs:
        path = results / f"{run.key}.json"
        if path.exists():
            stored[path] = read_result(path, run.measured)
            _expect_settings(path, stored[path]["settings"], plan.settings(run))
    return stored


def begun_work(plan: Plan) -> dict[Path, dict[str, Any]]:
    """
    Read how the work in the runs' folders was begun, by folder.

    Args:
        plan ([`Plan`]): All runs.

    Raises:
        ValueError: if a folder contains a run with other settings; others may be about to start from it.
    """
    begun = {}
    for run in plan.runs:
        folder = plan.folder(run)
        if (folder / RUN_RECORD).exists():
            _expect_settings(
                folder, read_json(folder / RUN_RECORD), plan.settings(run), "Delete it; the run is repeated."
            )
        if (folder / BEGUN_RECORD).exists():
            begun[folder] = read_json(folder / BEGUN_RECORD)
    return begun


def _expect_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any], what_to_do: str = MOVE_AWAY) -> None:
    """Check that a result, or what is in a run's folder, is of these settings; the error names what differs."""
    differences = list(_differences(found, wanted))
    if differences:
        more = " …" if len(differences) > 3 else ""
        raise ValueError(
            f"Expected {path} to be a result of these settings, but it has {'; '.join(differences[:3])}{more}. {what_to_do}"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Name what differs between settings, such as 'arguments.max_train_steps 4 instead of 2000'."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}".strip("."))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (one, other) in enumerate(zip(found, wanted)):
            yield from _differences(one, other, f"{name}[{index}]")
    elif found != wanted:
        yield f"`{name}` {found!r} instead of {wanted!r}"


def expect_commits(stored: dict[Path, dict[str, Any]], accepted: Sequence[str]) -> None:
    """
    Check that results are of this commit: its figures are compared with those that are about to be measured.

    Args:
        stored (`dict[Path, dict]`): As [`stored_results`] and [`begun_work`] return it.
        accepted (`Sequence[str]`): Other commits that a user says to be equal in what the figures depend on.

    Raises:
        ValueError: if a result is of another commit.
    """
    known = {code_commit(), *accepted}
    others = {path: result["commit"] for path, result in stored.items() if result["commit"] not in known}
    if others:
        first, names = next(iter(others)), " ".join(sorted(set(others.values())))
        all_names = " ".join(sorted({*accepted, *others.values()}))
        more = f" and {len(others) - 1} more of {names}" if len(others) > 1 else ""
        raise ValueError(
            f"Expected all results to be of the commit {code_commit()}, but {first} is of {others[first]}{more}. Move "
            f"{'them' if more else 'it'} away, and the folders of these runs, or if nothing that the figures depend on has "
            f"changed since, add `--accept_commits {all_names}`."
        )


def expect_extractor(plan: Plan, stored: dict[Path, dict[str, Any]], results: Path) -> None:
    """
    Check that results were measured with the extractors that others are about to be measured with.

    Args:
        plan ([`Plan`]): For the data sets.
        stored (`dict[Path, dict]`): As [`stored_results`] returns it.
        results (`Path`): The folder of all presets' results, which holds the extractors.

    Raises:
        ValueError: if the extractor has another hash than the one that measured, or is missing.
    """
    for name in plan.data:
        kept, copy = results / EXTRACTORS / name, plan.data_folder(name)
        folders = [kept, copy] if (copy / RECORD).exists() else [kept]  # an unfinished copy is made again
        networks = [folder / EXTRACTOR for folder in folders if (folder / EXTRACTOR).exists()]
        hashes = {network: FeatureExtractor(network).sha256 for network in networks}
        keys = {run.key for run in plan.runs if run.data == name} | {f"{BOUNDS}/{name}"}
        for path, result in stored.items():
            if f"{path.parent.name}/{path.stem}" in keys:
                _expect_measured_with(path, _fingerprint(result, "fingerprint"), hashes, kept / EXTRACTOR)
        judges = [folder / JUDGE for folder in folders if (folder / JUDGE).exists()]
        same_judge = len(judges) < 2 or filecmp.cmp(*judges, shallow=False)
        if len(set(hashes.values())) > 1 or not same_judge:
            raise ValueError(
                f"Expected {copy} to have copies of the networks that {kept} has, but got others. Delete {copy}; it is made "
                "again."
            )


def expect_inception(plan: Plan, stored: dict[Path, dict[str, Any]]) -> None:
    """
    Check that FID by Inception can be measured as in the results that there are, and load its weights before they are needed.

    Args:
        plan ([`Plan`]): For the extractor and the number of images.
        stored (`dict[Path, dict]`): As [`stored_results`] returns it.

    Raises:
        ValueError: if there are no such weights, or others than those that measured results, or fewer images than features.
    """
    if not plan.inception:
        return
    extractor = FeatureExtractor(plan.inception)
    for path, result in stored.items():
        _expect_network(path, _fingerprint(result, INCEPTION_FINGERPRINT), {Path(plan.inception): extractor.sha256})
    dim = extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).pooled.shape[1]
    if plan.num_images <= dim:
        raise ValueError(
            f"Expected a preset that samples more than {dim} images, as many as the network of `--inception` has features, but "
            f"{plan.name!r} samples {plan.num_images}."
        )


def _fingerprint(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a fingerprint of a run's result or of bounds; None if its images are not measured."""
    return result.get("real", result).get(name)


def _expect_measured_with(path: Path, fingerprint: dict[str, Any] | None, hashes: dict[Path, str], kept: Path) -> None:
    """Check that a result was measured with the network of these folders, of which there must be one."""
    if fingerprint and not hashes:
        used = fingerprint["extractor_sha256"]
        raise ValueError(
            f"Expected {kept} to be the extractor that {path} was measured with ({used[:SHORT]}…), but there is none. {BRING_BACK}"
        )
    _expect_network(path, fingerprint, hashes)


def _expect_network(path: Path, fingerprint: dict[str, Any] | None, hashes: dict[Path, str]) -> None:
    """Check that a result was measured with the network of these files or folders."""
    used = fingerprint and fingerprint["extractor_sha256"]
    for network, own in hashes.items():
        if used and own != used:
            raise ValueError(
                f"Expected {network} to be the extractor that {path} was measured with ({used[:SHORT]}…), but got another "
                f"({own[:SHORT]}…). {BRING_BACK}"
            )
