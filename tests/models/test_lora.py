"""LoRA: loaded, saved, fused and exchanged as in every model of Diffusers, and never lost in silence."""

import copy

import pytest
import torch
from conftest import TINY_CONFIG, randomised
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from small_pipelines import UNET

from diffusers_dmp import (
    ClassConditionalPipeline,
    DiTModel,
    DTRTransformer2DModel,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
    SNRSplitPipeline,
)
from diffusers_dmp.saving.adapters import adapter_names

MAKE = {
    "dit": lambda: DiTModel(**TINY_CONFIG),
    "dtr": lambda: DTRTransformer2DModel(**TINY_CONFIG),
    "remix": lambda: RemixDiTModel(**TINY_CONFIG, num_bases=2, num_experts=4),
    "unet": lambda: PatchedUNet2DModel(**UNET),
}
TARGETS = {
    "dit": ["to_qkv", "to_out", "ff.net.2"],
    "dtr": ["to_qkv", "norm1.linear"],
    "remix": ["norm1.linear", "proj_out_2"],
    "unet": ["to_q", "conv1", "to_out.0"],
}


def make_config(system: str, **settings) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[system], init_lora_weights=False, **settings)


def run(model: torch.nn.Module) -> torch.Tensor:
    """The outputs for two samples of one timestep, and for two of two timesteps."""
    sample = torch.randn(2, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        return torch.cat([model(sample, t, labels).sample for t in (torch.tensor(300), torch.tensor([100, 900]))])


@pytest.mark.parametrize("system", MAKE)
def test_save_load_switch_and_fuse(system, tmp_path):
    model = randomised(MAKE[system]())
    plain = run(model)
    model.add_adapter(make_config(system), "style")
    adapted = run(model)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    model.save_lora_adapter(tmp_path, "style")

    other = randomised(MAKE[system]())
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="style")
    torch.testing.assert_close(run(other), adapted)
    other.set_adapters("style", 0.0)
    torch.testing.assert_close(run(other), plain)
    other.set_adapters("style", 1.0)
    other.disable_lora()
    torch.testing.assert_close(run(other), plain)
    other.enable_lora()
    other.fuse_lora()
    torch.testing.assert_close(run(other), adapted, atol=1e-4, rtol=1e-4)

    other.unload_lora()  # the LoRA stays in the weights, and the model is as any other
    other.save_pretrained(tmp_path / "fused")
    loaded = type(other).from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(run(loaded), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("system", MAKE)
def test_hotswap(system, tmp_path):
    outputs = []
    for seed, name in enumerate(("first", "second")):
        model = randomised(MAKE[system]())
        torch.manual_seed(seed)
        model.add_adapter(make_config(system))
        model.save_lora_adapter(tmp_path / name)
        outputs.append(run(model))
    model = randomised(MAKE[system]())
    model.load_lora_adapter(tmp_path / "first", prefix=None, use_safetensors=True, adapter_name="default")
    torch.testing.assert_close(run(model), outputs[0])
    model.load_lora_adapter(
        tmp_path / "second", prefix=None, use_safetensors=True, adapter_name="default", hotswap=True
    )
    torch.testing.assert_close(run(model), outputs[1])


def test_training_a_lora_leaves_the_weights_alone():
    model = randomised(MAKE["dtr"]())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.requires_grad_(False)
    model.add_adapter(make_config("dtr"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1, 2])).sample.pow(2).mean().backward()
    optimizer.step()
    model.unload_lora()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_remix_dit_refuses_adapters_of_its_mixtures(tmp_path):
    dit = randomised(MAKE["dit"]())
    dit.add_adapter(make_config("dit"))
    dit.save_lora_adapter(tmp_path)
    half = tmp_path / "half"  # the first of its layers is no mixture
    dit.unload_lora()
    dit.add_adapter(LoraConfig(r=2, target_modules=["norm1.linear", "to_out"], init_lora_weights=False))
    dit.save_lora_adapter(half)
    remix = randomised(MAKE["remix"]())
    plain = run(remix)
    message = r"layers that the experts of a Remix-DiT share.*`bake_expert\(i\)`"
    with pytest.raises(ValueError, match=message):
        remix.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    with pytest.raises(ValueError, match=message):
        remix.add_adapter(LoraConfig(target_modules=["linear", "to_out"]))
    remix.save_pretrained(tmp_path / "remix")  # nothing of them stays in the model
    torch.testing.assert_close(run(remix), plain)

    remix.add_adapter(make_config("remix"), "shared")
    adapted = run(remix)
    with pytest.raises(ValueError, match=message):
        remix.add_adapter(LoraConfig(target_modules=["linear", "to_out"]), "mine")
    with pytest.raises(ValueError, match=message):
        remix.load_lora_adapter(half, prefix=None, use_safetensors=True)  # without a name: Diffusers chooses one
    assert adapter_names(remix) == set(remix.peft_config) == {"shared"}
    torch.testing.assert_close(run(remix), adapted)
    expert = remix.fuse_expert(1)
    assert expert and not torch.allclose(run(remix), plain, atol=1e-3)  # fused weights leave the adapters as they are
    torch.testing.assert_close(run(remix), adapted)

    baked = randomised(MAKE["remix"]()).bake_expert(0)
    baked.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)


