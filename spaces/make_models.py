"""Train the digits pipelines that come with the Space, from the presets, and generate its example pictures.

Run from the repository's root: `python spaces/make_models.py`, or `… dtr patch` for some of the pipelines, `… examples` for the
pictures alone. The pipelines are written to `spaces/models` in float16, the pictures to `spaces/pictures`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from examples import EXAMPLES, PICTURES
from PIL import Image
from showcase import ALL_CLASSES, MODELS, ShownPipeline, load_pipelines
from studio import Studio

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.evaluation.digits import (
    NUM_CLASSES,
    TRAINING_IMAGES,
    VALIDATION_IMAGES,
    fit_classifier,
    fit_reader,
    write_image_folder,
)
from diffusers_dmp.systems import SYSTEMS

WORK = Path("outputs/space")
GENERATED = WORK / "generated"  # images that the experts of PPAP are trained on
BASE = WORK / "dit"  # the DiT that Remix-DiT and DMP start from; it was not trained on the held-out digits
# smaller than the presets, so that all five together are a quick download
DIT_SIZE = ["--num_layers", 4, "--num_attention_heads", 5]
UNET_SIZE = ["--channel_multipliers", 1, 1]
# each a system, its preset and options; by name: WORK / name is the output_dir
BASE_TRAINING = (
    "dit", "dit_digits", *DIT_SIZE, "--dataset", WORK / "digits_train", "--output_dir", BASE, "--sample_steps", 0,
)  # fmt: skip
TRAININGS = {
    "dtr": ("dtr", "dtr_digits", *DIT_SIZE, "--sample_steps", 0),
    "remix": (
        "remix", "remix_digits", "--num_bases", 3,
        "--pretrained_model_name_or_path", BASE / "pipeline", "--sample_steps", 0,
    ),
    "dmp": (
        "dmp", "dmp_digits", "--pretrained_model_name_or_path", BASE / "pipeline",
        "--dataset", WORK / "digits_train", "--validation_dataset", WORK / "digits_validation", "--sample_steps", 0,
        "--importance_loss_weight", 0.001,  # with a larger weight all prompts are used equally, and the figure shows nothing
    ),
    "patch": ("patch_diffusion", "patch_digits", *UNET_SIZE),
    "ppap": ("dit", "dit_digits_unconditional", *DIT_SIZE),
}  # fmt: skip
SAMPLES_PER_CLASS = 40  # for the share that is recognised


def launch(script: str, *options) -> None:
    """Run a training script by `accelerate launch`, in one process."""
    threads = os.environ.get("CPU_THREADS", os.cpu_count())
    accelerate = "--num_machines 1 --num_processes 1 --dynamo_backend no --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *accelerate.split()]
    command += ["--num_cpu_threads_per_process", threads, f"training/{script}.py", *options]
    subprocess.run([str(part) for part in command], check=True)


def train(system: str, preset: str, *options) -> None:
    """Train with a preset, on the digits unless the options name another data set."""
    folder = Path(options[options.index("--output_dir") + 1])
    shutil.rmtree(folder, ignore_errors=True)  # a training refuses a folder with checkpoints
    if "--dataset" not in options:
        options = ("--dataset", WORK / "digits", *options)
    launch(SYSTEMS[system].training_script, "--config", f"training/presets/{preset}.yaml", *options)


def train_guide() -> None:
    """Fit a classifier of clean digits, generate images with the unconditional pipeline, and train PPAP's experts with both."""
    fit_classifier(WORK / "classifier")
    shutil.rmtree(GENERATED, ignore_errors=True)
    launch(
        "generate_guidance_data", "--pipeline", WORK / "ppap/pipeline", "--num_images", 3000, "--batch_size", 500,
        "--output_dir", GENERATED,
    )  # fmt: skip
    experts = WORK / "ppap_experts"
    train(
        "ppap", "ppap_digits", "--base_model", WORK / "classifier", "--dataset", GENERATED, "--output_dir", experts,
    )  # fmt: skip


def ship(name: str) -> None:
    """Copy a trained pipeline to the Space's folder, in float16."""
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    DiffusionPipeline.from_pretrained(WORK / name / "pipeline", dtype=torch.float16).save_pretrained(folder)
    if name == "ppap":
        # in float32 as trained: the experts check their network's checksum
        shutil.copytree(WORK / "classifier", folder / "base_model")
        experts = GuidanceExperts.from_pretrained(WORK / "ppap_experts/experts", base_model=folder / "base_model")
        experts.register_to_config(base_model_name_or_path="base_model")
        experts.save_pretrained(folder / "experts")


def recognised(shown: ShownPipeline) -> float:
    """Return the share of generated images whose class a logistic regression on real digits recognises."""
    count = NUM_CLASSES * SAMPLES_PER_CLASS
    images = shown.generate(
        ALL_CLASSES, count, scale=shown.default_scale, num_inference_steps=25, scheduler="DDPM", seed=0
    )
    pixels = shown.pipeline.image_processor.pil_to_numpy(images).reshape(count, -1)  # (N, 64) in [0, 1]
    return float((fit_reader().predict(pixels) == shown.labels(ALL_CLASSES, count)).mean())


def make_examples() -> None:
    """Generate the pictures that the Space shows at once."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir()
    studio = Studio(load_pipelines(setting="")[0])
    for request, examples in EXAMPLES.items():
        for example in examples:
            answer = getattr(studio, request)(*example.values)
            first = answer[0]  # a picture, or the pictures of a comparison with their captions
            pictures = [picture for picture, _ in first] if isinstance(first, list) else answer[:2]
            pictures = [picture for picture in pictures if isinstance(picture, Image.Image)]
            for picture, path in zip(pictures, example.paths(len(pictures))):
                picture.quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(TRAININGS)}; all by default; 'examples' makes the pictures only"
    )
    names = parser.parse_args().names or list(TRAININGS)
    if names == ["examples"]:
        make_examples()
        return
    unknown = sorted(set(names) - set(TRAININGS))
    if unknown:
        parser.error(f"Expected `names` to be among {', '.join(TRAININGS)}, but got {', '.join(unknown)}.")
    write_image_folder(WORK / "digits")
    write_image_folder(WORK / "digits_train", TRAINING_IMAGES)
    write_image_folder(WORK / "digits_validation", VALIDATION_IMAGES)
    if {"remix", "dmp"} & set(names):
        train(*BASE_TRAINING)
    for name in names:
        train(*TRAININGS[name], "--output_dir", WORK / name)
        if name == "ppap":
            train_guide()
        ship(name)
    make_examples()
    pipelines, _ = load_pipelines(setting="")
    report = {name: round(recognised(pipelines[name]), 4) for name in names}
    report["megabytes"] = round(sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) / 1e6, 2)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
