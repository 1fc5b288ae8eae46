"""The blocks and streams of every class of denoisers are those that a forward pass shows."""

import pytest
import torch
from tiny_denoisers import DENOISERS, told
from torch import nn

from diffusers_dmp.plugins import streams
from diffusers_dmp.plugins.streams import Stream, blocks_with_streams, observe_streams, register_streams

UNETS = {"sdxl", "sd15", "unet2d", "patched_unet"}


@pytest.mark.parametrize("name", sorted(DENOISERS.keys() - UNETS))
def test_streams_are_what_continues_from_block_to_block(name):
    denoiser, inputs = DENOISERS[name]()
    observed = observe_streams(denoiser, **inputs, **told(denoiser, torch.tensor([900.0, 200.0])))
    expected: dict[str, dict[str, Stream]] = {}
    for block in blocks_with_streams(denoiser):
        expected.setdefault(block.name.partition(".")[0], {}).update(block.streams)
    assert expected == {blocks: observed[blocks] for blocks in expected}
    # what else continues is what prepares the image or the text: not of the denoiser's main blocks
    assert {blocks for blocks in observed if blocks not in expected} <= {"noise_refiner", "context_refiner"}


@pytest.mark.parametrize("name", sorted(UNETS))
def test_blocks_of_a_unet_keep_the_shape_of_what_they_take(name):
    denoiser, inputs = DENOISERS[name]()
    blocks = blocks_with_streams(denoiser)
    shapes = {}

    def record(block):
        def hook(module, args, kwargs, output):
            taken = block.streams["image"].input_of(block.argument_names, args, kwargs)
            shapes[block.name] = (taken.shape, block.streams["image"].output_of(output).shape)

        return hook

    for block in blocks:
        block.module.register_forward_hook(record(block), with_kwargs=True)
    denoiser(**inputs, **told(denoiser, torch.tensor([900.0, 200.0])))
    assert shapes.keys() == {block.name for block in blocks}
    assert all(taken == returned for taken, returned in shapes.values())
    assert len(blocks) >= 4


class Mixer(nn.Module):
    """Its stages take two streams by position and return them in an order of their own."""

    class Stage(nn.Module):
        def forward(self, temb, text, tokens):
            return tokens + temb, text * 2

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([self.Stage() for _ in range(3)])

    def forward(self, sample, timestep):
        text = sample + 1
        for stage in self.stages:
            sample, text = stage(timestep, text, sample)
        return (sample,)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(streams, "_TAUGHT", {})


def test_a_class_without_known_blocks_says_how_to_teach_it(registry):
    with pytest.raises(ValueError, match=r"but got a Mixer; teach .*`register_streams\(Mixer, …\)`.*observe_streams"):
        blocks_with_streams(Mixer())


def test_another_class_is_taught_by_what_was_observed(registry):
    observed = observe_streams(Mixer(), torch.ones(2, 3), torch.ones(1))
    assert observed == {"stages": {"image": Stream("tokens", 0), "text": Stream("text", 1)}}
    register_streams(Mixer, observed)
    blocks = blocks_with_streams(Mixer())
    assert [block.name for block in blocks] == ["stages.0", "stages.1", "stages.2"]
    assert all(block.streams == observed["stages"] for block in blocks)


def test_streams_without_an_image(registry):
    with pytest.raises(ValueError, match="stream 'image', but got text"):
        register_streams(Mixer, {"stages": {"text": Stream("text", 1)}})
