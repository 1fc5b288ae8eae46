"""Prompts on the transformers of Diffusers' pipelines: equal to prompts written by hand, and without a trace when they are detached."""

import copy
import inspect
import json
import pickle
from typing import Any

import pytest
import torch
from conftest import randomised
from diffusers import FirstBlockCacheConfig
from prompted import count_gatings, gates_of
from tiny_denoisers import DENOISERS, call, sample_of, told
from tiny_pipelines import RECIPES, flux, generate, qwen, randn, sd3, wan, wan_pipe, zimage

from diffusers_dmp import PromptPatch, TaskRouting

PIPELINES = {"sd3": 64, "flux": 16, "qwen": 16, "wan": 3, "pixart": 16, "zimage": 64}  # image tokens, of `RECIPES`
DIRECT = {"sd3": 64, "flux": 16, "qwen": 16, "wan": 8, "pixart": 16, "zimage": 16, "stock_dit": 16}  # of `DENOISERS`
TIMESTEPS = torch.tensor([900.0, 200.0])


def prompts_for(transformer: Any, num_prompts: int, **config: Any) -> PromptPatch:
    """Random prompts, not attached yet."""
    patch = randomised(PromptPatch.for_transformer(transformer, num_prompts=num_prompts, **config)).eval()
    with torch.no_grad():
        patch.prompts.mul_(num_prompts)  # as the gates of all sum to 1
    return patch


# In the real pipelines


