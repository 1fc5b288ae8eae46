"""The operations of a training's steps, and the share of them in what the device can do."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TINY_CONFIG, randomised
from runs import train_here, weights

from diffusers_dmp import DiTModel, PromptPatch, RemixDiTModel
from diffusers_dmp.training import loss_log, model_flops
from diffusers_dmp.training.conditions import LabelConditions
from diffusers_dmp.training.denoiser import Denoiser
from diffusers_dmp.training.loop import StepRandomness
from diffusers_dmp.training.metrics_file import read_metrics
from diffusers_dmp.training.model_flops import ModelFlops, device_flops
from diffusers_dmp.training.precision import check_precision
from diffusers_dmp.training.prompted import PromptedTransformer
from diffusers_dmp.training.utilisation import count_flops


def parts_of(model: torch.nn.Module, structure: torch.nn.Module | None = None) -> SimpleNamespace:
    model.train()
    return SimpleNamespace(
        plain_model=model, denoiser=Denoiser((4, 8, 8)), conditions=LabelConditions(0.1), structure=structure
    )


def step_of(size: int) -> tuple[dict[str, torch.Tensor], StepRandomness]:
    """A micro-batch, and its random numbers."""
    batch = {"images": torch.zeros(size, 4, 8, 8), "class_labels": torch.zeros(size, dtype=torch.long)}
    timesteps, noise = torch.full((size,), 500), torch.randn(size, 4, 8, 8)
    dropout, flips = torch.rand(size), torch.zeros(size, dtype=torch.bool)
    return batch, StepRandomness(timesteps=timesteps, noise=noise, latent_noise=None, dropout=dropout, flips=flips)


def forward_flops(model: torch.nn.Module, size: int) -> int:
    inputs = torch.zeros(size, 4, 8, 8), torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    with torch.no_grad():
        return count_flops(lambda: model.eval()(*inputs))


def test_a_step_takes_about_three_forward_passes():
    model = randomised(DiTModel(**TINY_CONFIG))
    flops = ModelFlops(parts_of(model))(*step_of(5), None)
    assert 2.8 < flops / forward_flops(model, 5) < 3.2  # attention's backward pass is 2.5, not 2


def test_frozen_weights_have_no_gradients_to_compute():
    """The prompts' gradients come through all blocks, whose own are not needed: two forward passes rather than three."""
    model = randomised(DiTModel(**TINY_CONFIG))
    patch = PromptPatch.for_transformer(model)
    patch.attach(model)
    flops = ModelFlops(parts_of(PromptedTransformer(patch)))(*step_of(5), None)
    assert 1.5 < flops / forward_flops(model, 5) < 2.3


def test_what_checkpointing_computes_again_does_not_count():
    """It is computed again nevertheless: a model may not fit into memory without."""
    model, called = randomised(DiTModel(**TINY_CONFIG)), []
    expected = ModelFlops(parts_of(model))(*step_of(2), None)
    model.enable_gradient_checkpointing()
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: called.append(1))
    assert ModelFlops(parts_of(model))(*step_of(2), None) == expected
    assert len(called) == 2


def test_an_expert_of_remix_dit_has_gradients_in_all_bases():
    """In eval mode its weights are fused without them, unless somebody asks."""
    plain, remix = DiTModel(**TINY_CONFIG), RemixDiTModel(**TINY_CONFIG, num_bases=2, num_experts=4)
    of_plain, of_remix = (ModelFlops(parts_of(randomised(model)))(*step_of(3), None) for model in (plain, remix))
    assert of_plain < of_remix < 1.5 * of_plain


