"""Loss weightings: the weight of each noise level's error, by name, as a function of its signal-to-noise ratio.

Legend: T training timesteps, E clusters, B batch; SNR = ᾱ_t / (1 - ᾱ_t), or ((1 - σ) / σ)² for flow matching.

| name | weight | on | source |
| --- | --- | --- | --- |
| `constant` | 1 | prediction | https://arxiv.org/abs/2006.11239 |
| `p2_<γ>_<k>` | (k + SNR)^-γ | prediction | P2, https://arxiv.org/abs/2204.00227 |
| `min_snr_<γ>` | min(SNR, γ) | x0 | Min-SNR, https://arxiv.org/abs/2303.09556 |
| `snr`, `snr+1`, `sqrt_snr` | SNR, SNR + 1, √SNR | x0 | Patch Diffusion, https://arxiv.org/abs/2207.04316 |
| `truncated_snr`, `p2` | max(SNR, 1), SNR·√(1 - ᾱ) | x0 | Patch Diffusion |
| `sigma_sqrt` | σ^-2, σ = 1 / (1 + √SNR) | flow velocity | SD3 in Diffusers, https://arxiv.org/abs/2403.03206 |
| `cosmap` | 2 / (π·(1 - 2σ + 2σ²)) | flow velocity | SD3, equation 21, in Diffusers |
| `uw` | learned, see [`UncertaintyWeighting`] | prediction | ANT, https://arxiv.org/abs/2306.00354 |
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...diffusion.noise import signal_to_noise_ratio
from ...intervals import NoiseIntervals

_ON_PREDICTION: dict[str, Callable[..., torch.Tensor]] = {
    "constant": lambda snr: torch.ones_like(snr),
    "uw": lambda snr: torch.ones_like(snr),
    "p2_<gamma>_<k>": lambda snr, gamma, k: (k + snr) ** -gamma,
}
_ON_X0: dict[str, Callable[..., torch.Tensor]] = {
    "min_snr_<gamma>": lambda snr, gamma: snr.clamp(max=gamma),
    "snr": lambda snr: snr,
    "snr+1": lambda snr: snr + 1,
    "sqrt_snr": lambda snr: snr.sqrt(),
    "truncated_snr": lambda snr: snr.clamp(min=1),
    "p2": lambda snr: snr * (1 + snr) ** -0.5,  # 1 - ᾱ = 1 / (1 + SNR)
    # those on the velocity of flow matching, whose squared error is (1 + √SNR)² times that of x0
    "sigma_sqrt": lambda snr: (1 + snr.sqrt()) ** 4,
    "cosmap": lambda snr: 2 / math.pi * (1 + snr.sqrt()) ** 4 / (1 + snr),  # 1 - 2σ + 2σ² = (1 + SNR) / (1 + √SNR)²
}
WEIGHTINGS = tuple(_ON_PREDICTION | _ON_X0)

# |x0 - x̂0|² as a multiple of the squared error of what the model predicts
_X0_ERROR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sample": lambda snr: torch.ones_like(snr),
    "epsilon": lambda snr: 1 / snr,  # x̂0 = (x_t - √(1-ᾱ)·ε̂) / √ᾱ
    "v_prediction": lambda snr: 1 / (snr + 1),  # x̂0 = √ᾱ·x_t - √(1-ᾱ)·v̂
    "flow_prediction": lambda snr: (1 + snr.sqrt()) ** -2,  # x̂0 = x_t - σ·v̂
}


def loss_weights(name: str, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon") -> torch.Tensor:
    """
    The weight of each timestep's squared error of what the model predicts.

    Args:
        name (`str`): See the table at the top of this module, e.g. 'min_snr_5' or 'p2_1_1'.
        alphas_cumprod (`torch.Tensor` of shape (T,)): ᾱ of the noise schedule.
        prediction_type (`str`): See [`loss_weighting`].

    Returns:
        `torch.Tensor` of shape (T,), float64.

    Raises:
        ValueError: if the name or prediction type is unknown, or a weight is not finite (as at SNR = 0).
    """
    snr = signal_to_noise_ratio(alphas_cumprod.double())
    weights = loss_weighting(name, prediction_type)(snr)
    if not bool(weights.isfinite().all()):
        raise ValueError(
            f"Expected the weighting {name!r} to be finite at every timestep, but got {weights.tolist()[-1]} at the last, "
            f"where the SNR is {snr.tolist()[-1]}."
        )
    return weights


def loss_weighting(name: str, prediction_type: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The function from signal-to-noise ratios to the weights of the squared error of what the model predicts.

    Args:
        name (`str`): See the table at the top of this module.
        prediction_type (`str`): 'epsilon', 'sample', 'v_prediction' or 'flow_prediction'. The weightings on x0 and on the flow
            velocity give the same loss for all four.

    Raises:
        ValueError: if the name or prediction type is unknown.
    """
    if prediction_type not in _X0_ERROR:
        raise ValueError(
            f"Expected `prediction_type` to be one of {', '.join(_X0_ERROR)}, but got {prediction_type!r}."
        )
    pattern, numbers = _parse(name)
    if pattern in _ON_PREDICTION:
        return lambda snr: _ON_PREDICTION[pattern](snr, *numbers)
    return lambda snr: _ON_X0[pattern](snr, *numbers) * _X0_ERROR[prediction_type](snr)


def _parse(name: str) -> tuple[str, list[float]]:
    """The pattern that a name follows, and its numbers: 'min_snr_5' → ('min_snr_<gamma>', [5.0])."""
    for pattern in WEIGHTINGS:
        stem, *parameters = pattern.split("_<")
        values = name.removeprefix(stem + "_").split("_") if parameters else []
        if name == "_".join([stem, *values]) and len(values) == len(parameters):
            try:
                numbers = [float(value) for value in values]
            except ValueError:
                continue
            if all(0 < number < math.inf for number in numbers):
                return pattern, numbers
    raise ValueError(
        f"Expected `weighting` to be one of {', '.join(WEIGHTINGS)}, of positive numbers, but got {name!r}."
    )


class UncertaintyWeighting(nn.Module):
    """
    Weights clusters of timesteps by learned uncertainty: Σ_i ½·(exp(-s_i)·l_i + s_i)
    (ANT-UW, https://arxiv.org/abs/2306.00354; as in DTR, l_i is the cluster's mean loss divided by E).

    The s_i need an optimiser group of their own, with a learning rate of 0.025 and without decay, and batches that are
    spread evenly over `intervals` ([`evenly_spread`]).

    Args:
        intervals ([`NoiseIntervals`]): The E clusters.
    """

    def __init__(self, intervals: NoiseIntervals):
        super().__init__()
        self.intervals = intervals
        self.log_variances = nn.Parameter(torch.zeros(intervals.num_experts))  # s, (E,)

    def forward(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The total loss of a batch.

        Args:
            losses (`torch.Tensor` of shape (B,)): The loss of each sample.
            timesteps (`torch.Tensor` of shape (B,)): The timestep of each sample; every cluster has some of them.

        Returns:
            `torch.Tensor` of shape (): the total loss.
        """
        cluster_means = torch.zeros_like(self.log_variances).scatter_reduce(
            0, self.intervals.index(timesteps), losses, reduce="mean", include_self=False
        )
        cluster_losses = cluster_means / self.intervals.num_experts  # l, (E,)
        # L = Σ_i ½·(exp(-s_i)·l_i + s_i)
        return 0.5 * (torch.exp(-self.log_variances) * cluster_losses + self.log_variances).sum()
