"""The commands of `diffusers-dmp`."""

import sys

import pytest
import torch
import yaml
from conftest import TINY_CONFIG, Vectors, randomised
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import RECIPES
from typer.testing import CliRunner

from diffusers_dmp import (
    ClassConditionalPipeline,
    DTRTransformer2DModel,
    LoraExperts,
    NoiseIntervals,
    PromptPatch,
    RemixDiTModel,
)
from diffusers_dmp.cli import app, main
from diffusers_dmp.diffusion.schedulers import SCHEDULERS

GREY = TINY_CONFIG | {"in_channels": 1, "out_channels": 1}


@pytest.fixture
def folder(tmp_path):
    """An `output_dir` as a training leaves it."""
    pipeline = ClassConditionalPipeline(
        randomised(DTRTransformer2DModel(**GREY)), DDIMScheduler(), id2label={"3": "three", "5": "five"}
    )
    pipeline.save_pretrained(tmp_path / "output" / "pipeline")
    return tmp_path / "output"


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["export"], ["sample"], ["guide"], ["convert"], ["publish"], ["plot"], ["diagnose"], ["info"]],
)
def test_help(command):
    output = run(*command, "--help")
    assert "Usage" in output
    if command:
        assert "diffusers-dmp" in output  # an example


@pytest.mark.parametrize("scheduler", [None, "ddim", *SCHEDULERS])
def test_sample(folder, tmp_path, scheduler):
    chosen = [] if scheduler is None else ["--scheduler", scheduler]
    picture = tmp_path / "grid.png"
    run("sample", folder, "--output", picture, "--label", "three", "--label", 8, "--num-images-per-label", 3, "--num_inference_steps", 2,
        "--guidance-scale", 1.5, "--pixel-size", 2, "--device", "cpu", *chosen)  # fmt: skip
    image = Image.open(picture)
    assert image.size == (2 * (16 + 2) + 2, 3 * (16 + 2) + 2)
    assert len(image.getcolors()) > 2


