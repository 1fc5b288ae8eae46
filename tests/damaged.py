"""Damaged inputs as people really have them, and what the package says about each:

python -m tests.damaged  # writes the table in docs/reliability.md

A case makes one damaged file in an empty folder and calls what a user would call with it.
"""
# ruff: noqa: E402

import io
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "hub")]  # as pytest has them

import conftest  # before the libraries, as it hides GPUs and the network
import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from networks import make_resnet
from safetensors.torch import load, save, save_file
from small_pipelines import DIT, PIPELINES, patched

from diffusers_dmp import DiTModel, DTRTransformer2DModel, GuidanceExperts, PromptPatch, load_original_state_dict
from diffusers_dmp.cli import app
from diffusers_dmp.evaluation.evaluate import EvaluationArguments, evaluate
from diffusers_dmp.evaluation.inception import load_inception
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.base_schedule import check_base_schedule
from diffusers_dmp.training.data.images import load_images
from diffusers_dmp.training.data.latents import check_latents
from diffusers_dmp.training.data.training_data import load_vae
from diffusers_dmp.training.dit_family import load_dit_family
from diffusers_dmp.training.parsing import parse_arguments

DOCUMENT = conftest.REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- damaged inputs: python -m tests.damaged -->", "<!-- end of damaged inputs -->"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 2700000000\n"
WEB_PAGE = "<!DOCTYPE html>\n<html><head><title>DiT.pt · Hugging Face</title></head><body></body></html>"
WEIGHTS, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


@dataclass(frozen=True)
class Damaged:
    """A damaged input, by what it is and where it goes in; `feed` makes it in a folder and feeds it in."""

    what: str
    entry: str
    named: str  # the file or folder that the message has to name, in the case's folder
    feed: Callable[[Path], object]

    def __str__(self) -> str:
        return f"{self.entry}: {self.what}"


CASES: list[Damaged] = []


def damaged(what: str, entry: str, named: str) -> Callable:
    def register(feed: Callable[[Path], object]) -> Callable:
        CASES.append(Damaged(what, entry, named, feed))
        return feed

    return register


def said(case: Damaged, here: Path) -> str:
    """The error of a case, without its folder's path and sizes. Any other error, or none, is an error of this function."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        try:
            case.feed(here)
        except (ValueError, OSError) as error:
            message = str(error).replace(f"{here}{os.sep}", "")
            return re.sub(r"\d[\d,]* bytes", "n bytes", re.sub(r"the \d[\d,]* that", "the m that", message))
    raise AssertionError(f"Expected an error for {case}, but got none.")


def command(*arguments: object) -> None:
    """`diffusers-dmp …`; a user's error is raised."""
    app([str(each) for each in arguments], standalone_mode=False)


# what is whole --------------------------------------------------------------------------------------------------------


def published() -> dict[str, torch.Tensor]:
    """The weights of a published DiT, tiny."""
    return conftest.Vectors("dit_tiny").state_dict


def pipeline(here: Path) -> Path:
    """The output of a training."""
    folder = here / "output"
    torch.manual_seed(0)
    PIPELINES["dit"]().save_pretrained(folder / "pipeline")
    return folder


def experts(here: Path) -> Path:
    torch.manual_seed(0)
    make_resnet().save_pretrained(here / "network")
    (here / "network" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5], "image_std": [0.5], "do_resize": False})
    )
    GuidanceExperts.from_base(str(here / "network"), num_experts=2, rank=2).save_pretrained(here / "experts")
    return here / "experts"


