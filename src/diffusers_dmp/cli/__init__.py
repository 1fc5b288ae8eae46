"""`diffusers-dmp`: train, sample and guide images, convert published weights, export checkpoints, publish, plot, diagnose, describe.

The commands are in one module per topic; importing it adds them, in the order in which `--help` lists them.
"""

from .program import NAME as NAME
from .program import RENAMED as RENAMED
from .program import app as app
from .program import main as main

from . import training, sampling, guiding, folders, diagnosis  # noqa: F401, I001  # isort: skip
