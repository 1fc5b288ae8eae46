"""Flow matching: its noise, target, weights and timesteps, and trainings of this package's models with it."""

import dataclasses

import pytest
import torch
from conftest import TINY_CONFIG, randomised
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from diffusers_dmp import DiTModel, DTRTransformer2DModel, NoiseIntervals, RemixDiTModel
from diffusers_dmp.diffusion.noise import flow_signal_to_noise_ratio
from diffusers_dmp.diffusion.predictions import PREDICTION_TYPES
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.objectives.ddpm import DiffusionObjective
from diffusers_dmp.training.objectives.densities import NoiseDensity
from diffusers_dmp.training.objectives.flow import FlowObjective
from diffusers_dmp.training.objectives.from_arguments import make_flow_objective, make_objective
from diffusers_dmp.training.objectives.objective import NoisedBatch
from diffusers_dmp.training.objectives.shifts import ResolutionShift
from diffusers_dmp.training.objectives.timesteps import StepExperts
from diffusers_dmp.training.objectives.weighting import WEIGHTINGS, loss_weighting

SCHEDULER = FlowMatchEulerDiscreteScheduler()
SHAPES = [(4,), (3, 8, 8), (2, 5, 4, 6)]  # latents of words, images and videos
NAMES = [name.replace("<gamma>", "5").replace("<k>", "1") for name in WEIGHTINGS]
# the weights of the velocity's squared error, in closed form
FLOW_WEIGHTS = {
    "constant": lambda s: torch.ones_like(s),
    "uw": lambda s: torch.ones_like(s),
    "p2_5_1": lambda s: (s**2 / ((1 - s) ** 2 + s**2)) ** 5,
    "min_snr_5": lambda s: torch.minimum((1 - s) ** 2, 5 * s**2),
    "snr": lambda s: (1 - s) ** 2,
    "snr+1": lambda s: (1 - s) ** 2 + s**2,
    "sqrt_snr": lambda s: s * (1 - s),
    "truncated_snr": lambda s: torch.maximum((1 - s) ** 2, s**2),
    "p2": lambda s: (1 - s) ** 2 * s / ((1 - s) ** 2 + s**2).sqrt(),
    "sigma_sqrt": lambda s: compute_loss_weighting_for_sd3("sigma_sqrt", s),
    "cosmap": lambda s: compute_loss_weighting_for_sd3("cosmap", s),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(objective: FlowObjective, shape: tuple[int, ...], batch_size: int = 16) -> NoisedBatch:
    timesteps = objective.sample_timesteps(batch_size, generator(), sample_shape=shape)
    x0, noise = (torch.randn(batch_size, *shape, generator=generator(seed)) for seed in (1, 2))
    return NoisedBatch(x0, noise, timesteps)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_and_target(shape):
    objective = FlowObjective(SCHEDULER)
    batch = batch_of(objective, shape)
    x_t = objective.add_noise(batch.x0, batch.noise, batch.timesteps)
    for sample in range(16):
        sigma = batch.timesteps[sample] / 1000
        torch.testing.assert_close(x_t[sample], (1 - sigma) * batch.x0[sample] + sigma * batch.noise[sample])
    torch.testing.assert_close(x_t, noised_by_the_scheduler(batch), atol=1e-4, rtol=1e-4)
    assert objective(batch.noise - batch.x0, batch).loss == 0
    output = objective(torch.zeros_like(batch.x0).bfloat16(), batch)  # as mixed precision has it
    assert output.sample_losses.dtype == torch.float32
    torch.testing.assert_close(output.sample_losses, ((batch.noise - batch.x0) ** 2).flatten(1).mean(1))


def noised_by_the_scheduler(batch: NoisedBatch) -> torch.Tensor:
    """What Diffusers' own scheduler makes of a batch, whose timesteps it is told first."""
    order = batch.timesteps.argsort(descending=True)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=(batch.timesteps[order].double() / 1000).tolist())
    return scheduler.scale_noise(batch.x0[order], scheduler.timesteps, batch.noise[order])[order.argsort()]


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_closed_form(name):
    objective = FlowObjective(SCHEDULER, weighting=name)
    timesteps = torch.linspace(1, 1000, 500)
    torch.testing.assert_close(
        objective.weights(timesteps), FLOW_WEIGHTS[name](timesteps / 1000), atol=1e-5, rtol=1e-4
    )
    ends = objective.weights(torch.tensor([0.0, 0.5, 1.0]))  # the limit, and without one Diffusers' last
    assert ends.isfinite().all() and (ends == ends[0]).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("constant", "uw", "p2_5_1")])
