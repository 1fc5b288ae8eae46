"""Images from sentences: the same denoising as Stable Diffusion 3's pipeline, with one sentence encoder."""

import subprocess
import sys

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_pipelines import image_vae, randn, seeded
from tiny_sentences import MAX_SEQUENCE_LENGTH, TEXT_WIDTH, sentence_pipe, transformer
from torch import nn

from diffusers_dmp import DenoiserExperts, LoraExperts, NoiseIntervals, SentenceToImagePipeline

PROMPTS = ["a photo of a dress", "an ankle boot", "a handwritten seven"]
FEW_STEPS = {"num_inference_steps": 3, "output_type": "latent"}


def seeds(number: int) -> list[torch.Generator]:
    return [seeded(seed) for seed in range(number)]


def give_lora(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Give a model a LoRA that changes its outputs, take it off again, and return its weights."""
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(model)
    weights = {name: randn(*value.shape, seed=seed + index) for index, (name, value) in enumerate(weights.items())}
    model.unload_lora()
    return weights


@pytest.fixture(scope="module")
def pipeline() -> SentenceToImagePipeline:
    return sentence_pipe()


def test_denoises_as_stable_diffusion_3(pipeline):
    """With the same embeddings, noise and scheduler, the images are those of the stock pipeline."""
    texts = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    model = transformer(in_channels=4, out_channels=4)
    vae = image_vae(4)
    stock = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, **texts)
    stock.set_progress_bar_config(disable=True)
    own = SentenceToImagePipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae)
    own.set_progress_bar_config(disable=True)
    text = {
        "prompt_embeds": randn(2, 5, TEXT_WIDTH),
        "pooled_prompt_embeds": randn(2, TEXT_WIDTH, seed=1),
        "negative_prompt_embeds": randn(2, 5, TEXT_WIDTH, seed=2),
        "negative_pooled_prompt_embeds": randn(2, TEXT_WIDTH, seed=3),
    }
    arguments = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "np"}
    expected = stock(**text, **arguments, generator=seeded()).images
    assert torch.equal(torch.tensor(own(**text, **arguments, generator=seeded()).images), torch.tensor(expected))


def test_the_prompt_matters_and_so_does_the_seed(pipeline):
    first, second = pipeline(PROMPTS[:2], **FEW_STEPS, generator=[seeded(), seeded()]).images
    assert not torch.allclose(first, second, atol=1e-3)
    other = pipeline(PROMPTS[0], **FEW_STEPS, generator=seeded(1)).images[0]
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(
        pipeline(PROMPTS[0], **FEW_STEPS, generator=seeded(1)).images[0], other
    )  # the same computation again


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_sample_does_not_depend_on_its_neighbours(pipeline, guidance_scale):
    together = pipeline(PROMPTS, **FEW_STEPS, guidance_scale=guidance_scale, generator=seeds(3)).images
    for prompt, image, generator in zip(PROMPTS, together, seeds(3), strict=True):
        alone = pipeline(prompt, **FEW_STEPS, guidance_scale=guidance_scale, generator=generator).images[0]
        torch.testing.assert_close(alone, image)


def test_encoded_prompts_do_not_depend_on_their_padding(pipeline):
    """Neither padding nor a longer prompt in the batch changes tokens and mean; padded places are zero."""
    prompt_embeds, pooled = pipeline.encode_prompt(PROMPTS)
    assert prompt_embeds.shape == (3, MAX_SEQUENCE_LENGTH, TEXT_WIDTH) and pooled.shape == (3, TEXT_WIDTH)
    tokens = pipeline.tokenizer(PROMPTS[1], return_tensors="pt")
    with torch.no_grad():
        hidden = pipeline.text_encoder(**tokens).last_hidden_state[0]
    torch.testing.assert_close(prompt_embeds[1, : len(hidden)], hidden)
    assert not prompt_embeds[1, len(hidden) :].any()
    torch.testing.assert_close(pooled[1], hidden.mean(dim=0))


def test_embeddings_replace_the_prompt(pipeline):
    expected = pipeline(PROMPTS, "a dress", **FEW_STEPS, generator=seeded()).images
    embeds, pooled = pipeline.encode_prompt(PROMPTS)
    negative, negative_pooled = pipeline.encode_prompt("a dress")
    images = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        **FEW_STEPS,
        generator=seeded(),
    ).images
    assert torch.equal(images, expected)


def test_guidance_of_1_ignores_the_negative_prompt(pipeline):
    plain, guided = ({**FEW_STEPS, "guidance_scale": scale} for scale in (1.0, 3.0))
    images = [pipeline(PROMPTS[0], negative, **plain, generator=seeded()).images for negative in (None, "a dress")]
    assert torch.equal(*images)
    images = [pipeline(PROMPTS[0], negative, **guided, generator=seeded()).images for negative in ("", "a dress")]
    assert not torch.allclose(*images, atol=1e-3)


def test_several_images_of_each_prompt(pipeline):
    images = pipeline(PROMPTS[:2], **FEW_STEPS, num_images_per_prompt=2, generator=seeds(4)).images
    one_by_one = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    torch.testing.assert_close(images, pipeline(one_by_one, **FEW_STEPS, generator=seeds(4)).images)


def test_output_types(pipeline):
    call = {"num_inference_steps": 1, "prompt": PROMPTS[:2]}
    assert [image.mode for image in pipeline(**call).images] == ["L", "L"]
    assert pipeline(**call, output_type="np").images.shape == (2, 8, 8, 1)
    (images,) = pipeline(**call, output_type="pt", height=16, return_dict=False)
    assert images.shape == (2, 1, 16, 8) and images.min() >= 0 and images.max() <= 1


def test_a_callback_sees_and_changes_the_latents(pipeline):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), pipe.guidance_scale, pipe.num_timesteps))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipeline(PROMPTS[0], **FEW_STEPS, callback_on_step_end=stop).images
    assert not images.any()
    assert [step for step, *_ in seen] == [0, 1, 2] and seen[0] == (0, 1000.0, 3.0, 3)


def test_other_flow_schedulers_and_a_vae():
    pipeline = sentence_pipe(transformer(in_channels=4, out_channels=4), vae=image_vae(4))
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    images = pipeline(PROMPTS[0], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 8, 8) and images.isfinite().all()


def test_saved_and_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is SentenceToImagePipeline and loaded.config.max_sequence_length == MAX_SEQUENCE_LENGTH
    call = {"prompt": PROMPTS, **FEW_STEPS}
    assert torch.equal(loaded(**call, generator=seeded()).images, pipeline(**call, generator=seeded()).images)
    without_text = DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert without_text.text_encoder is None and without_text.tokenizer is None
    only_text = DiffusionPipeline.from_pretrained(tmp_path, transformer=None)
    assert torch.equal(only_text.encode_prompt(PROMPTS)[0], pipeline.encode_prompt(PROMPTS)[0])
    assert only_text.config.image_channels == 1


@pytest.mark.slow
def test_loads_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    expected = pipeline(PROMPTS, **FEW_STEPS, generator=seeded()).images
    code = (
        "import sys, torch, diffusers_dmp; from diffusers import DiffusionPipeline; "
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + '/pipeline'); "
        "call = {'num_inference_steps': 3, 'output_type': 'latent', 'generator': torch.Generator().manual_seed(0)}; "
        f"torch.save(pipe({PROMPTS!r}, **call).images, sys.argv[1] + '/images.pt')"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected)
    assert "Expected types" not in result.stderr


def test_a_lora_is_loaded_scaled_and_taken_off(tmp_path):
    pipeline = sentence_pipe()
    call = {"prompt": PROMPTS[0], **FEW_STEPS}
    plain = pipeline(**call, generator=seeded()).images
    SentenceToImagePipeline.save_lora_weights(tmp_path, transformer_lora_layers=give_lora(pipeline.transformer))
    pipeline.load_lora_weights(tmp_path)
    adapted = pipeline(**call, generator=seeded()).images
    assert not torch.allclose(adapted, plain, atol=1e-3)
    off = pipeline(**call, joint_attention_kwargs={"scale": 0.0}, generator=seeded()).images
    torch.testing.assert_close(off, plain)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline(**call, generator=seeded()).images, plain)


def test_refuses_a_file_without_a_lora_of_the_transformer(pipeline):
    with pytest.raises(ValueError, match="LoRA with weights of the transformer, .* but got unet.conv.lora_A.weight"):
        pipeline.load_lora_weights({"unet.conv.lora_A.weight": randn(2, 4)})


def test_experts_of_noise_intervals(tmp_path):
    """Whole denoisers and LoRAs per interval act at the steps of their intervals, and at no others."""
    intervals = NoiseIntervals.from_sigmas([0.5])
    models = [transformer(0), transformer(1)]
    call = {"prompt": PROMPTS[0], **FEW_STEPS}
    experts = sentence_pipe(DenoiserExperts(models, intervals))
    switched = sentence_pipe(models[1])

    def switch(pipe, step, timestep, tensors):
        following = pipe.scheduler.timesteps[step + 1] if step + 1 < pipe.num_timesteps else 0
        pipe.transformer = models[int(following >= 500)]
        return tensors

    expected = switched(**call, callback_on_step_end=switch, generator=seeded()).images
    assert torch.equal(experts(**call, generator=seeded()).images, expected)

    pipeline = sentence_pipe()
    SentenceToImagePipeline.save_lora_weights(tmp_path, transformer_lora_layers=give_lora(pipeline.transformer))
    pipeline.load_lora_weights(tmp_path, adapter_name="noisy")

    def switch_lora(pipe, step, timestep, tensors):
        following = pipe.scheduler.timesteps[step + 1] if step + 1 < pipe.num_timesteps else 0
        pipe.enable_lora() if following >= 500 else pipe.disable_lora()
        return tensors

    expected = pipeline(**call, callback_on_step_end=switch_lora, generator=seeded()).images
    pipeline.enable_lora()
    adapted = pipeline(**call, generator=seeded()).images
    LoraExperts([[], ["noisy"]], intervals).attach(pipeline.transformer)
    images = pipeline(**call, generator=seeded()).images
    torch.testing.assert_close(images, expected)
    assert not torch.allclose(images, adapted, atol=1e-5)


EMBEDS = {"prompt_embeds": randn(2, 5, TEXT_WIDTH), "pooled_prompt_embeds": randn(2, TEXT_WIDTH)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Expected `prompt`, or `prompt_embeds` and `pooled_prompt_embeds`, but got none of them"),
        ({"prompt": "a dress", **EMBEDS}, "`prompt_embeds` and `pooled_prompt_embeds`, but got both"),
        ({"prompt_embeds": EMBEDS["prompt_embeds"]}, "but got no `pooled_prompt_embeds`"),
        (
            {**EMBEDS, "pooled_prompt_embeds": randn(3, TEXT_WIDTH)},
            "as many `prompt_embeds` as `pooled_prompt_embeds`",
        ),
        (
            {**EMBEDS, "prompt_embeds": randn(2, 5, 7)},
            r"`prompt_embeds` to be of shape \(B, L, 16\), but got \(2, 5, 7\)",
        ),
        (
            {**EMBEDS, "negative_prompt": "", "negative_prompt_embeds": EMBEDS["prompt_embeds"]},
            "`negative_prompt`, or `negative_prompt_embeds` and `negative_pooled_prompt_embeds`, but got both",
        ),
        ({**EMBEDS, "negative_prompt_embeds": randn(1, 5, 16)}, "but got no `negative_pooled_prompt_embeds`"),
        (EMBEDS, r"negative prompts of the shape \(5, 16\) as those of prompts, but got \(8, 16\)"),
        ({"prompt": []}, r"`prompt` to be a text or a list of texts, but got \[\]"),
        ({"prompt": 7}, "`prompt` to be a text or a list of texts, but got 7"),
        (
            {"prompt": ["a"] * 3, "negative_prompt": ["b"] * 2},
            "`negative_prompt` to be one text or 3 of them, but got 2",
        ),
        ({"prompt": "a", "num_images_per_prompt": 0}, "`num_images_per_prompt` to be an integer of at least 1"),
        ({"prompt": "a", "num_inference_steps": 0}, "`num_inference_steps` to be an integer of at least 1"),
        ({"prompt": "a", "height": 10}, "`height` and `width` to be divisible by 4, but got 10 x 8"),
        ({"prompt": "a", "generator": seeds(2)}, "`generator` to be one or a list of 1, but got 2"),
        ({"prompt": "a", "latents": randn(1, 1, 4, 4)}, r"`latents` to be a tensor of shape \(1, 1, 8, 8\)"),
        ({"prompt": "a", "output_type": "jpg"}, "`output_type` to be 'pil', 'np', 'pt' or 'latent', but got 'jpg'"),
        (
            {"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]},
            r"`callback_on_step_end_tensor_inputs` to be among \['latents'\], but got \['noise'\]",
        ),
    ],
)
def test_refuses_arguments_that_do_not_fit(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_refuses_unknown_arguments(pipeline):
    with pytest.raises(TypeError, match="guidance"):
        pipeline("a dress", guidance=3.0)


def test_refuses_components_that_do_not_fit():
    with pytest.raises(
        ValueError,
        match="`text_encoder` of the hidden size 8, the transformer's `joint_attention_dim`, but got one of 16",
    ):
        sentence_pipe(transformer(joint_attention_dim=8))
    with pytest.raises(ValueError, match="a DDIMScheduler with other noise levels; `FlowMatchEulerDiscreteScheduler"):
        pipeline = sentence_pipe()
        pipeline.scheduler = DDIMScheduler()
        pipeline("a dress")
    with pytest.raises(ValueError, match="with `text_encoder` and `tokenizer` to encode prompts, but got one without"):
        SentenceToImagePipeline(transformer(), FlowMatchEulerDiscreteScheduler())("a dress")


def test_says_which_prompt_is_cut(pipeline):
    with pytest.warns(UserWarning, match="The end of 'a photo of a photo of a dress' is left out: it has 10 tokens"):
        pipeline.encode_prompt(["a dress", "a photo of a photo of a dress"])
