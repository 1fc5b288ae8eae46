"""Train a DiT with Denoising Task Routing (https://arxiv.org/abs/2310.07138).

accelerate launch training/train_dtr.py --config training/presets/dtr_digits.yaml [--any_field value]
"""

from dataclasses import dataclass
from functools import partial

from diffusers_dmp import DTRTransformer2DModel
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training.arguments import DiTTrainingArguments, RoutingArguments, option
from diffusers_dmp.training.dit_family import train_dit
from diffusers_dmp.training.parsing import run_entry_point


@dataclass(kw_only=True)
class DTRTrainingArguments(RoutingArguments, DiTTrainingArguments):
    """A DiT with task routing."""

    routing: str = option("window", "window, or random for the paper's baseline.")


if __name__ == "__main__":
    run_entry_point(DTRTrainingArguments, with_hub(partial(train_dit, DTRTransformer2DModel)))
