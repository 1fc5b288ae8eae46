"""Whole denoisers as experts, in the real pipelines of Diffusers."""

import copy
import functools
import json
import pickle
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import AutoencoderKL, DiffusionPipeline, FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_pipelines import RECIPES, flux, generate, sd3, sd15, sdxl, wan, wan_pipe
from torch import nn

from diffusers_dmp import DenoiserExperts, DiTModel, NoiseIntervals, RemixDiTModel
from diffusers_dmp.models.time_argument import ExpertFinder

INTERVALS = NoiseIntervals.from_sigmas([0.6])
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_classes": 3}
LOW, HIGH = 0.25, 0.75  # fractions of T on the two sides


@functools.cache
def recorded_call(name: str) -> tuple[tuple, dict[str, Any]]:
    """The arguments with which a pipeline calls its denoiser."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    denoiser = RECIPES[name].denoiser()
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    generate(name, RECIPES[name].pipe(denoiser), num_inference_steps=1)
    return calls[0]


def call_at(name: str, *fractions: float) -> tuple[tuple, dict[str, Any]]:
    """A pipeline's call for a batch of two, at noise levels given as fractions of T: one for each sample, or one for both."""
    args, kwargs = recorded_call(name)
    finder = ExpertFinder(RECIPES[name].denoiser(), INTERVALS)
    told = finder.argument.told(1000 * torch.tensor(fractions), 1000)
    arguments = dict(zip(finder.argument_names, args)) | kwargs
    arguments = {key: doubled(value) for key, value in arguments.items()}
    return (), arguments | {finder.argument.name: told if len(told) > 1 else told.repeat(2), "return_dict": False}


def doubled(value: Any) -> Any:
    """A batch of two from one sample or from two: pipelines double it for guidance, or do not."""
    if isinstance(value, torch.Tensor) and value.ndim > 2 and len(value) == 1:
        return torch.cat([value, value.flip(-1)])
    if isinstance(value, torch.Tensor) and value.ndim == 2 and len(value) == 1:
        return value.repeat(2, 1)
    return value


def make_experts(name: str, intervals: NoiseIntervals = INTERVALS, **config: Any) -> DenoiserExperts:
    denoisers = [RECIPES[name].denoiser(seed=seed, **config) for seed in range(intervals.num_experts)]
    return DenoiserExperts(denoisers, intervals)


def switched_by_hand(name: str, denoisers: list[nn.Module], intervals: NoiseIntervals = INTERVALS, **config):
    """Generate with a pipeline whose denoiser is replaced between its steps, as a user would do it without this package."""
    recipe = RECIPES[name]
    pipe = recipe.pipe(denoisers[-1], **config)
    step = pipe.scheduler.step
    owners = [intervals.num_experts - 1]  # of each step; the first is the noisiest

    @functools.wraps(step)
    def step_and_switch(*args, **kwargs):
        result = step(*args, **kwargs)
        if len(owners) < len(pipe.scheduler.timesteps):
            timestep = float(pipe.scheduler.timesteps[len(owners)])
            owners.append(sum(timestep >= edge for edge in intervals.edges[1:-1]))
            setattr(pipe, recipe.component, denoisers[owners[-1]])
        return result

    pipe.scheduler.step = step_and_switch
    latents = generate(name, pipe)
    assert set(owners) == set(range(intervals.num_experts))  # every expert has steps of its own
    return latents


def reloaded(pipe: DiffusionPipeline, folder, **kwargs) -> DiffusionPipeline:
    left_out = {name: None for name, component in pipe.components.items() if component is None}
    loaded = type(pipe).from_pretrained(folder, **left_out, **kwargs)
    for component in loaded.components.values():
        if isinstance(component, nn.Module):
            in_own_memory(component)
    return loaded


