"""Tiny random CLIPs and SigLIPs of the real classes, saved with their tokenizers and image processors as the Hub has them."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import filled
from tiny_text import clip_tokenizer, t5_tokenizer
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE_SIZE = 16


def save_clip(folder: Path, seed: int = 4, **vision: Any) -> str:
    tokenizer = clip_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = SIZES | special | {"vocab_size": len(tokenizer)}
    images = SIZES | {"image_size": IMAGE_SIZE, "patch_size": 4} | vision
    # the towers' own `projection_dim` stays at 512, as in many published CLIPs
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=images, projection_dim=8))
    settings = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    settings |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": IMAGE_SIZE}}
    settings |= {"do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    return _save(folder, network, seed, tokenizer, settings)


def save_siglip(folder: Path, seed: int = 4, **vision: Any) -> str:
    """With an own size of embeddings, and with a tokenizer of the kind of T5's, which is theirs."""
    tokenizer = t5_tokenizer()
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = SIZES | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    images = SIZES | {"hidden_size": 24, "image_size": IMAGE_SIZE, "patch_size": 4} | vision
    network = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 24}, vision_config=images))
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "SiglipImageProcessor"}
    settings |= {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    return _save(folder, network, seed, tokenizer, settings)


def _save(folder: Path, network: PreTrainedModel, seed: int, tokenizer: Any, settings: dict[str, Any]) -> str:
    filled(network, seed)
    with torch.no_grad():  # so that cosines of either sign occur
        for parameter in network.parameters():
            parameter.mul_(10)
        network.logit_scale.fill_(1.5)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)
