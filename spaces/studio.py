"""What the tabs ask for: each request is checked, value by value, and then carried out. Knows nothing of Gradio."""

import random
import time
from collections.abc import Callable
from typing import Any

from checks import Refusal, number, one_of, some_of, whole_number, yes_or_no
from PIL import Image
from specialisation import responsibility, specialisation_picture
from systems import ALL_CLASSES, OnStep, System

from diffusers_dmp.diffusion.schedulers import SCHEDULERS
from diffusers_dmp.plots import sample_grid

MAX_SCALE, MAX_STEPS, MAX_SEED, MAX_IMAGES = 20, 100, 2**32 - 1, 40
COMPARED_IMAGES = 20
GRID_PIXELS = 640  # about as wide a picture is made

Check = Callable[[Any, dict], Any]  # (value, those checked before it) → the value


class Studio:
    """
    The four requests. Not for several threads at once: the systems' models are shared, and some keep what they last computed.

    Args:
        systems (`dict[str, System]`): By name.
    """

    def __init__(self, systems: dict[str, System]):
        self.systems = systems
        self.guides = [system for system in systems.values() if system.experts is not None]
        drawing: dict[str, Check] = {
            "scale": lambda value, _: number("guidance scale", value, 0, MAX_SCALE),
            "steps": lambda value, _: whole_number("steps", value, 1, MAX_STEPS),
            "scheduler": lambda value, _: one_of("scheduler", value, SCHEDULERS),
            "seed": lambda value, _: whole_number("seed", value, 0, MAX_SEED),
            "randomise": lambda value, _: yes_or_no("randomising the seed", value),
        }
        self.requests: dict[str, dict[str, Check]] = {
            "generate": {
                "system": self._check_system,
                "class_name": lambda value, got: self._check_class(value, [got["system"]]),
                "count": lambda value, _: whole_number("number of images", value, 1, MAX_IMAGES),
                **drawing,
            },
            "compare": {
                "names": lambda value, _: some_of("systems", value, systems),
                "class_name": lambda value, got: self._check_class(value, got["names"]),
                **drawing,
            },
            "specialise": {
                "system": self._check_system,
                "timestep": lambda value, got: whole_number(
                    "timestep", value, 0, self.systems[got["system"]].num_train_timesteps - 1
                ),
            },
            "guide": {
                "class_name": lambda value, _: self._check_class(value, [self.guides[0].name]),
                "count": lambda value, _: whole_number("number of images", value, 1, MAX_IMAGES),
                **drawing,
            },
        }

    def examine(self, request: str, values: "tuple | list") -> tuple[dict[str, Any], list[str | None]]:
        """
        Check all values of a request.

        Args:
            request (`str`): 'generate', 'compare', 'specialise' or 'guide'.
            values: As they came, in the order of `requests`.

        Returns:
            The good ones by name, and for each value what is wrong with it or None.
        """
        good, problems = {}, []
        for (name, check), value in zip(self.requests[request].items(), values, strict=True):
            try:
                good[name] = check(value, good)
                problems.append(None)
            except Refusal as refusal:
                problems.append(str(refusal))
            except KeyError:  # it depends on one that is wrong, of which that is said
                problems.append(None)
        return good, problems

    def checked(self, request: str, values: "tuple | list") -> dict[str, Any]:
        """
        Raises:
            Refusal: of the first value that is wrong.
        """
        good, problems = self.examine(request, values)
        for problem in filter(None, problems):
            raise Refusal(problem)
        return good

    def generate(self, *values, on_step: OnStep | None = None) -> tuple[Image.Image, int, str]:
        """A grid, the seed, and a sentence."""
        asked = self.checked("generate", values)
        system, seed = self.systems[asked["system"]], _seed(asked)
        begun = time.perf_counter()
        grid = self._grid(system, asked, seed, asked["count"], on_step)
        return grid, seed, f"Drawn by {system.title} with seed {seed} in {time.perf_counter() - begun:.1f} s."

    def compare(self, *values, on_step: OnStep | None = None) -> tuple[list[tuple[Image.Image, str]], int, str]:
        """A grid of each system with its name and seconds, the seed, and a sentence."""
        asked = self.checked("compare", values)
        seed, grids = _seed(asked), []
        for index, name in enumerate(asked["names"]):
            system = self.systems[name]
            # one scale does not fit both kinds of guidance: the experts' has a tab of its own
            own = asked | {"scale": system.default_scale if system.experts is not None else asked["scale"]}
            begun = time.perf_counter()
            grid = self._grid(system, own, seed, COMPARED_IMAGES, _part(on_step, index, len(asked["names"])))
            grids.append((grid, f"{system.title}: {time.perf_counter() - begun:.1f} s"))
        return grids, seed, f"Drawn from the same noise, of seed {seed}."

    def specialise(self, *values, on_step: OnStep | None = None) -> tuple[Image.Image | None, str]:
        """The plots, and who is responsible; there are no steps to tell of."""
        asked = self.checked("specialise", values)
        system = self.systems[asked["system"]]
        return specialisation_picture(system, asked["timestep"]), responsibility(system, asked["timestep"])

    def guide(self, *values, on_step: OnStep | None = None) -> tuple[Image.Image, Image.Image, int, str]:
        """A grid without guidance and one with, the seed, and a sentence."""
        asked = self.checked("guide", values)
        system, seed = self.guides[0], _seed(asked)
        unguided, guided = (
            self._grid(system, asked, seed, asked["count"], _part(on_step, part, 2), guided_by_experts=bool(part))
            for part in (0, 1)
        )
        wanted = "all classes in turn" if asked["class_name"] == ALL_CLASSES else f"“{asked['class_name']}”"
        return unguided, guided, seed, f"Both are of seed {seed}; the right one was asked for {wanted}."

    def _check_system(self, value: Any, _: dict) -> str:
        return one_of("system", value, self.systems)

    def _check_class(self, value: Any, names: list[str]) -> str:
        """One that all of these systems know."""
        return one_of("class", value, self.class_choices(names))

    def class_choices(self, names: list[str]) -> list[str]:
        """'all', and the classes that all of these systems know."""
        first, *others = (self.systems[name].classes for name in names)
        return [ALL_CLASSES, *(name for name in first if all(name in other for other in others))]

    @staticmethod
    def _grid(system: System, asked: dict, seed: int, count: int, on_step: OnStep | None, **options) -> Image.Image:
        try:
            images = system.draw(
                asked["class_name"],
                count,
                scale=asked["scale"],
                num_inference_steps=asked["steps"],
                scheduler=asked["scheduler"],
                seed=seed,
                on_step=on_step,
                **options,
            )
        except ValueError as error:
            if not str(error).startswith("Expected"):
                raise
            raise Refusal(f"{system.title}: {error}") from error  # the library's own words are plain enough
        columns = min(count, 5 if count <= 25 else 10)  # of ten digits in turn, so that they stand below each other
        pixel_size = max(1, GRID_PIXELS // (columns * (images[0].width + 1) + 1))
        return sample_grid([images[column::columns] for column in range(columns)], pixel_size)


def _seed(asked: dict) -> int:
    return random.SystemRandom().randint(0, MAX_SEED) if asked["randomise"] else asked["seed"]


def _part(on_step: OnStep | None, index: int, parts: int) -> OnStep | None:
    """Steps of one of several drawings, told as steps of all."""
    return on_step and (lambda done, steps: on_step(index * steps + done, parts * steps))