def in_own_memory(model: nn.Module) -> nn.Module:
    """Weights that lie where their file is mapped are read at other addresses, which changes the last bits of any model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_equal_to_a_switch_by_hand_before_and_after_saving(name, tmp_path):
    denoisers = [RECIPES[name].denoiser(seed=seed) for seed in range(2)]
    expected = switched_by_hand(name, denoisers)
    pipe = RECIPES[name].pipe(DenoiserExperts(denoisers, INTERVALS))
    assert torch.equal(generate(name, pipe), expected)

    pipe.save_pretrained(tmp_path)
    loaded = reloaded(pipe, tmp_path)
    experts = getattr(loaded, RECIPES[name].component)
    assert isinstance(experts, DenoiserExperts) and experts.intervals == INTERVALS
    assert torch.equal(generate(name, loaded), expected)


def test_experts_of_other_depth_and_patch_size():
    denoisers = [sd3(0), sd3(1, num_layers=1, patch_size=2)]
    expected = switched_by_hand("sd3", denoisers)
    assert torch.equal(generate("sd3", RECIPES["sd3"].pipe(DenoiserExperts(denoisers, INTERVALS))), expected)


def test_one_time_per_token():
    """Wan's 5B model is told the time of each token, 0 for those of a given image."""
    denoisers = [wan(seed) for seed in range(2)]
    expected = switched_by_hand("wan", denoisers, expand_timesteps=True)
    pipe = wan_pipe(DenoiserExperts(denoisers, INTERVALS), expand_timesteps=True)
    assert torch.equal(generate("wan", pipe), expected)


def test_equal_to_the_two_transformers_of_wan_22():
    low, high = wan(0), wan(1, num_layers=1)
    intervals = NoiseIntervals.from_sigmas([0.875])
    pipe = wan_pipe(high, transformer_2=low, boundary_ratio=0.875)
    expected = generate("wan", pipe)
    assert torch.equal(generate("wan", wan_pipe(DenoiserExperts([low, high], intervals))), expected)
    assert not torch.equal(generate("wan", wan_pipe(low)), expected)


# --- batches of several noise levels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_each_sample_of_a_batch_has_its_own_expert(name):
    experts = make_experts(name)
    args, kwargs = call_at(name, LOW, HIGH)
    outputs = experts(*args, **kwargs)[0]
    for sample, fraction in enumerate((LOW, HIGH)):
        alone, shared = call_at(name, fraction)
        expected = experts.experts[sample](*alone, **shared)[0]
        torch.testing.assert_close(outputs[sample], expected[sample], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(outputs[1 - sample], expected[1 - sample], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in ("sd3", "flux", "qwen", "zimage")]
    + [("flux", torch.float16), ("flux", torch.float32)],
    ids=str,
)
def test_a_step_on_the_boundary_is_that_of_the_noisier_expert(name, dtype):
    """Some pipelines round the time to the dtype of the latents first, and 0.9 is 0.8984 in bfloat16."""
    assert owners_of_steps(name, dtype, [1.0, 0.9, 0.5]) == [1, 1, 0]


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_a_step_near_the_boundary_where_the_scheduler_is_known(name):
    """In bfloat16, 0.899 and 0.9 are one number."""
    assert owners_of_steps(name, torch.bfloat16, [1.0, 0.899, 0.5], knows_scheduler=True) == [1, 0, 0]
    # both are rounded to one number: the first is meant at the first, then the second
    assert owners_of_steps(name, torch.bfloat16, [1.0, 0.9002, 0.8995, 0.5], knows_scheduler=True) == [1, 1, 0, 0]


