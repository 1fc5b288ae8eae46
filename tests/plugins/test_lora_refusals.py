"""What a LoRA per interval is refused for, and on which models it works."""

import gc
import weakref

import pytest
import torch
from conftest import TINY_CONFIG
from diffusers import DiTTransformer2DModel, UNet2DModel, UNetSpatioTemporalConditionModel
from loras import activate, add_loras, inputs_of, output_of
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_pipelines import RECIPES, filled, generate, randn, wan, wan_pipe
from torch import nn

from diffusers_dmp import DenoiserExperts, DiTModel, DTRTransformer2DModel, LoraExperts, NoiseIntervals, RemixDiTModel

TWO = NoiseIntervals.from_timesteps([500])


@pytest.fixture
def denoiser():
    return activate(add_loras(RECIPES["sd3"].denoiser(), ["low", "high"]), [("low", 1.0)])


# Refused


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["low"], "one entry for each interval, but got 1 for 2 intervals"),
        (["low", "high", None], "but got 3 for 2 intervals"),
        ("lo", "one entry for each interval, but got 'lo'"),
        ([("low", "high"), None], r"a name and a weight \(\"low\", 0.5\)"),
        ([("low", float("nan")), None], "a name and a weight"),
        ([["low", "low"], None], "name each adapter once"),
        ([0.5, None], "a name and a weight"),
    ],
)
def test_adapters(adapters, message):
    with pytest.raises(ValueError, match=message):
        LoraExperts(adapters, TWO)


def test_an_adapter_that_is_not_loaded(denoiser):
    with pytest.raises(ValueError, match="loaded ones of the SD3Transformer2DModel, high, low, but got hihg"):
        LoraExperts(["low", "hihg"], TWO).attach(denoiser)
    with pytest.raises(ValueError, match="which has none"):
        LoraExperts(["low", "high"], TWO).attach(RECIPES["sd3"].denoiser())
    assert LoraExperts.attached_to(denoiser) is None


def test_attaching_twice(denoiser):
    experts = LoraExperts(["low", "high"], TWO).attach(denoiser)
    with pytest.raises(ValueError, match="attached to nothing, but got some that are"):
        experts.attach(denoiser)
    with pytest.raises(ValueError, match="without LoraExperts, but got one with some"):
        LoraExperts(["low", None], TWO).attach(denoiser)
    experts.detach()
    with pytest.raises(ValueError, match="but got some that are not"):
        experts.detach()
    experts.attach(denoiser)


def test_adapters_that_cannot_be_switched(denoiser):
    experts = LoraExperts(["low", "high"], TWO)
    denoiser.fuse_lora(adapter_names=["high"])
    with pytest.raises(ValueError, match="they are fused; `unfuse_lora"):
        experts.attach(denoiser)
    denoiser.unfuse_lora()
    denoiser.disable_lora()
    with pytest.raises(ValueError, match="they are off; `enable_lora"):
        experts.attach(denoiser)
    denoiser.enable_lora()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k"], modules_to_save=["proj_out"]), denoiser, "other")
    with pytest.raises(ValueError, match="that can be scaled, such as LoRA, but the SD3Transformer2DModel has others"):
        experts.attach(denoiser)


def test_other_targets():
    experts = LoraExperts(["default", None], TWO)
    config = LoraConfig(r=2, target_modules=["to_q"])
    with pytest.raises(ValueError, match="to be a model, but got a PeftModel"):
        experts.attach(get_peft_model(RECIPES["sd3"].denoiser(), config))
    with pytest.raises(ValueError, match="attach to one of its `experts`"):
        experts.attach(DenoiserExperts([RECIPES["sd3"].denoiser(), RECIPES["sd3"].denoiser()], TWO))
    unknown = object.__new__(UNetSpatioTemporalConditionModel)
    nn.Module.__init__(unknown)
    with pytest.raises(ValueError, match="register_time_argument"):
        experts.attach(unknown)
    with pytest.raises(ValueError, match="one `transformer` or `unet`"):
        experts.attach(wan_pipe(wan(), transformer_2=wan()))  # two, and nothing says which of them owns what
    with pytest.raises(ValueError, match="500"):
        LoraExperts([None, None], NoiseIntervals.uniform(2, 500)).attach(wan_pipe(wan()))


# Models and kinds of adapters


def test_dora():
    """Its adapters change the norm of a layer's weights; mixed batches are exact nevertheless."""
    add = {"names": ["low", "high"], "use_dora": True}
    denoiser = add_loras(RECIPES["flux"].denoiser(), **add)
    LoraExperts(["low", "high"], TWO).attach(denoiser)
    inputs = inputs_of("flux", [900.0, 100.0])
    output = output_of(denoiser, inputs)
    for name, sample in (("high", 0), ("low", 1)):
        alone = activate(add_loras(RECIPES["flux"].denoiser(), **add), [(name, 1.0)])
        torch.testing.assert_close(output[sample], output_of(alone, inputs)[sample])


OTHERS = {
    "DiTTransformer2DModel": (
        lambda: DiTTransformer2DModel(
            2, 4, 4, 4, num_layers=2, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=1
        ),
        ["to_q", "to_v"],
    ),
    "UNet2DModel": (
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            norm_num_groups=2,
            attention_head_dim=4,
            num_class_embeds=11,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        ["to_q", "conv1"],
    ),
    "DiTModel": (lambda: DiTModel(**TINY_CONFIG), ["to_qkv"]),
    "DTRTransformer2DModel": (lambda: DTRTransformer2DModel(**TINY_CONFIG), ["to_qkv"]),
    "RemixDiTModel": (lambda: RemixDiTModel(**TINY_CONFIG), ["proj_out_2"]),
}


@pytest.mark.parametrize("class_name", OTHERS)
def test_models_without_peft_methods(class_name):
    make, targets = OTHERS[class_name]
    torch.manual_seed(0)
    denoiser = filled(make(), 0)
    for name in ("low", "high"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), denoiser, name)
    denoiser.requires_grad_(False)
    timesteps = torch.tensor([900, 100])
    size = (2, denoiser.config.in_channels, denoiser.config.sample_size, denoiser.config.sample_size)
    inputs = (randn(*size), timesteps), {"class_labels": torch.tensor([1, 2])}
    expected = {name: output_of(activate(denoiser, [(name, 1.0)]), inputs) for name in ("low", "high")}
    assert not torch.allclose(expected["low"], expected["high"])

    LoraExperts(["low", "high"], TWO).attach(denoiser)
    output = output_of(denoiser, inputs)
    torch.testing.assert_close(output, torch.stack([expected["high"][0], expected["low"][1]]))


# A pipeline


def test_a_pipeline_is_not_kept_alive():
    recipe = RECIPES["flux"]
    pipe = recipe.pipe(add_loras(recipe.denoiser(), ["low", "high"]))
    transformer, reference = pipe.transformer, weakref.ref(pipe)
    experts = LoraExperts(["low", "high"], TWO).attach(pipe)
    generate("flux", pipe, 1)
    del pipe
    gc.collect()
    assert reference() is None
    generate("flux", recipe.pipe(transformer), 1)
    assert experts.detach() is experts


def test_repr():
    experts = LoraExperts([None, ("low", 0.5), ["high", ("style", 0.3)]], NoiseIntervals((0, 300, 800, 1000)))
    assert repr(experts) == "LoraExperts([None, ('low', 0.5), ['high', ('style', 0.3)]], edges=(0, 300, 800, 1000))"
    assert experts.names == ["low", "high", "style"]
