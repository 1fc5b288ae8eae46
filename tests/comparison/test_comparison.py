"""The comparison: all runs of a table are on equal terms, and the page shows what was measured."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from benchmarks.comparison import __main__ as command_line
from benchmarks.comparison import data
from benchmarks.comparison.__main__ import is_finished
from benchmarks.comparison.data import make_data
from benchmarks.comparison.measure import measure_bounds
from benchmarks.comparison.plan import Plan, Run, load_plan
from benchmarks.comparison.report import draw_figure, make_page, read_tables
from benchmarks.comparison.run import perform
from conftest import FIXTURES, REPOSITORY

from diffusers_dmp import DiTModel, DTRTransformer2DModel, PatchedUNet2DModel
from diffusers_dmp.evaluation.digits import fit_classifier, fit_resnet
from diffusers_dmp.training.parsing import parse_arguments

RESULTS = REPOSITORY / "docs" / "results"
ARGUMENTS = {
    "train_dit.py": "DiTTrainingArguments",
    "generate_guidance_data.py": "GenerationArguments",
    "train_dtr.py": "DTRTrainingArguments",
    "train_remix.py": "RemixTrainingArguments",
    "train_dmp.py": "DMPTrainingArguments",
    "train_patch_diffusion.py": "PatchDiffusionTrainingArguments",
    "train_ppap.py": "PPAPTrainingArguments",
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))


def arguments_of(plan: Plan, run: Run):
    """The arguments as the script parses them."""
    module = importlib.import_module(run.script.removesuffix(".py"))
    command = plan.command(run, num_threads=1)
    argv = command[command.index(f"training/{run.script}") + 1 :]
    with patch("diffusers_dmp.saving.sources.is_local", return_value=False):  # the folders of data are not made yet
        return parse_arguments(getattr(module, ARGUMENTS[run.script]), argv)


@pytest.fixture
def tiny(tmp_path) -> Plan:
    """A plan that trains everything for four steps."""
    path = tmp_path / "tiny.yaml"
    path.write_text((FIXTURES / "comparison.yaml").read_text().replace("OUTPUTS", str(tmp_path / "outputs")))
    return load_plan(str(path))


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_run_is_on_equal_terms(preset):
    """All runs of a table train for the same number of steps, on equal batches of the same data, with the same seeds."""
    plan = load_plan(preset)
    for comparison in plan.comparisons:
        budgets = {}
        for run in comparison.runs:
            if run.script and run.measured and not (run.comparison == "guidance" and not run.guide):
                args = arguments_of(plan, run)
                num_experts = len(getattr(args, "snr_boundaries", [])) + 1
                num_experts = getattr(args, "num_experts", num_experts) if run.guide else num_experts
                budgets[run.key] = (args.max_train_steps * num_experts, args.batch_size, args.image_size)
                assert args.seed == run.seed
        assert len(set(budgets.values())) == 1, budgets
        assert [run.seed for run in comparison.runs] == sorted(plan.seeds * (len(comparison.runs) // len(plan.seeds)))


def test_compared_models_have_equally_many_parameters():
    shared = {"sample_size": 8, "in_channels": 1, "num_attention_heads": 6, "attention_head_dim": 16, "num_layers": 4}
    assert DiTModel(**shared).num_parameters() == DTRTransformer2DModel(**shared).num_parameters()
    plan = load_plan("cpu")
    runs = {run.name: arguments_of(plan, run) for run in plan.runs if run.comparison == "snr_split"}
    names = ("model_channels", "channel_multipliers", "layers_per_block", "attention_levels", "attention_head_dim")
    one, two = (
        PatchedUNet2DModel(
            sample_size=8, in_channels=1, patch_size=2, num_classes=10, **{n: getattr(runs[run], n) for n in names}
        ).num_parameters()
        for run in ("one", "two")
    )
    assert 2 * two == pytest.approx(one, rel=0.02)


def test_a_run_comes_after_the_run_that_it_needs():
    plan = load_plan("cpu")
    keys = [run.key for run in plan.runs]
    assert len(set(keys)) == len(keys)
    for run in plan.runs:
        needed = plan.before(run)
        if needed is not None:
            assert keys.index(needed.key) < keys.index(run.key) and needed.seed == run.seed
            places = [plan.resolve(run, value) for value in (run.base, *run.arguments.values())]
            assert any(str(place).startswith(str(plan.folder(needed))) for place in places)
    with pytest.raises(ValueError, match="Expected a run to be one of .*'dit'"):
        plan.run("dit")
    with pytest.raises(ValueError, match="a YAML file or one of cpu, gpu, but got 'tpu'"):
        load_plan("tpu")


def test_digits_are_held_out_and_photographs_are_cropped(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fit_classifier", lambda folder, **kwargs: None)
    monkeypatch.setattr(
        data, "fit_resnet", lambda folder, images, labels, names, seed=0: fitted.append((images, labels, names))
    )
    fitted = []
    data.make_digits(tmp_path / "digits", num_train=1700)
    assert fitted[0][0].shape == (1700, 8, 8, 1)  # the network that guides is not trained on held-out images
    parts = {
        part: {path.name for path in (tmp_path / "digits" / part).rglob("*.png")} for part in ("train", "held_out")
    }
    assert {part: len(names) for part, names in parts.items()} == {"train": 1700, "held_out": 97}
    assert not parts["train"] & parts["held_out"]

    data.make_photographs(tmp_path / "photographs", size=16, num_train=14, num_held_out=7)
    images, labels, names = fitted[1]
    assert images.shape == (21, 16, 16, 3) and labels.tolist() == [*range(7)] * 3 and len(names) == 7
    pictures = data.photographs()
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures.values())
    for crop, label in zip(images[:7], labels):
        windows = np.lib.stride_tricks.sliding_window_view(pictures[names[label]], (16, 16, 3))[:, :, 0]
        assert (windows == crop).all((2, 3, 4)).any(), names[label]


@pytest.mark.slow
def test_a_run_is_done_once(tiny, tmp_path, monkeypatch):
    """A run trains, samples and measures; done again, it trains nothing and gives the same metrics."""
    monkeypatch.setattr(data, "fit_classifier", functools.partial(fit_classifier, num_steps=50))
    monkeypatch.setattr(data, "fit_resnet", functools.partial(fit_resnet, num_steps=1))
    make_data(tiny, "digits", tmp_path / "results")
    bounds = measure_bounds(tiny, "digits")
    assert bounds["real"]["FID"] < bounds["noise"]["FID"] and bounds["real"]["recognised"] > 0.9
    run = tiny.run("digits/dit-0")
    first = perform(tiny, run, num_threads=1)
    assert [point["step"] for point in first["points"]] == [2, 4]
    assert first["fingerprint"]["num_samples"] == 100 and first["fingerprint"]["seed"] == run.seed
    assert (
        first["parameters"] == DiTModel.from_pretrained(tiny.folder(run) / "pipeline" / "transformer").num_parameters()
    )
    assert all(0 <= point["recognised"] <= 1 and point["FID"] > 1 for point in first["points"])
    written = (tiny.folder(run) / "training_summary.json").stat().st_mtime_ns
    again = perform(tiny, run, num_threads=1)
    assert (tiny.folder(run) / "training_summary.json").stat().st_mtime_ns == written
    assert again == first


def result(name: str, seed: int, fids: list[float], **fingerprint) -> dict:
    points = [{"step": step + 1, "FID": fid, "precision": 0.5, "recall": 0.25} for step, fid in enumerate(fids)]
    return {
        "comparison": "photographs", "name": name, "seed": seed, "points": points, "command": f"accelerate launch training/train_{name}.py",
        "fingerprint": {"num_samples": 7, "scheduler": "DDPMScheduler"} | fingerprint, "parameters": 1234,
        "gigaflops_per_image": 0.5, "milliseconds_per_step": 10.0, "milliseconds_per_image": 2.0, "hardware": "a machine", "commit": "abc",
    }  # fmt: skip


@pytest.fixture
def results(tiny, tmp_path):
    """A plan of two runs with two seeds each, and the folder of their results."""
    plan = dataclasses.replace(
        tiny,
        data={"photographs": {"num_train": 9}},
        comparisons=[
            dataclasses.replace(
                comparison, runs=[dataclasses.replace(run, seed=seed) for run in comparison.runs for seed in (0, 1)]
            )
            for comparison in tiny.comparisons
        ],
    )
    folder = tmp_path / "results"
    bound = {"FID": 1.0, "precision": 0.9, "recall": 0.9, "fingerprint": {"num_samples": 7}}
    bounds = {"real": bound, "noise": bound | {"FID": 300.0}, "number": 7, "commit": "abc"}
    written = {"bounds/photographs": bounds}
    for name, fids in {"dit": [[9, 4], [9, 6]], "dtr": [[8, 3], [8, 6.5]]}.items():
        for seed, own in enumerate(fids):
            written[f"photographs/{name}-{seed}"] = result(name, seed, own)
    for key, content in written.items():
        path = folder / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return plan, folder


def test_a_row_is_mean_and_spread_over_the_seeds(results):
    plan, folder = results
    (table,) = tables = read_tables(plan, folder)
    page = make_page(plan, tables, "pictures")
    (dit,) = [line for line in page.splitlines() if line.startswith("| DiT |")]
    (dtr,) = [line for line in page.splitlines() if line.startswith("| DTR |")]
    assert "| 5.00 ± 1.41 |" in dit and "| 2 | 1,234 | 0.5000 | 2.0 | 10 |" in dit  # (4 + 6) / 2, √(1 + 1)
    assert "| 4.75 ± 2.47 | 0.500 ± 0.000 |" in dtr and "-0.25 ± 1.06, better in 1 of 2" in dtr  # -1 and +0.5
    assert "A lower FID than “DiT” with some seeds only: DTR." in page
    assert "| *real, held out* | 1.00 | 0.900 |" in page and "| *noise* | 300.00 |" in page
    assert "photographs, 9 to train on and 7 held out." in page and "DTR (abc): `training/train_dtr.py`" in page
    assert "Commit abc, on a machine." in page and "(pictures/photographs.png)" in page

    curve, costs = draw_figure(table).axes
    assert curve.lines[1].get_xydata().tolist() == [[1, 8], [2, 4.75]]  # of DTR
    assert [points.get_offsets().tolist() for points in costs.collections][0] == [[0.5, 4], [0.5, 6]]


def test_results_of_other_measurements_are_refused(results):
    plan, folder = results
    other = result("dtr", 1, [8, 6.5], num_samples=8)
    (folder / "photographs" / "dtr-1.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"measured alike, but got others in num_samples \(7 and 8\)"):
        read_tables(plan, folder)


def test_results_of_other_settings_are_refused(tiny, tmp_path):
    """Also if the settings of the run before it have changed."""
    run = tiny.run("fine_tuning/remix-0")
    path = tmp_path / f"{run.key}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": tiny.settings(run)}))
    assert is_finished(tiny, run, tmp_path)
    base = dataclasses.replace(tiny.run("digits/dit-0"), arguments={"max_train_steps": 50, "pipeline_steps": 25})
    comparisons = [
        dataclasses.replace(each, runs=[base if own.key == base.key else own for own in each.runs])
        for each in tiny.comparisons
    ]
    with pytest.raises(ValueError, match=r"Expected `settings` to be .*, as in the result .*remix-0.json"):
        is_finished(dataclasses.replace(tiny, comparisons=comparisons), run, tmp_path)


def test_a_run_is_repeated_if_others_need_its_missing_weights(tiny, tmp_path):
    base = tiny.run("digits/dit-0")
    path = tmp_path / f"{base.key}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": tiny.settings(base)}))
    (tiny.folder(base) / "pipeline").mkdir(parents=True)  # of an interrupted training
    assert not is_finished(tiny, base, tmp_path)
    (tiny.folder(base) / "trained.json").write_text("{}")
    assert is_finished(tiny, base, tmp_path)


class ImmediateExecutor(Executor):
    """An executor that calls at once, in this process."""

    def __init__(self, *args):
        pass

    def submit(self, call, *args) -> Future:
        future = Future()
        try:
            future.set_result(call(*args))
        except ValueError as error:
            future.set_exception(error)
        return future


def test_runs_that_need_a_failed_run_are_left_out(tiny, tmp_path, monkeypatch):
    started = []

    def perform(plan, run, num_threads):
        started.append(run.key)
        if run.key == "guidance/dit-0":
            raise ValueError("there is no room")
        return {"settings": plan.settings(run)}

    monkeypatch.setattr(command_line, "perform", perform)
    monkeypatch.setattr(command_line, "ProcessPoolExecutor", ImmediateExecutor)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(RuntimeError, match="all runs to succeed, but got\nguidance/dit-0: there is no room$"):
        command_line.perform_all(tiny, tmp_path, num_workers=2)
    left_out = {
        "guidance/drawn-0",
        "guidance/classifier-0",
        "guidance/finetune-0",
        "guidance/multi_experts-0",
        "guidance/ppap-0",
    }
    assert set(started) == {run.key for run in tiny.runs} - left_out
    assert started == [run.key for run in tiny.runs if run.key in started]  # in the plan's order


def test_the_published_page_is_of_the_published_results():
    plan = load_plan("cpu")
    page = make_page(plan, read_tables(plan, RESULTS / "cpu"), "results/cpu")
    assert page == (REPOSITORY / "docs" / "results.md").read_text()
    assert all(is_finished(plan, run, RESULTS / "cpu") for run in plan.runs)


@pytest.mark.slow
def test_the_whole_comparison_at_four_steps(tiny, tmp_path):
    """Run as `make compare` does, twice: the second run repeats only the run whose result was deleted."""
    command = [sys.executable, "-m", "benchmarks.comparison", "--preset", str(tmp_path / "tiny.yaml")]
    command += ["--results", str(tmp_path / "results"), "--report", str(tmp_path / "results.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "results.md").read_text()
    for comparison in tiny.comparisons:
        assert f"## {comparison.title}" in page
        for runs in comparison.measured.values():
            assert f"| {runs[0].title} |" in page
    guidance = tmp_path / "results" / "tiny" / "guidance"
    assert len(list(guidance.glob("*.png")) + list(guidance.parent.glob("*.png"))) == len(tiny.comparisons)

    (guidance / "ppap-0.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.endswith(": done")] == ["guidance/ppap-0: done"]
    assert (tmp_path / "results.md").read_text() == page


@pytest.mark.slow
def test_a_published_result_is_reproduced(tmp_path):
    """One run in full. Training amplifies the rounding differences between machines, hence the tolerance."""
    preset = yaml.safe_load((REPOSITORY / "benchmarks" / "comparison" / "cpu.yaml").read_text())
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(preset | {"output_dir": str(tmp_path / "outputs")}))
    plan = load_plan(str(tmp_path / "cpu.yaml"))
    make_data(plan, "digits", RESULTS / "cpu")
    torch.set_num_threads(1)
    found = perform(plan, plan.run("digits/dtr_min_snr-0"), num_threads=1)
    published = json.loads((RESULTS / "cpu" / "digits" / "dtr_min_snr-0.json").read_text())
    assert found["parameters"] == published["parameters"]
    assert found["gigaflops_per_image"] == published["gigaflops_per_image"]
    for ours, theirs in zip(found["points"], published["points"], strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["FID"] == pytest.approx(theirs["FID"], rel=0.3)
        assert ours["recognised"] == pytest.approx(theirs["recognised"], abs=0.1)
