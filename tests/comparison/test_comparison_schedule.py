"""The order of a comparison's runs, how long they take, and when a part of it ends; without any process."""

import random
import time
from dataclasses import replace

import pytest
from benchmarks.comparison import execution
from benchmarks.comparison.execution import Execution, Limits
from benchmarks.comparison.schedule import Durations, Job, Schedule, time_text
from benchmarks.scripts import SECONDS_RECORD
from comparison_plans import tiny_plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny_plan(tmp_path_factory.mktemp("comparison"), seeds=(0, 1))


def training(key: str) -> Job:
    return Job(key, is_training=True)


def rest(key: str) -> Job:
    return Job(key, is_training=False)


def test_each_run_is_trained_and_measured_once(plan):
    schedule = Schedule(plan, finished=[], trained=[])
    assert sorted(schedule.left) == sorted(
        [rest(run.key) for run in plan.runs] + [training(run.key) for run in plan.runs if run.script]
    )
    assert schedule.num_runs == len(plan.runs) == len(schedule.unfinished)


def test_what_others_wait_for_comes_first_seed_by_seed(plan):
    left = Schedule(plan, finished=[], trained=[]).left
    # a DiT, images that it generates, experts that are trained on them, and images that these guide
    chain = [
        training("guidance/dit-0"),
        training("guidance/drawn-0"),
        training("guidance/ppap-0"),
        rest("guidance/ppap_15-0"),
    ]
    assert sorted(chain, key=left.index) == chain and set(left[:2]) == {chain[0], training("base/dit-0")}
    assert [plan.run(job.key).seed for job in left] == sorted(plan.run(job.key).seed for job in left)
    assert left.index(training("base/longest-0")) < left.index(training("dtr/dit-0"))
    assert left.index(training("guidance/ppap-1")) < left.index(training("dtr/dit-1"))


def test_a_trained_run_is_measured_before_another_is_begun(plan):
    schedule = Schedule(plan, finished=[], trained=["dtr/dtr_90-0"])
    ready = [job for job in schedule.ready() if job.key.startswith("dtr/")]
    assert ready[0] == rest("dtr/dtr_90-0")


def test_runs_wait_for_the_training_of_others_and_not_for_their_measuring(plan):
    schedule = Schedule(plan, finished=[], trained=["base/dit-0", "base/longer-0", "base/longest-0"])
    assert training("tuning/dmp-0") in schedule.ready() and rest("base/longest-0") in schedule.ready()
    # the images of two parts
    schedule = Schedule(plan, finished=[], trained=["snr_split/clean_1-0"])
    assert rest("snr_split/mixed_1-0") not in schedule.ready()
    schedule = Schedule(plan, finished=[], trained=["snr_split/clean_1-0", "snr_split/rough_1-0"])
    assert rest("snr_split/mixed_1-0") in schedule.ready()


def test_a_run_is_trained_again_only_if_others_need_its_missing_weights(plan):
    everything = {run.key for run in plan.runs}
    assert Schedule(plan, everything, trained=[]).left == []
    left = Schedule(plan, everything - {"guidance/ppap_15-1"}, trained=["guidance/dit-0"]).left
    assert left == [training("guidance/drawn-0"), training("guidance/ppap-1"), rest("guidance/ppap_15-1")]
    assert Schedule(plan, everything - {"tuning/dmp-0"}, trained=["tuning/dmp-0"]).left == [rest("tuning/dmp-0")]


def test_chosen_comparisons_have_what_they_need_trained(plan):
    schedule = Schedule(plan, finished=[], trained=[], only=["tuning"])
    own, needed = (
        {run.key for run in plan.runs if run.comparison == "tuning"},
        {"base/dit-0", "base/longer-0", "base/longest-0"},
    )
    assert {job.key for job in schedule.left} == own | needed and schedule.num_runs == len(own)
    assert all(job.is_training for job in schedule.left if job.key in needed)
    with pytest.raises(ValueError, match="`only` to be some of dtr, base, .*, but got 'ddpm'"):
        Schedule(plan, [], [], only=["ddpm"])