def owners_of_steps(name: str, dtype: torch.dtype, sigmas: list[float], knows_scheduler: bool = False) -> list[int]:
    """The experts that a pipeline calls, one for each of its steps; the boundary is at 0.9."""
    experts = make_experts(name, NoiseIntervals.from_sigmas([0.9])).to(dtype)
    called = []
    for index, expert in enumerate(experts.experts):
        expert.register_forward_pre_hook(lambda *_, index=index: called.append(index))
    embeds = {key: value for key, value in RECIPES[name].call().items() if key.endswith("embeds")}
    for key, value in embeds.items():
        embeds[key] = [each.to(dtype) for each in value] if isinstance(value, list) else value.to(dtype)
    pipe = RECIPES[name].pipe(experts)
    pipe.scheduler.set_shift(1.0)
    experts.scheduler = pipe.scheduler if knows_scheduler else None
    generate(name, pipe, num_inference_steps=len(sigmas), sigmas=sigmas, **embeds)
    return called[:: len(called) // len(sigmas)]


# --- saving and loading --------------------------------------------------------------------------------------------------


def test_variants_and_shards_of_a_whole_pipeline(tmp_path):
    pipe = wan_pipe(DenoiserExperts([wan(0), wan(1, num_layers=1)], INTERVALS))
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    names = [file.name for file in (tmp_path / "transformer").iterdir()]
    assert len(names) > 3 and all("fp16" in name or name == "config.json" for name in names)
    loaded = reloaded(pipe, tmp_path, variant="fp16")
    assert torch.equal(generate("wan", loaded), generate("wan", pipe))
    with pytest.raises((OSError, ValueError)):
        reloaded(pipe, tmp_path)  # without the variant


def test_the_configuration_is_the_first_experts_with_all_inside(tmp_path):
    experts = DenoiserExperts([wan(0), wan(1, num_layers=1)], INTERVALS)
    experts.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "DenoiserExperts" and config["num_layers"] == 2 and config["in_channels"] == 16
    assert config["interval_edges"] == [0, 600, 1000]
    assert [(each["_library"], each["_class_name"], each["num_layers"]) for each in config["expert_configs"]] == [
        ("diffusers", "WanTransformer3DModel", 2),
        ("diffusers", "WanTransformer3DModel", 1),
    ]
    experts.experts[1].register_to_config(added_later=3)
    experts.save_pretrained(tmp_path)
    loaded = DenoiserExperts.from_pretrained(tmp_path)
    assert loaded.experts[1].config.added_later == 3
    assert loaded.state_dict().keys() == experts.state_dict().keys()
    assert type(loaded) is DenoiserExperts and not loaded.training
    assert DenoiserExperts.from_config(experts.config).num_parameters() == experts.num_parameters()
    assert pickle.loads(pickle.dumps(loaded)).intervals == INTERVALS


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_weights_that_stay_in_float32(options, tmp_path):
    """Wan keeps norms and time embedding in float32 when it is loaded in bfloat16; so do two of them."""
    experts = DenoiserExperts([wan(0), wan(1)], INTERVALS)
    experts.save_pretrained(tmp_path / "experts")
    experts.experts[1].save_pretrained(tmp_path / "one")
    one = WanTransformer3DModel.from_pretrained(tmp_path / "one", torch_dtype=torch.bfloat16)
    loaded = DenoiserExperts.from_pretrained(tmp_path / "experts", torch_dtype=torch.bfloat16, **options)
    assert {tensor.dtype for tensor in one.state_dict().values()} == {torch.float32, torch.bfloat16}
    for name, tensor in loaded.experts[1].state_dict().items():
        assert tensor.dtype == one.state_dict()[name].dtype and torch.equal(tensor, one.state_dict()[name])
    assert loaded.dtype == one.dtype == torch.bfloat16
    assert DenoiserExperts._keep_in_fp32_modules is None  # of other experts, loaded next


def test_the_packages_own_models_as_experts(tmp_path):
    """Their configurations have intervals too, which are not those of the experts."""
    remix = RemixDiTModel(**DIT, num_bases=2, num_experts=4)
    experts = DenoiserExperts([DiTModel(**DIT), remix], INTERVALS).eval()
    experts.save_pretrained(tmp_path)
    loaded = DenoiserExperts.from_pretrained(tmp_path)
    assert loaded.intervals == INTERVALS and loaded.experts[1].intervals == remix.intervals
    images = torch.randn(2, 4, 8, 8)
    arguments = {"timestep": torch.tensor([100, 900]), "class_labels": torch.tensor([1, 2])}
    assert torch.allclose(loaded(images, **arguments).sample, experts(images, **arguments).sample, atol=1e-6)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    class MyTransformer(WanTransformer3DModel):
        pass

    mine = MyTransformer(**wan().config)
    with pytest.raises(ValueError, match="nobody could load.*experts\\[1\\].*MyTransformer"):
        DenoiserExperts([wan(), mine], INTERVALS).save_pretrained(tmp_path)
    shared = wan()
    with pytest.raises(ValueError, match="share weights"):
        DenoiserExperts([shared, shared], INTERVALS).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    wan().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DenoiserExperts, but got that of a WanTransformer3DModel"):
        DenoiserExperts.from_pretrained(tmp_path)
    config = DenoiserExperts([wan(), wan()], INTERVALS).config
    with pytest.raises(ValueError, match="model of diffusers or diffusers_dmp, but got 'system' of 'os'"):
        DenoiserExperts.from_config(dict(config) | {"expert_configs": [{"_library": "os", "_class_name": "system"}]})


# --- what pipelines read and set -----------------------------------------------------------------------------------------


def test_attributes_are_those_that_the_experts_have_in_common():
    unets = DenoiserExperts([sdxl(0), sdxl(1)], INTERVALS)
    assert unets.add_embedding is unets.experts[0].add_embedding  # SDXL reads its size
    assert unets.encoder_hid_proj is None and unets.config.addition_embed_type == "text_time"
    transformers = DenoiserExperts([flux(0), flux(1, num_layers=2)], INTERVALS)
    assert transformers.inner_dim == 32 and transformers._repeated_blocks == [
        "FluxSingleTransformerBlock",
        "FluxTransformerBlock",
    ]
    for name in (
        "transformer_blocks",
        "state_dict_of_nobody",
    ):  # to change the first expert's blocks alone would be silent
        assert not hasattr(transformers, name)
    with pytest.raises(AttributeError, match=r"`experts\[i\].transformer_blocks`"):
        _ = transformers.transformer_blocks
    assert transformers.num_parameters() == sum(each.num_parameters() for each in transformers.experts)


def test_settings_reach_all_experts():
    experts = DenoiserExperts([sdxl(0), sdxl(1)], INTERVALS)
    pipe = RECIPES["sdxl"].pipe(experts)
    pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)
    assert [expert.up_blocks[0].s1 for expert in experts.experts] == [0.5, 0.5]
    pipe.disable_freeu()
    assert [expert.up_blocks[0].s1 for expert in experts.experts] == [None, None]
    pipe.fuse_qkv_projections()
    assert all(
        any(getattr(each, "fused_projections", False) for each in expert.modules()) for expert in experts.experts
    )
    pipe.unfuse_qkv_projections()

    processors = {name: AttnProcessor() for name in experts.attn_processors}
    assert next(iter(processors)).startswith("experts.0.down_blocks.1")
    experts.set_attn_processor(dict(processors))
    assert experts.attn_processors == processors
    experts.set_attention_backend("native")
    experts.train()
    assert all(expert.training for expert in experts.experts)