def test_a_weighting_on_x0_is_one_loss_whatever_is_predicted(name):
    """At equal signal-to-noise ratio, the velocity of flow matching included."""
    sigma = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    snr = flow_signal_to_noise_ratio(sigma)
    alphas_cumprod = snr / (1 + snr)
    error = 0.3  # of x̂0; then the errors of the other predictions are
    errors = {
        "sample": torch.full_like(sigma, error),
        "epsilon": error * (alphas_cumprod / (1 - alphas_cumprod)).sqrt(),
        "v_prediction": error / (1 - alphas_cumprod).sqrt(),
        "flow_prediction": error / sigma,
    }
    losses = [loss_weighting(name, kind)(snr) * errors[kind] ** 2 for kind in (*PREDICTION_TYPES, "flow_prediction")]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_ddpm_and_flow_have_one_table():
    """The table of a DDPM schedule is the function of its ratios."""
    objective = DiffusionObjective(DDPMScheduler(), "min_snr_5")
    alphas_cumprod = DDPMScheduler().alphas_cumprod.double()
    expected = loss_weighting("min_snr_5", "epsilon")(alphas_cumprod / (1 - alphas_cumprod))
    torch.testing.assert_close(objective.weights, expected.float(), rtol=1e-3, atol=0)


def test_uncertainty_weighting_has_equally_many_samples_of_each_cluster():
    objective = FlowObjective(SCHEDULER, NoiseDensity(name="logit_normal"), weighting="uw")
    timesteps = objective.sample_timesteps(32, generator())
    for part in (timesteps, timesteps[:8]):
        assert (objective.train_intervals.index(part).bincount() == len(part) / 8).all()
    batch = NoisedBatch(torch.zeros(32, 4), torch.ones(32, 4), timesteps)
    objective(torch.zeros(32, 4), batch).loss.backward()
    assert (objective.uncertainty.log_variances.grad != 0).all()
    with pytest.raises(ValueError, match="`batch_size` to be divisible by the 8 timestep clusters, but got 12"):
        objective.sample_timesteps(12, generator())


