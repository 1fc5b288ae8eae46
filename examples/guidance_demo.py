"""The beginning and the end of the guidance demo, `make demo-guidance`.

`python examples/guidance_demo.py classifiers` fits a classifier that guides, and one of another kind that judges. `… search`
looks for a good guidance scale, and `… compare` draws clothes without a prompt, guided by the classifier as it is, by experts
that were trained on the noise of flow matching, and by others that were trained on that of DDPM.

Pictures that were drawn are kept: a run that was interrupted goes on with the next ones.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clothes_judge import REAL, Judging, share
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from matplotlib.figure import Figure
from PIL import Image
from text_demo import write_json

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler, SentenceToImagePipeline
from diffusers_dmp.diffusion.noise import levels_at
from diffusers_dmp.diffusion.process import NoiseProcess
from diffusers_dmp.evaluation.digits import fit_resnet
from diffusers_dmp.evaluation.fashion import CLOTHES, fashion_images
from diffusers_dmp.evaluation.judge import as_pixels, fit_judge, in_parts, load_judge
from diffusers_dmp.plots import sample_grid
from diffusers_dmp.terminal import OneLineParser, run_command

OUTPUT = Path("outputs/demo_guidance")
PIPELINE = Path("outputs/demo_text/base/pipeline")
HALF = 30_000  # of the training pictures are for the classifier that guides, the other half for the one that judges
GUIDE_STEPS = 1500
JUDGE = "judge.safetensors"
SAMPLES_PER_CLASS = 50
SEARCHED_PER_CLASS = 10
SHOWN_PER_CLASS = 2
SCALES = (1.0, 2.0, 4.0, 8.0, 15.0)
SCALE = 7.5  # the paper's, and the default
X0_SCALE = 4.0  # what `search` finds for the classifier of x̂0
NUM_INFERENCE_STEPS = 20
SAMPLE_BATCH = 100
SCHEDULERS = {
    "Euler": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config),
    "UniPC": lambda config: UniPCMultistepScheduler.from_config(
        config, use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
}
GUIDED_SIGMA = 0.95  # above it, steps of flow matching are not guided by default
MEASURED_SIGMAS = (0.1, 0.3, 0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.9)
FLOW_MATCHING = {"process": "flow_matching"}
CLEAN, CLEAN_X0 = "classifier", "classifier of x̂0"
FLOW, DDPM, UNMATCHED = "flow experts", "DDPM experts", "DDPM experts unmatched"
GUIDES = (CLEAN, CLEAN_X0, FLOW, DDPM, UNMATCHED)
UNGUIDED = "unguided"


@dataclass(frozen=True)
class Cell:
    """One way to draw: a scheduler, what guides, and how strongly."""

    scheduler: str
    guide: str
    scale: float = 0.0

    @property
    def title(self) -> str:
        """For a reader."""
        return self.guide if self.guide == UNGUIDED else f"{self.guide}, scale {self.scale:g}"

    @property
    def name(self) -> str:
        """Of its file."""
        words = f"{self.scheduler} {self.guide} {self.scale:g}".lower().replace("x̂0", "x0")
        return words.replace(" ", "_")


COMPARED = (
    Cell("Euler", UNGUIDED),
    *(Cell("Euler", guide, X0_SCALE if guide == CLEAN_X0 else SCALE) for guide in GUIDES),
    *(Cell("UniPC", guide, SCALE) for guide in (CLEAN, FLOW, DDPM)),
)


def fit_classifiers(folder: Path) -> None:
    """Fit both classifiers on halves of the real pictures, and measure them on pictures that neither has seen."""
    images, labels = fashion_images()
    first, classes = images[:HALF, ..., None].copy(), labels[:HALF].copy()
    guide = fit_resnet(folder / "guide", first, classes, list(CLOTHES), GUIDE_STEPS)
    judge = fit_judge(folder / JUDGE, images[HALF:], labels[HALF:])
    test, truth = fashion_images("test")
    pixels, truth = as_pixels(test), torch.from_numpy(truth)
    summary = {
        "guide_accuracy": share(seen_by_guide(clean_guide(folder), pixels) == truth),
        "judge_accuracy": share(in_parts(judge, pixels)[1].argmax(1) == truth),
        "test_pictures": len(truth),
        "guide_parameters": guide.num_parameters(),
        "judge_parameters": sum(each.numel() for each in judge.parameters()),
    }
    write_json(folder / "classifiers.json", summary)


def clean_guide(folder: Path, noise_schedule: dict[str, Any] | None = None) -> GuidanceExperts:
    """The classifier of clean pictures, as the only expert at all noise levels, as if it knew a noise."""
    return GuidanceExperts.from_base(
        str(folder / "guide"), method="finetune", num_experts=1, noise_schedule=noise_schedule
    )


def seen_by_guide(guide: GuidanceExperts, pixels: torch.Tensor) -> torch.Tensor:
    """The classes (N,) that the classifier of clean pictures sees in pictures (N, 1, 28, 28)."""
    return in_parts(lambda part: (guide(part, torch.tensor(0)).logits,), pixels)[0].argmax(1)


def load_guides(folder: Path) -> dict[str, GuidanceExperts]:
    """What guides, by name."""
    unmatched = GuidanceExperts.from_pretrained(folder / "ddpm" / "experts")
    # as if they had been trained on it: they see x_t as it is, at t = σ·T
    unmatched.process = NoiseProcess.from_record(FLOW_MATCHING)
    return {
        CLEAN: clean_guide(folder, FLOW_MATCHING),  # it sees x_t as it is
        CLEAN_X0: clean_guide(folder),
        FLOW: GuidanceExperts.from_pretrained(folder / "flow" / "experts"),
        DDPM: GuidanceExperts.from_pretrained(folder / "ddpm" / "experts"),
        UNMATCHED: unmatched,
    }


def load_pipeline() -> SentenceToImagePipeline:
    """The text-to-image model of `make demo-text`."""
    if not PIPELINE.is_dir():
        raise ValueError(
            f"Expected `make demo-text` to have left its model in {str(PIPELINE)!r}, but there is no such folder."
        )
    pipeline = DiffusionPipeline.from_pretrained(PIPELINE).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def search(folder: Path) -> None:
    """Draw a few pictures with each scale, from other noise than `compare`, and write which share is recognised."""
    pipeline, guides, judge = load_pipeline(), load_guides(folder), load_judge(folder / JUDGE)
    found: dict[str, dict[str, float]] = {}
    for guide in (CLEAN, CLEAN_X0, FLOW, DDPM):
        found[guide] = {}
        for scale in SCALES:
            drawn = draw(folder / "search", pipeline, Cell("Euler", guide, scale), guides, SEARCHED_PER_CLASS, seed=1)
            seen = in_parts(judge, as_pixels(drawn["images"]))[1].argmax(1)
            found[guide][f"{scale:g}"] = share(seen == torch.from_numpy(drawn["labels"]))
        print(guide, found[guide], flush=True)
    write_json(folder / "scales.json", {"samples": SEARCHED_PER_CLASS * len(CLOTHES), "recognised": found})


def draw(
    folder: Path,
    pipeline: SentenceToImagePipeline,
    cell: Cell,
    guides: dict[str, GuidanceExperts],
    per_class: int,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """
    Draw pictures of each class without a prompt, or read them if that has been done before.

    Returns:
        `images` uint8 (N, 28, 28), `labels` (N,) that were asked for, and `seconds` per step of a batch. The i-th picture always
        begins with the same noise.
    """
    path = folder / f"{cell.name}.npz"
    if path.exists():
        return dict(np.load(path))
    plain = SCHEDULERS[cell.scheduler](pipeline.scheduler.config)
    labels = np.arange(len(CLOTHES) * per_class) % len(CLOTHES)
    images, seconds = [], []
    for begin in range(0, len(labels), SAMPLE_BATCH):
        asked = labels[begin : begin + SAMPLE_BATCH]
        scheduler = plain
        if cell.guide != UNGUIDED:
            decoder = (lambda x0: x0) if cell.guide == CLEAN_X0 else None
            scheduler = GuidedScheduler(plain, guides[cell.guide], ClassTarget(asked), cell.scale, decoder=decoder)
        pipeline.scheduler = scheduler
        generators = [torch.Generator().manual_seed(seed * 1_000_000 + begin + i) for i in range(len(asked))]
        started = time.perf_counter()
        images += pipeline(
            [""] * len(asked), guidance_scale=1.0, num_inference_steps=NUM_INFERENCE_STEPS, generator=generators
        ).images
        seconds.append((time.perf_counter() - started) / len(scheduler.timesteps))
    pipeline.scheduler = plain
    pictures = np.stack([np.asarray(image) for image in images])
    drawn = {"images": pictures, "labels": labels, "seconds": np.median(seconds)}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, **drawn)
    unfinished.rename(path)
    return drawn


def compare(folder: Path) -> None:
    """Draw in all ways, let the judge count, and write figures, a table and a picture."""
    pipeline, guides = load_pipeline(), load_guides(folder)
    judging = Judging(load_judge(folder / JUDGE), lambda pixels: seen_by_guide(guides[CLEAN], pixels))
    summary: dict[str, Any] = {
        "samples": SAMPLES_PER_CLASS * len(CLOTHES),
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "classifiers": json.loads((folder / "classifiers.json").read_text()),
        "training": {name: training_figures(folder / name) for name in ("flow", "ddpm")},
        "edges_as_sigma": {name: edges_as_sigma(guides[name]) for name in (FLOW, DDPM)},
        "guided_steps": {name: guided_steps(guides[name]) for name in (FLOW, DDPM)},
        "accuracy_by_sigma": accuracy_by_sigma(guides),
        "real pictures": judging.of_real_pictures(),
        "drawn": {},
    }
    rows = {}
    for cell in COMPARED:
        drawn = draw(folder / "samples", pipeline, cell, guides, SAMPLES_PER_CLASS)
        figures = judging.of(drawn["images"], drawn["labels"]) | {
            "seconds_per_step": round(float(drawn["seconds"]), 4)
        }
        summary["drawn"].setdefault(cell.scheduler, {})[cell.title] = figures
        print(cell.scheduler, cell.title, figures, flush=True)
        if cell.scheduler == "Euler":
            rows[f"{cell.title}: {figures['recognised']:.1%} recognised"] = shown(drawn)
    rows_figure(rows).savefig(folder / "guidance_fashion.png", dpi=100)
    (folder / "guidance.md").write_text(as_tables(summary))
    write_json(folder / "guidance.json", summary)
    print(as_tables(summary), f"Look at {folder / 'guidance_fashion.png'}.", sep="\n")


@torch.no_grad()
def accuracy_by_sigma(guides: dict[str, GuidanceExperts]) -> dict[str, dict[str, float]]:
    """Which share of real pictures each guide recognises in (1-σ)·x0 + σ·ε, the noisy samples of flow matching."""
    images, labels = (each[:REAL] for each in fashion_images("test"))
    x0, labels = as_pixels(images), torch.from_numpy(labels)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, dict[str, float]] = {name: {} for name in (CLEAN, FLOW, DDPM, UNMATCHED)}
    for sigma in MEASURED_SIGMAS:
        level = torch.tensor([1 - sigma, sigma], dtype=torch.float64)
        x_t = (1 - sigma) * x0 + sigma * noise
        for name, by_sigma in found.items():
            process = guides[name].process or NoiseProcess.from_record(FLOW_MATCHING)  # the classifier has none
            inputs = (process.scale_at(*level) * x_t).float()
            seen = guides[name](inputs, process.timestep_at(*level)).logits.argmax(1)
            by_sigma[f"{sigma:g}"] = share(seen == labels)
    return found


def edges_as_sigma(experts: GuidanceExperts) -> list[float]:
    """The σ of flow matching with the noise of each boundary between experts."""
    edges = torch.tensor(experts.intervals.edges[:-1]).long()
    alpha, sigma = levels_at(experts.process.scheduler, edges)
    return [round(each, 3) for each in (sigma / (alpha + sigma)).tolist()] + [1.0]


def guided_steps(experts: GuidanceExperts) -> list[int]:
    """How many of the steps of Euler's scheduler each expert guides."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(NUM_INFERENCE_STEPS)
    sigmas = scheduler.sigmas[:-1]
    sigmas = sigmas[sigmas < GUIDED_SIGMA]
    owners = experts.intervals.index(experts.process.timestep_at(1 - sigmas, sigmas))
    return owners.bincount(minlength=experts.config.num_experts).tolist()