def test_a_cache_of_blocks_is_each_experts_own():
    """As with separate models, and empty at the start of every run."""
    config = FirstBlockCacheConfig(threshold=0.5)
    denoisers = [RECIPES["wan"].denoiser(seed=seed) for seed in range(2)]
    for denoiser in denoisers:
        denoiser.enable_cache(config)
    expected = switched_by_hand("wan", denoisers)
    for denoiser in denoisers:
        denoiser.disable_cache()

    experts = DenoiserExperts(denoisers, INTERVALS)
    pipe = wan_pipe(experts)
    without = generate("wan", pipe)
    assert not torch.equal(expected, without)
    experts.enable_cache(config)
    assert experts.is_cache_enabled and all(expert.is_cache_enabled for expert in experts.experts)
    assert torch.equal(generate("wan", pipe), expected)
    assert torch.equal(generate("wan", pipe), expected)
    experts.disable_cache()
    assert torch.equal(generate("wan", pipe), without)


LORA_LAYERS = {
    "sd3": "transformer_blocks.0.attn.to_q",
    "wan": "blocks.0.attn1.to_q",
    "flux": "transformer_blocks.0.attn.to_q",
}


@pytest.mark.parametrize("name", LORA_LAYERS)
def test_adapters_belong_to_one_expert(name):
    experts = make_experts(name)
    pipe = RECIPES[name].pipe(experts)
    layer = LORA_LAYERS[name]
    rows, columns = experts.experts[0].get_submodule(layer).weight.shape
    lora = {
        f"transformer.{layer}.lora_A.weight": torch.randn(2, columns),
        f"transformer.{layer}.lora_B.weight": torch.randn(rows, 2),
    }
    with pytest.raises(ValueError, match=r"`experts\[i\].load_lora_adapter"):
        pipe.load_lora_weights(lora, adapter_name="style")
    for action in (pipe.unload_lora_weights, pipe.fuse_lora, pipe.disable_lora, lambda: experts.set_adapters("style")):
        with pytest.raises(ValueError, match=r"`experts\[i\]\."):
            action()

    without = generate(name, pipe)
    experts.experts[0].load_lora_adapter(lora, adapter_name="style")
    assert not torch.equal(generate(name, pipe), without)
    with pytest.raises(ValueError, match="without adapters"):
        experts.save_pretrained("nowhere")
    experts.experts[0].unload_lora()
    assert torch.equal(generate(name, pipe), without)