def cut(path: Path, share: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in memory, so that the file can be written again."""
    return load(path.read_bytes())


def convert(path: Path, *arguments: object) -> None:
    command("convert", "dit", path, "--output", path.parent / "model", *arguments)


# published files ------------------------------------------------------------------------------------------------------

CONVERT = "`convert dit`"


def published_file(what: str, name: str = "DiT.pt") -> Callable:
    """A case whose function writes the file `name`, which is then converted."""

    def register(write: Callable[[Path], object]) -> Callable:
        def feed(here: Path) -> None:
            write(here / name)
            (here / "heads.yaml").write_text("num_heads: 4\n")
            convert(here / name, "--config", here / "heads.yaml")

        CASES.append(Damaged(what, CONVERT, name, feed))
        return write

    return register


@published_file("no such file")
def _(path):
    pass


@published_file("an empty file")
def _(path):
    path.touch()


@published_file("a Git LFS pointer")
def _(path):
    path.write_text(LFS)


@published_file("a web page saved as `.pt`")
def _(path):
    path.write_text(WEB_PAGE)


@published_file("a web page saved as `.safetensors`", "DiT.safetensors")
def _(path):
    path.write_text(WEB_PAGE)


@published_file("the Hub's error message saved as `.safetensors`", "DiT.safetensors")
def _(path):
    path.write_text('{"error":"Repository not found"}')


@published_file("a text file")
def _(path):
    path.write_text("Access to this model is restricted. Please log in.")


@published_file("a download that broke off: `.pt`")
def _(path):
    torch.save(published(), path)
    cut(path)


@published_file("a download that broke off: `.pt` of PyTorch 1.5 or older")
def _(path):
    torch.save(published(), path, _use_new_zipfile_serialization=False)
    cut(path)


@published_file("a download that broke off: `.safetensors`", "DiT.safetensors")
def _(path):
    save_file(published(), path)
    cut(path)


@published_file("`.safetensors` cut off within its header", "DiT.safetensors")
def _(path):
    path.write_bytes(save(published())[:100])


@published_file("`.safetensors` with a damaged header", "DiT.safetensors")
def _(path):
    content = bytearray(save(published()))
    content[20:30] = b"\xff" * 10
    path.write_bytes(content)


@published_file("`.safetensors` with bytes of another file behind it", "DiT.safetensors")
def _(path):
    path.write_bytes(save(published()) + b"abc")


@published_file("an archive with nothing in it")
def _(path):
    zipfile.ZipFile(path, "w").close()


@published_file("an archive of other files")
def _(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "weights are elsewhere")


@published_file("random bytes")
def _(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


class _RunsSomething:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


@published_file("a pickle that runs a program")
def _(path):
    torch.save({"model": _RunsSomething()}, path)


@published_file("a whole model instead of its state dict")
def _(path):
    torch.save(torch.nn.Linear(2, 2), path)


@published_file("a list of tensors")
def _(path):
    torch.save(list(published().values()), path)


@published_file("one tensor")
def _(path):
    torch.save(torch.zeros(2, 3), path)


@published_file("an empty dictionary")
def _(path):
    torch.save({}, path)


@published_file("a training checkpoint without weights")
def _(path):
    torch.save({"model": None, "epoch": 3}, path)


@published_file("names with and without a wrapper's prefix")
def _(path):
    torch.save(published() | {f"_orig_mod.{name}": tensor for name, tensor in published().items()}, path)


@published_file("a sparse tensor")
def _(path):
    torch.save(published() | {"x_embedder.proj.bias": torch.eye(3).to_sparse()}, path)


@published_file("a weight is missing")
def _(path):
    torch.save({name: tensor for name, tensor in published().items() if name != "blocks.1.mlp.fc1.bias"}, path)


@published_file("a weight of another shape")
def _(path):
    torch.save(published() | {"x_embedder.proj.weight": torch.zeros(48, 16)}, path)


@published_file("8-bit integers of a quantised model")
def _(path):
    torch.save({name: (100 * tensor).to(torch.int8) for name, tensor in published().items()}, path)


@published_file("weights of a training that diverged")
def _(path):
    torch.save(published() | {"x_embedder.proj.bias": torch.full((48,), torch.nan)}, path)


@damaged("a folder of something else", CONVERT, "DiT")
def _(here):
    (here / "DiT").mkdir()
    convert(here / "DiT")


def conversion_config(what: str) -> Callable:
    def register(write: Callable[[Path], object]) -> Callable:
        def feed(here: Path) -> None:
            torch.save(published(), here / "DiT.pt")
            write(here / "config.yaml")
            convert(here / "DiT.pt", "--config", here / "config.yaml")

        CASES.append(Damaged(what, "`convert --config`", "config.yaml", feed))
        return write

    return register


@conversion_config("YAML that is none")
def _(path):
    path.write_text("num_heads: [4\n")


@conversion_config("a list")
def _(path):
    path.write_text("- num_heads\n- 4\n")


@conversion_config("UTF-16, as an editor on Windows saves it")
def _(path):
    path.write_text("num_heads: 4\n", encoding="utf-16")


# folders --------------------------------------------------------------------------------------------------------------


def folder(what: str, entry: str, name: str, named: str = "") -> Callable:
    """A case whose function damages one file of a training's output, which a command then gets."""
    calls = {
        "`info`": lambda output: command("info", output),
        "`sample`": lambda output: command("sample", output, "--output", output / "x.png", "--steps", 1),
        "`publish`": lambda output: command("publish", output, "me/model", "--license", "mit", "--dry-run"),
        "`--pretrained_model_name_or_path`": lambda output: load_dit_family(str(output / "pipeline")),
        "`DiTModel.from_pretrained`": lambda output: DiTModel.from_pretrained(output / "pipeline" / "transformer"),
    }

    def register(damage: Callable[[Path], object]) -> Callable:
        def feed(here: Path) -> None:
            output = pipeline(here)
            damage(output / name)
            calls[entry](output)

        CASES.append(Damaged(what, entry, named or f"output/{name}", feed))
        return damage

    return register


def pickled_folder(what: str) -> Callable:
    """A case whose function damages the pickled weights of a model's folder, which is then converted."""

    def register(damage: Callable[[Path], object]) -> Callable:
        def feed(here: Path) -> None:
            model = pipeline(here) / "pipeline" / "transformer"
            torch.save(tensors_in(model / WEIGHTS), model / PICKLED)
            (model / WEIGHTS).unlink()
            damage(model / PICKLED)
            convert(model)

        CASES.append(Damaged(what, "`convert` of a folder", f"output/pipeline/transformer/{PICKLED}", feed))
        return damage

    return register


@pickled_folder("a Git LFS pointer as `.bin`")
def _(path):
    path.write_text(LFS)


@pickled_folder("a `.bin` that is cut off")
def _(path):
    cut(path)


@pickled_folder("a `.bin` that runs a program")
def _(path):
    torch.save({"model": _RunsSomething()}, path)


@pickled_folder("a list as `.bin`")
def _(path):
    torch.save([torch.zeros(2)], path)


INDEX, CONFIG = "pipeline/model_index.json", "pipeline/transformer/config.json"
TRANSFORMER = f"pipeline/transformer/{WEIGHTS}"


@folder("an empty `model_index.json`", "`info`", INDEX)
def _(path):
    path.write_text("")


@folder("half a `model_index.json`", "`info`", INDEX)
def _(path):
    cut(path)


@folder("a list as `model_index.json`", "`info`", INDEX)
def _(path):
    path.write_text("[]")


@folder("`model_index.json` in UTF-16", "`info`", INDEX)
def _(path):
    path.write_text(path.read_text(), encoding="utf-16")


@folder("`model_index.json` without a class", "`info`", INDEX, "output/pipeline")
def _(path):
    path.write_text(json.dumps({"scheduler": ["diffusers", "DDIMScheduler"]}))


@folder("`training_arguments.yaml` that is none", "`info`", "training_arguments.yaml")
def _(path):
    path.write_text("dataset: {\n")


@folder("`evaluation.json` without a metric", "`info`", "evaluation.json")
def _(path):
    path.write_text('[{"value": 3.1}]')


@folder("weights that are cut off", "`info`", TRANSFORMER)
def _(path):
    cut(path)


@folder("Git LFS pointers in the place of weights", "`info`", TRANSFORMER)
def _(path):
    path.write_text(LFS)


@folder("pickled weights", "`publish`", f"pipeline/transformer/{PICKLED}", "output/pipeline")
def _(path):
    torch.save({}, path)


@folder("pickled weights named `.safetensors`", "`publish`", TRANSFORMER)
def _(path):
    torch.save(tensors_in(path), path)


@folder("weights that are cut off", "`publish`", TRANSFORMER)
def _(path):
    cut(path, 0.9)


@folder("weights that are not finite", "`publish`", TRANSFORMER)
def _(path):
    weights = tensors_in(path)
    weights["proj_out_2.bias"].fill_(torch.inf)
    save_file(weights, path, metadata={"format": "pt"})


@folder(
    "a shard of weights is missing",
    "`publish`",
    f"pipeline/transformer/{WEIGHTS}.index.json",
    "output/pipeline/transformer",
)
def _(path):
    path.write_text(json.dumps({"weight_map": {"proj_out_2.bias": "model-00002-of-00002.safetensors"}}))


@folder("weights that are not finite", "`sample`", TRANSFORMER, "output/pipeline/transformer")
def _(path):
    weights = tensors_in(path)
    weights["proj_out_2.bias"][0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})


