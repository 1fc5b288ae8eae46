"""Generated images in grids."""

from matplotlib.figure import Figure
from PIL import Image


def sample_grid(columns: list[list[Image.Image]], pixel_size: int = 1, gap: int = 1) -> Image.Image:
    """
    Put images of one size into a grid.

    Args:
        columns (`list[list[Image.Image]]`): The images of each column, from top to bottom; for example, one column per class.
        pixel_size (`int`): The width and height of an image's pixel in the grid, in pixels.
        gap (`int`): The width of the white lines between the images, in pixels of the images.

    Returns:
        `Image.Image`: In the mode of the first image.
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


def comparison_figure(grids: dict[str, Image.Image]) -> Figure:
    """
    Show images of one size side by side.

    Args:
        grids (`dict[str, Image.Image]`): The images by their titles.
    """
    width, height = next(iter(grids.values())).size
    figure = Figure(figsize=(len(grids) * width / 100 + 0.2, height / 100 + 0.5), layout="constrained")
    for axes, (name, grid) in zip(figure.subplots(1, len(grids), squeeze=False).flat, grids.items()):
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    return figure
