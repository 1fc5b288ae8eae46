"""The trainings of the Space's pipelines: what each runs, which other it needs, and how several run at a time."""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from diffusers_dmp.saving.reading import read_json, read_yaml
from diffusers_dmp.saving.whole import write_json
from diffusers_dmp.training.data.shards import remember_settings

sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks`

from benchmarks.scripts import (
    LOCK,
    LOG,
    SECONDS_RECORD,
    TRAINING_CODE,
    counted_seconds,
    last_line,
    run_script,
    seconds_spent,
)
from benchmarks.timing import commit

# smaller than the presets, so that all five together are a quick download
DIT_SIZE = {"num_attention_heads": 3}
FIXED_VARIANCE = {"learn_sigma": False}  # with a learned one, pictures of 25 steps are grainy
# Nearly what uncertainty weighting learns here. The experts of Remix-DiT choose the timesteps, as that would, too.
WEIGHTING = {"weighting": "p2_0.5_0.01"}
NUM_BASES = 3  # of Remix-DiT
NUM_DRAWN = 5000  # images of the unconditional pipeline, from which the experts of PPAP learn
NUM_CHECKPOINTS = 10  # of a training, from which it goes on after an interruption
GPU_WORKERS = 2  # processes that read images, of each training
REPORTED_EVERY = 30.0  # seconds
SETTINGS, RECORD = "run.json", "trained.json"  # in a training's folder
RUN_FILES = (SETTINGS, RECORD, LOG, LOCK, SECONDS_RECORD)
CODE = [*TRAINING_CODE, "spaces/fit_guide.py"]  # of all trainings


@dataclass(frozen=True, kw_only=True)
class Training:
    """
    One run of a training script.

    Args:
        name (`str`): Its name, and that of its folder.
        script (`str`): The script's path.
        options (`dict[str, Any]`): Options that decide what is trained.
        free (`dict[str, Any]`): Options that only decide how, and what is written.
        after (`tuple[str, ...]`): The trainings that must be done first.
    """

    name: str
    script: str
    options: dict[str, Any]
    free: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return what decides what is trained: the options, and the content of their preset, as JSON can store it."""
        if "config" not in self.options:
            return self.options
        preset = read_yaml(self.options["config"])
        content = {f"preset.{name}": value for name, value in preset.items()}
        return self.options | content | {"preset": sorted(preset)}  # the names, too: one may be gone


def plan(data: Path, work: Path, shorter: int = 1) -> dict[str, Training]:
    """
    List the trainings by name; first what others wait for.

    Args:
        data (`Path`): The folder of the training images.
        work (`Path`): The folder of everything that is trained.
        shorter (`int`): Divides the numbers of steps and of drawn images, to try everything quickly.
    """
    base, images = work / "dit/pipeline", {"dataset": str(data)}
    new = DIT_SIZE | FIXED_VARIANCE
    tuned = {"pretrained_model_name_or_path": str(base)} | WEIGHTING | FIXED_VARIANCE

    def training(name: str, system: str, preset: str, steps: int, after: tuple[str, ...] = (), **options) -> Training:
        steps = max(1, steps // shorter)
        fixed = {"config": f"training/presets/{preset}.yaml", **images, "output_dir": str(work / name)}
        free = {
            "resume_from_checkpoint": "latest",
            "checkpointing_steps": max(1, steps // NUM_CHECKPOINTS),
            "logging_steps": 100,
            "report_to": "none",
        }
        return Training(
            name=name,
            script=f"training/train_{system}.py",
            options=fixed | {"max_train_steps": steps} | options,
            free=free,
            after=after,
        )

    patch = {"output_dir": str(work / "patch")} | FIXED_VARIANCE
    trainings = [
        training("dit", "dit", "dit_fashion", 7000, **new, **WEIGHTING),
        training("unconditional", "dit", "dit_fashion_unconditional", 7000, **new),
        training("patch_0", "patch_diffusion", "patch_fashion", 1500, expert=0, **patch),
        training("patch_1", "patch_diffusion", "patch_fashion", 1500, expert=1, **patch),
        training("dtr", "dtr", "dtr_fashion", 7000, **new),
        Training(
            name="guide",
            script="spaces/fit_guide.py",
            options=images | {"output_dir": str(work / "guide"), "max_train_steps": max(1, 1500 // shorter)},
        ),
        training("remix", "remix", "remix_fashion", 1000, ("dit",), **tuned, num_bases=NUM_BASES),
        # with a larger weight of that loss all prompts are used equally, and the figure shows nothing
        training("dmp", "dmp", "dmp_fashion", 1000, ("dit",), **tuned, importance_loss_weight=0.001),
        Training(
            name="drawn",
            script="training/generate_guidance_data.py",
            options={
                "pipeline": str(work / "unconditional/pipeline"),
                "output_dir": str(work / "drawn"),
                "num_images": max(64, NUM_DRAWN // shorter),
            },
            free={"batch_size": 250},
            after=("unconditional",),
        ),
        training(
            "ppap_experts", "ppap", "ppap_fashion_classes", 600, ("guide", "drawn"),
            base_model=str(work / "guide"), dataset=str(work / "drawn"),
        ),
        # trains nothing: puts both together
        training("patch", "patch_diffusion", "patch_fashion", 1500, ("patch_0", "patch_1"), expert="all", **patch),
    ]  # fmt: skip
    return {each.name: each for each in trainings}


def needed(trainings: dict[str, Training], names: "list[str] | tuple[str, ...]") -> dict[str, Training]:
    """Return the trainings with these names, and those that they need, in their order."""
    wanted, left = set(), list(names)
    while left:
        name = left.pop()
        wanted.add(name)
        left += trainings[name].after
    return {name: each for name, each in trainings.items() if name in wanted}


def run_all(trainings: dict[str, Training], work: Path, at_once: int, cores: int, on_gpu: bool) -> None:
    """
    Do the trainings that are not done yet, several at a time; each goes on where it was interrupted.

    Args:
        trainings (`dict[str, Training]`): By name, with all that they need.
        work (`Path`): The folder of their folders.
        at_once (`int`): How many at a time; they share the cores.
        cores (`int`): The number of cores.
        on_gpu (`bool`): Whether they compute on a GPU, and other processes can read the images.

    Raises:
        ValueError: if a folder holds a training with other settings.
        SystemExit: if trainings fail, after those that do not need them are done.
    """
    for each in trainings.values():
        remember_settings(work / each.name / SETTINGS, each.settings(), f"training {each.name}")
    threads = max(1, cores // at_once)
    waiting = {name: each for name, each in trainings.items() if not (work / name / RECORD).exists()}
    running: dict[Future, str] = {}
    failures: dict[str, BaseException] = {}
    with ThreadPoolExecutor(at_once) as pool, _told_to_end():
        while True:
            ready = [
                each for each in waiting.values() if not set(each.after) & {*waiting, *running.values(), *failures}
            ]
            for each in ready[: at_once - len(running)]:
                say(f"{each.name}: begins")
                del waiting[each.name]
                running[pool.submit(_run, each, work / each.name, threads, on_gpu)] = each.name
            if not running:
                break
            ended = wait(running, REPORTED_EVERY, FIRST_COMPLETED).done
            for future in ended:
                name = running.pop(future)
                if future.exception() is None:
                    say(f"{name}: done in {future.result():.0f} s")
                else:
                    failures[name] = future.exception()
                    say(f"{name}: {future.exception()}")
            if not ended:
                for name in running.values():
                    say(f"{name}: {last_line(work / name / LOG)}")
    if failures:
        raise SystemExit(f"Expected all trainings to succeed, but {len(failures)} failed: {', '.join(failures)}.")


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Tell the trainings to end if this process is interrupted, which waits for their last checkpoints."""
    try:
        yield
    except BaseException:
        for training in psutil.Process().children():
            training.terminate()
        raise


def records_of(trainings: dict[str, Training], work: Path) -> dict[str, dict[str, Any]]:
    """Return of each training that is done, by name, how many `seconds` it took, and the `commit` of its code."""
    return {name: read_json(work / name / RECORD) for name in trainings}


def _run(training: Training, folder: Path, threads: int, on_gpu: bool) -> float:
    """Run a training script in a process of its own, and return the seconds that it took, in all its parts."""
    options = training.options | training.free
    if on_gpu and training.free.get("report_to"):  # of those that train on images
        options |= {"dataloader_num_workers": GPU_WORKERS}
    with counted_seconds(folder):
        run_script([training.script, *(f"--{name}={value}" for name, value in options.items())], folder, threads)
    # the variable is for a copy that is no repository
    record = {"seconds": seconds_spent(folder), "commit": os.environ.get("COMMIT") or commit(CODE)}
    write_json(folder / RECORD, record)
    return record["seconds"]


def say(line: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
