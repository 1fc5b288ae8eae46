"""Train a DiT with Denoising Task Routing (https://arxiv.org/abs/2310.07138).

accelerate launch training/train_dtr.py --config training/presets/dtr_digits.yaml [--any_field value]
"""

from dataclasses import dataclass
from functools import partial

from diffusers_dmp import DTRTransformer2DModel
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training.arguments import DiTTrainingArguments, option
from diffusers_dmp.training.dit_family import train_dit
from diffusers_dmp.training.parsing import run_entry_point


@dataclass(kw_only=True)
class DTRTrainingArguments(DiTTrainingArguments):
    """A DiT with task routing."""

    sharing_ratio: float = option(0.8, "Share of the channels that a timestep uses, in (0, 1].")
    routing_alpha: float = option(4.0, "The larger, the more the channel windows crowd towards the clean timesteps.")
    routing: str = option("window", "window, or random for the paper's baseline.")


if __name__ == "__main__":
    run_entry_point(DTRTrainingArguments, with_hub(partial(train_dit, DTRTransformer2DModel)))
