"""The plan of the comparison: which runs there are, read from `comparisons.yaml` and from a preset."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffusers_dmp.saving.reading import read_yaml

PRESETS = Path(__file__).parent
COMPARISONS = PRESETS / "comparisons.yaml"
# arguments of a script that do not change what it trains
FREE = (
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "resume_from_checkpoint", "logging_steps"),
    "dataloader_num_workers",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    One training with one seed, and the measurement of its images.

    In strings, the placeholders `{outputs}`, `{data}` and `{seed}` are replaced by the output folder, the data set's folder and
    the seed.

    Args:
        comparison, name (`str`), seed (`int`): The identity of the run.
        title (`str`): Title of the table's row.
        data (`str`): The data set that it is trained on and measured against.
        script (`str`): The script in `training/`; empty if nothing is trained.
        arguments (`dict[str, Any]`): The arguments of the script.
        after (`list[str]`): `comparison/name` of the runs that must be done first, with the same seed, or with their only one.
        base (`str`): Folder of the pipeline that samples, if the run does not train it.
        parts (`list[str]`): Or the folders of pipelines whose denoisers sample together, that for the least noise first.
        boundaries (`list[float]`): The signal-to-noise ratios between the parts.
        guide (`str`): Folder of the classifier, or of the experts, that guides sampling; empty for nothing.
        sampling (`dict[str, Any]`): Fields of [`SamplingArguments`] that are not the plan's, and the `scale` of a guide.
        measured (`bool`): False for a run whose output is only used by other runs.
    """

    comparison: str
    name: str
    seed: int
    title: str
    data: str
    script: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    base: str = ""
    parts: list[str] = field(default_factory=list)
    boundaries: list[float] = field(default_factory=list)
    guide: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    measured: bool = True

    @property
    def uses_others(self) -> bool:
        """Whether pipelines or experts of other runs sample its images."""
        return bool(self.base or self.parts or self.guide)

    @property
    def key(self) -> str:
        """The name of the result's file, without its suffix."""
        return f"{self.comparison}/{self.name}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    A table of runs that differ in one thing.

    Args:
        name, title, text, data (`str`): From `comparisons.yaml`.
        reading (`str`): What the figures say, and why; from the preset.
        baseline (`str`): Name of the run that the others are compared with,
        against (`dict[str, str]`): unless another is named here, by their names.
        runs (`list[Run]`): The runs, with every seed.
    """

    name: str
    title: str
    text: str
    data: str
    baseline: str
    runs: list[Run]
    against: dict[str, str] = field(default_factory=dict)
    reading: str = ""

    def baseline_of(self, name: str) -> str:
        """Return the name of the run that a run is compared with."""
        return self.against.get(name, self.baseline)

    @property
    def baseline_title(self) -> str:
        """The baseline's title."""
        return self.measured[self.baseline][0].title

    @property
    def measured(self) -> dict[str, list[Run]]:
        """The runs that are measured, by name; all seeds of each."""
        rows: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.measured:
                rows.setdefault(run.name, []).append(run)
        return rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    All comparisons, at the size that a preset gives them.

    Args:
        name (`str`): Name of the preset.
        output_dir (`Path`): Folder of everything that is trained and sampled.
        seeds (`list[int]`): The seeds of every run.
        num_images (`int`): How many images are sampled to be measured.
        num_inference_steps (`int`): Denoising steps of all sampling.
        data (`dict[str, dict]`): Arguments of each data set's maker.
        comparisons (`list[Comparison]`): In the order of the report.
        inception (`str`): An extractor by which FID is measured, too, at the end of each run; empty for none.
    """

    name: str
    output_dir: Path
    seeds: list[int]
    num_images: int
    num_inference_steps: int
    data: dict[str, dict[str, Any]]
    comparisons: list[Comparison]
    inception: str = ""

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed: after an interruption, tables have fewer seeds but all rows."""
        runs = [run for comparison in self.comparisons for run in comparison.runs]
        return sorted(runs, key=lambda run: run.seed)

    def folder(self, run: Run) -> Path:
        """Return the output folder of a run."""
        return self.output_dir / run.comparison / f"{run.name}-{run.seed}"

    def data_folder(self, name: str) -> Path:
        """Return the folder of a data set."""
        return self.output_dir / "data" / name

    def run(self, key: str) -> Run:
        """
        Return the run with a key.

        Raises:
            ValueError: if there is no such run; the error lists all runs.
        """
        runs = {run.key: run for run in self.runs}
        if key not in runs:
            raise ValueError(f"Expected a run to be one of {', '.join(runs)}, but got {key!r}.")
        return runs[key]

    def before(self, run: Run) -> list[Run]:
        """
        Return the runs that must be done before `run`.

        Raises:
            ValueError: if there is no such run, or none of this seed among several.
        """
        found = []
        for name in run.after:
            runs = [other for other in self.runs if f"{other.comparison}/{other.name}" == name]
            own = [other for other in runs if other.seed == run.seed] or (runs if len(runs) == 1 else [])
            found.append(own[0] if own else self.run(f"{name}-{run.seed}"))
        return found

    def resolve(self, run: Run, value: Any) -> Any:
        """Replace the placeholders in a value."""
        if not isinstance(value, str):
            return value
        return value.format(outputs=self.output_dir, data=self.data_folder(run.data), seed=run.seed)

    def place(self, run: Run, value: str) -> Path:
        """Return the folder that a run's `base`, `guide` or one of its `parts` names."""
        return Path(self.resolve(run, value))

    def script(self, run: Run) -> list[str]:
        """Return the training script and its arguments, with the run's seed unless its arguments contain another."""
        arguments = {"seed": run.seed} | run.arguments | {"output_dir": str(self.folder(run))}
        options = []
        for name, value in arguments.items():
            values = value if isinstance(value, list) else [self.resolve(run, value)]
            options += [f"--{name}", *map(str, values)]
        return [f"training/{run.script}", *options]

    def command(self, run: Run, num_threads: int) -> list[str]:
        """Return the command that starts the same training by itself."""
        return [
            *("accelerate", "launch", "--num_machines", "1", "--num_processes", "1", "--dynamo_backend", "no"),
            *("--mixed_precision", "no", "--num_cpu_threads_per_process", str(num_threads)),
            *self.script(run),
        ]

    def settings(self, run: Run) -> dict[str, Any]:
        """Return all settings that the run's results depend on, with those of the run before it, as JSON can store them."""
        config = run.arguments.get("config")
        return {
            "seed": run.seed,
            "script": run.script,
            "arguments": {name: value for name, value in run.arguments.items() if name not in FREE},
            "preset": yaml.safe_load(Path(config).read_text()) if config else None,
            "base": run.base,
            "parts": run.parts,
            "boundaries": run.boundaries,
            "guide": run.guide,
            "sampling": run.sampling,
            "num_images": self.num_images,
            "num_inference_steps": self.num_inference_steps,
            "data": {run.data: self.data[run.data]},
            "after": [self.settings(needed) for needed in self.before(run)],
        }


