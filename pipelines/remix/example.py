"""Generate digits by all experts and by the last expert alone: `python pipelines/remix/example.py [FOLDER OR HUB ID]`."""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_dmp import ClassConditionalPipeline
from diffusers_dmp.plots import comparison_figure, sample_grid

pipe = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "outputs/remix_digits/pipeline")
last = pipe.transformer.config.num_experts - 1
# a plain DiT with the weights of the last expert, here for all noise levels
alone = ClassConditionalPipeline(pipe.transformer.bake_expert(last), pipe.scheduler)
grids = {}
for name, each in {"all experts": pipe, f"expert {last} alone": alone}.items():
    images = each(list(range(10)), num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images
    grids[name] = sample_grid([[image] for image in images], pixel_size=6)
comparison_figure(grids).savefig("remix_samples.png")