@pytest.mark.parametrize("message", ["CUDA out of memory.\nOf 80 GiB, 1 is free.", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_training_does_not_end_where_counting_fails(message, monkeypatch, caplog):
    """It goes on without `mfu`, and a line says why, once for a shape."""

    def fail(*_):
        raise RuntimeError(message)

    model = DiTModel(**TINY_CONFIG)
    counter = ModelFlops(parts_of(model))
    handle = model.transformer_blocks[1].register_forward_pre_hook(fail)
    assert counter(*step_of(3), None) is None and counter(*step_of(3), None) is None
    handle.remove()
    assert model.training
    monkeypatch.setattr(model_flops, "measure_flops_per_second", fail)
    device_flops.cache_clear()
    assert device_flops(torch.device("cpu"), "no") is None
    device_flops.cache_clear()
    first_line = message.partition("\n")[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"`mfu` is not logged, as the model's operations are not counted: {first_line}",
        f"`mfu` is not logged, as cpu could not be measured: {first_line}",
    ]


def test_counting_leaves_no_trace():
    """No random number is taken, no gradient left, and the mode is as it was."""
    model = randomised(DiTModel(**TINY_CONFIG))
    before, state, step = copy.deepcopy(model.state_dict()), torch.get_rng_state(), step_of(3)
    state = torch.get_rng_state()
    ModelFlops(parts_of(model))(*step, None)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def counter(monkeypatch) -> ModelFlops:
    """With `counted`, the steps of which a sample was counted."""
    counter = ModelFlops(parts_of(DiTModel(**TINY_CONFIG)))
    counter.counted, of_one = [], counter._of_one
    monkeypatch.setattr(counter, "_of_one", lambda *step: counter.counted.append(step) or of_one(*step))
    return counter


def test_each_shape_is_counted_once(counter):
    assert counter(*step_of(6), None) == 2 * counter(*step_of(3), None)
    assert len(counter.counted) == 1


def test_few_of_many_lengths_of_texts_are_counted(counter):
    """Almost every batch has another one."""
    for length in (40, 64, 33, 50, 65, 128, 90):
        batch, own = step_of(2)
        counter(batch | {"prompt_embeds": torch.zeros(2, length, 3)}, own, None)
    assert [step[0]["prompt_embeds"].shape[1] for step in counter.counted] == [40, 65]


def test_sharded_weights_are_not_counted():
    model = DiTModel(**TINY_CONFIG)
    assert ModelFlops(parts_of(model, structure=model))(*step_of(3), None) is None


def test_the_log_has_the_share_of_what_the_device_can_do(digits, tmp_path, monkeypatch):
    """Of an endless device nothing; of one that does an operation per second, as many as a second has."""
    shares = []
    for flops_per_second in (float("inf"), 1.0):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(loss_log, "device_flops", lambda device, precision, limit=flops_per_second: limit)
        folder = tmp_path / str(flops_per_second)
        train_here(DiTModel, digits, folder, max_train_steps=2)
        shares.append(read_metrics(folder / "metrics.jsonl")[-1])
    assert shares[0]["mfu"] == 0
    per_image = shares[1]["mfu"] / shares[1]["images_per_second"]
    assert per_image == pytest.approx(round(per_image), rel=1e-9) and 1e5 < per_image < 1e8
    assert all(torch.equal(*pair) for pair in zip(*(weights(tmp_path / name).values() for name in ("inf", "1.0"))))


def test_a_precision_that_the_device_has_not(monkeypatch):
    check_precision("bf16", torch.device("cpu"))
    with pytest.raises(ValueError, match="Expected `mixed_precision` to be one of no, fp16, bf16, but got 'fp8'."):
        check_precision("fp8", torch.device("cpu"))
    with pytest.raises(ValueError, match="to be no or bf16 on cpu, but got fp16, which needs an accelerator"):
        check_precision("fp16", torch.device("cpu"))  # Accelerate would train in float32
    monkeypatch.setattr("diffusers_dmp.models.precision._has_bfloat16", lambda device: False)
    message = (
        "another `mixed_precision` than bf16. Expected `dtype` to be float32 or float16 on cpu, but got bfloat16."
    )
    with pytest.raises(ValueError, match=message):
        check_precision("bf16", torch.device("cpu"))
