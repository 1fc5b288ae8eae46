"""The data of trainings: images, their latents, generated images, batches, and shards that hold them."""

from ...saving.moved import old_names

__getattr__ = old_names(__name__)  # of the module that had this package's name
