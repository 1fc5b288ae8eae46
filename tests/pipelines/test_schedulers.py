"""Every scheduler of Diffusers generates the right distribution, or is refused before the first step."""

import inspect

import diffusers
import pytest
import torch
from conftest import REPOSITORY
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from exact_denoisers import (
    BETA_SCHEDULES,
    DISTILLED,
    TABLE,
    ExactDenoiser,
    flow_settings,
    generate,
    measure,
    measure_guided,
    pipeline_of,
    problem,
    row,
    scheduler_classes,
)
from networks import linear_experts

from diffusers_dmp import ClassConditionalPipeline, ClassTarget, GuidedScheduler, SNRSplitPipeline
from diffusers_dmp.diffusion.noise_schedules import with_noise_schedule, without_pure_noise
from diffusers_dmp.diffusion.predictions import PREDICTION_TYPES, convert_prediction

README = REPOSITORY / "README.md"
COSINE = "squaredcos_cap_v2"
CLASSES = scheduler_classes()
NEED_TORCHSDE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}
TABLE_ROWS = {line.split("`")[1]: line for line in TABLE.read_text().splitlines() if line.startswith("| `")}
RIGHT = [name for name in CLASSES if "| right" in TABLE_ROWS.get(name, "").rsplit("|", 3)[0]]


def takes(name: str, setting: str) -> bool:
    return setting in inspect.signature(CLASSES[name].__init__).parameters


def words(name: str) -> list[str]:
    return [each.strip() for each in TABLE_ROWS[name].split("|")[2:-1]]


def test_the_table_has_every_scheduler():
    assert CLASSES.keys() - TABLE_ROWS.keys() == set()
    if f"Diffusers {diffusers.__version__}, " in TABLE.read_text():
        assert TABLE_ROWS.keys() - CLASSES.keys() <= NEED_TORCHSDE


def test_the_readme_counts_what_fits():
    fits = [sum(words(name)[column].startswith("right") for name in TABLE_ROWS) for column in (1, 2)]
    assert f"{fits[0]} of Diffusers' schedulers fit such a pipeline, {fits[1]} fit" in README.read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_is_true_for_a_cosine_schedule(name):
    """Where a schedule ends in pure noise, a solver cannot begin with a predicted noise."""
    measured = measure(CLASSES[name], ExactDenoiser(COSINE, distilled=name in DISTILLED))
    assert measured == words(name)[1].removesuffix(" if distilled")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_the_table_is_true(name):
    assert row(name, CLASSES[name]) == TABLE_ROWS[name]


def all_settings(name: str) -> list[dict]:
    """Settings that change which noise levels a scheduler visits, or how it steps from one to the next."""
    settings = [{"timestep_spacing": each} for each in ("leading", "linspace", "trailing")]
    settings += [{f"use_{each}": True} for each in ("karras_sigmas", "exponential_sigmas", "lu_lambdas")]
    settings += [{"solver_order": 3}, {"thresholding": True}, {"algorithm_type": "sde-dpmsolver++"}]
    if name in ("DEISMultistepScheduler", "SASolverScheduler"):
        settings.pop()  # another kind of algorithm
    return [each for each in settings if takes(name, next(iter(each)))]


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_with_all_settings(name, beta_schedule, prediction_type):
    denoiser = ExactDenoiser(beta_schedule, prediction_type, distilled=name in DISTILLED)
    settings = [{}, *all_settings(name)]
    measured = {str(each): measure(CLASSES[name], denoiser, **each) for each in settings}
    assert measured == dict.fromkeys(map(str, settings), "right")


@pytest.mark.parametrize("name", [name for name in RIGHT if takes(name, "use_karras_sigmas")])
def test_karras_sigmas_on_a_cosine_schedule(name):
    """The timesteps of many of them are rounded to the same number."""
    assert measure(CLASSES[name], ExactDenoiser(COSINE), use_karras_sigmas=True) == "right"


@pytest.mark.parametrize("name", [name for name in RIGHT if takes(name, "use_beta_sigmas")])
def test_beta_sigmas_are_refused(name):
    """They have hardly any steps where there is little noise: up to six times the data's spread."""
    pipeline = pipeline_of(ExactDenoiser(COSINE))
    pipeline.scheduler = CLASSES[name].from_config(pipeline.scheduler.config, use_beta_sigmas=True)
    with pytest.raises(ValueError, match="`use_karras_sigmas=True` works"):
        generate(pipeline)


