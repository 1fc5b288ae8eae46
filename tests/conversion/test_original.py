"""Conversion of published checkpoints: configurations are read from the weights' shapes, and misfits are named."""

import argparse

import pytest
import torch
from conftest import Vectors, assert_matches
from safetensors.torch import save_file

from diffusers_dmp import PromptPatch, convert_checkpoint, load_original_state_dict


@pytest.fixture(params=["dit", "dtr", "remix", "dmp"])
def system(request) -> str:
    return request.param


@pytest.fixture
def vectors(system) -> Vectors:
    return Vectors(f"{system}_tiny")


def test_shapes_determine_all_but_the_number_of_heads(system, vectors):
    given = {"num_heads": 4} | ({"vp_type": "add"} if system == "dmp" else {})
    model = convert_checkpoint(system, vectors.state_dict, given)
    expected = convert_checkpoint(system, vectors.state_dict, vectors.config)
    assert {k: v for k, v in model.config.items() if k != "_use_default_values"} == {
        k: v for k, v in expected.config.items() if k != "_use_default_values"
    }
    assert model.config.sample_size == 8
    assert model.config.num_classes == 10
    case = "expert3" if system == "remix" else "mixed_t"
    output = model(vectors[f"case.{case}.x"], vectors[f"case.{case}.t"], vectors[f"case.{case}.y"]).sample
    assert_matches(output, vectors[f"case.{case}.out"])


def test_derived_masks_of_real_dtr_checkpoints_are_dropped():
    vectors = Vectors("dtr_tiny")
    channel, start = torch.arange(48), vectors["mask_start"][:, None]
    window = ((channel >= start) & (channel < start + vectors["mask_width"][:, None])).float()
    masks = {f"blocks.{i}.routing._unit_mapping": window for i in range(3)}
    model = convert_checkpoint("dtr", vectors.state_dict | masks, vectors.config)
    assert torch.equal(model.task_routing.masks().float(), window)
    # the masks contradict another configuration
    with pytest.raises(ValueError, match="blocks.0.routing._unit_mapping.*sharing_ratio. 0.5"):
        convert_checkpoint("dtr", vectors.state_dict | masks, vectors.config | {"sharing_ratio": 0.5})


def test_random_masks_of_dtr_checkpoints_are_kept():
    vectors = Vectors("dtr_tiny")
    mask = torch.rand(1000, 48) < 0.5
    masks = {f"blocks.{i}.routing._unit_mapping": mask.float() for i in range(3)}
    config = vectors.config | {"init_method": "random"}
    assert torch.equal(convert_checkpoint("dtr", vectors.state_dict | masks, config).task_routing.masks(), mask)
    with pytest.raises(ValueError, match="one random mask"):
        convert_checkpoint("dtr", vectors.state_dict, config)


