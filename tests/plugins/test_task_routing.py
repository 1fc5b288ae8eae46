"""Routing of channels on every class of denoisers: what each block reads, and that nothing else changes."""

import copy
import inspect
import logging
import pickle

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from conftest import TINY_CONFIG, randomised
from diffusers import ConfigMixin, DiffusionPipeline, FirstBlockCacheConfig, ModelMixin, SD3Transformer2DModel
from diffusers.hooks import apply_first_block_cache
from tiny_denoisers import DENOISERS, call, sample_of, told
from tiny_pipelines import RECIPES, generate
from torch import nn

from diffusers_dmp import DiTModel, DTRTransformer2DModel, RemixDiTModel, Stream, TaskRouting, register_streams
from diffusers_dmp.plugins import streams

MIXED = torch.tensor([930.0, 240.0])


def trace(model: nn.Module) -> list:
    """All that a plugin could leave behind in a model."""
    return [
        (name, sorted(vars(module)), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_on_every_class(name):
    denoiser, inputs = DENOISERS[name]()
    before, config = trace(denoiser), dict(denoiser.config)
    plain = call(denoiser, inputs, MIXED)

    everything = TaskRouting(sharing_ratio=1.0).attach(denoiser)
    assert torch.equal(call(denoiser, inputs, MIXED), plain)
    everything.detach()

    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)
    assert TaskRouting.attached_to(denoiser) is routing and routing.denoiser is denoiser
    widths = set(routing._attachment.tables)
    routed = call(denoiser, inputs, MIXED)
    assert routed.isfinite().all()
    assert (routed - plain).abs().max() > 1e-6
    assert set(routing._attachment.tables) == widths  # known before the first call, which may be a compiled one
    effect = (routed - plain).abs().max().item()
    for index in range(2):  # a sample does not depend on its batch
        alone = call(denoiser, sample_of(inputs, index), MIXED[index : index + 1])
        torch.testing.assert_close(alone, routed[index : index + 1], atol=effect / 10, rtol=0)
    swapped = call(denoiser, inputs, MIXED.flip(0))
    assert (swapped - routed).abs().max() > 1e-6

    routing.detach()
    assert torch.equal(call(denoiser, inputs, MIXED), plain)
    assert trace(denoiser) == before and dict(denoiser.config) == config
    assert TaskRouting.attached_to(denoiser) is None and routing.denoiser is None


@pytest.mark.parametrize("timesteps", [MIXED.repeat(2), torch.tensor(700).expand(4), torch.tensor([0, 1, 998, 999])])
def test_on_the_dit_it_is_the_native_dtr(batch, timesteps):
    native = randomised(DTRTransformer2DModel(**TINY_CONFIG))
    model = DiTModel(**TINY_CONFIG).eval()
    model.load_state_dict(native.state_dict())
    TaskRouting().attach(model)
    batch["timestep"] = timesteps
    assert torch.equal(model(**batch).sample, native(**batch).sample)


def mask_by_hand(timesteps: torch.Tensor, width: int, ratio: float) -> torch.Tensor:
    rows = []
    for timestep in timesteps.double().tolist():
        num_active = int(width * ratio)
        start = round((int(timestep) / 999) ** 4 * (width - num_active))
        rows.append([1.0 if start <= channel < start + num_active else 0.0 for channel in range(width)])
    return torch.tensor(rows)


def route_by_hand(
    model: nn.Module, blocks: list, name: str, argument: str, output: int | None, t_of, ratio=0.5
) -> None:
    """Replace the forwards of blocks by the formula, each for this one class: the reference."""
    now = {}
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]

    def read_time(module, args, kwargs):
        now["t"] = t_of(torch.as_tensor((dict(zip(parameters, args)) | kwargs)[name]))

    model.register_forward_pre_hook(read_time, with_kwargs=True)

    def routed(forward, names):
        def new_forward(*args, **kwargs):
            arguments = dict(zip(names, args)) | kwargs
            x = arguments[argument]
            mask = mask_by_hand(now["t"], x.shape[-1], ratio)[:, None]
            result = forward(**arguments | {argument: mask * x})
            if output is None:
                return result + (1 - mask) * x
            parts = list(result)
            if parts[output] is not None:
                parts[output] = parts[output] + (1 - mask) * x
            return tuple(parts)

        return new_forward

    for block in blocks:
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        block.forward = routed(block.forward, names)


