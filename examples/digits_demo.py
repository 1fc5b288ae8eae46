"""The beginning and the end of the demos.

`python examples/digits_demo.py data` writes the digits, `… report FOLDER` samples from what was trained on them.
`… classifier FOLDER` fits a classifier, and `… guidance FOLDER` compares guidance by it with guidance by experts made of it.

The reports run in processes of their own, which share nothing but folders with the training.
"""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

from diffusers_dmp import (  # registers the pipeline with Diffusers, too
    ClassTarget,
    GuidanceExperts,
    GuidedScheduler,
)
from diffusers_dmp.evaluation.digits import (
    NUM_CLASSES,
    TRAINING_IMAGES,
    VALIDATION_IMAGES,
    fit_classifier,
    fit_reader,
    write_image_folder,
)
from diffusers_dmp.plots import (
    comparison_figure,
    sample_grid,
    specialisation_figures,
)
from diffusers_dmp.saving.reading import read_json
from diffusers_dmp.terminal import OneLineParser, run_command

OUTPUT = Path("outputs/demo")
UNCONDITIONAL = Path("outputs/dit_digits_unconditional")
DATASET = "scikit-learn digits"
SAMPLES_PER_CLASS = 50
GUIDANCE_SCALE = 1.5
PPAP_SCALE = 7.5  # the paper's, for guidance by a classifier
NUM_INFERENCE_STEPS = 25


def report(folder: Path) -> None:
    """Sample from a trained pipeline, and write figures, samples and the share of digits that a classifier recognises."""
    training = read_json(folder / "training_summary.json")  # first, as it is written last
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    labels = [label for label in range(NUM_CLASSES) for _ in range(SAMPLES_PER_CLASS)]
    generator = torch.Generator(pipeline.device).manual_seed(0)
    images = pipeline(
        labels, guidance_scale=GUIDANCE_SCALE, num_inference_steps=NUM_INFERENCE_STEPS, generator=generator
    ).images

    columns = [images[label * SAMPLES_PER_CLASS :][: min(8, SAMPLES_PER_CLASS)] for label in range(NUM_CLASSES)]
    sample_grid(columns, pixel_size=6).save(folder / "samples.png")
    pictures = specialisation_figures(pipeline, num_inference_steps=NUM_INFERENCE_STEPS, training_summary=training)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)

    pixels = pipeline.image_processor.pil_to_numpy(images).reshape(len(images), -1)  # (N, 64) in [0, 1]
    recognised = (fit_reader().predict(pixels) == labels).mean()
    summary = {
        "recognised": round(float(recognised), 4),
        "samples": len(images),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "parameters": sum(denoiser.num_parameters() for denoiser in pipeline.denoisers),
        "steps": training["steps"],
        "train_seconds": training["train_seconds"],
    }
    if getattr(pipeline, "prompt_patch", None) is not None:
        summary["patch_parameters"] = pipeline.prompt_patch.num_parameters()
    if "validation_loss" in training.get("after", {}):
        summary["validation_loss"] = {when: training[when]["validation_loss"] for when in ("before", "after")}
    settings = {name: summary[name] for name in ("samples", "guidance_scale", "num_inference_steps")}
    recognised = {"metric": "recognised", "value": summary["recognised"], "dataset": DATASET, "settings": settings}
    write_results(folder, summary, [recognised])
    print(
        f"The pipeline is in {folder / 'pipeline'}. Look at {', '.join(f'{name}.png' for name in ('samples', *pictures))}."
    )


def guidance_report(folder: Path) -> None:
    """Compare an unconditional pipeline without guidance, guided by a classifier, and guided by experts made of it."""
    training = read_json(folder / "training_summary.json")  # first, as it is written last
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(UNCONDITIONAL / "pipeline").to(device)
    experts = GuidanceExperts.from_pretrained(folder / "experts")
    clean = GuidanceExperts.from_base(experts.config.base_model_name_or_path, method="finetune", num_experts=1)
    labels = [label for label in range(NUM_CLASSES) for _ in range(SAMPLES_PER_CLASS)]
    reader = fit_reader()  # a model of another kind than the one that guides

    summary, results = {"samples": len(labels), "guidance_scale": PPAP_SCALE}, []
    for sampler, num_inference_steps in ((DDIMScheduler, 25), (DDPMScheduler, 50)):
        plain = sampler.from_config(pipeline.scheduler.config)
        name = f"{sampler.__name__.removesuffix('Scheduler').lower()}{num_inference_steps}"
        summary[name], grids = {}, {}
        for guide, network in {"unguided": None, "classifier": clean, "experts": experts}.items():
            pipeline.scheduler = plain
            if network is not None:
                pipeline.scheduler = GuidedScheduler(plain, network, ClassTarget(labels), PPAP_SCALE)
            generator = torch.Generator(device).manual_seed(0)
            images = pipeline(
                batch_size=len(labels), num_inference_steps=num_inference_steps, generator=generator
            ).images
            columns = [images[label * SAMPLES_PER_CLASS :][:8] for label in range(NUM_CLASSES)]
            grids[guide] = sample_grid(columns, pixel_size=6)
            pixels = pipeline.image_processor.pil_to_numpy(images).reshape(len(images), -1)  # (N, 64) in [0, 1]
            summary[name][guide] = round(float((reader.predict(pixels) == labels).mean()), 4)
            settings = {"guided by": guide, "scheduler": sampler.__name__, "num_inference_steps": num_inference_steps}
            settings |= {"samples": len(labels), "guidance_scale": PPAP_SCALE}
            metric = f"recognised, {guide}, {name}"
            value = summary[name][guide]
            results.append({"metric": metric, "value": value, "dataset": DATASET, "settings": settings})
        titles = {f"{guide}: {summary[name][guide]:.1%} recognised": grid for guide, grid in grids.items()}
        comparison_figure(titles).savefig(folder / f"{name}.png", dpi=100)
    summary["expert_bytes"] = (folder / "experts" / "guidance_experts.safetensors").stat().st_size
    summary |= {name: training[name] for name in ("steps", "train_seconds")}
    write_results(folder, summary, results)
    print(f"Look at ddim25.png and ddpm50.png in {folder}: unguided, by the classifier as it is, and by the experts.")


def write_results(folder: Path, summary: dict, results: list[dict]) -> None:
    """Write the report, and the results in the form that model cards are made from."""
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def main(argv: list[str]) -> None:
    """Do the part that the command line asks for."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("part", choices=("data", "report", "classifier", "guidance"))
    parser.add_argument(
        "folder", type=Path, nargs="?", default=OUTPUT, help="a training's output_dir, or the classifier's"
    )
    args = parser.parse_args(argv)
    if args.part == "data":
        write_image_folder(OUTPUT / "digits")
        write_image_folder(OUTPUT / "digits_train", TRAINING_IMAGES)
        write_image_folder(OUTPUT / "digits_validation", VALIDATION_IMAGES)
    elif args.part == "classifier":
        fit_classifier(args.folder)
    else:
        {"report": report, "guidance": guidance_report}[args.part](args.folder)


if __name__ == "__main__":
    run_command(main)
