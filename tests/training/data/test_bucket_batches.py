"""Batches of one shape each, in an order that seed and step alone decide."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dmp.training.data.bucket_batches import BucketBatchSampler
from diffusers_dmp.training.data.buckets import aspect_ratio_buckets, nearest_bucket

buckets = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)
batch_sizes = st.integers(1, 30)
seeds = st.integers(0, 2**32)


def whole(buckets, batch_size, seed=0, first_step=0) -> BucketBatchSampler:
    return BucketBatchSampler(buckets, batch_size, seed, 1, range(1), first_step)


@settings(max_examples=40)
@given(buckets=buckets, batch_size=batch_sizes, seed=seeds)
def test_all_samples_of_a_step_are_of_one_bucket(buckets, batch_size, seed):
    for batch in itertools.islice(whole(buckets, batch_size, seed), 20):
        assert len(batch) == batch_size
        assert len(set(buckets[batch].tolist())) == 1


@given(buckets=buckets, batch_size=batch_sizes, seed=seeds, num_epochs=st.integers(1, 12))
def test_every_sample_comes_once_an_epoch_but_for_leftovers(buckets, batch_size, seed, num_epochs):
    sampler = whole(buckets, batch_size, seed)
    steps = int(sampler.batches_before(num_epochs).sum())
    counts = Counter(itertools.chain.from_iterable(itertools.islice(sampler, steps)))
    for bucket in set(buckets.tolist()):
        members = np.flatnonzero(buckets == bucket).tolist()
        own = [counts[member] for member in members]
        assert max(own) - min(own) <= 1  # no sample is preferred
        assert num_epochs * len(members) - batch_size < sum(own) <= num_epochs * len(members)


@settings(max_examples=40)
@given(
    buckets=buckets,
    processes=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2, 3]),
    first_step=st.integers(0, 40),
    seed=seeds,
)
def test_batches_are_the_same_for_any_number_of_processes_and_wherever_a_run_is_resumed(
    buckets, processes, accumulation, first_step, seed
):
    slices = processes * accumulation
    own = [range(process * accumulation, (process + 1) * accumulation) for process in range(processes)]
    parts = [iter(BucketBatchSampler(buckets, 24, seed, slices, each, first_step)) for each in own]
    for batch in itertools.islice(whole(buckets, 24, seed), first_step, first_step + 3):
        assert batch == [sample for part in parts for _ in range(accumulation) for sample in next(part)]


def test_a_late_step_needs_no_replay_of_the_earlier_ones():
    numbers = np.random.default_rng(0).integers(0, 20, 100_000)
    sampler = whole(numbers, 64, first_step=10**9)
    first = next(iter(sampler))
    assert first == whole(numbers, 64).batch(10**9)
    assert sampler._bucket_permutation.cache_info().misses <= 2  # of a batch that lies in two permutations


def test_order_depends_on_the_seed_and_changes_from_epoch_to_epoch():
    numbers = np.repeat([0, 1], 32)
    one, two = (list(itertools.islice(whole(numbers, 8, seed), 16)) for seed in (0, 1))
    assert one != two
    assert one[:8] != one[8:]
    assert [numbers[batch[0]] for batch in one[:8]] != sorted(numbers[batch[0]] for batch in one[:8])


@given(
    resolution=st.integers(1, 64).map(lambda number: 16 * number),
    multiple=st.sampled_from([1, 2, 8, 16]),
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
)
def test_buckets_have_about_as_many_pixels_and_the_nearest_aspect_ratio_is_taken(resolution, multiple, height, width):
    sizes = aspect_ratio_buckets(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert {size[::-1] for size in sizes} == set(sizes)
    assert all(side % multiple == 0 for size in sizes for side in size)
    assert all(size[0] * size[1] <= resolution**2 for size in sizes)
    chosen = nearest_bucket(height, width, sizes)
    distances = [abs(np.log(size[1] / size[0]) - np.log(width / height)) for size in sizes]
    assert abs(np.log(chosen[1] / chosen[0]) - np.log(width / height)) == pytest.approx(min(distances))


def test_buckets_of_1024_pixels_are_the_usual_ones():
    sizes = aspect_ratio_buckets(1024, 16)
    assert len(sizes) == 17
    assert {(832, 1216), (896, 1152), (768, 1344), (640, 1600), (512, 2048)} < set(sizes)
    assert min(height * width for height, width in sizes) > 0.9 * 1024**2
