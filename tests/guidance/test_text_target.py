"""Guidance by the similarity of images and prompts, with CLIP and SigLIP."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from networks import PLAIN, make_vit
from tiny_clip import save_clip, save_siglip
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPVisionModel
from transformers.utils import ModelOutput

from diffusers_dmp import ClassConditionalPipeline, DiTModel, GuidanceExperts, GuidedScheduler, TextTarget
from diffusers_dmp.models.vision import load_network

PROMPT, OTHERS = "a photo of a zebra", ["a horse", "nothing at all"]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
CLEAN = torch.tensor(0)
SAVE = {"clip": save_clip, "siglip": save_siglip}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


@pytest.fixture(params=SAVE)
def name(request, models) -> str:
    return models[request.param]


def experts_of(name: str, **config) -> GuidanceExperts:
    return GuidanceExperts.from_base(name, **{"num_experts": 1} | config)


@torch.no_grad()
def logits_per_image(name: str, prompts: list[str]) -> torch.Tensor:
    """As transformers computes them (B, N), with the whole model."""
    pixels = AutoImageProcessor.from_pretrained(name)(
        (IMAGES + 1).mul(127.5).round().byte(), input_data_format="channels_first", return_tensors="pt"
    )
    length = {"max_length": 24} if "siglip" in name else {}
    tokens = AutoTokenizer.from_pretrained(name)(prompts, padding="max_length", return_tensors="pt", **length)
    model = AutoModel.from_pretrained(name).eval()
    return model(input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"]).logits_per_image


# What is computed


@torch.no_grad()
def test_the_logits_are_those_of_transformers(name):
    """Of one prompt for all images, and of one for each; up to the rounding of the images to 8 bits."""
    logits = logits_per_image(name, [PROMPT, *OTHERS])
    assert logits.std(dim=0).min() > 0.1 and logits.std(dim=1).min() > 0.1  # of images, and of prompts
    output = experts_of(name)(IMAGES, CLEAN)
    expected = logits if "siglip" not in name else F.logsigmoid(logits)
    one = TextTarget.from_pretrained(name, PROMPT).log_likelihood(output)
    each = TextTarget.from_pretrained(name, [PROMPT, *OTHERS]).log_likelihood(output)
    torch.testing.assert_close(one, expected[:, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(each, expected.diagonal(), atol=0.05, rtol=0)


@torch.no_grad()
def test_prompts_to_contrast_with(name):
    """CLIP: which of the prompts it is; SigLIP, for which each is true or not: this one, and none of the others."""
    logits = logits_per_image(name, [PROMPT, *OTHERS])
    target = TextTarget.from_pretrained(name, PROMPT, negative_prompt=OTHERS)
    if "siglip" in name:
        expected = F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(1)
    else:
        expected = F.log_softmax(logits, dim=1)[:, 0]
    torch.testing.assert_close(target.log_likelihood(experts_of(name)(IMAGES, CLEAN)), expected, atol=0.1, rtol=0)


@torch.no_grad()
def test_embeddings_of_any_length(name):
    embedded = TextTarget.from_pretrained(name, PROMPT)
    given = TextTarget(7 * embedded.text_embeds[0], embedded.logit_scale, embedded.logit_bias)
    output = experts_of(name)(IMAGES, CLEAN)
    torch.testing.assert_close(given.log_likelihood(output), embedded.log_likelihood(output))


def test_prompts_of_siglip_are_in_lower_case_and_padded_on_the_right(models, tmp_path):
    """As it was trained, whatever the tokenizer does: that of SigLIP 2 is Gemma's."""
    expected = TextTarget.from_pretrained(models["siglip"], PROMPT).text_embeds
    name = save_siglip(tmp_path / "siglip2")
    config = Path(name, "tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left"}))
    tokenizer = AutoTokenizer.from_pretrained(name)
    assert tokenizer.padding_side == "left" and tokenizer("Zebra")["input_ids"] != tokenizer("zebra")["input_ids"]
    torch.testing.assert_close(TextTarget.from_pretrained(name, "A photo of a Zebra").text_embeds, expected)


def test_images_in_float64():
    """The embeddings follow the images."""
    target = TextTarget(torch.randn(8))
    images = torch.randn(2, 8, dtype=torch.float64)
    likelihood = target.log_likelihood(ModelOutput(image_embeds=images))
    assert likelihood.dtype == torch.float64
    torch.testing.assert_close(likelihood, 100 * F.cosine_similarity(images, target.text_embeds))


