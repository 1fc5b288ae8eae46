"""What is loaded of a pipeline to encode images and captions."""

import pytest
import torch
from tiny_pipelines import RECIPES, wan, wan_pipe
from tiny_text import with_text

from diffusers_dmp.training.data.encoding_pipeline import load_encoding_pipeline
from diffusers_dmp.training.text_pipelines import text_pipeline_of


def test_no_denoiser_is_loaded_not_even_an_optional_one(tmp_path):
    with_text("wan", wan_pipe(wan(0), transformer_2=wan(1), boundary_ratio=0.875)).save_pretrained(tmp_path)
    pipe = load_encoding_pipeline(str(tmp_path), torch.float32)
    assert pipe.transformer is None and pipe.transformer_2 is None
    assert pipe.text_encoder is not None and pipe.vae is not None


def test_stable_diffusion_3_without_t5_and_transformer():
    """Its own `encode_prompt` reads the transformer's configuration for the zeros in the place of T5's tokens."""
    pipe = with_text("sd3", RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser()))
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert not text_pipeline_of(pipe).encode_prompts(pipe, ["left"])["prompt_embeds"][:, 77:].any()
    pipe.register_modules(transformer=None)
    with pytest.raises(ValueError, match="with `text_encoder_3`, or else with its `transformer`"):
        text_pipeline_of(pipe).encode_prompts(pipe, ["left"])
