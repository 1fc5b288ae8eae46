"""What is compared, as `comparisons.yaml` and a preset say it, and the single runs that this takes."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PRESETS = Path(__file__).parent
COMPARISONS = PRESETS / "comparisons.yaml"
TRAINED = "trained"  # experts that guide; any other guide is the classifier as it is
# arguments of a script that change nothing of what it trains
FREE = ("checkpointing_steps", "checkpoints_total_limit", "report_to", "resume_from_checkpoint", "logging_steps")


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    One training with one seed, and its images measured. In what is text, `{outputs}`, `{data}` and `{seed}` stand for themselves.

    Args:
        comparison, name (`str`), seed (`int`): Which it is.
        title (`str`): Its row's.
        data (`str`): What it is trained on and measured against.
        script (`str`): In `training/`; none where nothing is trained.
        arguments (`dict[str, Any]`): The script's.
        after (`str`): `comparison/name` of the run, with the same seed, that has to be there.
        base (`str`): The pipeline that draws, for runs that train none.
        guide (`str`): What guides it: the data's classifier 'as it is', or the experts that this run has 'trained'; or nothing.
        scheduler (`str`): To draw with, in the pipeline's settings; empty for its own.
        measured (`bool`): Or only made for others.
    """

    comparison: str
    name: str
    seed: int
    title: str
    data: str
    script: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    after: str = ""
    base: str = ""
    guide: str = ""
    scheduler: str = ""
    measured: bool = True

    @property
    def key(self) -> str:
        return f"{self.comparison}/{self.name}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    Runs that differ in one thing.

    Args:
        name, title, text, data (`str`): As `comparisons.yaml` has them.
        baseline (`str`): The name of the run that the others are compared with.
        runs (`list[Run]`): With every seed.
    """

    name: str
    title: str
    text: str
    data: str
    baseline: str
    runs: list[Run]

    @property
    def measured(self) -> dict[str, list[Run]]:
        """By name, all seeds of each."""
        rows: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.measured:
                rows.setdefault(run.name, []).append(run)
        return rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    Args:
        name (`str`): The preset's.
        output_dir (`Path`): Where everything is trained.
        seeds (`list[int]`): With which.
        num_inference_steps (`int`): Of all samplings.
        guidance_scale (`float`): By a classifier; nothing is guided without one.
        data (`dict[str, dict]`): What is made of each data set, beside the defaults.
        comparisons (`list[Comparison]`): In the order of the report.
        notes (`dict[str, str]`): What is to be known of a comparison's results at this size, by its name.
    """

    name: str
    output_dir: Path
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    data: dict[str, dict[str, Any]]
    comparisons: list[Comparison]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> list[Run]:
        """All, seed by seed, so that a comparison that was cut short has fewer seeds and not fewer rows."""
        runs = [run for comparison in self.comparisons for run in comparison.runs]
        return sorted(runs, key=lambda run: run.seed)

    def folder(self, run: Run) -> Path:
        return self.output_dir / run.comparison / f"{run.name}-{run.seed}"

    def data_folder(self, name: str) -> Path:
        return self.output_dir / "data" / name

    def run(self, key: str) -> Run:
        """
        Raises:
            ValueError: if there is no such run; those that there are are listed.
        """
        runs = {run.key: run for run in self.runs}
        if key not in runs:
            raise ValueError(f"Expected a run to be one of {', '.join(runs)}, but got {key!r}.")
        return runs[key]

    def before(self, run: Run) -> Run | None:
        """The run that this one needs."""
        return self.run(f"{run.after}-{run.seed}") if run.after else None

    def resolve(self, run: Run, value: Any) -> Any:
        """Its placeholders replaced."""
        if not isinstance(value, str):
            return value
        return value.format(outputs=self.output_dir, data=self.data_folder(run.data), seed=run.seed)

    def base(self, run: Run) -> Path:
        """The folder of the pipeline that draws, where the run trains none."""
        return Path(self.resolve(run, run.base))

    def command(self, run: Run, num_threads: int) -> list[str]:
        """What trains it, resuming what was interrupted; with the run's seed, unless its arguments have another."""
        arguments = {"seed": run.seed} | run.arguments | {"output_dir": str(self.folder(run))}
        options = []
        for name, value in arguments.items():
            values = value if isinstance(value, list) else [self.resolve(run, value)]
            options += [f"--{name}", *map(str, values)]
        return [
            *("accelerate", "launch", "--num_machines", "1", "--num_processes", "1", "--dynamo_backend", "no"),
            *("--mixed_precision", "no", "--num_cpu_threads_per_process", str(num_threads)),
            *(f"training/{run.script}", *options),
        ]

    def settings(self, run: Run) -> dict[str, Any]:
        """All that decides a run's figures, that which it comes after included, in what JSON can hold."""
        needed = self.before(run)
        config = run.arguments.get("config")
        return {
            "seed": run.seed,
            "script": run.script,
            "arguments": {name: value for name, value in run.arguments.items() if name not in FREE},
            "preset": yaml.safe_load(Path(config).read_text()) if config else None,
            "base": run.base,
            "guide": run.guide,
            "guidance_scale": self.guidance_scale if run.guide else None,
            "scheduler": run.scheduler,
            "num_inference_steps": self.num_inference_steps,
            "data": {run.data: self.data[run.data]},
            "after": self.settings(needed) if needed else None,
        }


def load_plan(preset: str) -> Plan:
    """
    A preset of this folder by its name, or another YAML file.

    Raises:
        ValueError: if there is none.
    """
    path = Path(preset) if preset.endswith(".yaml") else PRESETS / f"{preset}.yaml"
    if not path.is_file() or path == COMPARISONS:
        names = ", ".join(sorted(known.stem for known in PRESETS.glob("*.yaml") if known != COMPARISONS))
        raise ValueError(f"Expected `preset` to be a YAML file or one of {names}, but got {preset!r}.")
    sizes = yaml.safe_load(path.read_text())
    groups = sizes.pop("settings")
    comparisons = []
    for name, content in yaml.safe_load(COMPARISONS.read_text()).items():
        rows = content.pop("runs")
        runs = [
            _make_run(name, run_name, seed, content["data"], own, groups)
            for seed in sizes["seeds"]
            for run_name, own in rows.items()
        ]
        comparisons.append(Comparison(name=name, runs=runs, **{"baseline": runs[0].name} | content))
    return Plan(name=path.stem, comparisons=comparisons, **sizes | {"output_dir": Path(sizes["output_dir"])})


def _make_run(comparison: str, name: str, seed: int, data: str, own: dict[str, Any], groups: dict[str, dict]) -> Run:
    """What is no field of a [`Run`] is an argument of its script."""
    settings = {}
    for group in own.get("like", []):
        settings |= groups[group]
    settings |= {key: value for key, value in own.items() if key != "like"}
    known = {each.name for each in dataclasses.fields(Run)} - {"seed", "arguments"}
    fields = {key: value for key, value in settings.items() if key in known}
    arguments = {key: value for key, value in settings.items() if key not in known}
    return Run(comparison=comparison, name=name, seed=seed, data=data, arguments=arguments, **fields)
