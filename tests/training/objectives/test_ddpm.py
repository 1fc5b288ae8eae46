"""Losses, weightings and schedules, against the published implementations."""

import pytest
import torch
from conftest import Vectors, assert_matches
from diffusers import DDPMScheduler

from diffusers_dmp import NoiseIntervals
from diffusers_dmp.training.objectives.ddpm import DiffusionObjective
from diffusers_dmp.training.objectives.objective import NoisedBatch
from diffusers_dmp.training.objectives.timesteps import evenly_spread

SCHEDULES = {
    "linear": {"beta_schedule": "linear"},
    "linear0.025": {"beta_schedule": "linear", "beta_end": 0.025},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return Vectors("diffusion")


def scheduler(schedule: str, **config) -> DDPMScheduler:
    return DDPMScheduler(**SCHEDULES[schedule], **config)


def noised(vectors: Vectors, group: str = "loss") -> NoisedBatch:
    """The published batch of a group of vectors."""
    return NoisedBatch(vectors[f"{group}.x0"], vectors[f"{group}.noise"], vectors[f"{group}.t"])


def both_losses(
    objective: DiffusionObjective, model_output: torch.Tensor, batch: NoisedBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted squared error and the variational bound of each sample."""
    prediction, variance_output = model_output.chunk(2, dim=1)
    bound = objective.variational_bound(prediction, variance_output, batch)
    return objective.weighted_squared_error(prediction, batch), bound


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusers_schedules_are_the_published_ones(vectors, schedule):
    torch.testing.assert_close(
        scheduler(schedule).betas.double(), vectors[f"schedule.{schedule}.betas"], atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weighting, published", [("min_snr_5", "min_snr_5_epsilon"), ("p2_1_1", "p2_gamma1_k1")])
def test_weights_match(vectors, schedule, weighting, published):
    weights = DiffusionObjective(scheduler(schedule), weighting).weights  # as the loss uses them
    torch.testing.assert_close(weights.double(), vectors[f"weights.{schedule}.{published}"], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["constant", "min_snr_5"])
def test_loss_and_variational_bound_match(vectors, schedule, weighting):
    objective = DiffusionObjective(scheduler(schedule), weighting, "learned_range")
    output = objective(vectors["loss.model_output"], noised(vectors))
    error, bound = both_losses(objective, vectors["loss.model_output"], noised(vectors))
    assert_matches(error, vectors[f"loss.dtr.{schedule}.{weighting}.mse"])
    assert_matches(bound, vectors[f"loss.dtr.{schedule}.{weighting}.vb"])
    assert_matches(output.sample_losses, vectors[f"loss.dtr.{schedule}.{weighting}.loss"])
    assert_matches(output.loss, vectors[f"loss.dtr.{schedule}.{weighting}.loss"].mean())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noised_samples_match(vectors, schedule):
    objective = DiffusionObjective(scheduler(schedule))
    x_t = objective.add_noise(vectors["loss.x0"], vectors["loss.noise"], vectors["loss.t"])
    assert_matches(x_t, vectors[f"loss.xt.{schedule}"])


@pytest.mark.parametrize("weighting", ["snr", "snr+1", "sqrt_snr", "truncated_snr", "p2"])
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_x0_weighted_losses_match_for_every_prediction_type(vectors, prediction_type, weighting):
    objective = DiffusionObjective(
        scheduler("linear", prediction_type=prediction_type), weighting, "learned_range_sigmoid"
    )
    model_output, batch = vectors["patchloss.model_output"], noised(vectors, "patchloss")
    error, bound = both_losses(objective, model_output, batch)
    losses = objective(model_output, batch).sample_losses
    for name, value in {"mse": error, "vb": bound, "loss": losses}.items():
        assert_matches(value, vectors[f"patchloss.{prediction_type}.{weighting}.{name}"])


def test_min_snr_is_one_loss_whatever_is_predicted(vectors):
    x0, noise, timesteps = vectors["loss.x0"], vectors["loss.noise"], vectors["loss.t"][2:]
    x0, noise = x0[2:], noise[2:]
    losses = []
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        objective = DiffusionObjective(scheduler("linear", prediction_type=prediction_type), "min_snr_5")
        alpha, sigma = objective.alpha[timesteps, None, None, None], objective.sigma[timesteps, None, None, None]
        x_t, x0_hat = alpha * x0 + sigma * noise, 0.9 * x0
        noise_hat = (x_t - alpha * x0_hat) / sigma
        prediction = {"epsilon": noise_hat, "sample": x0_hat, "v_prediction": alpha * noise_hat - sigma * x0_hat}
        losses.append(objective(prediction[prediction_type], NoisedBatch(x0, noise, timesteps)).sample_losses)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(losses[2], losses[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("variance_type, system", [("learned_range", "adm"), ("learned_range_sigmoid", "patch")])
def test_both_conventions_of_the_learned_variance_match(vectors, variance_type, system):
    objective = DiffusionObjective(scheduler("linear", prediction_type="sample"), variance_type=variance_type)
    timesteps = torch.tensor([400, 10])
    prediction, variance_output = vectors[f"ddpm.{system}.model_output"].chunk(2, dim=1)
    mean = objective.posterior_mean(prediction.clamp(-1, 1), vectors[f"ddpm.{system}.x"], timesteps)
    assert_matches(mean, vectors[f"ddpm.{system}.mean"])
    assert_matches(objective.log_variance(variance_output, timesteps), vectors[f"ddpm.{system}.log_variance"])


def test_the_bound_trains_the_variance_alone(vectors):
    model_output = vectors["loss.model_output"].clone().requires_grad_()
    objective = DiffusionObjective(scheduler("linear"), variance_type="learned_range")
    _, bound = both_losses(objective, model_output, noised(vectors))
    bound.sum().backward()
    mean_gradient, variance_gradient = model_output.grad.chunk(2, dim=1)
    assert (mean_gradient == 0).all()
    assert (variance_gradient[1:] != 0).any()


def test_uncertainty_weighting_matches(vectors):
    objective = DiffusionObjective(scheduler("cosine"), "uw", "learned_range")
    objective.uncertainty.log_variances.data = vectors["loss.uw.log_variances"]
    arguments = [vectors["loss.model_output"], vectors["loss.x0"], vectors["loss.noise"], vectors["loss.uw.t"]]
    loss = objective(arguments[0], NoisedBatch(*arguments[1:])).loss
    assert_matches(loss, vectors["loss.uw.loss"].squeeze())

    # the order within the batch does not matter
    order = torch.randperm(16)
    model_output, *shuffled = [argument[order] for argument in arguments]
    assert_matches(objective(model_output, NoisedBatch(*shuffled)).loss, vectors["loss.uw.loss"].squeeze())


def test_uncertainty_weighting_learns_its_variances():
    # ∂L/∂s = ½·(1 - exp(-s)·l) is 0 at s = log l
    objective = DiffusionObjective(scheduler("cosine"), "uw")
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    timesteps = torch.arange(8) * 125
    losses = torch.linspace(1, 8, 8) * objective.train_intervals.num_experts
    for _ in range(200):
        optimizer.zero_grad()
        objective.uncertainty(losses, timesteps).backward()
        optimizer.step()
    torch.testing.assert_close(
        objective.uncertainty.log_variances.exp(), torch.linspace(1, 8, 8), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("num_clusters", [1, 4, 8])
def test_a_batch_is_spread_evenly_over_the_clusters(num_clusters):
    intervals = NoiseIntervals.uniform(num_clusters)
    timesteps = intervals.sample(evenly_spread(num_clusters, 32), 32, torch.Generator().manual_seed(0))
    for part in (timesteps, timesteps[:8], timesteps[8:16]):  # each process's slice, too
        assert (intervals.index(part).bincount(minlength=num_clusters) == len(part) / num_clusters).all()


def test_refuses_a_batch_that_is_not_divisible_by_the_clusters():
    with pytest.raises(ValueError, match="batch_size.*8 timestep clusters.*12"):
        evenly_spread(8, 12)


@pytest.mark.parametrize(
    "weighting", ["min_snr", "p2_1", "snr_5", "min_snr_five", "min_snr_-5", "p2_0_1", "", "constant_1"]
)
def test_unknown_weighting_lists_the_known_ones(weighting):
    with pytest.raises(ValueError, match="constant.*p2_<gamma>_<k>.*min_snr_<gamma>.*truncated_snr"):
        DiffusionObjective(scheduler("linear"), weighting)


def test_refuses_what_it_does_not_know(vectors):
    with pytest.raises(ValueError, match="prediction_type.*epsilon, sample, v_prediction"):
        DiffusionObjective(DDPMScheduler.from_config(scheduler("linear").config, prediction_type="flow"))
    with pytest.raises(ValueError, match="variance_type.*learned_range_sigmoid.*'learned'"):
        DiffusionObjective(scheduler("linear"), variance_type="learned")
    with pytest.raises(ValueError, match="model_output.*4 channels.*8"):
        objective = DiffusionObjective(scheduler("linear"))
        objective(vectors["loss.model_output"], noised(vectors))


def test_refuses_a_weight_that_is_infinite_at_the_last_timestep():
    zero_snr = scheduler("linear", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="sqrt_snr.*where the SNR is 0"):
        DiffusionObjective(zero_snr, "sqrt_snr")
