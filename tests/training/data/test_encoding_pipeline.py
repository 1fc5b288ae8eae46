"""What is loaded of a pipeline to encode images and captions."""

import torch
from tiny_pipelines import wan, wan_pipe
from tiny_text import with_text

from diffusers_dmp.training.data.encoding_pipeline import load_encoding_pipeline


def test_no_denoiser_is_loaded_not_even_an_optional_one(tmp_path):
    with_text("wan", wan_pipe(wan(0), transformer_2=wan(1), boundary_ratio=0.875)).save_pretrained(tmp_path)
    pipe = load_encoding_pipeline(str(tmp_path), torch.float32)
    assert pipe.transformer is None and pipe.transformer_2 is None
    assert pipe.text_encoder is not None and pipe.vae is not None
