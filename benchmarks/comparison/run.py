"""One run of a plan: trained by the training script that a user would call, sampled and measured by the package's evaluation."""

from itertools import islice
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.scripts import counted_seconds, run_script, seconds_spent
from benchmarks.timing import hardware
from diffusers_dmp import SNRSplitPipeline
from diffusers_dmp.evaluation.costs import gigaflops_of
from diffusers_dmp.evaluation.npz import NpzImages
from diffusers_dmp.plots import sample_grid
from diffusers_dmp.saving.reading import read_json
from diffusers_dmp.saving.weight_files import folder_sha256
from diffusers_dmp.saving.whole import write_json, written_whole
from diffusers_dmp.training.data.shards import remember_settings

from .checks import BEGUN_RECORD, RUN_RECORD, code_commit
from .losses import measure_losses
from .measure import measure, measure_by_inception
from .plan import Plan, Run
from .sampling import NUM_CLASSES, call, load_pipeline, num_parameters, sample

SUMMARY = "training_summary.json"
GRID, GRID_ROWS = "samples.png", 4
COST_BATCH = 10  # images that are sampled to count operations
TRAINED_RECORD = "trained.json"  # written when the training is complete: how long a step took


def train(plan: Plan, run: Run, num_threads: int) -> None:
    """
    Train, unless that is done; an interrupted training continues from its last checkpoint.

    Args:
        plan ([`Plan`]), run ([`Run`]): What to do.
        num_threads (`int`): Threads of the training.

    Raises:
        RuntimeError: if the training fails.
        ValueError: if the run's folder contains a run with other settings, or what it starts from was trained again.
    """
    remember_settings(plan.folder(run) / RUN_RECORD, plan.settings(run), "run")
    if not is_trained(plan, run):
        _expect_the_same_start(plan, run)
    with counted_seconds(plan.folder(run)):
        _train(plan, run, num_threads)


def perform(plan: Plan, run: Run, num_threads: int) -> dict[str, Any]:
    """
    Train, sample and measure; what is done already is not repeated.

    Args:
        plan ([`Plan`]), run ([`Run`]): What to do.
        num_threads (`int`): Threads of the training.

    Returns:
        The content of the result's file: settings, what it started from, a command for the same training, metrics at each step
        at which there is a pipeline, losses by noise level, number of parameters, floating-point operations per image,
        milliseconds per training step and per image, seconds, hardware, and the commit that it was begun with.

    Raises:
        RuntimeError, ValueError: see [`train`].
    """
    settings = plan.settings(run)
    result = {"comparison": run.comparison, "name": run.name, "seed": run.seed, "settings": settings}
    if run.script:
        train(plan, run, num_threads)
        record = read_json(plan.folder(run) / TRAINED_RECORD)
        result |= {"command": " ".join(plan.command(run, num_threads)), **record}
    if run.measured:
        remember_settings(plan.folder(run) / RUN_RECORD, settings, "run")
        if not run.script:
            _expect_the_same_start(plan, run)
        with counted_seconds(plan.folder(run)):
            result |= _measurement(plan, run)
    return result | {"seconds": round(seconds_spent(plan.folder(run))), **_begun(plan, run)}


def _begun(plan: Plan, run: Run) -> dict[str, Any]:
    """Return of which commit, and from which weights, the work in a run's folder was begun; it may be measured much later."""
    record = plan.folder(run) / BEGUN_RECORD
    if not record.exists():
        write_json(record, {"commit": code_commit(), "started_from": starts(plan, run)})
    return read_json(record)


def _expect_the_same_start(plan: Plan, run: Run) -> None:
    """
    Check that what a run goes on with is what it was begun with.

    Raises:
        ValueError: if it was trained again since.
    """
    before, now = _begun(plan, run)["started_from"], starts(plan, run)
    if now != before:
        changed = sorted(place for place in before | now if before.get(place) != now.get(place))
        raise ValueError(
            f"Expected {plan.folder(run)} to go on with what it was begun with, but {', '.join(changed)} changed since. Delete "
            "the folder; the run is repeated."
        )


