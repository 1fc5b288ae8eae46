"""Images that are read while others are computed with."""

import threading

import numpy as np
import pytest

from diffusers_dmp.evaluation.images import read_ahead


def test_one_batch_is_read_ahead():
    began = [threading.Event() for _ in range(4)]

    def batches():
        for number in range(3):
            began[number].set()
            yield np.full(2, number)
        began[3].set()

    for number, batch in enumerate(read_ahead(batches())):
        assert batch.tolist() == [number] * 2
        assert began[number + 1].wait(10)  # though nobody has asked for it
        assert not any(each.is_set() for each in began[number + 2 :])


def test_an_error_is_raised_in_its_place():
    def batches():
        yield np.zeros(1)
        raise ValueError("cannot be read")

    found = read_ahead(batches())
    assert next(found).tolist() == [0]
    with pytest.raises(ValueError, match="cannot be read"):
        next(found)


def test_what_is_not_wanted_any_more_is_not_read():
    read = []
    found = read_ahead(read.append(number) or np.zeros(1) for number in range(9))
    next(found)
    found.close()
    assert len(read) == 2