# --- memory --------------------------------------------------------------------------------------------------------------


def on_a_stand_in_for_an_accelerator(experts: DenoiserExperts) -> list[tuple[int, str]]:
    """
    Record where experts are moved to, with "meta" as the accelerator.

    Tensors on "meta" have shapes and no values, so that weights cannot come back from there: they are replaced by new ones.
    """
    moves: list[tuple[int, str]] = []
    for index, expert in enumerate(experts.experts):

        def to(device, index=index, expert=expert):
            device = torch.device(device)
            if next(expert.parameters()).device != device:
                moves.append((index, device.type))
                nn.Module.to(expert, device) if device.type == "meta" else expert.to_empty(device=device)
            resident = [each for each in experts.experts if next(each.parameters()).device.type == "meta"]
            assert len(resident) <= 1, "two experts on the accelerator at once"
            return expert

        expert.to = to
    return moves


def test_one_expert_is_on_the_accelerator_under_model_offloading():
    experts = DenoiserExperts([sd15(0), sd15(1)], INTERVALS)
    moves = on_a_stand_in_for_an_accelerator(experts)
    cpu_offload_with_hook(experts, torch.device("meta"))
    images, prompts = torch.randn(2, 4, 8, 8, device="meta"), torch.randn(2, 7, 32, device="meta")
    for timestep in (900, 700, 300, 100):
        assert experts(images, timestep, prompts).sample.device.type == "meta"
        # by this the hook of the next component decides whether to move these experts to the CPU first
        assert next(experts.parameters()).device.type == "meta"
    assert moves == [(1, "meta"), (1, "cpu"), (0, "meta")]
    moves.clear()
    experts(images, 900, prompts)
    assert moves == [(0, "cpu"), (1, "meta")]
    assert len(list(experts.parameters())) == len(dict(experts.named_parameters()))


def test_a_user_moves_all_experts():
    experts = DenoiserExperts([sd15(0), sd15(1)], INTERVALS)
    assert experts.to("meta") is experts and {each.device.type for each in experts.parameters()} == {"meta"}
    experts = DenoiserExperts([sd15(0), sd15(1)], INTERVALS).to(torch.float16)
    assert experts.dtype == torch.float16 and {each.dtype for each in experts.parameters()} == {torch.float16}


def test_pipelines_offload_models():
    experts = make_experts("sd3")
    pipe = RECIPES["sd3"].pipe(experts)
    expected = generate("sd3", pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate("sd3", pipe), expected)
    pipe.remove_all_hooks()
    assert torch.equal(generate("sd3", pipe), expected)


