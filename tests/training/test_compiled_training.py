"""Compiled trainings: they learn what others do, compile in the first step, and say what is missing."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from conftest import REPOSITORY, TINY_CONFIG, randomised
from diffusers import UNet2DModel
from runs import TINY, launch, train_here, weights
from safetensors.torch import load_file
from tiny_pipelines import RECIPES
from torch._dynamo.testing import CompileCounter

from diffusers_dmp import DiTModel, DTRTransformer2DModel, PatchedUNet2DModel
from diffusers_dmp.training import compilation
from diffusers_dmp.training.compilation import check_compilation, eagerly, graphs_for_experts, repeated_blocks
from diffusers_dmp.training.metrics_file import read_metrics

TINY_MODEL = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "num_classes": 10, "num_layers": 2, "patch_size": 4,
              "num_attention_heads": 2, "attention_head_dim": 16}  # fmt: skip
UNET_ARGUMENTS = {"patch_size": 2, "model_channels": 32, "channel_multipliers": [1, 2], "layers_per_block": 1,
                  "attention_levels": [1], "attention_head_dim": 16}  # fmt: skip
UNET = {"sample_size": 8, "model_channels": 32, "channel_multipliers": (1, 2), "attention_levels": (1,),
        "attention_head_dim": 16, "patch_size": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Graphs are made, and run as they are; what is compiled is none of these tests' business."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch.compiler.reset()


@pytest.fixture
def num_graphs(monkeypatch):
    """The number of graphs that each step has compiled, by step, filled while a training runs."""
    found: dict[int, int] = {}
    end = compilation.CompiledSteps.end

    def recorded(self, now):
        number, seconds = end(self, now)
        found[len(found) + 1] = number
        return number, seconds

    monkeypatch.setattr(compilation.CompiledSteps, "end", recorded)
    return found


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def held_out(digits, tmp_path_factory):
    from diffusers_dmp.evaluation.digits import write_image_folder

    return write_image_folder(tmp_path_factory.mktemp("held-out"), range(20))


def test_only_the_first_step_compiles(digits, held_out, tmp_path, num_graphs, capsys):
    """Over the end of an epoch, validations, samples, checkpoints and a resumption; what is learned is what it was."""
    settings = {"dataset": str(held_out), "validation_dataset": str(held_out), "validation_steps": 2, "sample_steps": 2,
                "sample_inference_steps": 2, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2}  # fmt: skip
    train_here(DiTModel, held_out, tmp_path / "eager", **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, held_out, tmp_path / "compiled", compile=True, **settings | {"max_train_steps": 2})
    assert num_graphs == {1: 1, 2: 0}
    AcceleratorState._reset_state(reset_partial_state=True)
    num_graphs.clear()
    train_here(DiTModel, held_out, tmp_path / "compiled", compile=True, resume_from_checkpoint="latest", **settings)
    assert num_graphs[2] == 0 and len(num_graphs) == 2
    assert_same(weights(tmp_path / "compiled"), weights(tmp_path / "eager"))
    said = capsys.readouterr()
    assert "Compiling: the first step takes a minute or so." in said.out + said.err
    assert "Step 1 compiled 1 graph, and took" in said.out + said.err


def test_steps_that_compile_do_not_count_as_slow(digits, tmp_path):
    train_here(DiTModel, digits, tmp_path, compile=True, max_train_steps=3)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert [step for step in rows if "images_per_second" in rows[step]] == [2, 3]
    assert [step for step in rows if "mfu" in rows[step]] == [2, 3]


SYSTEMS = ["DTR", "Remix-DiT", "DMP", pytest.param("Patch Diffusion", marks=pytest.mark.slow)]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_learns_the_same_compiled(system, digits, tmp_path, monkeypatch, num_graphs):
    """With gradient checkpointing, which calls the blocks again."""
    train = trainings(digits, tmp_path / "base", monkeypatch)[system]
    results = []
    for compile in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(tmp_path / str(compile), compile=compile, gradient_checkpointing=True)
        files = sorted((tmp_path / str(compile) / "pipeline").rglob("*.safetensors"))
        results.append({f"{file.name}: {name}": value for file in files for name, value in load_file(file).items()})
    assert_same(*results)
    assert num_graphs[1] > 0 and not any(number for step, number in num_graphs.items() if step > 1)


def trainings(digits, base, monkeypatch) -> dict:
    """From each system to a function that trains it, three steps, in a folder and with more arguments."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_dmp import DMPTrainingArguments, train_dmp
    from train_patch_diffusion import PatchDiffusionTrainingArguments, train_patch_diffusion
    from train_remix import RemixTrainingArguments, train_remix

    def of(entry_point, arguments_class, names=TINY, **own):
        def train(folder, **arguments):
            common = {name: TINY[name] for name in names}
            paths = {"dataset": str(digits), "output_dir": str(folder), "report_to": "none", "max_train_steps": 3}
            entry_point(arguments_class(**common | paths | own | arguments))

        return train

    def dmp(folder, **arguments):
        if not base.exists():
            randomised(DiTModel(**TINY_MODEL)).save_pretrained(base)
        names = [name for name in TINY if name not in TINY_MODEL]
        of(train_dmp, DMPTrainingArguments, names, pretrained_model_name_or_path=str(base))(folder, **arguments)

    names = [name for name in TINY if name not in ("num_layers", "num_attention_heads")]
    return {
        "DTR": lambda folder, **arguments: train_here(DTRTransformer2DModel, digits, folder, **arguments),
        "Remix-DiT": of(train_remix, RemixTrainingArguments, num_bases=2, num_experts=3),
        "Patch Diffusion": of(train_patch_diffusion, PatchDiffusionTrainingArguments, names, **UNET_ARGUMENTS),
        "DMP": dmp,
    }