@pytest.mark.parametrize("owners", [[2, 0], [0, 1, 2, 0, 1, 2, 0, 1]])
@pytest.mark.parametrize("flow", [True, False])
def test_samples_of_a_process_or_of_their_own_belong_to_their_experts(owners, flow):
    objective = FlowObjective(SCHEDULER) if flow else DiffusionObjective(DDPMScheduler())
    intervals = NoiseIntervals.uniform(3)
    timesteps = objective.sample_timesteps(8, generator(), StepExperts(intervals, owners))
    expected = torch.tensor(owners).repeat_interleave(8 // len(owners))
    assert torch.equal(intervals.index(timesteps), expected)


def test_timesteps_are_spread_evenly_between_edges():
    objective = FlowObjective(SCHEDULER)
    timesteps = objective.evenly_spaced_timesteps(4, 200.0, 1000.0)
    assert timesteps.tolist() == [300, 500, 700, 900]
    many = objective.evenly_spaced_timesteps(1_000_000, 200.0, 300.5)
    assert many.min() > 200.004 and many.max() < 300.496 and (many.diff() >= 0).all()


def test_a_shift_by_resolution_shifts_each_shape():
    shift = ResolutionShift(patch_size=2)
    objective = FlowObjective(SCHEDULER, NoiseDensity(name="logit_normal"), shift)
    medians = [objective.sample_timesteps(2000, generator(), None, (4, size, size)).median() for size in (32, 128)]
    expected = [1000 * each / (1 + each) for each in (shift((4, 32, 32)), shift((4, 128, 128)))]  # of σ = ½
    assert medians == pytest.approx(expected, abs=20) and expected[1] - expected[0] > 100
    with pytest.raises(ValueError, match="`sample_shape` for a shift by resolution"):
        objective.sample_timesteps(2, generator())


def test_experts_are_checked_before_the_first_step():
    objective = FlowObjective(SCHEDULER, NoiseDensity(name="logit_normal"))
    rare, none = NoiseIntervals.from_sigmas([0.99]), NoiseIntervals.from_sigmas([0.9999])
    objective.check_experts(rare, [0, 1])
    with pytest.raises(ValueError, match="got 2.16e-06 for expert 1"):
        objective.check_experts(rare, [0, 1], by_density=True)
    objective.check_experts(none, [0])  # the other one is not trained
    with pytest.raises(ValueError, match="got 0 for expert 1"):
        objective.check_experts(none, [1])
    shifted = FlowObjective(SCHEDULER, NoiseDensity(name="logit_normal"), ResolutionShift(base_shift=0, max_shift=3))
    with pytest.raises(ValueError, match="got 2.16e-06 for expert 1"):  # of small images
        shifted.check_experts(rare, [0, 1], by_density=True)
    with pytest.raises(ValueError, match=r"a whole timestep, but got \[500.25, 500.75\) for expert 1"):
        DiffusionObjective(DDPMScheduler()).check_experts(NoiseIntervals.from_timesteps([500.25, 500.75]), [0, 1])


def test_refuses_what_is_no_flow_matching():
    with pytest.raises(ValueError, match="flow-matching `scheduler`.*DDPMScheduler"):
        FlowObjective(DDPMScheduler())
    objective = FlowObjective(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match=r"the samples' shape \(16, 3, 8, 8\), but got \(16, 6, 8, 8\).*no variance"):
        objective(torch.zeros(16, 6, 8, 8), batch_of(objective, (3, 8, 8)))
    with pytest.raises(ValueError, match="constant.*sigma_sqrt.*'snr_flow'"):
        FlowObjective(SCHEDULER, weighting="snr_flow")


@pytest.mark.parametrize("model_class", [DiTModel, DTRTransformer2DModel, RemixDiTModel])
def test_a_step_of_gradient_descent_lowers_the_loss(model_class):
    config = TINY_CONFIG | {"out_channels": 4, "num_layers": 2}
    model = randomised(model_class(**config)).requires_grad_()
    args = TrainingArguments(objective="flow", density="mode", shift="2")
    objective = make_objective(args, model, in_latents=True)
    assert isinstance(objective, FlowObjective) and objective.noising.density == NoiseDensity(name="mode", shift=2.0)
    batch = batch_of(objective, (4, 8, 8))
    labels = torch.arange(16) % 10

    def loss() -> torch.Tensor:
        x_t = objective.add_noise(batch.x0, batch.noise, batch.timesteps)
        return objective(model(x_t, batch.timesteps, class_labels=labels).sample, batch).loss

    before = loss()
    before.backward()
    squared_norm = sum(
        float((parameter.grad**2).sum()) for parameter in model.parameters() if parameter.grad is not None
    )
    rate = 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    # to first order the loss falls by rate·|gradient|²
    assert before.item() - loss().item() == pytest.approx(rate * squared_norm, rel=0.2)


def test_the_objective_decides_the_defaults():
    ddpm, flow = TrainingArguments(), TrainingArguments(objective="flow", shift=3.0)
    assert (ddpm.prediction_type, ddpm.learn_sigma) == ("epsilon", True)
    assert (flow.prediction_type, flow.learn_sigma, flow.shift) == ("flow_prediction", False, "3.0")
    assert dataclasses.replace(flow) == flow
    model = DiTModel(**TINY_CONFIG)
    scheduler = make_objective(flow, model, in_latents=True).scheduler
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler and scheduler.config.shift == 3.0
    by_resolution = make_objective(TrainingArguments(objective="flow", shift="resolution"), model, in_latents=True)
    shift = by_resolution.noising.density_for((4, 8, 8)).shift
    assert shift == by_resolution.scheduler.config.shift == ResolutionShift()((4, 8, 8))


def test_the_shift_is_by_default_the_schedulers():
    args = TrainingArguments(objective="flow")
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    assert make_flow_objective(args, unipc, 2).noising.density.shift == 5.0
    assert make_flow_objective(args, FlowMatchEulerDiscreteScheduler(shift=3.0), 2).noising.density.shift == 3.0
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9)
    assert make_flow_objective(args, dynamic, 2).noising.resolution_shift == ResolutionShift(max_shift=0.9)
    fixed = TrainingArguments(objective="flow", shift="1")
    assert make_flow_objective(fixed, dynamic, 2).noising.density_for().shift == 1.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"objective": "rectified"}, "`objective` to be one of ddpm, flow, but got 'rectified'"),
        ({"objective": "flow", "learn_sigma": True}, "`learn_sigma` to be false for flow matching"),
        ({"objective": "flow", "prediction_type": "epsilon"}, "`prediction_type` to be flow_prediction.*'epsilon'"),
        ({"objective": "flow", "density": "sigmoid"}, "`density` to be one of uniform, logit_normal"),
        ({"objective": "flow", "shift": "auto"}, "`shift` to be a positive number or 'resolution', but got 'auto'"),
        ({"shift": "3"}, "`objective` to be flow where `shift` is set, but got ddpm and '3.0'"),
        ({"density": "uniform"}, "`objective` to be flow where `density` is set"),
    ],
)
def test_refuses_arguments_of_another_objective(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**arguments)
