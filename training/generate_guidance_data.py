"""Generate the images that guidance experts are trained on, without data or labels (PPAP, https://arxiv.org/abs/2212.05973).

accelerate launch training/generate_guidance_data.py --pipeline outputs/unconditional/pipeline --num_images 500000
"""

from diffusers_dmp.training.data.generation import GenerationArguments, generate_images
from diffusers_dmp.training.parsing import run_entry_point

if __name__ == "__main__":
    run_entry_point(GenerationArguments, generate_images)
