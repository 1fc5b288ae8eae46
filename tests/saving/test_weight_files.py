"""Files of weights: read by what they hold, damaged ones named, nothing that is not finite let through."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from diffusers_dmp import DiTModel
from diffusers_dmp.saving.finite import expect_finite_files, expect_finite_weights
from diffusers_dmp.saving.reading import read_json, read_yaml
from diffusers_dmp.saving.weight_files import check_saved_folder, read_weights, safetensors_header, saved_files

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(4, dtype=torch.float16)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_the_content_decides_not_the_name(tmp_path, suffix, form):
    path = tmp_path / f"weights{suffix}"
    if form == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=form == "zip")
    tensors = read_weights(path)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_headers_have_the_shapes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = safetensors_header(tmp_path / "x.safetensors")
    assert {name: tuple(tensor["shape"]) for name, tensor in header.items()} == {"a": (2, 3), "b.c": (4,)}


@pytest.mark.parametrize("start", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_or_an_archive(tmp_path, start):
    """The length of the header, a multiple of 8, comes first: 0x80… is that of a pickle, 0x4B50 (PK) that of an archive."""
    path = tmp_path / "x.safetensors"
    for padding in range(start - 300, start + 300, 8):
        save_file(TENSORS, path, metadata={"padding": "x" * max(padding, 0)})
        assert safetensors_header(path).keys() == read_weights(path).keys() == TENSORS.keys()


@settings(max_examples=40)
@given(length=st.integers(0, len(save(TENSORS)) - 1))
def test_a_safetensors_file_cut_anywhere_is_named(length, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(save(TENSORS)[:length])
    for read in (read_weights, safetensors_header):
        with pytest.raises(ValueError, match="cut.safetensors"):
            read(path)


@given(content=st.binary(max_size=300), suffix=st.sampled_from([".pt", ".safetensors"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_in_one_line(content, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    try:
        read_weights(path)  # a short pickle of a number is one that can be read
    except ValueError as error:
        assert f"bytes{suffix}" in str(error) and "\n" not in str(error) and len(str(error)) < 400


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.touch()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match=r"x.pt' to be a file of weights, but got a file that may not be read"):
        read_weights(path)


def test_configurations_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"depth": 3}', encoding="utf-8-sig")
    (tmp_path / "config.yaml").write_text("depth: 3\n", encoding="utf-8-sig")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_json(tmp_path / "config.json") == read_yaml(tmp_path / "config.yaml") == {"depth": 3}
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_checkpoints_and_hidden_folders_are_not_looked_at(tmp_path):
    for folder in ("transformer", "checkpoint-4", ".cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.safetensors").touch()
    assert saved_files(tmp_path, "*.safetensors") == [tmp_path / "transformer" / "x.safetensors"]
    check_saved_folder(tmp_path, components=False)
    with pytest.raises(ValueError, match=f"transformer{os.sep}x.safetensors"):
        check_saved_folder(tmp_path)
    check_saved_folder(tmp_path / "no such folder")


def test_shards_of_an_index_are_all_there(tmp_path):
    model = DiTModel(**TINY_CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    check_saved_folder(tmp_path)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    (tmp_path / last).unlink()
    with pytest.raises(ValueError, match=last):
        DiTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@settings(max_examples=15)
@given(index=st.integers(0, 5), value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_one_number_that_is_not_finite_is_found(dtype, index, value, tmp_path_factory):
    if dtype is torch.float8_e4m3fn:
        value = float("nan")  # it has no infinity
    tensors = {"whole": torch.ones(3, dtype=dtype), "broken": torch.ones(2, 3).to(dtype), "ids": torch.tensor([1])}
    expect_finite_weights(tensors, "x")
    tensors["broken"].view(-1)[index] = value
    with pytest.raises(ValueError, match="'x' to be finite, but 1 of 6 numbers in 'broken' are NaN or infinite"):
        expect_finite_weights(tensors, "x")
    folder = tmp_path_factory.mktemp("finite")
    save_file(tensors, folder / "finite.safetensors")
    with pytest.raises(ValueError, match="finite.safetensors' to be finite, but 1 of 6"):
        expect_finite_files(folder)


def test_large_numbers_are_finite():
    """Also where their sum is not."""
    expect_finite_weights({"a": torch.full((10,), 3e38), "b": torch.full((9,), 6e4, dtype=torch.float16)}, "x")


def test_a_model_with_missing_weights_is_not_left_random(tmp_path):
    model = DiTModel(**TINY_CONFIG)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = read_weights(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if "attn.to_out" not in name}
    save_file(tensors, Path(file), metadata={"format": "pt"})
    with pytest.raises(ValueError, match="4 are missing, such as 'transformer_blocks.0.attn.to_out.bias'"):
        DiTModel.from_pretrained(tmp_path)


def test_loading_info_is_returned_when_asked_for(tmp_path):
    DiTModel(**TINY_CONFIG).save_pretrained(tmp_path)
    model, info = DiTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, DiTModel) and not info["missing_keys"]
