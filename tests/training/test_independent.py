"""Independent DiTs, one for each interval of noise levels: `train_dit.py` with boundaries."""

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from diffusers import DiffusionPipeline
from runs import TINY, launch

from diffusers_dmp import DiTModel, NoiseIntervals, SNRSplitPipeline


@pytest.fixture
def train_here(digits, monkeypatch):
    """In this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_dit import DiTExpertTrainingArguments, train_independent

    def train(output_dir, **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = TINY | {"dataset": str(digits), "report_to": "none", "output_dir": str(output_dir)}
        train_independent(DiTExpertTrainingArguments(**defaults | arguments))

    return train


def test_as_users_start_them(digits, tmp_path):
    launch("train_dit.py", tmp_path, dataset=digits, report_to="none", max_train_steps=2, num_experts=3)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline) is SNRSplitPipeline and all(type(each) is DiTModel for each in pipeline.denoisers)
    timesteps = torch.arange(1000)
    assert torch.equal(pipeline.intervals().index(timesteps), NoiseIntervals.uniform(3, 1000).index(timesteps))
    assert pipeline("7", num_inference_steps=3).images[0].size == (8, 8)


def test_each_starts_from_the_pretrained_weights_and_sees_its_own_noise(train_here, tmp_path, monkeypatch):
    train_here(tmp_path / "base")
    seen, forward = [], DiTModel.forward

    def remember(model, sample, timestep, **kwargs):
        seen.append(timestep)
        return forward(model, sample, timestep, **kwargs)

    monkeypatch.setattr(DiTModel, "forward", remember)
    base = str(tmp_path / "base" / "pipeline")
    still = {"pretrained_model_name_or_path": base, "learning_rate": 0.0, "num_experts": 4}
    train_here(tmp_path / "split", expert="2", **still)
    assert (NoiseIntervals.uniform(4, 1000).index(torch.cat(seen)) == 2).all()
    expert = DiTModel.from_pretrained(tmp_path / "split" / "expert_2" / "pipeline", subfolder="transformer")
    expected = DiTModel.from_pretrained(base, subfolder="transformer").state_dict()
    for name, weight in expert.state_dict().items():
        torch.testing.assert_close(weight, expected[name], msg=name)


def test_one_expert_is_a_plain_training(train_here, tmp_path):
    train_here(tmp_path, num_experts=1, max_train_steps=1)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pipeline").transformer) is DiTModel
    assert not (tmp_path / "expert_0").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 2, "snr_boundaries": [0.25]}, "in one way, but got snr_boundaries and num_experts"),
        ({"num_experts": 0}, "`num_experts` to be at least 1"),
        ({"num_experts": 2, "expert": "2"}, "`expert` to be one of all, 0, 1, but got '2'"),
        ({"num_experts": 2, "weighting": "uw"}, "leave the choice of timesteps to the experts"),
        ({"sigma_boundaries": [0.5]}, "`sigma_boundaries` for flow matching alone"),
        ({"timestep_boundaries": [500], "objective": "flow"}, "no `timestep_boundaries` for the objective 'flow'"),
    ],
)
def test_what_does_not_fit_is_refused(train_here, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_here(tmp_path, **arguments)
    assert not list(tmp_path.glob("**/checkpoint-*"))