class FakeWorker:
    """A worker whose jobs end when the test lets them."""

    is_alive = True
    job = None

    def __init__(self, plan, num_threads):
        pass

    def give(self, job):
        self.job, self.started = job, time.monotonic()

    def answer(self):
        job, self.job = self.job, None
        failure = "there is no room" if job == FakeWorker.fails else ""
        return job, None if job.is_training or failure else {"seconds": 60}, failure


@pytest.fixture
def perform(plan, tmp_path, monkeypatch):
    """Perform a schedule with fake workers that end in any order, and return the jobs in the order of their ends."""
    monkeypatch.setattr(execution, "Worker", FakeWorker)
    monkeypatch.setattr(execution, "stop", lambda workers, deadline: None)
    monkeypatch.setattr(execution, "_keep_grid", lambda *arguments: None)
    monkeypatch.setattr(execution, "write_json", lambda path, content: None)

    def perform(schedule, num_workers=3, fails=None):
        order, chance = [], random.Random(num_workers)
        FakeWorker.fails = fails

        def answering(workers, deadline):
            assert len(workers) == num_workers or not schedule.ready(), "a worker waits while something is ready"
            worker = chance.choice(workers)
            assert not schedule.missing.intersection(schedule.needs[worker.job]), f"{worker.job} is too early"
            order.append(worker.job)
            return [worker]

        monkeypatch.setattr(execution, "answering", answering)
        Execution(plan, tmp_path, schedule, Durations(), num_workers, Limits(0.0)).perform()
        return order

    return perform


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_no_worker_waits_while_something_is_ready(plan, perform, num_workers):
    """In whichever order the jobs end; see the assertions of `perform`."""
    schedule = Schedule(plan, finished=[], trained=[])
    jobs = sorted(schedule.left)
    assert sorted(perform(schedule, num_workers)) == jobs
    assert not schedule.left and not schedule.unfinished


def test_what_needs_a_failed_run_is_left_out(plan, perform, capsys):
    schedule = Schedule(plan, finished=[], trained=[])
    perform(schedule, fails=training("guidance/ppap-0"))
    assert schedule.failures == {"guidance/ppap-0": "there is no room"}
    left = ["guidance/ppap-0", *(f"guidance/ppap_{scale}-0" for scale in ("2.5", "7.5", "15"))]
    assert schedule.unfinished == left
    printed = capsys.readouterr()
    assert printed.err == "guidance/ppap-0: failed, there is no room\n"
    number = schedule.num_runs
    assert f"done in 1 min 0 s; {number - 1} of {number} runs left, about " in printed.out.splitlines()[0]


def test_a_worker_that_died_is_asked_what_became_of_its_job(plan, perform, monkeypatch):
    """Also if it died while the answer of another one was taken down."""

    class Mortal(FakeWorker):
        @property
        def is_alive(self):
            return self.job != training("guidance/ppap-0")

        def answer(self):
            died, job = not self.is_alive, self.job
            answer = super().answer()
            return (job, None, "its process ended with -9") if died else answer

    monkeypatch.setattr(execution, "Worker", Mortal)
    schedule = Schedule(plan, finished=[], trained=[])
    perform(schedule)
    assert schedule.failures == {"guidance/ppap-0": "its process ended with -9"}
    assert [key for key in schedule.unfinished if "ppap-0" not in key] == [
        f"guidance/ppap_{n}-0" for n in ("2.5", "7.5", "15")
    ]


def test_a_run_is_measured_when_all_that_samples_its_images_is_there(plan):
    """Also one that is trained itself, as LoRAs are, for a pipeline of another run."""
    run = plan.run("dtr/dtr-0")
    lora = replace(run, name="lora", base="{outputs}/dtr/dit-0/pipeline", after=["dtr/dit"])
    comparison = replace(plan.comparisons[0], runs=[*plan.comparisons[0].runs, lora])
    schedule = Schedule(replace(plan, comparisons=[comparison]), {run.key for run in plan.runs}, trained=[lora.key])
    assert schedule.left == [training("dtr/dit-0"), rest(lora.key)] and schedule.ready() == [training("dtr/dit-0")]


