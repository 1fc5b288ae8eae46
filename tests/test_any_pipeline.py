"""What docs/any_pipeline.md says runs, runs: with tiny random models in the place of published ones."""

import re
import warnings

import diffusers
import pytest
import torch
from conftest import REPOSITORY
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import RECIPES, generate, wan_pipe

from diffusers_dmp import DenoiserExperts, LoraExperts, TaskRouting
from diffusers_dmp.models import time_argument as table

PAGE = (REPOSITORY / "docs" / "any_pipeline.md").read_text()
BLOCKS = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)


def run(sign: str) -> dict:
    """Execute the block of the page that has some text in it, and return its variables."""
    (code,) = (block for block in BLOCKS if sign in block)
    variables: dict = {"__name__": "recipe"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "any_pipeline.md", "exec"), variables)
    return variables


@pytest.fixture(autouse=True)
def tiny_ones(monkeypatch, tmp_path):
    """Tiny models where the recipes load published ones, and a folder to save in."""
    monkeypatch.chdir(tmp_path)
    count = iter(range(100))

    def pipe_of(name):
        recipe = RECIPES[name]
        component = recipe.component
        return lambda *_, **kwargs: recipe.pipe(kwargs.get(component) or recipe.denoiser(next(count)))

    for cls, name in ((WanPipeline, "wan"), (FluxPipeline, "flux"), (StableDiffusionXLPipeline, "sdxl")):
        monkeypatch.setattr(cls, "from_pretrained", pipe_of(name))
    for cls, name in ((FluxTransformer2DModel, "flux"), (UNet2DConditionModel, "sdxl")):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, name=name, **__: RECIPES[name].denoiser(next(count)))


def save_lora(name: str, file: str, seed: int) -> None:
    """Save a LoRA file as Diffusers does."""
    recipe = RECIPES[name]
    denoiser = recipe.denoiser()
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in denoiser.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    layers = get_peft_model_state_dict(denoiser)
    type(recipe.pipe(denoiser)).save_lora_weights(".", transformer_lora_layers=layers, weight_name=file)


def test_high_and_low_noise_lora_in_one_transformer():
    save_lora("wan", "low_noise.safetensors", 0)
    save_lora("wan", "high_noise.safetensors", 1)
    pipe = run("high_noise.safetensors")["pipe"]
    with_both = generate("wan", pipe, 4)
    LoraExperts.attached_to(pipe.transformer).detach()
    assert not torch.equal(generate("wan", pipe, 4), with_both)


def test_two_transformers_of_wan22_as_one(monkeypatch):
    low, high = (RECIPES["wan"].denoiser(seed) for seed in range(2))
    two = wan_pipe(high, transformer_2=low, boundary_ratio=0.875)
    expected = generate("wan", two, 4)
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *_, **__: two)
    variables = run("DenoiserExperts.from_pipeline")
    pipe, experts = variables["pipe"], variables["experts"]
    assert pipe.transformer is experts and [*experts.experts] == [low, high]
    assert torch.equal(generate("wan", pipe, 4), expected)
    assert experts.to_pipeline(pipe).config.boundary_ratio == 0.875


def test_a_lora_for_the_last_third_of_the_noise():
    save_lora("flux", "style.safetensors", 0)
    pipe = run("style.safetensors")["pipe"]
    latents = []
    keep = {"callback_on_step_end": lambda pipe, step, time, tensors: latents.append(tensors["latents"]) or tensors}
    generate("flux", pipe, 6, **keep)
    LoraExperts.attached_to(pipe.transformer).detach()
    pipe.transformer.disable_adapters()
    generate("flux", pipe, 6, **keep)
    sigmas = pipe.scheduler.sigmas[:6]
    same = [torch.equal(one, other) for one, other in zip(latents[:6], latents[6:])]
    assert same == (sigmas >= 1 / 3).tolist()


def test_two_sdxl_models():
    pipe = run("StableDiffusionXLPipeline")["pipe"]
    assert isinstance(pipe.unet, DenoiserExperts) and pipe.unet.intervals.edges == (0, 200, 1000)
    assert generate("sdxl", pipe, 4).isfinite().all()


def test_two_quantised_experts(monkeypatch):
    monkeypatch.setattr(diffusers, "BitsAndBytesConfig", dict)  # needs an accelerator
    offloaded = []
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", lambda self: offloaded.append(self))
    pipe = run("BitsAndBytesConfig")["pipe"]
    assert offloaded == [pipe] and len(pipe.transformer.experts) == 2
    assert generate("flux", pipe, 4).isfinite().all()


def test_routing_of_a_transformer_trained_from_scratch(monkeypatch):
    monkeypatch.setattr(diffusers, "SD3Transformer2DModel", _Tiny(RECIPES["sd3"].denoiser()))
    (routing,) = run("TaskRouting.restore")["routed"]
    assert isinstance(routing, TaskRouting) and routing.sharing_ratio == 0.8


class _Tiny:
    """In the place of a class: makes a tiny model whatever its sizes."""

    from_pretrained = SD3Transformer2DModel.from_pretrained

    def __init__(self, model):
        self.model = model

    def __call__(self, **sizes):
        return self.model


def test_the_numbers_of_who_does_what():
    (code,) = (block for block in BLOCKS if "experts_per_step" in block)
    variables: dict = {}
    statements = code.splitlines()
    calls = [line.split("  # ") for line in statements if "  # " in line]
    exec("\n".join(line for line in statements if "  # " not in line), variables)
    assert [str(eval(call, variables)) for call, _ in calls] == [result for _, result in calls]
    run("calculate_shift")


def test_a_class_of_one_s_own():
    denoiser = run("MyTransformer")["MyTransformer"]()
    assert table.time_argument_of(denoiser).name == "sigma"


def test_the_page_lists_every_class():
    listed = PAGE[PAGE.index("## Which denoisers") :]
    rows = re.findall(r"^\| (?!told|---)[^|]+\| (.+) \|$", listed, re.M)
    assert [re.findall(r"`(\w+)`", row) for row in rows] == [names.split() for _, names in table._CONVENTIONS]
    own = listed[listed.index("Not known") : listed.index("Other classes")]
    assert set(re.findall(r"`(\w+)`", own)) == set(table._TIME_OF_ITS_OWN)
