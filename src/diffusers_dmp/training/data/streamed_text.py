"""Encoded images and captions as a stream, for data sets that are larger than a disk.

The files are read in a random order, split among the processes, and shuffled in blocks: a block of rows is read, permuted, and
cut into the samples of steps. The state of the stream at the beginning of a block is a part of checkpoints, so that a run that is
resumed reads that block again, and goes on with the same batches.

Legend: B batch size of one optimiser step over all processes, b that of one micro-batch, n = B / processes.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import nn

from ..arguments import LoopArguments
from .encoded_rows import collate
from .encoded_source import check_encodings_agree, check_mirror_images, load_encoded, read_encoding
from .encoded_text import EncodedText
from .loop_data import Batch
from .streamed_rows import Sample, StreamedShards, list_shards, sample_of

STATE_NAME = "stream_{}"  # of a process, in a checkpoint

logger = logging.getLogger(__name__)


@dataclass
class Block:
    """
    Rows that are shuffled together.

    Args:
        epoch (`int`), number (`int`): Which block it is.
        state (`dict[str, Any]`): The stream's before it; empty at the beginning of an epoch.
        samples (`list[Sample]`): In the order in which they were read; fewer at the end of an epoch.
    """

    epoch: int
    number: int
    state: dict[str, Any]
    samples: list[Sample]


@dataclass
class StreamPosition:
    """
    Where a process is in its stream.

    Args:
        epoch (`int`), block (`int`): The block that it takes samples from; blocks are counted within an epoch.
        stream (`dict[str, Any]`): The stream's state before that block.
        steps (`int`): The steps that it has taken of the block.
        waiting (`list[Sample]`): Samples of earlier blocks, before the first of those steps.
    """

    epoch: int = 0
    block: int = 0
    stream: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    waiting: list[Sample] = field(default_factory=list)


class TextStream:
    """
    A process's samples, n for each step, without an end.

    Samples of one size are collected until there are n of them. What is left of a block waits for the next, so that no sample is
    left out, and none repeated before the next epoch.

    Args:
        shards ([`StreamedShards`]): What is read.
        seed (`int`): Of the order.
        block_size (`int`): The number of rows that are shuffled together; another block is read meanwhile.
        process (`int`), num_processes (`int`): Whose share of the rows.
    """

    def __init__(self, shards: StreamedShards, seed: int, block_size: int, process: int, num_processes: int):
        self.shards = shards
        self.seed = seed
        self.block_size = block_size
        self.process = process
        self.num_processes = num_processes
        self.position = StreamPosition()

    def steps(self, count: int) -> Iterator[list[Sample]]:
        """The samples of one step after another, each `count` of one size, from the position on."""
        waiting = list(self.position.waiting)
        done = self.position.steps
        for block in self._read_ahead():
            self.position = StreamPosition(block.epoch, block.number, block.state, 0, list(waiting))
            order = np.random.default_rng([self.seed, block.epoch, self.process, block.number])
            waiting += [block.samples[index] for index in order.permutation(len(block.samples))]
            sizes = list(dict.fromkeys(size for size, _ in waiting))
            groups = {size: [sample for sample in waiting if sample[0] == size] for size in sizes}
            full = [
                group[start : start + count]
                for group in groups.values()
                for start in range(0, len(group) - count + 1, count)
            ]
            waiting = [sample for group in groups.values() for sample in group[len(group) // count * count :]]
            for index in order.permutation(len(full)).tolist():
                self.position.steps += 1
                if self.position.steps > done:
                    yield full[index]
            done = 0

    def _read_ahead(self) -> Iterator[Block]:
        """Blocks from the position on; while one is used, a thread reads the next."""
        blocks = self._blocks()
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(next, blocks)
            while True:
                block = upcoming.result()
                upcoming = reader.submit(next, blocks)
                yield block

    def _blocks(self) -> Iterator[Block]:
        epoch, number, state = self.position.epoch, self.position.block, self.position.stream
        while True:
            rows = self.shards.rows(self.seed, epoch, self.process, self.num_processes)
            if state:
                rows.load_state_dict(state)
            reader = iter(rows)
            has_any = number > 0
            while True:
                state = rows.state_dict() if number else {}
                samples = [sample_of(row) for row in islice(reader, self.block_size)]
                if not samples:
                    break
                has_any = True
                yield Block(epoch, number, state, samples)
                number += 1
            if not has_any:
                raise ValueError(
                    f"Expected {self.shards.source!r} to have rows for each of {self.num_processes} processes, but process "
                    f"{self.process} got none."
                )
            epoch, number, state = epoch + 1, 0, {}

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        """Write this process's position into a checkpoint, as a hook of Accelerate."""
        path = Path(output_dir, STATE_NAME.format(self.process))
        os.makedirs(output_dir, exist_ok=True)
        position = self.position
        record = {
            "num_processes": self.num_processes,
            "epoch": position.epoch,
            "block": position.block,
            "stream": position.stream,
            "steps": position.steps,
            "sizes": [size for size, _ in position.waiting],
        }
        path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
        waiting = {
            f"{i}/{name}": tensor for i, (_, sample) in enumerate(position.waiting) for name, tensor in sample.items()
        }
        save_file(waiting, path.with_suffix(".safetensors"))

    def load(self, models: list[nn.Module], input_dir: str) -> None:
        """
        Go on from a checkpoint, as a hook of Accelerate.

        Raises:
            ValueError: if it is another number of processes'.
        """
        path = Path(input_dir, STATE_NAME.format(0)).with_suffix(".json")
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if record.get("num_processes") != self.num_processes:
            raise ValueError(
                f"Expected as many processes as {input_dir} was written by, {record.get('num_processes')}, since each has its place in "
                f"the stream, but got {self.num_processes}."
            )
        path = Path(input_dir, STATE_NAME.format(self.process))
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        waiting: list[Sample] = [((height, width), {}) for height, width in record["sizes"]]
        for key, tensor in load_file(path.with_suffix(".safetensors")).items():
            index, _, name = key.partition("/")
            waiting[int(index)][1][name] = tensor
        self.position = StreamPosition(record["epoch"], record["block"], record["stream"], record["steps"], waiting)


