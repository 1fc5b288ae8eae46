"""A LoRA per noise interval on one denoiser, in Diffusers' pipelines: equal to a hand-written switch of separate models."""

import pytest
import torch
from loras import activate, adapters_in_use, add_loras, gradients, inputs_of, output_of, switch_by_hand, with_only
from tiny_pipelines import RECIPES, generate, wan_pipe

from diffusers_dmp import LoraExperts, NoiseIntervals

THREE = NoiseIntervals.from_timesteps([500, 800])
MIXED = [900.0, 100.0, 600.0, 950.0]  # of three intervals


@pytest.mark.parametrize("name", RECIPES)
def test_equal_to_separate_models(name):
    """The denoiser without adapters owns the middle, and a LoRA each of the ends."""
    recipe = RECIPES[name]
    denoisers = [with_only(name, [("low", 1.0)]), recipe.denoiser(), with_only(name, [("high", 1.0)])]
    by_hand, calls = switch_by_hand(name, denoisers, [500, 800])
    expected = generate(name, recipe.pipe(by_hand))
    assert sorted(calls) == [0, 1, 2]

    denoiser = add_loras(recipe.denoiser(), ["low", "high"])
    LoraExperts(["low", None, "high"], THREE).attach(denoiser)
    assert torch.equal(generate(name, recipe.pipe(denoiser)), expected)


def test_high_and_low_in_one_transformer_equal_wan22():
    """Wan2.2's pipeline has a transformer for each: here, one with both LoRAs does the same."""
    two = {"transformer": with_only("wan", [("high", 1.0)]), "transformer_2": with_only("wan", [("low", 1.0)])}
    expected = generate("wan", wan_pipe(**two, boundary_ratio=0.875))

    pipe = wan_pipe(add_loras(RECIPES["wan"].denoiser(), ["low", "high"]))
    LoraExperts(["low", "high"], NoiseIntervals.from_sigmas([0.875])).attach(pipe)
    assert torch.equal(generate("wan", pipe), expected)


def test_a_time_for_each_token():
    """As Wan2.2's pipeline of 5 billion weights tells it."""
    denoisers = [with_only("wan", [("low", 1.0)]), with_only("wan", [("high", 1.0)])]
    by_hand, calls = switch_by_hand("wan", denoisers, [875])
    expected = generate("wan", wan_pipe(by_hand, expand_timesteps=True))
    assert sorted(calls) == [0, 1]
    pipe = wan_pipe(add_loras(RECIPES["wan"].denoiser(), ["low", "high"]), expand_timesteps=True)
    LoraExperts(["low", "high"], NoiseIntervals.from_sigmas([0.875])).attach(pipe)
    assert torch.equal(generate("wan", pipe), expected)


# Weights, and several adapters in one interval


WEIGHTS = {
    "a weight": (("low", 0.5), [("low", 0.5)]),
    "several": (["low", "style"], [("low", 1.0), ("style", 1.0)]),
    "several with weights": ([("style", 0.3), "low"], [("style", 0.3), ("low", 1.0)]),
    "none": ([], []),
}


@pytest.mark.parametrize(("weights", "use_rslora"), [*((each, False) for each in WEIGHTS), ("a weight", True)])
def test_weights(weights, use_rslora):
    """A weight is the one of `set_adapters`, and may differ between intervals."""
    entry, adapters = WEIGHTS[weights]
    denoisers = [with_only("sd3", each, use_rslora=use_rslora) for each in (adapters, [("style", 2.0)])]
    by_hand, calls = switch_by_hand("sd3", denoisers, [800])
    expected = generate("sd3", RECIPES["sd3"].pipe(by_hand))
    assert sorted(calls) == [0, 1]

    denoiser = add_loras(RECIPES["sd3"].denoiser(), ["low", "high", "style"], use_rslora=use_rslora)
    LoraExperts([entry, ("style", 2)], NoiseIntervals.from_timesteps([800])).attach(denoiser)
    assert torch.equal(generate("sd3", RECIPES["sd3"].pipe(denoiser)), expected)