BY_HAND = {
    "sd3": (("transformer_blocks",), "timestep", "hidden_states", 1, lambda t: t),
    "flux": (("transformer_blocks", "single_transformer_blocks"), "timestep", "hidden_states", 1, lambda t: 1000 * t),
    "wan": (("blocks",), "timestep", "hidden_states", None, lambda t: t),
    "zimage": (("layers",), "t", "x", None, lambda t: 1000 * (1 - t.double()) + 1e-3),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_in_a_pipeline_it_is_the_formula(name):
    lists, *rest = BY_HAND[name]
    recipe = RECIPES[name]
    plugged, by_hand = recipe.denoiser(), recipe.denoiser()
    route_by_hand(by_hand, [block for blocks in lists for block in getattr(by_hand, blocks)], *rest)
    TaskRouting(sharing_ratio=0.5).attach(plugged)
    routed = generate(name, recipe.pipe(plugged), 4)
    torch.testing.assert_close(routed, generate(name, recipe.pipe(by_hand), 4), atol=1e-6, rtol=1e-5)
    assert (routed - generate(name, recipe.pipe(recipe.denoiser()), 4)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pixart", "qwen", "sdxl", "sd15"])
def test_in_the_other_pipelines(name):
    recipe = RECIPES[name]
    denoiser = recipe.denoiser()
    pipe = recipe.pipe(denoiser)
    plain = generate(name, pipe, 3)
    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)
    routed = generate(name, pipe, 3)
    assert routed.isfinite().all() and not torch.equal(routed, plain)
    routing.detach()
    assert torch.equal(generate(name, pipe, 3), plain)


def test_the_noisiest_token_decides():
    denoiser, inputs = DENOISERS["wan"]()
    TaskRouting(sharing_ratio=0.5).attach(denoiser)
    read = []  # what the first block reads
    denoiser.blocks[0].norm1.register_forward_pre_hook(lambda module, args: read.append(args[0] != 0))
    tokens = torch.tensor([[0] * 4 + [930] * 4, [0] * 4 + [240] * 4])  # those at 0 are of a given image
    denoiser(**inputs, timestep=tokens)
    denoiser(**inputs, timestep=MIXED)
    assert torch.equal(*read)
    assert torch.equal(read[0].any(1).float(), mask_by_hand(MIXED, 24, 0.5))


def test_a_whole_timestep_survives_its_unit():
    """Told as t/T in float32, every whole timestep has the window of its own."""
    denoiser, _ = DENOISERS["flux"]()
    attachment = TaskRouting().attach(denoiser)._attachment
    timesteps = torch.arange(1000)
    assert torch.equal(attachment._timesteps((), {"timestep": timesteps / 1000}).long(), timesteps)
    assert attachment._timesteps((), {"timestep": torch.ones(1)}).item() == 1000


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_text_is_routed_if_asked_for(name):
    denoiser, inputs = DENOISERS[name]()
    outputs = {}
    for names in ("image", "text"), ("text",):
        routing = TaskRouting(sharing_ratio=0.5, streams=names).attach(denoiser)
        outputs[names] = call(denoiser, inputs, MIXED)
        routing.detach()
    lists, time, _, _, t_of = BY_HAND[name]
    blocks = [block for part in lists for block in getattr(denoiser, part)]
    route_by_hand(denoiser, blocks, time, "encoder_hidden_states", 0, t_of)
    torch.testing.assert_close(outputs["text",], call(denoiser, inputs, MIXED))
    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)  # around those by hand
    torch.testing.assert_close(outputs["image", "text"], call(denoiser, inputs, MIXED))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "zimage", "sd15", "unet2d", "dit"])
def test_gradient_checkpointing_with_another_forward_in_between(name):
    denoiser, inputs = DENOISERS[name]()
    denoiser.train().requires_grad_(True)
    if name == "dit":
        inputs["force_drop_ids"] = torch.zeros(2, dtype=torch.bool)
    TaskRouting(sharing_ratio=0.5).attach(denoiser)

    def losses():
        return [call(denoiser, inputs, timesteps).square().mean() for timesteps in (MIXED, MIXED.flip(0))]

    sum(losses()).backward()
    plain = gradients(denoiser)
    denoiser.zero_grad()
    denoiser.enable_gradient_checkpointing()
    first, second = losses()
    with torch.no_grad():
        call(denoiser, inputs, torch.tensor([10.0, 20.0]))
    second.backward()
    first.backward()
    for checkpointed, expected in zip(gradients(denoiser), plain, strict=True):
        torch.testing.assert_close(checkpointed, expected, atol=1e-6, rtol=1e-4)


