"""Example requests whose answers come with the Space, to be shown at once. `make_models.py` makes the pictures."""

from dataclasses import dataclass
from pathlib import Path

from showcase import SHIPPED

PICTURES = Path(__file__).parent / "pictures"


@dataclass(frozen=True)
class Example:
    """
    A request and the files of its answer.

    Args:
        label (`str`): The text on its button.
        values (`tuple`): The values of the request, in the order of `Studio.requests`.
        systems (`tuple[str, ...]`): The names of the pipelines whose pictures it shows.
        picture (`str`): The beginning of the names of its picture files.
    """

    label: str
    values: tuple
    systems: tuple[str, ...]
    picture: str

    def paths(self, count: int) -> list[Path]:
        """Return the files of its `count` pictures."""
        return [PICTURES / f"{self.picture}_{index}.png" for index in range(count)]


EXAMPLES = {
    "generate": [
        Example("All classes by DTR", ("dtr", "all", 20, 1.5, 25, "DDPM", 0, False), ("dtr",), "generate_dtr"),
        Example("Dresses by Remix-DiT", ("remix", "dress", 20, 1.5, 25, "DPM-Solver++", 1, False), ("remix",), "generate_remix"),
        Example("Bags by Patch Diffusion", ("patch", "bag", 20, 1.5, 50, "DDIM", 2, False), ("patch",), "generate_patch"),
    ],
    "compare": [
        Example("All five, all classes", (list(SHIPPED), "all", 1.5, 25, "DDPM", 0, False), SHIPPED, "compare_all"),
        Example("All five, ankle boots", (list(SHIPPED), "ankle boot", 1.5, 25, "DDPM", 3, False), SHIPPED, "compare_boots"),
    ],
    "specialise": [Example("DTR at timestep 500", ("dtr", 500), ("dtr",), "specialise_dtr")],
    "guide": [
        Example("All classes, scale 7.5", ("all", 20, 7.5, 25, "DDPM", 0, False), ("ppap",), "guide_all"),
        Example("Trousers, scale 7.5", ("trousers", 20, 7.5, 25, "DDPM", 1, False), ("ppap",), "guide_trousers"),
        Example("Trousers, scale 2", ("trousers", 20, 2.0, 25, "DDPM", 1, False), ("ppap",), "guide_trousers_weak"),
    ],
}  # fmt: skip
