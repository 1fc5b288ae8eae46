"""What is refused by name before anything is trained, as the command line says it: one line."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from benchmarks import timing
from benchmarks.comparison import __main__ as command_line
from benchmarks.comparison import checks, data
from benchmarks.scripts import only_one
from comparison_plans import tiny_plan
from conftest import REPOSITORY
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from diffusers_dmp.evaluation import fashion
from diffusers_dmp.evaluation.features import FeatureExtractor
from diffusers_dmp.terminal import run_command

METRICS = {"FID": 4.0, "KID": 0.1, "precision": 0.5, "recall": 0.25, "recognised": 0.9}
COMMIT = "abc1234"


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_extractor(folder: Path, width: int = 4) -> str:
    """Write a tiny network, and return its hash."""
    config = ResNetConfig(num_channels=1, embedding_size=width, hidden_sizes=[width], depths=[1])
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}, do_normalize=False).save_pretrained(folder)
    return FeatureExtractor(folder).sha256


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """The folder of a network that measures, and its hash."""
    folder = tmp_path_factory.mktemp("networks") / "extractor"
    return folder, write_extractor(folder)


@pytest.fixture
def comparison(tmp_path, monkeypatch, extractor):
    """A place with one finished run, whose command line trains nothing."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(checks, "code_commit", lambda: COMMIT)
    performed = []
    monkeypatch.setattr(command_line.Execution, "perform", lambda self: performed.append(self))
    monkeypatch.setattr(command_line, "write_report", lambda *arguments: None)
    plan = tiny_plan(tmp_path)
    folder, sha256 = extractor
    results = tmp_path / "results"
    shutil.copytree(folder, results / "extractors" / "fashion" / "extractor")
    shutil.copytree(folder, plan.data_folder("fashion") / "extractor")
    write(plan.data_folder("fashion") / "made.json", plan.data["fashion"])
    fingerprint = {"extractor_sha256": sha256}
    bound = METRICS | {"fingerprint": fingerprint}
    write(
        results / "tiny" / "bounds" / "fashion.json",
        {"real": bound, "noise": bound, "accuracy": {"extractor": 0.9, "judge": 0.9}, "settings": plan.data["fashion"],
         "number": 9, "commit": COMMIT},
    )  # fmt: skip
    run = plan.run("dtr/dit-0")
    result = {
        "comparison": "dtr", "name": "dit", "seed": 0, "settings": plan.settings(run), "points": [{"step": 4} | METRICS],
        "fingerprint": fingerprint, "losses": [0.1], "parameters": 9, "gigaflops_per_image": 1.0, "milliseconds_per_step": 1.0,
        "milliseconds_per_image": 1.0, "hardware": "a CPU", "seconds": 60, "commit": COMMIT,
    }  # fmt: skip
    path = results / "tiny" / "dtr" / "dit-0.json"
    write(path, result)

    def run_it(*options: str) -> int:
        argv = ["--preset", str(tmp_path / "tiny.yaml"), "--results", str(results), *options]
        try:
            run_command(command_line.main, argv, "benchmarks.comparison")
        except SystemExit as ended:
            return ended.code
        return 0

    return SimpleNamespace(plan=plan, results=results, path=path, result=result, run=run_it, performed=performed)


@pytest.fixture
def refused(comparison, capsys):
    """Run the command line, and return its one line on the terminal; nothing is trained."""

    def run(*options: str) -> str:
        capsys.readouterr()
        assert comparison.run(*options) == 2 and not comparison.performed
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        return printed.err

    return run


def test_what_fits_is_gone_on_with(comparison, capsys):
    assert comparison.run() == 0
    (work,) = comparison.performed
    assert "dtr/dit-0" not in work.schedule.unfinished and work.schedule.num_runs - len(work.schedule.unfinished) == 1
    assert work.durations.of(comparison.plan.run("dtr/dit_uw-0")) == 60
    number = len(comparison.plan.runs)
    assert f"is written; {number - 1} of {number} runs left, about " in capsys.readouterr().out


def test_a_data_set_that_cannot_be_had(comparison, refused, monkeypatch, tmp_path):
    (comparison.plan.data_folder("fashion") / "made.json").unlink()
    monkeypatch.setattr(
        data, "fashion_images", lambda *split: fashion.fashion_images(*split, folder=tmp_path / "missing")
    )
    line = refused()
    assert (
        "`apt install dataset-fashion-mnist`" in line
        and "zalando-datasets/fashion_mnist to be reached on the Hub" in line
    )


