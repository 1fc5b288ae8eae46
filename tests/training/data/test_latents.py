"""Latents, encoded once, train as the images that they came from."""

import json
import os
from pathlib import Path

import datasets
import PIL.Image
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline
from runs import launch_script, logged, train_here, weights

from diffusers_dmp import DiTModel
from diffusers_dmp.training.data.fitting import pad_to_square, to_tensor
from diffusers_dmp.training.data.latents import EncodingArguments, encode_latents

ENCODING = {"image_size": 16, "image_channels": 3, "batch_size": 4, "shard_size": 6}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Sixteen pictures in two classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(16):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.effect_noise((20, 16), 10 + 5 * i).convert("RGB").save(path)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def encode(images, vae):
    def encode(output_dir: Path, **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = ENCODING | {"dataset": str(images), "vae": str(vae), "output_dir": str(output_dir)}
        encode_latents(EncodingArguments(**defaults | arguments))

    return encode


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def read(folder: Path) -> datasets.Dataset:
    return datasets.load_dataset(str(folder), split="train")


def test_shards_hold_every_image_and_its_mirror_image(encode, images, vae, tmp_path):
    encode(tmp_path)
    assert [path.name for path in shards(tmp_path)] == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    encoded = read(tmp_path)
    assert len(encoded) == 16
    assert encoded.features["label"].names == ["cats", "dogs"]
    originals = datasets.load_dataset(str(images), split="train")
    assert encoded["label"] == originals["label"]

    autoencoder = AutoencoderKL.from_pretrained(vae)
    pixels = torch.tensor(list(originals[5]["image"].crop((2, 0, 18, 16)).get_flattened_data()))
    pixels = (pixels.float() / 127.5 - 1).view(16, 16, 3).permute(2, 0, 1)[None]
    moments = safetensors.torch.load(encoded[5]["latents"])
    with torch.no_grad():
        for side, own_pixels in enumerate((pixels, pixels.flip(-1))):
            expected = autoencoder.encode(own_pixels).latent_dist
            torch.testing.assert_close(moments["mean"][side], expected.mean[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(moments["std"][side], expected.std[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_write_what_one_does(encode, images, vae, tmp_path):
    encode(tmp_path / "one")
    arguments = ENCODING | {"dataset": images, "vae": vae}
    progress = launch_script("encode_latents.py", tmp_path / "two", 2, arguments)
    assert "1 of 2 processes" in progress and "10 of 10 images" in progress  # the first and the third shard
    assert len(shards(tmp_path / "two")) == 3
    for one, two in zip(read(tmp_path / "one"), read(tmp_path / "two")):
        assert one["label"] == two["label"]
        one, two = (safetensors.torch.load(row["latents"]) for row in (one, two))
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_goes_on_where_it_was_interrupted(encode, tmp_path, monkeypatch):
    to_parquet = datasets.Dataset.to_parquet

    def interrupted(shard, path):
        to_parquet(shard, path)
        if len(shard) == 4:  # the last one
            raise KeyboardInterrupt

    monkeypatch.setattr(datasets.Dataset, "to_parquet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path)
    assert len(shards(tmp_path)) == 2
    monkeypatch.setattr(datasets.Dataset, "to_parquet", to_parquet)
    written = [os.stat(path).st_mtime_ns for path in shards(tmp_path)]
    encode(tmp_path)
    assert [os.stat(path).st_mtime_ns for path in shards(tmp_path)][:2] == written
    assert len(read(tmp_path)) == 16
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_the_rest_is_shared_by_all_processes(encode, images, vae, tmp_path):
    encode(tmp_path)
    for path in shards(tmp_path)[::2]:  # both of them the first process's, to begin with
        path.unlink()
    progress = launch_script("encode_latents.py", tmp_path, 2, ENCODING | {"dataset": images, "vae": vae})
    assert "6 of 6 images" in progress and "10 of 10" not in progress
    assert len(read(tmp_path)) == 16


def test_training_reads_shards_as_it_reads_images(encode, images, vae, tmp_path):
    """The same images, mirrored alike, with the same noise: the same loss, and the same weights."""
    encode(tmp_path / "latents")
    arguments = {"vae": str(vae), "image_size": 16, "image_channels": 3, "random_flip": True, "max_train_steps": 2,
                 "report_to": "tensorboard"}  # fmt: skip
    for source in (images, tmp_path / "latents"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_here(DiTModel, source, tmp_path / "runs" / source.name, **arguments)
    one, two = sorted((tmp_path / "runs").iterdir())
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=1e-4, rtol=1e-3)
    pipeline = DiffusionPipeline.from_pretrained(two / "pipeline")
    assert pipeline("cats", num_inference_steps=2).images[0].size == (16, 16)


def test_half_the_space(encode, vae, tmp_path):
    encode(tmp_path / "float32")
    encode(tmp_path / "float16", dtype="float16")
    rows = [read(tmp_path / dtype)[3]["latents"] for dtype in ("float32", "float16")]
    assert len(rows[0]) > 1.8 * len(rows[1])
    full, half = map(safetensors.torch.load, rows)
    assert half["mean"].dtype == torch.float16
    torch.testing.assert_close(half["mean"].float(), full["mean"], atol=1e-3, rtol=1e-3)
    train_here(DiTModel, tmp_path / "float16", tmp_path / "run", vae=str(vae), image_size=16, max_train_steps=1)


def test_images_without_classes(encode, tmp_path):
    for i in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        PIL.Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    encode(tmp_path / "latents", dataset=str(tmp_path / "images"))
    assert read(tmp_path / "latents").column_names == ["latents"]


def test_refuses_to_mix_two_encodings(encode, vae, tmp_path):
    encode(tmp_path)
    with pytest.raises(ValueError, match="`image_size` to be 16.*got 8"):
        encode(tmp_path, image_size=8)
    encode(tmp_path, batch_size=3)  # does not matter
    encode(tmp_path, vae=os.path.relpath(vae))
    assert json.loads((tmp_path / "encoding.json").read_text())["num_images"] == 16


def test_refuses_latents_that_do_not_fit(encode, vae, tmp_path):
    encode(tmp_path / "latents")
    with pytest.raises(ValueError, match="`vae` to be the one that encoded"):
        train_here(DiTModel, tmp_path / "latents", tmp_path / "run", image_size=16)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"shape \(4, 16, 16\) of `vae` and `image_size`.*\(4, 8, 8\)"):
        train_here(DiTModel, tmp_path / "latents", tmp_path / "run", vae=str(vae), image_size=32)
    other = AutoencoderKL.from_pretrained(vae)
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "other")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="scaling_factor. 0.18215.*got 0.5"):
        train_here(DiTModel, tmp_path / "latents", tmp_path / "run", vae=str(tmp_path / "other"), image_size=16)
    with pytest.raises(ValueError, match="images, but got latents"):
        encode(tmp_path / "again", dataset=str(tmp_path / "latents"))


def test_what_an_image_is_was_decided_by_the_encoding(encode, vae, tmp_path):
    encode(tmp_path / "latents", image_fit="pad", background="black")
    run = {"vae": str(vae), "image_size": 16, "image_channels": 3, "max_train_steps": 1}
    train_here(DiTModel, tmp_path / "latents", tmp_path / "run", **run)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, tmp_path / "latents", tmp_path / "same", image_fit="pad", background="black", **run)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(
        ValueError, match="`background` to be given to encode_latents.py.*got 'red' for latents of 'black'"
    ):
        train_here(DiTModel, tmp_path / "latents", tmp_path / "other", background="red", **run)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="`color_jitter` to be 0 for latents, but got 0.1"):
        train_here(DiTModel, tmp_path / "latents", tmp_path / "other", color_jitter=0.1, **run)
    with pytest.raises(ValueError, match="`image_fit` to be 'pad'.*got 'crop'"):
        encode(tmp_path / "latents", background="black")


def test_padded_latents_are_of_the_whole_image(encode, images, vae, tmp_path):
    encode(tmp_path / "latents", image_fit="pad", background="black")
    with PIL.Image.open(images / "cats" / "01.png") as image:  # 20 x 16 pixels, as 16 x 13 in the middle
        padded = pad_to_square(image, 16, "black")
    expected = AutoencoderKL.from_pretrained(vae).encode(to_tensor(padded)[None]).latent_dist.mean[0]
    found = safetensors.torch.load(read(tmp_path / "latents")[0]["latents"])["mean"][0]
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)


def test_refuses_an_unfinished_encoding(encode, vae, tmp_path):
    encode(tmp_path / "latents")
    shards(tmp_path / "latents")[1].unlink()
    with pytest.raises(ValueError, match="num_images. 16.*got 10"):
        train_here(DiTModel, tmp_path / "latents", tmp_path / "run", vae=str(vae), image_size=16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_channels": 1}, "image_channels. to be the 3 of `vae`, but got 1"),
        ({"image_size": 15}, "image_size. to be divisible by the 2 of `vae`, but got 15"),
    ],
)
def test_refuses_images_that_do_not_fit_the_vae(encode, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(tmp_path, **arguments)
    encode(tmp_path)  # and nothing is in the way


@pytest.mark.parametrize(
    "arguments", [{"dtype": "int8"}, {"shard_size": 0}, {"batch_size": 0}, {"image_size": 0}, {"vae": None}]
)
def test_refuses_bad_arguments(arguments):
    ((name, _),) = arguments.items()
    with pytest.raises(ValueError, match=f"`{name}`"):
        EncodingArguments(**{"vae": "some/vae"} | arguments)
