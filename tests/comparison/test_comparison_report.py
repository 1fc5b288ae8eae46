"""The page of a comparison shows the figures of the results' JSON files, and says what is missing."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from benchmarks.comparison.pictures import cost_figure, losses_figure, steps_figure
from benchmarks.comparison.plan import PRESETS, Plan, load_plan
from benchmarks.comparison.report import make_page, write_report
from benchmarks.comparison.results import METRICS
from benchmarks.comparison.tables import read_all_bounds, read_tables
from comparison_plans import tiny_plan
from conftest import REPOSITORY
from matplotlib.backends.backend_agg import FigureCanvasAgg

DOCS = REPOSITORY / "docs"
PAGES = {
    path.stem: DOCS / ("results.md" if path.stem == "cpu" else f"results_{path.stem}.md")
    for path in PRESETS.glob("*.yaml")
}
PUBLISHED = [name for name, page in PAGES.items() if page.exists() and (DOCS / "results" / name).is_dir()]
pytestmark = pytest.mark.usefixtures("in_the_repository")
SEEDS = (0, 1, 2)
PLACES = (2, 3, 3, 3, 3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        return tiny_plan(tmp_path_factory.mktemp("plan"), SEEDS)


def result_of(plan: Plan, key: str) -> dict:
    """A result as `perform` makes it, with figures that differ between runs and seeds."""
    run = plan.run(key)
    number = sum(map(ord, f"{run.comparison}/{run.name}")) % 89 + 7 * run.seed % 13
    content = {"comparison": run.comparison, "name": run.name, "seed": run.seed, "settings": {}, "seconds": 5}
    if run.script:
        content |= {"command": "python", "milliseconds_per_step": 100 + number / 3}
    if run.measured:
        last = {"KID": number / 70, "precision": number / 103, "recall": number / 107, "recognised": number / 109}
        points = [{"step": step, "FID": number * (1 + 4 / step)} | last for step in (2, 4)]
        content |= {
            "points": points if run.script else points[-1:],
            "fingerprint": {"num_samples": plan.num_images, "guidance_scale": run.sampling.get("scale", 1)},
            "losses": None if run.guide else [number / (3 + band) for band in range(8)],
            "parameters": 1000 + len(run.name), "gigaflops_per_image": 0.5 + 0.1 * len(run.name), "milliseconds_per_image": 2.5,
            "hardware": "a machine",
        }  # fmt: skip
    return content | {"commit": "abc"}


def write(path: Path, content: "dict | str") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def results(plan, tmp_path) -> Path:
    """The folder of all results."""
    bound = {"FID": 1.5, "KID": 0.1, "precision": 0.9, "recall": 0.8, "recognised": None}
    bound["fingerprint"] = {"num_samples": plan.num_images}
    accuracy = {"extractor": 0.912, "judge": 0.934}
    bounds = {
        "real": bound,
        "noise": bound | {"FID": 88.25},
        "accuracy": accuracy,
        "settings": {},
        "number": 9,
        "commit": "abd",
    }
    folder = tmp_path / "results" / plan.name
    for name in plan.data:
        write(folder / "bounds" / f"{name}.json", bounds)
    for run in plan.runs:
        write(folder / f"{run.key}.json", result_of(plan, run.key))
        if run.seed == 0 and run.measured:
            write(folder / f"{run.key}.png", "an image")
    return folder


def page_of(plan: Plan, results: Path) -> str:
    return make_page(plan, read_tables(plan, results), read_all_bounds(plan, results), f"results/{plan.name}")


def cells(page: str, comparison, table: int) -> dict[str, list[str]]:
    """The n-th table of a comparison's part of the page, row by row."""
    part = page.split(f"\n## {comparison.title}\n")[1].split("\n## ")[0]
    lines = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)[table].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def expect_cell(cell: str, values: list[float], places: int) -> None:
    """Compare a cell with its values' mean and standard deviation, up to rounding."""
    if not values:
        assert cell == "–"
        return
    numbers = [float(number.replace(",", "")) for number in re.sub(r"\(.*", "", cell).split("±")]
    wanted = [np.mean(values), np.std(values, ddof=1)] if len(values) > 1 else values
    assert numbers == pytest.approx(wanted, abs=0.5001 * 10**-places), cell
    assert len(numbers) == len(wanted)


