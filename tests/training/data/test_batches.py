"""Classes that come equally often, and images that come several times an epoch."""

import io
import itertools
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.data.batches import BalancedBatchSampler, with_repeats

labels = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)


def sequence(sampler: BalancedBatchSampler, num_images: int) -> list[int]:
    """The first images that a sampler has."""
    return list(itertools.islice(itertools.chain.from_iterable(sampler), num_images))


@given(labels=labels, batch_size=st.integers(1, 30), seed=st.integers(0, 2**32), num_images=st.integers(1, 200))
def test_every_class_comes_equally_often_at_any_time(labels, batch_size, seed, num_images):
    images = sequence(BalancedBatchSampler(labels, batch_size, seed, 1, range(1)), num_images)
    counts = Counter(labels[images].tolist())
    classes = set(labels.tolist())
    assert all(abs(counts[label] - num_images / len(classes)) < 1 for label in classes)
    if num_images % len(classes) == 0:
        assert set(counts.values()) == {num_images // len(classes)}


@given(labels=labels, seed=st.integers(0, 2**32))
def test_no_image_comes_twice_before_all_of_its_class_came_once(labels, seed):
    images = sequence(BalancedBatchSampler(labels, 7, seed, 1, range(1)), 3 * len(labels) * len(set(labels.tolist())))
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label).tolist()
        own = [image for image in images if labels[image] == label]
        assert len(own) >= 3 * len(members)
        for epoch in range(3):
            assert sorted(own[epoch * len(members) : (epoch + 1) * len(members)]) == members


@given(
    labels=labels,
    processes=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2, 3]),
    first_step=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_balanced_batches_are_the_same_for_any_number_of_processes(labels, processes, accumulation, first_step, seed):
    whole = BalancedBatchSampler(labels, 24, seed, 1, range(1))
    slices = processes * accumulation
    parts = [
        iter(
            BalancedBatchSampler(labels, 24, seed, slices, range(p * accumulation, (p + 1) * accumulation), first_step)
        )
        for p in range(processes)
    ]
    for step in range(first_step, first_step + 3):
        together = [index for part in parts for _ in range(accumulation) for index in next(part)]
        assert together == whole.batch(step)


def test_rounds_and_seeds_have_orders_of_their_own():
    labels = np.arange(100) % 10
    first, second = itertools.islice(BalancedBatchSampler(labels, 100, 0, 1, range(1)), 2)
    (other,) = itertools.islice(BalancedBatchSampler(labels, 100, 1, 1, range(1)), 1)
    assert first != second and first != other
    classes = labels[first].reshape(10, 10)
    assert len({tuple(each) for each in classes.tolist()}) > 5


@pytest.fixture(scope="module")
def vehicles() -> datasets.Dataset:
    """Nine images of buses, cars and trains; the red value is the row."""
    columns: dict[str, list] = {"image": [], "label": [0, 0, 1, 1, 1, 1, 2, 2, 2]}
    for row in range(9):
        PIL.Image.new("RGB", (8, 8), (row, 0, 0)).save(file := io.BytesIO(), "png")
        columns["image"].append({"bytes": file.getvalue(), "path": None})
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["bus", "car", "my train"])}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_repeats_by_class(vehicles):
    rows = with_repeats(vehicles, DiTTrainingArguments(class_repeats=["bus=3", "my train=2"]))
    assert Counter(rows["label"]) == {0: 6, 1: 4, 2: 6}
    images = Counter(image["bytes"] for image in rows["image"])
    assert [images[image["bytes"]] for image in vehicles["image"]] == [3, 3, 1, 1, 1, 1, 2, 2, 2]
    assert with_repeats(vehicles, DiTTrainingArguments()) is vehicles


@pytest.mark.parametrize("entry", ["bus", "bus=", "=3", "bus=0", "bus=-1", "bus=1.5", "bus=x"])
def test_refuses_repeats_that_are_none(entry):
    with pytest.raises(ValueError, match=f"`class_repeats` .*such as bus=3, but got '{entry}'"):
        DiTTrainingArguments(class_repeats=[entry])


def test_refuses_repeats_and_balance_without_effect(vehicles):
    with pytest.raises(ValueError, match="each class's name once.*'bus=3'"):
        DiTTrainingArguments(class_repeats=["bus=2", "bus=3"])
    with pytest.raises(ValueError, match="either `class_repeats` or `balance_classes`"):
        DiTTrainingArguments(class_repeats=["bus=2"], balance_classes=True)
    with pytest.raises(ValueError, match="`class_repeats` to name classes of bus, car, my train, but got van"):
        with_repeats(vehicles, DiTTrainingArguments(class_repeats=["van=2"]))
    for arguments in ({"class_repeats": ["bus=2"]}, {"balance_classes": True}):
        with pytest.raises(
            ValueError, match=f"`{next(iter(arguments))}`.*classes only, but 'here' has no column 'label'"
        ):
            with_repeats(vehicles.remove_columns("label"), DiTTrainingArguments(dataset="here", **arguments))
