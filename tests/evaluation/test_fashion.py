"""Fashion-MNIST as it is installed or on the Hub, and the captions and files that the text demo makes of it."""

import gzip
import struct

import datasets
import numpy as np
import pytest

from diffusers_dmp.evaluation import fashion
from diffusers_dmp.evaluation.fashion import (
    CLASSES,
    CLOTHES,
    captions_of,
    fashion_images,
    write_captioned_images,
    write_fashion,
)

PIXELS = np.random.default_rng(0).integers(256, size=(3, 28, 28), dtype=np.uint8)
LABELS = np.array([9, 0, 3], np.uint8)


def idx(array: np.ndarray) -> bytes:
    """An array in the format that http://yann.lecun.com/exdb/mnist describes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    for name, array in (("images-idx3", PIXELS), ("labels-idx1", LABELS)):
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_reads_the_installed_files(folder):
    images, labels = fashion_images("test", folder)
    assert np.array_equal(images, PIXELS) and labels.tolist() == [9, 0, 3]
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz.*No such file"):
        fashion_images("train", folder)


def test_reads_the_hub_where_nothing_is_installed(tmp_path, monkeypatch):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    rows = {"image": [{"bytes": fashion._png(image), "path": None} for image in PIXELS], "label": LABELS.tolist()}
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images, labels = fashion_images("train", tmp_path / "missing")
    assert asked == [("zalando-datasets/fashion_mnist", "train")]
    assert np.array_equal(images, PIXELS) and labels.tolist() == [9, 0, 3]
    assert images.dtype == np.uint8 and labels.dtype == np.int64


def test_says_both_ways_where_there_is_neither(tmp_path):
    with pytest.raises(ValueError, match="apt install dataset-fashion-mnist.*zalando-datasets/fashion_mnist") as error:
        fashion_images(folder=tmp_path / "missing")  # and the tests are offline
    assert "\n" not in str(error.value)


def test_refuses_unknown_splits_and_damaged_files(folder):
    with pytest.raises(ValueError, match="`split` to be 'train' or 'test', but got 'validation'"):
        fashion_images("validation", folder)
    file = folder / "t10k-labels-idx1-ubyte.gz"
    for damaged in (file.read_bytes()[:-4], b"", gzip.compress(idx(LABELS)[:-1])):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz' to hold an array of MNIST's format"):
            fashion_images("test", folder)


def test_captions_name_what_the_labels_stand_for():
    labels = np.arange(10).repeat(50)
    captions = captions_of(labels)
    assert all(CLOTHES[label] in caption for label, caption in zip(labels, captions, strict=True))
    assert len(set(captions)) == 10 * len(fashion.PHRASES)
    assert captions == captions_of(labels) != captions_of(labels, seed=1)
    assert captions_of([0, 1], ["one", "two"], ["{} by hand"]) == ["one by hand", "two by hand"]


def test_written_pictures_are_read_back_exactly(tmp_path):
    captions = captions_of(LABELS)
    write_captioned_images(tmp_path / "new" / "train.parquet", PIXELS, captions)
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "new" / "train.parquet"), split="train")
    assert loaded["text"][:] == captions
    assert np.array_equal(np.stack([np.asarray(image) for image in loaded["image"]]), PIXELS)


def test_the_whole_data_set_is_written_once(tmp_path, monkeypatch):
    """As folders of a data set with splits and named classes; what is there is kept."""
    monkeypatch.setattr(fashion, "fashion_images", lambda split: (PIXELS, LABELS.astype(np.int64)))
    write_fashion(tmp_path)
    written = (tmp_path / "test" / "images.parquet").stat().st_mtime_ns
    for split in ("train", "test"):
        loaded = datasets.load_dataset(str(tmp_path), split=split)
        assert loaded.features["label"].names == list(CLASSES) and loaded["label"][:] == LABELS.tolist()
        assert np.array_equal(np.stack([np.asarray(image) for image in loaded["image"]]), PIXELS)
    write_fashion(tmp_path)
    assert (tmp_path / "test" / "images.parquet").stat().st_mtime_ns == written
    assert all(clothes.endswith(name) for clothes, name in zip(CLOTHES, CLASSES, strict=True))
