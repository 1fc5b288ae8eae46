"""A VAE's latents of a whole data set and of its mirror images, encoded once, in parquet shards that training reads.

Legend: b images encoded at once, H and W their height and width, C latent channels, S latent size.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...diffusion.latents import latent_distribution, vae_downsampling
from ...models.precision import dtype_named
from ...saving.finite import expect_finite_weights
from ...saving.reading import read_json
from ...saving.weight_files import check_saved_folder
from ..arguments import DataArguments, option
from ..interruption import ignore_signals
from .images import LATENTS, load_checked, to_tensors
from .shards import make_shard_accelerator, remember_settings, write_shards
from .workers import choose_workers, num_bytes_of

STORED_DTYPES = ("float32", "float16")
ENCODING_NAME = "encoding.json"  # the settings of the encoding, beside the shards


@dataclass(kw_only=True)
class EncodingArguments(DataArguments):
    """The images to encode, and how they are encoded."""

    output_dir: str = option("outputs/latents", "Where the shards are written; training reads them as its `dataset`.")
    batch_size: int = option(32, "Images that a process encodes at once, together with their mirror images.")
    shard_size: int = option(4096, "Images per shard.")
    dtype: str = option("float32", "float32, or float16 for half the space.")

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least_one("batch_size", "shard_size")
        dtype_named(self.dtype, STORED_DTYPES)  # raises for another one
        if self.vae is None:
            raise ValueError("Expected `vae` to be the folder or Hub id of an AutoencoderKL, but got None.")


def load_vae(name_or_path: str) -> AutoencoderKL:
    """
    Load a VAE that encodes and decodes, and is not trained.

    Args:
        name_or_path (`str`): Its folder or Hub id.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a file of a local folder is damaged, or the weights are not finite.
    """
    check_saved_folder(name_or_path, components=False)
    vae = AutoencoderKL.from_pretrained(name_or_path)
    expect_finite_weights(vae, name_or_path)
    return vae.requires_grad_(False).eval()


def encode_latents(args: EncodingArguments) -> None:
    """
    Write the latents of a data set into parquet shards, in the data set's order; see [`write_shards`].

    Each row has the label, if there is one, and in the column `latents` a safetensors block of `mean` and `std`, both of
    shape (2, C, S, S): of the image, and of its mirror image.

    Args:
        args ([`EncodingArguments`]): Everything that can be set.

    Raises:
        ValueError: if the data set cannot be read, if the images do not fit the VAE, or if `output_dir` holds shards of
            another encoding.
    """
    accelerator = make_shard_accelerator()
    with accelerator.main_process_first():
        dataset = load_checked(args, args.dataset, args.dataset_split, is_quiet=not accelerator.is_main_process)
    if LATENTS in dataset.column_names:
        raise ValueError(f"Expected {args.dataset!r} to hold images, but got latents.")
    vae = load_vae(str(args.vae))
    _check_vae(args, vae)
    vae.to(accelerator.device)
    with accelerator.main_process_first():
        _check_encoding(args, len(dataset), vae)

    def encode(rows: range, progress: tqdm) -> datasets.Dataset:
        return _encode_shard(args, dataset.select(rows), vae, progress)

    write_shards(accelerator, args.output_dir, len(dataset), args.shard_size, encode, "Encoding")
    accelerator.end_training()


@torch.no_grad()
def _encode_shard(
    args: EncodingArguments, images: datasets.Dataset, vae: AutoencoderKL, progress: tqdm
) -> datasets.Dataset:
    """The shard of some images."""
    items = to_tensors(
        images,
        args.image_size,
        args.image_channels,
        image_column=args.image_column,
        label_column=args.label_column,
        image_fit=args.image_fit,
        background=args.background,
    )
    columns: dict[str, list] = {LATENTS: []}
    features = {LATENTS: datasets.Value("binary")}
    num_workers = choose_workers(args.dataloader_num_workers, vae.device, args.batch_size * num_bytes_of(items[0]))
    for batch in DataLoader(items, args.batch_size, num_workers=num_workers, worker_init_fn=ignore_signals):
        pixels = batch["images"].to(vae.device)
        distributions = [latent_distribution(vae, side) for side in (pixels, pixels.flip(-1))]
        mean, std = (torch.stack(sides, dim=1) for sides in zip(*distributions))  # (b, 2, C, S, S)
        mean, std = (moment.to("cpu", dtype_named(args.dtype, STORED_DTYPES)) for moment in (mean, std))
        columns[LATENTS] += [
            safetensors.torch.save({"mean": own_mean.contiguous(), "std": own_std.contiguous()})
            for own_mean, own_std in zip(mean, std)
        ]
        progress.update(len(pixels))
    if args.label_column in images.column_names:
        columns[args.label_column] = images[args.label_column]
        features[args.label_column] = images.features[args.label_column]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _check_vae(args: EncodingArguments, vae: AutoencoderKL) -> None:
    """Check that the VAE can encode images of this size and number of channels."""
    if vae.config.in_channels != args.image_channels:
        raise ValueError(
            f"Expected `image_channels` to be the {vae.config.in_channels} of `vae`, but got {args.image_channels}."
        )
    if args.image_size % vae_downsampling(vae):
        raise ValueError(
            f"Expected `image_size` to be divisible by the {vae_downsampling(vae)} of `vae`, but got {args.image_size}."
        )


def vae_fingerprint(vae: AutoencoderKL) -> dict[str, float]:
    """Return the settings by which VAEs with latents of equal shape differ, wherever they are stored."""
    return {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.get("shift_factor") or 0.0}


def _check_encoding(args: EncodingArguments, num_images: int, vae: AutoencoderKL) -> None:
    """Record the settings of the encoding in `output_dir`, or compare them with those recorded."""
    ignored = ("output_dir", "batch_size", "dataloader_num_workers", "skip_unreadable")
    encoding = {name: value for name, value in asdict(args).items() if name not in ignored}
    for name in ("dataset", "vae"):
        if os.path.exists(encoding[name]):
            encoding[name] = os.path.abspath(encoding[name])
    encoding |= {"num_images": num_images, **vae_fingerprint(vae)}
    remember_settings(Path(args.output_dir, ENCODING_NAME), encoding, "encoding")


def check_latents(
    dataset: datasets.Dataset,
    source: str,
    vae: AutoencoderKL | None,
    latent_shape: tuple[int, ...],
    fitting: dict[str, str] | None = None,
) -> None:
    """
    Check that a data set's latents, if it has any, are those that a training expects.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        source (`str`): The folder or Hub id that it is from.
        vae ([`AutoencoderKL`], *optional*): The VAE of the training.
        latent_shape (`tuple[int, ...]`): The shape that training expects, (C, S, S).
        fitting (`dict[str, str]`, *optional*): Arguments that decide what an image is before it is encoded, by name. Latents
            cannot be changed by them any more.

    Raises:
        ValueError: if the training has no VAE to decode the latents, if they are another VAE's or of another shape, or if
            the folder lacks some of them.
    """
    if LATENTS not in dataset.column_names:
        return
    if vae is None:
        raise ValueError(f"Expected `vae` to be the one that encoded the latents in {source!r}, but got None.")
    shape = tuple(safetensors.torch.load(dataset[0][LATENTS])["mean"].shape[1:])
    if shape != latent_shape:
        raise ValueError(
            f"Expected the latents in {source!r} to have the shape {latent_shape} of `vae` and `image_size`, but got {shape}."
        )
    record = Path(source, ENCODING_NAME)
    encoding = read_json(record) if record.exists() else {}  # none for a data set on the Hub
    for name, choice in (fitting or {}).items():
        default = getattr(DataArguments, name)
        if choice not in (default, encoding.get(name, default)):
            raise ValueError(
                f"Expected `{name}` to be given to encode_latents.py, as latents cannot be changed by it, but got "
                f"{choice!r} for latents of {encoding.get(name, default)!r}."
            )
    if not encoding:
        return
    for name, value in {"num_images": len(dataset), **vae_fingerprint(vae)}.items():
        if encoding.get(name) != value:
            raise ValueError(
                f"Expected the latents in {source!r} to have the `{name}` {encoding.get(name)} of their {record}, "
                f"but got {value}."
            )