@dataclass(kw_only=True)
class StreamedText(EncodedText):
    """
    A stream of encoded images and captions to train on; held-out ones are not streamed.

    All samples of a step have one size in each process, but the processes' may differ.

    Args:
        training ([`StreamedShards`]): The training data.
        validation ([`Encoded`], *optional*): Held-out data of the same encoding.
        stream ([`TextStream`]): This process's samples.
    """

    training: StreamedShards  # type: ignore[assignment]
    stream: TextStream

    def training_batches(self, accelerator: Accelerator, args: LoopArguments, first_step: int) -> Iterator[Batch]:
        """Micro-batches of the stream from its position on, which a resumed checkpoint has set; see [`LoopData`]."""
        count = args.batch_size // accelerator.num_processes
        micro_batch = count // args.gradient_accumulation_steps
        for samples in self.stream.steps(count):
            for start in range(0, count, micro_batch):
                yield collate([sample for _, sample in samples[start : start + micro_batch]])


def load_streamed_text(accelerator: Accelerator, args: LoopArguments, shuffle_buffer_size: int) -> StreamedText:
    """
    Open encoded images and captions as a stream, and set the seed of all global random states.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        args ([`LoopArguments`]): Names the data sets.
        shuffle_buffer_size (`int`): The number of rows that a process shuffles together.

    Raises:
        ValueError: if a data set is not what `encode_prompts.py` wrote, lacks the mirror images that `random_flip` needs, or if the
            held-out data have another encoding.
    """
    set_seed(args.seed)  # for new weights, and the model's own dropout
    source = os.path.expanduser(args.dataset)
    encoding, empty_prompt = read_encoding(source)
    check_mirror_images(encoding, args)
    training = StreamedShards(source=source, files=list_shards(source), encoding=encoding, empty_prompt=empty_prompt)
    validation = None
    if args.validation_dataset is not None:
        with accelerator.main_process_first():
            validation = load_encoded(args.validation_dataset, args.validation_split)
        check_encodings_agree(training, validation)  # type: ignore[arg-type]
    stream = TextStream(training, args.seed, shuffle_buffer_size, accelerator.process_index, accelerator.num_processes)
    accelerator.register_save_state_pre_hook(stream.save)
    accelerator.register_load_state_pre_hook(stream.load)
    if accelerator.is_main_process:
        logger.warning(
            "Streaming: the order depends on the number of processes, with which the run has to be resumed, and samples are shuffled "
            "in blocks of %d rows.",
            shuffle_buffer_size,
        )
    return StreamedText(training=training, validation=validation, stream=stream)
