"""Generate each digit four times, and plot the channels of each timestep: `python pipelines/dtr/example.py [FOLDER OR HUB ID]`."""

import sys

import torch
from diffusers import DiffusionPipeline

import diffusers_dmp  # noqa: F401  registers its classes
from diffusers_dmp.plots import routing_figure, sample_grid

folder = sys.argv[1] if len(sys.argv) > 1 else "outputs/demo/pipeline"  # from `make demo`
pipe = DiffusionPipeline.from_pretrained(folder)
labels = [digit for digit in range(10) for _ in range(4)]
generator = torch.Generator().manual_seed(0)
images = pipe(labels, guidance_scale=1.5, num_inference_steps=25, generator=generator).images
sample_grid([images[i : i + 4] for i in range(0, len(images), 4)], pixel_size=6).save("dtr_samples.png")
routing_figure(pipe.transformer, timestep=300).savefig("dtr_routing.png")