# The networks


def test_the_image_tower_alone_is_loaded(name):
    network = load_network(name)
    assert type(network).__name__ in ("CLIPVisionModelWithProjection", "SiglipVisionModel")
    whole = AutoModel.from_pretrained(name)
    assert network.num_parameters() < whole.num_parameters()
    assert load_network(name, with_text=True).num_parameters() == whole.num_parameters()


def test_experts_of_a_tower_are_saved_and_loaded(name, tmp_path):
    experts = experts_of(name, num_experts=2)
    adapted = [key for key in experts.expert_tensors(0) if key.endswith("lora_A.weight")]
    assert len(adapted) == 8 and all("self_attn" in key for key in adapted)  # q, k, v and output of two layers
    with torch.no_grad():
        for tensor in experts.expert_tensors().values():
            tensor.add_(0.1)
    experts.save_pretrained(tmp_path)
    loaded = GuidanceExperts.from_pretrained(tmp_path)
    timesteps = torch.tensor([10, 900, 20])
    target = TextTarget.from_pretrained(name, PROMPT)
    target.prepare(loaded.network_config)
    with torch.no_grad():
        expected, found = (target.log_likelihood(each(IMAGES, timesteps)) for each in (experts, loaded))
    torch.testing.assert_close(found, expected)


def test_images_that_are_not_square(models, tmp_path):
    """Are resized as a whole, also where an old processor says `crop_size: 16`."""
    folder = tmp_path / "clip"
    save_clip(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"size": 16, "crop_size": 16}))
    experts = experts_of(str(folder))
    assert experts.config.image_size == [16, 16]
    assert experts(torch.zeros(1, 3, 24, 40), CLEAN).image_embeds.shape == (1, 8)


@pytest.mark.parametrize(("kind", "scale", "gain"), [("clip", 5.0, 0.5), ("siglip", 20.0, 0.1)])
def test_in_a_pipeline(models, kind, scale, gain):
    """Each of the images that a real pipeline generates fits the prompt better."""
    name = models[kind]
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "num_classes": 1}
    transformer = DiTModel(in_channels=3, out_channels=3, **sizes).eval()
    pipeline = ClassConditionalPipeline(transformer, DDIMScheduler(prediction_type="v_prediction"))
    pipeline.set_progress_bar_config(disable=True)
    experts, target = experts_of(name), TextTarget.from_pretrained(name, PROMPT)

    def generated() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = pipeline([0, 0, 0], num_inference_steps=8, generator=generator, output_type="pt").images
        with torch.no_grad():
            return target.log_likelihood(experts(images * 2 - 1, CLEAN))

    unguided = generated()
    pipeline.scheduler = GuidedScheduler(pipeline.scheduler, experts, target, scale=scale)
    assert (generated() > unguided + gain).all()


# Bad input


def test_networks_that_are_no_tower_of_the_same_model(models, tmp_path):
    target = TextTarget.from_pretrained(models["clip"], PROMPT)
    make_vit().save_pretrained(tmp_path / "vit")
    experts = GuidanceExperts.from_base(str(tmp_path / "vit"), **PLAIN, image_size=None, num_experts=1)
    message = r"an image tower of CLIP or SigLIP, with `image_embeds` .* for a TextTarget, but got a ViTForImageClassification"
    with pytest.raises(ValueError, match=message):
        GuidedScheduler(DDIMScheduler(), experts, target)
    with pytest.raises(ValueError, match="image tower of .* with model_type 'clip_vision_model', but got 'siglip_vis"):
        GuidedScheduler(DDIMScheduler(), experts_of(models["siglip"]), target)
    other = save_clip(tmp_path / "other", patch_size=8)  # with embeddings of the same length, as B/32 and B/16
    with pytest.raises(ValueError, match="image tower of .* with patch_size 4, but got 8"):
        GuidedScheduler(DDIMScheduler(), experts_of(other), target)


def test_another_model_of_the_same_architecture(models, tmp_path, caplog):
    target = TextTarget.from_pretrained(models["clip"], PROMPT)
    target.prepare(load_network(models["clip"] + "/").config)
    assert not caplog.text
    GuidedScheduler(DDIMScheduler(), experts_of(save_clip(tmp_path / "other", seed=1)), target)
    assert "comparable only if both are the same model" in caplog.text


