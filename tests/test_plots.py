"""The pictures say what the numbers do."""

import numpy as np
import pytest
from conftest import TINY_CONFIG
from matplotlib.figure import Figure

from diffusers_dmp import DTRTransformer2DModel
from diffusers_dmp.plots import mixing_figure, routing_figure, training_share_figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_routing_figure():
    model = DTRTransformer2DModel(**TINY_CONFIG)
    (image,) = routing_figure(model).axes[0].images
    assert np.array_equal(image.get_array(), model.task_routing.masks().numpy().T)


def test_mixing_figure(tmp_path):
    before, after = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], [[0.7, 0.3], [0.4, 0.6], [0.25, 0.75]]
    figure = mixing_figure(before, after, (0, 333, 666, 1000))
    for axes, coefficients in zip(figure.axes, (before, after)):
        assert np.allclose(axes.images[0].get_array(), coefficients)
        assert [text.get_text() for text in axes.texts] == [f"{share:.2f}" for row in coefficients for share in row]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0: 0–332", "1: 333–665", "2: 666–999"]
    figure.savefig(tmp_path / "mixing.png")


def test_training_share_figure(tmp_path):
    figure = training_share_figure([64, 0, 192], (0, 333, 666, 1000))
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.25, 0, 0.75])
    assert texts(figure) == ["25.0%", "0.0%", "75.0%"]
    figure.savefig(tmp_path / "share.png")
