"""Train a plain DiT, the baseline of all systems.

accelerate launch training/train_dit.py --config training/presets/dit_digits.yaml [--any_field value]
"""

from functools import partial

from diffusers_dmp import DiTModel
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.dit_family import train_dit
from diffusers_dmp.training.parsing import run_entry_point

if __name__ == "__main__":
    run_entry_point(DiTTrainingArguments, with_hub(partial(train_dit, DiTModel)))