def test_embeddings_of_another_length(models):
    output = experts_of(models["clip"])(IMAGES, CLEAN)
    with pytest.raises(ValueError, match="embeddings of images to have 5 numbers, .* but got 8"):
        TextTarget(torch.ones(5)).log_likelihood(output)
    with pytest.raises(ValueError, match="`prompt` to be for 1 or 3 images, but got 2"):
        TextTarget(torch.ones(2, 8)).log_likelihood(output)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextTarget(torch.zeros(8)), "`text_embeds` to be finite and not zero"),
        (lambda: TextTarget(torch.full((8,), torch.nan)), "`text_embeds` to be finite and not zero"),
        (lambda: TextTarget(torch.ones(1, 1, 8)), r"the shape \(B, D\) or \(D,\), but got \(1, 1, 8\)"),
        (lambda: TextTarget(torch.ones(8), negative_embeds=torch.ones(2, 7)), "to have 8 numbers each, .* but got 7"),
        (lambda: TextTarget.from_pretrained("clip", []), r"`prompt` to be a text or a list of texts, but got \[\]"),
        (lambda: TextTarget.from_pretrained("clip", "a", ["b", 3]), r"`negative_prompt` to be .*, but got \['b', 3\]"),
        (
            lambda: TextTarget.from_pretrained("nowhere/clip", "a"),
            "'nowhere/clip' to be the folder or Hub id of a CLIP",
        ),
    ],
)
def test_embeddings_and_prompts_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_that_are_incomplete(models, tmp_path):
    make_vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="to be one of CLIPModel, SiglipModel, but got the architectures .'ViTFor"):
        TextTarget.from_pretrained(tmp_path / "vit", PROMPT)
    CLIPVisionModel.from_pretrained(models["clip"]).save_pretrained(tmp_path / "vision")
    config = json.loads((tmp_path / "vision" / "config.json").read_text())
    whole = json.loads(Path(models["clip"], "config.json").read_text())
    (tmp_path / "vision" / "config.json").write_text(json.dumps(whole | {"vision_config": config}))
    with pytest.raises(ValueError, match="to hold a CLIPVisionModelWithProjection, but 'visual_projection.weight' is"):
        load_network(str(tmp_path / "vision"))
    without_head = save_siglip(tmp_path / "siglip", vision_use_head=False)
    with pytest.raises(ValueError, match="a SigLIP without its pooling head"):
        load_network(without_head)


def test_a_tokenizer_that_is_elsewhere(tmp_path):
    """As that of PickScore."""
    name = save_clip(tmp_path / "clip")
    expected = TextTarget.from_pretrained(name, PROMPT).text_embeds
    (tmp_path / "tokenizer").mkdir()
    for file in Path(name).glob("tokenizer*"):
        file.rename(tmp_path / "tokenizer" / file.name)
    with pytest.raises(ValueError, match="the tokenizer in .* the model's vocabulary of 514 tokens, but got 2"):
        TextTarget.from_pretrained(name, PROMPT)
    found = TextTarget.from_pretrained(name, PROMPT, tokenizer=tmp_path / "tokenizer").text_embeds
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="needs an environment without sentencepiece")
def test_a_tokenizer_that_needs_another_package(tmp_path):
    name = save_siglip(tmp_path / "siglip")
    for file in Path(name).glob("tokenizer*"):
        file.unlink()
    Path(name, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    with pytest.raises(
        ValueError, match="a CLIP or SigLIP with its tokenizer, but got"
    ):  # without sentencepiece, and with it
        TextTarget.from_pretrained(name, PROMPT)


def test_an_image_processor_that_does_not_say_enough(tmp_path):
    name = save_clip(tmp_path / "clip")
    settings = json.loads(Path(name, "preprocessor_config.json").read_text())
    Path(name, "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": None}))
    with pytest.raises(ValueError, match="the image processor of .* to give `image_std`, or `image_mean`, "):
        experts_of(name)


def test_a_prompt_that_is_too_long_is_cut_off(name, caplog):
    long = "word " * 40
    target = TextTarget.from_pretrained(name, [long, long + "more"])
    assert "2 of 2 prompts are longer than the" in caplog.text
    np.testing.assert_allclose(*target.text_embeds, atol=1e-6)
