"""The `model_index.json` of a pipeline: what it consists of, read before anything is loaded."""

import os
from typing import Any

from diffusers import DiffusionPipeline

from ...saving.weight_files import check_saved_folder


def read_pipeline_index(argument: str, name_or_path: str) -> dict[str, Any]:
    """
    Read what a pipeline consists of.

    Args:
        argument (`str`): The argument that the user gave the pipeline in, for the message.
        name_or_path (`str`): Its folder or Hub id.

    Returns:
        `dict[str, Any]`: Its class and its components, as its `model_index.json` names them.

    Raises:
        ValueError: if it is the folder of something else, a file in the folder is damaged, or the pipeline has no scheduler.
        OSError: if there is neither such a folder nor such a pipeline on the Hub.
    """
    if not name_or_path:
        raise ValueError(f"Expected `{argument}` to be a folder or Hub id, but got nothing.")
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        raise ValueError(
            f"Expected `{argument}` to be the folder of a Diffusers pipeline, but got {name_or_path!r} without a model_index.json."
        )
    check_saved_folder(name_or_path)
    index: dict[str, Any] = dict(DiffusionPipeline.load_config(name_or_path))
    if not isinstance(index.get("scheduler"), (list, tuple)):
        raise ValueError(
            f"Expected `{argument}` to be a pipeline with a scheduler, but got {name_or_path!r} without one."
        )
    return index
