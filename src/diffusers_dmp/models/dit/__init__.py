"""The plain DiT that DTR and Remix-DiT build on: model, layers, and the layout of Diffusers' own."""

from ...saving.moved import old_names

__getattr__ = old_names(__name__)  # of the module that had this package's name
