"""What encoded images and captions come from: recorded beside the shards, and compared with the pipeline that trains on them."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...saving.reading import read_json

ENCODING_NAME = "encoding.json"  # the settings of the encoding, beside the shards
EMPTY_PROMPT_NAME = "empty_prompt.safetensors"
COMPONENTS = "components"  # the entry of the components' records

logger = logging.getLogger(__name__)

# numbers in configurations that change no output, or that libraries change when they load them
WITHOUT_EFFECT = ("sample_size", "_token_id")  # how such an entry's name ends


def encoders_of(pipeline: Any) -> dict[str, Any]:
    """The components of a pipeline that encode images and captions, by name, in the order of their names."""
    return {
        name: component
        for name, component in sorted(pipeline.components.items())
        if name.startswith(("vae", "text_encoder", "tokenizer")) and component is not None
    }


def component_record(component: Any) -> dict[str, Any]:
    """
    Return what identifies an encoder, as JSON can hold it.

    Args:
        component: A VAE, a text encoder or a tokenizer.

    Returns:
        `dict[str, Any]`: Of a model its class, the sizes in its configuration, dtype and a hash of its weights; of a tokenizer a
        hash of its vocabulary.
    """
    if isinstance(component, nn.Module):
        settings: Any = component.config
        config = settings if isinstance(settings, Mapping) else settings.to_dict()  # of Diffusers, of transformers
        record = {
            "class": type(component).__name__,
            "config": _sizes(config),
            "dtype": str(component.dtype).removeprefix("torch."),
            "weights": rounded_digest(component),
        }
        return json.loads(json.dumps(record))  # lists, as they are read again
    return {"vocabulary": _short_hash(json.dumps(sorted(component.get_vocab().items())).encode())}


@torch.no_grad()
def rounded_digest(module: nn.Module) -> str:
    """
    A short hash of a module's weights, rounded to bfloat16: loaded in that dtype or in float32, they have the same hash.

    Neither the names of the weights nor their order count, which differ between versions of a library.
    """
    hashes = []
    for parameter in module.parameters():
        rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        shape = repr(tuple(rounded.shape)).encode()
        hashes.append(hashlib.sha256(shape + rounded.view(-1).view(torch.uint8).numpy().tobytes()).digest())
    return _short_hash(b"".join(sorted(hashes)))


def check_encoding(
    encoding: Mapping[str, Any], pipeline: Any, source: str | None = None, encoded: str = "the data"
) -> None:
    """
    Check that a pipeline is the one that encoded images and captions.

    Of components that are loaded, class, configuration and weights are compared; weights in float16 only with such. Of those that
    are not, the configuration in the pipeline's folder, if it is there. Text encoders that were left out, such as Stable
    Diffusion 3's T5, are warned of.

    Args:
        encoding (`Mapping[str, Any]`): The record beside the shards.
        pipeline ([`DiffusionPipeline`]): The pipeline, with or without its text encoders and VAE.
        source (`str`, *optional*): The folder that it is from.
        encoded (`str`): Where the shards are, for the error.

    Raises:
        ValueError: if it is not; what differs is named.
    """
    names = [cls.__name__ for cls in type(pipeline).__mro__]
    if encoding["pipeline_class"] not in names:
        raise ValueError(
            f"Expected {encoded!r} to be encoded by a {names[0]}, as it is to be trained, but got images and captions of a "
            f"{encoding['pipeline_class']}; encode them with the pipeline that is trained."
        )
    loaded = {name: component_record(component) for name, component in encoders_of(pipeline).items()}
    for name in encoding[COMPONENTS].keys() - loaded.keys():
        config = Path(source or "", name, "config.json")
        if source and config.is_file():
            loaded[name] = {"config": _sizes(read_json(config))}
    check_components(encoding[COMPONENTS], loaded, encoded)
    index = Path(source or "", "model_index.json")
    own = read_json(index) if source and index.is_file() else {}
    left_out = [
        name for name in own if name.startswith("text_encoder") and own[name][0] and name not in encoding[COMPONENTS]
    ]
    if left_out:
        logger.warning(
            "%r was encoded without %s of this pipeline: what is trained on it is for sampling without it, too.",
            encoded,
            ", ".join(f"`{name}`" for name in left_out),
        )


def check_components(recorded: Mapping[str, Any], found: Mapping[str, Any], encoded: str) -> None:
    """
    Check that components are those that encoded images and captions.

    Args:
        recorded (`Mapping[str, Any]`), found (`Mapping[str, Any]`): The records of components by name; see [`component_record`].
            Those in both are compared.
        encoded (`str`): Where the shards are, for the error.

    Raises:
        ValueError: if one is not; what differs is named.
    """
    for name in sorted(recorded.keys() & found.keys()):
        for entry, before, now in _differences(recorded[name], found[name]):
            what = (
                f"another {entry}" if entry in ("weights", "vocabulary") else f"the {entry} {now!r} and not {before!r}"
            )
            raise ValueError(
                f"Expected {encoded!r} to be encoded by this pipeline's `{name}`, but it has {what}; take the pipeline "
                "that encoded them, or encode them again into another folder."
            )


def _differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The entries that differ among those that both have, with their two values; those of nested ones, too."""
    dtypes = {record.get("dtype") for record in (recorded, found)}
    for entry in sorted(recorded.keys() & found.keys() - {"dtype"}):
        before, now = recorded[entry], found[entry]
        if entry == "weights" and len(dtypes) > 1 and "float16" in dtypes:
            continue  # rounded twice, or with other exponents
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now)
        elif before != now:
            yield entry, before, now


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The numbers and lists of numbers in a configuration, those of nested ones, too.

    Other entries are not compared: transformers changes some while it loads a model, so that they differ from those in its folder.
    """
    sizes = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            sizes[str(name)] = _sizes(value)
        elif _is_number(value) or (isinstance(value, (list, tuple)) and value and all(map(_is_number, value))):
            sizes[str(name)] = value
    return {name: value for name, value in sizes.items() if not name.endswith(WITHOUT_EFFECT)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def absolute_source(source: str) -> str:
    """A folder's absolute path; a Hub id as it is."""
    return os.path.abspath(source) if os.path.exists(source) else source