@folder("weights that are cut off", "`sample`", TRANSFORMER)
def _(path):
    cut(path)


@folder("no weights", "`sample`", TRANSFORMER, "output/pipeline/transformer")
def _(path):
    path.unlink()


@folder("a web page as `config.json`", "`sample`", CONFIG)
def _(path):
    path.write_text(WEB_PAGE)


@folder("an empty `scheduler_config.json`", "`sample`", "pipeline/scheduler/scheduler_config.json")
def _(path):
    path.write_text("")


@folder("weights that are cut off", "`DiTModel.from_pretrained`", TRANSFORMER)
def _(path):
    cut(path)


@folder("half a `config.json`", "`DiTModel.from_pretrained`", CONFIG)
def _(path):
    cut(path)


@damaged("a Git LFS pointer", "`PromptPatch.from_pretrained`", "patch/diffusion_pytorch_model.safetensors")
def _(here):
    patched().prompt_patch.save_pretrained(here / "patch")
    (here / "patch" / WEIGHTS).write_text(LFS)
    PromptPatch.from_pretrained(here / "patch")


@damaged("weights of another model", "`DTRTransformer2DModel.from_pretrained`", "model")
def _(here):
    DTRTransformer2DModel(**DIT).save_pretrained(here / "model")
    save_file({"another.weight": torch.zeros(2)}, here / "model" / WEIGHTS, metadata={"format": "pt"})
    DTRTransformer2DModel.from_pretrained(here / "model")


