"""Conversion of PPAP's published depth experts for DeepFloyd-IF, which are made of MiDaS small."""

import pytest
import torch
from diffusers import DDPMScheduler
from midas import adapted_convolutions, make_midas, published_midas, run_published_midas

from diffusers_dmp import DepthTarget, GuidanceExperts, GuidedScheduler, convert_checkpoint, load_original_state_dict
from diffusers_dmp.cli.folders import convert

NAME = "torch.hub intel-isl/MiDaS MiDaS_small"


@pytest.fixture(scope="module")
def checkpoints() -> list[dict[str, torch.Tensor]]:
    return [published_midas(make_midas(), seed) for seed in range(5)]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_close(depth: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to float32's rounding, through 30 layers."""
    torch.testing.assert_close(depth, expected, atol=2e-5 * expected.max().item(), rtol=0)


@torch.no_grad()
def test_published_experts(checkpoints, images, tmp_path):
    experts = convert_checkpoint("ppap", checkpoints, network=make_midas())
    assert experts.intervals.edges == (0, 200, 400, 600, 800, 1000)
    adapted = {name for name in experts.expert_tensors(0) if name.endswith("lora_A.weight")}
    assert adapted == {f"{name}.lora_A.weight" for name in adapted_convolutions(make_midas())}
    other = run_published_midas(make_midas(), published_midas(make_midas(), seed=9), images)
    for expert, checkpoint in enumerate(checkpoints):
        expected = run_published_midas(make_midas(), checkpoint, images)
        assert (expected - other).abs().mean() > 0.1 * expected.std() > 0.01  # what the expert owns matters
        for merged in (False, True):
            depth = experts.run_expert(expert, images, merged=merged).predicted_depth
            assert_close(depth, expected)
    experts.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"network=torch.hub.load\('intel-isl/MiDaS', 'MiDaS_small'\)"):
        GuidanceExperts.from_pretrained(tmp_path)
    loaded = GuidanceExperts.from_pretrained(tmp_path, network=make_midas())
    assert loaded.config.base_model_name_or_path == NAME
    assert_close(loaded(images, torch.tensor(999)).predicted_depth, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(checkpoints, images, dtype):
    """The frozen weights are the network's own, which the checkpoint has rounded."""
    rounded = {name: each.to(dtype) if each.is_floating_point() else each for name, each in checkpoints[0].items()}
    experts = convert_checkpoint("ppap", [rounded], network=make_midas())
    expected = run_published_midas(make_midas(), {name: each.float() for name, each in rounded.items()}, images)
    depth = experts.run_expert(0, images).predicted_depth
    assert (depth - expected).abs().mean() < 0.05 * expected.std()


def test_noise_and_size_of_the_training(checkpoints, images):
    """DeepFloyd-IF's stage I: a cosine schedule, and images of 64 x 64 pixels."""
    experts = convert_checkpoint("ppap", checkpoints, network=make_midas())
    floyd = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert experts.process.is_process_of(floyd)
    target = DepthTarget(torch.ones(256, 256))
    floyd.set_timesteps(10)
    guided = GuidedScheduler(floyd, experts, target, scale=1.0)
    step = guided.step(torch.zeros_like(images), 900, images, generator=torch.Generator().manual_seed(0))
    assert step.prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="64 x 64 pixels, on which .* but got 32 x 32"):
        guided.step(torch.zeros(1, 3, 32, 32), 800, torch.zeros(1, 3, 32, 32))


def test_the_command_says_what_to_do_in_python(checkpoints, tmp_path):
    files = [tmp_path / f"{expert}_max5.ckpt" for expert in range(2)]
    for file, checkpoint in zip(files, checkpoints):
        torch.save(checkpoint, file)
    with pytest.raises(
        ValueError, match=r"0_max5.ckpt, .*: Expected `network` to be MiDaS small.* In Python: "
    ) as error:
        convert(system="ppap", checkpoints=files, output_dir=tmp_path / "experts")
    assert "\n" not in str(error.value) and not (tmp_path / "experts").exists()
    read = [load_original_state_dict(file) for file in files]
    assert convert_checkpoint("ppap", read, network=make_midas()).config.num_experts == 2


def test_checkpoints_that_do_not_fit(checkpoints):
    def convert_broken(changes=None, dropped=None, network=None):
        broken = {name: each for name, each in checkpoints[1].items() if name != dropped} | (changes or {})
        return convert_checkpoint("ppap", [checkpoints[0], broken], network=network or make_midas())

    with pytest.raises(ValueError, match=r'`network` to be MiDaS small.*torch.hub.load\("intel-isl/MiDaS"'):
        convert_checkpoint("ppap", checkpoints)
    name = "midas.pretrained.layer2.0.0.bn1.running_var"
    with pytest.raises(ValueError, match="expert 1 misses 'pretrained.layer2.0.0.bn1.running_var'"):
        convert_broken(dropped=name)
    with pytest.raises(ValueError, match="expert 1 has one more: 'scratch.more'"):
        convert_broken({"midas.scratch.more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'pretrained.layer2.0.0.bn1.running_var' to have the shape \(16,\).*\(7,\)"):
        convert_broken({name: torch.zeros(7)})
    for part in ("lora_A", "lora_B", "conv.weight"):
        with pytest.raises(ValueError, match="scratch.layer1_rn"):
            convert_broken(dropped=f"midas.scratch.layer1_rn.{part}")
    without = [{name: each for name, each in one.items() if "layer1_rn.lora" not in name} for one in checkpoints]
    with pytest.raises(ValueError, match="'scratch.layer1_rn.lora_A', but it is missing"):
        convert_checkpoint("ppap", without, network=make_midas())
    frozen = "midas.scratch.output_conv.0.weight"
    with pytest.raises(ValueError, match="'scratch.output_conv.0.weight' to be that of `network`, .* expert 1"):
        convert_broken({frozen: checkpoints[1][frozen] + 1e-3})
    with pytest.raises(ValueError, match="to be that of `network`, but got another for expert 0"):
        convert_broken(network=make_midas(seed=1))
