"""How far generated images are from real ones, by the features that a network sees in them.

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

BLOCK = 4096  # rows of features that are in float64 at a time
DISTANCES = 2**25  # that are held at a time
NEIGHBOURS = 3  # k of precision and recall
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SPLITS = 10  # of the Inception Score


class _AsTheyAre(nn.Module):
    """What torchmetrics is given for a network, where features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@dataclass(frozen=True)
class GaussianStatistics:
    """
    Mean and covariance of features, all that FID looks at.

    Args:
        mean (`torch.Tensor` of shape (D,)), covariance (`torch.Tensor` of shape (D, D)): In float64; the covariance is over N - 1.
        count (`int`, *optional*): N; None for statistics that do not say.

    Raises:
        ValueError: if the shapes are others, or the numbers not finite.
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
        Of features (N, D).

        Raises:
            ValueError: see [`check_features`]; or if there are fewer than two.
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
    FID = ‖μ - μ'‖² + tr(Σ + Σ' - 2·(Σ·Σ')^½), in float64.

    Raises:
        ValueError: if they are of different numbers of features.
    """
    _check_same_features(len(generated.mean), len(real.mean))
    # tr (Σ·Σ')^½ is the sum of the roots of the eigenvalues of Σ·Σ', which are real and not negative but for rounding
    eigenvalues = torch.linalg.eigvals(generated.covariance @ real.covariance).real.clamp(min=0)
    traces = generated.covariance.trace() + real.covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return float((generated.mean - real.mean).square().sum() + traces)


def kernel_distance(generated: torch.Tensor, real: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """
    KID: the squared maximum mean discrepancy under the kernel (x·y/D + 1)³, unbiased, of random subsets.

    Args:
        generated, real (`torch.Tensor` of shape (N, D) and (N', D)): Features.
        seed (`int`): Of the subsets.

    Returns:
        Mean and standard deviation over 100 subsets of 1,000 images, or of all where there are fewer.
    """
    for name, features in (("generated", generated), ("real", real)):
        check_features(features, name)
        if len(features) < 2:
            raise ValueError(f"Expected at least 2 {name} images to compare, but got {len(features)}.")
    _check_same_features(generated.shape[1], real.shape[1])
    subset_size = min(KID_SUBSET_SIZE, len(generated), len(real))
    with warnings.catch_warnings(action="ignore"):  # that it keeps all features, which are there anyway
        metric = KernelInceptionDistance(_AsTheyAre(real.shape[1]), subsets=KID_SUBSETS, subset_size=subset_size)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws from the global generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def inception_score(logits: torch.Tensor) -> tuple[float, float]:
    """
    exp(E[KL(p(y|x) ‖ p(y))]).

    Args:
        logits (`torch.Tensor` of shape (N, K)): A classifier's, of generated images.

    Returns:
        Mean and standard deviation over ten splits of the images, which are shuffled first.

    Raises:
        ValueError: if there are fewer images than splits.
    """
    check_features(logits, "logits")
    if len(logits) < SPLITS:
        raise ValueError(f"Expected at least {SPLITS} images, one for each split, but got {len(logits)}.")
    with warnings.catch_warnings(action="ignore"):  # likewise
        metric = InceptionScore(_AsTheyAre(logits.shape[1]), splits=SPLITS)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_and_recall(generated: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """
    Precision: the share of generated images that lie among the real ones, within some real image's distance to its third
    nearest real neighbour. Recall: the share of real images that lie among the generated ones.

    Args:
        generated, real (`torch.Tensor` of shape (N, D) and (N', D)): Features.

    Raises:
        ValueError: if there are too few images to have neighbours.
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
    """The share of queries that are no farther from one of the support than that is from its k-th nearest neighbour."""
    norms = support.square().sum(1)
    block = max(1, DISTANCES // len(support))
    # the nearest of all is the image itself
    radii = [_squared_distances(rows, support, norms).kthvalue(NEIGHBOURS + 1).values for rows in support.split(block)]
    radii = torch.cat(radii)
    within = [(_squared_distances(rows, support, norms) <= radii).any(1) for rows in queries.split(block)]
    return float(torch.cat(within).double().mean())


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """‖x - y‖² = ‖x‖² + ‖y‖² - 2·x·y, (n, D) and (m, D) → (n, m); `norms` (m,) are ‖y‖². A difference of this kind wants float64."""
    return torch.addmm(rows.square().sum(1, keepdim=True) + norms, rows, columns.T, alpha=-2).clamp_(min=0)


def _check_same_features(generated: int, real: int) -> None:
    if generated != real:
        raise ValueError(
            f"Expected generated and real images to have as many features, but got {generated} and {real}."
        )


def check_features(features: torch.Tensor, name: str) -> None:
    """
    Raises:
        ValueError: if features are not (N, D), not finite, or all images have the same.
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"Expected `{name}` to have the shape (N, D), but got {tuple(features.shape)}.")
    if not features.isfinite().all():
        raise ValueError(
            f"Expected `{name}` to be finite, but got {int((~features.isfinite()).sum())} numbers that are not."
        )
    if len(features) > 1 and (features == features[0]).all():
        raise ValueError(f"Expected `{name}` to differ between images, but got {len(features)} times the same.")