@pytest.mark.parametrize(("name", "argument"), [("sd3", "joint_attention_kwargs"), ("wan", "attention_kwargs")])
def test_the_pipelines_own_scale_multiplies_the_weights(name, argument):
    recipe = RECIPES[name]
    outputs = []
    for weight, call in ((0.5, {}), (1.0, {argument: {"scale": 0.5}})):
        denoiser = add_loras(recipe.denoiser(), ["low", "high"])
        LoraExperts([("low", weight), None, ("high", weight)], THREE).attach(denoiser)
        outputs.append(generate(name, recipe.pipe(denoiser), **call))
    assert torch.equal(*outputs)


def test_a_scale_of_zero_is_that_call_s_alone():
    """Diffusers sets the weight 1 after it."""
    recipe = RECIPES["flux"]
    pipe = recipe.pipe(add_loras(recipe.denoiser(), ["low", "high"]))
    plain = generate("flux", recipe.pipe(recipe.denoiser()))
    LoraExperts([("low", 0.5), ("high", 0.5)], NoiseIntervals.from_timesteps([500])).attach(pipe)
    expected = generate("flux", pipe)
    assert torch.equal(generate("flux", pipe, joint_attention_kwargs={"scale": 0.0}), plain)
    assert torch.equal(generate("flux", pipe), expected)


def test_an_active_adapter_that_is_not_named_is_inactive_until_detached(caplog):
    recipe = RECIPES["sd3"]
    denoiser = activate(add_loras(recipe.denoiser(), ["low", "high", "style"]), [("style", 1.0), ("low", 1.0)])
    with_style = generate("sd3", recipe.pipe(denoiser))
    experts = LoraExperts(["low"], NoiseIntervals.uniform(1)).attach(denoiser)
    (record,) = caplog.records
    assert "uses style, which no interval of LoraExperts names" in record.getMessage()
    assert torch.equal(
        generate("sd3", recipe.pipe(denoiser)), generate("sd3", recipe.pipe(with_only("sd3", [("low", 1.0)])))
    )
    experts.detach()
    assert torch.equal(generate("sd3", recipe.pipe(denoiser)), with_style)


# Steps on a boundary


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("flux", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((name, torch.bfloat16) for name in ("qwen", "sd3", "zimage")),
    ],
)
def test_a_step_on_a_boundary(name, dtype):
    """It belongs to the interval that it begins; the next one, which half precision rounds to the same, does not."""
    recipe = RECIPES[name]
    pipe = recipe.pipe(add_loras(recipe.denoiser(), ["low", "high"]).to(dtype)).to(dtype)
    sigmas = [1.0, 0.901, 0.9, 0.899, 0.898, 0.2]
    if name != "sd3":
        pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    else:
        pipe.scheduler.set_shift(1.0)
    used = []
    LoraExperts(["low", "high"], NoiseIntervals.from_sigmas([0.9])).attach(pipe)
    pipe.transformer.register_forward_pre_hook(lambda denoiser, _: used.append(adapters_in_use(denoiser)[0][0]))
    call = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in recipe.call().items()}
    call |= {key: [part.to(dtype) for part in value] for key, value in call.items() if isinstance(value, list)}
    generate(name, pipe, len(sigmas), **call, sigmas=sigmas)
    calls_per_step = len(used) // len(sigmas)
    assert used[::calls_per_step] == [["high"]] * 3 + [["low"]] * 3


# Batches of several intervals