def shown(drawn: dict[str, np.ndarray]) -> Image.Image:
    """A row of pictures, a few of each class."""
    rows = [np.flatnonzero(drawn["labels"] == label)[:SHOWN_PER_CLASS] for label in range(len(CLOTHES))]
    return sample_grid([[Image.fromarray(drawn["images"][row])] for row in np.concatenate(rows)], pixel_size=2)


def rows_figure(rows: dict[str, Image.Image]) -> Figure:
    """Rows of pictures by their titles, one below the other."""
    width, height = next(iter(rows.values())).size
    figure = Figure(figsize=(width / 100 + 0.2, len(rows) * (height / 100 + 0.3)), layout="constrained")
    for axes, (title, row) in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows.items()):
        axes.imshow(row, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_axis_off()
    return figure


def as_tables(summary: dict[str, Any]) -> str:
    """The figures in Markdown: what was drawn, and how often the guides recognise noisy pictures."""
    head = ["scheduler", "guided by", "recognised", "95 % interval", "by the guide"]
    head += ["confidence", "distance", "spread"]
    lines = [head, ["---"] * len(head)]
    drawn = [(name, *each) for name, cells in summary["drawn"].items() for each in cells.items()]
    for scheduler, title, figures in [*drawn, ("", "real pictures", summary["real pictures"])]:
        low, high = figures["interval"]
        shares = [f"{figures['recognised']:.1%}", f"{low:.1%} to {high:.1%}", f"{figures['recognised_by_guide']:.1%}"]
        others = [f"{figures['confidence']:.2f}", f"{figures['distance']:.1f}", f"{figures['spread']:.2f}"]
        lines.append([scheduler, title, *shares, *others])
    sigmas = [f"{sigma:g}" for sigma in MEASURED_SIGMAS]
    accuracies = [["noisy pictures, by σ", *sigmas], ["---"] * (len(sigmas) + 1)]
    for title, by_sigma in summary["accuracy_by_sigma"].items():
        accuracies.append([title, *(f"{by_sigma[sigma]:.1%}" for sigma in sigmas)])
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in (lines, accuracies)) + "\n"


def training_figures(folder: Path) -> dict[str, Any]:
    """What a training says of itself that the report repeats."""
    training = json.loads((folder / "training_summary.json").read_text())
    return {name: training[name] for name in ("steps", "train_seconds") if name in training}


def main(argv: list[str]) -> None:
    """Do the part that the command line asks for."""
    parser = OneLineParser(description=__doc__)
    parts = {"classifiers": fit_classifiers, "search": search, "compare": compare}
    parser.add_argument("part", choices=tuple(parts))
    parser.add_argument("folder", type=Path, nargs="?", default=OUTPUT, help="where everything is written")
    args = parser.parse_args(argv)
    parts[args.part](args.folder)


if __name__ == "__main__":
    run_command(main)