def test_two_training_steps_are_those_of_the_native_dtr(batch):
    native = randomised(DTRTransformer2DModel(**TINY_CONFIG)).train()
    model = DiTModel(**TINY_CONFIG).train()
    model.load_state_dict(native.state_dict())
    TaskRouting().attach(model)
    batch["force_drop_ids"] = torch.zeros(4, dtype=torch.bool)
    for trained in (native, model):
        optimizer = torch.optim.AdamW(trained.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            trained(**batch).sample.square().mean().backward()
            optimizer.step()
    for (name, parameter), other in zip(model.named_parameters(), native.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=name)


def test_saved_with_the_pipeline_and_restored(tmp_path):
    recipe = RECIPES["sd3"]
    transformer = recipe.denoiser()
    TaskRouting(sharing_ratio=0.5, routing_alpha=2.0).attach(transformer)
    pipe = recipe.pipe(transformer)
    routed = generate("sd3", pipe, 3)
    pipe.save_pretrained(tmp_path)

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(handler)
    try:
        loaded = DiffusionPipeline.from_pretrained(
            tmp_path, **{name: None for name in pipe.config if pipe.config[name] == (None, None)}
        )
    finally:
        logger.removeHandler(handler)
    assert any("task_routing" in message and "TaskRouting.restore(pipe)" in message for message in messages)

    with pytest.raises(ValueError, match="saved with, TaskRouting.sharing_ratio=0.5.*restore"):
        TaskRouting(sharing_ratio=0.8).attach(loaded.transformer)
    (routing,) = TaskRouting.restore(loaded)
    assert routing == TaskRouting(sharing_ratio=0.5, routing_alpha=2.0)
    assert TaskRouting.restore(loaded.transformer) == [routing]  # once is enough
    assert torch.equal(generate("sd3", loaded, 3), routed)
    routing.detach()
    with pytest.raises(ValueError, match="an entry `task_routing`, but got a StableDiffusion3Pipeline without"):
        TaskRouting.restore(loaded)


class TwoDenoisers(ModelMixin, ConfigMixin):
    """Shows the configuration of its first part as its own."""

    config_name = "config.json"

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_to_config(**parts[0].config)


def test_restored_in_the_parts_of_a_model():
    parts = [DENOISERS["sd3"]()[0] for _ in range(2)]
    for index, part in enumerate(parts):
        TaskRouting(sharing_ratio=0.5 + index / 4).attach(part)
    loaded = TwoDenoisers(*(SD3Transformer2DModel.from_config(part.config) for part in parts))
    assert [routing.sharing_ratio for routing in TaskRouting.restore(loaded)] == [0.5, 0.75]
    assert all(TaskRouting.attached_to(part) for part in loaded.parts) and TaskRouting.attached_to(loaded) is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_a_copy_of_the_denoiser_has_a_copy_of_the_routing(duplicate):
    denoiser, inputs = DENOISERS["sd3"]()
    plain = call(denoiser, inputs, MIXED)
    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)
    routed = call(denoiser, inputs, MIXED)
    copied = duplicate(denoiser)
    copied_routing = TaskRouting.attached_to(copied)
    assert copied_routing == routing and copied_routing is not routing and copied_routing.denoiser is copied
    routing.detach()
    for parameter in denoiser.parameters():
        parameter.zero_()  # the copy computes with weights of its own
    assert torch.equal(call(copied, inputs, MIXED), routed)
    copied_routing.detach()
    assert torch.equal(call(copied, inputs, MIXED), plain)
    assert copy.deepcopy(TaskRouting().attach(denoiser)).denoiser is None


@pytest.mark.parametrize("threshold", [1e-9, 1.0])
def test_with_a_first_block_cache(threshold):
    """The cache sees what a routed block returns; with the threshold 1 it leaves out all but the first block after a step."""
    recipe = RECIPES["flux"]
    lists, *rest = BY_HAND["flux"]
    latents = []
    for plugged in (True, False):
        transformer = recipe.denoiser()
        if plugged:
            routing = TaskRouting(sharing_ratio=0.5).attach(transformer)
            uncached = generate("flux", recipe.pipe(transformer), 4)
        else:
            route_by_hand(transformer, [block for blocks in lists for block in getattr(transformer, blocks)], *rest)
        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        latents.append(generate("flux", recipe.pipe(transformer), 4))
    torch.testing.assert_close(latents[0], latents[1])
    assert ((latents[0] - uncached).abs().max() > 1e-4) == (threshold == 1.0)
    routing.denoiser.disable_cache()
    torch.testing.assert_close(generate("flux", recipe.pipe(routing.denoiser), 4), uncached)