@pytest.mark.parametrize(
    "name", sorted({"EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"})
)
def test_predictions_of_x0_where_the_scheduler_takes_none(name):
    denoiser = ExactDenoiser(COSINE, "sample")
    assert measure(CLASSES[name], denoiser) == "right"


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_denoiser_of_another_type_than_the_scheduler(name):
    for prediction_type in PREDICTION_TYPES:
        denoiser = ExactDenoiser(COSINE, prediction_type)
        for scheduler_type in PREDICTION_TYPES:
            pipeline = pipeline_of(denoiser)
            pipeline.scheduler = CLASSES[name].from_config(pipeline.scheduler.config, prediction_type=scheduler_type)
            assert problem(generate(pipeline), denoiser) == ""


def test_a_cosine_schedule_in_half_precision():
    denoiser = ExactDenoiser(COSINE).to(torch.bfloat16)
    pipeline = pipeline_of(denoiser)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert problem(generate(pipeline).float(), denoiser) == ""


# Where they begin


def first_timestep(scheduler, prediction_type: str = "epsilon", **arguments) -> float:
    denoiser = ExactDenoiser(COSINE, prediction_type)
    pipeline = ClassConditionalPipeline(denoiser, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(output_type="latent", **({"num_inference_steps": 5} | arguments))
    assert len(denoiser.calls) == 5 or arguments
    return denoiser.calls[0]


def test_solvers_begin_where_they_can():
    """At an SNR of 1/50², in as many steps; only where the schedule would begin beyond it."""
    schedule = {"beta_schedule": COSINE}
    assert first_timestep(DPMSolverMultistepScheduler(**schedule)) == 986
    assert first_timestep(DDIMScheduler(**schedule, timestep_spacing="trailing", clip_sample=False)) == 986
    assert first_timestep(DPMSolverMultistepScheduler(**schedule, timestep_spacing="leading")) == 830
    # x̂0 is finite: it is clipped, or predicted
    assert first_timestep(DDIMScheduler(**schedule, timestep_spacing="trailing")) == 999
    v_prediction = DPMSolverMultistepScheduler(**schedule, prediction_type="v_prediction")
    assert first_timestep(v_prediction, "v_prediction") == 999
    # a linear schedule ends at an SNR of 4e-5
    assert first_timestep(DPMSolverMultistepScheduler(), "epsilon") == 999


def test_settings_that_a_scheduler_does_not_read():
    """It would begin in pure noise if it was taken to clip."""
    for setting in ("clip_sample", "thresholding"):
        assert measure(CLASSES["TCDScheduler"], ExactDenoiser(COSINE), **{setting: True}) == "right"


def test_timesteps_that_a_solver_cannot_begin_with():
    scheduler = DPMSolverMultistepScheduler(beta_schedule=COSINE)
    with pytest.raises(ValueError, match="`timesteps` to begin at 986 at most.*but got 999"):
        first_timestep(scheduler, timesteps=[999, 500, 20])
    assert first_timestep(scheduler, timesteps=[986, 500, 20]) == 986
    ancestral = DDPMScheduler(beta_schedule=COSINE, clip_sample=False)
    assert first_timestep(ancestral, timesteps=[999, 998, 500, 20]) == 999


@pytest.mark.parametrize("rescaled", [False, True])
def test_timestep_and_noise_level_stay_together(rescaled):
    scheduler = EulerDiscreteScheduler(beta_schedule=COSINE, rescale_betas_zero_snr=rescaled)
    shorter = without_pure_noise(scheduler)
    count = len(shorter.alphas_cumprod)
    assert 900 < count < 990
    torch.testing.assert_close(shorter.alphas_cumprod, scheduler.alphas_cumprod[:count])


# The noise schedule of training


def test_from_configurations_that_leave_out_the_noise_schedule():
    """`from_config` drops the defaults of the scheduler that the configuration comes from."""
    trained = DDPMScheduler()
    other = HeunDiscreteScheduler.from_config(trained.config)
    assert not torch.allclose(other.alphas_cumprod, trained.alphas_cumprod)
    torch.testing.assert_close(with_noise_schedule(other, trained).alphas_cumprod, trained.alphas_cumprod)
    same = DDIMScheduler.from_config(trained.config)
    assert with_noise_schedule(same, trained) is same
    denoiser = ExactDenoiser()
    pipeline = pipeline_of(denoiser)
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    assert problem(generate(pipeline), denoiser) == ""
    assert pipeline.scheduler.config.trained_betas is None  # the user's own scheduler stays as it is


def test_another_noise_schedule_is_refused():
    pipeline = pipeline_of(ExactDenoiser())
    pipeline.scheduler = DDIMScheduler(beta_schedule=COSINE)
    with pytest.raises(ValueError, match="beta_schedule='squaredcos_cap_v2'; .*beta_schedule='linear'\\)` works"):
        generate(pipeline)
    generate(ClassConditionalPipeline(ExactDenoiser(COSINE), pipeline.scheduler), steps=2)  # made with it


@pytest.mark.parametrize("says_its_type", [False, True])
def test_flow_matching_and_other_noise(says_its_type):
    flow, other = ExactDenoiser(prediction_type="flow_prediction"), ExactDenoiser()
    pipelines = [pipeline_of(flow), pipeline_of(other)]
    for denoiser in (flow, other):
        if not says_its_type:
            denoiser.register_to_config(prediction_type=None)
    pipelines[0].scheduler, pipelines[1].scheduler = pipelines[1].scheduler, pipelines[0].scheduler
    for pipeline in pipelines:
        with pytest.raises(ValueError, match="only one of them is a flow-matching one"):
            generate(pipeline)


@pytest.mark.parametrize(
    ("prediction_type", "scheduler", "message"),
    [
        (
            "epsilon",
            FlowMatchEulerDiscreteScheduler(),
            "another than a flow-matching one for .* 'epsilon'.*DDIMScheduler",
        ),
        ("flow_prediction", DDIMScheduler(), "a flow-matching one for .* 'flow_prediction'.*FlowMatchEuler"),
        ("flow_prediction", UniPCMultistepScheduler(use_flow_sigmas=True), "to be 'flow_prediction' together with"),
    ],
)
def test_a_pipeline_that_is_made_with_other_noise_than_its_denoiser(prediction_type, scheduler, message):
    denoiser = ExactDenoiser(prediction_type=prediction_type)
    with pytest.raises(ValueError, match=message):
        generate(ClassConditionalPipeline(denoiser, scheduler))
    assert denoiser.calls == []


def test_a_flow_scheduler_from_another_configuration():
    """It keeps the `prediction_type` of the configuration, which is not what it expects itself."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(DDIMScheduler(prediction_type="v_prediction").config)
    denoiser = ExactDenoiser()
    denoiser.register_to_config(prediction_type=None)
    with pytest.raises(ValueError, match="a denoiser that predicts 'v_prediction'"):
        generate(ClassConditionalPipeline(denoiser, scheduler))


# Several denoisers, and guidance


SPLIT = {
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EulerDiscreteScheduler": {"use_karras_sigmas": True},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {"use_karras_sigmas": True},
    "PNDMScheduler": {},
    "UniPCMultistepScheduler": {"use_exponential_sigmas": True},
}


@pytest.mark.parametrize("name", SPLIT)
def test_two_denoisers_that_are_right_generate_what_one_does(name):
    """Each makes the steps of its own interval, also at timesteps that are no integers."""
    types = ["epsilon", "v_prediction"]
    denoisers = [ExactDenoiser(COSINE, prediction_type, error=0.0) for prediction_type in types]
    pipeline = pipeline_of(denoisers[0])
    scheduler = CLASSES[name].from_config(pipeline.scheduler.config, **SPLIT[name])
    split = SNRSplitPipeline(denoisers, pipeline.scheduler, [0.25], prediction_types=types)
    pipeline.scheduler = split.scheduler = scheduler
    split.set_progress_bar_config(disable=True)
    expected = generate(pipeline)
    for denoiser in denoisers:
        denoiser.calls.clear()
    torch.testing.assert_close(generate(split), expected, atol=0.01, rtol=0)
    assert [len(denoiser.calls) for denoiser in denoisers] == split.steps_per_denoiser(30)
    edge = split.intervals().edges[1]
    assert min(denoisers[1].calls[:-1]) >= edge - 1  # the timestep itself may be rounded
    assert denoisers[0].calls[0] <= edge and max(denoisers[0].calls) <= edge


def test_the_split_is_that_of_the_noise_schedule_of_training():
    trained = DDPMScheduler()
    pipeline = SNRSplitPipeline([ExactDenoiser(), ExactDenoiser()], trained, [0.25])
    edges = pipeline.intervals().edges
    pipeline.scheduler = HeunDiscreteScheduler.from_config(trained.config)
    assert pipeline.intervals().edges == edges


FLOW_RIGHT = [name for name in CLASSES if words(name)[2].startswith("right")]
GUIDED = {name: {"use_karras_sigmas": True} if takes(name, "use_karras_sigmas") else {} for name in RIGHT}


@pytest.mark.slow
@pytest.mark.parametrize("beta_schedule", ["linear", COSINE])
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_of_every_scheduler(name, beta_schedule):
    denoiser = ExactDenoiser(beta_schedule, distilled=name in DISTILLED)
    assert measure_guided(CLASSES[name], denoiser, **GUIDED[name]) == "right"


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOW_RIGHT)
def test_guidance_of_every_flow_matching_scheduler(name):
    denoiser = ExactDenoiser(prediction_type="flow_prediction", distilled=name in DISTILLED)
    shift = "flow_shift" if takes(name, "flow_shift") else "shift"
    settings = flow_settings(CLASSES[name]) | ({shift: 3.0} if takes(name, shift) else {})
    assert measure_guided(CLASSES[name], denoiser, **settings) == "right"


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_guidance_with_karras_sigmas_on_a_cosine_schedule(name):
    assert measure_guided(CLASSES[name], ExactDenoiser(COSINE), use_karras_sigmas=True) == "right"


def test_guidance_of_a_solver_that_begins_later(recwarn):
    """A callback sees the scheduler that makes the steps, and changes its guidance; the experts' noise levels are the same."""
    pipeline = pipeline_of(ExactDenoiser(COSINE))
    experts = linear_experts()
    experts.register_to_config(noise_schedule={"num_train_timesteps": 1000, "beta_schedule": COSINE})
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    own = pipeline.scheduler = GuidedScheduler(scheduler, experts, ClassTarget(0), scale=5.0)
    seen = []

    def stop_guiding(pipe, step, timestep, tensors):
        seen.append((pipe.scheduler.step_index, float(pipe.scheduler.timesteps[step] - timestep), own.scale))
        pipe.scheduler.scale = 0.0
        return {}

    pipeline(num_inference_steps=3, output_type="latent", callback_on_step_end=stop_guiding)
    assert seen == [(1, 0.0, 5.0), (2, 0.0, 0.0), (3, 0.0, 0.0)]
    assert pipeline.scheduler is own
    assert not [each for each in recwarn if "noise levels" in str(each.message)]


def test_guidance_clips_only_where_the_scheduler_does():
    """`from_config` keeps `clip_sample` in the configuration of schedulers that do not clip."""
    pipeline = pipeline_of(ExactDenoiser())
    clipping = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=True, clip_sample_range=0.2)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(clipping.config)
    assert pipeline.scheduler.config.clip_sample
    without = generate(pipeline)
    pipeline.scheduler = GuidedScheduler(pipeline.scheduler, linear_experts(), ClassTarget(0), scale=0.0)
    torch.testing.assert_close(generate(pipeline), without, atol=1e-3, rtol=1e-3)


def test_predictions_convert_exactly():
    """The denoiser of these tests says the same in all three ways."""
    x_t, timestep = torch.randn(2, 3, 8, 8), torch.tensor([700, 700])
    outputs = {kind: ExactDenoiser(COSINE, kind, error=0)(x_t, timestep).sample for kind in PREDICTION_TYPES}
    alpha, sigma = (ExactDenoiser(COSINE).angles[700].cos(), ExactDenoiser(COSINE).angles[700].sin())
    for kind in PREDICTION_TYPES:
        converted = convert_prediction(outputs[kind], x_t, alpha, sigma, kind, "sample")
        torch.testing.assert_close(converted.float(), outputs["sample"], atol=1e-5, rtol=1e-4)
