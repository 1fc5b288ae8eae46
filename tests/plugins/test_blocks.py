"""Prompts can be attached to a transformer of any class whose layout is registered."""

import dataclasses

import pytest
import torch
from conftest import randomised
from torch import nn

from diffusers_dmp import Conditioning, PromptPatch, TransformerLayout, register_layout
from diffusers_dmp.plugins import blocks


class Mixer(nn.Module):
    """A transformer of an unregistered class: its blocks get the tokens second and by name, and know the timestep alone."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, temb, tokens):
            return tokens + self.linear(tokens + temb[:, None])

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, sample, timestep, return_dict=True):
        temb = self.embed(timestep[:, None].float())
        for layer in self.layers:
            sample = layer(temb, tokens=sample)
        return (self.head(sample),)


@pytest.fixture
def mixer_layout(monkeypatch) -> TransformerLayout:
    monkeypatch.setattr(blocks, "_LAYOUTS", dict(blocks._LAYOUTS))
    return TransformerLayout(
        blocks="layers",
        image_tokens="tokens",
        conditioning=Conditioning(embedder="embed"),
        depends_on=("timestep",),
        width=lambda model: 8,
        num_tokens=lambda model: 5,
    )


def test_another_class_can_be_registered(mixer_layout):
    register_layout(Mixer, mixer_layout)
    model = randomised(Mixer())
    sample, timestep = torch.randn(2, 5, 8), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        plain = model(sample, timestep)[0]
        patch = PromptPatch.for_transformer(model).attach(model)
        torch.testing.assert_close(model(sample, timestep)[0], plain)
        randomised(patch)
        assert not torch.allclose(model(sample, timestep)[0], plain)
    patch.train()
    output, importance_loss = model(sample, timestep)
    (output.sum() + importance_loss).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_transformer_that_passes_its_input_to_its_blocks(mixer_layout):
    """The first block gets the same tensor again at another timestep, and must get the gates of that timestep."""
    register_layout(Mixer, mixer_layout)
    model = randomised(Mixer())
    randomised(PromptPatch.for_transformer(model)).attach(model)
    sample = torch.randn(2, 5, 8)
    model(sample, torch.tensor([0.1, 0.7]))
    output = model(sample, torch.tensor([0.9, 0.2]))[0]
    assert torch.equal(output, model(sample.clone(), torch.tensor([0.9, 0.2]))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "levels"}, "modules that it has, but got 'levels'"),
        (
            {"conditioning": Conditioning(embedder="embed", after="pos_embed")},
            "modules that it has, but got 'pos_embed'",
        ),
        (
            {"image_tokens": "hidden_states"},
            "`image_tokens` to name arguments of Block's `forward`, temb, tokens, but",
        ),
        ({"depends_on": ("t",)}, "`depends_on` to name arguments of Mixer's `forward`, sample, timestep, .*'t'"),
    ],
)
def test_a_layout_that_does_not_fit_leaves_the_transformer_alone(mixer_layout, change, message):
    model = Mixer()
    register_layout(Mixer, dataclasses.replace(mixer_layout, **change))
    with pytest.raises(ValueError, match=message):
        PromptPatch(8, 5, 3).attach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_transformer_that_returns_neither_dataclass_nor_tuple(mixer_layout, monkeypatch):
    register_layout(Mixer, mixer_layout)
    forward = Mixer.forward
    monkeypatch.setattr(Mixer, "forward", lambda self, sample, timestep: forward(self, sample, timestep)[0])
    model = Mixer()
    PromptPatch.for_transformer(model).attach(model)
    with pytest.raises(ValueError, match="return a BaseOutput or a tuple, but got a Tensor"):
        model(torch.randn(2, 5, 8), torch.tensor([0.1, 0.7]))


def test_an_unknown_transformer(mixer_layout):
    patch = PromptPatch(8, 5, 3)
    with pytest.raises(
        ValueError, match="one of DiTModel, .* but got a Mixer; register its layout with .*register_layout"
    ):
        patch.attach(Mixer())


def test_prepending_to_a_model_that_takes_no_extra_tokens(mixer_layout):
    register_layout(Mixer, mixer_layout)
    with pytest.raises(ValueError, match="extra tokens to prepend to, but got a Mixer"):
        PromptPatch(8, 5, 3, mode="prepend").attach(Mixer())
