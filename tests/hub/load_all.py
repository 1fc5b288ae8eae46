"""Run by test_loading.py in an interpreter of its own: load, generate, save and load again, from the Hub and from the disk.

`python load_all.py (package|code) IN OUT`: IN holds the seed's noise and the inputs of Stable Diffusion 3, OUT gets each
pipeline's samples and copies.
"""

import importlib.util
import sys
from pathlib import Path

from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file

mode, inputs_file, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
names = sys.argv[4:]
inputs = load_file(inputs_file)
noise = inputs.pop("noise")
trust = {}
if mode == "package":
    import diffusers_dmp
else:
    assert importlib.util.find_spec("diffusers_dmp") is None
    trust = {"trust_remote_code": True}

samples = {}


def generate(name: str, pipeline: DiffusionPipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    samples[name] = pipeline([3, 5], latents=noise, num_inference_steps=4, output_type="latent").images


for name in names:
    if mode == "code":
        try:
            DiffusionPipeline.from_pretrained(f"user/{name}")
        except ValueError as error:
            assert "Pass `trust_remote_code=True`" in str(error), error
        else:
            raise AssertionError(f"{name} was loaded without trust")
    pipeline = DiffusionPipeline.from_pretrained(f"user/{name}", **trust)
    generate(f"{name}.hub", pipeline)
    pipeline.save_pretrained(output / name)
    generate(f"{name}.again", DiffusionPipeline.from_pretrained(output / name, **trust))
    pipeline.push_to_hub(f"user/{name}-pushed-{mode}")
    generate(f"{name}.pushed", DiffusionPipeline.from_pretrained(f"user/{name}-pushed-{mode}", **trust))

    if mode == "package":
        own_class = getattr(diffusers_dmp, type(pipeline).__name__)
        assert type(own_class.from_pretrained(f"user/{name}")) is own_class
        folder = "denoiser_0" if hasattr(pipeline, "denoiser_0") else "transformer"
        model_class = getattr(diffusers_dmp, type(getattr(pipeline, folder)).__name__)
        assert type(AutoModel.from_pretrained(f"user/{name}", subfolder=folder)) is model_class
        assert type(model_class.from_pretrained(f"user/{name}", subfolder=folder)) is model_class
        assert type(AutoModel.from_pretrained(f"user/{name}-model")) is model_class
        assert type(DiffusionPipeline.from_pretrained(f"user/{name}", trust_remote_code=True)) is own_class

texts = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
stock = DiffusionPipeline.from_pretrained("user/sd3", **texts, **trust)
stock.save_pretrained(output / "sd3")
stock.push_to_hub(f"user/sd3-pushed-{mode}")  # without the code, unless this is the code
for source, name in {"hub": "user/sd3", "again": output / "sd3", "pushed": f"user/sd3-pushed-{mode}"}.items():
    pipeline = DiffusionPipeline.from_pretrained(name, **texts, **trust)
    size = {"height": 8, "width": 8}
    samples[f"sd3.{source}"] = pipeline(**inputs, **size, num_inference_steps=4, output_type="latent").images

executed = any(module.startswith("diffusers_modules") for module in sys.modules)
assert executed == (mode == "code")
save_file({name: tensor.contiguous() for name, tensor in samples.items()}, output / "samples.safetensors")
