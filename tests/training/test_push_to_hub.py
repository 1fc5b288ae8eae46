"""`--push_to_hub`: checked before the first step, uploaded along the way and at the end, and never in the training's way."""

import logging
from functools import partial

import pytest
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from runs import TINY

from diffusers_dmp import DiTModel
from diffusers_dmp.hub import pushing
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training import trainer
from diffusers_dmp.training.arguments import DiTTrainingArguments, ExpertArguments, TrainingArguments
from diffusers_dmp.training.dit_family import train_dit

PUSH = {"push_to_hub": True, "hub_license": "mit"}


@pytest.fixture
def user(hub, monkeypatch):
    """The user of a token that can write, whose Hub is the loopback server."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub


@pytest.fixture
def arguments(digits, tmp_path):
    return TINY | PUSH | {"dataset": str(digits), "output_dir": str(tmp_path / "my-digits"), "report_to": "none"}


def test_what_is_uploaded_and_when(user, arguments, tmp_path):
    with_hub(partial(train_dit, DiTModel))(DiTTrainingArguments(**arguments, hub_private_repo=True, pipeline_steps=3))
    repo = user.repos["user/my-digits"]
    assert repo.private
    # one that the Hub makes; after steps 2 or 3, while that upload takes its time not after both; after the last
    assert len(repo.commits) in (3, 4)
    assert {"README.md", "model_index.json", "transformer/diffusion_pytorch_model.safetensors"} <= repo.files.keys()
    assert not [name for name in repo.files if "checkpoint" in name or "pipeline/" in name]
    settings = yaml.safe_load(repo.files["training_arguments.yaml"])
    # it may be the `--config` of another training, which is not this repository's
    assert not [name for name in settings if "hub" in name or name == "resume_from_checkpoint"]
    assert settings["max_train_steps"] == 4 and b"license: mit" in repo.files["README.md"]
    during = list(repo.commits.values())[1]
    assert yaml.safe_load(during["training_arguments.yaml"])["max_train_steps"] == 4
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert during[weights] != repo.files[weights]
    assert not (tmp_path / "my-digits" / pushing.FOLDER).exists()

    for name, content in repo.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert DiffusionPipeline.from_pretrained(tmp_path / "copy")([3], num_inference_steps=2).images[0].size == (8, 8)


def test_a_failing_upload_costs_no_training(user, arguments, tmp_path, caplog):
    def revoke_and_train(args, publisher):
        user.tokens.clear()  # after the check
        train_dit(DiTModel, args, publisher=publisher)

    args = DiTTrainingArguments(**arguments | {"checkpointing_steps": 1})
    with (
        caplog.at_level(logging.WARNING, "diffusers_dmp"),
        pytest.raises(
            ValueError,
            match="Expected to upload .*my-digits to user/my-digits, but got: .*401 .*The training is complete; "
            "`diffusers-dmp publish .*my-digits user/my-digits --license mit --update` uploads it.",
        ),
    ):
        with_hub(revoke_and_train)(args)
    assert (tmp_path / "my-digits" / "pipeline" / "model_index.json").exists()
    failures = [record.message for record in caplog.records if "upload to user/my-digits" in record.message]
    assert len(failures) == 1 and "after step 1 failed, training goes on" in failures[0]


def test_a_full_disk_costs_no_training(user, arguments, tmp_path, caplog):
    def save(folder):
        folder.mkdir(parents=True)
        raise OSError("No space left on device")

    push = pushing.HubPush(DiTTrainingArguments(**arguments))
    with caplog.at_level(logging.WARNING, "diffusers_dmp"):
        push(save, 2)
        push(save, 4)
    assert (
        caplog.text.count("after step 2 failed, training goes on: No space left") == 1 and "step 4" not in caplog.text
    )
    assert not (tmp_path / "my-digits" / pushing.FOLDER).exists()  # which takes room


def test_no_upload_after_an_error(user, arguments, tmp_path):
    (tmp_path / "my-digits" / pushing.FOLDER).mkdir(parents=True)

    def fail(args, publisher):
        raise RuntimeError("in the training")

    with pytest.raises(RuntimeError, match="in the training"):
        with_hub(fail)(DiTTrainingArguments(**arguments))
    assert len(user.repos["user/my-digits"].commits) == 1  # the empty one
    assert not (tmp_path / "my-digits" / pushing.FOLDER).exists()


def expect_refusal(arguments, message, base_model=None):
    """The training is refused before it begins."""
    args = DiTTrainingArguments(**arguments)
    if base_model is not None:
        args.base_model = base_model
    with pytest.raises(ValueError, match=message):
        with_hub(lambda args, publisher: pytest.fail("began"))(args)


def test_what_is_refused_before_the_first_step(user, arguments, monkeypatch, tmp_path):
    expect_refusal(arguments | {"hub_model_id": "somebody/digits"}, "`hub_model_id` on the Hub, but got: .*403")
    expect_refusal(arguments, "`base_model` to be the id .*, but got the folder", base_model=str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    expect_refusal(arguments, "`hub_model_id` on the Hub, but got: .*[Ii]nvalid")
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    expect_refusal(arguments, "Expected a token to write with for `push_to_hub`")
    assert user.repos == {}


def test_a_repository_of_something_else_is_not_overwritten(user, arguments, tmp_path):
    train = with_hub(lambda args, publisher: train_dit(DiTModel, args, publisher=publisher))
    train(DiTTrainingArguments(**arguments | {"max_train_steps": 2}))
    expect_refusal(arguments, "`hub_model_id` to be a new or an empty repository.*'user/my-digits' with .* files")
    resumed = arguments | {"resume_from_checkpoint": "latest"}
    elsewhere = {"output_dir": str(tmp_path / "other"), "hub_model_id": "my-digits"}
    expect_refusal(resumed | elsewhere, "`hub_model_id` to be a new or an empty repository")  # nothing to resume from
    expect_refusal(resumed | {"hub_private_repo": True}, "'user/my-digits' to be private already")
    before = len(user.repos["user/my-digits"].commits)
    train(DiTTrainingArguments(**resumed))
    assert len(user.repos["user/my-digits"].commits) > before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"push_to_hub": True}, "`hub_license` to be the licence"),
        ({"hub_model_id": "user/digits"}, "`push_to_hub` to be true where `hub_model_id` is set.*'user/digits'"),
        ({"hub_private_repo": True}, "`push_to_hub` to be true where `hub_private_repo`"),
        ({"hub_license": "mit"}, "`push_to_hub` to be true where `hub_license`"),
    ],
)
def test_refuses_arguments_without_effect(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiTTrainingArguments(**arguments)


def test_one_expert_alone_is_not_uploaded():
    class Arguments(ExpertArguments, TrainingArguments):
        pass

    with pytest.raises(ValueError, match="`expert` to be 'all' for `push_to_hub`.*'1'"):
        Arguments(**PUSH, expert="1").check_expert(3)


def test_a_training_without_a_publisher_says_so(arguments):
    with pytest.raises(ValueError, match="Expected a `publisher` for `push_to_hub`"):
        trainer.train(None, DiTTrainingArguments(**arguments), None, None, None)