def expect_figures(page: str, plan: Plan, results: Path) -> None:
    """Compare every figure of the tables of metrics and of differences with the JSON files."""
    for comparison in plan.comparisons:
        found = {
            run.key: json.loads(path.read_text())
            for run in comparison.runs
            if (path := results / f"{run.key}.json").exists()
        }
        rows = {
            name: {run.seed: found[run.key] for run in runs if run.key in found}
            for name, runs in comparison.measured.items()
        }
        titles = {comparison.measured[name][0].title: name for name, own in rows.items() if own}
        if not titles:
            continue
        shown = cells(page, comparison, 0)
        assert list(shown) == list(titles)
        for title, name in titles.items():
            own, of = list(rows[name].values()), len(comparison.measured[name])
            ends = [each["points"][-1] for each in own]
            for cell, metric, places in zip(shown[title], METRICS, PLACES):
                expect_cell(cell, [end[metric] for end in ends if end[metric] is not None], places)
            seeds, parameters, operations = shown[title][len(METRICS) :]
            assert seeds == (f"{of}" if len(own) == of else f"{len(own)} of {of}")
            assert parameters == f"{own[0]['parameters']:,}"
            expect_cell(operations, [own[0]["gigaflops_per_image"]], 3)
        expect_differences(page, comparison, rows)


def noise(result: dict) -> tuple:
    """What decides the noise of images with one seed."""
    return result["fingerprint"].get("device"), result["fingerprint"].get("noise")


def expect_differences(page: str, comparison, rows: dict[str, dict[int, dict]]) -> None:
    """Compare the table of differences with the results, by name and seed."""
    wanted = {}
    for name, own in rows.items():
        other = comparison.against.get(name, comparison.baseline)
        both = [(own[seed], rows[other][seed]) for seed in own if seed in rows[other]]
        pairs = [[each["points"][-1] for each in pair] for pair in both if len({noise(each) for each in pair}) == 1]
        if name != other and pairs:
            title, against = (comparison.measured[each][0].title for each in (name, other))
            wanted[title if other == comparison.baseline else f"{title} (against “{against}”)"] = pairs
    shown = cells(page, comparison, 1) if wanted else {}
    assert list(shown) == list(wanted)
    for title, pairs in wanted.items():
        for cell, metric, places in zip(shown[title], METRICS, PLACES):
            changes = [own[metric] - other[metric] for own, other in pairs if None not in (own[metric], other[metric])]
            expect_cell(cell, changes, places)
            better = sum(change < 0 if metric in ("FID", "KID") else change > 0 for change in changes)
            assert not changes or cell.endswith(f"({better} of {len(changes)})")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_page_is_of_the_published_results(preset):
    """The page is what `write_report` makes of them, with their figures, of runs with the preset's settings."""
    plan, results, page = load_plan(preset), DOCS / "results" / preset, PAGES[preset].read_text(encoding="utf-8")
    assert page_of(plan, results) == page, f"The page is not up to date: make compare PRESET={preset}"
    expect_figures(page, plan, results)
    for run in plan.runs:
        path = results / f"{run.key}.json"
        assert not path.exists() or json.loads(path.read_text())["settings"] == plan.settings(run), run.key
    linked = {f"docs/{link}" for link in re.findall(r"!\[.*?\]\((.*?)\)", page)}
    pictures = [*results.glob("*/*.png"), *results.glob("*/*.svg")]
    assert linked == {str(path.relative_to(REPOSITORY)) for path in pictures}


