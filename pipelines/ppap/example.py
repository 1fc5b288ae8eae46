"""Generate the digits 0 to 9 with a model without classes, guided by experts.

make demo-ppap && python pipelines/ppap/example.py
"""

import torch
from diffusers import DiffusionPipeline

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler
from diffusers_dmp.plots import comparison_figure, sample_grid

pipe = DiffusionPipeline.from_pretrained("outputs/dit_digits_unconditional/pipeline")
experts = GuidanceExperts.from_pretrained("outputs/ppap_digits/experts")
unguided = pipe.scheduler
guided = GuidedScheduler(unguided, experts, ClassTarget(list(range(10))), scale=7.5)
grids = {}
for name, scheduler in {"unguided": unguided, "guided to 0 to 9": guided}.items():
    pipe.scheduler = scheduler
    images = pipe(batch_size=10, num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images
    grids[name] = sample_grid([[image] for image in images], pixel_size=6)
comparison_figure(grids).savefig("ppap_samples.png")
