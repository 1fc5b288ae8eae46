"""The comparison's plan: all runs of a table are on equal terms, and what one needs comes before it."""

import pytest
from benchmarks.comparison.plan import Plan, load_plan
from comparison_plans import arguments_of, write_preset

from diffusers_dmp import DiTModel, DTRTransformer2DModel

pytestmark = pytest.mark.usefixtures("in_the_repository")
# what all others of a table start from, and what has more steps than they, as its title says
UNEQUAL = (
    "base/longer",
    "base/longest",
    "guidance/dit",
    "guidance/drawn",
    "guidance/ppap_more",
    "guidance/ppap_slow",
    "snr_split/one_longer",
)
INDEPENDENT = ("train_dit.py", "train_ppap.py")  # scripts that train each of `num_experts` for as many steps


@pytest.fixture(scope="module")
def cpu() -> Plan:
    return load_plan("cpu")


def test_every_run_is_on_equal_terms(cpu):
    """All runs that are trained take as many steps in total as what they are compared with, on equal batches, with their own seed."""
    for comparison in cpu.comparisons:
        if comparison.name == "lora":  # see test_comparison_text.py
            continue
        budgets: dict[str, dict[str, tuple[int, int]]] = {}  # by what is compared with each other, and by run
        for run in (run for run in comparison.runs if run.script and run.seed == 0):
            args = arguments_of(cpu, run)
            if run.key.removesuffix("-0") in UNEQUAL:
                continue
            assert args.seed == run.seed
            num_trained = (args.num_experts or 1) if run.script in INDEPENDENT else 1
            group = run.name if run.name in comparison.against.values() else comparison.against.get(run.name, "")
            budgets.setdefault(group, {})[run.key] = (args.max_train_steps * num_trained, args.batch_size)
        for group in budgets.values():
            assert len(set(group.values())) == 1, group


def test_every_run_has_every_seed_but_those_that_others_start_from_and_further_settings(cpu):
    once = {"base/dit", "base/longer", "base/longest", "guidance/dit", "guidance/drawn", "lora/base"}
    once |= {f"guidance/{name}" for name in ("ppap_more", "ppap_slow", "ppap_more_7.5", "ppap_slow_7.5")}
    further = (
        "further_faster",
        "remix_8_faster",
        "dmp_slower",
        "further_longer",
        "remix_8_longer",
        "remix_20_longer",
        "dmp_longer",
    )
    once |= {f"tuning/{name}" for name in further}
    for comparison in cpu.comparisons:
        names = {run.name for run in comparison.runs}
        for name in names:
            seeds = [run.seed for run in comparison.runs if run.name == name]
            assert seeds == ([0] if f"{comparison.name}/{name}" in once else cpu.seeds)


def test_compared_models_have_equally_many_parameters(cpu):
    args = arguments_of(cpu, cpu.run("dtr/dtr-0"))
    names = ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size")
    shared = {"sample_size": 28, "in_channels": 1} | {name: getattr(args, name) for name in names}
    assert DiTModel(**shared).num_parameters() == DTRTransformer2DModel(**shared).num_parameters()


def test_a_run_uses_what_it_waits_for_and_nothing_else(cpu):
    keys = [run.key for run in cpu.runs]
    assert len(set(keys)) == len(keys)
    for run in cpu.runs:
        places = [run.base, run.guide, *run.parts, *run.arguments.values()]
        used = [str(cpu.resolve(run, place)) for place in places if "{outputs}" in str(place)]
        needed = [str(cpu.folder(other)) for other in cpu.before(run)]
        assert all(any(place.startswith(f"{folder}/") or place == folder for folder in needed) for place in used), (
            run.key
        )
        assert all(any(place.startswith(folder) for place in used) for folder in needed), run.key


def test_a_command_trains_the_same_as_the_comparison_does(cpu):
    run = cpu.run("dtr/dtr-1")
    command = cpu.command(run, num_threads=2)
    assert command[:2] == ["accelerate", "launch"] and command[-len(cpu.script(run)) :] == cpu.script(run)
    assert cpu.script(run)[0] == "training/train_dtr.py" and "--seed 1 " in " ".join(command)


def test_unknown_names_are_refused(cpu, tmp_path):
    with pytest.raises(ValueError, match="Expected a run to be one of .*dtr/dit-0.*'dit'"):
        cpu.run("dit")
    with pytest.raises(ValueError, match="a YAML file or one of cpu, gpu, but got 'tpu'"):
        load_plan("tpu")
    assert load_plan(str(write_preset(tmp_path))).name == "tiny"