@pytest.mark.parametrize("by", ["method", "function"])
def test_refused_under_a_cache(by):
    denoiser, _ = DENOISERS["flux"]()
    config = FirstBlockCacheConfig(threshold=0.1)
    denoiser.enable_cache(config) if by == "method" else apply_first_block_cache(denoiser, config)
    with pytest.raises(ValueError, match="without a cache.*disable_cache"):
        TaskRouting().attach(denoiser)


@pytest.mark.parametrize("order", ["routing first", "offloading first"])
@pytest.mark.parametrize("kind", ["groups", "sequential"])
@torch.no_grad()
def test_offloading(kind, order):
    def offload(denoiser):
        if kind == "groups":
            denoiser.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
        else:
            cpu_offload(denoiser, torch.device("cpu"))  # the weights are on the meta device until they are needed

    denoiser, inputs = DENOISERS["sd3"]()
    plain = call(denoiser, inputs, MIXED)
    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)
    routed = call(denoiser, inputs, MIXED)
    if order == "offloading first":
        routing.detach()
    offload(denoiser)
    if order == "offloading first":
        routing.attach(denoiser)
    torch.testing.assert_close(call(denoiser, inputs, MIXED), routed)
    routing.detach()
    torch.testing.assert_close(call(denoiser, inputs, MIXED), plain)
    routing.attach(denoiser)
    torch.testing.assert_close(call(denoiser, inputs, MIXED), routed)


def test_mixed_precision_of_accelerate():
    """It replaces `forward`, and puts the former one back in the end."""
    denoiser, inputs = DENOISERS["sd3"]()
    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)
    routed = call(denoiser, inputs, MIXED)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(denoiser)
    output = call(prepared, inputs, MIXED)
    output.square().mean().backward()
    assert (output - routed).norm() / routed.norm() < 0.05
    assert all(parameter.grad is not None for parameter in denoiser.transformer_blocks[0].attn.to_q.parameters())
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(call(unwrapped, inputs, MIXED), routed)
    routing.detach()
    assert not torch.allclose(call(unwrapped, inputs, MIXED), routed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    denoiser, inputs = DENOISERS["sd3"]()
    TaskRouting(sharing_ratio=0.5).attach(denoiser)
    expected = call(denoiser, inputs, MIXED)
    denoiser.to(dtype)
    half = {name: value.to(dtype) for name, value in inputs.items()}
    output = call(denoiser, half, MIXED)
    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_repeated_blocks_compile_without_a_graph_break():
    torch.compiler.reset()
    denoiser, inputs = DENOISERS["flux"]()
    timesteps = MIXED
    plain = call(denoiser, inputs, timesteps)
    graphs: list = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    denoiser.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(call(denoiser, inputs, timesteps), plain)
    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)
    num_plain_graphs = len(graphs)
    compiled = call(denoiser, inputs, timesteps)
    num_graphs = len(graphs)
    assert num_graphs == 2 * num_plain_graphs  # no block has a graph of its own
    torch.testing.assert_close(call(denoiser, inputs, timesteps), compiled)
    call(denoiser, inputs, timesteps - 100)
    assert len(graphs) == num_graphs
    routing.detach()
    torch.testing.assert_close(call(denoiser, inputs, timesteps), plain)
    torch.compiler.reset()
    eager = TaskRouting(sharing_ratio=0.5).attach(copy.deepcopy(denoiser)).denoiser
    torch.testing.assert_close(call(eager, inputs, timesteps), compiled)


@torch.no_grad()
def test_compiled_as_a_whole():
    torch.compiler.reset()
    denoiser, inputs = DENOISERS["sd3"]()
    routing = TaskRouting(sharing_ratio=0.5).attach(denoiser)
    expected = call(denoiser, inputs, MIXED)
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    output = compiled(**inputs, **told(denoiser, MIXED), return_dict=False)[0]
    torch.testing.assert_close(output, expected)
    assert TaskRouting.attached_to(compiled) is routing
    routing.detach()
    output = compiled(**inputs, **told(denoiser, MIXED), return_dict=False)[0]
    torch.testing.assert_close(output, call(denoiser, inputs, MIXED))


def test_a_block_called_by_something_else():
    denoiser, _ = DENOISERS["dit"]()
    TaskRouting(sharing_ratio=0.5).attach(denoiser)
    with pytest.raises(ValueError, match="DiTBlock to be called by its DiTModel"):
        denoiser.transformer_blocks[0](torch.randn(1, 16, 16), torch.randn(1, 16))


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, text, tokens):
        return text, self.linear(tokens)


