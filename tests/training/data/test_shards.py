"""Shards that a killed run or a bad copy left damaged."""

import logging
from pathlib import Path

import datasets
import pytest

from diffusers_dmp.training.data.images import load_images
from diffusers_dmp.training.data.shards import make_shard_accelerator, write_shards


def write(folder: Path) -> list[range]:
    """Ten rows in three shards; returns those that were made."""
    made = []

    def make_shard(rows: range, progress) -> datasets.Dataset:
        made.append(rows)
        return datasets.Dataset.from_dict({"image": [b"pixels"] * len(rows), "row": list(rows)})

    write_shards(make_shard_accelerator(), folder, 10, 4, make_shard, "Making")
    return made


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_damaged_shards_are_written_again_and_whole_ones_kept(tmp_path, caplog):
    assert len(write(tmp_path)) == 3
    shards = sorted(tmp_path.glob("*.parquet"))
    whole = [shard.read_bytes() for shard in shards]
    cut(shards[0])
    shards[2].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert write(tmp_path) == [range(4), range(8, 10)]
    assert [str(shard) in caplog.text for shard in shards] == [True, False, True]
    assert [shard.read_bytes() for shard in shards] == whole
    assert not write(tmp_path)


def test_a_shard_with_other_rows_is_written_again(tmp_path):
    write(tmp_path)
    shards = sorted(tmp_path.glob("*.parquet"))
    shards[0].write_bytes(shards[2].read_bytes())  # two rows instead of four
    assert write(tmp_path) == [range(4)]


def test_reading_names_the_damaged_file(tmp_path):
    write(tmp_path)
    shard = sorted(tmp_path.glob("*.parquet"))[1]
    cut(shard)
    for source in (tmp_path, shard):
        with pytest.raises(ValueError, match=f"{shard}' to be a whole parquet file, but it is cut off"):
            load_images(str(source))


def test_an_error_in_writing_is_raised(tmp_path, monkeypatch):
    """Also that of the last shard, and what was whole before stays."""

    def make_shard(rows: range, progress) -> datasets.Dataset:
        made = datasets.Dataset.from_dict({"row": list(rows)})
        if rows.stop == 4:

            def fail(path):
                raise OSError("no space left")

            monkeypatch.setattr(made, "to_parquet", fail)
        return made

    with pytest.raises(OSError, match="no space left"):
        write_shards(make_shard_accelerator(), tmp_path, 4, 2, make_shard, "Testing")
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000-of-00002.parquet"]