def test_sequential_offloading():
    experts = make_experts("sd3")
    _, kwargs = call_at("sd3", LOW, HIGH)
    expected = experts(**kwargs)[0]
    cpu_offload(experts, torch.device("cpu"))
    assert {parameter.device.type for parameter in experts.parameters()} == {"meta"}
    assert torch.equal(experts(**kwargs)[0], expected)


@pytest.mark.group_offload
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(offload_type):
    experts = DenoiserExperts([sd3(0), sd3(1, num_layers=1)], INTERVALS)
    pipe = RECIPES["sd3"].pipe(experts)
    expected = generate("sd3", pipe)
    cpu = torch.device("cpu")
    alone = sd3(1, num_layers=1)
    for model in (experts, alone):
        model.enable_group_offload(cpu, cpu, offload_type, num_blocks_per_group=1)
    hooked = [
        {name for name, each in model.named_modules() if hasattr(each, "_diffusers_hook")}
        for model in (experts.experts[1], alone)
    ]
    assert hooked[0] == hooked[1]  # the groups are an expert's blocks, not whole experts
    assert torch.equal(generate("sd3", pipe), expected)


def test_layerwise_casting_skips_what_each_class_skips():
    denoisers = [wan(0), wan(1)]
    experts = DenoiserExperts(copy.deepcopy(denoisers), INTERVALS)
    for denoiser in denoisers:
        denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    experts.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert experts.dtype == torch.float32
    for expert, denoiser in zip(experts.experts, denoisers):
        assert [each.dtype for each in expert.parameters()] == [each.dtype for each in denoiser.parameters()]
        assert torch.float8_e4m3fn in {each.dtype for each in expert.parameters()}
    assert torch.equal(generate("wan", wan_pipe(experts)), switched_by_hand("wan", denoisers))


# --- training, compilation, copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "zimage"])
def test_training_with_gradient_checkpointing(name):
    """In a mixed batch each expert learns from its own samples, also with another forward before the backward."""
    experts, plain = make_experts(name).train(), make_experts(name).train()
    experts.enable_gradient_checkpointing()
    assert all(expert.is_gradient_checkpointing for expert in experts.experts)
    _, mixed = call_at(name, LOW, HIGH)
    _, clean = call_at(name, LOW)
    optimisers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (experts, plain)]
    for _ in range(2):
        for model, optimiser in zip((experts, plain), optimisers):
            loss = sum(output.square().mean() for output in model(**mixed)[0])
            if model is experts:
                model(**clean)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for actual, expected in zip(experts.parameters(), plain.parameters()):
        torch.testing.assert_close(actual, expected)

    experts.zero_grad()
    experts(**clean)[0][0].square().mean().backward()
    assert all(each.grad is None for each in experts.experts[1].parameters())
    assert any(each.grad is not None for each in experts.experts[0].parameters())
    experts.disable_gradient_checkpointing()
    assert not experts.is_gradient_checkpointing


@pytest.mark.parametrize("how", ["compile_repeated_blocks", pytest.param("compile", marks=pytest.mark.slow)])
def test_experts_are_compiled_and_not_the_choice_between_them(how):
    experts = DenoiserExperts([DiTModel(**DIT), DiTModel(**DIT)], INTERVALS).eval()
    images, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    times = [torch.tensor(times) for times in ([100, 100], [900, 900], [100, 900])]
    expected = [experts(images, timestep, labels).sample for timestep in times]
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    getattr(experts, how)(backend=count, fullgraph=True)
    for timestep, sample in zip(times, expected):
        torch.testing.assert_close(experts(images, timestep, labels).sample, sample)
    assert graphs
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_breaks_its_graph_where_the_expert_is_chosen():
    experts = DenoiserExperts([DiTModel(**DIT), DiTModel(**DIT)], INTERVALS).eval()
    compiled = torch.compile(experts, backend="eager")
    images, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    for timestep in (torch.tensor([100, 100]), torch.tensor([100, 900]), torch.tensor([900, 900])):
        torch.testing.assert_close(compiled(images, timestep, labels).sample, experts(images, timestep, labels).sample)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_have_weights_of_their_own(copied):
    experts = make_experts("sd3")
    expected = generate("sd3", RECIPES["sd3"].pipe(experts))
    copy_of_it = copied(experts)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
    assert torch.equal(generate("sd3", RECIPES["sd3"].pipe(copy_of_it)), expected)


