"""A stream has every sample once in an epoch, split among processes, and is resumed where it was."""

import io
import json
import tarfile
from itertools import islice

import datasets
import pytest
import torch

from diffusers_dmp.training.data.encoded_rows import FEATURES, to_bytes
from diffusers_dmp.training.data.streamed_rows import StreamedShards, list_shards
from diffusers_dmp.training.data.streamed_text import TextStream

NUM_ROWS = 60
SIZES = [(8, 8), (8, 16)]  # two thirds of the rows have the first
TALL = range(0, NUM_ROWS, 3)


def row(index: int) -> dict:
    height, width = SIZES[index in TALL]
    latents = torch.full((1, 1, height // 8, width // 8), float(index))
    return {
        "latents": to_bytes({"mean": latents, "std": latents.clone()}),
        "prompt": to_bytes({"prompt_embeds": torch.full((1 + index % 3, 4), float(index))}),
        "caption": str(index), "height": height, "width": width,
    }  # fmt: skip


def shards_of(folder, num_files, kind="parquet"):
    folder.mkdir()
    for number in range(num_files):
        rows = [row(index) for index in range(number, NUM_ROWS, num_files)]
        if kind == "parquet":
            datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{number}.parquet")
        else:
            write_tar(folder / f"{number}.tar", rows)
    return StreamedShards(
        source=str(folder), files=list_shards(str(folder)), encoding={"num_images": NUM_ROWS}, empty_prompt={}
    )


def write_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for each in rows:
            rest = json.dumps({name: each[name] for name in ("caption", "height", "width")}).encode()
            for name, data in (("latents", each["latents"]), ("prompt", each["prompt"]), ("json", rest)):
                member = tarfile.TarInfo(f"{each['caption']}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return shards_of(tmp_path_factory.mktemp("shards") / "of_four", 4)


def stream(shards, process=0, num_processes=1, block_size=10, seed=0):
    return TextStream(shards, seed, block_size, process, num_processes)


def indices(samples) -> list[int]:
    return [int(columns["mean"].mean()) for _, columns in samples]


def taken(stream, num_steps, count=4):
    return [indices(samples) for samples in islice(stream.steps(count), num_steps)]


def test_an_epoch_has_every_sample_once_and_each_step_one_size(shards):
    steps = taken(stream(shards), 2 * NUM_ROWS // 4)
    seen = sum(steps, [])
    counts = [seen.count(index) for index in range(NUM_ROWS)]
    assert (
        set(counts) <= {1, 2, 3} and counts.count(2) > 0.9 * NUM_ROWS
    )  # of the third epoch, a few may be there already
    assert all(len({index in TALL for index in step}) == 1 for step in steps)
    assert seen[:20] != sorted(seen[:20])


def test_epochs_and_seeds_have_orders_of_their_own(shards):
    first, second = (taken(stream(shards, seed=seed), 30) for seed in (0, 1))
    assert first == taken(stream(shards), 30) and first != second
    assert first[:15] != first[15:]


@pytest.mark.parametrize("num_files", [1, 4])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_rows_without_overlap_and_gap(tmp_path, num_files, num_processes):
    """Whole files where they divide among the processes, rows otherwise."""
    shards = shards_of(tmp_path / "shards", num_files)
    own = [
        [
            index
            for process_row in shards.rows(0, epoch, process, num_processes)
            for index in [int(process_row["caption"])]
        ]
        for epoch in (0, 1)
        for process in range(num_processes)
    ]
    for epoch in (own[:num_processes], own[num_processes:]):
        assert sorted(sum(epoch, [])) == list(range(NUM_ROWS))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("num_steps", [1, 7, 16])
def test_a_resumed_stream_goes_on_with_the_same_steps(tmp_path, kind, num_steps):
    """Within a block, with samples that wait for others of their size, and beyond the first epoch."""
    shards = shards_of(tmp_path / "shards", 3, kind)
    whole, first, second = (stream(shards, 1, 2) for _ in range(3))
    expected = taken(whole, num_steps + 20, 3)
    steps = first.steps(3)
    begun = [indices(next(steps)) for _ in range(num_steps)]
    first.save([], [], str(tmp_path / "checkpoint"))
    # the record of process 0 says how many processes there were
    stream(shards, 0, 2).save([], [], str(tmp_path / "checkpoint"))
    second.load([], str(tmp_path / "checkpoint"))
    assert begun + taken(second, 20, 3) == expected
    resumed = next(stream(shards, 1, 2).steps(3))
    assert all(columns.keys() == {"mean", "std", "prompt_embeds"} for _, columns in resumed)


def test_another_number_of_processes_does_not_resume(shards, tmp_path):
    stream(shards, 0, 2).save([], [], str(tmp_path))
    with pytest.raises(ValueError, match=r"as many processes as .* was written by, 2, .* but got 1"):
        stream(shards).load([], str(tmp_path))


def test_a_process_without_rows(tmp_path):
    shards = shards_of(tmp_path / "shards", 1)
    with pytest.raises(ValueError, match="to have rows for each of 100 processes, but process 99 got none"):
        taken(stream(shards, 99, 100), 1, 1)


def test_there_have_to_be_files(tmp_path):
    with pytest.raises(ValueError, match=r"to have files \*.parquet or \*.tar to stream"):
        list_shards(str(tmp_path))