# guidance experts -----------------------------------------------------------------------------------------------------

EXPERTS = "`GuidanceExperts.from_pretrained`"


@damaged("a `config.json` that lacks entries", EXPERTS, "experts/config.json")
def _(here):
    path = experts(here) / "config.json"
    config = json.loads(path.read_text())
    del config["base_model_sha256"]
    path.write_text(json.dumps(config))
    GuidanceExperts.from_pretrained(here / "experts")


@damaged("tensors that are cut off", EXPERTS, "experts/guidance_experts.safetensors")
def _(here):
    cut(experts(here) / "guidance_experts.safetensors")
    GuidanceExperts.from_pretrained(here / "experts")


@damaged("no tensors", EXPERTS, "experts/guidance_experts.safetensors")
def _(here):
    (experts(here) / "guidance_experts.safetensors").unlink()
    GuidanceExperts.from_pretrained(here / "experts")


@damaged("a tensor is missing", EXPERTS, "experts/guidance_experts.safetensors")
def _(here):
    path = experts(here) / "guidance_experts.safetensors"
    tensors = tensors_in(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)
    GuidanceExperts.from_pretrained(here / "experts")


@damaged("a network that is cut off", EXPERTS, "network/model.safetensors")
def _(here):
    experts(here)
    cut(here / "network" / "model.safetensors")
    GuidanceExperts.from_pretrained(here / "experts")


# training -------------------------------------------------------------------------------------------------------------


@damaged("a web page as the base's file", "`--pretrained_model_name_or_path`", "DiT.pt")
def _(here):
    (here / "DiT.pt").write_text(WEB_PAGE)
    load_dit_family(str(here / "DiT.pt"))


@folder("a base that is cut off", "`--pretrained_model_name_or_path`", TRANSFORMER)
def _(path):
    cut(path)


@damaged("a base of another prediction type", "`--pretrained_model_name_or_path`", "output/pipeline")
def _(here):
    output = pipeline(here) / "pipeline"
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(output / "scheduler")
    check_base_schedule(DiTTrainingArguments(), load_dit_family(str(output)), str(output))


@damaged("weights that are cut off", "`--vae`", "vae/diffusion_pytorch_model.safetensors")
def _(here):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(here / "vae")
    cut(here / "vae" / WEIGHTS)
    load_vae(str(here / "vae"))


@damaged("YAML that is none", "`--config`", "preset.yaml")
def _(here):
    (here / "preset.yaml").write_text("batch_size: 16\n  image_size: 8\n")
    parse_arguments(DiTTrainingArguments, ["--config", str(here / "preset.yaml")])


@damaged("no such preset", "`--config`", "preset.yaml")
def _(here):
    parse_arguments(DiTTrainingArguments, ["--config", str(here / "preset.yaml")])


