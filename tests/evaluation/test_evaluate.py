"""Metrics of generated images against real images, and their fingerprints."""

import json

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from networks import make_resnet

from diffusers_dmp.evaluation.digits import TRAINING_IMAGES, VALIDATION_IMAGES, digit_images, write_image_folder
from diffusers_dmp.evaluation.evaluate import EvaluationArguments, _random_subset, _stored_statistics, evaluate
from diffusers_dmp.evaluation.features import FeatureExtractor
from diffusers_dmp.evaluation.fingerprint import expect_comparable
from diffusers_dmp.evaluation.images import open_images
from diffusers_dmp.evaluation.npz import write_npz
from diffusers_dmp.training.data.images import load_images


@pytest.fixture(scope="module")
def extractor(tmp_path_factory) -> str:
    """A ResNet with random weights: its 16 features also distinguish images."""
    folder = tmp_path_factory.mktemp("extractor")
    make_resnet().save_pretrained(folder)
    settings = '{"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (folder / "preprocessor_config.json").write_text(settings)
    return str(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> str:
    return str(write_image_folder(tmp_path_factory.mktemp("real"), TRAINING_IMAGES[::5]))


def colour(images: np.ndarray) -> np.ndarray:
    return np.repeat(images[..., None], 3, axis=-1)


def write(path, images: np.ndarray) -> str:
    write_npz(path, [images], images.shape)
    return str(path)


def metrics_of(generated, reference, extractor, tmp_path) -> dict[str, float]:
    arguments = {"generated": generated, "reference": reference, "extractor": extractor}
    results = evaluate(EvaluationArguments(**arguments, output=str(tmp_path / "evaluation.json")))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == results
    return {result["metric"]: result["value"] for result in results}


def test_real_digits_are_nearer_than_inverted_ones_or_noise(real, extractor, tmp_path):
    held_out = colour(digit_images()[0][VALIDATION_IMAGES.start :])
    noise = np.random.default_rng(0).integers(0, 256, held_out.shape, dtype=np.uint8)
    images = {"held_out": held_out, "inverted": 255 - held_out, "noise": noise}
    found = {
        name: metrics_of(write(tmp_path / f"{name}.npz", each), real, extractor, tmp_path)
        for name, each in images.items()
    }
    for metric in ("FID", "sFID", "KID"):
        assert found["held_out"][metric] < min(found["inverted"][metric], found["noise"][metric])
    assert found["held_out"]["precision"] > 0.7 > found["noise"]["precision"]
    assert found["held_out"]["recall"] > 0.7
    assert found["held_out"]["Inception Score"] >= 1


def test_every_metric_has_a_fingerprint(real, extractor, tmp_path):
    images = write(tmp_path / "samples.npz", colour(digit_images()[0][:50]))
    (tmp_path / "sampling.json").write_text(json.dumps({"num_inference_steps": 25, "scheduler": ""}))
    arguments = {"generated": images, "reference": real, "extractor": extractor}
    results = evaluate(EvaluationArguments(**arguments, output=str(tmp_path / "evaluation.json")))
    settings = results[0]["settings"]
    assert settings["num_samples"] == 50 and settings["num_reference"] == 300 and settings["image_size"] == [8, 8]
    assert settings["num_inference_steps"] == 25 and settings["versions"]["torch"] == torch.__version__
    assert settings["extractor_sha256"] == FeatureExtractor(extractor).sha256

    expect_comparable(settings, dict(settings))
    other = settings | {"num_inference_steps": 50, "num_samples": 49, "versions": {}}
    with pytest.raises(ValueError, match=r"others in num_samples \(50 and 49\), num_inference_steps \(25 and 50\)"):
        expect_comparable(settings, other)
    with pytest.raises(ValueError, match=r"others in num_samples \(50 and 49\)\."):
        expect_comparable(settings, other, may_differ=("num_inference_steps",))


def test_a_subset_of_a_large_reference_has_all_classes():
    """Data sets are often sorted by class, so the first images would be of the first classes."""
    subset = _random_subset(torch.arange(30_000.0)[:, None])
    assert len(subset) == 10_000 and abs(subset.mean() - 15_000) < 300
    assert torch.equal(subset, _random_subset(torch.arange(30_000.0)[:, None]))


def test_the_hash_of_the_reference_is_of_its_pixels(real, extractor, tmp_path):
    """A folder and an .npz file of the same images have the same hash and the same FID."""
    packed = write(tmp_path / "real.npz", np.concatenate(list(open_images(real).batches(64))))
    images = write(tmp_path / "samples.npz", colour(digit_images()[0][:50]))
    hashes, distances = [], []
    for reference in (real, packed):
        arguments = {"generated": images, "reference": reference, "extractor": extractor}
        (result, *_) = evaluate(EvaluationArguments(**arguments, output=str(tmp_path / "evaluation.json")))
        hashes.append(result["settings"]["reference_sha256"])
        distances.append(result["value"])
    assert hashes[0] == hashes[1]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


def test_stored_statistics_are_inceptions(real, extractor, tmp_path):
    """ADM's batches store the statistics of Inception's features, which must not be compared with another network's."""
    images = colour(digit_images()[0][:60])
    generated = write(tmp_path / "samples.npz", images)
    mean, covariance = np.arange(16.0), 2 * np.eye(16)
    np.savez(tmp_path / "reference.npz", arr_0=images, mu=mean, sigma=covariance)
    plain = metrics_of(generated, str(tmp_path / "reference.npz"), extractor, tmp_path)
    assert plain["FID"] == pytest.approx(0, abs=1e-4)
    assert _stored_statistics(generated) == {}
    stored = _stored_statistics(str(tmp_path / "reference.npz"))["pooled"]
    assert torch.equal(stored.mean, torch.from_numpy(mean)) and torch.equal(
        stored.covariance, torch.from_numpy(covariance)
    )


def test_images_that_cannot_be_evaluated(real, extractor, tmp_path):
    few = write(tmp_path / "few.npz", colour(digit_images()[0][:16]))
    with pytest.raises(ValueError, match="more than 16 generated images, .* but got 16"):
        metrics_of(few, real, extractor, tmp_path)
    large = write(
        tmp_path / "large.npz",
        np.zeros((20, 9, 9, 3), dtype=np.uint8) + np.arange(20)[:, None, None, None].astype(np.uint8),
    )
    with pytest.raises(ValueError, match=r"of the reference's size \(8, 8\), but got \(9, 9\)"):
        metrics_of(large, real, extractor, tmp_path)
    blank = write(tmp_path / "blank.npz", np.zeros((20, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="`features` to differ between images, but got 20 times the same"):
        metrics_of(blank, real, extractor, tmp_path)
    with pytest.raises(ValueError, match="`generated` to be .* but got '.*missing.npz': there is no such file"):
        metrics_of(str(tmp_path / "missing.npz"), real, extractor, tmp_path)
    with pytest.raises(ValueError, match="`reference` to be given, but got nothing"):
        EvaluationArguments(generated="x", extractor="y")
    with pytest.raises(ValueError, match="`batch_size` to be at least 1, but got 0"):
        EvaluationArguments(generated="x", extractor="y", reference="z", batch_size=0)


def test_images_that_cannot_be_read_are_named_before_anything_is_computed(real, extractor, tmp_path):
    for number, image in enumerate(digit_images()[0][:20]):
        PIL.Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:50])
    with pytest.raises(
        ValueError, match=f"Expected '{tmp_path}' to hold readable images, but 1 of 20 are not: row 7: .*7.png"
    ):
        metrics_of(str(tmp_path), real, extractor, tmp_path / "out")
    assert len(open_images(tmp_path, skip_unreadable=True)) == 19
    PIL.Image.new("L", (9, 8)).save(tmp_path / "7.png")
    with pytest.raises(ValueError, match="of one size, but got 8 x 8 and 9 x 8 pixels .*7.png"):
        list(open_images(tmp_path).batches(20))


def test_columns_by_other_names(real, extractor, tmp_path):
    """Of the reference, and of generated images."""
    dataset = load_images(str(real)).select(range(20)).rename_column("image", "picture")
    for name in ("reference", "generated"):
        dataset.to_parquet(tmp_path / f"{name}.parquet")
    found = {"generated": str(tmp_path / "generated.parquet"), "reference": str(tmp_path / "reference.parquet")}
    found |= {"extractor": str(extractor), "output": str(tmp_path / "evaluation.json"), "image_column": "picture"}
    with pytest.raises(ValueError, match="`image_column` to be one of .*'picture'.* but got 'image'"):
        evaluate(EvaluationArguments(**found))
    fid, *_ = evaluate(EvaluationArguments(**found, generated_image_column="picture"))
    assert fid["value"] == pytest.approx(0, abs=1e-3)


def test_latents_are_no_images(tmp_path):
    datasets.Dataset.from_dict({"latents": [b""]}).to_parquet(tmp_path / "latents.parquet")
    with pytest.raises(ValueError, match=r"to hold images, but got \['latents'\]"):
        open_images(tmp_path / "latents.parquet")


def test_sfid_needs_more_images_than_spatial_features(real, tmp_path, caplog):
    """With fewer images sFID is left out with a warning; the other metrics are computed."""
    make_resnet().save_pretrained(tmp_path)
    settings = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    images = write(tmp_path / "samples.npz", colour(digit_images()[0][:50]))
    found = metrics_of(images, real, str(tmp_path), tmp_path)
    assert "sFID" not in found and "FID" in found
    assert "sFID is left out: it needs more than" in caplog.text and "but got 50" in caplog.text
