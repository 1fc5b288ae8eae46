"""Train the digits pipelines that the Space ships, from the presets, and draw its examples with them.

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
from studio import Studio
from systems import ALL_CLASSES, MODELS, System, load_systems

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.evaluation.digits import (
    NUM_CLASSES,
    TRAINING_IMAGES,
    VALIDATION_IMAGES,
    fit_classifier,
    fit_reader,
    write_image_folder,
)

WORK = Path("outputs/space")
DRAWN = WORK / "drawn"  # images for the experts of PPAP to learn from
BASE = WORK / "dit"  # what Remix-DiT starts from and DMP patches: it never saw the held-out digits
# Smaller than the presets, so that all five together are a quick download.
DIT_SIZE = ["--num_layers", 4, "--num_attention_heads", 5]
UNET_SIZE = ["--channel_multipliers", 1, 1]
# each a script, its preset and options; the output_dir of those by name is WORK / name
BASE_TRAINING = (
    "train_dit", "dit_digits", *DIT_SIZE, "--dataset", WORK / "digits_train", "--output_dir", BASE, "--sample_steps", 0,
)  # fmt: skip
TRAININGS = {
    "dtr": ("train_dtr", "dtr_digits", *DIT_SIZE, "--sample_steps", 0),
    "remix": (
        "train_remix", "remix_digits", "--num_bases", 3, "--pretrained_model_name_or_path", BASE / "pipeline",
        "--sample_steps", 0,
    ),
    "dmp": (
        "train_dmp", "dmp_digits", "--pretrained_model_name_or_path", BASE / "pipeline", "--dataset", WORK / "digits_train",
        "--validation_dataset", WORK / "digits_validation", "--sample_steps", 0,
        "--importance_loss_weight", 0.001,  # with more of it all prompts count alike, and there is nothing to see
    ),
    "patch": ("train_patch_diffusion", "patch_digits", *UNET_SIZE),
    "ppap": ("train_dit", "dit_digits_unconditional", *DIT_SIZE),
}  # fmt: skip
SAMPLES_PER_CLASS = 40  # to say how many are recognised


def launch(script: str, *options) -> None:
    """A training script as `accelerate launch` runs it, on one process."""
    threads = os.environ.get("CPU_THREADS", os.cpu_count())
    accelerate = "--num_machines 1 --num_processes 1 --dynamo_backend no --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *accelerate.split()]
    command += ["--num_cpu_threads_per_process", threads, f"training/{script}.py", *options]
    subprocess.run([str(part) for part in command], check=True)


def train(script: str, preset: str, *options) -> None:
    """With the digits as data set, unless the options name another."""
    folder = Path(options[options.index("--output_dir") + 1])
    shutil.rmtree(folder, ignore_errors=True)  # the trainings refuse a folder with checkpoints
    if "--dataset" not in options:
        options = ("--dataset", WORK / "digits", *options)
    launch(script, "--config", f"training/presets/{preset}.yaml", *options)


def train_guide() -> None:
    """PPAP's classifier of clean digits, images that the unconditional pipeline draws, and the experts made of both."""
    fit_classifier(WORK / "classifier")
    shutil.rmtree(DRAWN, ignore_errors=True)
    launch(
        "generate_guidance_data", "--pipeline", WORK / "ppap/pipeline", "--num_images", 3000, "--batch_size", 500,
        "--output_dir", DRAWN,
    )  # fmt: skip
    experts = WORK / "ppap_experts"
    train(
        "train_ppap", "ppap_digits", "--base_model", WORK / "classifier", "--dataset", DRAWN, "--output_dir", experts
    )


def ship(name: str) -> None:
    """From the trainings' folders to the Space's."""
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    DiffusionPipeline.from_pretrained(WORK / name / "pipeline", dtype=torch.float16).save_pretrained(folder)
    leave_out_code(folder)
    if name == "ppap":
        # as trained, in float32: the experts know their network by its checksum
        shutil.copytree(WORK / "classifier", folder / "base_model")
        experts = GuidanceExperts.from_pretrained(WORK / "ppap_experts/experts", base_model=folder / "base_model")
        experts.register_to_config(base_model_name_or_path="base_model")
        experts.save_pretrained(folder / "experts")


def leave_out_code(folder: Path) -> None:
    """The Space has the package; a copy of its code beside each model would only grow old."""
    for path in folder.rglob("*.py"):
        path.unlink()
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    config["_class_name"] = config["_class_name"][-1]  # was [file, class]
    index.write_text(json.dumps(config, indent=2) + "\n")


def recognised(system: System) -> float:
    """Share of what it draws that a logistic regression on the real digits reads as the class asked for."""
    count = NUM_CLASSES * SAMPLES_PER_CLASS
    images = system.draw(
        ALL_CLASSES, count, scale=system.default_scale, num_inference_steps=25, scheduler="DDPM", seed=0
    )
    pixels = system.pipeline.image_processor.pil_to_numpy(images).reshape(count, -1)  # (N, 64) in [0, 1]
    return float((fit_reader().predict(pixels) == system.labels(ALL_CLASSES, count)).mean())


def draw_examples() -> None:
    """What the Space shows before anything is computed."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir()
    studio = Studio(load_systems(setting="")[0])
    for request, examples in EXAMPLES.items():
        for example in examples:
            answer = getattr(studio, request)(*example.values)
            first = answer[0]  # a picture, or a comparison's with their captions
            pictures = [picture for picture, _ in first] if isinstance(first, list) else answer[:2]
            pictures = [picture for picture in pictures if isinstance(picture, Image.Image)]
            for picture, path in zip(pictures, example.paths(len(pictures))):
                picture.quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(TRAININGS)}; all by default; 'examples' alone draws the pictures"
    )
    names = parser.parse_args().names or list(TRAININGS)
    if names == ["examples"]:
        draw_examples()
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
    draw_examples()
    systems, _ = load_systems(setting="")
    report = {name: round(recognised(systems[name]), 4) for name in names}
    report["megabytes"] = round(sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) / 1e6, 2)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