def test_a_half_written_result(comparison, refused):
    comparison.path.write_text(comparison.path.read_text()[:100])
    assert f"Expected {str(comparison.path)!r} to be a complete result" in refused()
    write(comparison.path, {key: value for key, value in comparison.result.items() if key != "points"})
    assert "without points" in refused()
    write(comparison.results / "tiny" / "bounds" / "fashion.json", {"real": METRICS})
    assert "bounds/fashion.json" in refused("--minutes", "0")


def test_a_result_of_other_settings(comparison, refused):
    """Also if only those of a run before it differ."""
    settings = comparison.result["settings"]
    write(
        comparison.path,
        comparison.result | {"settings": settings | {"arguments": settings["arguments"] | {"max_train_steps": 8}}},
    )
    line = refused("--minutes", "0")
    assert (
        f"Expected {comparison.path} to be" in line
        and "it has `arguments.max_train_steps` 8 instead of 4. Move it away" in line
    )
    write(comparison.path, comparison.result)

    preset = comparison.path.parents[3] / "tiny.yaml"
    content = yaml.safe_load(preset.read_text())
    path = comparison.results / "tiny" / "tuning" / "dit-0.json"
    run = comparison.plan.run("tuning/dit-0")
    write(path, comparison.result | {"comparison": "tuning", "settings": comparison.plan.settings(run)})
    content["settings"]["long"]["max_train_steps"] = 6
    preset.write_text(yaml.safe_dump(content))
    assert (
        f"{path} to be a result of these settings, but it has `after[0].arguments.max_train_steps` 4 instead of 6"
        in refused()
    )


def test_a_result_of_another_commit(comparison, refused):
    write(comparison.path, comparison.result | {"commit": "e135a72"})
    line = refused()
    assert f"of the commit {COMMIT}, but {comparison.path} is of e135a72. Move it away" in line
    assert "add `--accept_commits e135a72`" in line
    assert comparison.run("--accept_commits", "e135a72") == 0 and comparison.run("--minutes", "0") == 0
    assert len(comparison.performed) == 1  # without time, only the page is written


def test_what_is_in_the_folder_of_a_run(comparison, refused):
    """Others may start from it, and it is measured later: so it is of the run's settings, and of an accepted commit."""
    run = comparison.plan.run("base/longer-0")
    folder = comparison.plan.folder(run)
    settings = comparison.plan.settings(run)
    write(folder / "run.json", settings)
    write(folder / "begun.json", {"commit": "0ld", "started_from": {}})
    assert f"all results to be of the commit {COMMIT}, but {folder} is of 0ld. Move it away" in refused()
    assert comparison.run("--accept_commits", "0ld") == 0
    comparison.performed.clear()
    write(folder / "run.json", settings | {"arguments": settings["arguments"] | {"max_train_steps": 9}})
    assert (
        f"{folder} to be a result of these settings, but it has `arguments.max_train_steps` 9 instead of 4. Delete it"
        in refused()
    )


def test_where_nothing_is_left_no_commit_is_refused(comparison, monkeypatch):
    write(comparison.path, comparison.result | {"commit": "e135a72"})
    monkeypatch.setattr(
        command_line, "Schedule", lambda *arguments: SimpleNamespace(left=[], unfinished=[], num_runs=1, failures={})
    )
    assert comparison.run() == 0 and not comparison.performed


def test_an_extractor_of_another_hash(comparison, refused, extractor, tmp_path):
    copy = comparison.plan.data_folder("fashion") / "extractor"
    kept = comparison.results / "extractors" / "fashion" / "extractor"
    other = write_extractor(tmp_path / "other", width=8)
    shutil.rmtree(copy)
    shutil.copytree(tmp_path / "other", copy)
    line = refused()
    assert f"Expected {copy} to be" in line and other[:12] in line and extractor[1][:12] in line
    shutil.rmtree(kept)
    shutil.copytree(tmp_path / "other", kept)
    assert f"Expected {kept} to be the extractor that" in refused()
    shutil.rmtree(kept)
    shutil.rmtree(copy)
    assert f"Expected {kept} to be the extractor" in refused() and "there is none" in refused()


