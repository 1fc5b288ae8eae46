"""Encode images and their captions with a text-to-image pipeline's own VAE and text encoders, once, for any training of it.

accelerate launch training/encode_prompts.py --pipeline stabilityai/stable-diffusion-3-medium-diffusers \\
  --dataset path/to/images --resolution 1024 --dtype bfloat16 --output_dir outputs/encoded

Train on them with `train_text_to_image.py --dataset outputs/encoded`.
"""

from diffusers_dmp.training.data.prompt_encoding import PromptEncodingArguments, encode_prompts
from diffusers_dmp.training.parsing import run_entry_point

if __name__ == "__main__":
    run_entry_point(PromptEncodingArguments, encode_prompts)
