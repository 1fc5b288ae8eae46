"""Conversion of ADM's UNets to Diffusers' own: equal to the published ones."""

import pytest
import torch
from conftest import Vectors, assert_matches
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

from diffusers_dmp import ClassConditionalPipeline, convert_checkpoint


@pytest.mark.parametrize("whole", [True, False], ids=["configuration", "heads only"])
@pytest.mark.parametrize("case", ["a", "b"])
@torch.no_grad()
def test_published_vectors(case, whole):
    vectors = Vectors("adm_unet_uncond")
    config = vectors.config if whole else {"num_head_channels": 16}
    model = convert_checkpoint("adm", vectors.state_dict, config)
    assert type(model) is UNet2DModel and model.config.out_channels == 6
    assert_matches(model(vectors[f"case.{case}.x"], vectors[f"case.{case}.t"]).sample, vectors[f"case.{case}.out"])


@torch.no_grad()
def test_classes_are_read_from_the_weights():
    vectors = Vectors("adm_unet_uncond")
    labels = torch.randn(7, 128)
    model = convert_checkpoint("adm", vectors.state_dict | {"label_emb.weight": labels}, {"num_head_channels": 16})
    assert model.config.num_class_embeds == 7 and torch.equal(model.class_embedding.weight, labels)


def test_as_a_pipeline(tmp_path):
    vectors = Vectors("adm_unet_uncond")
    model = convert_checkpoint("adm", vectors.state_dict, vectors.config)
    ClassConditionalPipeline(model, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


def test_the_newer_order_of_attention():
    vectors = Vectors("adm_unet_uncond")
    weights = dict(vectors.state_dict)
    for name in weights:
        if ".qkv." in name:  # from each head's q, k and v to all heads' q, all k, all v
            weights[name] = weights[name].unflatten(0, (-1, 3, 16)).transpose(0, 1).flatten(0, 2)
    model = convert_checkpoint("adm", weights, vectors.config | {"use_new_attention_order": True})
    with torch.no_grad():
        assert_matches(model(vectors["case.a.x"], vectors["case.a.t"]).sample, vectors["case.a.out"])


def test_weights_that_do_not_fit_are_named():
    vectors = Vectors("adm_unet_uncond")
    weights = dict(vectors.state_dict)
    del weights["middle_block.1.qkv.bias"]
    with pytest.raises(ValueError, match="'middle_block.1.qkv.bias', but it is missing"):
        convert_checkpoint("adm", weights, vectors.config)
    with pytest.raises(ValueError, match="'more'"):
        convert_checkpoint("adm", vectors.state_dict | {"more": torch.zeros(1)}, vectors.config)
    with pytest.raises(ValueError, match="'out.2.weight' .* 4 dimensions"):
        convert_checkpoint("adm", vectors.state_dict | {"out.2.weight": torch.zeros(1)}, vectors.config)
    with pytest.raises(ValueError, match="`resblock_updown` to be True"):
        convert_checkpoint("adm", vectors.state_dict, vectors.config | {"resblock_updown": False})
