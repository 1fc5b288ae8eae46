"""Real images through the ordinary path, in an order that (seed, step) alone decides."""

import itertools
import pickle
from multiprocessing.reduction import ForkingPickler

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.evaluation.digits import digit_images, fit_reader, write_image_folder
from diffusers_dmp.training.arguments import DataArguments
from diffusers_dmp.training.data.batches import GlobalBatchSampler, endless_batches
from diffusers_dmp.training.data.fitting import center_crop, pad_to_square
from diffusers_dmp.training.data.images import load_checked, load_images, to_tensors
from diffusers_dmp.training.data.labels import class_names


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("digits"))


def test_digits_survive_the_image_folder(digits):
    dataset = load_images(str(digits))
    assert class_names(dataset) == [str(digit) for digit in range(10)]
    items = to_tensors(dataset, image_size=8, channels=1)
    scans, labels = digit_images()
    assert len(items) == len(scans) == 1797

    read = items[:]
    pixels = torch.stack(read["images"])
    assert pixels.shape == (1797, 1, 8, 8)
    order = np.argsort(labels, kind="stable")  # folder by folder
    np.testing.assert_array_equal(((pixels[:, 0] + 1) * 127.5).round().numpy(), scans[order])
    assert read["class_labels"] == labels[order].tolist()
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_the_reader_reads_real_digits():
    scans, labels = digit_images()
    assert (fit_reader().predict(scans.reshape(-1, 64) / 255) == labels).mean() > 0.99


@pytest.mark.parametrize("as_file", [True, False])
def test_parquet(digits, tmp_path, as_file):
    load_images(str(digits)).select(range(20)).to_parquet(tmp_path / "part.parquet")
    dataset = load_images(str(tmp_path / "part.parquet" if as_file else tmp_path))
    item = to_tensors(dataset, 8, 1)[3]
    assert item["images"].shape == (1, 8, 8)
    assert item["class_labels"] == 0
    assert len(class_names(dataset)) == 10


def test_images_without_classes(tmp_path):
    for i in range(3):
        PIL.Image.new("RGB", (20, 30), (i * 100, 0, 0)).save(tmp_path / f"{i}.png")
    dataset = load_images(str(tmp_path))
    assert class_names(dataset) is None
    items = to_tensors(dataset, 16, 3)
    assert items[2].keys() == {"images"}
    assert items[2]["images"].shape == (3, 16, 16)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels(tmp_path, channels, mode):
    PIL.Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / "white.png")
    image = to_tensors(load_images(str(tmp_path)), 8, channels)[0]["images"]
    assert image.shape == (channels, 8, 8)
    assert (image == 1).all()


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (100, 200), (16, 16), (10, 12)])
def test_centre_crop_keeps_the_middle(size):
    image = PIL.Image.linear_gradient("L").resize(size)  # grey from top to bottom
    cropped = center_crop(image, 16)
    assert cropped.size == (16, 16)
    middle = np.asarray(cropped, dtype=float)[7:9].mean()
    assert middle == pytest.approx(127.5, abs=8)
    if size[0] > size[1]:  # wider than high: the full height is kept
        assert np.asarray(cropped)[0].mean() < 10


def test_an_unreadable_image_is_named(tmp_path):
    PIL.Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    items = to_tensors(load_images(str(tmp_path)), 8, 1)
    with pytest.raises(ValueError, match="Expected a readable image, but got .*half.png"):
        items[:]


def test_an_unreadable_image_without_a_name(tmp_path):
    table = {"image": [{"bytes": b"not an image", "path": None}], "label": [0]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "part.parquet")
    with pytest.raises(ValueError, match="12 bytes without a name"):
        to_tensors(load_images(str(tmp_path)), 8, 1)[0]


def test_worker_processes_of_any_kind_can_read(digits):
    items = to_tensors(load_images(str(digits)), 8, 1)
    assert len(pickle.loads(ForkingPickler.dumps(items))[0]["images"]) == 1


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.* to be a folder with images"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="dataset.*nothing"):
        load_images("")
    (tmp_path / "not.parquet").write_text("text")
    with pytest.raises(ValueError, match="not.parquet"):
        load_images(str(tmp_path / "not.parquet"))


