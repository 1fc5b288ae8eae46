"""Every benchmark runs to its end. The ratios depend on the computer and are not tested."""

import itertools
import re
from importlib import import_module

import pytest
import torch
from conftest import REPOSITORY

SLOW = [pytest.param(system, marks=pytest.mark.slow) for system in ("remix", "patch", "ppap", "guidance", "training")]


SMALLER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}


@pytest.mark.parametrize("system", ["dtr", "dmp", "experts", "text_training", "speed", *SLOW])
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
    if system == "speed":
        make_speed_small(monkeypatch)
    if system == "guidance":
        from benchmarks import guidance

        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        vae = {"block_out_channels": (4, 4), "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 2}
        wan_vae = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        for name, value in {"RESNET": sizes, "PIXELS": 16, "VAE": vae, "WAN_VAE": wan_vae}.items():
            monkeypatch.setattr(guidance, name, value)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    benchmark = import_module(f"benchmarks.{system}")
    settings = small_settings(parts=getattr(benchmark, "PARTS", ()))
    ratios = list(benchmark.run(settings))
    assert len({ratio.name for ratio in ratios}) == len(ratios) >= (2 if system == "training" else 4)
    assert all(ratio.candidate_ms > 0 and ratio.rounds == 2 for ratio in ratios)


def make_speed_small(monkeypatch):
    """Models and sampling runs as small as can be."""
    from benchmarks import denoisers, speed, timing

    monkeypatch.setitem(denoisers.DIT_PRESETS, "DiT-S/8", SMALLER)
    monkeypatch.setattr(speed, "STEPS", 2)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)


def small_settings(**options):
    from benchmarks.timing import Settings

    options = {"dtypes": [torch.float32], "batch_sizes": [1, 2], "compile": False, "budget": 0.0} | options
    return Settings("DiT-S/8", torch.device("cpu"), **options)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))


@pytest.mark.slow
def test_the_table_of_speeds_has_compiled_rows(benchmarks, monkeypatch, capsys):
    """Compiled without a compiler: PyTorch's own graphs."""
    from benchmarks import denoisers, speed

    make_speed_small(monkeypatch)
    real_compile = torch.compile
    in_graphs = {"backend": "eager", "mode": None}
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: real_compile(*args, **kwargs | in_graphs))
    list(speed.run(small_settings(batch_sizes=[1], dtypes=[torch.bfloat16], compile=True, parts=speed.PARTS)))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    times = {row[0].removeprefix("| "): row[1:] for row in rows if len(row) == 1 + len(denoisers.MAKERS)}
    del times["---"]
    assert list(times) == [
        "bfloat16, ms",
        "forward B=1, eager",
        "forward B=1, blocks compiled",
        "forward B=1, compiled",
        "forward B=1, compiled, modulations ahead",
        "training step B=1, eager",
        "training step B=1, blocks compiled",
        "2 steps, one image, guidance, eager",
        "2 steps, one image, guidance, compiled",
    ]


def test_the_table_of_speeds_goes_on_where_it_was_interrupted(benchmarks, monkeypatch, tmp_path, capsys):
    from benchmarks import speed, speed_table

    make_speed_small(monkeypatch)
    monkeypatch.setattr(speed, "MAKERS", {name: speed.MAKERS[name] for name in (speed.DIT, speed.DTR)})
    settings = small_settings(parts=["forward"], results=tmp_path / "speed.jsonl")
    interrupted = speed.run(settings)
    first = next(interrupted)
    interrupted.close()
    assert "B=1" in first.name

    measured = []
    measure = speed.measure
    monkeypatch.setattr(speed, "measure", lambda settings, group: measured.append(group) or measure(settings, group))
    ratios = list(speed.run(settings))
    assert [group.cells[0].what for group in measured] == ["forward B=2"]
    assert ratios[0] == first and len(ratios) == 2
    table = capsys.readouterr().out
    assert table.count("| forward B=") == 2 and table.count("| float32 forward B=") == 4

    monkeypatch.setattr(speed_table, "commit", lambda: "another")
    with pytest.raises(
        ValueError, match="Expected `results` to be those of .*'commit': 'another'.* but got .*speed.jsonl"
    ):
        next(speed.run(settings))


def test_operations_are_counted_without_views(benchmarks):
    from benchmarks.launches import count_launches

    x = torch.randn(2, 3)
    # fills, multiplies and adds; the others start nothing
    assert count_launches(lambda: torch.ones(3, 2).T.reshape(2, 3).detach().mul_(x) + x[:, :1]) == 3


def test_every_system_starts_fewer_operations_than_diffusers_dit(benchmarks, monkeypatch):
    from benchmarks import denoisers, launches

    monkeypatch.setattr(launches, "FEW_STEPS", 8)  # one for each of Remix-DiT's experts
    monkeypatch.setattr(launches, "MORE_STEPS", 16)
    sizes = SMALLER | denoisers.IMAGE
    stock, *ours = (launches.count_of(system, sizes) for system in reversed(denoisers.MAKERS))
    assert stock.name == "Diffusers' DiT" and len(ours) == 4
    for counts in ours:
        assert counts.forward < stock.forward and counts.sampling_step < stock.sampling_step
        assert 0 <= counts.sampling_run == int(counts.sampling_run)  # so that each step starts as many


def test_a_gpu_is_waited_for_once_around_many_calls(benchmarks, monkeypatch):
    from benchmarks import timing

    events, clock = [], iter(range(1000))
    monkeypatch.setattr(timing, "synchronise", lambda device: events.append("wait"))
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    monkeypatch.setattr(timing, "GPU_SECONDS_BETWEEN_WAITS", 1e-3)
    functions = {"one": lambda: events.append("call")}
    times = timing.time_in_turns(functions, torch.device("cuda"), budget=0.0, clock=lambda: next(clock))
    runs = [(event, len(list(run))) for event, run in itertools.groupby(events)]
    calls = runs[-2][1]
    assert calls > 1
    warm_up_and_one = [("call", 3), ("wait", 1), ("call", 1)]
    assert runs == [*warm_up_and_one, *[("wait", 2), ("call", calls)] * 3, ("wait", 1)]
    assert times == {"one": [1 / calls] * 3}


@pytest.mark.parametrize(
    "options, message",
    [
        (["dtr", "--dtypes", "float8"], "one of float32, float16, bfloat16, but got 'float8'"),
        (["dtr", "--device", "cuda"], "`device` to be a device of this computer, but got 'cuda'"),
        (["dtr", "--preset", "DiT-M/2"], "'DiT-M/2'.*DiT-S/2.*DiT-XL/8"),
        (["ddr"], "'ddr'.*dtr.*speed.*launches"),
        (["speed", "--parts", "forwards"], "`parts` to be of forward, training, sampling, but got forwards"),
        (["dtr", "--parts", "forward"], "for speed alone, but got them for dtr"),
    ],
)
def test_an_unknown_choice_is_told_the_known_ones(benchmarks, options, message):
    from benchmarks.__main__ import main

    with pytest.raises(ValueError, match=message):
        main(options)


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
