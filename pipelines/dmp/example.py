"""Generate digits by a DiT with prompts and by the same DiT without: `python pipelines/dmp/example.py [FOLDER OR HUB ID]`."""

import sys

import torch
from diffusers import DiffusionPipeline

import diffusers_dmp  # noqa: F401  registers its classes
from diffusers_dmp.plots import comparison_figure, sample_grid

pipe = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "outputs/dmp_digits/pipeline")
grids = {}
for name in ("with prompts", "without prompts"):
    images = pipe(list(range(10)), num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images
    grids[name] = sample_grid([[image] for image in images], pixel_size=6)
    if pipe.prompt_patch is not None:
        pipe.prompt_patch.detach()  # the transformer is as before
comparison_figure(grids).savefig("dmp_samples.png")
