"""A user's error is one line on the terminal and the exit status 2; nothing heavy is imported before it is needed."""

import subprocess
import sys
import time

import pytest
import yaml
from conftest import REPOSITORY
from hub_server import HubServer
from safetensors import SafetensorError

from diffusers_dmp.saving.sources import check_source, is_local
from diffusers_dmp.terminal import run_command

HEAVY = ("torch", "diffusers", "transformers", "datasets", "accelerate", "matplotlib")
COMMAND_LINE = f"""
import sys
from diffusers_dmp.cli import main
sys.argv = ["diffusers-dmp", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *[name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--version"], 0, "diffusers-dmp 0."),
        (["--help"], 0, "Usage: diffusers-dmp"),
        ([], 0, "Usage: diffusers-dmp"),
        (["train", "--help"], 0, "accelerate launch"),
        (["sample", "--help"], 0, "--num_images_per_label"),
        (["sampel"], 2, "diffusers-dmp: No such command 'sampel'"),
        (["sample"], 2, "diffusers-dmp: Missing argument"),
        (["sample", "here", "--stps", "3"], 2, "No such option: --stps"),
        (["sample", "here", "--num_inference_steps", "few"], 2, "Invalid value for '--num_inference_steps': "),
        (["train", "gan"], 2, "`system` to be one of dit, dtr, remix, patch_diffusion, dmp, ppap, text_to_image, but got 'gan'"),
        (["train", "dtr", "--config", "dtr_imagnet"], 2, "dtr_imagenet256, "),
        (["train", "dtr", "--config=nowhere.yaml"], 2, "but got 'nowhere.yaml'"),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_program_itself_is_answered_at_once(arguments, status, said):
    result = subprocess.run([sys.executable, "-c", COMMAND_LINE, *arguments], capture_output=True, text=True)
    *output, imported = result.stdout.splitlines()
    assert imported == "imported:"
    assert result.returncode == status
    if status:
        (line,) = result.stderr.splitlines()
        assert said in line and not output
    else:
        assert said in "\n".join(output) and not result.stderr


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Expected `x` to be y,\n but got z."),
        FileNotFoundError(2, "No such file or directory", "here"),
        ImportError("No module named 'sklearn'"),
        yaml.YAMLError("a tab"),
        SafetensorError("Error while deserializing header"),
    ],
)
def test_a_users_error_is_one_line(error, capsys):
    def fail(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(fail, ["--any", "argument"], "train")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"train: {' '.join(str(error).split())}"
    with pytest.raises(type(error)):  # of which Python shows the traceback
        run_command(fail, ["--any", "--debug", "argument"], "train")


def test_an_interrupt_is_one_line(capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command(interrupt, [], "train")
    assert stopped.value.code == 130 and capsys.readouterr().err == "train: interrupted\n"


@pytest.mark.parametrize("error", [TypeError("a bug"), RuntimeError("a bug"), AssertionError("a bug")])
def test_a_programmers_error_keeps_its_traceback(error):
    def fail(argv):
        raise error

    with pytest.raises(type(error)):
        run_command(fail, [], "train")


def test_the_command_does_not_see_debug():
    seen = []
    run_command(seen.extend, ["--debug", "--seed", "3"], "train")
    assert seen == ["--seed", "3"]


def test_of_several_processes_the_first_one_writes_the_line():
    """The launcher ends the others as soon as one has failed."""
    script = "from diffusers_dmp.terminal import write_line; write_line('said')"
    command = [sys.executable, "-c", script]
    environment = {"PATH": "", "PYTHONPATH": f"{REPOSITORY / 'src'}"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment | {"RANK": "0"})
    assert first.stderr == "said\n"
    with pytest.raises(subprocess.TimeoutExpired) as waited:
        subprocess.run(command, capture_output=True, timeout=2, env=environment | {"RANK": "1"})
    assert not waited.value.stderr


# Folders that are missing


@pytest.mark.parametrize(
    "name", ["/no/folder", "./folder", "../folder", "~/folder", "a/b/c", "images.zip", "model.safetensors", "outputs/mine", "a b", "."]
)  # fmt: skip
def test_a_missing_folder_is_said_to_be_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    assert is_local(name)
    if name != ".":
        with pytest.raises(
            ValueError, match="`--dataset` to be an existing folder or a Hub id, but got .*no such folder"
        ):
            check_source("--dataset", name)


@pytest.mark.parametrize(
    "name", ["user/model", "gpt2", "runwayml/stable-diffusion-v1.5", "facebook/DiT-XL-2-256", None, ""]
)
def test_what_may_be_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_source("--dataset", name)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    check_source("--dataset", "a/b/c")  # and a folder that is there


@pytest.mark.parametrize("name, repo_type", [("nope", "dataset"), ("user/nope", "model")])
def test_the_hub_is_asked_once(name, repo_type, tmp_path, monkeypatch):
    """Where it does not answer, whoever loads a repository would ask again and again; what is in the cache is left to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    check_source("--dataset", name, repo_type=repo_type)  # offline, as in all tests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"'{name}': there is no such folder, and the Hub does not answer"):
        check_source("--dataset", name, repo_type=repo_type)
    assert time.monotonic() - began < 6
    (tmp_path / "cache" / f"{repo_type}s--{name.replace('/', '--')}").mkdir(parents=True)
    check_source("--dataset", name, repo_type=repo_type)


def test_what_the_hub_does_not_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(ValueError, match="'user/nope': there is no such folder, and the Hub has no such model"):
            check_source("pipeline", "user/nope", repo_type="model")
        assert len(hub.requests) == 1
