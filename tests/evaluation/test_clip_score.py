"""The CLIP score against the formula written by hand, and its fingerprint."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from networks import make_vit
from tiny_clip import save_clip
from tiny_text import clip_tokenizer
from torchmetrics.functional.multimodal import clip_score as torchmetrics_score
from transformers import CLIPModel

from diffusers_dmp.evaluation.clip_score import ClipScorer, clip_score
from diffusers_dmp.evaluation.digits import digit_images
from diffusers_dmp.evaluation.evaluate import EvaluationArguments, evaluate
from diffusers_dmp.evaluation.fingerprint import expect_comparable
from diffusers_dmp.evaluation.npz import write_npz
from diffusers_dmp.training.data.prompts import prompts_sha256

PROMPTS = ["a handwritten seven", "one", "a photo of the digit eight, on the left"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Digits in colour, wider than high: the CLIP sees their middle."""
    digits = digit_images()[0][:7]
    return np.stack([digits, 255 - digits, digits.transpose(0, 2, 1)], axis=-1).repeat(3, axis=2)


def cosines(clip: str, images: np.ndarray, prompts: list[str]) -> list[float]:
    """Of each image and its prompt, one by one."""
    network, found = CLIPModel.from_pretrained(clip).eval(), []
    for image, prompt in zip(images, prompts):
        pixels = PIL.Image.fromarray(image).resize((48, 16), PIL.Image.Resampling.BICUBIC).crop((16, 0, 32, 16))
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        pixels = torch.tensor((np.asarray(pixels) / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        tokens = torch.tensor([clip_tokenizer()(prompt)["input_ids"]])
        with torch.no_grad():
            seen = network.visual_projection(network.vision_model(pixels).pooler_output)
            read = network.text_projection(network.text_model(tokens).pooler_output)
        found.append(torch.cosine_similarity(seen, read).item())
    return found


def test_each_image_and_its_prompt(clip, images):
    """max(100·cos(image, prompt), 0), the mean over all images, however many there are in a batch."""
    prompts = [PROMPTS[index % 3] for index in range(7)]
    found = cosines(clip, images, prompts)
    assert min(found) < 0 < max(found)
    expected = np.mean([max(100 * cosine, 0) for cosine in found])
    scorer = ClipScorer(clip)
    for batches in ([images], [images[:4], images[4:]], [each[None] for each in images]):
        assert clip_score(scorer, batches, PROMPTS) == pytest.approx(expected, rel=1e-3)


class OfTensors(torch.nn.Module):
    """A CLIP whose features are tensors, as torchmetrics expects them."""

    def __init__(self, network: CLIPModel):
        super().__init__()
        self.network, self.config = network, network.config

    def get_image_features(self, *args):
        return self.network.get_image_features(*args).pooler_output

    def get_text_features(self, *args):
        return self.network.get_text_features(*args).pooler_output


def test_torchmetrics(clip, images):
    """One image at a time, as it takes the maximum with 0 after the mean."""
    scorer = ClipScorer(clip)

    def load():
        def process(text=None, images=None, **settings):
            return (
                scorer.tokenizer(text, **settings) if images is None else scorer.processor(images, return_tensors="pt")
            )

        return OfTensors(scorer.network), process

    scores = scorer(images[:3], PROMPTS)
    assert scores.max() > 1
    for image, prompt, score in zip(images, PROMPTS, scores):
        expected = torchmetrics_score(torch.from_numpy(image).permute(2, 0, 1), prompt, load)
        assert score.item() == pytest.approx(expected.item(), abs=1e-3)


def test_a_prompt_that_is_too_long_is_cut_off(clip, images, caplog):
    scorer, long = ClipScorer(clip), "a word " * 50
    score = clip_score(scorer, [images], [long])
    assert "1 of 1 prompts are longer than the 77 tokens that the CLIP reads" in caplog.text
    assert score == clip_score(scorer, [images], [long[:200]])


def write(folder, images: np.ndarray, prompts: list[str] | None = PROMPTS) -> str:
    """Images as `evaluation.sample` writes them."""
    folder.mkdir(exist_ok=True)
    write_npz(folder / "samples.npz", [images], images.shape)
    if prompts is not None:
        (folder / "prompts.json").write_text(json.dumps(prompts))
        settings = {"prompts": "mine.txt", "prompts_sha256": prompts_sha256(prompts), "num_inference_steps": 5}
        (folder / "sampling.json").write_text(json.dumps(settings))
    return str(folder / "samples.npz")


def score(folder, generated: str, clip: str, **others) -> list[dict]:
    output = {"output": str(folder / "evaluation.json")}
    return evaluate(EvaluationArguments(generated=generated, clip=clip, **output, **others))


def test_images_with_their_prompts_beside(clip, images, tmp_path):
    (result,) = score(tmp_path, write(tmp_path, images), clip)
    assert result["metric"] == "CLIP score" and result["dataset"] == "mine.txt"
    assert result["value"] == pytest.approx(clip_score(ClipScorer(clip), [images], PROMPTS), abs=1e-5)
    settings = result["settings"]
    assert (settings["num_samples"], settings["num_prompts"], settings["image_size"]) == (7, 3, [8, 24])
    assert settings["num_inference_steps"] == 5 and "extractor_sha256" not in settings
    assert json.loads((tmp_path / "evaluation.json").read_text()) == [result]


def test_beside_fid(clip, images, tmp_path):
    """In one command; FID's fingerprint has the prompts, and not the CLIP."""
    make_vit().save_pretrained(tmp_path / "vit")
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    generated = write(tmp_path / "samples", noise)
    others = {"reference": generated, "extractor": str(tmp_path / "vit")}
    *compared, scored = score(tmp_path, generated, clip, **others)
    assert compared[0]["metric"] == "FID" and scored["metric"] == "CLIP score"
    assert compared[0]["settings"]["prompts_sha256"] == scored["settings"]["prompts_sha256"]
    assert "clip_sha256" not in compared[0]["settings"]


def test_other_prompts_or_another_clip_are_not_comparable(clip, images, tmp_path):
    first, same, other, reordered = (
        score(tmp_path, write(tmp_path / str(number), images, prompts), clip)[0]["settings"]
        for number, prompts in enumerate([PROMPTS, PROMPTS, ["one", "two"], PROMPTS[::-1]])
    )
    expect_comparable(first, same)
    for settings in (other, reordered):
        with pytest.raises(ValueError, match="measured alike, but got others in prompts_sha256"):
            expect_comparable(first, settings)
    another = score(tmp_path, str(tmp_path / "0" / "samples.npz"), save_clip(tmp_path / "clip", seed=1))[0]["settings"]
    with pytest.raises(ValueError, match="others in clip_sha256"):
        expect_comparable(first, another)


def test_bad_prompts_and_clips(clip, images, tmp_path):
    generated = write(tmp_path, images)
    (tmp_path / "others.txt").write_text("one\ntwo\n")
    with pytest.raises(
        ValueError, match="those that the images were sampled from, as in .*prompts.json', but got others"
    ):
        score(tmp_path, generated, clip, prompts=str(tmp_path / "others.txt"))
    alone = write(tmp_path / "alone", images, prompts=None)
    with pytest.raises(ValueError, match="Expected `prompts` for a CLIP score, as there is no .*prompts.json'"):
        score(tmp_path, alone, clip)
    (result,) = score(tmp_path, alone, clip, prompts=str(tmp_path / "others.txt"))
    assert result["dataset"] == "others.txt"
    make_vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(
        ValueError, match="`clip` to be a CLIPModel of transformers, but got a ViTForImageClassification"
    ):
        score(tmp_path, generated, str(tmp_path / "vit"))
    with pytest.raises(ValueError, match="`clip` to be an existing folder or a Hub id, but got './missing'"):
        score(tmp_path, generated, "./missing")
    save_clip(tmp_path / "wordless")
    for file in (tmp_path / "wordless").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="the model's vocabulary of 514 tokens, but got 2"):
        score(tmp_path, generated, str(tmp_path / "wordless"))
    with pytest.raises(ValueError, match="no `skip_unreadable` with `clip`"):
        score(tmp_path, generated, clip, skip_unreadable=True)
    with pytest.raises(ValueError, match="Expected `extractor` to be given"):
        score(tmp_path, generated, clip, reference=generated)