def test_the_seed_determines_the_images(folder, tmp_path):
    pictures = []
    for index, seed in enumerate((0, 0, 1)):
        run(
            "sample",
            folder,
            "--output",
            tmp_path / f"{index}.png",
            "--num_inference_steps",
            2,
            "--seed",
            seed,
            "--device",
            "cpu",
        )
        pictures.append(Image.open(tmp_path / f"{index}.png").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.fixture
def numbered(tmp_path):
    """A pipeline whose classes are called 1 to 10, in the order in which their folders are sorted by name: 1, 10, 2, …"""
    names = sorted(map(str, range(1, 11)))
    pipeline = ClassConditionalPipeline(
        randomised(DTRTransformer2DModel(**GREY)), DDIMScheduler(), id2label=dict(zip(map(str, range(10)), names))
    )
    pipeline.save_pretrained(tmp_path / "numbered")
    return tmp_path / "numbered"


def sampled(folder, tmp_path, *classes) -> tuple[bytes, str]:
    """The pixels of one image of each class, and which classes the command says they are."""
    picture = tmp_path / "sampled.png"
    output = run("sample", folder, "--output", picture, "--num_images_per_label", 1, "--num_inference_steps", 2,
                 "--device", "cpu", *classes)  # fmt: skip
    return Image.open(picture).tobytes(), output.strip().rpartition(": ")[2]


def test_a_label_is_a_name_before_it_is_an_index(numbered, folder, tmp_path):
    image, said = sampled(numbered, tmp_path, "--label", "10")
    assert said == "10" and image == sampled(numbered, tmp_path, "--class_index", "1")[0]
    assert image != sampled(numbered, tmp_path, "--label", "2")[0]
    null_class, said = sampled(numbered, tmp_path, "--class_index", "10")
    assert said == "no class" and null_class != image
    assert sampled(numbered, tmp_path, "--label", "0")[1] == "1"  # no class is called 0
    assert (
        sampled(folder, tmp_path, "--label", "three", "--label", "8", "--class_index", "5")[1]
        == "three, class 8, five"
    )


def test_convert(tmp_path):
    published = Vectors("dtr_tiny")
    torch.save({"ema": published.state_dict}, tmp_path / "checkpoint.pt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(published.config))
    command = ["convert", "dtr", tmp_path / "checkpoint.pt", "--output_dir", tmp_path / "model"]
    run(*command, "--config", tmp_path / "config.yaml")
    assert DTRTransformer2DModel.from_pretrained(tmp_path / "model").num_parameters() > 0


def test_convert_prompts(tmp_path):
    """A checkpoint of DMP holds a transformer and prompts, which are saved in two folders."""
    published = Vectors("dmp_tiny")
    torch.save(published.state_dict, tmp_path / "checkpoint.pt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(published.config))
    run("convert", "dmp", tmp_path / "checkpoint.pt", "--output_dir", tmp_path, "--config", tmp_path / "config.yaml")
    assert PromptPatch.from_pretrained(tmp_path / "patch").config.depth > 0
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


def test_convert_pickled_weights(tmp_path):
    model = randomised(RemixDiTModel(**GREY, num_bases=2, num_experts=4))
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    run("convert", "remix", tmp_path / "pickled", "--output_dir", tmp_path / "safe")
    again = RemixDiTModel.from_pretrained(tmp_path / "safe")
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_publish_shows_what_would_be_uploaded(folder):
    output = run("publish", folder, "user/dtr", "--license", "mit", "--dry-run")
    assert "transformer/diffusion_pytorch_model.safetensors" in output
    assert "license: mit" in output


def test_old_options_warn(folder, tmp_path):
    with pytest.warns(FutureWarning, match="`--output` is now `--output_dir`; the old name works until 0.4"):
        run("plot", folder, "--output", tmp_path / "plots")
    assert (tmp_path / "plots" / "routing.png").is_file()


def test_plot(folder, tmp_path):
    run("plot", folder, "--output_dir", tmp_path / "plots", "--timestep", 300)
    assert Image.open(tmp_path / "plots" / "routing.png").size[0] > 500


def test_info(folder):
    summary = yaml.safe_load(run("info", folder))
    assert (summary["system"], summary["class"]) == ("dtr", "ClassConditionalPipeline")


def test_errors_are_reported_in_one_line(folder, tmp_path, capsys, monkeypatch):
    garbage, listing, stock = tmp_path / "garbage.pt", tmp_path / "list.yaml", tmp_path / "stock"
    garbage.write_bytes(b"garbage")
    listing.write_text("- num_heads")
    DDPMPipeline(UNet2DModel(8, block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]),
                 DDPMScheduler()).save_pretrained(stock)  # fmt: skip
    for arguments, message in [
        (["info", "/nowhere/at/all"], "'/nowhere/at/all': there is no such file or folder"),
        (["info", listing], "to be a safetensors file, but got text that begins with '- num_heads'"),
        (["plot", "nowhere/at/all"], "'nowhere/at/all': there is no such folder"),
        (["sample", "./nowhere"], "'./nowhere': there is no such folder"),
        (["diagnose", folder, "--dataset", tmp_path / "nowhere"], "nowhere': there is no such file or folder"),
        (["publish", tmp_path / "nowhere", "user/dtr", "--license", "mit"], "nowhere': there is none"),
        (["convert", "dit", tmp_path / "nowhere.pt", "--output_dir", "x"], "nowhere.pt': there is none"),
        (
            ["convert", "dit", garbage, "--output_dir", "x", "--config", "no.yaml"],
            "'no.yaml' to be YAML, but there is no such file",
        ),
        (["export", tmp_path / "nowhere", tmp_path / "x"], "to be a folder checkpoint-<step>, but got"),
        (
            ["sample", folder, "--class_index", 11, "--device", "no"],
            "`--class_index` to be an index in [0, 10], but got 11. The index 10 is the null class",
        ),
        (
            ["sample", folder, "--label", "three", "--label", 12],
            "`--label` to be the name of a class, or an index in [0, 10], but got 12. "
            "The index 10 is the null class: no class. The names are ['three', 'five'].",
        ),
        (["info", folder.parent], "to hold a model_index.json"),
        (["sample", folder, "--label", "seven", "--device", "cpu"], "`--label` to be among ['three', 'five']"),
        (["sample", folder, "--device", "gpu"], "`--device` to be a device of this computer, but got 'gpu'"),
        (["sample", folder, "--output", "grid.mp4"], "to be an image file in an existing folder, but got 'grid.mp4'"),
        (["sample", folder, "--scheduler", "PNDM"], "`scheduler` to be one of DDIM, DDPM, "),
        (["convert", "gan", garbage, "--output_dir", "x"], "`system` to be one of dit, dtr, remix, "),
        (
            ["convert", "dit", garbage, "--output_dir", "x", "--config", listing],
            "to hold a YAML mapping, but got list",
        ),
        (["plot", folder, "--timestep", 1000], "`--timestep` to be at most 999, but got 1000"),
        (
            ["convert", "dit", garbage, "--output_dir", "x"],
            "to be a file of weights, but got text that begins with 'garbage'",
        ),
        (["convert", "dit", garbage, garbage, "--output_dir", "x"], "one checkpoint of dit, but got 2"),
        (
            ["convert", "dit", folder, "--output_dir", "x"],
            "the folder of a model of dit, but got that of a ClassConditional",
        ),
        (["sample", stock], "to hold a ClassConditionalPipeline or SNRSplitPipeline, but got a DDPMPipeline"),
        (["publish", folder, "user/dtr", "--license", "mit"], "a token to write with"),
    ]:
        monkeypatch.setattr(sys, "argv", ["diffusers-dmp", *map(str, arguments)])
        monkeypatch.setattr("diffusers_dmp.hub.publishing.get_token", lambda: None)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffusers-dmp: ")]
        assert message in line


@pytest.fixture
def loras(tmp_path):
    """Two LoRA experts, as `save_pretrained` writes them."""
    denoiser = RECIPES["sd3"].denoiser()
    for name, rank in (("low", 2), ("high", 4)):
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["to_q"]), name)
    intervals = NoiseIntervals.from_sigmas([0.875])
    LoraExperts([("low", 0.5), "high"], intervals).attach(denoiser).save_pretrained(tmp_path / "loras")
    return tmp_path / "loras"


