"""Images and captions, encoded once by a pipeline's own VAE and text encoders, in parquet shards that training reads."""

import sys
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
from tqdm.auto import tqdm

from ...models.precision import check_dtype, dtype_named
from ...saving.reading import read_json
from ...saving.whole import written_whole
from ..text_pipelines import text_pipeline_of
from .buckets import Size, aspect_ratio_buckets
from .captions import captions_of
from .encoding_pipeline import check_vae, load_encoding_pipeline
from .encoding_record import (
    COMPONENTS,
    EMPTY_PROMPT_NAME,
    ENCODING_NAME,
    absolute_source,
    check_components,
    component_record,
    encoders_of,
)
from .images import load_images
from .prompt_encoder import Encoder, PromptEncodingArguments
from .scan import readable_images
from .shards import make_shard_accelerator, remember_settings, write_shards


def encode_prompts(args: PromptEncodingArguments, pipeline: Any = None) -> None:
    """
    Write the latents and encoded captions of a data set into parquet shards, in the data set's order; see [`write_shards`].

    The rows are described in `encoded_rows.py`. Beside the shards are the empty prompt's columns, and a record of what encoded them.

    Args:
        args ([`PromptEncodingArguments`]): Everything that can be set.
        pipeline ([`DiffusionPipeline`], *optional*): The pipeline, loaded in `args.dtype`; by default `args.pipeline` is loaded.

    Raises:
        ValueError: if the pipeline's family is not known, or it lacks VAE or text encoders; if a caption is missing, an image cannot
            be read, the resolution does not fit, or the device does not have the dtype; or if `output_dir` holds shards of another encoding.
    """
    accelerator = make_shard_accelerator()
    check_dtype(dtype_named(args.dtype), accelerator.device)
    with accelerator.main_process_first():
        dataset = load_images(args.dataset, args.image_column, args.dataset_split, None, args.text_column)
    captions_of(dataset, args.text_column, args.dataset)  # raises if one is missing, before a pipeline is loaded
    if pipeline is None:
        pipeline = load_encoding_pipeline(args.pipeline, dtype_named(args.dtype))
    text_pipeline = text_pipeline_of(pipeline)
    multiple = check_vae(pipeline, text_pipeline, args.resolution)
    square = [(args.resolution, args.resolution)]
    buckets = aspect_ratio_buckets(args.resolution, multiple) if args.aspect_ratio_buckets else square
    with accelerator.main_process_first():
        is_quiet = not accelerator.is_main_process
        dataset = readable_images(dataset, args.image_column, args.skip_unreadable, is_quiet, args.dataset)
    if accelerator.is_main_process:
        num_empty = captions_of(dataset, args.text_column, args.dataset).count("")
        print(f"{args.dataset}: {len(dataset)} images with captions, of which {num_empty} are empty", file=sys.stderr)
    pipeline.to(accelerator.device)
    encoder = Encoder(args, pipeline, text_pipeline, buckets)
    empty_prompt = encoder.prompts([""])[0]  # raises if the pipeline has no text encoder
    with accelerator.main_process_first():
        _check_record(args, pipeline, buckets, len(dataset))
        path = Path(args.output_dir, EMPTY_PROMPT_NAME)
        if not path.exists():
            with written_whole(path) as unfinished:
                safetensors.torch.save_file({name: column[None] for name, column in empty_prompt.items()}, unfinished)

    def encode(rows: range, progress: tqdm) -> datasets.Dataset:
        return encoder.shard(dataset.select(rows), progress)

    write_shards(accelerator, args.output_dir, len(dataset), args.shard_size, encode, "Encoding")
    accelerator.end_training()


def _check_record(args: PromptEncodingArguments, pipeline: Any, buckets: list[Size], num_images: int) -> None:
    """Record what encodes in `output_dir`, or compare it with what is recorded."""
    path = Path(args.output_dir, ENCODING_NAME)
    components = {name: component_record(component) for name, component in encoders_of(pipeline).items()}
    settings = {
        "dataset": absolute_source(args.dataset),
        "dataset_split": args.dataset_split,
        "image_column": args.image_column,
        "text_column": args.text_column,
        "background": args.background,
        "resolution": args.resolution,
        "buckets": [list(size) for size in buckets],
        "mirror": args.mirror,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
        "num_images": num_images,
        "pipeline_class": type(pipeline).__name__,
    }
    if path.exists():
        check_components(read_json(path).get(COMPONENTS, {}), components, args.output_dir)
    else:
        settings |= {"pipeline": absolute_source(args.pipeline), COMPONENTS: components}
    remember_settings(path, settings, "encoding")
