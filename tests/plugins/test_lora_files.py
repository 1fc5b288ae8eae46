"""LoRA experts in files: one of Diffusers' format for each adapter, files of other trainers, and Wan2.2's two transformers."""

import json
import logging

import pytest
import torch
from loras import activate, adapters_in_use, add_loras, with_only
from peft import LoKrConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import RECIPES, generate, randn, wan, wan_pipe

from diffusers_dmp import LoraExperts, NoiseIntervals

TWO = NoiseIntervals.from_sigmas([0.875])
HALVES = NoiseIntervals.from_timesteps([500])
THREE = NoiseIntervals.from_timesteps([500, 800])


def saved(name, folder, adapters, intervals=THREE, **config):
    """What a pipeline generates with experts, which are saved in a folder."""
    recipe = RECIPES[name]
    names = list(dict.fromkeys(each for each in ("low", "high", "style") if each in str(adapters)))
    pipe = recipe.pipe(add_loras(recipe.denoiser(), names, **config))
    LoraExperts(adapters, intervals).attach(pipe).save_pretrained(folder)
    return generate(name, pipe)


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


# Saving and loading


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "zimage", "sd15"])
def test_loaded_experts_are_those_that_were_saved(tmp_path, name):
    """Also for PixArt, which has none of Diffusers' methods for adapters."""
    recipe = RECIPES[name]
    expected = saved(name, tmp_path, [[("low", 0.5), "style"], None, ["high", "style"]])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "high.safetensors", "lora_experts.json", "low.safetensors", "style.safetensors"
    ]  # fmt: skip

    pipe = recipe.pipe(recipe.denoiser())
    plain = generate(name, pipe)
    experts = LoraExperts.from_pretrained(tmp_path).attach(pipe)
    assert experts.adapters == ((("low", 0.5), ("style", 1.0)), (), (("high", 1.0), ("style", 1.0)))
    assert experts.intervals == THREE
    assert torch.equal(generate(name, pipe), expected)
    experts.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "lora_experts.json").read_text() == (tmp_path / "lora_experts.json").read_text()
    for file in tmp_path.glob("*.safetensors"):
        assert metadata_of(tmp_path / "again" / file.name) == metadata_of(file)
        torch.testing.assert_close(load_file(tmp_path / "again" / file.name), load_file(file), rtol=0, atol=0)
    experts.detach()
    assert torch.equal(generate(name, pipe), plain)

    denoiser = recipe.denoiser()
    experts.attach(denoiser)
    assert torch.equal(generate(name, recipe.pipe(denoiser)), expected)


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_everybody_loads_the_files(tmp_path, name):
    """Diffusers' own method reads rank, alpha and weights."""
    recipe = RECIPES[name]
    saved(name, tmp_path, ["low", None, "high"], lora_dropout=0.5)
    pipe = recipe.pipe(recipe.denoiser())
    pipe.load_lora_weights(tmp_path, weight_name="high.safetensors", adapter_name="mine")
    expected = generate(name, recipe.pipe(with_only(name, [("high", 1.0)])))
    assert torch.equal(generate(name, pipe), expected)


