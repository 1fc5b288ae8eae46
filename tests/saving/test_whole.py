"""Files and folders that get their names when they are complete."""

import os
from pathlib import Path

import pytest

from diffusers_dmp.saving.reading import read_json
from diffusers_dmp.saving.whole import finish, unfinished_path, write_json, written_whole


def make_folder(path: Path, **files: str) -> None:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)


def test_a_file_keeps_its_old_content_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "deep" / "model.json"
    with written_whole(path) as unfinished:
        unfinished.write_text("old")
    with pytest.raises(OSError, match="No space"), written_whole(path) as unfinished:
        unfinished.write_text("ne")
        raise OSError("No space left on device")
    assert path.read_text() == "old"
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["model.json"]


def test_json_keeps_its_old_content_if_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"step": 10})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"step": 20, "loss": object()})
    assert read_json(path) == {"step": 10} and os.listdir(tmp_path) == ["record.json"]


def test_a_folder_replaces_another_one_and_nothing_of_either_is_mixed(tmp_path):
    path = tmp_path / "pipeline"
    make_folder(path, old="1")
    make_folder(unfinished_path(path), of_a_killed_run="2")
    with written_whole(path) as unfinished:
        make_folder(unfinished, new="3")
    assert os.listdir(path) == ["new"] and os.listdir(tmp_path) == ["pipeline"]


def test_contents_are_on_the_disk_before_the_name_is_there(tmp_path, monkeypatch):
    """What a power failure would show: `fsync` of every file and folder comes before the renaming, that of the parent after it."""
    path = tmp_path / "checkpoint-1"
    make_folder(unfinished_path(path), a="1")
    make_folder(unfinished_path(path) / "sub", b="2")
    files = [unfinished_path(path), *unfinished_path(path).rglob("*")]
    expected = {file.stat().st_ino for file in files}
    events, real = [], (os.fsync, Path.replace)

    def fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        real[0](descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append("renamed")
        return real[1](self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    finish(path)
    assert len(files) == 4 and set(events[: events.index("renamed")]) == expected
    assert events[-1] == tmp_path.stat().st_ino and sorted(os.listdir(path)) == ["a", "sub"]


def test_a_kill_between_the_two_renamings_leaves_the_new_folder_complete(tmp_path, monkeypatch):
    path = tmp_path / "pipeline"
    make_folder(path, old="1")

    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt), written_whole(path) as unfinished:
            make_folder(unfinished, new="2")
    assert not path.exists() and os.listdir(unfinished_path(path)) == ["new"]
    with written_whole(path) as unfinished:
        make_folder(unfinished, new="3")
    assert (path / "new").read_text() == "3" and os.listdir(tmp_path) == ["pipeline"]
