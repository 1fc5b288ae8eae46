"""Every benchmark runs to its end. The ratios depend on the computer and are not tested."""

import re
from importlib import import_module

import pytest
import torch
from conftest import REPOSITORY

SLOW = [pytest.param(system, marks=pytest.mark.slow) for system in ("remix", "patch", "ppap", "guidance", "training")]


SMALLER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}


@pytest.mark.parametrize("system", ["dtr", "dmp", "experts", "text_training", *SLOW])
def test_a_benchmark_runs(system, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import timing
    from benchmarks.__main__ import BENCHMARKS

    assert system in BENCHMARKS
    if system in ("experts", "text_training"):  # their denoisers have three times the blocks' parameters
        from benchmarks import experts, text_training

        monkeypatch.setattr(text_training, "DEPTH", 0.5)
        monkeypatch.setitem(experts.DIT_PRESETS, "DiT-S/8", SMALLER)
        monkeypatch.setattr(experts, "FLUX_DEPTH", {"num_layers": 1, "num_single_layers": 2})
    if system == "guidance":
        from benchmarks import guidance

        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        vae = {"block_out_channels": (4, 4), "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 2}
        wan_vae = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        for name, value in {"RESNET": sizes, "PIXELS": 16, "VAE": vae, "WAN_VAE": wan_vae}.items():
            monkeypatch.setattr(guidance, name, value)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    settings = timing.Settings("DiT-S/8", torch.device("cpu"), [torch.float32], [1, 2], compile=False, budget=0.0)
    ratios = list(import_module(f"benchmarks.{system}").run(settings))
    assert len({ratio.name for ratio in ratios}) == len(ratios) >= (2 if system == "training" else 4)
    assert all(ratio.candidate_ms > 0 and ratio.rounds == 2 for ratio in ratios)


def test_reading_encoded_text_is_timed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import encoded_text

    encoded_text.write_shards(tmp_path, 2, torch.bfloat16)
    assert all(number > 0 for number in encoded_text.measure(tmp_path, num_batches=1))


@pytest.mark.parametrize("kind", ["latents_float16", "text_bfloat16", "pngs"])
def test_reading_data_is_timed(kind, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import data

    monkeypatch.setattr(data, "BATCH_SIZE", 2)
    write, read, _ = data.KINDS[kind]
    write(tmp_path, 2)
    assert data.images_per_second(read(tmp_path, 0), seconds=1e-3) > 0


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from benchmarks import memory

    return memory


def test_estimated_memory_is_near_the_measured_one(memory):
    preset, measured = memory.MEASURED
    assert memory.estimate(preset) == pytest.approx(measured, rel=0.1)


def test_what_ran_out_of_memory_on_80_gb_is_estimated_to(memory):
    assert memory.estimate("patch_lsun256_p2", gradient_accumulation_steps=1) > 80
    assert memory.estimate("patch_ffhq1024", gradient_accumulation_steps=4) > 80  # micro-batches of 32


@pytest.mark.slow
def test_the_presets_of_published_models_fit_and_say_their_memory(memory):
    for preset in memory.published_presets():
        estimated = memory.estimate(preset)
        assert estimated < 0.9 * 80
        text = (memory.PRESETS / f"{preset}.yaml").read_text()
        said = int(re.search(r"Memory of one GPU: (?:estimated|measured) (\d+) GB", text).group(1))
        assert said == pytest.approx(estimated, rel=0.06), preset
