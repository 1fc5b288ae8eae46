"""Training of text-to-image pipelines: LoRA experts of noise intervals, and other methods, over the one training loop."""

from .arguments import TextToImageArguments as TextToImageArguments
from .methods import METHODS as METHODS
from .methods import TrainingMethod as TrainingMethod
from .training import train_text_to_image as train_text_to_image
