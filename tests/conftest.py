import json
import os
import tempfile
from pathlib import Path

# All of the following must be set before the libraries that read it are imported; launched processes inherit it.

# `make test-gpu` sets this and runs the tests that are marked `gpu`. For all others the suite hides GPUs: tests compare what
# this process computes with what launched processes compute, and with numbers from a CPU, so both must use the same device.
if os.environ.get("DMP_TEST_GPU") == "1":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # NVIDIA, and AMD through HIP
    os.environ["HIP_VISIBLE_DEVICES"] = ""

# no network, and no files in the user's caches
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="diffusers-dmp-tests-")

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from hub_server import HubServer
from huggingface_hub import constants
from hypothesis import settings
from safetensors import safe_open

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.evaluation.digits import NUM_IMAGES, write_image_folder
from diffusers_dmp.models import compilation

FIXTURES = Path(__file__).parent / "fixtures"
REPOSITORY = Path(__file__).parent.parent

# no deadline, because timings vary on shared machines; the same examples in every run
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

TINY_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_classes": 10,
}


class Vectors:
    """Inputs, weights and outputs of the published implementations: see tests/fixtures/README.md."""

    def __init__(self, name: str):
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        self.config = json.loads(metadata.get("config", "{}"))
        self.state_dict = {
            key.removeprefix("state."): tensor for key, tensor in self.tensors.items() if key.startswith("state.")
        }

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


def assert_matches(actual: torch.Tensor, published: torch.Tensor) -> None:
    """Compare with a published output, with the tolerance that tests/fixtures/README.md gives."""
    torch.testing.assert_close(actual.detach(), published, atol=2e-5, rtol=1e-4)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give all parameters random values: a layer that starts at zero would hide errors behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


@pytest.fixture
def tiny_dit() -> DiTModel:
    return randomised(DiTModel(**TINY_CONFIG))


@pytest.fixture
def tiny_dtr() -> DTRTransformer2DModel:
    return randomised(DTRTransformer2DModel(**TINY_CONFIG))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four samples with different timesteps and classes; the last has the null class."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 250, 600, 999]),
        "class_labels": torch.tensor([0, 4, 9, 10]),
    }


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder of 200 real images with one sub-folder per class; few, because every training first checks them all."""
    return write_image_folder(tmp_path_factory.mktemp("digits"), range(0, NUM_IMAGES, 9))


@pytest.fixture
def in_the_repository(monkeypatch):
    """The repository's root is the working directory, and the training scripts can be imported."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts with the same random numbers, independent of the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset Accelerate's state, of which there is one per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def hub(monkeypatch):
    """A server with the Hub's API, on the loopback interface."""
    # the network is switched off above; without hf_xet and telemetry, the client connects to this server only
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with HubServer(tokens={"hf_writer": "user", "hf_reader": "reader"}) as hub:
        yield hub


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "group_offload: enables group offloading; skipped where Diffusers itself cannot do it"
    )


def pytest_runtest_setup(item):
    needs_accelerator = item.get_closest_marker("group_offload") and diffusers.__version__.startswith("0.40.")
    if needs_accelerator and not torch.accelerator.is_available():
        pytest.skip("Diffusers 0.40 offloads in groups only where there is an accelerator")


@pytest.fixture
def warned(monkeypatch):
    """The lines that compiled denoisers log as warnings."""
    lines = []
    monkeypatch.setattr(compilation.compilation_logger, "warning", lambda line, *values: lines.append(line % values))
    return lines


@pytest.fixture
def pretended(monkeypatch):
    """The module of an accelerator that is only pretended, which counts how often the CPU waits for it."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import pretended_accelerator

    return pretended_accelerator


@pytest.fixture
def accelerator(pretended):
    return pretended.PretendedAccelerator()
