"""Each metric against a closed form or another's implementation."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from diffusers_dmp.evaluation import metrics
from diffusers_dmp.evaluation.metrics import (
    GaussianStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
)


def normal(n: int, d: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> Tensor:
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(mean: Tensor, covariance: Tensor) -> GaussianStatistics:
    return GaussianStatistics(mean, covariance, 10_000)


@given(st.floats(-3, 3), st.floats(0.1, 3), st.floats(0.1, 3), st.integers(1, 8))
def test_frechet_distance_of_isotropic_gaussians(shift, std, other_std, d):
    """d·(m² + (σ - σ')²)"""
    first = statistics_of(torch.zeros(d), std**2 * torch.eye(d, dtype=torch.float64))
    second = statistics_of(
        torch.full((d,), shift, dtype=torch.float64), other_std**2 * torch.eye(d, dtype=torch.float64)
    )
    expected = d * (shift**2 + (std - other_std) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_is_scipys():
    mixed, other = normal(500, 40) @ normal(40, 40, seed=1), normal(600, 40, mean=0.3, seed=2) @ normal(40, 40, seed=3)
    first, second = GaussianStatistics.of(mixed), GaussianStatistics.of(other)
    root = scipy.linalg.sqrtm(np.cov(mixed.T.numpy()) @ np.cov(other.T.numpy())).real
    expected = np.sum((mixed.mean(0) - other.mean(0)).numpy() ** 2)
    expected += np.trace(np.cov(mixed.T.numpy()) + np.cov(other.T.numpy()) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_images_than_features():
    """The covariance is singular; the distance is still finite and symmetric."""
    first, second = GaussianStatistics.of(normal(20, 64)), GaussianStatistics.of(normal(20, 64, seed=1))
    assert 0 < frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-4)


def test_statistics_are_torchs_for_any_size_of_blocks(monkeypatch):
    features = normal(100, 5, mean=3.0).float()
    monkeypatch.setattr(metrics, "BLOCK", 7)
    statistics = GaussianStatistics.of(features)
    torch.testing.assert_close(statistics.mean, features.double().mean(0))
    torch.testing.assert_close(statistics.covariance, features.double().T.cov())
    assert statistics.count == 100


def test_invalid_statistics():
    with pytest.raises(ValueError, match=r"got the shapes \(3,\) and \(2, 2\)"):
        statistics_of(torch.zeros(3), torch.eye(2))
    with pytest.raises(ValueError, match="that are finite, but got some numbers that are not"):
        statistics_of(torch.zeros(2), torch.full((2, 2), torch.nan))


def test_kernel_distance():
    generated, real = normal(60, 5, mean=0.5, seed=1), normal(50, 5)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / 5 + 1) ** 3

    # a subset has as many images as there are, so every subset is all of them
    generated = generated[:50]
    within = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (50 * 49) for x in (generated, real))
    mean, std = kernel_distance(generated, real)
    assert mean == pytest.approx(float(within - 2 * kernel(generated, real).mean()), rel=1e-6)
    assert std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased(monkeypatch):
    """The mean is 0 for two samples of one distribution; the biased estimate's would be positive."""
    monkeypatch.setattr(metrics, "KID_SUBSETS", 1)
    distances = [kernel_distance(normal(50, 5, seed=2 * i), normal(50, 5, seed=2 * i + 1))[0] for i in range(40)]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / 40**0.5
    assert min(distances) < 0


def test_kernel_distance_depends_on_its_seed_and_leaves_the_global_one(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 20)
    generated, real = normal(50, 3, seed=1), normal(50, 3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert kernel_distance(generated, real) == kernel_distance(generated, real) != kernel_distance(generated, real, 1)
    assert torch.equal(torch.rand(1), expected)


def test_inception_score():
    """K if the classifier is certain and the K classes are equally frequent; 1 if all images have the same logits."""
    certain = 50.0 * torch.eye(10).repeat(200, 1)
    assert inception_score(certain)[0] == pytest.approx(10, rel=0.05)  # the random splits are not quite balanced
    constant = torch.zeros(100, 10)
    constant[0, 0] = 1e-9  # equal features are refused
    assert inception_score(constant)[0] == pytest.approx(1)


def reference(queries: np.ndarray, support: np.ndarray) -> float:
    """Precision computed with scikit-learn's neighbours, of which the first is the image itself."""
    radii = NearestNeighbors(n_neighbors=4).fit(support).kneighbors(support)[0][:, 3]
    distances = np.linalg.norm(queries[:, None] - support[None], axis=-1)
    return (distances <= radii).any(1).mean()


@pytest.mark.parametrize("distances", [2**25, 10_000])
def test_precision_and_recall_are_scikit_learns(distances, monkeypatch):
    """The result does not depend on how many distances are in memory at a time."""
    monkeypatch.setattr(metrics, "DISTANCES", distances)
    generated, real = normal(2500, 4, mean=0.7, seed=1), normal(2200, 4)
    precision, recall = precision_and_recall(generated, real)
    assert precision == pytest.approx(reference(generated.numpy(), real.numpy()))
    assert recall == pytest.approx(reference(real.numpy(), generated.numpy()))


def test_a_collapsed_generator_is_precise_and_recalls_little():
    real = normal(400, 8)
    collapsed = real[:1] + normal(400, 8, std=1e-3, seed=1)
    precision, recall = precision_and_recall(collapsed, real)
    assert precision == 1 and recall < 0.02


def test_a_scattered_generator_recalls_and_is_not_precise():
    precision, recall = precision_and_recall(normal(400, 8, std=10, seed=1), normal(400, 8))
    assert precision < 0.1 and recall > 0.9


@pytest.mark.parametrize(
    "features, said",
    [
        (torch.ones(10, 4), "to differ between images, but got 10 times the same"),
        (torch.full((10, 4), torch.nan), "to be finite, but got 40 numbers"),
        (torch.zeros(10), r"to have the shape \(N, D\), but got \(10,\)"),
        (torch.zeros(0, 4), r"to have the shape \(N, D\), but got \(0, 4\)"),
    ],
)
def test_invalid_features(features, said):
    for metric in (
        GaussianStatistics.of,
        inception_score,
        lambda x: kernel_distance(x, x),
        lambda x: precision_and_recall(x, x),
    ):
        with pytest.raises(ValueError, match=said):
            metric(features)


def test_too_few_images():
    with pytest.raises(ValueError, match="more than 3 generated images"):
        precision_and_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(ValueError, match="at least 10 images"):
        inception_score(normal(9, 2))
    with pytest.raises(ValueError, match="at least 2 images for a covariance, but got 1"):
        GaussianStatistics.of(normal(1, 2))


def test_features_of_two_networks():
    generated, real = normal(9, 3), normal(9, 2)
    for metric in (
        lambda: frechet_distance(GaussianStatistics.of(generated), GaussianStatistics.of(real)),
        lambda: kernel_distance(generated, real),
        lambda: precision_and_recall(generated, real),
    ):
        with pytest.raises(ValueError, match="as many features, but got 3 and 2"):
            metric()
