"""The diagnosis of any denoiser's experts, whose losses are known by construction."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from tiny_pipelines import RECIPES, randn
from torch import nn

from diffusers_dmp import DenoiserExperts, LoraExperts, NoiseIntervals
from diffusers_dmp.evaluation.denoiser_diagnostics import DiagnosisOptions, diagnose_denoiser

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
INTERVALS = NoiseIntervals.from_sigmas([0.25, 0.5])
NUM_SAMPLES = 6


class KnowsInterval(nn.Module):
    """Predicts the velocity -x0 + ε of x0 = 1 exactly between two timesteps, and zero elsewhere."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, hidden_states, timestep, prompt, return_dict=True):
        assert len(prompt) == len(hidden_states) == len(timestep)
        sigma = (timestep / 1000).view(-1, 1, 1)
        noise = (hidden_states - (1 - sigma) * prompt.view(-1, 1, 1)) / sigma
        knows = ((timestep >= self.low) & (timestep < self.high)).view(-1, 1, 1)
        return (knows * (noise - prompt.view(-1, 1, 1)),)


def test_losses_of_known_experts():
    denoisers = [KnowsInterval(0, 500), KnowsInterval(500, 1000)]
    options = DiagnosisOptions(intervals=NoiseIntervals.from_sigmas([0.5]), num_bands=4, batch_size=16)
    x0 = torch.full((40, 25, 8), 2.0)  # packed latents
    diagnosis = diagnose_denoiser(denoisers, x0, {"prompt": torch.full((40,), 2.0)}, FLOW, 20, options)
    bands, swaps = torch.tensor(diagnosis.band_losses), torch.tensor(diagnosis.swap_losses)
    zero = 1 + 2.0**2  # of predicting zero: E(ε - x0)²
    torch.testing.assert_close(bands, torch.tensor([[0, 0, zero, zero], [zero, zero, 0, 0]]), atol=0.2, rtol=0)
    torch.testing.assert_close(swaps, torch.tensor([[0, zero], [zero, 0]]), atol=0.2, rtol=0)
    assert diagnosis.edges == [0, 500, 1000] and diagnosis.bands == [0, 250, 500, 750, 1000]
    assert diagnosis.sampling_steps == [5, 15]


def sd3_batch():
    inputs = {"encoder_hidden_states": randn(NUM_SAMPLES, 7, 32), "pooled_projections": randn(NUM_SAMPLES, 64)}
    return randn(NUM_SAMPLES, 4, 8, 8, seed=5), inputs


def loras(denoiser):
    for name in "ab":
        denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return denoiser


def test_whole_denoisers_as_one_model_and_in_a_list_have_the_same_losses():
    denoisers = [RECIPES["sd3"].denoiser(seed) for seed in range(3)]
    listed = diagnose_denoiser(denoisers, *sd3_batch(), FLOW, options=DiagnosisOptions(intervals=INTERVALS))
    assert diagnose_denoiser(DenoiserExperts(denoisers, INTERVALS), *sd3_batch(), FLOW) == listed
    swaps = torch.tensor(listed.swap_losses)
    assert (swaps - swaps.diagonal()[:, None]).abs().sort().values[:, 1].min() > 1e-4


def test_each_lora_is_measured_where_others_own_the_noise():
    denoiser = loras(RECIPES["sd3"].denoiser())
    alone = []
    for name in (None, "a", "b"):
        denoiser.disable_adapters() if name is None else (denoiser.enable_adapters(), denoiser.set_adapter(name))
        alone.append(diagnose_denoiser(denoiser, *sd3_batch(), FLOW, options=DiagnosisOptions(num_bands=3)))
    LoraExperts([None, "a", "b"], INTERVALS).attach(denoiser)
    diagnosis = diagnose_denoiser(denoiser, *sd3_batch(), FLOW, options=DiagnosisOptions(num_bands=3))
    torch.testing.assert_close(
        torch.tensor(diagnosis.band_losses), torch.tensor([each.band_losses[0] for each in alone])
    )
    swaps = torch.tensor(diagnosis.swap_losses)
    assert swaps.shape == (3, 3) and (swaps.diff(dim=1).abs() > 1e-6).all()


