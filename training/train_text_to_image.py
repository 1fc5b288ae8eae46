"""Train LoRA experts, or something else, for a text-to-image pipeline of Diffusers, on what encode_prompts.py has written.

accelerate launch training/train_text_to_image.py --pretrained_model_name_or_path PIPELINE --dataset SHARDS \
    --method lora_experts --sigma_boundaries 0.875 [--any_field value]
"""

from diffusers_dmp.hub.pushing import with_card, with_hub
from diffusers_dmp.training.parsing import run_entry_point
from diffusers_dmp.training.text_to_image import TextToImageArguments, train_text_to_image

if __name__ == "__main__":
    run_entry_point(TextToImageArguments, with_hub(with_card(train_text_to_image)))