def test_networks_that_are_not_those_beside_the_results(comparison, refused, tmp_path):
    """Also where nothing was measured yet."""
    shutil.rmtree(comparison.results / "tiny")
    kept, copy = comparison.results / "extractors" / "fashion", comparison.plan.data_folder("fashion")
    (kept / "judge.safetensors").write_text("one")
    (copy / "judge.safetensors").write_text("two")
    line = f"Expected {copy} to have copies of the networks that {kept} has, but got others. Delete {copy}"
    assert line in refused()
    (copy / "judge.safetensors").write_text("one")
    write_extractor(copy / "extractor", width=8)
    assert line in refused()


def test_an_unfinished_copy_of_the_networks_is_made_again(comparison, monkeypatch):
    copy = comparison.plan.data_folder("fashion")
    (copy / "made.json").unlink()
    (copy / "extractor" / "model.safetensors").write_bytes(b"half")
    made = []
    monkeypatch.setattr(command_line, "make_data", lambda plan, name, results: made.append(name))
    assert comparison.run() == 0 and made == ["fashion"]


def test_options_out_of_range(refused):
    assert "`workers` to be at least 1, but got 0" in refused("--workers", "0")
    assert "`minutes` to be at least 0, but got -1" in refused("--minutes", "-1")
    assert "`minutes` to be at least 0, but got nan" in refused("--minutes", "nan")
    assert "`only` to be some of dtr, base" in refused("--only", "digits")


def test_a_further_extractor_that_cannot_measure(refused, tmp_path):
    """Before the first step of work: weights that are not there, and more features than images."""
    assert f"{str(tmp_path / 'missing.pth')!r}" in refused("--inception", str(tmp_path / "missing.pth"))
    write_extractor(tmp_path / "wide", width=100)
    assert "samples more than 100 images" in refused("--inception", str(tmp_path / "wide"))


def test_other_weights_than_those_of_the_results(comparison, refused, tmp_path):
    write(comparison.path, comparison.result | {"inception_fingerprint": {"extractor_sha256": "0" * 64}})
    write_extractor(tmp_path / "narrow", width=99)
    line = f"Expected {tmp_path / 'narrow'} to be the extractor that {comparison.path} was measured with (000000000000…), but got"
    assert line in refused("--inception", str(tmp_path / "narrow"))


def test_bounds_are_measured_again_by_a_further_extractor_that_can(comparison, tmp_path, monkeypatch):
    write_extractor(tmp_path / "narrow", width=99)
    bounds = {"real": {"inception_fingerprint": {}}}
    monkeypatch.setattr(command_line, "measure_bounds", lambda plan, name: bounds)
    assert comparison.run("--inception", str(tmp_path / "narrow")) == 0
    (work,) = comparison.performed
    assert work.plan.inception == str(tmp_path / "narrow")
    assert json.loads((comparison.results / "tiny" / "bounds" / "fashion.json").read_text()) == bounds


def test_two_comparisons_in_one_folder(comparison, refused):
    with only_one(comparison.plan.output_dir, "comparison"):
        assert f"no other comparison to work in {comparison.plan.output_dir}" in refused()


def test_a_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Results and pages may be committed in between; a merge that changes the code counts, and so does what is not committed."""

    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    def commit(name):
        (tmp_path / name).write_text(name)
        git("add", ".")
        git("commit", "-m", name)
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(timing, "ROOT", tmp_path)
    assert timing.commit(["code"]) == timing.commit() == "unknown"
    git("init", "-b", "main")
    first = commit("code")
    second = commit("page")
    assert first.startswith(timing.commit(["code"])) and second.startswith(timing.commit())
    git("checkout", "-b", "other", first.strip())
    commit("code2")
    git("checkout", "main")
    third = commit("page2")
    assert third and first.startswith(timing.commit([":(glob)code*"]))
    git("merge", "other", "-m", "merge")
    merge = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert merge.startswith(timing.commit([":(glob)code*"]))
    (tmp_path / "page").write_text("changed")
    assert merge.startswith(timing.commit([":(glob)code*"])) and timing.commit().endswith("-dirty")
    (tmp_path / "code").write_text("changed")
    assert timing.commit(["code"]).endswith("-dirty") and first.startswith(
        timing.commit(["code"]).removesuffix("-dirty")
    )