def test_the_files_say_what_they_are_for(tmp_path):
    saved("sd3", tmp_path, ["low", [("style", 0.5)], [("high", 0.25), "style"]])
    high, low, style = (metadata_of(tmp_path / f"{name}.safetensors") for name in ("high", "low", "style"))
    assert (high["modelspec.timestep_range"], low["modelspec.timestep_range"]) == ("800,1000", "0,500")
    assert style["modelspec.timestep_range"] == "500,1000"  # two intervals that touch
    said = json.loads(style["diffusers_dmp"])
    assert (said["intervals"], said["weights"], said["num_train_timesteps"]) == (
        [[500, 800], [800, 1000]],
        [0.5, 1],
        1000,
    )
    assert said["denoiser"] == "SD3Transformer2DModel"
    settings = json.loads(high["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (3, 2.0)
    assert all(key.startswith("transformer.") and ".lora_" in key for key in load_file(tmp_path / "high.safetensors"))


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_detaching_takes_out_what_was_loaded(tmp_path, name):
    recipe = RECIPES[name]
    saved(name, tmp_path, ["low", None, "high"])
    bare = recipe.denoiser()
    own = activate(add_loras(recipe.denoiser(), ["style"]), [("style", 0.7)])
    for denoiser in (bare, own):
        modules = dict(denoiser.named_modules())
        required = {key: parameter.requires_grad for key, parameter in denoiser.named_parameters()}
        attributes, adapters = dict(vars(denoiser)), adapters_in_use(denoiser)
        experts = LoraExperts.from_pretrained(tmp_path).attach(denoiser)
        assert {"low", "high"} <= denoiser.peft_config.keys()
        trained = {key for key, parameter in denoiser.named_parameters() if parameter.requires_grad}
        assert trained and all(".low." in key or ".high." in key or ".style." in key for key in trained)
        experts.detach()
        assert dict(denoiser.named_modules()) == modules
        assert {key: parameter.requires_grad for key, parameter in denoiser.named_parameters()} == required
        assert vars(denoiser).keys() == attributes.keys() and adapters_in_use(denoiser) == adapters
        assert set(getattr(denoiser, "peft_config", {})) == ({"style"} if denoiser is own else set())


def test_new_layers_are_in_the_denoisers_mode(tmp_path):
    """Else dropout, which a file may name, would be at work in sampling."""
    saved("sd3", tmp_path, ["low", None, "high"])
    tensors = load_file(tmp_path / "high.safetensors")
    settings = {"transformer.r": 3, "transformer.lora_alpha": 2.0, "transformer.lora_dropout": 0.5}
    settings["transformer.target_modules"] = ["to_q", "to_v"]
    save_file(tensors, tmp_path / "other.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    pipe = RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())
    LoraExperts.from_files([None, None, tmp_path / "other.safetensors"], THREE).attach(pipe)
    assert not any(module.training for module in pipe.transformer.modules())


@pytest.mark.parametrize("name", ["sd3", "pixart"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_file_without_settings(tmp_path, name, prefix):
    """The ranks are those of its weights, and alpha is the rank, as in Diffusers; `save_lora_adapter` writes no prefix."""
    recipe = RECIPES[name]
    saved(name, tmp_path, ["low", None, "high"])
    tensors = load_file(tmp_path / "high.safetensors")
    save_file(
        {key.replace("transformer.", prefix, 1): each for key, each in tensors.items()}, tmp_path / "x.safetensors"
    )
    pipe = recipe.pipe(recipe.denoiser())
    LoraExperts.from_files([None, None, tmp_path / "x.safetensors"], THREE).attach(pipe)
    assert (pipe.transformer.peft_config["x"].r, pipe.transformer.peft_config["x"].lora_alpha) == (3, 3)
    by_hand = recipe.pipe(add_loras(recipe.denoiser(), ["high"]))  # whose alpha is 2
    LoraExperts([None, None, ("high", 1.5)], THREE).attach(by_hand)
    torch.testing.assert_close(generate(name, pipe), generate(name, by_hand))


# Files of other trainers


def wan_community_file(path, seed, layout):
    """A LoRA of all attention layers in the layouts that are around for Wan: 'lora_A', 'lora_down' with alpha, and musubi-tuner's."""
    model, tensors = wan(), {}
    outer, inner = ("diffusion_model.", ".") if layout != "musubi" else ("lora_unet_", "_")
    down, up = ("lora_A", "lora_B") if layout == "lora_A" else ("lora_down", "lora_up")
    modules = {
        **{
            f"blocks.{i}.self_attn.{new}": f"blocks.{i}.attn1.{old}"
            for i in range(2)
            for new, old in WAN_NAMES.items()
        },
        **{
            f"blocks.{i}.cross_attn.{new}": f"blocks.{i}.attn2.{old}"
            for i in range(2)
            for new, old in WAN_NAMES.items()
        },
        **{f"blocks.{i}.ffn.0": f"blocks.{i}.ffn.net.0.proj" for i in range(2)},
        **{f"blocks.{i}.ffn.2": f"blocks.{i}.ffn.net.2" for i in range(2)},
    }
    for number, (name, module) in enumerate(modules.items()):
        rows, columns = model.get_submodule(module).weight.shape
        key = outer + name.replace(".", inner)
        tensors[f"{key}.{down}.weight"] = randn(2, columns, seed=seed + number) * 0.3
        tensors[f"{key}.{up}.weight"] = randn(rows, 2, seed=seed - number) * 0.3
        if layout != "lora_A":
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


WAN_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


@pytest.mark.parametrize("layout", ["lora_A", "lora_down", "musubi"])
def test_high_and_low_files_in_one_transformer_equal_wan22(tmp_path, layout):
    """The same weights in both transformers: with the files in one, and in Wan2.2's two, by Diffusers and by us."""
    files = [
        wan_community_file(tmp_path / f"{name}.safetensors", seed, layout)
        for name, seed in (("low", 100), ("high", 200))
    ]
    two = wan_pipe(wan(), transformer_2=wan(), boundary_ratio=0.875)
    two.load_lora_weights(files[1], adapter_name="high")
    two.load_lora_weights(files[0], adapter_name="low", load_into_transformer_2=True)
    expected = generate("wan", two, 4)

    one = wan_pipe(wan())
    assert not torch.equal(generate("wan", one, 4), expected)
    for name, file in zip(("low", "high"), files):
        one.load_lora_weights(file, adapter_name=name)
    LoraExperts(["low", "high"], TWO).attach(one)
    assert torch.equal(generate("wan", one, 4), expected)

    ours = wan_pipe(wan(), transformer_2=wan(), boundary_ratio=0.875)
    experts = LoraExperts.from_files(files, TWO).attach(ours)
    assert (set(ours.transformer.peft_config), set(ours.transformer_2.peft_config)) == ({"high"}, {"low"})
    assert torch.equal(generate("wan", ours, 4), expected)
    experts.save_pretrained(tmp_path / "saved")
    experts.detach()

    one = wan_pipe(wan())
    LoraExperts.from_pretrained(tmp_path / "saved").attach(one)
    assert torch.equal(generate("wan", one, 4), expected)


def kohya_file(path, name, seed):
    """A LoRA as kohya's sd-scripts write it."""
    denoiser, tensors = RECIPES[name].denoiser(), {}
    if name == "flux":
        layers = {"lora_unet_single_blocks_0_linear2": "single_transformer_blocks.0.proj_out"}
        layers["lora_unet_double_blocks_0_img_attn_proj"] = "transformer_blocks.0.attn.to_out.0"
    else:
        layers = {
            f"lora_unet_{module.replace('.', '_')}": module
            for module, _ in denoiser.named_modules()
            if module.endswith(("attn1.to_q", "attn2.to_v"))
        }
    for number, (key, module) in enumerate(layers.items()):
        rows, columns = denoiser.get_submodule(module).weight.shape
        tensors[f"{key}.lora_down.weight"] = randn(2, columns, seed=seed + number) * 0.3
        tensors[f"{key}.lora_up.weight"] = randn(rows, 2, seed=seed - number) * 0.3
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", ["flux", "sdxl", "sd15"])
def test_kohyas_files(tmp_path, name):
    recipe = RECIPES[name]
    files = [
        kohya_file(tmp_path / f"{each}.v1.safetensors", name, seed) for each, seed in (("low", 100), ("high", 200))
    ]
    by_diffusers = recipe.pipe(recipe.denoiser())
    for adapter, file in zip(("low", "high"), files):
        by_diffusers.load_lora_weights(file, adapter_name=adapter)
    LoraExperts(["low", "high"], HALVES).attach(by_diffusers)
    expected = generate(name, by_diffusers)
    pipe = recipe.pipe(recipe.denoiser())
    assert not torch.equal(generate(name, pipe), expected)
    experts = LoraExperts.from_files(files, HALVES).attach(pipe)
    assert experts.names == ["low_v1", "high_v1"]
    assert torch.equal(generate(name, pipe), expected)
    with pytest.raises(ValueError, match="attach to the pipeline"):
        LoraExperts.from_files(files, HALVES).attach(recipe.denoiser())


def test_the_adapter_of_a_text_encoder_is_left_out(tmp_path, caplog):
    """It has no noise level: it would act in all of them."""
    caplog.set_level(logging.WARNING)
    recipe, file = RECIPES["sd15"], kohya_file(tmp_path / "high.safetensors", "sd15", 100)
    tensors = load_file(file)
    pipes = [recipe.pipe(recipe.denoiser()) for _ in range(2)]
    LoraExperts.from_files([None, file], HALVES).attach(pipes[0])
    assert not caplog.records
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors | {f"{key}.alpha": torch.tensor(1.0)}, file)
    LoraExperts.from_files([None, file], HALVES).attach(pipes[1])
    assert "high.safetensors also adapts a text encoder" in caplog.text
    assert torch.equal(*(generate("sd15", pipe) for pipe in pipes))


# Wan2.2


def test_wan22_with_other_intervals_than_its_transformers(tmp_path, caplog):
    """The middle interval is on both sides of the boundary: its adapter is used by both transformers."""
    caplog.set_level(logging.WARNING)
    two = {"transformer": ["high", "style"], "transformer_2": ["low", "style"]}
    denoisers = {component: add_loras(wan(), names) for component, names in two.items()}
    pipe = wan_pipe(**denoisers, boundary_ratio=0.7)
    experts = LoraExperts(["low", "style", "high"], THREE).attach(pipe)
    assert (
        "`boundary_ratio` 0.7, the timestep 700, but the intervals have their edges at 0, 500, 800, 1000"
        in caplog.text
    )
    one = wan_pipe(add_loras(wan(), ["low", "style", "high"]))
    LoraExperts(["low", "style", "high"], THREE).attach(one)
    assert torch.equal(generate("wan", pipe), generate("wan", one))
    experts.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    experts.detach()
    for denoiser in denoisers.values():
        assert LoraExperts.attached_to(denoiser) is None


def test_wan22_lacks_an_adapter_in_its_second_transformer():
    pipe = wan_pipe(add_loras(wan(), ["low", "high"]), transformer_2=wan(), boundary_ratio=0.875)
    with pytest.raises(ValueError, match="but got low"):
        LoraExperts(["low", "high"], TWO).attach(pipe)
    assert LoraExperts.attached_to(pipe.transformer) is None


def test_two_adapters_of_one_name_are_not_saved_as_one(tmp_path):
    denoisers = [add_loras(wan(), ["low"]), add_loras(wan(), ["low"])]
    next(layer for layer in denoisers[0].modules() if isinstance(layer, BaseTunerLayer)).lora_A[
        "low"
    ].weight.data.add_(1)
    pipe = wan_pipe(denoisers[0], transformer_2=denoisers[1], boundary_ratio=0.875)
    experts = LoraExperts(["low", "low"], TWO).attach(pipe)
    with pytest.raises(ValueError, match="load them under two names"):
        experts.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# Bad input


@pytest.fixture
def folder(tmp_path):
    saved("sd3", tmp_path, ["low", None, "high"])
    return tmp_path


def test_a_file_for_another_interval_is_warned_about(folder, caplog):
    """With both; a file for all noise levels may be used for some of them."""
    caplog.set_level(logging.WARNING)
    high = folder / "high.safetensors"
    LoraExperts.from_files([None, high], NoiseIntervals.from_sigmas([0.9]))
    said = "timesteps 800 to 1000 of 1000 (σ 0.8 to 1 in flow matching)"
    assert f"says that it is for the {said}, but it is used for the timesteps 900 to 1000" in caplog.text
    caplog.clear()
    tensors = load_file(high)
    for theirs, warned in (("800,1000", False), ("0,1000", False), ("0,875", True)):  # as kohya's trainers write it
        save_file(tensors, folder / "theirs.safetensors", metadata={"modelspec.timestep_range": theirs})
        LoraExperts.from_files([None, None, folder / "theirs.safetensors"], THREE)
        assert bool(caplog.records) is warned
    save_file(tensors, folder / "theirs.safetensors", metadata={"modelspec.timestep_range": "high"})
    with pytest.raises(ValueError, match="to name an interval, but got high"):
        LoraExperts.from_files([None, None, folder / "theirs.safetensors"], THREE)


def test_files_of_like_names_are_different_adapters(folder):
    for name in ("style__2", "style", "style 2", "style__2 2"):
        (folder / f"{name}.safetensors").write_bytes((folder / "low.safetensors").read_bytes())
    (folder / "more").mkdir()
    (folder / "more" / "style.safetensors").write_bytes((folder / "high.safetensors").read_bytes())
    files = [folder / f"{name}.safetensors" for name in ("style__2", "style", "more/style", "style 2", "style__2 2")]
    assert len(LoraExperts.from_files([None, None, files], THREE).names) == 5


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "foreign", "damaged", "gone"])
@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_a_file_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path, name, change):
    recipe = RECIPES[name]
    saved(name, tmp_path, ["low", None, "high"])
    file = tmp_path / "high.safetensors"
    tensors, metadata = load_file(file), metadata_of(file)
    key = sorted(tensors)[0]
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["transformer.nowhere.to_q.lora_A.weight"] = torch.zeros(3, 4)
    elif change == "shape":
        tensors[key] = torch.zeros(3, 5)
    elif change == "foreign":
        tensors = {f"unet.{each}": tensor for each, tensor in tensors.items()}
    save_file(tensors, file, metadata=metadata)
    if change == "damaged":
        file.write_bytes(file.read_bytes()[:-10])
    if change == "gone":
        file.unlink()
    denoiser = recipe.denoiser()
    modules, attributes = dict(denoiser.named_modules()), set(vars(denoiser))
    required = [parameter.requires_grad for parameter in denoiser.parameters()]
    messages = {
        "missing": "high.safetensors' to fit a .* but .*lora_A.weight' is missing",
        "unexpected": r"but it has no 'nowhere.to_q' \(1 of",
        "shape": "size mismatch",
        "foreign": "but got 'unet.transformer",
        "damaged": "copy or download it again",
        "gone": "there is no such file",
    }
    with pytest.raises((ValueError, OSError), match=messages[change]):
        LoraExperts.from_pretrained(tmp_path).attach(denoiser)
    assert dict(denoiser.named_modules()) == modules and set(vars(denoiser)) == attributes
    assert [parameter.requires_grad for parameter in denoiser.parameters()] == required


def test_what_cannot_be_saved_or_loaded_is_said(folder):
    experts = LoraExperts(["low", "high"], TWO)
    with pytest.raises(ValueError, match="attached to a denoiser to save them"):
        experts.save_pretrained(folder)
    with pytest.raises(ValueError, match="one entry for each interval"):
        LoraExperts.from_files([folder / "low.safetensors"], TWO)
    denoiser = add_loras(RECIPES["sd3"].denoiser(), ["high"])
    with pytest.raises(ValueError, match="to have no adapter 'high' yet"):
        LoraExperts.from_pretrained(folder).attach(denoiser)
    assert set(denoiser.peft_config) == {"high"}
    inject_adapter_in_model(LoKrConfig(target_modules=["to_q"]), denoiser, "low")
    with pytest.raises(ValueError, match="'low' to be a LoRA and nothing else, but got the weight .*lokr_w1"):
        LoraExperts(["low", "high"], TWO).attach(denoiser).save_pretrained(folder)
    assert (folder / "lora_experts.json").is_file()  # as it was
    for key, value in (("experts", [[], []]), ("files", {"low": "../low.safetensors"}), ("interval_edges", None)):
        config = json.loads((folder / "lora_experts.json").read_text())
        (folder / "lora_experts.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"as '{key}'"):
            LoraExperts.from_pretrained(folder)
        (folder / "lora_experts.json").write_text(json.dumps(config))