def test_every_figure_is_that_of_the_results(plan, results):
    page = page_of(plan, results)
    expect_figures(page, plan, results)
    assert "issing" not in page and "Unfinished" not in page and "\n\n\n" not in page and not page.endswith("\n\n")
    assert "classifies 91.2 % of these others rightly, the judge 93.4 %.\n" in page
    assert "- Commits abc, abd, on a machine.\n" in page
    assert "| Fashion-MNIST, 9 images of uniform noise | 88.25 | 0.100 |" in page


def test_the_same_results_make_the_same_page_and_plots(plan, results):
    """Each plot that the page shows is written, and old ones are removed."""
    for name in ("dtr", "tuning"):
        shutil.rmtree(results / name)
    report, plots = results.parent.parent / "page.md", results / "plots"
    write_report(plan, results, report)
    page, first = report.read_text(encoding="utf-8"), {path.name: path.read_bytes() for path in plots.iterdir()}
    assert page == page_of(plan, results)
    assert set(first) == set(re.findall(r"results/tiny/plots/(.*?)\)", page))
    assert set(first) >= {"base_steps.svg", "snr_split_losses.svg", "snr_split_cost.svg", "guidance_scales.svg"}
    (plots / "old_steps.svg").write_text("of a comparison that is no more")
    write_report(plan, results, report)
    assert report.read_text(encoding="utf-8") == page
    assert {path.name: path.read_bytes() for path in plots.iterdir()} == first


def test_what_is_missing_is_named(plan, results):
    for key in ("dtr/dtr-1", "dtr/dtr-2", "dtr/dit_uw-2", "guidance/unguided-0"):
        (results / f"{key}.json").unlink()
    for path in [*(results / "tuning").glob("*.json"), *(results / "snr_split").glob("*-2.json")]:
        path.unlink()
    page = page_of(plan, results)
    number = sum(run.comparison == "tuning" for run in plan.runs)
    second = sum(run.comparison == "snr_split" and run.seed == 2 for run in plan.runs)
    summary = f"**Unfinished: {number + second + 4} of {len(plan.runs)} runs are missing: 3 of 24 in “DiT and DTR, from scratch”, {number} of"
    assert summary in page
    assert "**Missing with seeds 1, 2: DTR. Missing with seed 2: DiT, uncertainty.**" in page
    assert f"**Missing with seed 2: all {second} runs.**" in page
    assert "**Missing with seed 0: Unguided.**" in page
    assert "**There is no result yet. Missing with seeds 0, 1, 2: As it was;" in page
    assert "Missing with seed 0: Plain further training, larger steps;" in page
    (tuning,) = (each for each in plan.comparisons if each.name == "tuning")
    assert tuning.text.strip() in page
    expect_figures(page, plan, results)  # among others, 1 of 3 seeds


@pytest.mark.parametrize("again", ["what it started from", "what sampled its images"])
def test_tables_say_if_what_their_rows_start_from_was_trained_again(plan, results, again):
    place = "base/longest-0/pipeline"

    def write_with(key: str, sha256: str) -> None:
        result = result_of(plan, key)
        if plan.run(key).base or key == "base/longest-0":
            result["fingerprint"] |= {"pipeline_sha256": sha256}
        else:
            result |= {"started_from": {place: sha256}}
        write(results / f"{key}.json", result)

    for key in ("base/longest-0", "tuning/dit-0", "tuning/dmp-0"):
        write_with(key, "a1")
    assert "Trained again" not in page_of(plan, results)  # the others have no hash
    write_with("tuning/dmp-1" if again == "what it started from" else "tuning/dit-1", "b2")
    page = page_of(plan, results)
    titles = {each.name: each.title for each in plan.comparisons}
    for name in ("base", "tuning"):
        part = page.split(f"\n## {titles[name]}\n")[1].split("\n## ")[0]
        assert re.search(rf"\*\*Trained again between runs, .* start from the same: {place}\.\*\*", part)
    assert page.count("Trained again") == 2