def test_a_missing_column_is_named_by_its_argument(digits):
    source = str(digits)
    with pytest.raises(
        ValueError, match="`teacher_image_column` to be one of .*, the columns of '.*', but got 'large'"
    ):
        load_checked(DataArguments(teacher_image_column="large"), source, "train")
    with pytest.raises(ValueError, match="`image_column` to be one of .*, the columns of '.*', but got 'picture'"):
        load_checked(DataArguments(image_column="picture", teacher_image_column="image"), source, "train")


def test_an_unknown_column_is_named(digits):
    with pytest.raises(ValueError, match="image_column.*'image', 'label'.*'picture'"):
        load_images(str(digits), image_column="picture")
    with pytest.raises(ValueError, match="channels.*2"):
        to_tensors(load_images(str(digits)), 8, channels=2)


@given(num_images=st.integers(1, 50), batch_size=st.integers(1, 120), seed=st.integers(0, 2**32))
def test_each_image_once_per_epoch(num_images, batch_size, seed):
    sampler = GlobalBatchSampler(num_images, batch_size, seed, num_slices=1, own_slices=range(1))
    num_epochs = 3
    num_batches = -(-num_epochs * num_images // batch_size)
    stream = list(itertools.chain.from_iterable(itertools.islice(sampler, num_batches)))
    for epoch in range(num_epochs):
        assert sorted(stream[epoch * num_images : (epoch + 1) * num_images]) == list(range(num_images))


@given(
    processes=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2, 3]),
    first_step=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_batches_are_the_same_for_any_number_of_processes(processes, accumulation, first_step, seed):
    whole = GlobalBatchSampler(37, 24, seed, 1, range(1))
    slices = processes * accumulation
    parts = [
        iter(GlobalBatchSampler(37, 24, seed, slices, range(p * accumulation, (p + 1) * accumulation), first_step))
        for p in range(processes)
    ]
    for step in range(first_step, first_step + 3):
        together = [index for part in parts for _ in range(accumulation) for index in next(part)]
        assert together == whole.batch(step)


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = itertools.islice(GlobalBatchSampler(100, 100, 0, 1, range(1)), 2)
    (other,) = itertools.islice(GlobalBatchSampler(100, 100, 1, 1, range(1)), 1)
    assert first != second and first != other


def test_reading_leaves_the_global_random_state_alone(digits):
    items = to_tensors(load_images(str(digits)), 8, 1)
    before = torch.get_rng_state()
    batch = next(endless_batches(items, GlobalBatchSampler(1797, 4, 0, 1, range(1)), 0, torch.device("cpu")))
    assert batch["images"].shape == (4, 1, 8, 8) and batch["class_labels"].shape == (4,)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (5, 9), (300, 2), (16, 16)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_padding_keeps_the_whole_image(size, mode):
    colours = {"L": (0, 128), "RGB": ((0, 0, 0), (128, 128, 128)), "RGBA": ((0, 0, 0, 255), (128, 128, 128, 255))}[
        mode
    ]
    padded = np.asarray(pad_to_square(PIL.Image.new(mode, size, colours[0]), 16, "#808080"))
    is_padding = (padded.reshape(16, 16, -1) == np.array(colours[1]).reshape(-1)).all(-1)
    is_image = (padded.reshape(16, 16, -1) == np.array(colours[0]).reshape(-1)).all(-1)
    assert (is_padding | is_image).all()
    width, height = (max(round(side * 16 / max(size)), 1) for side in size)
    assert is_image.any(0).sum() == width and is_image.any(1).sum() == height
    rows, columns = np.flatnonzero(is_image.any(1)), np.flatnonzero(is_image.any(0))
    assert abs(rows[0] - (15 - rows[-1])) <= 1 and abs(columns[0] - (15 - columns[-1])) <= 1  # in the middle


def test_padding_instead_of_cropping(tmp_path):
    PIL.Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save(tmp_path / "wide.png")
    dataset = load_images(str(tmp_path))
    assert (to_tensors(dataset, 8, 1, image_fit="pad", background="black")[0]["images"] == -1).all()
    image = to_tensors(dataset, 8, 4, image_fit="pad", background="black")[0]["images"]
    assert (image[3, 2:6] == -1).all() and (image[3, :2] == 1).all()  # transparent, between opaque stripes
    with pytest.raises(ValueError, match="`image_fit` to be one of crop, pad, but got 'stretch'"):
        DataArguments(image_fit="stretch")
    with pytest.raises(ValueError, match="`background`"):
        DataArguments(background="see-through")