def small_unet() -> UNet2DModel:
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, **types)


def test_the_repeated_blocks_of_transformers_are_compiled_and_the_whole_of_unets():
    for model in (DiTModel(**TINY_CONFIG), DTRTransformer2DModel(**TINY_CONFIG), RECIPES["sd3"].denoiser()):
        blocks = repeated_blocks(model)
        assert len(blocks) == len(model.transformer_blocks)
    assert repeated_blocks(PatchedUNet2DModel(**UNET | {"channel_multipliers": (1, 2, 3, 4), "sample_size": 16})) == []
    assert repeated_blocks(small_unet()) == []


@pytest.mark.slow
def test_a_second_size_is_compiled_and_then_all_are():
    """As encoded images of several sizes come."""
    counter = CompileCounter()
    model = RECIPES["sd3"].denoiser()
    for block in repeated_blocks(model):
        block.compile(backend=counter)
    inputs = {"encoder_hidden_states": torch.randn(2, 7, 32), "pooled_projections": torch.randn(2, 64)}
    counts = []
    for width in (8, 16, 24, 32):
        model(torch.randn(2, 4, 8, width), timestep=torch.tensor([900.0, 100.0]), **inputs)
        counts.append(counter.frame_count)
    assert counts[0] < counts[1] == counts[2] == counts[3]


def test_one_way_to_compile_is_chosen():
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.INDUCTOR))
    accelerator = SimpleNamespace(state=state, device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match="either `compile` or Accelerate's `--dynamo_backend`.* but got true and inductor"
    ):
        check_compilation(accelerator, DiTModel(**TINY_CONFIG))


def test_a_whole_graph_is_not_sharded():
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO))
    accelerator = SimpleNamespace(state=state, device=torch.device("cpu"), is_fsdp2=True)
    check_compilation(accelerator, DiTModel(**TINY_CONFIG))
    with pytest.raises(ValueError, match="`compile` to be false for a UNet2DModel with FSDP2"):
        check_compilation(accelerator, small_unet())


def test_without_a_compiler_one_line_says_so_before_the_first_step(digits, tmp_path, monkeypatch):
    def without_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler found in cpp.cxx: (None, 'g++')\nand more\n")

    monkeypatch.setattr(compilation, "BACKEND", without_compiler)
    with pytest.raises(ValueError) as error:
        train_here(DiTModel, digits, tmp_path, compile=True)
    assert str(error.value) == (
        "Expected a compiler for `compile` on cpu, a C++ compiler, but got: RuntimeError: No working C++ compiler found in cpp.cxx: "
        "(None, 'g++')"
    )
    assert not (tmp_path / "metrics.jsonl").exists()


def test_experts_may_have_more_graphs_than_pytorch_allows_a_block():
    from torch._dynamo import config

    limit = config.recompile_limit
    with graphs_for_experts(True, num_experts=4):
        assert config.recompile_limit == 4 * limit
    assert config.recompile_limit == limit


def test_what_runs_eagerly_is_not_compiled_again_afterwards():
    counter = CompileCounter()
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.zeros(2, 3)
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    with eagerly(True), torch.no_grad():
        model.eval()
        compiled(x[:1])
    model.train()
    compiled(x)
    assert counter.frame_count == 1


def test_ppap_is_not_compiled(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_ppap import PPAPTrainingArguments

    with pytest.raises(ValueError, match="Expected `compile` to be false for PPAP"):
        PPAPTrainingArguments(compile=True)


@pytest.mark.slow
def test_as_users_start_it(digits, tmp_path):
    """With the compiler itself."""
    launch("train_dit.py", tmp_path / "eager", dataset=digits, report_to="none")
    launch("train_dit.py", tmp_path / "compiled", dataset=digits, report_to="none", compile=True)
    assert_same(weights(tmp_path / "compiled"), weights(tmp_path / "eager"))
    summary = json.loads((tmp_path / "compiled" / "training_summary.json").read_text())
    assert summary["steps"] == 4
