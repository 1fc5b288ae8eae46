"""ADM's sample batches, read and written in pieces."""

import numpy as np
import pytest

from diffusers_dmp.evaluation.npz import NpzImages, write_npz


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 5, 4, 3), dtype=np.uint8)


def test_numpy_reads_what_is_written(images, tmp_path):
    path = tmp_path / "batch.npz"
    write_npz(path, (images[:4], images[4:]), images.shape, labels=np.arange(10))
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"], images) and np.array_equal(file["arr_1"], np.arange(10))
        assert file["arr_1"].dtype == np.int64
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy_are_read(images, tmp_path, save):
    """ADM's reference batches contain statistics as well."""
    save(tmp_path / "batch.npz", arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
    read = NpzImages(tmp_path / "batch.npz")
    assert len(read) == 10 and read.shape == images.shape
    batches = list(read.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate(batches), images)


def test_equal_images_make_equal_files(images, tmp_path):
    write_npz(tmp_path / "first.npz", [images], images.shape)
    write_npz(tmp_path / "second.npz", images[:, None], images.shape)  # one by one
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()


def test_an_incomplete_file_is_not_left_under_its_name(images, tmp_path):
    for batches, said in (
        ([images[:4]], "10 images, but got 4"),
        ([images[:, :2]], r"shape \(5, 4, 3\), but got uint8 \(2, 4, 3\)"),
    ):
        with pytest.raises(ValueError, match=said):
            write_npz(tmp_path / "batch.npz", batches, images.shape)
        assert not (tmp_path / "batch.npz").exists()


def test_invalid_files(images, tmp_path):
    path = tmp_path / "batch.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="to be a whole .npz file"):
        NpzImages(path)
    write_npz(path, [images], images.shape)
    path.write_bytes(path.read_bytes()[:-40])  # interrupted
    with pytest.raises(ValueError, match="to be a whole .npz file"):
        NpzImages(path)
    np.savez(path, other=images)
    with pytest.raises(ValueError, match=r"images in 'arr_0', but got \['other.npy'\]"):
        NpzImages(path)
    for wrong in (images.astype(np.float32), images[0], images[..., :2], np.uint8(3)):
        np.savez(path, arr_0=wrong)
        with pytest.raises(ValueError, match="to be uint8 of the shape"):
            NpzImages(path)


def test_a_damaged_file(images, tmp_path):
    path = tmp_path / "batch.npz"
    write_npz(path, [images], images.shape)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="to be a whole .npz file, but got Bad CRC-32"):
        list(NpzImages(path).batches(4))


def test_grey_images_come_in_three_channels(images, tmp_path):
    grey = images[..., :1]
    write_npz(tmp_path / "grey.npz", [grey], grey.shape)
    (batch,) = NpzImages(tmp_path / "grey.npz").batches(10)
    assert np.array_equal(batch, grey.repeat(3, -1))


def test_labels(images, tmp_path):
    write_npz(tmp_path / "with.npz", [images], images.shape, labels=np.arange(10))
    write_npz(tmp_path / "without.npz", [images], images.shape)
    assert NpzImages(tmp_path / "with.npz").labels.tolist() == [*range(10)]
    assert NpzImages(tmp_path / "without.npz").labels is None