def latents(here: Path) -> Path:
    """Two shards of latents."""
    (here / "latents").mkdir()
    for shard in range(2):
        rows = [save({"mean": torch.zeros(2, 4, 8, 8), "std": torch.ones(2, 4, 8, 8)})] * 50
        rows = datasets.Dataset.from_dict({"latents": rows})
        rows.to_parquet(here / "latents" / f"train-{shard:05d}-of-00002.parquet")
    return here / "latents"


@damaged("a shard of latents that is cut off", "`--dataset`", "latents/train-00001-of-00002.parquet")
def _(here):
    cut(latents(here) / "train-00001-of-00002.parquet")
    load_images(str(here / "latents"))


@damaged("an empty shard of latents", "`--dataset`", "latents/train-00001-of-00002.parquet")
def _(here):
    (latents(here) / "train-00001-of-00002.parquet").write_bytes(b"")
    load_images(str(here / "latents"))


@damaged("a Git LFS pointer in the place of a shard", "`--dataset`", "latents/train-00000-of-00002.parquet")
def _(here):
    (latents(here) / "train-00000-of-00002.parquet").write_text(LFS)
    load_images(str(here / "latents"))


@damaged("half an `encoding.json` beside the latents", "`--dataset`", "latents/encoding.json")
def _(here):
    (latents(here) / "encoding.json").write_text('{"num_images": 1')
    dataset = load_images(str(here / "latents"))
    check_latents(dataset, str(here / "latents"), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), (4, 8, 8))


# evaluation -----------------------------------------------------------------------------------------------------------


def images(here: Path, name: str) -> Path:
    np.savez(here / name, np.zeros((70, 8, 8, 3), np.uint8))
    return here / name


def compare(here: Path, **arguments: str) -> None:
    for name in ("generated", "reference"):
        if not (here / f"{name}.npz").exists():
            images(here, f"{name}.npz")
    paths = {name: str(here / f"{name}.npz") for name in ("generated", "reference")}
    defaults = paths | {"extractor": str(here / "network"), "output": str(here / "evaluation.json")}
    evaluate(EvaluationArguments(**defaults | arguments))


@damaged("generated images that are cut off", "`evaluate`", "generated.npz")
def _(here):
    experts(here)
    cut(images(here, "generated.npz"))
    compare(here)


@damaged("a Git LFS pointer as the reference", "`evaluate`", "reference.npz")
def _(here):
    experts(here)
    (here / "reference.npz").write_text(LFS)
    compare(here)


@damaged("an extractor that is cut off", "`evaluate`", "network/model.safetensors")
def _(here):
    experts(here)
    cut(here / "network" / "model.safetensors")
    compare(here)


@damaged("half a `sampling.json` beside the images", "`evaluate`", "sampling.json")
def _(here):
    experts(here)
    (here / "sampling.json").write_text('{"seed": 0')
    compare(here)


@damaged("a web page as Inception's weights", "`evaluate`", "pt_inception.pth")
def _(here):
    (here / "pt_inception.pth").write_text(WEB_PAGE)
    load_inception(here / "pt_inception.pth")


@damaged("other weights as Inception's", "`evaluate`", "pt_inception.pth")
def _(here):
    torch.save(published(), here / "pt_inception.pth")
    load_inception(here / "pt_inception.pth")


@damaged("half a `training_summary.json`", "`diagnose`", "output/training_summary.json")
def _(here):
    output = pipeline(here)
    (output / "training_summary.json").write_text('{"steps": 4')
    (here / "photos").mkdir()
    PIL.Image.new("L", (8, 8)).save(here / "photos" / "0.png")
    command("diagnose", output, "--dataset", here / "photos", "--output_dir", here)


@damaged("a folder", "`load_original_state_dict`", "DiT.pt")
def _(here):
    (here / "DiT.pt").mkdir()
    load_original_state_dict(here / "DiT.pt")


# the table ------------------------------------------------------------------------------------------------------------


def table() -> str:
    """All cases as the rows of a Markdown table."""
    rows = ["| where | input | what it says |", "| --- | --- | --- |"]
    for case in CASES:
        here = Path(tempfile.mkdtemp())
        rows.append(row(case, said(case, here)))
        shutil.rmtree(here)
    return "\n".join(rows)


def row(case: Damaged, message: str) -> str:
    return f"| {case.entry} | {case.what} | {message.replace('|', chr(92) + '|')} |"


def documented() -> str:
    """The table in the document."""
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