@pytest.mark.parametrize("name", RECIPES)
def test_each_sample_is_its_owners_in_a_mixed_batch(name):
    inputs = inputs_of(name, MIXED)
    denoiser = add_loras(RECIPES[name].denoiser(), ["low", "high"])
    LoraExperts(["low", None, "high"], THREE).attach(denoiser)
    output = output_of(denoiser, inputs)
    output.square().sum().backward()
    for adapter, samples in {"high": [0, 3], "low": [1], None: [2]}.items():
        alone = with_only(name, [(adapter, 1.0)]) if adapter else RECIPES[name].denoiser()
        expected = output_of(alone, inputs)[samples]
        torch.testing.assert_close(output[samples], expected)
        if adapter:
            expected.square().sum().backward()
            assert gradients(alone)
            torch.testing.assert_close(
                {name: gradients(denoiser)[name] for name in gradients(alone)}, gradients(alone)
            )


# Gradient checkpointing


@pytest.mark.parametrize(
    ("name", "order"), [*((name, "after") for name in RECIPES), ("sd3", "before"), ("sd15", "before")]
)
def test_checkpointing_with_another_forward_pass_before_the_backward_pass(name, order):
    """Blocks are computed again with the adapters of their own pass."""
    high, low = inputs_of(name, [900.0, 950.0]), inputs_of(name, [100.0, 200.0])

    def gradients_of_high(checkpointed: bool) -> dict[str, torch.Tensor]:
        denoiser = add_loras(RECIPES[name].denoiser(), ["low", "high"]).train()
        if checkpointed and order == "before":
            denoiser.enable_gradient_checkpointing()
        LoraExperts(["low", None, "high"], THREE).attach(denoiser)
        if checkpointed and order == "after":
            denoiser.enable_gradient_checkpointing()
        torch.manual_seed(0)
        loss = output_of(denoiser, high).square().mean()
        with torch.no_grad():
            output_of(denoiser, low)
        loss.backward()
        return gradients(denoiser)

    plain = gradients_of_high(checkpointed=False)
    assert plain and all(".high." in parameter for parameter in plain)
    torch.testing.assert_close(gradients_of_high(checkpointed=True), plain)


# Detaching


@pytest.mark.parametrize("name", ["sd3", "pixart", "sd15"])
def test_detaching_leaves_no_trace(name):
    recipe = RECIPES[name]
    denoiser = activate(add_loras(recipe.denoiser(), ["low", "high"]), [("low", 0.7)])
    if name != "sd15":
        denoiser.enable_gradient_checkpointing()
    next(parameter for key, parameter in denoiser.named_parameters() if ".high." in key).requires_grad_(False)
    attributes = {key: dict(vars(module)) for key, module in denoiser.named_modules()}
    required = {key: parameter.requires_grad for key, parameter in denoiser.named_parameters()}
    adapters = adapters_in_use(denoiser)
    before = generate(name, recipe.pipe(denoiser))

    experts = LoraExperts(["low", "high", None], THREE).attach(denoiser)
    assert LoraExperts.attached_to(denoiser) is experts
    if name == "sd15":  # checkpointing is enabled while they are attached, and stays
        denoiser.enable_gradient_checkpointing()
        checkpoints = {
            m: m._gradient_checkpointing_func for m in denoiser.modules() if hasattr(m, "gradient_checkpointing")
        }
    output_of(denoiser, inputs_of(name, MIXED)).square().mean().backward()
    assert not torch.equal(generate(name, recipe.pipe(denoiser)), before)
    assert experts.detach() is experts

    assert LoraExperts.attached_to(denoiser) is None
    assert adapters_in_use(denoiser) == adapters
    assert {key: parameter.requires_grad for key, parameter in denoiser.named_parameters()} == required
    if name == "sd15":
        assert all(m._gradient_checkpointing_func is function for m, function in checkpoints.items())
        denoiser.disable_gradient_checkpointing()
    else:
        for key, module in denoiser.named_modules():
            assert vars(module).keys() == attributes[key].keys()
            for attribute, value in attributes[key].items():
                assert vars(module)[attribute] is value or not callable(value), (key, attribute)
            assert not [value for attribute, value in vars(module).items() if "hooks" in attribute and value]
    assert torch.equal(generate(name, recipe.pipe(denoiser)), before)