def test_after_a_diagnosis_the_loras_act_in_their_intervals_again():
    denoiser = loras(RECIPES["sd3"].denoiser())
    LoraExperts([None, "a", "b"], INTERVALS).attach(denoiser)
    x0, inputs = sd3_batch()
    time = torch.tensor([100.0, 300.0, 900.0] * 2)
    before = denoiser(hidden_states=x0, timestep=time, **inputs).sample
    diagnose_denoiser(denoiser, x0, inputs, FLOW, options=DiagnosisOptions(num_bands=1))
    assert torch.equal(denoiser(hidden_states=x0, timestep=time, **inputs).sample, before)


@pytest.mark.parametrize("name", ["flux", "wan", "pixart", "sd15", "zimage"])
def test_other_classes_have_the_losses_of_a_hand_written_loop(name):
    denoiser = RECIPES[name].denoiser()
    x0, inputs, scheduler, options = BATCHES[name]()
    diagnosis = diagnose_denoiser(denoiser, x0, inputs, scheduler, options=options)
    # the first of two bands
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for index in range(len(x0)):
        t = (index + 0.5) / len(x0) * 500
        one = {
            key: value[index : index + 1] if key not in ("img_ids", "txt_ids") else value
            for key, value in inputs.items()
        }
        if isinstance(scheduler, DDIMScheduler):
            t = int(t)
            alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        else:
            alpha, sigma = 1 - t / 1000, t / 1000
        x_t = alpha * x0[index] + sigma * noise[index]
        target = noise[index] if isinstance(scheduler, DDIMScheduler) else noise[index] - x0[index]
        with torch.no_grad():
            if name == "zimage":
                output = -denoiser([x_t], torch.tensor([1 - t / 1000]), **one).sample[0]
            else:
                told = torch.tensor([t / 1000 if name == "flux" else t])
                output = denoiser(x_t[None], timestep=told, **one, return_dict=False)[0][0, : len(x0[index])]
        losses.append((output - target).square().mean().item())
    assert diagnosis.band_losses[0][0] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def flux_batch():
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
    prompts = {"encoder_hidden_states": randn(4, 7, 32), "pooled_projections": randn(4, 32)}
    return randn(4, 16, 4, seed=5), prompts | ids, FLOW, DiagnosisOptions(num_bands=2, batch_size=3)


def wan_batch():
    options = DiagnosisOptions(num_bands=2, batch_size=3)
    return randn(4, 16, 3, 2, 2, seed=5), {"encoder_hidden_states": randn(4, 16, 32)}, FLOW, options


def pixart_batch():
    inputs = {"encoder_hidden_states": randn(4, 7, 32)}
    return randn(4, 4, 8, 8, seed=5), inputs, DDIMScheduler(), DiagnosisOptions(num_bands=2)


def sd15_batch():
    inputs = {"encoder_hidden_states": randn(4, 7, 32)}
    return randn(4, 4, 8, 8, seed=5), inputs, DDIMScheduler(), DiagnosisOptions(num_bands=2)


def zimage_batch():
    def predict(denoiser, x_t, time, **inputs):
        return -torch.stack(denoiser(list(x_t), time, **inputs).sample)

    inputs = {"cap_feats": [randn(7, 16, seed=index) for index in range(4)]}
    return randn(4, 16, 1, 4, 4, seed=5), inputs, FLOW, DiagnosisOptions(num_bands=2, batch_size=3, predict=predict)


BATCHES = {"flux": flux_batch, "wan": wan_batch, "pixart": pixart_batch, "sd15": sd15_batch, "zimage": zimage_batch}


def test_what_does_not_fit_is_refused():
    denoisers = [RECIPES["sd3"].denoiser(seed) for seed in range(2)]
    x0, inputs = sd3_batch()
    with pytest.raises(ValueError, match="with one interval for each of 2 denoisers, but got None"):
        diagnose_denoiser(denoisers, x0, inputs, FLOW)
    with pytest.raises(ValueError, match="for a list of denoisers only, but got some for one denoiser"):
        diagnose_denoiser(denoisers[0], x0, inputs, FLOW, options=DiagnosisOptions(intervals=INTERVALS))
    with pytest.raises(
        ValueError, match="other arguments of SD3Transformer2DModel's `forward`.* but got timestep, prompt"
    ):
        diagnose_denoiser(denoisers[0], x0, inputs | {"timestep": 3, "prompt": "a"}, FLOW)
