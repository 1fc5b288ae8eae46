"""The data of trainings: images, their latents, generated images, batches, and shards that hold them."""
