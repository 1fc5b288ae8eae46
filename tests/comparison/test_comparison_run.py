"""What a run starts from, and what it was begun with: one result is never of two trainings or two commits in silence."""

import pytest
from benchmarks.comparison import run
from benchmarks.comparison.run import starts
from comparison_plans import tiny_plan

pytestmark = pytest.mark.usefixtures("in_the_repository")


def test_what_a_run_starts_from_has_a_hash_that_changes_when_that_is_trained_again(tmp_path):
    plan = tiny_plan(tmp_path, seeds=(0, 1))

    def save(place: str, weights: bytes) -> None:
        path = plan.output_dir / place / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(weights)

    places = {
        "tuning/dmp-1": ["base/longest-0/pipeline"],
        "snr_split/mixed_1-1": ["snr_split/clean_1-1/expert_0/pipeline", "snr_split/rough_1-1/expert_1/pipeline"],
        "guidance/ppap-1": ["data/fashion/guide", "guidance/dit-0/pipeline"],  # which sampled its images
        "guidance/classifier_15-1": ["data/fashion/guide", "guidance/dit-0/pipeline"],
        "guidance/ppap_7.5-1": ["guidance/dit-0/pipeline", "guidance/ppap-1/experts"],
    }
    for place in {place for some in places.values() for place in some}:
        save(place, b"first")
    save("base/longest-0/checkpoint-2", b"not what others start from")
    before = {key: starts(plan, plan.run(key)) for key in places}
    assert {key: sorted(found) for key, found in before.items()} == places
    save("guidance/dit-0/pipeline", b"second")
    changed = {key for key in places if starts(plan, plan.run(key)) != before[key]}
    assert changed == {"guidance/ppap-1", "guidance/classifier_15-1", "guidance/ppap_7.5-1"}
    assert starts(plan, plan.run("dtr/dit-0")) == {}


def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path, monkeypatch):
    """Its result names the commit and the weights of its beginning, however much later it is measured."""
    plan = tiny_plan(tmp_path)
    needed, own = plan.run("base/longest-0"), plan.run("tuning/further-0")
    weights = plan.folder(needed) / "pipeline" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"first")
    monkeypatch.setattr(run, "code_commit", lambda: "first")
    trained = []

    def interrupted(script, folder, num_threads):
        trained.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_script", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(plan, own, 1)
    monkeypatch.setattr(run, "code_commit", lambda: "second")
    weights.write_bytes(b"second")
    with pytest.raises(
        ValueError, match=f"Expected {plan.folder(own)} .* but base/longest-0/pipeline changed since. Delete"
    ):
        run.train(plan, own, 1)
    weights.write_bytes(b"first")
    with pytest.raises(KeyboardInterrupt):
        run.train(plan, own, 1)
    assert trained == [plan.folder(own)] * 2

    (plan.folder(own) / "trained.json").write_text('{"milliseconds_per_step": 1.0}')
    monkeypatch.setattr(run, "_measurement", lambda plan, run: {"points": []})
    weights.unlink()  # measuring does not need it
    result = run.perform(plan, own, 1)
    assert result["commit"] == "first" and list(result["started_from"]) == ["base/longest-0/pipeline"]
