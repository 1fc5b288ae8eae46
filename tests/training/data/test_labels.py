"""Labels are checked as a whole; names become indices."""

import io
import math
from pathlib import Path

import datasets
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.training.data.images import describe_images, load_images, to_tensors
from diffusers_dmp.training.data.labels import check_labels, class_counts, class_names
from diffusers_dmp.training.data.training_data import check_validation_classes


def parquet(folder: Path, labels: list, feature=None) -> str:
    """A parquet file of real images with those labels."""
    png = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(png, "png")
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": png.getvalue(), "path": None}] * len(labels), "label": labels}
    )
    if feature is not None:
        dataset = dataset.cast_column("label", feature)
    dataset.to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def test_names_become_indices(tmp_path):
    dataset = load_images(parquet(tmp_path, ["img10", "img2", "cat", "img10"]))
    assert class_names(dataset) == ["cat", "img2", "img10"]
    assert to_tensors(dataset, 8, 1)[:]["class_labels"] == [2, 1, 0, 2]
    assert describe_images(dataset) == "4 images, 3 classes: cat 1, img2 1, img10 2"


def test_plain_indices(tmp_path):
    dataset = load_images(parquet(tmp_path, [0, 3]))
    assert class_names(dataset) == ["0", "1", "2", "3"]
    assert describe_images(dataset) == "2 images, 4 classes: 0 1, 1 0, 2 0, 3 1; without images: 1, 2"


def test_floats_that_are_integers(tmp_path):
    dataset = load_images(parquet(tmp_path, [1.0, 0.0]))
    assert to_tensors(dataset, 8, 1)[:]["class_labels"] == [1, 0]


CASES = {
    "negative": (
        [0, 1, -1, -1],
        r"got -1 in row 2, and 1 more such rows; -1 often stands for a label that is kept secret",
    ),
    "none": ([0, None], "got None in row 1"),
    "no name": (["cat", None, "dog"], "got None in row 1"),
    "empty name": (["cat", ""], "got '' in row 1"),
    "fraction": ([0.0, 1.5], r"got 1\.5 in row 1"),
    "nan": ([1.0, math.nan], "got nan in row 1"),
    "infinite": ([1.0, math.inf], "got inf in row 1"),
    "lists": ([[1], [0, 2]], r"got \[1\] in row 0"),
    "dictionaries": ([{"a": 1}], r"got \{'a': 1\} in row 0"),
    "booleans": ([True, False], "got True in row 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_label_is_named(tmp_path, case):
    labels, message = CASES[case]
    source = parquet(tmp_path, labels)
    with pytest.raises(ValueError, match=f"`label_column` 'label' to have .* of a class in each row, but {message}"):
        load_images(source)
    dataset = load_images(source, label_column="none")  # who asks for no labels is not bothered
    assert describe_images(dataset, "none").endswith("unconditional: no labels asked for")


def test_classes_of_the_hub(tmp_path):
    """Test splits there have -1 for secret labels."""
    feature = datasets.ClassLabel(names=["cat", "dog"])
    assert class_names(load_images(parquet(tmp_path, [1, 1], feature))) == ["cat", "dog"]
    for label in (-1, 2):
        table = datasets.Dataset.from_dict({"label": [0, label]}).data.table
        dataset = datasets.Dataset(table, datasets.DatasetInfo(features=datasets.Features(label=feature)))
        with pytest.raises(ValueError, match=f"got {label} in row 1"):
            check_labels(dataset, "label")


@given(labels=st.lists(st.one_of(st.integers(-3, 30), st.none()), min_size=1))
def test_the_first_wrong_row_is_named(labels):
    dataset = datasets.Dataset.from_dict({"label": labels}, datasets.Features(label=datasets.Value("int64")))
    missing = [row for row, label in enumerate(labels) if label is None]
    negative = [row for row, label in enumerate(labels) if label is not None and label < 0]
    if wrong := missing or negative:
        with pytest.raises(ValueError, match=f"in row {wrong[0]}[,;.]"):
            check_labels(dataset, "label")
    else:
        assert class_counts(check_labels(dataset, "label"), "label").sum() == len(labels)


@given(names=st.lists(st.text(min_size=1), min_size=1))
def test_any_names_become_indices(names):
    dataset = check_labels(datasets.Dataset.from_dict({"label": names}), "label")
    known = class_names(dataset)
    assert [known[label] for label in dataset["label"]] == names and len(set(known)) == len(known)


def test_a_mistyped_column_is_named(tmp_path):
    source = parquet(tmp_path, [0])
    with pytest.raises(
        ValueError, match=r"`label_column` to be one of \['image', 'label'\].*'none' for no labels, but got 'lable'"
    ):
        load_images(source, label_column="lable")
    with pytest.raises(ValueError, match="`text_column` to be one of"):
        load_images(source, text_column="text")


def test_held_out_images_have_the_same_classes(tmp_path):
    names = datasets.ClassLabel(names=["cat", "cow", "dog"])
    held_out = load_images(parquet(tmp_path, [0, 2, 1], names))
    check_validation_classes(held_out, "label", ["cat", "cow", "dog"])
    with pytest.raises(ValueError, match="3 classes of `dataset`, but got 3; missing: pig; unknown: cow"):
        check_validation_classes(held_out, "label", ["cat", "dog", "pig"])
    with pytest.raises(ValueError, match="in the order of `dataset`, dog, cow, cat, but got cat, cow, dog"):
        check_validation_classes(held_out, "label", ["dog", "cow", "cat"])
    with pytest.raises(ValueError, match="to have no labels, as `dataset` has, but got 3 classes"):
        check_validation_classes(held_out, "label", None)
    plain = load_images(parquet(tmp_path, [0, 1]))
    check_validation_classes(plain, "label", ["0", "1", "2"])  # no image of the last class is held out
    with pytest.raises(ValueError, match="unknown: 1"):
        check_validation_classes(plain, "label", ["0"])


def test_a_column_of_something_else_is_no_column_of_images(tmp_path):
    with pytest.raises(ValueError, match="Expected 'label' to be a column of images, but got .*int64"):
        load_images(parquet(tmp_path, [0]), image_column="label")