def starts(plan: Plan, run: Run) -> dict[str, str]:
    """
    Hash what a run starts from: a table whose results started from two trainings of the same thing says so.

    Args:
        plan ([`Plan`]), run ([`Run`]): Which; the runs before it are trained.

    Returns:
        A hash for each folder with weights that the run names, by its place in the output folder. For images, it is that of what
        sampled them.
    """
    named = [run.base, run.guide, *run.parts, *run.arguments.values()]
    folders = [plan.place(run, name) for name in named if isinstance(name, str) and name.startswith("{")]
    with_weights = [folder for folder in folders if any(folder.rglob("*.safetensors"))]
    found = {folder.relative_to(plan.output_dir).as_posix(): folder_sha256(folder) for folder in with_weights}
    for sampled in (needed for needed in plan.before(run) if plan.folder(needed) in folders):
        found |= starts(plan, sampled)
    return found


def _measurement(plan: Plan, run: Run) -> dict[str, Any]:
    """Sample with each pipeline of a run, and measure the images and the last pipeline."""
    folder = plan.folder(run)
    points = []
    for step, source in _pipelines(plan, run).items():
        images, milliseconds_per_image = sample(plan, run, source, folder / "samples" / str(step))
        metrics, fingerprint = measure(plan, run.data, images)
        points.append({"step": step, **metrics})
    by_inception, inception_fingerprint = measure_by_inception(plan, run.data, images)
    points[-1] |= by_inception
    write_grid(images, folder / GRID)
    labels = [index % NUM_CLASSES for index in range(COST_BATCH)]
    pipeline = load_pipeline(plan, run, source, labels)
    return {
        "points": points,
        "fingerprint": fingerprint,  # of the last point
        **inception_fingerprint,
        "losses": None if run.guide else measure_losses(plan, run, pipeline),
        "parameters": num_parameters(pipeline),
        "gigaflops_per_image": round(gigaflops_of(lambda: call(plan, run, pipeline, labels)) / COST_BATCH, 5),
        "milliseconds_per_image": milliseconds_per_image,
        "hardware": hardware(pipeline.device),
    }


def write_grid(images: Path, path: Path) -> None:
    """Write the first images of an `.npz` file side by side, one column per class."""
    (first,) = islice(NpzImages(images).batches(GRID_ROWS * NUM_CLASSES), 1)
    grey = [Image.fromarray(image).convert("L") for image in first]
    with written_whole(path) as unfinished:
        sample_grid([grey[label::NUM_CLASSES] for label in range(NUM_CLASSES)]).save(unfinished, "png", optimize=True)


def is_trained(plan: Plan, run: Run) -> bool:
    """Return whether the run's training is complete, so that other runs can use its pipeline or images."""
    return not run.script or (plan.folder(run) / TRAINED_RECORD).exists()


def _train(plan: Plan, run: Run, num_threads: int) -> None:
    """Train, unless that is done, and record how long a step took."""
    if is_trained(plan, run):
        return
    folder = plan.folder(run)
    run_script(plan.script(run), folder, num_threads)
    milliseconds = None
    if (folder / SUMMARY).exists():  # a script that only samples images writes none
        training = read_json(folder / SUMMARY)
        if training["steps"]:
            milliseconds = round(1000 * training["train_seconds"] / training["steps"], 1)
    write_json(folder / TRAINED_RECORD, {"milliseconds_per_step": milliseconds})


def _pipelines(plan: Plan, run: Run) -> dict[int, Path]:
    """Return the folders of a run's pipelines by training step, which of several denoisers counts the steps of all."""
    folder, last = plan.folder(run), run.arguments.get("max_train_steps", 0)
    if run.base:
        return {last: plan.place(run, run.base)}
    if run.parts:
        parts = [DiffusionPipeline.from_pretrained(plan.place(run, part)) for part in run.parts]
        SNRSplitPipeline.from_pipelines(parts, run.boundaries).save_pretrained(folder / "pipeline")
        return {last: folder / "pipeline"}
    every = run.arguments["pipeline_steps"]
    if every:
        return {step: folder / f"pipeline-{step}" for step in range(every, last + 1, every)}
    return {last * run.arguments.get("num_experts", 1): folder / "pipeline"}
