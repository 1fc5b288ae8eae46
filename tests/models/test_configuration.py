"""Constructors that take their parent's arguments without listing them again."""

import inspect
import json

import pytest
import torch
from conftest import TINY_CONFIG
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_dmp import DiTModel, DTRTransformer2DModel, RemixDiTModel
from diffusers_dmp.models.configuration import argument_names, extends_arguments

OWN = {
    DTRTransformer2DModel: {"sharing_ratio": 0.8, "routing_alpha": 4.0, "routing": "window"},
    RemixDiTModel: {"num_bases": 4, "num_experts": 8, "interval_edges": None},
}


@pytest.mark.parametrize("cls", OWN)
def test_the_signature_is_the_parents_and_then_its_own(cls):
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    expected = {name: parameter.default for name, parameter in inspect.signature(DiTModel).parameters.items()}
    assert list(defaults.items()) == list((expected | OWN[cls]).items())
    assert argument_names(cls) == list(defaults)
    assert cls.__init__.__module__.startswith("diffusers_dmp.models.")


@pytest.mark.parametrize("cls", OWN)
def test_every_argument_is_saved_and_read(cls, tmp_path):
    config = TINY_CONFIG | {"dropout": 0.1, "norm_eps": 1e-5, "num_train_timesteps": 800, "downscale_freq_shift": 1.0}
    model = cls(**config)
    model.save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name for name in saved if not name.startswith("_")} == set(argument_names(cls))
    assert saved.items() >= config.items()
    loaded = cls.from_config(cls.load_config(tmp_path))
    assert {name: loaded.config[name] for name in argument_names(cls)} == {
        name: model.config[name] for name in argument_names(cls)
    }


def test_arguments_may_be_given_by_position():
    with torch.device("meta"):
        model = DTRTransformer2DModel(4, 12, 3, None, 1, 0.0, 8, 2, 1e-6, 10, 0.1, 1000, 0.0, 0.5, 2.0, "random")
    expected = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 3, "num_classes": 10}
    expected |= {"sharing_ratio": 0.5, "routing_alpha": 2.0, "routing": "random"}
    assert dict(model.config).items() >= expected.items()
    assert model.task_routing.num_active == 24


def test_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="DTRTransformer2DModel.__init__.*unexpected keyword argument 'num_bases'"):
        DTRTransformer2DModel(**TINY_CONFIG, num_bases=2)


def test_a_new_argument_of_the_parent_reaches_every_descendant():
    class Parent(ConfigMixin):
        config_name = "config.json"

        @register_to_config
        def __init__(self, width: int = 1, depth: int = 2):
            self.size = width, depth

    class Child(Parent):
        @register_to_config
        @extends_arguments(Parent)
        def __init__(self, *, experts: int = 3, **parent_arguments):
            super().__init__(**parent_arguments)
            self.experts = experts

    class Grandchild(Child):
        @register_to_config
        @extends_arguments(Child)
        def __init__(self, *, bases: int = 2, **parent_arguments):
            super().__init__(**parent_arguments)
            self.bases = bases

    instance = Grandchild(width=5, experts=7, bases=4)
    assert (instance.size, instance.experts, instance.bases) == ((5, 2), 7, 4)
    assert {name: instance.config[name] for name in argument_names(Grandchild)} == {
        "width": 5,
        "depth": 2,
        "experts": 7,
        "bases": 4,
    }
    assert instance.config["_use_default_values"] == ["depth"]
