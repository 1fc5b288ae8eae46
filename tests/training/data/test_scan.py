"""All images are looked at before the first step, once."""

import os
from pathlib import Path

import PIL.Image
import pytest
from runs import train_here

from diffusers_dmp import DiTModel
from diffusers_dmp.training.data import scan
from diffusers_dmp.training.data.images import describe_images, load_images
from diffusers_dmp.training.data.scan import readable_images


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve photos in two classes, three of them damaged."""
    for i in range(12):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.effect_noise((40, 40), 50).save(path)
        if i in (3, 4, 7):
            path.write_bytes(path.read_bytes()[:600])
    return tmp_path / "photos"


@pytest.fixture
def looked_at(monkeypatch) -> list[str]:
    """The names of the files that were decoded."""
    names, probe = [], scan.probe_image

    def remember(encoded):
        names.append(os.path.basename(encoded["path"] or "in a table"))
        return probe(encoded)

    monkeypatch.setattr(scan, "probe_image", remember)
    return names


def test_all_unreadable_images_are_named(photos):
    with pytest.raises(
        ValueError,
        match="3 of 12 are not: row 1: .*3.jpg: .*truncated.*; row 3: .*7.jpg.*row 8: .*4.jpg.*--skip_unreadable",
    ):
        readable_images(load_images(str(photos)))


def test_skipped_images_are_listed(photos, capsys):
    dataset = readable_images(load_images(str(photos)), skip_unreadable=True)
    assert describe_images(dataset) == "9 images, 2 classes: cat 4, dog 5"
    said = capsys.readouterr().err
    assert "Skipped, as they cannot be read: 3 of 12 images" in said and all(
        f"{name}.jpg: " in said for name in (3, 4, 7)
    )
    assert len(readable_images(load_images(str(photos)), skip_unreadable=True, is_quiet=True)) == 9
    assert not capsys.readouterr().err


def test_nothing_is_left(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="but none is: row 0"):
        readable_images(load_images(str(tmp_path)), skip_unreadable=True)


def test_what_was_looked_at_is_remembered(photos, looked_at):
    readable_images(load_images(str(photos)), skip_unreadable=True)
    assert len(looked_at) == 12
    looked_at.clear()
    readable_images(load_images(str(photos)), skip_unreadable=True)
    assert sorted(looked_at) == ["3.jpg", "4.jpg", "7.jpg"]  # perhaps they were replaced

    for name in ("cat/3", "dog/4", "cat/7"):
        PIL.Image.effect_noise((40, 40), 50).save(photos / f"{name}.jpg")
    os.utime(photos / "dog" / "0.jpg", (1, 1))
    PIL.Image.effect_noise((40, 40), 50).save(photos / "dog" / "new.jpg")
    looked_at.clear()
    readable_images(load_images(str(photos)))
    assert sorted(looked_at) == ["0.jpg", "3.jpg", "4.jpg", "7.jpg", "new.jpg"]
    looked_at.clear()
    assert len(readable_images(load_images(str(photos)))) == 13
    assert not looked_at


def test_an_interrupted_look_goes_on(photos, looked_at, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 4)
    probe = scan.probe_image

    def interrupted(encoded):
        if encoded["path"].endswith("10.jpg"):
            raise KeyboardInterrupt
        return probe(encoded)

    monkeypatch.setattr(scan, "probe_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        readable_images(load_images(str(photos)), skip_unreadable=True)
    monkeypatch.setattr(scan, "probe_image", probe)
    looked_at.clear()
    readable_images(load_images(str(photos)), skip_unreadable=True)
    assert 3 < len(looked_at) < 12


def test_tables_are_remembered_too(photos, tmp_path, looked_at):
    good = readable_images(load_images(str(photos)), skip_unreadable=True)
    good.to_parquet(tmp_path / "good.parquet")
    looked_at.clear()
    for _ in range(2):
        assert len(readable_images(load_images(str(tmp_path / "good.parquet")))) == 9
    assert len(looked_at) == 9


def test_the_cache_may_be_read_only(photos, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    assert len(readable_images(load_images(str(photos)), skip_unreadable=True)) == 9
    assert "is not remembered" in caplog.text


def test_animations_are_said(tmp_path, capsys):
    frames = [PIL.Image.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    readable_images(load_images(str(tmp_path)))
    assert "Of 1 of 1 images, which have several frames, the first is used" in capsys.readouterr().err


def test_a_training_begins_with_it(photos, tmp_path, capsys):
    """Refused before the first step, in training as in validation; or without those images, and said so."""
    with pytest.raises(ValueError, match=f"Expected '{photos}' to hold readable images, but 3 of 12 are not"):
        train_here(DiTModel, photos, tmp_path / "run")
    good = tmp_path / "good" / "cat"
    good.mkdir(parents=True)
    PIL.Image.new("L", (8, 8)).save(good / "a.png")
    with pytest.raises(ValueError, match=f"Expected '{photos}' to hold readable images, but 3 of 12 are not"):
        train_here(DiTModel, good.parent, tmp_path / "run", validation_dataset=str(photos))
    assert not (tmp_path / "run").exists()
    train_here(
        DiTModel, photos, tmp_path / "run", skip_unreadable=True, max_train_steps=1, validation_dataset=str(photos)
    )
    assert capsys.readouterr().err.count("photos: 9 images, 2 classes: cat 4, dog 5\n") == 2
