"""Generate digits by two UNets, each for its own noise levels: `python pipelines/patch_diffusion/example.py [FOLDER OR HUB ID]`."""

import sys

import torch
from diffusers import DiffusionPipeline

import diffusers_dmp  # noqa: F401  registers its classes
from diffusers_dmp.plots import sample_grid, snr_split_figure

pipe = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "outputs/patch_digits/pipeline")
print(f"Steps of each denoiser, the one for the cleanest images first: {pipe.steps_per_denoiser(25)}")
labels = [digit for digit in range(10) for _ in range(4)]
images = pipe(labels, num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images
sample_grid([images[i : i + 4] for i in range(0, len(images), 4)], pixel_size=6).save("patch_samples.png")
snr_split_figure(pipe, num_inference_steps=25).savefig("patch_split.png")