def load_plan(preset: str) -> Plan:
    """
    Load a preset; comparisons on data sets that it does not have are left out.

    Args:
        preset (`str`): Name of a preset in this folder, or the path of a YAML file.

    Raises:
        ValueError: if there is no such preset, or it lacks a part.
    """
    path = Path(preset).resolve() if preset.endswith(".yaml") else PRESETS / f"{preset}.yaml"
    if not path.is_file() or path == COMPARISONS:
        names = ", ".join(sorted(known.stem for known in PRESETS.glob("*.yaml") if known != COMPARISONS))
        raise ValueError(f"Expected `preset` to be a YAML file or one of {names}, but got {preset!r}.")
    sizes = read_yaml(path)
    _expect_keys(path, sizes)
    groups, readings = sizes.pop("settings"), sizes.pop("readings", {})
    comparisons = []
    for name, content in yaml.safe_load(COMPARISONS.read_text()).items():
        if content["data"] not in sizes["data"]:
            continue
        rows = content.pop("runs")
        for group in (group for own in rows.values() for group in own.get("like", [])):
            if group not in groups:
                raise ValueError(
                    f"Expected {path} to have `{group}` among its `settings`, for {name!r}, but it has not."
                )
        runs = [
            _make_run(name, run_name, seed, content["data"], own, groups)
            for run_name, own in rows.items()
            for seed in own.get("seeds", sizes["seeds"])
        ]
        own = {"baseline": runs[0].name, "reading": readings.get(name, "")} | content
        comparisons.append(Comparison(name=name, runs=runs, **own))
    return Plan(name=path.stem, comparisons=comparisons, **sizes | {"output_dir": Path(sizes["output_dir"])})


def _expect_keys(path: Path, sizes: dict[str, Any]) -> None:
    """Check that a preset has all that a plan needs, and nothing else."""
    needed = {"output_dir", "seeds", "num_images", "num_inference_steps", "data", "settings"}
    if missing := sorted(needed - set(sizes)):
        raise ValueError(f"Expected {path} to have {', '.join(f'`{name}`' for name in missing)}, but it has not.")
    if unknown := sorted(set(sizes) - needed - {"readings"}):
        raise ValueError(
            f"Expected {path} to have {', '.join(sorted(needed))} and readings, but got `{unknown[0]}`, too."
        )


def _make_run(comparison: str, name: str, seed: int, data: str, own: dict[str, Any], groups: dict[str, dict]) -> Run:
    """Merge the groups of settings that `like` names; entries that are not fields of [`Run`] are arguments of its script."""
    settings = {}
    for group in own.get("like", []):
        settings |= groups[group]
    settings |= {key: value for key, value in own.items() if key not in ("like", "seeds")}
    known = {each.name for each in dataclasses.fields(Run)} - {"seed", "arguments"}
    fields = {key: value for key, value in settings.items() if key in known}
    arguments = {key: value for key, value in settings.items() if key not in known}
    return Run(**{"comparison": comparison, "name": name, "seed": seed, "data": data, "arguments": arguments} | fields)
