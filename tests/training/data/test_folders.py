"""What a folder of images means: every image counts, one class per sub-folder, and nothing is guessed from names."""

import json
from pathlib import Path

import datasets
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dmp.evaluation.images import open_images
from diffusers_dmp.training.data.images import describe_images, load_images
from diffusers_dmp.training.data.labels import class_counts, class_names, natural_key
from diffusers_dmp.training.data.listing import list_files


def make(folder: Path, *names: str) -> Path:
    """A folder of real images of those names; other files hold a line of text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".tif", ".bmp", ".webp"):
            PIL.Image.new("L", (4, 4), len(name)).save(path, "png")
        else:
            path.write_text("a line of text\n")
    return folder


def make_tree(folder: Path, classes: dict[str, int]) -> Path:
    return make(folder, *(f"{name}/{i}.png" for name, count in classes.items() for i in range(count)))


def files(dataset: datasets.Dataset, folder: Path) -> list[str]:
    return [Path(image["path"]).relative_to(folder).as_posix() for image in dataset["image"]]


# What used to go wrong in silence


def test_a_class_may_be_called_train(tmp_path):
    dataset = load_images(str(make_tree(tmp_path, {"bus": 3, "car": 3, "train": 3})))
    assert describe_images(dataset) == "9 images, 3 classes: bus 3, car 3, train 3"
    assert dataset["label"][:] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_words_in_file_names_mean_nothing(tmp_path):
    make(
        tmp_path, "train_1.jpg", "old train.jpg", "test.png", "validation-3.png", "5.PNG", "6.jpeg", "7.webp", "8.tif"
    )
    dataset = load_images(str(tmp_path))
    assert describe_images(dataset) == "8 images, unconditional: no sub-folders"
    assert len(open_images(tmp_path)) == 8  # evaluation counts them all, too
    assert sum(len(batch) for batch in open_images(tmp_path).batches(3)) == 8
    assert describe_images(open_images(tmp_path).dataset, label_column=None) == "8 images"


def test_a_stray_image_beside_the_classes_is_named(tmp_path):
    make_tree(tmp_path, {"cat": 2, "dog": 2})
    make(tmp_path, "stray.png")
    with pytest.raises(ValueError, match=r"or none, but got stray.png beside the sub-folders cat, dog. Move them"):
        load_images(str(tmp_path))
    assert len(load_images(str(tmp_path), label_column="none")) == 5  # without classes there is no question
    assert len(open_images(tmp_path)) == 5


def test_metadata_beside_class_folders_changes_no_classes(tmp_path):
    make_tree(tmp_path, {"cat": 2, "dog": 1})
    captions = {"cat/0.png": "a cat", "cat/1.png": "a second cat", "dog/0.png": "a dog"}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    dataset = load_images(str(tmp_path))
    assert describe_images(dataset) == "3 images, 2 classes: cat 2, dog 1"
    assert dataset.column_names == ["image", "label"]
    assert load_images(str(tmp_path), text_column="text")["text"][:] == list(captions.values())


def test_captions_beside_the_images(tmp_path):
    make(tmp_path, "a.png", "a.txt", "b.jpg", "b.txt", "10.png", "10.txt")
    (tmp_path / "b.txt").write_text("\ufeffein Bär\n", encoding="utf-8")
    dataset = load_images(str(tmp_path))
    assert describe_images(dataset) == "3 images, unconditional: no sub-folders"
    dataset = load_images(str(tmp_path), text_column="caption")
    assert files(dataset, tmp_path) == ["10.png", "a.png", "b.jpg"]
    assert dataset["caption"][:] == ["a line of text", "a line of text", "ein Bär"]
    (tmp_path / "a.txt").unlink()
    assert len(load_images(str(tmp_path))) == 3  # who asks for no captions, misses none
    with pytest.raises(ValueError, match=r"caption for each image .* none for 1 of 3: a.png"):
        load_images(str(tmp_path), text_column="caption")


# Classes


@pytest.mark.parametrize("names", [["1", "2", "10", "11"], ["img2", "img10"], ["B", "a", "ä"], ["01", "1", "001 b"]])
def test_numbers_in_numeric_order(tmp_path, names):
    make_tree(tmp_path, dict.fromkeys(names, 1))
    assert class_names(load_images(str(tmp_path))) == sorted(names, key=natural_key)
    assert names[-1] == "001 b" or sorted(names, key=natural_key) == names


@given(st.data(), st.lists(st.text(st.characters(codec="ascii"), max_size=6)))
def test_any_names_have_an_order(data, names):
    ordered = sorted(names, key=natural_key)
    assert ordered == sorted(data.draw(st.permutations(names)), key=natural_key)
    numbers = [name for name in ordered if name.isdigit()]
    assert numbers == sorted(numbers, key=lambda name: (int(name), name))


NAMES = st.text("abtrainTES019 _-.é", min_size=1, max_size=8).filter(
    lambda name: not name.startswith(".") and name.strip(". ")
)
TREES = st.dictionaries(
    NAMES.map(str.lower), st.lists(NAMES, min_size=1, max_size=3, unique_by=str.lower), min_size=2, max_size=4
)


@settings(max_examples=30)
@given(tree=TREES, deeper=NAMES, is_nested=st.booleans())
def test_every_image_of_any_tree_counts(tmp_path_factory, tree, deeper, is_nested):
    """Whatever folders and files are called, every image is there, with its folder as its class."""
    words = {"train", "test", "tests"}
    tree = {name: images for name, images in tree.items() if name not in words} | {"bus": ["train"], "train": ["bus"]}
    folder = tmp_path_factory.mktemp("tree")
    inside = f"{deeper}/" if is_nested else ""
    expected = [f"{name}/{inside}{image}.png" for name, images in tree.items() for image in images]
    make(folder, *expected)
    dataset = load_images(str(folder))
    assert sorted(files(dataset, folder)) == sorted(expected)
    names = class_names(dataset)
    assert names == sorted(tree, key=natural_key)
    for name, label in zip(files(dataset, folder), dataset["label"]):
        assert name.split("/")[0] == names[label]
    assert class_counts(dataset, "label").tolist() == [len(tree[name]) for name in names]
    assert len(load_images(str(folder), label_column=None)) == len(expected)


def test_deeper_images_belong_to_the_first_sub_folder(tmp_path):
    make(tmp_path, "cat/1.png", "cat/more/2.png", "cat/more/still/3.png", "dog/deep/4.png")
    assert describe_images(load_images(str(tmp_path))) == "4 images, 2 classes: cat 3, dog 1"


def test_a_folder_that_holds_nothing_but_a_folder_is_passed_through(tmp_path):
    make_tree(tmp_path / "download", {"data/images/cat": 2, "data/images/dog": 1})
    assert describe_images(load_images(str(tmp_path))) == (
        "3 images, 2 classes: cat 2, dog 1; in download/data/images/"
    )
    make_tree(tmp_path / "download" / "cats" / "all", {"cat": 2})
    described = describe_images(load_images(str(tmp_path / "download" / "cats")))
    assert described == "2 images, unconditional: no sub-folders in all/cat/"


def test_what_else_lies_there_is_said(tmp_path):
    make_tree(tmp_path, {"cat": 2, "dog": 1})
    make(
        tmp_path,
        "notes.pdf",
        "cat/Thumbs.db",
        ".DS_Store",
        "__MACOSX/cat/._0.png",
        ".ipynb_checkpoints/0.png",
        "cat/.0.png",
    )
    (tmp_path / "cow").mkdir()
    described = "3 images, 2 classes: cat 2, dog 1; no images in cow; other files: notes.pdf"
    assert describe_images(load_images(str(tmp_path))) == described


def test_links_are_followed(tmp_path):
    make_tree(tmp_path / "elsewhere", {"cat": 2})
    make_tree(tmp_path / "data", {"dog": 1})
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "data" / "dog" / "self").symlink_to(tmp_path / "data")  # not forever
    assert describe_images(load_images(str(tmp_path / "data"))) == "3 images, 2 classes: cat 2, dog 1"


def test_many_classes_are_shortened(tmp_path):
    make_tree(tmp_path, {f"n{i:04d}": 1 + i % 2 for i in range(30)})
    described = "45 images, 30 classes: n0000 1, n0001 2, n0002 1, … (26 more), n0029 2; 1 to 2 images in a class"
    assert describe_images(load_images(str(tmp_path))) == described


# Splits


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "validation", "testing")])
def test_a_tree_of_splits(tmp_path, words):
    for count, word in enumerate(words, 1):
        make_tree(tmp_path / word, {"n02": count, "n10": 1})
    described = describe_images(load_images(str(tmp_path)))
    assert described == f"2 images, 2 classes: n02 1, n10 1; in {words[0]}/; other splits: " + (
        ", ".join(sorted([f"{words[1]}/ (3)", f"{words[2]}/ (4)"], key=lambda split: natural_key(split.split(" ")[0])))
    )
    described = describe_images(load_images(str(tmp_path), split="val", label_column=None), None)
    assert described.startswith(f"3 images; in {words[1]}/; other splits: ")
    assert len(load_images(str(tmp_path), split="test")) == 4
    assert len(load_images(str(tmp_path), split="val")) == len(load_images(str(tmp_path), split="validation")) == 3
    assert len(load_images(str(tmp_path), split="train+test")) == 6
    assert len(load_images(str(tmp_path), split="val[:1]+train")) == 3
    assert len(load_images(str(tmp_path), split="all")) == 9
    assert len(load_images(str(tmp_path), split="test[:50%]")) == 2
    with pytest.raises(ValueError, match="to be one of .*, but got 'nowhere'"):
        load_images(str(tmp_path), split="nowhere")


def test_splits_of_other_classes_are_not_added(tmp_path):
    make_tree(tmp_path / "train", {"cat": 1, "dog": 1})
    make_tree(tmp_path / "test", {"cat": 1, "cow": 1})
    with pytest.raises(ValueError, match="all splits .* the same sub-folders, but got cat, dog and cat, cow"):
        load_images(str(tmp_path), split="train+test")


def test_classes_called_like_splits_are_not_guessed(tmp_path):
    make_tree(tmp_path, {"train": 1, "test": 1, "masks": 1})
    with pytest.raises(
        ValueError, match="for each of the splits .*, but got masks, test, train. Give the folder of one"
    ):
        load_images(str(tmp_path))
    rows = [{"file_name": f"{name}/0.png", "label": name} for name in ("train", "test", "masks")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    described = "3 images, 3 classes: masks 1, test 1, train 1; labels of metadata.jsonl"
    assert describe_images(load_images(str(tmp_path))) == described


def test_a_folder_without_splits_has_no_other(tmp_path):
    make_tree(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match="to be one of train, but got 'validation'"):
        load_images(str(tmp_path), split="val")
    assert len(load_images(str(tmp_path), split="train[1:]")) == 1


# Labels and captions of metadata


def write_rows(path: Path, *rows: dict) -> None:
    if path.suffix == ".csv":
        names = list(rows[0])
        lines = [names, *([str(row[name]) for name in names] for row in rows)]
        path.write_text("\n".join(",".join(line) for line in lines))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_labels_of_metadata(tmp_path, kind):
    make(tmp_path, "shard1/a.png", "b.png", "shard2/c.png")
    rows = [{"file_name": "b.png", "breed": "pug"}, {"file_name": "shard1/a.png", "breed": "akita"}]
    rows += [{"file_name": "shard2/c.png", "breed": "pug"}]
    write_rows(tmp_path / f"metadata.{kind}", *rows)
    described = describe_images(load_images(str(tmp_path), label_column="breed"), "breed")
    assert described == f"3 images, 2 classes: akita 1, pug 2; labels of metadata.{kind}"
    with pytest.raises(
        ValueError, match=r"`label_column` to be 'label', for the sub-folders .*\['breed'\].*but got 'bread'"
    ):
        load_images(str(tmp_path), label_column="bread")


def test_metadata_in_each_folder(tmp_path):
    make(tmp_path, "one/a.png", "two/a.png")
    write_rows(tmp_path / "one" / "metadata.jsonl", {"file_name": "a.png", "label": 1})
    write_rows(tmp_path / "two" / "metadata.jsonl", {"file_name": "a.png", "label": 0})
    dataset = load_images(str(tmp_path))
    assert dataset["label"][:] == [1, 0] and class_names(dataset) == ["0", "1"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"file_name": "a.png", "label": 1}], r"a 'label' for each image, but got none for 1 of 2: b.png"),
        ([{"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": None}], "none for 1 of 2: b.png"),
        ([{"file_name": f"{n}.png", "label": 1} for n in "abc"], "to be an image there, but got c.png"),
        ([{"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "1"}], "1 for a.png and '1' for b.png"),
        ([{"file_name": "a.png", "label": 1}] * 2, "a second for a.png in .*metadata.jsonl, line 2"),
        ([{"name": "a.png", "label": 1}], "to have a `file_name`, but got none in .*metadata.jsonl, line 1"),
        ([{"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": -1}], "got -1 in row 1"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit(tmp_path, rows, message):
    make(tmp_path, "a.png", "b.png")
    write_rows(tmp_path / "metadata.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path))


def test_metadata_that_is_none(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name"')
    with pytest.raises(ValueError, match="metadata.jsonl' to be UTF-8 text with one row in each line"):
        load_images(str(tmp_path))


# What is no folder of images


def test_images_and_parquet(tmp_path):
    make_tree(tmp_path / "images", {"cat": 1, "dog": 1})
    load_images(str(tmp_path / "images")).to_parquet(tmp_path / "part.parquet")
    with pytest.raises(
        ValueError, match=r"or of parquet files, but got both: images/cat/0.png, images/dog/0.png and part.parquet"
    ):
        load_images(str(tmp_path))


@pytest.mark.parametrize("name", ["archive.zip", "samples.npz", "shard-00000.tar", "photo.png"])
def test_what_is_neither_is_named(tmp_path, name):
    make(tmp_path / "folder", name)
    if name != "photo.png":
        with pytest.raises(ValueError, match=rf"but got none of them: it has {Path(name).suffix}. Archives have"):
            load_images(str(tmp_path / "folder"))
    with pytest.raises(ValueError, match=f"parquet files, but got '.*{name}', which is none"):
        load_images(str(tmp_path / "folder" / name))


def test_formats_that_nobody_reads_are_not_passed_over(tmp_path):
    make(tmp_path, "a.png", "b.HEIC")
    with pytest.raises(ValueError, match="1 of 2 are not: row 1: .*b.HEIC: Pillow knows no such image"):
        open_images(tmp_path)


def test_words_in_the_names_of_parquet_files(tmp_path):
    images = load_images(str(make_tree(tmp_path / "images", {"cat": 4, "dog": 4})))
    (tmp_path / "mine").mkdir()
    for part, name in enumerate(["bus", "my_train", "old-test-photos", "10"]):
        images.select(range(2 * part, 2 * part + 2)).to_parquet(tmp_path / "mine" / f"{name}.parquet")
    dataset = load_images(str(tmp_path / "mine"))
    assert describe_images(dataset) == "8 images, 2 classes: cat 4, dog 4"
    (tmp_path / "mine" / "10.parquet").rename(tmp_path / "mine" / "train.parquet")
    with pytest.raises(
        ValueError, match="names that begin with train, validation or test, or none, but got bus.parquet"
    ):
        load_images(str(tmp_path / "mine"))


def test_splits_of_parquet_files(tmp_path):
    images = load_images(str(make_tree(tmp_path / "images", {"cat": 4, "dog": 4})))
    (tmp_path / "data").mkdir()
    for part, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "val"]):
        images.select(range(part * 2)).to_parquet(tmp_path / "data" / f"{name}.parquet")
    sizes = {"train": 2, "test": 4, "validation": 6, "train+test": 6, "test[1:3]": 2}
    assert {split: len(load_images(str(tmp_path / "data"), split=split)) for split in sizes} == sizes


def test_a_copy_of_a_repository_says_itself_what_its_files_are(tmp_path):
    images = load_images(str(make_tree(tmp_path / "images", {"cat": 1, "dog": 1})))
    (tmp_path / "copy").mkdir()
    for name in ("one", "two"):
        images.to_parquet(tmp_path / "copy" / f"{name}.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two.parquet\n---\n# Photos\n"
    (tmp_path / "copy" / "README.md").write_text(card)
    assert len(load_images(str(tmp_path / "copy"))) == 2


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(ValueError, match="a folder or file, but there is none"):
            load_images(str(name))


def test_latents_and_images_are_told_apart(tmp_path):
    datasets.Dataset.from_dict({"latents": [b""], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    dataset = load_images(str(tmp_path))
    assert describe_images(dataset) == "1 latent, 1 class: 0 1"
    assert describe_images(dataset, "none") == "1 latent, unconditional: no labels asked for"


def test_hidden_files_do_not_count(tmp_path):
    make(tmp_path, ".hidden/a.png", "@eaDir/a.png", "a.png")
    assert list_files(str(tmp_path)).images == ["a.png"]


def test_without_labels_a_mixture_of_splits_and_others_is_one_split(tmp_path):
    """As evaluation reads it, too; folders that are all called like splits stay splits."""
    mixed = str(make_tree(tmp_path / "mixed", {"bus": 3, "train": 2, "test": 1}))
    with pytest.raises(ValueError, match="for each of the splits .* or train without classes: `--label_column none`"):
        load_images(mixed)
    dataset = load_images(mixed, label_column="none")
    assert describe_images(dataset, "none") == "6 images, unconditional: no labels asked for"
    assert len(load_images(mixed, label_column=None)) == 6
    splits = str(make_tree(tmp_path / "splits", {"train": 2, "test": 1}))
    assert [len(load_images(splits, split=each, label_column=None)) for each in ("train", "test")] == [2, 1]