@pytest.mark.parametrize(
    "system, act",
    [
        ("dit", lambda model, folder: model.save_pretrained(folder)),
        ("unet", lambda model, folder: model.save_pretrained(folder)),
        ("dit", lambda model, folder: model.to_diffusers(approximate=True)),
        ("dit", lambda model, folder: RemixDiTModel.from_dit(model)),
        ("remix", lambda model, folder: model.bake_expert(0)),
        ("dit", lambda model, folder: ClassConditionalPipeline(model, DDIMScheduler()).save_pretrained(folder)),
        ("dit", lambda model, folder: SNRSplitPipeline([model], DDIMScheduler()).save_pretrained(folder)),
    ],
)
def test_what_adapters_would_be_lost_in_is_refused(system, act, tmp_path):
    model = randomised(MAKE[system]())
    model.add_adapter(make_config(system))
    with pytest.raises(ValueError, match=r"without adapters \(LoRA\) to .*`unload_lora\(\)`"):
        act(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    model.unload_lora()
    act(model, tmp_path / "folder")


def test_stock_models_with_adapters_are_refused_as_well(tmp_path):
    stock = randomised(DiTModel(**TINY_CONFIG, downscale_freq_shift=1.0)).to_diffusers()
    assert isinstance(stock, DiTTransformer2DModel)
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), stock)
    with pytest.raises(ValueError, match=r"without adapters \(LoRA\) to convert it"):
        DiTModel.from_diffusers(stock)
    with pytest.raises(ValueError, match=r"without adapters \(LoRA\) to save the pipeline's `transformer`"):
        ClassConditionalPipeline(stock, DDIMScheduler()).save_pretrained(tmp_path)


def test_a_model_that_peft_has_wrapped_is_refused(tmp_path):
    model = randomised(MAKE["dit"]())
    pipeline = ClassConditionalPipeline(copy.deepcopy(model), DDIMScheduler())
    wrapped = get_peft_model(copy.deepcopy(model), make_config("dit"))
    with pytest.raises(ValueError, match=r"`transformer` to be a model, but got a PeftModel.*merge_and_unload"):
        ClassConditionalPipeline(wrapped, DDIMScheduler())
    with pytest.raises(ValueError, match=r"`denoiser_0` to be a model, but got a PeftModel"):
        SNRSplitPipeline([wrapped], DDIMScheduler())
    with pytest.raises(ValueError, match=r"`transformer` to be a model, but got a PeftModel"):
        PromptPatch.for_transformer(model).attach(wrapped)
    pipeline.transformer = wrapped
    with pytest.raises(ValueError, match=r"`transformer` to be a model, but got a PeftModel"):
        pipeline.save_pretrained(tmp_path)

    pipeline.transformer = wrapped.merge_and_unload()
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path).transformer
    torch.testing.assert_close(run(loaded), run(pipeline.transformer))
    assert not torch.allclose(run(loaded), run(model), atol=1e-3)


def test_prompts_and_lora_in_one_transformer():
    def make(first: str) -> DiTModel:
        """LoRA in the embedder of the timestep, too, on which the prompts' gates depend."""
        torch.manual_seed(0)
        model = randomised(MAKE["dit"]())
        patch = randomised(PromptPatch.for_transformer(model))
        config = LoraConfig(r=2, target_modules=["to_qkv", "linear_1"], init_lora_weights=False)
        if first == "lora":
            model.add_adapter(config)
        patch.attach(model).eval()
        if first == "prompts":
            model.add_adapter(config)
        return model

    model = make("lora")
    adapted = run(model)
    torch.testing.assert_close(run(make("prompts")), adapted)
    model.disable_lora()  # no gate comes from a cache of before
    disabled = run(model)
    assert not torch.allclose(disabled, adapted, atol=1e-3)
    plain = randomised(MAKE["dit"]())
    randomised(PromptPatch.for_transformer(plain)).attach(plain).eval()
    torch.testing.assert_close(disabled, run(plain))
