"""`diffusers-dmp guide`: any pipeline, guided by a vision network, as an image of what was asked for beside what was not."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from networks import make_dpt, make_resnet, make_segformer
from PIL import Image
from tiny_clip import save_clip, save_siglip
from tiny_pipelines import RECIPES
from tiny_text import with_text
from typer.testing import CliRunner

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.cli import app, main
from diffusers_dmp.cli.asking import Asked, columns_of
from diffusers_dmp.cli.generating import StepClock

ANIMALS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark", 3: "zebra", 4: "lion"} | {
    index: f"animal {index}" for index in range(5, 30)
}
PROCESSOR = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": %s, "size": {"height": 32, "width": 32}}'


def saved(network, folder: Path, resizes: bool = False) -> Path:
    """A network of transformers as it lies on the Hub."""
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PROCESSOR % ("true" if resizes else "false"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Vision networks, a training's output with experts, and a pipeline of pixels and one of text, in folders."""
    folder = tmp_path_factory.mktemp("guide")
    resnet = saved(make_resnet(num_labels=30, id2label=ANIMALS), folder / "resnet")
    saved(make_dpt(), folder / "dpt", resizes=True)
    saved(make_segformer(), folder / "segformer", resizes=True)
    saved(make_segformer(), folder / "any_size")
    save_clip(folder / "clip")
    save_siglip(folder / "siglip")
    experts = GuidanceExperts.from_base(str(resnet), num_experts=2, noise_schedule={"beta_schedule": "linear"})
    experts.save_pretrained(folder / "ppap" / "experts")
    unet = UNet2DModel(
        16,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "pixels")
    for name in ("sd3", "wan"):
        with_text(name, RECIPES[name].pipe(RECIPES[name].denoiser())).save_pretrained(folder / name)
    Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(folder / "photo.png")
    Image.new("L", (16, 16), 3).save(folder / "map.png")
    return folder