def test_differences_are_between_images_of_the_same_noise(plan, results):
    def write_from(key: str, device: str) -> None:
        result = result_of(plan, key)
        result["fingerprint"] |= {"device": device}
        write(results / f"{key}.json", result)

    for name in ("dit", "dtr"):
        for seed in SEEDS:
            write_from(f"dtr/{name}-{seed}", "cuda")
    write_from("dtr/dtr-2", "cpu")
    page = page_of(plan, results)
    (dtr,) = (comparison for comparison in plan.comparisons if comparison.name == "dtr")
    assert cells(page, dtr, 1)["DTR"][0].endswith("of 2)")
    part = page.split(f"\n## {dtr.title}\n")[1].split("\n## ")[0]
    noises = part.split("From the same noise are, each for themselves:\n")[1].splitlines()[0]
    assert noises.startswith("DiT, DTR; DiT, Min-SNR, ") and noises.endswith(".")
    (tuning,) = (comparison for comparison in plan.comparisons if comparison.name == "tuning")
    assert "All from the same noise, " in page.split(f"\n## {tuning.title}\n")[1].split("\n## ")[0]


def test_fid_by_inception_has_a_column_where_it_was_measured(plan, results):
    assert "Inception" not in page_of(plan, results)
    values = {"dtr/dit-0": 20.0, "dtr/dit-1": 22.0, "dtr/dtr-0": 19.0}
    for key, value in values.items():
        result = result_of(plan, key)
        result["points"][-1] |= {"FID_inception": value}
        write(results / f"{key}.json", result | {"inception_fingerprint": {"num_samples": plan.num_images}})
    page = page_of(plan, results)
    header = "|  | FID ↓ | KID ↓ | precision ↑ | recall ↑ | recognised ↑ | FID, Inception ↓ |"
    assert page.count(header) == 2  # of metrics, and of differences
    (dtr,) = (comparison for comparison in plan.comparisons if comparison.name == "dtr")
    metrics, differences = cells(page, dtr, 0), cells(page, dtr, 1)
    last = len(METRICS)
    assert (
        metrics["DiT"][last] == "21.00 ± 1.41"
        and metrics["DTR"][last] == "19.00"
        and metrics["DTR, 60 % shared"][last] == "–"
    )
    assert differences["DTR"][last] == "-1.00 (1 of 1)"
    write(
        results / "dtr/dtr-0.json",
        json.loads((results / "dtr/dtr-0.json").read_text()) | {"inception_fingerprint": {"num_samples": 7}},
    )
    with pytest.raises(ValueError, match=r"dtr/dtr-0\.json: .*num_samples"):
        page_of(plan, results)


def test_without_a_result_the_page_says_so(plan, tmp_path):
    page = page_of(plan, tmp_path / "results" / "tiny")
    assert f"**There are no results yet: all {len(plan.runs)} runs are missing.**" in page
    assert all(f"\n## {comparison.title}\n" in page for comparison in plan.comparisons) and "![" not in page


def test_without_the_baseline_there_are_no_differences(plan, results):
    for seed in SEEDS:
        (results / "snr_split" / f"one-{seed}.json").unlink()
    page = page_of(plan, results)
    expect_figures(page, plan, results)
    assert "There are no differences yet" in page


