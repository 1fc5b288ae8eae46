"""What training reads and what is made for it: images, latents and generated images, in shards."""
