"""Images and captions, encoded once, are what the pipeline itself encodes, and a training reads them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from runs import launch_script
from tiny_pipelines import RECIPES
from tiny_text import with_text

from diffusers_dmp.training.arguments import LoopArguments
from diffusers_dmp.training.conditions import TextConditions
from diffusers_dmp.training.data.captions import captions_of
from diffusers_dmp.training.data.clean_samples import clean_samples
from diffusers_dmp.training.data.encoded_rows import collate
from diffusers_dmp.training.data.encoded_text import EncodedText, load_encoded_text
from diffusers_dmp.training.data.encoding_record import COMPONENTS, check_encoding, component_record, encoders_of
from diffusers_dmp.training.data.fitting import to_tensor
from diffusers_dmp.training.data.images import load_images
from diffusers_dmp.training.data.prompt_encoder import Encoder
from diffusers_dmp.training.data.prompt_encoding import PromptEncodingArguments, encode_prompts
from diffusers_dmp.training.denoiser import TextDenoiser
from diffusers_dmp.training.text_pipelines import register_conditions, text_pipeline_of
from diffusers_dmp.training.text_pipelines.sd3 import StableDiffusion3Text

FAMILIES = ("sd3", "sdxl", "qwen")
CAPTIONS = ["a red cat", "", "two dogs on a sofa", "a bird", "fish", "a horse", "a cow", "a red cat"]
SIZES = [(32, 32), (48, 64), (64, 32), (32, 33), (90, 40), (32, 32), (33, 32), (16, 32)]  # height and width
ENCODING = {"resolution": 32, "batch_size": 2, "shard_size": 3, "aspect_ratio_buckets": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eight pictures of several sizes, with captions beside them; one caption is empty."""
    folder = tmp_path_factory.mktemp("images")
    for number, (caption, (height, width)) in enumerate(zip(CAPTIONS, SIZES)):
        PIL.Image.effect_noise((width, height), 20 + 5 * number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """The folders of saved pipelines with text encoders, by family."""
    folders = {}
    for name in FAMILIES:
        folders[name] = tmp_path_factory.mktemp("pipelines") / name
        with_text(name, RECIPES[name].pipe(RECIPES[name].denoiser())).save_pretrained(folders[name])
    return folders


def encode(pipeline: "Path | None", dataset: Path, output_dir: Path, loaded=None, **arguments) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    sources = {"pipeline": str(pipeline or ""), "dataset": str(dataset), "output_dir": str(output_dir)}
    encode_prompts(PromptEncodingArguments(**ENCODING | sources | arguments), loaded)
    return output_dir


@pytest.fixture(scope="module")
def encoded(images, pipelines, tmp_path_factory) -> dict[str, Path]:
    """The folders that each family's pipeline encoded the images into."""
    return {
        name: encode(pipelines[name], images, tmp_path_factory.mktemp("encoded") / name, mirror=name == "sd3")
        for name in FAMILIES
    }


def load(folder: Path, **arguments) -> EncodedText:
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_encoded_text(Accelerator(cpu=True), loop_arguments(folder, **arguments))


def loop_arguments(folder: Path, **arguments) -> LoopArguments:
    defaults = {"dataset": str(folder), "batch_size": 4, "random_flip": False, "report_to": "none"}
    return LoopArguments(**defaults | arguments)


def own_columns(name: str, pipe: DiffusionPipeline, caption: str) -> dict[str, torch.Tensor]:
    """What a pipeline's own `encode_prompt` makes of a caption, without guidance."""
    if name == "sd3":
        embeds, _, pooled, _ = pipe.encode_prompt(caption, None, None, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if name == "sdxl":
        embeds, unconditional, pooled, unconditional_pooled = pipe.encode_prompt(caption)
        if not caption:  # what its guidance takes for it: zeros
            embeds, pooled = unconditional, unconditional_pooled
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    embeds, mask = pipe.encode_prompt(caption, max_sequence_length=512)
    assert mask is None or mask.all()  # alone, a prompt has no padding
    return {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.bool)}


def assert_same_columns(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, column in wanted.items():
        torch.testing.assert_close(found[name], column, atol=1e-5, rtol=1e-4)


def test_images_that_wait_for_others_of_their_shape_lie_in_no_shared_memory(images, pipelines, tmp_path, monkeypatch):
    """Where the workers put them: containers often have 64 MB of it."""
    shared, rows = [], Encoder.rows

    def noted(encoder, items):
        shared.extend(item.image.is_shared() for item in items)
        return rows(encoder, items)

    monkeypatch.setattr(Encoder, "rows", noted)
    encode(pipelines["sd3"], images, tmp_path, dataloader_num_workers=1)
    assert shared == [False] * len(CAPTIONS)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_those_of_the_pipelines_own_encode_prompt(name, encoded, pipelines):
    pipe = DiffusionPipeline.from_pretrained(pipelines[name])
    data = load(encoded[name])
    assert data.training.rows["caption"] == CAPTIONS
    for row in (0, 1, 2):
        sample = data.training.samples[row]
        wanted = own_columns(name, pipe, CAPTIONS[row])
        assert {key: sample[key].shape for key in wanted} == {key: value[0].shape for key, value in wanted.items()}
        assert_same_columns({key: sample[key][None] for key in wanted}, wanted)
    assert_same_columns(data.empty_prompt, own_columns(name, pipe, ""))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_latents_are_the_scaled_distribution_of_the_vae(name, encoded, pipelines, images):
    vae = DiffusionPipeline.from_pretrained(pipelines[name]).vae
    sample = load(encoded[name]).training.samples[0]
    pixels = to_tensor(PIL.Image.open(images / "0.png"))[None]  # of 32 x 32 already
    for side, image in enumerate([pixels, pixels.flip(-1)][: len(sample["mean"])]):
        if name == "qwen":
            posterior = vae.encode(image[:, :, None]).latent_dist
            mean, std = (each[:, :, 0] for each in (posterior.mean, posterior.std))
            own_mean, own_std = (
                torch.tensor(vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std")
            )
            mean, std = (mean - own_mean) / own_std, std / own_std
        else:
            posterior = vae.encode(image).latent_dist
            mean = (posterior.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
            std = posterior.std * vae.config.scaling_factor
        torch.testing.assert_close(sample["mean"][side], mean[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sample["std"][side], std[0], atol=1e-5, rtol=1e-4)


def test_images_are_cropped_to_the_nearest_aspect_ratio(encoded):
    rows = load(encoded["sdxl"]).training
    assert list(zip(rows.rows["height"], rows.rows["width"]))[:5] == [(32, 32), (28, 36), (46, 22), (32, 32), (46, 22)]
    assert rows.samples[2]["mean"].shape == (1, 4, 46, 22)
    # 90 x 40 pixels become 50 x 22, of which two are cut off at the top
    assert rows.samples[4]["time_ids"].tolist() == [90, 40, 2, 0, 46, 22]


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_are_of_one_shape_and_the_denoiser_takes_them(name, encoded, pipelines):
    """With dropped captions, which of Qwen-Image are shorter than the others."""
    data = load(encoded[name], random_flip=name == "sd3")
    pipe = DiffusionPipeline.from_pretrained(pipelines[name])
    data.check_pipeline(pipe)
    text_pipeline = text_pipeline_of(pipe)
    model = getattr(pipe, text_pipeline.component)
    denoiser, conditions = TextDenoiser(text_pipeline.call, model, 1000), TextConditions(data.empty_prompt, 0.5)
    batches = data.training_batches(
        SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu")), loop_arguments(encoded[name]), 0
    )
    for _ in range(3):
        batch = next(batches)
        flips = torch.tensor([name == "sd3"] * 4)
        x0 = clean_samples(batch, flips, torch.zeros(4, *denoiser.shape_of(batch)))
        assert torch.equal(x0, batch["mean"][:, -1])
        dropped = conditions(batch, torch.tensor([0.9, 0.1, 0.9, 0.1]))
        for column, empty in data.empty_prompt.items():
            assert torch.equal(dropped[column][1, : empty.shape[1]], empty[0])
            assert not dropped[column][1, empty.shape[1] :].any() or column == "pooled_prompt_embeds"
            assert torch.equal(dropped[column][0, : batch[column].shape[1]], batch[column][0])
        with torch.no_grad():
            prediction = denoiser(model, x0, torch.full((4,), 500.0), dropped).sample
        assert prediction.shape == x0.shape
        assert prediction.isfinite().all()


def test_shorter_texts_of_a_batch_are_padded_with_zeros_and_masked():
    lengths = (2, 3, 1)
    samples = [
        {"prompt_embeds": torch.ones(length, 4), "mask": torch.ones(length, dtype=torch.bool)} for length in lengths
    ]
    batch = collate(samples)
    assert batch["mask"].tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert torch.equal(batch["prompt_embeds"], batch["mask"][..., None].expand(3, 3, 4).float())


def test_batches_are_the_same_for_any_number_of_processes(encoded):
    data, args = load(encoded["sdxl"]), loop_arguments(encoded["sdxl"])
    cpu = torch.device("cpu")
    one = data.training_batches(SimpleNamespace(num_processes=1, process_index=0, device=cpu), args, 2)
    two = [
        data.training_batches(SimpleNamespace(num_processes=2, process_index=index, device=cpu), args, 2)
        for index in range(2)
    ]
    for _ in range(4):
        batch, parts = next(one), [next(part) for part in two]
        assert all(torch.equal(batch[name], torch.cat([part[name] for part in parts])) for name in batch)


@pytest.mark.parametrize("num_processes", [1, 3])
def test_every_held_out_sample_is_validated_once_a_repeat(num_processes, encoded):
    data = load(encoded["sdxl"], validation_dataset=str(encoded["sdxl"]), validation_repeats=2)
    args = loop_arguments(encoded["sdxl"], validation_repeats=2)
    assert data.num_validation_samples(args) == 16
    seen = []
    for index in range(num_processes):
        accelerator = SimpleNamespace(num_processes=num_processes, process_index=index, device=torch.device("cpu"))
        for samples, batch in data.validation_batches(accelerator, args):
            seen += samples
            for sample, mean in zip(samples, batch["mean"]):
                assert torch.equal(mean, data.training.samples[sample % 8]["mean"])
    assert sorted(seen) == list(range(16))


def test_an_interrupted_encoding_goes_on(encoded, pipelines, images, tmp_path):
    folder = shutil.copytree(encoded["sdxl"], tmp_path / "encoded")
    shards = sorted(folder.glob("*.parquet"))
    assert [path.name for path in shards] == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    before = [path.read_bytes() for path in shards]
    shards[1].unlink()
    with pytest.raises(ValueError, match="hold the 8 images of its encoding.json, but got 5; run"):
        load(folder)
    kept = shards[0].stat().st_mtime_ns
    encode(pipelines["sdxl"], images, folder)
    assert [path.read_bytes() for path in shards] == before
    assert shards[0].stat().st_mtime_ns == kept


@pytest.mark.slow
def test_two_processes_complete_an_interrupted_encoding_as_one_would(encoded, pipelines, images, tmp_path):
    folder = shutil.copytree(encoded["sdxl"], tmp_path / "encoded")
    for path in sorted(folder.glob("*.parquet"))[1:]:
        path.unlink()
    sources = {"pipeline": pipelines["sdxl"], "dataset": images}
    launch_script("encode_prompts.py", folder, 2, ENCODING | sources)
    one, two = (load(each).training for each in (encoded["sdxl"], folder))
    assert one.identity() == two.identity()
    for first, second in zip(one.samples, two.samples):
        assert_same_columns(first, second)


def test_bfloat16_takes_half_the_space_and_is_the_same_encoder(encoded, pipelines, images, tmp_path):
    folder = encode(pipelines["sdxl"], images, tmp_path / "half", dtype="bfloat16")
    half, full = load(folder), load(encoded["sdxl"])
    assert half.training.samples[0]["prompt_embeds"].dtype == torch.bfloat16
    assert half.training.samples[0]["time_ids"].dtype == torch.float32  # 1023 pixels are no bfloat16 number
    assert len(half.training.rows[0]["prompt"]) < 0.6 * len(full.training.rows[0]["prompt"])
    batch = next(
        half.training_batches(
            SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu")), loop_arguments(folder), 0
        )
    )
    assert TextConditions(half.empty_prompt)(batch)["prompt_embeds"].dtype == torch.float32
    half.check_pipeline(DiffusionPipeline.from_pretrained(pipelines["sdxl"]))
    with pytest.raises(ValueError, match="have the dtype of `dataset`, float32, but got bfloat16"):
        load(encoded["sdxl"], validation_dataset=str(folder))


def test_captions_from_metadata_or_a_parquet_column(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images", ignore=shutil.ignore_patterns("*.txt"))
    lines = [json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    loaded = load_images(str(folder), label_column=None, text_column="text")
    assert captions_of(loaded, "text", str(folder)) == CAPTIONS
    with pytest.raises(ValueError, match=r"to be a column of the metadata in .*, \['text'\], but got 'caption'"):
        load_images(str(folder), label_column=None, text_column="caption")
    loaded.rename_column("text", "prompt").to_parquet(tmp_path / "data.parquet")
    table = load_images(str(tmp_path / "data.parquet"), label_column=None, text_column="prompt")
    assert captions_of(table, "prompt", "data") == CAPTIONS


def test_missing_captions_are_named(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    for number in (1, 4):
        (folder / f"{number}.txt").unlink()
    with pytest.raises(ValueError, match=r"got none for 2 of 8: 1\.png, 4\.png"):
        encode(None, folder, tmp_path / "encoded")
    rows = datasets.Dataset.from_dict({"text": ["a", None, "", None]})
    with pytest.raises(ValueError, match="got none for 2 of 4: row 1, row 3"):
        captions_of(rows, "text", "data")
    with pytest.raises(ValueError, match="to be a column of text, but got"):
        captions_of(datasets.Dataset.from_dict({"text": [["a", "b"]]}), "text", "data")


def test_pipelines_that_cannot_encode_are_refused(pipelines, images, tmp_path):
    with pytest.raises(ValueError, match="to be divisible by the 2 pixels"):
        encode(pipelines["sd3"], images, tmp_path, resolution=33)
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd3"])
    pipe.vae = None
    with pytest.raises(ValueError, match="to have a VAE, but got a StableDiffusion3Pipeline without one"):
        encode(None, images, tmp_path, pipe)
    pipe = RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())
    with pytest.raises(ValueError, match="without `tokenizer`, `text_encoder`"):
        encode(None, images, tmp_path, pipe)
    with pytest.raises(ValueError, match="teach how its denoiser is called"):
        encode(None, images, tmp_path, SimpleNamespace())
    with pytest.raises(ValueError, match="without a model_index.json"):
        encode(images, images, tmp_path)
    assert not list(tmp_path.iterdir())


class HugePipeline(StableDiffusion3Pipeline):
    """Of a family of its own."""


class HugeText(StableDiffusion3Text):
    """Numbers that float16 has not."""

    def prompt_columns(self, pipeline, prompts):
        return {name: column + 1e6 for name, column in super().prompt_columns(pipeline, prompts).items()}


def test_a_pipeline_that_is_taught_and_numbers_that_overflow(pipelines, images, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_dmp.training.text_pipelines.registry._REGISTERED", {})
    register_conditions(HugePipeline, HugeText())
    pipe = HugePipeline(**DiffusionPipeline.from_pretrained(pipelines["sd3"]).components)
    with pytest.raises(
        ValueError, match="'prompt_embeds' is not, of .*, in float16; bfloat16 and float32 reach further"
    ):
        encode(None, images, tmp_path / "half", pipe, dtype="float16")
    data = load(encode(None, images, tmp_path / "full", pipe, shard_size=8))
    assert data.empty_prompt["prompt_embeds"].min() > 9e5


def test_shards_of_another_encoding_are_refused(encoded, pipelines, images, tmp_path):
    folder = shutil.copytree(encoded["sd3"], tmp_path / "encoded")
    with pytest.raises(ValueError, match="Expected `mirror` to be True, as in the encoding that"):
        encode(pipelines["sd3"], images, folder)
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd3"])
    with torch.no_grad():
        pipe.text_encoder_3.shared.weight[5, 5] += 0.5
    with pytest.raises(ValueError, match="by this pipeline's `text_encoder_3`, but it has another weights"):
        encode(None, images, folder, pipe, mirror=True)
    with pytest.raises(ValueError, match="`random_flip` to be false for .* without mirror images"):
        load(encoded["sdxl"], random_flip=True)
    with pytest.raises(ValueError, match="to be a folder that encode_prompts.py wrote, but it has no encoding.json"):
        load(images)
    with pytest.raises(ValueError, match="pipeline_class of `dataset`, StableDiffusionXLPipeline, but got Stable"):
        load(encoded["sdxl"], validation_dataset=str(encoded["sd3"]))


def test_training_another_pipeline_than_the_one_that_encoded_is_refused(encoded, pipelines, tmp_path):
    data = load(encoded["sd3"])
    with pytest.raises(
        ValueError, match="encoded by a StableDiffusionXLPipeline, as it is to be trained, but got images"
    ):
        data.check_pipeline(RECIPES["sdxl"].pipe(RECIPES["sdxl"].denoiser()))

    without_text = DiffusionPipeline.from_pretrained(
        pipelines["sd3"], text_encoder=None, text_encoder_2=None, text_encoder_3=None
    )
    data.check_pipeline(without_text, str(pipelines["sd3"]))
    other = shutil.copytree(pipelines["sd3"], tmp_path / "other")
    path = other / "text_encoder_3" / "config.json"
    path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(ValueError, match="`text_encoder_3`, but it has the num_layers 3 and not 2"):
        data.check_pipeline(without_text, str(other))

    with torch.no_grad():
        without_text.vae.encoder.conv_in.weight.mul_(1.5)
    with pytest.raises(ValueError, match="`vae`, but it has another weights"):
        data.check_pipeline(without_text)
    wide = DiffusionPipeline.from_pretrained(
        pipelines["sd3"], transformer=RECIPES["sd3"].denoiser(joint_attention_dim=48)
    )
    with pytest.raises(ValueError, match="to be 48 wide, as this pipeline's denoiser takes them, but got 32"):
        data.check_pipeline(wide)
    more = DiffusionPipeline.from_pretrained(pipelines["sd3"], transformer=RECIPES["sd3"].denoiser(in_channels=8))
    with pytest.raises(ValueError, match="the channels that this pipeline's denoiser takes, 8, but got 4"):
        data.check_pipeline(more)


@pytest.mark.parametrize("name", ["flux", "wan", "zimage", "qwen"])  # all kinds of text encoders and VAEs
def test_an_encoder_is_known_whether_it_is_loaded_or_not(name, tmp_path):
    """What transformers changes in a configuration while it loads a model makes no difference."""
    pipe = with_text(name, RECIPES[name].pipe(RECIPES[name].denoiser()))
    pipe.save_pretrained(tmp_path)
    records = {key: component_record(component) for key, component in encoders_of(pipe).items()}
    encoding = {"pipeline_class": type(pipe).__name__, COMPONENTS: json.loads(json.dumps(records))}
    halves = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    check_encoding(encoding, halves)
    unloaded = halves.register_modules(**dict.fromkeys(records)) or halves
    assert not encoders_of(unloaded)
    check_encoding(encoding, unloaded, str(tmp_path))


def test_a_text_encoder_that_was_left_out_is_said(encoded, pipelines, caplog):
    """Stable Diffusion 3 may be encoded without T5, of which training then knows zeros; inference would load it."""
    encoding = json.loads((encoded["sd3"] / "encoding.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd3"])
    check_encoding(encoding, pipe, str(pipelines["sd3"]))
    assert "without" not in caplog.text
    del encoding["components"]["text_encoder_3"]
    check_encoding(encoding, pipe, str(pipelines["sd3"]))
    assert "encoded without `text_encoder_3` of this pipeline" in caplog.text


def test_identity_says_what_the_data_are(encoded):
    data = load(encoded["sd3"])
    identity = data.identity(loop_arguments(encoded["sd3"]))
    assert identity == json.loads(json.dumps(identity))
    assert identity["images"] == 8
    assert set(identity["encoders"]) == {"vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert identity != load(encoded["sdxl"]).identity(loop_arguments(encoded["sdxl"]))
    assert data.describe().startswith(
        "8 images with captions, with mirror images, encoded for StableDiffusion3Pipeline: "
    )
