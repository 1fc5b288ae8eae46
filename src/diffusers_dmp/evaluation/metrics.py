"""Metrics of generated images against real images, computed from features of a vision network.

FID: https://arxiv.org/abs/1706.08500, KID: https://arxiv.org/abs/1801.01401, Inception Score: https://arxiv.org/abs/1606.03498,
improved precision and recall: https://arxiv.org/abs/1904.06991.

Legend: N images, D features, K classes.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

BLOCK = 4096  # rows of features that are converted to float64 at a time
DISTANCES = 2**25  # how many distances are in memory at a time
NEIGHBOURS = 3  # k of precision and recall
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SPLITS = 10  # parts of the images for the Inception Score


class IdentityFeatures(nn.Module):
    """Return features unchanged: torchmetrics asks for a network, but the features are computed before."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@dataclass(frozen=True)
class GaussianStatistics:
    """
    Mean and covariance of features, from which FID is computed.

    Args:
        mean (`torch.Tensor` of shape (D,)): In float64.
        covariance (`torch.Tensor` of shape (D, D)): In float64, divided by N - 1.
        count (`int`, *optional*): N, the number of images, or None if it is unknown.

    Raises:
        ValueError: if the shapes do not match or numbers are not finite.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None

    def __post_init__(self):
        dim = len(self.mean)
        if self.mean.shape != (dim,) or self.covariance.shape != (dim, dim):
            raise ValueError(
                f"Expected a mean of D features and a covariance of (D, D), but got the shapes {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}."
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("Expected a mean and a covariance that are finite, but got some numbers that are not.")

    @classmethod
    def of(cls, features: torch.Tensor) -> "GaussianStatistics":
        """
        Compute the statistics of features.

        Args:
            features (`torch.Tensor` of shape (N, D)): At least two rows.

        Raises:
            ValueError: see [`check_features`]; or if there is only one row.
        """
        check_features(features, "features")
        if len(features) < 2:
            raise ValueError(f"Expected at least 2 images for a covariance, but got {len(features)}.")
        mean = features.mean(0, dtype=torch.float64)
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for rows in features.split(BLOCK):
            centred = rows.double() - mean
            covariance += centred.T @ centred
        return cls(mean, covariance / (len(features) - 1), len(features))


def frechet_distance(generated: GaussianStatistics, real: GaussianStatistics) -> float:
    """
    Compute FID = ‖μ - μ'‖² + tr(Σ + Σ' - 2·(Σ·Σ')^½), in float64.

    Args:
        generated, real ([`GaussianStatistics`]): Of the same number of features.

    Raises:
        ValueError: if their numbers of features differ.
    """
    _check_same_features(len(generated.mean), len(real.mean))
    # tr (Σ·Σ')^½ is the sum of the roots of the eigenvalues of Σ·Σ', which are real and, up to rounding, not negative
    eigenvalues = torch.linalg.eigvals(generated.covariance @ real.covariance).real.clamp(min=0)
    traces = generated.covariance.trace() + real.covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return float((generated.mean - real.mean).square().sum() + traces)


def kernel_distance(generated: torch.Tensor, real: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """
    Compute KID, the unbiased squared maximum mean discrepancy under the kernel (x·y/D + 1)³, over random subsets.

    Args:
        generated, real (`torch.Tensor` of shape (N, D) and (N', D)): Features.
        seed (`int`): Seed of the random subsets; the global random state is not changed.

    Returns:
        Mean and standard deviation over 100 subsets of 1,000 images, or of all images if there are fewer.

    Raises:
        ValueError: see [`check_features`]; or if there are fewer than two images or the numbers of features differ.
    """
    for name, features in (("generated", generated), ("real", real)):
        check_features(features, name)
        if len(features) < 2:
            raise ValueError(f"Expected at least 2 {name} images to compare, but got {len(features)}.")
    _check_same_features(generated.shape[1], real.shape[1])
    subset_size = min(KID_SUBSET_SIZE, len(generated), len(real))
    with warnings.catch_warnings(
        action="ignore"
    ):  # torchmetrics warns that it stores all features, which are in memory anyway
        metric = KernelInceptionDistance(IdentityFeatures(real.shape[1]), subsets=KID_SUBSETS, subset_size=subset_size)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics uses the global random generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def inception_score(logits: torch.Tensor) -> tuple[float, float]:
    """
    Compute the Inception Score, exp(E[KL(p(y|x) ‖ p(y))]).

    Args:
        logits (`torch.Tensor` of shape (N, K)): A classifier's output for generated images.

    Returns:
        Mean and standard deviation over ten splits of the shuffled images.

    Raises:
        ValueError: see [`check_features`]; or if there are fewer images than splits.
    """
    check_features(logits, "logits")
    if len(logits) < SPLITS:
        raise ValueError(f"Expected at least {SPLITS} images, one for each split, but got {len(logits)}.")
    with warnings.catch_warnings(action="ignore"):  # the same warning as for KID
        metric = InceptionScore(IdentityFeatures(logits.shape[1]), splits=SPLITS)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_and_recall(generated: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """
    Compute improved precision and recall with k = 3 neighbours.

    Around each real image lies a ball whose radius is the distance to its third nearest real neighbour. Precision is the share
    of generated images that lie in at least one of these balls. Recall is the same with real and generated images exchanged.

    Args:
        generated, real (`torch.Tensor` of shape (N, D) and (N', D)): Features.

    Returns:
        Precision and recall.

    Raises:
        ValueError: see [`check_features`]; or if there are not more than three images or the numbers of features differ.
    """
    for name, features in (("generated", generated), ("real", real)):
        check_features(features, name)
        if len(features) <= NEIGHBOURS:
            raise ValueError(
                f"Expected more than {NEIGHBOURS} {name} images, for as many neighbours, but got {len(features)}."
            )
    _check_same_features(generated.shape[1], real.shape[1])
    generated, real = generated.double(), real.double()
    return _share_within(generated, real), _share_within(real, generated)


def _share_within(queries: torch.Tensor, support: torch.Tensor) -> float:
    """Return the share of queries that lie within at least one support point's distance to its k-th nearest neighbour."""
    norms = support.square().sum(1)
    block = max(1, DISTANCES // len(support))
    # k + 1, because the nearest neighbour of an image is the image itself
    radii = torch.cat(
        [_squared_distances(rows, support, norms).kthvalue(NEIGHBOURS + 1).values for rows in support.split(block)]
    )
    within = [(_squared_distances(rows, support, norms) <= radii).any(1) for rows in queries.split(block)]
    return float(torch.cat(within).double().mean())


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """‖x - y‖² = ‖x‖² + ‖y‖² - 2·x·y: (n, D), (m, D) → (n, m). `norms` (m,) are ‖y‖². Needs float64 against cancellation."""
    return torch.addmm(rows.square().sum(1, keepdim=True) + norms, rows, columns.T, alpha=-2).clamp_(min=0)


def _check_same_features(generated: int, real: int) -> None:
    if generated != real:
        raise ValueError(
            f"Expected generated and real images to have as many features, but got {generated} and {real}."
        )


def check_features(features: torch.Tensor, name: str) -> None:
    """
    Check features before a metric is computed from them.

    Args:
        features (`torch.Tensor` of shape (N, D)): The features or logits.
        name (`str`): What the error calls them.

    Raises:
        ValueError: if the shape is not (N, D), if numbers are not finite, or if all images have the same features.
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"Expected `{name}` to have the shape (N, D), but got {tuple(features.shape)}.")
    if not features.isfinite().all():
        raise ValueError(
            f"Expected `{name}` to be finite, but got {int((~features.isfinite()).sum())} numbers that are not."
        )
    if len(features) > 1 and (features == features[0]).all():
        raise ValueError(f"Expected `{name}` to differ between images, but got {len(features)} times the same.")
