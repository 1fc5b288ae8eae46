"""Class names stand for the indices that they were given for, whatever the names look like."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.models.class_names import checked_class_names, find_class, label_list

NAMES = st.lists(st.text(min_size=1).filter(lambda name: "," not in name), min_size=1, max_size=30, unique=True)


@given(NAMES)
def test_every_name_is_found(names):
    assert [find_class(name, dict(enumerate(names))) for name in names] == list(range(len(names)))


@given(st.permutations([str(number) for number in range(1, 13)]))
def test_a_name_that_looks_like_an_index_is_a_name(names):
    # as a saved pipeline has them: keys are strings, and sorted as strings, "10" before "2"
    id2label = json.loads(json.dumps({str(index): name for index, name in enumerate(names)}, sort_keys=True))
    assert [find_class(name, id2label) for name in names] == list(range(12))
    assert list(checked_class_names(id2label).values()) == list(names)


def test_synonyms():
    id2label = {0: "tench, Tinca tinca", 1: "maillot", 2: "maillot, tank suit", 3: "crane", 4: "crane"}
    assert [find_class(name, id2label) for name in ("Tinca tinca", "tench, Tinca tinca", "tank suit")] == [0, 0, 2]
    assert find_class("maillot", id2label) == 1  # a whole name comes before a synonym
    with pytest.raises(ValueError, match=r"'crane', which is the name of the classes \[3, 4\]; give the index"):
        find_class("crane", id2label)


def test_unknown_names():
    with pytest.raises(ValueError, match="`class_labels` to be indices, as there are no names.*'3'"):
        find_class("3", None)
    with pytest.raises(ValueError, match=r"among \['cat'\], but got '0'\. An index is an `int`"):
        find_class("0", {0: "cat"})
    with pytest.raises(ValueError, match=r"among the 1000 classes, such as \['name 777', .*\], but got 'nome 777'"):
        find_class("nome 777", {index: f"name {index}" for index in range(1000)})


@pytest.mark.parametrize(
    "id2label",
    [{"cat": 0}, {True: "cat"}, {1.5: "cat"}, {-1: "cat"}, {"1_0": "cat"}, {0: None}, {0: 3}, {1: "cat", "01": "dog"}],
)
def test_refuses_other_dictionaries(id2label):
    with pytest.raises(ValueError, match="Expected `id2label` to give"):
        checked_class_names(id2label)


@pytest.mark.parametrize(
    "labels, expected",
    [
        (3, [3]),
        ("3", ["3"]),
        (np.int64(3), [3]),
        (np.str_("cat"), ["cat"]),
        (torch.tensor(3), [3]),
        (np.array(3), [3]),
        (np.array(["cat", "dog"]), ["cat", "dog"]),
        (torch.tensor([1, 2], dtype=torch.uint8), [1, 2]),
        ((np.int32(1), torch.tensor(2), "cat"), [1, 2, "cat"]),
        (range(3), [0, 1, 2]),
    ],
)
def test_labels_of_many_kinds(labels, expected):
    assert label_list(labels) == expected


@pytest.mark.parametrize(
    "labels",
    [
        *(True, 1.0, None, np.bool_(True), torch.tensor(True), np.float32(1)),
        *([True], [1.0], [0, None], [[1], [2]], torch.tensor([[1]]), np.array([1.5]), np.array([True])),
    ],
)
def test_refuses_what_is_no_label(labels):
    with pytest.raises(ValueError, match="`class_labels` to be integers or names"):
        label_list(labels)


def test_refuses_no_labels():
    for labels in ([], np.array([]), torch.tensor([])):
        with pytest.raises(ValueError, match="`class_labels` to hold at least one label, but got none"):
            label_list(labels)