def test_info_of_loras(loras):
    """Which noise each of them owns, its rank and its alpha: of experts, of a file, of files without more."""
    high = {
        "noise": "timesteps 875 to 1000 of 1000 (σ 0.875 to 1 in flow matching)",
        "model": "SD3Transformer2DModel",
        "rank": 4,
        "alpha": 8,
    }
    low = {"noise": "timesteps 0 to 875 of 1000 (σ 0 to 0.875 in flow matching)", "model": "SD3Transformer2DModel",
           "rank": 2, "alpha": 4, "weight": 0.5}  # fmt: skip
    summary = yaml.safe_load(run("info", loras))
    assert summary["noise"] == [f"0.5 times low: {low['noise']}", f"high: {high['noise']}"]
    assert summary["files"] == {"high.safetensors": high, "low.safetensors": low}
    assert (summary["system"], summary["model"]) == ("lora_experts", "SD3Transformer2DModel")
    assert yaml.safe_load(run("info", loras / "high.safetensors")) == high
    (loras / "lora_experts.json").unlink()
    assert yaml.safe_load(run("info", loras)) == {"high.safetensors": high, "low.safetensors": low}


def test_info_of_loras_of_other_trainers(tmp_path):
    """Kohya's metadata, which names the timesteps if the training was given any."""
    tensors = {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(4, 8)}
    tensors["lora_unet_blocks_0_self_attn_q.lora_up.weight"] = torch.zeros(8, 4)
    tensors["lora_unet_blocks_0_self_attn_q.alpha"] = torch.tensor(2.0)
    metadata = {"modelspec.architecture": "wan2.1/lora", "ss_sd_model_name": "wan2.2_high_noise.safetensors"}
    for name, more in (("named", {"modelspec.timestep_range": "875,1000"}), ("unnamed", {})):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=metadata | more)
    said = {"model": "wan2.1/lora", "rank": 4, "alpha": 2, "base model file": "wan2.2_high_noise.safetensors"}
    assert yaml.safe_load(run("info", tmp_path)) == {
        "named.safetensors": {"noise": "timesteps 875 to 1000 of 1000 (σ 0.875 to 1 in flow matching)"} | said,
        "unnamed.safetensors": {"noise": "none: its metadata names no interval"} | said,
    }