# --- quantised experts ---------------------------------------------------------------------------------------------------


def test_quantised_experts_are_not_cast(tmp_path):
    """With what Diffusers notes on a quantised model, as a stand-in for one."""
    experts = [sd3(0), sd3(1)]
    experts[1].is_quantized, experts[1].quantization_method = True, "stand-in"
    model = DenoiserExperts(experts, INTERVALS)
    assert model.is_quantized and model.quantization_method == "stand-in"
    pipe = RECIPES["sd3"].pipe(model)
    for cast_it in (lambda: model.to(torch.float16), model.half, lambda: pipe.to(torch.float16)):
        with pytest.raises(ValueError, match="quantized"):
            cast_it()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="quantised in the same way.*'stand-in'"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("modules_to_not_convert", [None, ["proj_out"]], ids=str)
def test_quantised_experts_are_saved_and_loaded_as_one(modules_to_not_convert, tmp_path):
    pytest.importorskip("optimum.quanto")
    from diffusers import QuantoConfig

    config = QuantoConfig(weights_dtype="int8", modules_to_not_convert=modules_to_not_convert)
    quantised = []
    for seed in range(2):
        sd3(seed).save_pretrained(tmp_path / str(seed))
        quantised.append(type(sd3()).from_pretrained(tmp_path / str(seed), quantization_config=config))
    experts = DenoiserExperts(quantised, INTERVALS)
    expected = generate("sd3", RECIPES["sd3"].pipe(experts))
    experts.save_pretrained(tmp_path / "experts")
    loaded = DenoiserExperts.from_pretrained(tmp_path / "experts")
    assert loaded.is_quantized and all(expert.is_quantized for expert in loaded.experts)
    assert {type(each) for each in loaded.parameters()} == {type(each) for each in experts.parameters()}
    torch.testing.assert_close(generate("sd3", RECIPES["sd3"].pipe(loaded)), expected)

    make_experts("sd3").save_pretrained(tmp_path / "plain")
    loaded = DenoiserExperts.from_pretrained(tmp_path / "plain", quantization_config=config)
    torch.testing.assert_close(generate("sd3", RECIPES["sd3"].pipe(loaded)), expected)


# --- bad input -----------------------------------------------------------------------------------------------------------


class ToldByNobodyKnowsWhat(DiTModel):
    def forward(self, hidden_states, noise_level):
        return hidden_states


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (lambda: [sd3()], "as many `experts` as intervals, but got 1 experts for the 2 intervals"),
        (lambda: [sd3(), sd3(in_channels=8)], r"channels, but got \(4, 4\) .*\(8, 4\) of `experts\[1\]`"),
        (lambda: [sd3(), sd3().to(torch.bfloat16)], "same dtype .*torch.float32 .*torch.bfloat16"),
        (lambda: [flux(), sd3()], "told the time in the same way, .*at_pure_noise=1.0.*FluxTransformer2DModel"),
        (lambda: [sd3(), nn.Linear(2, 2)], r"`experts\[1\]` to be a model of Diffusers.*Linear"),
        (lambda: [AutoencoderKL(), AutoencoderKL()], "register_time_argument\\(AutoencoderKL"),
        (lambda: [ToldByNobodyKnowsWhat(**DIT)] * 2, "register_time_argument\\(ToldByNobodyKnowsWhat"),
    ],
    ids=["number", "channels", "dtype", "time", "no model", "no denoiser", "unknown time"],
)
def test_experts_that_cannot_take_turns(experts, message):
    with pytest.raises(ValueError, match=message):
        DenoiserExperts(experts(), INTERVALS)


def test_intervals_are_noise_intervals():
    with pytest.raises(ValueError, match="NoiseIntervals.from_sigmas"):
        DenoiserExperts([sd3(), sd3()], [0.875])
