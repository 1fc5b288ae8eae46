"""Images that are encoded in threads: nothing is lost, nothing changes places, and errors are not swallowed."""

import io
import threading

import datasets
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dmp.training.data import encoded_images
from diffusers_dmp.training.data.encoded_images import EncodedImages, encode


def opened(entry: dict) -> PIL.Image.Image:
    assert entry["path"] is None
    return PIL.Image.open(io.BytesIO(entry["bytes"]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "RGB", "RGBA"]))
def test_a_png_has_the_pixels_of_the_image(seed, height, width, mode):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    found = opened(encode(PIL.Image.fromarray(pixels)))
    assert (found.format, found.mode) == ("PNG", mode) and np.array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "CMYK"])
def test_images_of_other_modes_are_pillows(mode):
    image = PIL.Image.new(mode, (5, 3), 1)
    assert encode(image) == datasets.Image().encode_example(image)


def image_of(number: int) -> PIL.Image.Image:
    return PIL.Image.new("L", (4, 4), number)


def test_images_keep_their_order(monkeypatch):
    """Though the first one is encoded last."""
    others_are_done = threading.Event()
    monkeypatch.setattr(encoded_images, "num_threads", lambda: 2)
    own = encoded_images.encode

    def slow(image):
        entry = own(image)
        if image.getpixel((0, 0)) == 0:
            assert others_are_done.wait(10)
        if image.getpixel((0, 0)) == 2:
            others_are_done.set()
        return entry

    monkeypatch.setattr(encoded_images, "encode", slow)
    with EncodedImages() as column:
        column.add([image_of(number) for number in range(3)])
        column.add([image_of(number) for number in range(3, 5)])
        found = [opened(entry).getpixel((0, 0)) for entry in column.encoded()]
    assert found == [*range(5)]


def test_an_error_in_a_thread_is_raised(monkeypatch):
    def fail(image):
        raise OSError("no space left")

    monkeypatch.setattr(encoded_images, "encode", fail)
    with EncodedImages() as column:
        column.add([image_of(0)])
        with pytest.raises(OSError, match="no space left"):
            column.encoded()


def test_only_the_images_of_one_call_wait(monkeypatch):
    """While those of the next are sampled: the memory is bounded."""
    waiting, own, most = set(), encoded_images.encode, []

    def noted(image):
        entry = own(image)
        waiting.discard(image.getpixel((0, 0)))
        return entry

    monkeypatch.setattr(encoded_images, "encode", noted)
    with EncodedImages() as column:
        for start in range(0, 40, 4):
            images = range(start, start + 4)
            waiting.update(images)
            column.add([image_of(number) for number in images])
            most.append(len([number for number in waiting if number < start]))
        assert len(column.encoded()) == 40
    assert max(most) == 0
