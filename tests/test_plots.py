"""The figures show the numbers that they are made from."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from matplotlib.figure import Figure
from PIL import Image
from tiny_pipelines import flux, flux_pipe

from diffusers_dmp import (
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    NoiseIntervals,
    SNRSplitPipeline,
    experts_per_step,
)
from diffusers_dmp.evaluation.costs import gigaflops
from diffusers_dmp.plots import (
    comparison_figure,
    gate_figure,
    mixing_figure,
    prompt_usage_figure,
    routing_figure,
    snr_split_figure,
    specialisation_figures,
    steps_figure,
    training_share_figure,
)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_routing_figure():
    model = DTRTransformer2DModel(**TINY_CONFIG)
    (image,) = routing_figure(model).axes[0].images
    assert np.array_equal(image.get_array(), model.task_routing.masks().numpy().T)


def test_mixing_figure(tmp_path):
    before, after = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], [[0.7, 0.3], [0.4, 0.6], [0.25, 0.75]]
    figure = mixing_figure({"before": before, "after": after}, (0, 333, 666, 1000), timestep=333)
    for axes, coefficients in zip(figure.axes, (before, after)):
        assert np.allclose(axes.images[0].get_array(), coefficients)
        assert [text.get_text() for text in axes.texts] == [f"{share:.2f}" for row in coefficients for share in row]
        (mark,) = axes.patches
        assert mark.get_y() == 0.5  # expert 1
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0: 0–332", "1: 333–665", "2: 666–999"]
    figure.savefig(tmp_path / "mixing.png")


def test_training_share_figure(tmp_path):
    figure = training_share_figure([64, 0, 192], (0, 333, 666, 1000))
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.25, 0, 0.75])
    assert texts(figure) == ["25.0%", "0.0%", "75.0%"]
    figure.savefig(tmp_path / "share.png")


def test_gate_figure(tmp_path):
    gates = torch.rand(5, 8, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)  # (S, L, M)
    figure = gate_figure(gates, torch.tensor([0, 200, 400, 600, 800]))
    panels = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(panels) == 8
    for block, picture in enumerate(panels):
        assert np.allclose(picture, 3 * gates[:, block].T)
    figure.savefig(tmp_path / "gates.png")
    gate_figure(torch.full((5, 1, 3), 1 / 3), torch.arange(5))  # untrained prompts


def test_prompt_usage_figure(tmp_path):
    gates = torch.tensor([[[0.2, 0.5, 0.3]], [[0.4, 0.5, 0.1]]])  # (S, L, M)
    figure = prompt_usage_figure(gates)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([1.5, 0.9, 0.6])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "0", "2"]
    extremes = [path.vertices[:, 1].tolist() for path in figure.axes[0].collections[0].get_paths()]
    assert np.allclose(extremes, [[1.5, 1.5], [0.6, 1.2], [0.3, 0.9]])
    figure.savefig(tmp_path / "usage.png")


def test_comparison_figure(tmp_path):
    grids = {"one": Image.new("L", (60, 40), 30), "other": Image.new("L", (60, 40), 200)}
    figure = comparison_figure(grids)
    assert [axes.get_title() for axes in figure.axes] == ["one", "other"]
    assert [int(axes.images[0].get_array()[0, 0]) for axes in figure.axes] == [30, 200]
    figure.savefig(tmp_path / "comparison.png")


def test_snr_split_figure(tmp_path):
    denoisers = [DiTModel(**TINY_CONFIG), DTRTransformer2DModel(**TINY_CONFIG | {"num_layers": 1})]
    pipeline = SNRSplitPipeline(denoisers, DDIMScheduler(), [0.25])
    figure = snr_split_figure(pipeline, num_inference_steps=50)
    curve, cost = figure.axes
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    assert np.allclose(curve.lines[0].get_ydata(), alphas_cumprod / (1 - alphas_cumprod))
    spans = [(span.get_x(), span.get_x() + span.get_width()) for span in curve.patches]
    assert spans == [(0, 396), (396, 1000)]
    labels = [span.get_label() for span in curve.patches]
    assert labels[0].endswith("(DiTModel): 20 of 50 steps") and labels[1].endswith(
        "(DTRTransformer2DModel): 30 of 50 steps"
    )
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    labels = {"class_labels": torch.zeros(1, dtype=torch.long)}
    costs = [gigaflops(denoiser, *inputs, **labels) for denoiser in denoisers]
    assert [bar.get_height() for bar in cost.patches] == costs and costs[0] > 1.8 * costs[1]
    figure.savefig(tmp_path / "snr_split.png")


def test_steps_figure(tmp_path):
    intervals, scheduler = NoiseIntervals.from_sigmas([0.5, 0.875]), FlowMatchEulerDiscreteScheduler(shift=5.0)
    figure = steps_figure(intervals, scheduler, 28, timestep=700)
    axes = figure.axes[0]
    points = {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}
    owners = experts_per_step(intervals, scheduler, 28)
    scheduler.set_timesteps(28)
    for expert, (label, line) in enumerate(points.items()):
        mine = [index for index, owner in enumerate(owners) if owner == expert]
        assert f"expert {expert}, " in label and f": {len(mine)} of 28 steps" in label
        assert np.allclose(line.get_xdata(), np.array(mine) + 1)
        assert np.allclose(line.get_ydata(), scheduler.timesteps[mine])
    assert [label.split(", ")[1].split(":")[0] for label in points][1:] == ["500 ≤ t < 875", "875 ≤ t ≤ 1000"]
    figure.savefig(tmp_path / "steps.png")


def test_figures_of_experts_in_any_pipeline():
    pipe = flux_pipe(DenoiserExperts([flux(0), flux(1)], NoiseIntervals.from_sigmas([0.6])))
    assert list(specialisation_figures(pipe, num_inference_steps=4)) == ["steps"]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for scheduler in (FlowMatchEulerDiscreteScheduler, partial(UniPCMultistepScheduler, **flow)):
        pipe.scheduler = scheduler(use_dynamic_shifting=True)
        (figure,) = specialisation_figures(pipe, num_inference_steps=4).values()
        assert len(figure.axes[0].lines) == 3
