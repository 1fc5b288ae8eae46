"""The diffusion process itself: noise levels, predictions, timesteps, schedulers and latents. Each formula is here once."""