def test_estimates_are_of_runs_of_the_same_kind(plan, tmp_path):
    first, second = plan.run("dtr/dit-0"), plan.run("dtr/dit_uw-1")
    guided, experts = plan.run("guidance/ppap_15-0"), plan.run("guidance/ppap-0")
    durations = Durations()
    assert durations.of(first) is None
    durations.known += [(first, 100), (guided, 10), (plan.run("guidance/finetune_15-1"), 20)]
    assert durations.of(second) == 100 and durations.of(plan.run("guidance/classifier_2.5-1")) == 15
    assert durations.of(plan.run("tuning/further-0")) == 100  # the same script
    assert durations.of(experts) == 130 / 3  # of all
    longer, one = plan.run("snr_split/one_longer-0"), plan.run("snr_split/one-0")
    assert Durations([(one, 70)]).of(longer) == 140  # the same script, with twice the steps
    assert durations.rest_of(second, spent=40) == 60 and durations.rest_of(second, spent=99.5) == 10

    everything = {run.key for run in plan.runs}
    schedule = Schedule(plan, everything - {first.key, guided.key}, trained=everything)
    assert durations.left(schedule, {first.key: 50}, num_workers=2) == (50 + 15) / 2
    assert Durations().left(schedule, {}, num_workers=2) is None
    # a finished run whose weights others need is trained again
    schedule = Schedule(plan, everything - {guided.key}, trained=everything - {"guidance/ppap-0"})
    assert durations.left(schedule, {}, num_workers=1) == 15 + 130 / 3
    schedule = Schedule(plan, everything - {first.key, guided.key}, trained=everything)

    seconds = plan.folder(first) / SECONDS_RECORD
    seconds.parent.mkdir(parents=True)
    seconds.write_text('{"seconds": 40}')
    work = Execution(plan, tmp_path, schedule, durations, 1, Limits(0.0))
    assert work.left() == f"2 of {len(everything)} runs left, about 1 min 15 s"
    work.durations = Durations()
    assert work.left() == f"2 of {len(everything)} runs left, no estimate yet"
    schedule.unfinished.clear()
    assert work.left() == f"all {len(everything)} runs are done"


def test_times_are_read_at_a_glance():
    assert [time_text(seconds) for seconds in (7.4, 59.6, 350, 3599.7, 11400, 90000)] == [
        "7 s", "1 min 0 s", "5 min 50 s", "1 h 0 min", "3 h 10 min", "25 h 0 min"
    ]  # fmt: skip


def test_a_part_starts_what_fits_and_trainings_that_the_next_part_goes_on_with():
    limits = Limits.of(started=1000.0, minutes=9)
    assert limits.stop_at == 1000 + 540 - 40 and limits.kill_at == 1000 + 540 - 20
    job, train = rest("dtr/dit-0"), training("dtr/dit-0")
    assert limits.allow(job, 100, now=1399) and not limits.allow(job, 100, now=1401)
    assert limits.allow(job, None, now=1499) and not limits.allow(job, None, now=1500)
    assert limits.allow(job, 471, now=1499)  # longer than any part, which has half a minute of imports
    assert limits.allow(train, 1e6, now=1470) and not limits.allow(train, 1, now=1471)  # too late for its first step
    assert Limits.of(0.0, None).allow(job, 1e6, now=1e9)
    short = Limits.of(0.0, 0.5)
    assert short.allow(train, None, now=5) and short.kill_at == 24 and short.stop_at == 18


def test_nothing_is_started_when_the_time_is_over(plan, perform, tmp_path, monkeypatch):
    schedule = Schedule(plan, finished=[], trained=[])
    stopped = []
    monkeypatch.setattr(
        execution, "stop", lambda workers, deadline: stopped.append(([w.job for w in workers], deadline))
    )
    limits = Limits(0.0, stop_at=50.0, kill_at=55.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    clock = [0.0]

    def answering(workers, deadline):
        assert deadline == 50.0
        clock[0] += 24
        return workers[:1] if clock[0] < deadline else []

    monkeypatch.setattr(execution, "answering", answering)
    FakeWorker.fails = None
    durations = Durations([(plan.run("base/dit-0"), 10)])
    Execution(plan, tmp_path, schedule, durations, 1, limits).perform()
    assert stopped == [([None], 55.0)]
    started = [job for job in Schedule(plan, [], []).left if job not in schedule.left]
    assert len(started) == 2 and started[0] == training("base/dit-0")  # a third would have had two seconds
