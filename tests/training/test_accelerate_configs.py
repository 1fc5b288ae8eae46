"""The configurations for `accelerate launch` that are shipped."""

from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from sharded_launch import ENVIRONMENT
from tiny_pipelines import RECIPES

from diffusers_dmp import DenoiserExperts, DiTModel, NoiseIntervals
from diffusers_dmp.training.scripts import ACCELERATE_CONFIGS
from diffusers_dmp.training.sharding import set_up_sharding

SIZES = {"fsdp2_one_node": (1, 8), "fsdp2_several_nodes": (2, 16), "ddp_one_node": (1, 8)}


def test_all_are_tested():
    assert {path.stem for path in ACCELERATE_CONFIGS.iterdir()} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_accelerate_reads_them(name):
    config = load_config_from_file(str(ACCELERATE_CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == SIZES[name]
    assert config.mixed_precision == "bf16" and not config.use_cpu
    is_sharded = name.startswith("fsdp2")
    assert config.distributed_type == ("FSDP" if is_sharded else "MULTI_GPU")
    assert bool(config.fsdp_config) == is_sharded


def launched(name, *options):
    """What the processes find in their environment, and the launcher's arguments."""
    command = ["--config_file", str(ACCELERATE_CONFIGS / f"{name}.yaml"), *options, "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", ["fsdp2_one_node", "fsdp2_several_nodes"])
def test_what_the_tests_shard_with_is_what_they_say(name):
    _, environment = launched(name)
    assert environment.items() >= ENVIRONMENT.items()
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_the_command_line_overrides_them():
    args, _ = launched(
        "fsdp2_several_nodes", "--machine_rank", "2", "--main_process_ip", "10.0.0.1", "--num_machines", "3",
        "--num_processes", "24",
    )  # fmt: skip
    assert (args.machine_rank, args.num_machines, args.num_processes) == (2, 3, 24)
    assert args.main_process_ip == "10.0.0.1" and (args.nnodes, args.nproc_per_node) == ("3", "8")


@pytest.mark.parametrize("name", [*RECIPES, "dit", "experts"])
def test_the_blocks_of_every_denoiser_are_units(name):
    if name == "dit":
        model = DiTModel(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8)
    elif name == "experts":
        model = DenoiserExperts([RECIPES["sd3"].denoiser(seed=seed) for seed in (0, 1)], NoiseIntervals.uniform(2))
    else:
        model = RECIPES[name].denoiser()
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None, mixed_precision_policy=None)
    set_up_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
    units = [module for module in model.modules() if type(module).__name__ in plugin.transformer_cls_names_to_wrap]
    in_units = sum(parameter.numel() for parameter in {each for unit in units for each in unit.parameters()})
    assert in_units > sum(parameter.numel() for parameter in model.parameters()) / 6
