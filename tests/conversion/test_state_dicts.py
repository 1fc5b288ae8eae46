"""State dicts are found wherever they are in a file, and their names are those of the model's code."""

import pytest
import torch
from conftest import Vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_dmp import convert_checkpoint, load_original_state_dict
from diffusers_dmp.conversion.original import convert_file
from diffusers_dmp.conversion.state_dicts import state_dict_in, without_wrappers

PUBLISHED = ("dit_tiny", "dtr_tiny", "remix_tiny", "dmp_tiny", "patch_unet_class_p2", "adm_unet_uncond", "inception")
ENTRIES = ("ema", "model", "state_dict", "module", "model_state_dict", "params")
PREFIXES = ("_orig_mod.", "module.", "model.", "_forward_module.", "_fsdp_wrapped_module.")


@settings(max_examples=40)
@given(
    name=st.sampled_from(PUBLISHED[:4]),
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=5),
    entries=st.lists(st.sampled_from(ENTRIES), max_size=4),
)
def test_wrappers_and_entries_in_any_order_and_depth(name, prefixes, entries):
    weights = Vectors(name).state_dict
    content = {"".join(prefixes) + key: tensor for key, tensor in weights.items()}
    for entry in entries:
        content = {"epoch": 3, entry: content, "optimizer": {"state": {0: torch.zeros(2)}}}
    found = state_dict_in(content, "DiT.pt")
    assert list(found) == list(weights) and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_published_layout_loses_a_part_of_its_names(name):
    names = list(Vectors(name).state_dict) or list(Vectors(name).tensors)
    assert without_wrappers(names) == names


def test_what_wraps_a_part_of_a_model_is_removed_too():
    """A compiled block, a checkpointed one of FSDP, and others."""
    names = [
        "blocks.0._orig_mod.weight",
        "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.weight",
        "head.weight",
    ]
    assert without_wrappers(names) == ["blocks.0.weight", "blocks.1.weight", "head.weight"]


def test_a_name_that_only_some_weights_have_is_kept():
    assert without_wrappers(["model.a", "head.b"]) == ["model.a", "head.b"]
    assert without_wrappers(["model.model"]) == ["model"]
    assert without_wrappers(["module.model.a", "module.b"]) == ["model.a", "b"]


def test_averaged_weights_are_taken_where_there_are_some():
    raw, averaged = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    for content, expected in (
        ({"model": raw, "ema": averaged}, averaged),
        ({"model": raw, "ema": None}, raw),
        ({"checkpoint": 1, "state_dict": {"model": raw, "ema_model": averaged}}, averaged),
    ):
        assert torch.equal(state_dict_in(content, "x")["a"], expected["a"])
    assert torch.equal(state_dict_in({"model": raw, "ema": averaged}, "x", use_ema=False)["a"], raw["a"])


def test_parameters_come_without_gradients(tmp_path):
    torch.save({"a": nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    assert not load_original_state_dict(tmp_path / "x.pt")["a"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_any_precision_are_converted(tmp_path, dtype):
    published = Vectors("dit_tiny")
    torch.save({name: tensor.to(dtype) for name, tensor in published.state_dict.items()}, tmp_path / "x.pt")
    model = convert_file("dit", tmp_path / "x.pt", published.config)
    bias = published.state_dict["x_embedder.proj.bias"].to(dtype).float()
    assert torch.equal(model.pos_embed.proj.bias, bias)


SYSTEMS = {
    "dit": "dit_tiny",
    "dtr": "dtr_tiny",
    "remix": "remix_tiny",
    "dmp": "dmp_tiny",
    "patch_diffusion": "patch_unet_class_p2",
    "adm": "adm_unet_uncond",
}


@pytest.mark.parametrize("system", SYSTEMS)
@given(data=st.data())
@settings(max_examples=12)
def test_any_weight_that_is_missing_or_misshapen_is_refused(system, data):
    """By ValueErrors alone, whichever weight it is; only the table of positions, which is computed, may be missing."""
    vectors = Vectors(SYSTEMS[system])
    name = data.draw(st.sampled_from([name for name in vectors.state_dict if name != "pos_embed"]))
    tensor = vectors.state_dict[name]
    damage = data.draw(st.sampled_from(["missing", "scalar", "flat", "empty"]))
    others = {other: weight for other, weight in vectors.state_dict.items() if other != name}
    replaced = {
        "missing": {},
        "scalar": {name: torch.zeros(())},
        "flat": {name: torch.zeros(tensor.numel() + 1)},
        "empty": {name: tensor[..., :0]},
    }[damage]
    with pytest.raises(ValueError):
        convert_checkpoint(system, others | replaced, vectors.config)
