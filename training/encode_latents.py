"""Encode a data set's images and their mirror images with a VAE, once, for any training in latent space.

accelerate launch training/encode_latents.py --dataset path/to/images --vae stabilityai/sd-vae-ft-ema \\
  --image_size 256 --output_dir outputs/latents

Train on them with `--dataset outputs/latents --vae stabilityai/sd-vae-ft-ema --image_size 256`.
"""

from diffusers_dmp.training.data.latents import EncodingArguments, encode_latents
from diffusers_dmp.training.parsing import run_entry_point

if __name__ == "__main__":
    run_entry_point(EncodingArguments, encode_latents)
