"""Feature extractors: Inception-2015 as it was published, and models of transformers."""

import functools
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from networks import make_resnet, make_vit
from safetensors.torch import load_file

from diffusers_dmp.evaluation import digits
from diffusers_dmp.evaluation import inception as inception_module
from diffusers_dmp.evaluation.digits import digit_images, fit_classifier
from diffusers_dmp.evaluation.features import FeatureExtractor, extract_features
from diffusers_dmp.evaluation.inception import InceptionV3, load_inception, resize_as_tensorflow


def deterministic(model: InceptionV3) -> InceptionV3:
    """Set reproducible random weights, scaled so that activations keep their size from layer to layer."""
    with torch.no_grad():
        for index, (name, tensor) in enumerate(sorted(model.state_dict().items())):
            if tensor.is_floating_point():
                noise = torch.from_numpy(np.random.RandomState(index).standard_normal(tensor.shape))
                if name.endswith(("running_var", "bn.weight")):
                    tensor.copy_((1 + 0.1 * noise).abs())
                else:
                    tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file with the layout of the published one."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(deterministic(InceptionV3()).state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception):
    """Its outputs for these weights and images; see tests/fixtures/README.md."""
    vectors = load_file(FIXTURES / "inception.safetensors")
    with torch.inference_mode():
        pooled, _, logits = load_inception(inception)(vectors["images"].float())
    torch.testing.assert_close(pooled, vectors["pooled"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, vectors["logits"], atol=1e-4, rtol=1e-4)


def test_resizing_as_tensorflow():
    """Pixel i of the output is read at i·H/size: the left edge stays, the right one is repeated."""
    ramp = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 1, 4, 4)
    assert resize_as_tensorflow(ramp, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_as_tensorflow(ramp, 2)[0, 0, 0].tolist() == [0, 20]
    assert torch.equal(resize_as_tensorflow(ramp, 4), ramp)


def test_inceptions_spatial_features(inception):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    features = extract_features(FeatureExtractor(inception), [images[:1], images[1:]])
    assert features.pooled.shape == (2, 2048) and features.logits.shape == (2, 1008)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    with torch.inference_mode():
        spatial = load_inception(inception)(torch.from_numpy(images).permute(0, 3, 1, 2).float())[1]
    as_adm = spatial.permute(0, 2, 3, 1).numpy()[..., :7].reshape(2, -1)  # NHWC, the order of the stored statistics
    np.testing.assert_allclose(features.spatial, as_adm, atol=1e-4)


def test_weights_of_another_network(inception, tmp_path):
    weights = torch.load(inception, weights_only=True)
    torch.save(weights | {"Conv2d_9z.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="Inception-2015's weights, but 'Conv2d_9z.conv.weight' is unknown"):
        FeatureExtractor(tmp_path / "other.pth")
    del weights["Mixed_7c.branch_pool.conv.weight"]
    torch.save(weights, tmp_path / "fewer.pth")
    with pytest.raises(ValueError, match="'Mixed_7c.branch_pool.conv.weight' is missing"):
        FeatureExtractor(tmp_path / "fewer.pth")


def test_inception_by_its_name(inception, tmp_path, monkeypatch):
    """Downloaded from its URL (here a local file), and checked against the hash in the file's name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()
    for name in (digest[:8], "00000000"):
        shutil.copyfile(inception, tmp_path / f"weights-{name}.pth")
    monkeypatch.setattr(inception_module, "INCEPTION_URL", (tmp_path / f"weights-{digest[:8]}.pth").as_uri())
    assert FeatureExtractor("inception").sha256 == FeatureExtractor(inception).sha256
    assert (tmp_path / "cache" / "hub" / "checkpoints" / f"weights-{digest[:8]}.pth").exists()
    monkeypatch.setattr(inception_module, "INCEPTION_URL", (tmp_path / "weights-00000000.pth").as_uri())
    with pytest.raises(RuntimeError, match="invalid hash value"):
        FeatureExtractor("inception")


def test_the_digits_classifier_by_its_name(tmp_path, monkeypatch):
    """Trained once, then loaded from the cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(digits, "fit_classifier", functools.partial(fit_classifier, num_steps=1))
    first = FeatureExtractor("digits")
    monkeypatch.setattr(digits, "fit_classifier", None)
    assert FeatureExtractor("digits").sha256 == first.sha256 and first.network.config.num_labels == 10


def test_unknown_extractors(tmp_path):
    with pytest.raises(ValueError, match="to be a file, but there is none at '.*nowhere.pth'"):
        FeatureExtractor(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="`extractor` to be inception, digits, or a vision model's folder or Hub id"):
        FeatureExtractor(tmp_path / "nowhere")


def test_other_preprocessing_is_another_extractor(tmp_path):
    make_resnet().save_pretrained(tmp_path)
    hashes = []
    for size in (16, 32):
        settings = {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        hashes.append(FeatureExtractor(tmp_path).sha256)
    assert hashes[0] != hashes[1]


def test_the_digits_classifier(tmp_path):
    """Of transformers, on grey images, which come in three channels: it knows them by their features."""
    fit_classifier(tmp_path, num_steps=100)
    images, labels = digit_images()
    colour = np.repeat(images[:200, :, :, None], 3, axis=-1)
    features = extract_features(FeatureExtractor(tmp_path), np.array_split(colour, 3))
    assert features.pooled.shape == (200, 64) and features.spatial.shape == (200, 7 * 2 * 2)
    assert (features.logits.argmax(1).numpy() == labels[:200]).mean() > 0.9
    grey = extract_features(FeatureExtractor(tmp_path), [images[:200, :, :, None]])
    torch.testing.assert_close(grey.pooled, features.pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make, width, has_places", [(make_resnet, 16, True), (make_vit, 16, False)])
def test_networks_of_transformers(make, width, has_places, tmp_path):
    make().save_pretrained(tmp_path)
    settings = '{"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (tmp_path / "preprocessor_config.json").write_text(settings)
    extractor = FeatureExtractor(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    features = extract_features(extractor, [images])
    assert features.pooled.shape == (5, width) and features.logits.shape == (5, 10)
    assert (features.spatial is not None) == has_places
    alone = extract_features(extractor, images[:, None])  # one by one
    torch.testing.assert_close(alone.pooled, features.pooled, atol=1e-5, rtol=1e-4)
    assert extractor.fingerprint == {"extractor": tmp_path.name, "extractor_sha256": FeatureExtractor(tmp_path).sha256}