def guide(folder: Path, output: Path, *arguments, pipeline: str = "pixels") -> str:
    """Run the command; its line about what it did."""
    command = ["guide", folder / pipeline, "--out", output, "--num_inference_steps", 3, "--device", "cpu", *arguments]
    result = CliRunner().invoke(app, [str(each) for each in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[-1]


def tiles(picture: Path, columns: int, rows: int, gap: int = 1) -> list[list[bytes]]:
    """The images of a grid, by column."""
    grid = Image.open(picture)
    width, height = (grid.width - gap) // columns, (grid.height - gap) // rows
    return [
        [
            grid.crop((x * width + gap, y * height + gap, (x + 1) * width, (y + 1) * height)).tobytes()
            for y in range(rows)
        ]
        for x in range(columns)
    ]


def test_classes_by_trained_experts(folder, tmp_path):
    """One column for each class, all from the same noise."""
    said = guide(folder, tmp_path / "grid.png", "--experts", folder / "ppap", "--class", "zebra", "--class", 1, "--scale", 100,
                 "--num_images", 2, "--scheduler", "ddim", "--compare", "--pixel_size", 2)  # fmt: skip
    assert Image.open(tmp_path / "grid.png").size == (2 * (3 * 17 + 1), 2 * (2 * 17 + 1))
    unguided, zebra, goldfish = tiles(tmp_path / "grid.png", 3, 2, gap=2)
    assert len({*unguided, *zebra, *goldfish}) == 6
    pattern = (
        r"4 guided images in .*grid\.png: zebra, goldfish; ResNetForImageClassification: recognises \d of 4 "
        r"\(unguided \d of 4\); [\d.e-]+ s per step \(unguided [\d.e-]+ s\)"
    )
    assert re.fullmatch(pattern, said)


@pytest.mark.parametrize("pipeline", ["pixels", "sd3"])
def test_scale_zero_is_no_guidance(folder, tmp_path, pipeline):
    arguments = ["--prompt", "a zebra", "--height", 16, "--width", 16] if pipeline == "sd3" else []
    arguments += ["--network", folder / "resnet", "--class", "zebra", "--compare"]
    for scale in (0, 500):
        guide(folder, tmp_path / f"{scale}.png", *arguments, "--scale", scale, pipeline=pipeline)
    assert Image.open(tmp_path / "0.png").size == (2 * 17 + 1, 17 + 1)
    (without,), (scaled_by_zero,) = tiles(tmp_path / "0.png", 2, 1)
    (again,), (guided,) = tiles(tmp_path / "500.png", 2, 1)
    assert without == scaled_by_zero == again != guided


@pytest.mark.parametrize("network", ["clip", "siglip"])
def test_texts(folder, tmp_path, network):
    arguments = ["--network", folder / network, "--text", "a red car", "--text", "a zebra at night", "--scale", 1000]
    said = guide(folder, tmp_path / "grid.png", *arguments, "--scheduler", "ddim", "--num_images", 2)
    car, zebra = tiles(tmp_path / "grid.png", 2, 2)
    assert len({*car, *zebra}) == 4
    assert re.search(r': "a red car", "a zebra at night"; \w+: log p = -?\S+$', said)


def test_videos(folder, tmp_path):
    """A strip of frames, or an animation; the network sees the frames that are named."""
    arguments = [
        "--prompt",
        "a lion",
        "--network",
        folder / "resnet",
        "--class",
        "lion",
        "--frames",
        0,
        "--frames",
        -1,
    ]
    arguments += ["--height", 16, "--width", 16, "--num_frames", 9, "--compare", "--scale", 0]
    said = guide(folder, tmp_path / "strip.png", *arguments, pipeline="wan")
    assert Image.open(tmp_path / "strip.png").size == (2 * (8 * 16 + 1) + 1, 17 + 1)
    without, guided = tiles(tmp_path / "strip.png", 2, 1)
    assert without == guided and "1 guided video in " in said
    guide(folder, tmp_path / "animation.gif", *arguments, pipeline="wan")
    animation = Image.open(tmp_path / "animation.gif")
    assert (animation.n_frames, animation.size) == (9, (2 * 17 + 1, 17 + 1))


@pytest.mark.parametrize(
    ("network", "option", "file", "scale", "title"),
    [
        ("dpt", "--depth", "photo.png", 1e8, "the depth of photo.png"),
        ("segformer", "--segmentation", "map.png", 1e4, "the map map.png"),
    ],
)
def test_maps(folder, tmp_path, network, option, file, scale, title):
    arguments = ["--network", folder / network, option, folder / file, "--scale", scale, "--scheduler", "ddim"]
    said = guide(folder, tmp_path / "grid.png", *arguments, "--compare")
    (without,), (guided,) = tiles(tmp_path / "grid.png", 2, 1)
    assert without != guided
    assert re.search(rf": {title}; \w+: log p = -\S+ \(unguided -\S+\); ", said)


def test_the_depth_of_a_photograph_is_asked_for_as_the_network_sees_it(folder):
    vision = GuidanceExperts.from_base(str(folder / "dpt"), num_experts=1, method="finetune")
    (column,) = columns_of(Asked(depth=folder / "photo.png"), vision, (40, 48))
    photograph = Image.open(folder / "photo.png")
    assert column.judge(vision, [[photograph]])[0] == pytest.approx(0, abs=1e-12)
    assert column.judge(vision, [[photograph.rotate(180)]])[0] < -1e-9


def test_a_map_is_asked_for_in_the_size_of_the_logits(folder, tmp_path):
    """255 is any class."""
    vision = GuidanceExperts.from_base(str(folder / "segformer"), num_experts=1, method="finetune")
    left_is_3 = Image.new("L", (16, 16), 255)
    left_is_3.paste(3, (0, 0, 8, 16))
    left_is_3.save(tmp_path / "map.png")
    (column,) = columns_of(Asked(segmentation=tmp_path / "map.png"), vision, None)
    assert column.target.classes.tolist() == [
        [[3] * 4 + [255] * 4] * 8
    ]  # Segformer's logits are a quarter of 32 pixels
    assert column.target.ignore_index == 255


@pytest.mark.parametrize("calls_per_step", [1, 2])
def test_the_clock_counts_steps_not_calls(monkeypatch, calls_per_step):
    """The first step, in which kernels are loaded, is left out."""
    clock = StepClock(SimpleNamespace(device=torch.device("cpu")))
    moments = [0, 7] if calls_per_step == 1 else [0, 5, 7, 8]
    moments += [
        moment
        for step in range(1, 4)
        for moment in ([7 + 3 * step] if calls_per_step == 1 else [7 + 3 * step, 8 + 3 * step])
    ]
    times = iter(map(float, moments))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    for _ in moments:
        clock._note()
    assert clock.seconds_per_step(5) == pytest.approx(3.0)
    assert StepClock(clock.pipe).seconds_per_step(5) is None


def test_help_and_the_long_name():
    result = CliRunner().invoke(app, ["guide", "--help"])
    assert "--output" in result.output and "--timestep_range" in result.output


def test_errors_come_in_one_line_before_the_pipeline_is_loaded(folder, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the pipeline is loaded")

    monkeypatch.setattr("diffusers_dmp.cli.guiding.load_any_pipeline", load)
    pixels, resnet, picture = folder / "pixels", folder / "resnet", tmp_path / "guided.png"
    zebra = ["--network", resnet, "--class", "zebra"]
    sd3 = [folder / "sd3", "--prompt", "a zebra"]
    shutil.copytree(folder / "ppap" / "experts", folder / "moved")
    config = json.loads((folder / "moved" / "config.json").read_text())
    (folder / "moved" / "config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "somewhere/else/base"})
    )
    for arguments, message in [
        ([pixels, "--network", resnet], "`--class`, `--text`, `--depth` or `--segmentation`"),
        ([pixels, "--class", "zebra"], "`--experts` or a `--network` as it is, but got neither"),
        ([pixels, *zebra, "--experts", folder / "ppap"], "but got both"),
        ([pixels, "--network", resnet, "--class", "zebbra"], "`--class` to be among the 30 classes, such as ['zebra'"),
        ([pixels, "--network", resnet, "--class", 30], "indices are in [0, 29], but got 30"),
        ([pixels, *zebra, "--prompt", "a zebra"], "Expected no `--prompt` for a DDPMPipeline"),
        ([folder / "sd3", *zebra], "Expected `--prompt` for a StableDiffusion3Pipeline"),
        ([*sd3, *zebra, "--num_frames", 9], "Expected no `--num_frames` for a Stable"),
        ([tmp_path / "nowhere", *zebra], "nowhere': there is no such folder"),
        ([pixels, "--network", tmp_path / "nowhere", "--class", 1], "nowhere': there is no such folder"),
        ([pixels, "--experts", folder / "resnet", "--class", 1], "to be that of guidance experts"),
        ([pixels, "--network", folder / "clip", "--class", "zebra"], "an image classifier, with `logits` (B, K), for a ClassTarget"),
        ([pixels, "--network", resnet, "--text", "a zebra"], "resnet' to be one of CLIPModel, SiglipModel"),
        ([pixels, "--network", resnet, "--depth", folder / "photo.png"], "estimates depth for `--depth`, but got a ResNet"),
        ([pixels, "--network", resnet, "--depth", folder / "sd3" / "model_index.json"], "cannot identify image file"),
        ([pixels, "--network", resnet, "--segmentation", folder / "photo.png"], "of one channel with the index of a class"),
        ([*sd3, "--network", folder / "any_size", "--segmentation", folder / "map.png"], "`--height` and `--width` with"),
        ([pixels, *zebra, "--output", "guided.mp4"], "to be an image file in an existing folder, but got 'guided.mp4'"),
        ([pixels, *zebra, "--output", "guided.psd"], "to be an image file in an existing folder, but got 'guided.psd'"),
        ([pixels, *zebra, "--scale", "nan"], "`--scale` to be a finite number, but got nan"),
        ([folder / "sd3", *zebra, "--prompt", "a", "--guidance_scale", "inf"], "`--guidance_scale` to be a finite number"),
        ([pixels, *zebra, "--timestep_range", 900, 100], "two training timesteps, 0 <= low < high"),
        ([pixels, "--experts", folder / "moved", "--class", 1], "in 'somewhere/else/base', but there is no such folder here"),
        ([pixels, *zebra, "--dtype", "int8"], "`--dtype` to be one of float32, float16, bfloat16, but got 'int8'"),
        ([pixels, *zebra, "--scheduler", "PNDM"], "`scheduler` to be one of DDIM, "),
        ([pixels, *zebra, "--every", 0], "--every"),
        ([pixels, *zebra, "--class", 1, "--text", "a", "--text", "b"], "but got several of both"),
    ]:  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["diffusers-dmp", "guide", "--out", str(picture), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffusers-dmp: ")]
        assert message in line
    assert not picture.exists()


def test_gradients_that_are_not_finite_are_an_error_of_one_line(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"finite gradients, but got others at timestep \d+, from expert 1\. A smaller `--scale`"
    ):
        guide(folder, tmp_path / "grid.png", "--experts", folder / "ppap", "--class", "zebra", "--scale", 1e40)


@pytest.mark.slow
def test_the_program(folder, tmp_path):
    command = [sys.executable, "-c", "from diffusers_dmp.cli import main; main()", "guide", folder / "pixels"]
    command += ["--experts", folder / "ppap", "--class", "zebra", "--num_inference_steps", 3, "--device", "cpu"]
    result = subprocess.run([*map(str, command), f"--out={tmp_path / 'zebra.png'}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (said,) = result.stdout.splitlines()
    assert said.startswith(f"1 guided image in {tmp_path / 'zebra.png'}: zebra; ")
    assert Image.open(tmp_path / "zebra.png").size == (18, 18)