class Mixer(nn.Module):
    """A transformer of a class that nobody knows: no configuration, lists and arguments of its own."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stage() for _ in range(3)])

    def forward(self, sample, timestep):
        text = sample + 1
        for stage in self.stages:
            text, sample = stage(text, sample)
        return (sample,)


@torch.no_grad()
def test_a_class_that_was_taught(monkeypatch):
    monkeypatch.setattr(streams, "_TAUGHT", {})
    model = Mixer()
    with pytest.raises(ValueError, match="but got a Mixer; teach where they are with `register_streams"):
        TaskRouting().attach(model)
    register_streams(Mixer, {"stages": {"image": Stream("tokens", 1)}})
    TaskRouting(sharing_ratio=0.5).attach(model)
    sample = torch.randn(2, 5, 6)
    expected = sample
    mask = mask_by_hand(MIXED, 6, 0.5)[:, None]
    for stage in model.stages:
        expected = stage.linear(mask * expected) + (1 - mask) * expected
    torch.testing.assert_close(model(sample, MIXED)[0], expected)
    with pytest.raises(ValueError, match="looks like a fraction; teach it with `register_time_argument"):
        TaskRouting().attach(Mixer()).denoiser(sample, torch.tensor([0.9, 0.2]))


def test_blocks_whose_gradient_needs_their_output(monkeypatch):
    monkeypatch.setattr(streams, "_TAUGHT", {})
    register_streams(Mixer, {"stages": {"image": Stream("tokens", 1)}})
    model = Mixer()
    for stage in model.stages:
        stage.linear = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    TaskRouting(sharing_ratio=0.5).attach(model)
    model(torch.randn(2, 5, 6), MIXED)[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_blocks_that_return_what_was_not_taught(monkeypatch):
    monkeypatch.setattr(streams, "_TAUGHT", {})
    register_streams(Mixer, {"stages": {"image": Stream("tokens")}})
    model = Mixer()
    TaskRouting().attach(model)
    with pytest.raises(ValueError, match="return a Tensor that continues its `tokens`, but got a tuple; teach"):
        model(torch.randn(2, 5, 6), MIXED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharing_ratio": 0.0}, r"`sharing_ratio` to be in \(0, 1\], but got 0.0"),
        ({"sharing_ratio": 1.5}, "sharing_ratio"),
        ({"routing_alpha": 0}, "`routing_alpha` to be positive, but got 0"),
        ({"streams": "image"}, "`streams` to be names"),
        ({"streams": ()}, "`streams` to be names"),
        ({"num_train_timesteps": 0}, "num_experts"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskRouting(**settings)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (TaskRouting(sharing_ratio=0.01), "`sharing_ratio` to leave a channel of 32, but got 0.01"),
        (TaskRouting(streams=("image", "sound")), "DiTModel, image, but got sound|image, text, but got sound"),
        (TaskRouting(streams=("text", "audio")), "image, text, but got audio"),
    ],
)
def test_a_routing_that_does_not_fit_leaves_the_denoiser_alone(routing, message):
    denoiser, _ = DENOISERS["sd3"]()
    before, config = trace(denoiser), dict(denoiser.config)
    with pytest.raises(ValueError, match=message):
        routing.attach(denoiser)
    assert trace(denoiser) == before and dict(denoiser.config) == config and routing.denoiser is None


def test_only_one_routing():
    denoiser, _ = DENOISERS["dit"]()
    routing = TaskRouting().attach(denoiser)
    with pytest.raises(ValueError, match="DiTModel without routing, but got one that has it"):
        TaskRouting().attach(denoiser)
    with pytest.raises(ValueError, match="attached to nothing, but got that of a DiTModel"):
        routing.attach(DENOISERS["dit"]()[0])
    routing.detach()
    with pytest.raises(ValueError, match="attached to a denoiser, but got one that is not"):
        routing.detach()
    with pytest.raises(ValueError, match="DTRTransformer2DModel without routing"):
        routing.attach(DTRTransformer2DModel(**TINY_CONFIG))
    with pytest.raises(ValueError, match="`num_train_timesteps` to be the 1000 of the DiTModel, but got 500"):
        TaskRouting(num_train_timesteps=500).attach(denoiser)
    with pytest.raises(ValueError, match="keeps the order of its samples, but got a RemixDiTModel"):
        routing.attach(RemixDiTModel(**TINY_CONFIG))