@pytest.mark.parametrize("name", PIPELINES)
def test_new_prompts_change_nothing(name):
    pipe = RECIPES[name].pipe(RECIPES[name].denoiser())
    plain = generate(name, pipe, 3)
    PromptPatch.for_transformer(pipe.transformer, num_prompts=PIPELINES[name]).attach(pipe.transformer)
    torch.testing.assert_close(generate(name, pipe, 3), plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_are_those_of_a_hand_written_reference(name):
    transformer = RECIPES[name].denoiser()
    patch = prompts_for(transformer, PIPELINES[name])
    by_hand = copy.deepcopy(transformer)
    add_prompts_by_hand(by_hand, patch)
    plain, expected = (generate(name, RECIPES[name].pipe(model), 3) for model in (transformer, by_hand))
    patch.attach(transformer)
    torch.testing.assert_close(generate(name, RECIPES[name].pipe(transformer), 3), expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-2


def add_prompts_by_hand(transformer: Any, patch: PromptPatch) -> None:
    """Change the blocks of a transformer, so that each adds its prompts to its image tokens."""
    recorded = {}
    if "Wan" in type(transformer).__name__:
        transformer.condition_embedder.register_forward_hook(lambda *call: recorded.update(conditioning=call[2][0]))
    if "PixArt" in type(transformer).__name__:
        transformer.adaln_single.register_forward_hook(lambda *call: recorded.update(conditioning=call[2][1]))
    lists = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
    blocks = [block for name in lists for block in getattr(transformer, name, [])]
    assert len(blocks) == patch.config.depth
    for index, block in enumerate(blocks):
        block.forward = _prompted_forward(block.forward, index, patch, recorded)


def _prompted_forward(forward: Any, index: int, patch: PromptPatch, recorded: dict) -> Any:
    signature = inspect.signature(forward)
    weight, bias, num_prompts = patch.gate_proj.weight, patch.gate_proj.bias, patch.config.num_prompts

    def prompted(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        image = "x" if "x" in bound.arguments else "hidden_states"
        conditioning = recorded.get("conditioning", bound.arguments.get("adaln_input", bound.arguments.get("temb")))
        gates = gates_of(conditioning, weight, bias, depth=index + 1)[index]
        tokens = bound.arguments[image].clone()
        tokens[:, :num_prompts] += gates[..., None] * patch.prompts[index]
        bound.arguments[image] = tokens
        return forward(*bound.args, **bound.kwargs)

    return prompted


@pytest.mark.parametrize("name", PIPELINES)
def test_saved_and_loaded(name, tmp_path):
    """The pipeline saves the transformer as if it had no prompts, and the prompts save themselves."""
    pipe = RECIPES[name].pipe(RECIPES[name].denoiser())
    plain = generate(name, pipe, 3)
    patch = prompts_for(pipe.transformer, PIPELINES[name]).attach(pipe.transformer)
    patched = generate(name, pipe, 3)
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    patch.save_pretrained(tmp_path / "patch")

    loaded = RECIPES[name].pipe(type(pipe.transformer).from_pretrained(tmp_path / "transformer"))
    torch.testing.assert_close(generate(name, loaded, 3), plain)
    PromptPatch.from_pretrained(tmp_path / "patch").attach(loaded.transformer)
    torch.testing.assert_close(generate(name, loaded, 3), patched)
    assert (patched - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
def test_blocks_that_a_cache_skips_get_no_prompts(name):
    """A skipped block returns what it was given, without the prompts that were put in."""
    transformer = RECIPES[name].denoiser(num_layers=3)
    patch = prompts_for(transformer, PIPELINES[name])
    by_hand = copy.deepcopy(transformer)
    add_prompts_by_hand(by_hand, patch)
    patch.attach(transformer)
    outputs = []
    for model in (by_hand, transformer):
        full = generate(name, RECIPES[name].pipe(copy.deepcopy(model)), 4)
        model.enable_cache(FirstBlockCacheConfig(threshold=1e3))  # the first block alone, from the second step on
        outputs.append(generate(name, RECIPES[name].pipe(model), 4))
        assert not torch.allclose(outputs[-1], full, atol=1e-3)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("offload", ["models", pytest.param("groups", marks=pytest.mark.group_offload)])
@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_offloaded(name, offload):
    pipe = RECIPES[name].pipe(RECIPES[name].denoiser())
    prompts_for(pipe.transformer, PIPELINES[name]).attach(pipe.transformer)
    expected = generate(name, pipe, 3)
    if offload == "models":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(generate(name, pipe, 3), expected)


def test_each_of_wans_two_transformers_has_prompts_of_its_own():
    pipe = wan_pipe(wan(), transformer_2=wan(1), boundary_ratio=0.875)
    gatings = [
        count_gatings(prompts_for(transformer, 3).attach(transformer))
        for transformer in (pipe.transformer, pipe.transformer_2)
    ]
    generate("wan", pipe, 6)
    noisy = int((pipe.scheduler.timesteps >= 875).sum())
    # guidance calls them a second time, with the same gates
    assert [len(computed) for computed in gatings] == [noisy, 6 - noisy]


def test_wan_with_a_time_for_each_token():
    """All tokens have the same time where no image is given."""
    transformer = wan()
    plain = generate("wan", wan_pipe(transformer, expand_timesteps=True), 3)
    prompts_for(transformer, 3).attach(transformer)
    with_tokens, without = (generate("wan", wan_pipe(transformer, expand_timesteps=each), 3) for each in (True, False))
    torch.testing.assert_close(with_tokens, without, atol=1e-5, rtol=1e-4)
    assert (with_tokens - plain).abs().max() > 1e-2


# Called directly


@pytest.fixture(params=DIRECT)
def direct(request) -> tuple[Any, dict, PromptPatch]:
    """A transformer, the inputs of a call, and random prompts that fit."""
    transformer, inputs = DENOISERS[request.param]()
    return transformer, inputs, prompts_for(transformer, DIRECT[request.param])


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(direct):
    transformer, inputs, patch = direct
    patch.attach(transformer)
    together = call(transformer, inputs, TIMESTEPS)
    for index in range(2):
        alone = call(transformer, sample_of(inputs, index), TIMESTEPS[index : index + 1])
        torch.testing.assert_close(alone[0], together[index], atol=2e-5, rtol=1e-4)


def test_training_changes_the_prompts_alone(direct):
    transformer, inputs, patch = direct
    for parameter in patch.parameters():
        torch.nn.init.zeros_(parameter)
    patch.attach(transformer).train()
    before = copy.deepcopy((transformer.state_dict(), patch.state_dict()))
    optimizer = torch.optim.AdamW([*transformer.parameters(), *patch.parameters()], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        output, importance_loss = transformer(**inputs, **told(transformer, TIMESTEPS), return_dict=False)
        output = torch.stack(list(output))
        (output.square().mean() + importance_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[0][name]) for name, value in transformer.state_dict().items())
    assert all((value - before[1][name]).abs().max() > 0 for name, value in patch.state_dict().items())


def test_gradient_checkpointing(direct):
    """Gradients stay the same, also with two forward passes before the backward pass, which computes blocks again."""
    transformer, inputs, patch = direct
    patch.attach(transformer)

    def gradients() -> list[torch.Tensor]:
        patch.zero_grad()
        outputs = [call(transformer, inputs, timesteps) for timesteps in (TIMESTEPS, TIMESTEPS.flip(0))]
        sum(output.square().mean() for output in outputs).backward()
        return [parameter.grad for name, parameter in patch.named_parameters() if name != "noise_weight"]

    plain = gradients()
    transformer.enable_gradient_checkpointing()
    for gradient, expected in zip(gradients(), plain):
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("prompts_dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bfloat16(direct, prompts_dtype):
    """Also where the prompts stay in float32, as in training on half-precision weights."""
    transformer, inputs, patch = direct
    plain = call(transformer, inputs, TIMESTEPS)
    patch.attach(transformer)
    change = call(transformer, inputs, TIMESTEPS) - plain
    transformer.to(torch.bfloat16), patch.to(prompts_dtype)
    inputs = {name: _to(value, torch.bfloat16) for name, value in inputs.items()}
    patched = call(transformer, inputs, TIMESTEPS)
    assert patched.dtype == torch.bfloat16
    change_in_half = patched.float() - call(patch.detach() and transformer, inputs, TIMESTEPS).float()
    assert (change_in_half - change).abs().mean() < 0.2 * change.abs().mean()


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_to(each, dtype) for each in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def test_detaching_leaves_no_trace(direct):
    transformer, inputs, patch = direct
    next(transformer.parameters()).requires_grad_(False)  # some were frozen before
    required_gradients = [parameter.requires_grad for parameter in transformer.parameters()]
    attributes = {name: set(vars(module)) for name, module in transformer.named_modules()}
    before = call(transformer, inputs, TIMESTEPS)
    patched = call(patch.attach(transformer).transformer, inputs, TIMESTEPS)
    assert ((patched - before).abs().flatten(1).amax(1) > 1e-3).all()
    with pytest.raises(ValueError, match="without prompts, but got one that has some"):
        copy.deepcopy(patch).attach(transformer)
    patch.detach()
    assert torch.equal(call(transformer, inputs, TIMESTEPS), before)
    assert [parameter.requires_grad for parameter in transformer.parameters()] == required_gradients
    for name, module in transformer.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not any(value for key, value in vars(module).items() if "hooks" in key), name


@pytest.mark.parametrize("detached_first", ["prompts", "routing"])
@pytest.mark.parametrize("attached_first", ["prompts", "routing"])
@torch.no_grad()
def test_beside_another_plugin(attached_first, detached_first):
    """A block that is routed gets its tokens with the prompts, and both come off in any order."""
    transformer, inputs = DENOISERS["flux"]()
    attributes = {name: set(vars(module)) for name, module in transformer.named_modules()}
    plain = call(transformer, inputs, TIMESTEPS)
    plugins = {"prompts": prompts_for(transformer, 16), "routing": TaskRouting(sharing_ratio=0.5, routing_alpha=4.0)}
    by_hand = copy.deepcopy(transformer)
    copy.copy(plugins["routing"]).attach(by_hand)
    add_prompts_by_hand(by_hand, plugins["prompts"])

    for name in sorted(plugins, key=lambda name: name != attached_first):
        plugins[name].attach(transformer)
    both = call(transformer, inputs, TIMESTEPS)
    torch.testing.assert_close(both, call(by_hand, inputs, TIMESTEPS), atol=1e-5, rtol=1e-4)
    for name in sorted(plugins, key=lambda name: name != detached_first):
        plugins[name].detach()
    assert torch.equal(call(transformer, inputs, TIMESTEPS), plain)
    assert {name: set(vars(module)) for name, module in transformer.named_modules()} == attributes


@torch.no_grad()
def test_copies_of_a_patched_transformer(direct):
    transformer, inputs, patch = direct
    patch.attach(transformer)
    patched = call(transformer, inputs, TIMESTEPS)
    for copied in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
        assert torch.equal(call(copied, inputs, TIMESTEPS), patched)
        assert PromptPatch.attached_to(copied).transformer is copied


# What the gates depend on


@torch.no_grad()
def test_gates_are_cached_by_all_that_decides_them(direct):
    transformer, inputs, patch = direct
    patch.attach(transformer)
    computed = count_gatings(patch)
    first = call(transformer, inputs, TIMESTEPS)
    assert torch.equal(call(transformer, inputs, TIMESTEPS), first)
    assert len(computed) == 1
    changes = [inputs | {name: inputs[name] + 1} for name in ("pooled_projections", "class_labels") if name in inputs]
    for changed in changes:
        call(transformer, changed, TIMESTEPS)
    call(transformer, inputs, TIMESTEPS.flip(0))
    assert len(computed) == 2 + len(changes)


@torch.no_grad()
def test_gates_depend_on_guidance():
    transformer, (_, inputs) = flux(guidance_embeds=True), DENOISERS["flux"]()
    computed = count_gatings(prompts_for(transformer, 16).attach(transformer))
    for guidance in (3.5, 3.5, 7.0):
        call(transformer, inputs | {"guidance": torch.full((2,), guidance)}, TIMESTEPS)
    assert len(computed) == 2


@torch.no_grad()
def test_a_sample_has_the_gates_of_its_noisiest_token():
    transformer, inputs = DENOISERS["wan"]()
    patch = prompts_for(transformer, 8).attach(transformer)
    computed = count_gatings(patch)
    of_tokens = torch.tensor([[0.0, 900.0] * 4, [0.0, 0.0, 200.0, 200.0] * 2])
    transformer(**inputs, timestep=of_tokens)
    transformer(**inputs, timestep=TIMESTEPS)
    torch.testing.assert_close(computed[0][0], computed[1][0])


@torch.no_grad()
def test_given_images_do_not_decide_the_gates():
    """Qwen-Image-Edit embeds t = 0 as well, for the tokens of the images that it edits."""
    transformer, (_, inputs) = qwen(zero_cond_t=True), DENOISERS["qwen"]()
    expected = transformer.time_text_embed(TIMESTEPS / 1000, torch.zeros(()))
    computed = count_gatings(prompts_for(transformer, 16).attach(transformer))
    call(transformer, inputs, TIMESTEPS)
    torch.testing.assert_close(computed[0][0], expected)


@torch.no_grad()
def test_an_embedding_of_another_width(tmp_path):
    """Z-Image's embedding of the timestep has 256 channels, its blocks have more."""
    transformer, (_, inputs) = zimage(dim=272, n_heads=17, n_kv_heads=17), DENOISERS["zimage"]()
    plain = call(transformer, inputs, TIMESTEPS)
    patch = prompts_for(transformer, 16)
    assert patch.config.hidden_size == 272 and patch.config.conditioning_size == 256
    patch.save_pretrained(tmp_path)
    patched = call(PromptPatch.from_pretrained(tmp_path).attach(transformer).transformer, inputs, TIMESTEPS)
    assert (patched - plain).abs().max() > 1e-3
    PromptPatch.attached_to(transformer).detach()
    with pytest.raises(ValueError, match="`conditioning_size` to be the 256 channels .* ZImage.*, but got 272"):
        PromptPatch(272, 16, 2).attach(transformer)


def test_prompts_that_were_saved_without_the_width_of_an_embedding(tmp_path):
    PromptPatch(48, 16, 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["conditioning_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert PromptPatch.from_pretrained(tmp_path).gate_proj.in_features == 49


def test_gate_weights():
    """They are asked for at training timesteps, whatever the transformer is told."""
    transformer, inputs = DENOISERS["flux"]()
    patch = prompts_for(transformer, 16).attach(transformer)
    inputs = sample_of(inputs, 0)
    conditioning = transformer.time_text_embed(TIMESTEPS, inputs["pooled_projections"])
    expected = gates_of(conditioning, patch.gate_proj.weight, patch.gate_proj.bias, depth=4).transpose(0, 1)
    torch.testing.assert_close(patch.gate_weights(TIMESTEPS, **inputs), expected, atol=1e-5, rtol=1e-4)
    del inputs["hidden_states"]
    with pytest.raises(ValueError, match="`hidden_states` among the inputs of a FluxTransformer2DModel"):
        patch.gate_weights(TIMESTEPS, **inputs)


# Which tokens get prompts


@torch.no_grad()
def test_text_and_padding_in_the_images_sequence_get_no_prompts():
    """Z-Image pads the 16 tokens of the image and the 7 of the text to 32 each."""
    transformer, inputs = DENOISERS["zimage"]()
    entered = []
    transformer.layers[0].attention_norm1.register_forward_pre_hook(lambda norm, args: entered.append(args[0]))
    call(transformer, inputs, TIMESTEPS)
    call(prompts_for(transformer, 16).attach(transformer).transformer, inputs, TIMESTEPS)
    change = (entered[1] - entered[0]).abs().amax((0, 2))
    assert change.shape == (64,) and (change[:16] > 0).all() and (change[16:] == 0).all()


@pytest.mark.parametrize("name", sorted(PIPELINES.keys() - {"pixart"}))
def test_an_image_of_another_size(name):
    pipe = RECIPES[name].pipe(RECIPES[name].denoiser())
    PromptPatch.for_transformer(pipe.transformer, num_prompts=5).attach(pipe.transformer)
    with pytest.raises(
        ValueError, match=f"image of 5 tokens, one for each prompt of a block, but got {PIPELINES[name]}"
    ):
        generate(name, pipe, 1)


def test_the_number_of_tokens_of_the_configuration():
    assert PromptPatch.for_transformer(sd3(sample_size=8)).config.num_prompts == 64
    for transformer in (flux(), qwen(), wan(), zimage()):
        with pytest.raises(ValueError, match=f"`num_prompts` to be given for a {type(transformer).__name__}"):
            PromptPatch.for_transformer(transformer)


def test_several_images_of_a_sample():
    transformer, inputs = DENOISERS["zimage"]()
    prompts_for(transformer, 16).attach(transformer)
    with pytest.raises(ValueError, match="images of the same number of tokens, but got 16, 32"):
        call(transformer, inputs | {"x": [randn(16, 1, 8, 8), randn(16, 1, 16, 8)]}, TIMESTEPS)
    with pytest.raises(ValueError, match="one image for each sample, but got lists of images"):
        call(transformer, inputs | {"x": [[image] for image in inputs["x"]]}, TIMESTEPS)


@pytest.mark.parametrize("transformer", [flux, qwen, wan, zimage])
def test_blocks_with_rotary_embeddings_take_no_extra_tokens(transformer):
    transformer = transformer()
    with pytest.raises(ValueError, match="can take extra tokens to prepend to, but got a"):
        PromptPatch.for_transformer(transformer, num_prompts=4, mode="prepend")
    with pytest.raises(ValueError, match="can take extra tokens to prepend to, but got a"):
        PromptPatch(32, 4, 2, mode="prepend").attach(transformer)


@torch.no_grad()
def test_prepended_to_sd3():
    """Its blocks know no positions. Prompts at zero still are attended to."""
    transformer, inputs = DENOISERS["sd3"]()
    prompts_for(transformer, 4, mode="prepend").attach(transformer)
    together = call(transformer, inputs, TIMESTEPS)
    alone = call(transformer, sample_of(inputs, 1), TIMESTEPS[1:])
    torch.testing.assert_close(alone[0], together[1], atol=2e-5, rtol=1e-4)
    bigger = call(transformer, inputs | {"hidden_states": randn(2, 4, 16, 16)}, TIMESTEPS)
    assert bigger.shape == (2, 4, 16, 16)
    with pytest.raises(ValueError, match="the first block to be called, .* but got a call that skips it"):
        call(transformer, inputs | {"skip_layers": [0]}, TIMESTEPS)


@torch.no_grad()
def test_the_gates_of_prepended_prompts_depend_on_the_timestep_alone():
    transformer, inputs = DENOISERS["sd3"]()
    embedder = transformer.time_text_embed
    expected = embedder.timestep_embedder(embedder.time_proj(TIMESTEPS))
    computed = count_gatings(prompts_for(transformer, 4, mode="prepend").attach(transformer))
    call(transformer, inputs, TIMESTEPS)
    torch.testing.assert_close(computed[0][0], expected)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_of_two_classes():
    torch.compiler.reset()
    transformer, (_, inputs) = flux(num_layers=6, num_single_layers=6), DENOISERS["flux"]()
    prompts_for(transformer, 16).attach(transformer)
    patched = call(transformer, inputs, TIMESTEPS)
    transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(transformer, inputs, TIMESTEPS), patched)
