"""What is compared, as `comparisons.yaml` and a preset say it, and the single runs that this takes."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PRESETS = Path(__file__).parent
COMPARISONS = PRESETS / "comparisons.yaml"
AS_IT_IS, TRAINED = "as it is", "trained"  # a classifier that guides


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    One training with one seed, and its images measured.

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

    def command(self, output_dir: Path, num_threads: int) -> list[str]:
        """What trains it, resuming what was interrupted."""
        own = [str(part) for name, value in self.arguments.items() for part in (f"--{name}", *_values(value))]
        return [
            *("accelerate", "launch", "--num_machines", "1", "--num_processes", "1", "--dynamo_backend", "no"),
            *("--mixed_precision", "no", "--num_cpu_threads_per_process", str(num_threads)),
            *(f"training/{self.script}", *own, "--seed", str(self.seed), "--output_dir", str(output_dir)),
        ]


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs that differ in one thing; the first that is measured is what the others are compared with."""

    name: str
    title: str
    text: str
    data: str
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
    """

    name: str
    output_dir: Path
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    data: dict[str, dict[str, Any]]
    comparisons: list[Comparison]

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

    def settings(self, run: Run) -> dict[str, Any]:
        """All that decides a run's figures, in what JSON can hold; those of what it comes after are in that run's."""
        own = dataclasses.asdict(run)
        for name in ("comparison", "name", "title", "measured"):
            own.pop(name)
        shared = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return own | shared | {"data_settings": self.data[run.data]}

    def before(self, run: Run) -> Run | None:
        """The run that this one needs."""
        if not run.after:
            return None
        return self.run(f"{run.after}-{run.seed}")


def load_plan(preset: str) -> Plan:
    """
    A preset of this folder by its name, or another YAML file.

    Raises:
        ValueError: if there is none.
    """
    path = Path(preset) if preset.endswith(".yaml") else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(known.stem for known in PRESETS.glob("*.yaml") if known != COMPARISONS))
        raise ValueError(f"Expected `preset` to be a YAML file or one of {names}, but got {preset!r}.")
    sizes = yaml.safe_load(path.read_text())
    output_dir, settings = Path(sizes["output_dir"]), sizes.pop("settings")
    comparisons = []
    for name, comparison in yaml.safe_load(COMPARISONS.read_text()).items():
        data = comparison["data"]
        runs = []
        for seed in sizes["seeds"]:
            for run_name, own in comparison["runs"].items():
                together = {}
                for group in own.get("like", []):
                    together |= settings[group]
                together |= {key: value for key, value in own.items() if key != "like"}
                runs.append(_make_run(output_dir, name, run_name, seed, data, together))
        comparisons.append(
            Comparison(name=name, title=comparison["title"], text=comparison["text"], data=data, runs=runs)
        )
    return Plan(name=path.stem, comparisons=comparisons, **sizes | {"output_dir": output_dir})


def _make_run(output_dir: Path, comparison: str, name: str, seed: int, data: str, settings: dict[str, Any]) -> Run:
    """
    Of what a preset says: what is no field of a [`Run`] is an argument. In either, `{outputs}`, `{data}` and `{seed}` stand for
    what they are.
    """
    places = {"outputs": output_dir, "data": output_dir / "data" / data, "seed": seed}
    settings = {key: value.format(**places) if isinstance(value, str) else value for key, value in settings.items()}
    fields = {each.name for each in dataclasses.fields(Run)} - {"comparison", "name", "seed", "data", "arguments"}
    own = {key: value for key, value in settings.items() if key in fields}
    arguments = {key: value for key, value in settings.items() if key not in fields}
    return Run(comparison=comparison, name=name, seed=seed, data=data, arguments=arguments, **own)
