"""FSDP2: a training with sharded weights is the same training, on any number of processes."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import TINY_CONFIG
from diffusers import DDPMScheduler, DiffusionPipeline
from runs import TINY, launch_with_fsdp2, train_here, weights
from safetensors.torch import load_file
from sharded_launch import ENVIRONMENT, pretend_accelerators
from tiny_pipelines import sd3
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor

from diffusers_dmp import DenoiserExperts, DiTModel, NoiseIntervals
from diffusers_dmp.evaluation.digits import write_image_folder
from diffusers_dmp.models.dit.layers import DiTBlock
from diffusers_dmp.training import compilation
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.data.training_data import VALIDATION_BATCH_SIZE
from diffusers_dmp.training.export import export_checkpoint
from diffusers_dmp.training.finite import FiniteCheck
from diffusers_dmp.training.metrics_file import read_metrics
from diffusers_dmp.training.objectives.ddpm import DiffusionObjective
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.run import TrainingRun
from diffusers_dmp.training.sharding import check_sharding, local, reshard, with_all_experts, without_weights
from diffusers_dmp.training.trainer import make_accelerator

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
SETTINGS = {
    "max_grad_norm": 0.5, "validation_steps": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    "sample_steps": 2, "sample_inference_steps": 2,
}  # fmt: skip


@pytest.fixture
def sharded(monkeypatch):
    """FSDP2 in this process, which is the only one."""
    for name, value in (ENVIRONMENT | ALONE).items():
        monkeypatch.setenv(name, value)
    pretend_accelerators()
    yield
    if torch.distributed.is_initialized():  # a training ends it
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """One image more than two processes have in a batch each: one of them has a second batch."""
    return write_image_folder(tmp_path_factory.mktemp("held_out"), range(2 * VALIDATION_BATCH_SIZE + 1))


def train_in(folder, digits, held_out, **arguments):
    train_here(DiTModel, digits, folder, validation_dataset=str(held_out), **SETTINGS | arguments)


def launch_sharded(script, folder, digits, held_out, num_processes=2, **arguments):
    values = TINY | SETTINGS | arguments
    values |= {"dataset": digits, "validation_dataset": held_out, "output_dir": folder, "report_to": "none"}
    launch_with_fsdp2(script, num_processes, values)


def metrics(folder):
    return {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if row["step"]}


def expect_same_training(folder, reference, steps=(1, 2, 3, 4)):
    for step in steps:
        found, expected = metrics(folder)[step], metrics(reference)[step]
        names = ["loss", "grad_norm", *(["validation_loss"] if step % 2 == 0 else [])]
        assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-4)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, weights(reference)[name], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def reference(digits, held_out, tmp_path_factory):
    """The same training without FSDP2."""
    folder = tmp_path_factory.mktemp("reference")
    train_in(folder, digits, held_out)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def test_a_sharded_training_is_the_same_training_and_is_resumed(
    reference, digits, held_out, tmp_path, sharded, monkeypatch
):
    train_in(tmp_path, digits, held_out)
    expect_same_training(tmp_path, reference)
    assert (tmp_path / "checkpoint-4/pytorch_model_fsdp_0").is_dir()  # it was sharded
    assert (tmp_path / "samples/step-2.png").read_bytes()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline.transformer) is DiTModel  # not FSDP2's subclass
    assert (tmp_path / "pipeline_config/transformer/config.json").read_text() == (
        reference / "pipeline_config/transformer/config.json"
    ).read_text()

    for use_ema in (True, False):
        export_checkpoint(tmp_path / "checkpoint-4", tmp_path / f"exported_{use_ema}", use_ema)
    exported = [load_weights(tmp_path / f"exported_{use_ema}") for use_ema in (True, False)]
    saved = weights(tmp_path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported[0].items())
    assert not any(torch.equal(tensor, saved[name]) for name, tensor in exported[1].items())

    shutil.rmtree(tmp_path / "checkpoint-4")
    loaded = []
    resume = TrainingRun.resume

    def spied(run, checkpoint):
        step = resume(run, checkpoint)
        loaded.extend(average.clone() for average in run.ema.shadow_params)
        return step

    monkeypatch.setattr(TrainingRun, "resume", spied)
    train_again(tmp_path, digits, held_out)
    expect_same_training(tmp_path, reference, steps=(3, 4))
    average = load_average(reference / "checkpoint-2")
    assert all(torch.allclose(each, expected, atol=1e-6) for each, expected in zip(loaded, average, strict=True))


def load_weights(pipeline):
    return load_file(pipeline / "transformer/diffusion_pytorch_model.safetensors")


def load_average(checkpoint):
    return torch.load(checkpoint / "custom_checkpoint_1.pkl", weights_only=True)["shadow_params"]


def train_again(folder, digits, held_out):
    AcceleratorState._reset_state(reset_partial_state=True)
    pretend_accelerators()
    train_in(folder, digits, held_out, resume_from_checkpoint="latest")


def test_a_checkpoint_is_resumed_as_it_was_launched(reference, digits, held_out, tmp_path, sharded):
    shutil.copytree(reference / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="Expected the training to be launched as .*checkpoint-2 was, with no FSDP2"):
        train_in(tmp_path, digits, held_out, resume_from_checkpoint="latest")


def test_mixed_precision_rounds_no_timesteps(digits, tmp_path, sharded, monkeypatch):
    """FSDP2 by itself would: the integers from 513 on are even in bfloat16, those from 257 on odd ones too far apart."""
    seen, dtypes = [], []
    forward, block_forward = DiTModel.forward, DiTBlock.forward

    def spied(model, x_t, timesteps, **arguments):
        seen.append(timesteps)
        return forward(model, x_t, timesteps, **arguments)

    def spied_block(block, *args, **kwargs):
        dtypes.append(next(block.parameters()).dtype)
        return block_forward(block, *args, **kwargs)

    monkeypatch.setattr(DiTModel, "forward", spied)
    monkeypatch.setattr(DiTBlock, "forward", spied_block)
    train_here(
        DiTModel, digits, tmp_path, mixed_precision="bf16", objective="flow", learn_sigma=False, max_train_steps=2
    )
    timesteps = torch.cat(seen)
    assert timesteps.dtype == torch.float32 and (timesteps != timesteps.bfloat16().float()).any()
    assert set(dtypes) == {torch.bfloat16}
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in weights(tmp_path).values())


def test_without_an_accelerator_nothing_is_sharded(digits, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    accelerator = make_accelerator(TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    assert not accelerator.is_fsdp2 and "The weights are not sharded" in caplog.text


def test_forward_passes_without_a_backward_leave_slices(sharded):
    accelerator = Accelerator(cpu=True)
    model = DiTModel(**TINY_CONFIG)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with torch.no_grad():
        model(torch.zeros(1, 4, 8, 8), torch.tensor([1]), class_labels=torch.tensor([1]))
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    reshard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_weights_that_are_not_finite_are_found_in_any_slice(sharded):
    accelerator = Accelerator(cpu=True)
    model = DiTModel(**TINY_CONFIG)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    check = FiniteCheck(accelerator, TrainingArguments(), 1000)
    check.expect_finite_weights(model.state_dict().items(), step=1)
    local(model.proj_out_1.bias.detach())[3] = float("nan")
    with pytest.raises(ValueError, match="got others in 'proj_out_1.bias' after step 1"):
        check.expect_finite_weights(model.state_dict().items(), step=1)


def test_a_model_without_weights_has_all_the_rest():
    experts = DenoiserExperts([sd3(seed=0), sd3(seed=1)], NoiseIntervals.from_sigmas([0.5]))
    structure = without_weights(experts)
    assert all(parameter.is_meta for parameter in structure.parameters())
    assert not any(buffer.is_meta for buffer in structure.buffers())
    structure.load_state_dict(experts.state_dict(), assign=True)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64), "timestep": torch.tensor([100.0, 900.0]),
    }  # fmt: skip
    assert torch.equal(structure(**inputs).sample, experts(**inputs).sample)


def test_a_batch_with_all_experts():
    intervals = NoiseIntervals((0, 100, 1000))
    x_t, timesteps = torch.randn(3, 4, 2, 2), torch.tensor([950.0, 990.0, 999.0])
    conditions = {"text": torch.randn(3, 5), "labels": None}
    extended = with_all_experts(intervals, x_t, timesteps, conditions)
    assert torch.equal(extended[0][:3], x_t) and torch.equal(extended[2]["text"][:3], conditions["text"])
    assert extended[2]["labels"] is None and extended[2]["text"].shape == (5, 5)
    assert intervals.index(extended[1]).tolist() == [1, 1, 1, 0, 1]


def test_processes_that_share_an_expert():
    recipe = TrainingRecipe(expert_intervals=NoiseIntervals.uniform(4), shares_expert=True)
    owners = [recipe.step_experts(0, step, 3, 6).owners for step in range(20)]
    assert all(len(each) == 3 and len(set(each)) == 1 for each in owners)
    assert {each[0] for each in owners} == {0, 1, 2, 3}


EXPERTS = {"expert_intervals": NoiseIntervals.uniform(4)}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"fsdp_version": 1}, "`fsdp_version` to be 2, but got 1"),
        ({"state_dict_type": StateDictType.FULL_STATE_DICT}, "to be SHARDED_STATE_DICT .* but got FULL_STATE_DICT"),
        ({"mixed_precision": "fp16"}, "no or bf16 with FSDP2, but got fp16"),
        ({"optimizer": "adamw_8bit"}, "`optimizer` to be 'adamw' with FSDP2, but got 'adamw_8bit'"),
        ({"weighting": "uw"}, "without parameters of its own with FSDP2, .* but got 'uw'"),
        ({"model": torch.nn.Linear(1, 1)}, "a whole model to train with FSDP2"),
        ({"recipe": TrainingRecipe(expert_batches="mixed", **EXPERTS)}, "all 4 experts with FSDP2, .* got 2 samples"),
        ({"recipe": TrainingRecipe(expert_batches="density", **EXPERTS)}, "all 4 experts with FSDP2"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded(changed, expected):
    plugin = SimpleNamespace(
        fsdp_version=changed.get("fsdp_version", 2),
        state_dict_type=changed.get("state_dict_type", StateDictType.SHARDED_STATE_DICT),
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        is_fsdp2=plugin.fsdp_version == 2,
        mixed_precision=changed.get("mixed_precision", "bf16"),
        num_processes=2,
    )
    args = SimpleNamespace(
        batch_size=4, gradient_accumulation_steps=1, optimizer=changed.get("optimizer", "adamw"),
        weighting=changed.get("weighting", "constant"),
    )  # fmt: skip
    objective = DiffusionObjective(DDPMScheduler(), weighting=args.weighting)
    recipe = changed.get("recipe", TrainingRecipe(expert_batches="one", **EXPERTS))
    model = changed.get("model", DiTModel(**TINY_CONFIG))
    with pytest.raises(ValueError, match=expected):
        check_sharding(accelerator, args, model, objective, recipe)


@pytest.mark.slow
def test_two_processes_follow_one_and_any_number_resumes(reference, digits, held_out, tmp_path, sharded):
    launch_sharded("train_dit.py", tmp_path / "two", digits, held_out)
    assert (tmp_path / "two/checkpoint-4/pytorch_model_fsdp_0/__1_0.distcp").is_file()  # there was a second process
    expect_same_training(tmp_path / "two", reference)

    shutil.copytree(tmp_path / "two", tmp_path / "two_to_one")
    shutil.rmtree(tmp_path / "two_to_one/checkpoint-4")
    train_in(tmp_path / "two_to_one", digits, held_out, resume_from_checkpoint="latest")
    expect_same_training(tmp_path / "two_to_one", reference)

    AcceleratorState._reset_state(reset_partial_state=True)
    pretend_accelerators()
    train_in(tmp_path / "one_to_two", digits, held_out)
    shutil.rmtree(tmp_path / "one_to_two/checkpoint-4")
    launch_sharded("train_dit.py", tmp_path / "one_to_two", digits, held_out, resume_from_checkpoint="latest")
    expect_same_training(tmp_path / "one_to_two", reference)


@pytest.mark.slow
def test_compiled_blocks_are_sharded(sharded, digits, held_out, tmp_path, monkeypatch):
    """With one graph for all blocks, in the first step."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch.compiler.reset()
    train_in(tmp_path / "compiled", digits, held_out, compile=True)
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    train_in(tmp_path / "eager", digits, held_out)
    compiled, eager = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    assert compiled.keys() == eager.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=1e-4)