def test_reads_training_checkpoints_without_running_code(tmp_path, vectors):
    averaged = {f"module.{name}": tensor for name, tensor in vectors.state_dict.items()}
    raw = {name: tensor + 1 for name, tensor in vectors.state_dict.items()}
    torch.save({"model": raw, "ema": averaged, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pt")
    save_file(vectors.state_dict, tmp_path / "a.safetensors")
    for state_dict in (
        load_original_state_dict(tmp_path / "a.pt"),
        load_original_state_dict(tmp_path / "a.safetensors"),
    ):
        assert state_dict.keys() == vectors.state_dict.keys()
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in vectors.state_dict.items())
    not_averaged = load_original_state_dict(tmp_path / "a.pt", use_ema=False)
    assert torch.equal(not_averaged["x_embedder.proj.bias"], raw["x_embedder.proj.bias"])

    torch.save({"epoch": 3}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="epoch"):
        load_original_state_dict(tmp_path / "b.pt")


def test_bases_and_experts_of_remix_dit():
    vectors = Vectors("remix_tiny")
    model = convert_checkpoint("remix", vectors.state_dict, {"num_heads": 4})
    assert (model.config.num_bases, model.config.num_experts) == (4, 8)
    assert model.intervals.edges == (0, 125, 250, 375, 500, 625, 750, 875, 1000)
    with pytest.raises(ValueError, match=r"'blocks.0.attn.proj.bias'.*\(3, 48\).*\(4, 48\)"):
        convert_checkpoint("remix", vectors.state_dict, {"num_heads": 4, "n_basis": 3})
    with pytest.raises(ValueError, match=r"'coefficients.weight'.*\(20, 4\).*\(8, 4\)"):
        convert_checkpoint("remix", vectors.state_dict, {"num_heads": 4, "n_experts": 20})
    with pytest.raises(ValueError, match="'coefficients.weight'.*2 dimensions.*None"):
        convert_checkpoint("remix", Vectors("dit_tiny").state_dict, {"num_heads": 4})


def test_prompts_of_dmp():
    vectors = Vectors("dmp_prepend")
    model = convert_checkpoint("dmp", vectors.state_dict, {"num_heads": 4})
    config = PromptPatch.attached_to(model).config
    # 6 prompts for 16 image tokens cannot have been added
    assert (config.mode, config.num_prompts, config.depth) == ("prepend", 6, 3)
    assert (config.gate, config.topk) == ("linear", 1.0)
    assert not any("prompt" in name or "gate" in name for name in model.state_dict())

    without_gate = {
        name: tensor
        for name, tensor in Vectors("dmp_tiny").state_dict.items()
        if not name.startswith("gate.") and name != "w_noise"
    }
    with pytest.raises(ValueError, match="`vp_type`, 'add' or 'prepend', of 16 prompts for as many image tokens"):
        convert_checkpoint("dmp", without_gate, {"num_heads": 4})
    model = convert_checkpoint("dmp", without_gate, {"num_heads": 4, "vp_type": "add"})
    assert PromptPatch.attached_to(model).config.gate == "none"
    with pytest.raises(ValueError, match="'w_noise', but it is missing"):
        convert_checkpoint("dmp", without_gate, {"num_heads": 4, "vp_type": "add", "gate_type": "linear"})
    with pytest.raises(ValueError, match="`gate_type` to be one of linear, PT, but got 'FT'"):
        convert_checkpoint("dmp", vectors.state_dict, vectors.config | {"gate_type": "FT"})
    with pytest.raises(ValueError, match=r"'prompt_embeddings' .*\(3, 9, 48\), but got \(3, 6, 48\)"):
        convert_checkpoint("dmp", vectors.state_dict, vectors.config | {"num_tokens": 9})
    with pytest.raises(ValueError, match="'prompt_embeddings'.*3 dimensions.*None"):
        convert_checkpoint("dmp", Vectors("dit_tiny").state_dict, {"num_heads": 4})


def test_unconditional_dmp_has_one_label():
    vectors = Vectors("dmp_tiny")
    table = "y_embedder.embedding_table.weight"
    state_dict = vectors.state_dict | {table: vectors.state_dict[table][:1]}
    model = convert_checkpoint("dmp", state_dict, {"num_heads": 4, "vp_type": "add", "uncond": True})
    assert (model.config.num_classes, model.config.class_dropout_prob) == (1, 0.0)


def test_names_the_first_weight_that_does_not_fit(system, vectors):
    broken = dict(vectors.state_dict)
    broken["blocks.1.attn.qkv.weight"] = torch.zeros(100, 48)
    with pytest.raises(ValueError, match=r"'blocks.1.attn.qkv.weight'.*144, 48\).*\(100, 48\)"):
        convert_checkpoint(system, broken, vectors.config)

    broken = dict(vectors.state_dict)
    del broken["blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1.bias.*missing"):
        convert_checkpoint(system, broken, vectors.config)

    with pytest.raises(ValueError, match="extra.weight"):
        convert_checkpoint(system, vectors.state_dict | {"extra.weight": torch.zeros(1)}, vectors.config)
    with pytest.raises(ValueError, match="y_embedder"):
        convert_checkpoint(system, {"x_embedder.proj.weight": torch.zeros(48, 4, 2, 2)}, {"num_heads": 4})
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight.*4 dimensions.*\(48, 16\)"):
        convert_checkpoint(system, vectors.state_dict | {"x_embedder.proj.weight": torch.zeros(48, 16)})


def test_refuses_a_configuration_that_the_weights_contradict(system, vectors):
    with pytest.raises(ValueError, match="`state_dict` to have the shape"):
        convert_checkpoint(system, vectors.state_dict, vectors.config | {"hidden_size": 96})
    with pytest.raises(ValueError, match="'final_layer.linear"):
        convert_checkpoint(system, vectors.state_dict, vectors.config | {"learn_sigma": False})
    with pytest.raises(ValueError, match="64 tokens.*input_size. 16.*16"):
        convert_checkpoint(system, vectors.state_dict, vectors.config | {"input_size": 16})
    with pytest.raises(ValueError, match="num_heads.*48.*None"):
        convert_checkpoint(system, vectors.state_dict)
    with pytest.raises(ValueError, match="colour"):
        convert_checkpoint(system, vectors.state_dict, vectors.config | {"colour": "red"})


def test_unknown_system_lists_the_known_ones(vectors):
    with pytest.raises(ValueError, match="dit, dtr, remix, dmp, .*but got 'vit'"):
        convert_checkpoint("vit", vectors.state_dict)


def test_one_state_dict_or_one_for_each_expert(vectors):
    with pytest.raises(ValueError, match="one state dict for 'dit', but got a list"):
        convert_checkpoint("dit", [vectors.state_dict])
    with pytest.raises(ValueError, match="a list of state dicts for 'ppap', but got a dict"):
        convert_checkpoint("ppap", vectors.state_dict)


def test_refuses_what_no_published_dit_has(vectors):
    with pytest.raises(ValueError, match="`mlp_ratio` to be 4, as in the published models, but got 2"):
        convert_checkpoint("dit", vectors.state_dict, {"num_heads": 4, "mlp_ratio": 2.0})
