"""The diffusion process: noise levels, predictions, schedulers and latents. Every formula of it stands here once."""
