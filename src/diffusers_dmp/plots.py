"""Pictures of what the models draw and of how their parts share the noise levels."""

from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from .models import DTRTransformer2DModel


def sample_grid(columns: "list[list[Image.Image]]", pixel_size: int = 1, gap: int = 1) -> Image.Image:
    """
    Images in a grid, one list per column (per class, say), enlarged so that each pixel is a square of `pixel_size`.
    """
    width, height = columns[0][0].size
    width, height, gap = width * pixel_size, height * pixel_size, gap * pixel_size
    rows = max(len(column) for column in columns)
    grid = Image.new(columns[0][0].mode, (len(columns) * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (gap + x * (width + gap), gap + y * (height + gap)))
    return grid


def routing_figure(model: DTRTransformer2DModel) -> Figure:
    """
    The channels that each timestep of a DTR model activates (the paper's figure 3; https://arxiv.org/abs/2310.07138).
    """
    masks = model.task_routing.masks().cpu().numpy()  # (T, D)
    num_train_timesteps, dim = masks.shape
    share = masks.mean(1).mean()

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        masks.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0, num_train_timesteps, 0, dim),
        cmap=colormaps["Blues"].resampled(4),
        vmin=-0.5,
        vmax=1.5,
    )
    axes.set_xlabel("timestep (0 almost clean, right almost pure noise)")
    axes.set_ylabel("channel")
    axes.set_title(f"Channels that a timestep uses (dark): {share:.0%} of {dim}, the same in every block")
    return figure
