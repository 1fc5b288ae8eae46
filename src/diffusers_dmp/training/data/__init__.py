"""What training reads and what is made for it: images, latents and generated images, in shards."""

from ...saving.moved import old_names

__getattr__ = old_names(__name__)  # of the module that had this package's name
