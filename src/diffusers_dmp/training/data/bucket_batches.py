"""Batches of samples of several shapes, each batch of one shape, in an order that (seed, step) alone decides.

Legend: B batch size of one optimiser step over all processes, N samples, n those of one shape.
"""

import functools

import numpy as np

from .batches import GlobalBatchSampler


class BucketBatchSampler(GlobalBatchSampler):
    """
    Endless batches, each of samples of one bucket.

    A bucket's samples form an endless sequence of permutations, which follow one another without a gap, and B of them after
    another are a batch. The e-th epoch has the batches that end within a bucket's e-th permutation, those of all buckets in random
    order. So fewer than B samples of a bucket are left over for the next epoch, and after any number of epochs no sample of a bucket
    has come more than once more often than another. A bucket of fewer than B samples has no batch in some epochs, and
    batches in which a sample occurs several times.

    Args:
        buckets (`np.ndarray` of shape (N,)): The number of the bucket of each sample.
        batch_size, seed, num_slices, own_slices, first_step: See [`GlobalBatchSampler`].
    """

    def __init__(
        self, buckets: np.ndarray, batch_size: int, seed: int, num_slices: int, own_slices: range, first_step: int = 0
    ):
        super().__init__(len(buckets), batch_size, seed, num_slices, own_slices, first_step)
        by_bucket = np.argsort(buckets, kind="stable")
        self.samples = np.split(by_bucket, np.flatnonzero(np.diff(buckets[by_bucket])) + 1)
        self.sizes = np.array([len(samples) for samples in self.samples])
        self._epoch_order = functools.lru_cache(maxsize=2)(self._compute_epoch_order)
        self._bucket_permutation = functools.lru_cache(maxsize=2 * len(self.samples))(self._compute_permutation_of)

    def batches_before(self, epoch: int) -> np.ndarray:
        """The number of batches of each bucket in the epochs before one: ⌊e·n / B⌋."""
        return epoch * self.sizes // self.batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to."""
        epoch = step * self.batch_size // self.num_images  # no later one: ∑ ⌊e·n / B⌋ ≤ e·N / B
        while self.batches_before(epoch + 1).sum() <= step:
            epoch += 1
        return epoch

    def bucket_batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of the bucket's batches the step has."""
        epoch = self.epoch_of(step)
        before, after = self.batches_before(epoch), self.batches_before(epoch + 1)
        number = int(self._epoch_order(epoch)[step - before.sum()])  # the epoch's batches, bucket after bucket
        ends = np.cumsum(after - before)
        bucket = int(np.searchsorted(ends, number, side="right"))
        return bucket, int(after[bucket] - (ends[bucket] - number))

    def batch(self, step: int) -> list[int]:
        """The indices of all B samples of an optimiser step."""
        bucket, number = self.bucket_batch(step)
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        return [self._sample(bucket, position) for position in positions]

    def _sample(self, bucket: int, position: int) -> int:
        permutation, index = divmod(position, len(self.samples[bucket]))
        return int(self._bucket_permutation(bucket, permutation)[index])

    def _compute_epoch_order(self, epoch: int) -> np.ndarray:
        count = int((self.batches_before(epoch + 1) - self.batches_before(epoch)).sum())
        return np.random.default_rng([self.seed, 0, epoch]).permutation(count)

    def _compute_permutation_of(self, bucket: int, permutation: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1 + bucket, permutation]).permutation(self.samples[bucket])