def test_differences_are_between_results_of_one_seed(plan, results):
    (results / "snr_split" / "one-0.json").unlink()
    (results / "snr_split" / "whole_0.25-2.json").unlink()
    page = page_of(plan, results)
    (split,) = (each for each in plan.comparisons if each.name == "snr_split")
    own, other = (result_of(plan, f"snr_split/{name}-1")["points"][-1]["FID"] for name in ("whole_0.25", "one"))
    assert cells(page, split, 1)["Whole pair, split at 0.25"][0] == f"{own - other:+.2f} ({int(own < other)} of 1)"


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        (9.6, "-4.0 % over the last 250 steps, so it is flat"),
        (9.4, "-6.0 % over the last 250 steps, so it is not flat yet"),
    ],
)
def test_convergence_is_the_change_over_the_last_quarter(plan, results, last, verdict):
    content = result_of(plan, "base/dit-0")
    fids = {250: 40.0, 500: 20.0, 750: 10.0, 1000: last}
    points = [content["points"][0] | {"step": step, "FID": fid} for step, fid in fids.items()]
    write(results / "base" / "dit-0.json", content | {"points": points})
    page = page_of(plan, results)
    assert f"\nDiT: FID is 10.00 after 750 steps and {last:.2f} after all 1,000. It changes by {verdict} (" in page


def test_incomplete_and_foreign_results_are_refused_by_name(plan, results):
    path = results / "guidance" / "ppap_15-1.json"
    content = path.read_text()
    write(path, content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=r"Expected '.*guidance/ppap_15-1\.json' to be a complete result, but got what is not JSON"
    ):
        page_of(plan, results)
    other = json.loads(content)
    write(path, other | {"fingerprint": other["fingerprint"] | {"extractor_sha256": "of another"}})
    with pytest.raises(
        ValueError, match=r"guidance/ppap_15-1\.json: Expected results that were measured alike.*extractor_sha256"
    ):
        page_of(plan, results)
    unmeasured = {name: value for name, value in other.items() if name != "points"}
    write(path, unmeasured)
    with pytest.raises(ValueError, match=r"ppap_15-1\.json' to be a complete result, but got one without points"):
        page_of(plan, results)


def test_plots_show_means_and_deviations(plan, results):
    tables = {table.comparison.name: table for table in read_tables(plan, results)}
    dtr = tables["dtr"]
    runs = [result_of(plan, f"dtr/dtr-{seed}") for seed in SEEDS]
    line = next(line for line in steps_figure(dtr).axes[0].lines if line.get_label() == "DTR")
    assert line.get_xydata() == pytest.approx(
        np.array([[s, np.mean([run["points"][i]["FID"] for run in runs])] for i, s in enumerate((2, 4))])
    )

    line = next(
        line
        for line in losses_figure(dtr).axes[0].lines
        if line.get_label() == "DTR, Min-SNR (against “DiT, Min-SNR”)"
    )
    pairs = [[result_of(plan, f"dtr/{name}_min_snr-{seed}")["losses"] for name in ("dtr", "dit")] for seed in SEEDS]
    assert line.get_ydata() == pytest.approx(np.mean([100 * (np.divide(*pair) - 1) for pair in pairs], axis=0))
    cells_of_losses = [f"{change:+.1f}" for change in line.get_ydata()]
    (comparison,) = (each for each in plan.comparisons if each.name == "dtr")
    shown = cells(page_of(plan, results), comparison, 3)["DTR, Min-SNR (against “DiT, Min-SNR”)"]
    assert [cell.split(" ± ")[0] for cell in shown] == cells_of_losses

    (bars,) = (bars for bars in cost_figure(tables["snr_split"]).axes[0].containers if bars.get_label() == "One UNet")
    fids = [result_of(plan, f"snr_split/one-{seed}")["points"][-1]["FID"] for seed in SEEDS]
    mean, deviation = np.mean(fids), np.std(fids, ddof=1)
    (segment,) = bars[2][0].get_segments()
    assert segment[:, 1] == pytest.approx([mean - deviation, mean + deviation]) and segment[0, 0] == pytest.approx(0.8)


def test_long_titles_leave_room_for_the_axes(plan, results):
    tuning = next(table for table in read_tables(plan, results) if table.comparison.name == "tuning")
    for draw in (steps_figure, losses_figure, cost_figure):
        figure = draw(tuning)
        FigureCanvasAgg(figure).draw()
        position, height = figure.axes[0].get_position(), figure.get_figheight()
        assert position.width > 0.8 and position.height * height > 3, draw  # inches
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0, draw
