"""Features that a vision network extracts from images: pooled over the image, spatial, and a classifier's logits.

Legend: B batch, N images, H and W height and width, h and w those of a feature map, C channels, D features, S spatial features,
K classes.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.vision import ImagePreprocessor, load_network, network_sha256, processor_settings
from ..saving.whole import written_whole
from .inception import InceptionV3, load_inception

INCEPTION, DIGITS = "inception", "digits"  # extractors that have a name
SPATIAL_CHANNELS = 7  # channels of the feature map that sFID uses (https://arxiv.org/abs/2103.03841)


@dataclass(frozen=True)
class Features:
    """
    The features of some images.

    Args:
        pooled (`torch.Tensor` of shape (N, D)): One vector per image.
        spatial (`torch.Tensor` of shape (N, S), *optional*): The flattened feature map of each image.
        logits (`torch.Tensor` of shape (N, K), *optional*): The output of a classifier.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class FeatureExtractor(nn.Module):
    """
    Extract features with Inception-2015 or with a vision model of transformers.

    Args:
        name_or_path (`str`): One of

            - 'inception', which is downloaded the first time, or the path of its file `pt_inception-2015-12-05-6726825d.pth`;
            - 'digits', a classifier that is trained on scikit-learn's digits the first time;
            - the folder or Hub id of a transformers model.

    Raises:
        ValueError: if it is none of these; see also [`load_inception`] and [`processor_settings`].
    """

    network: InceptionV3 | PreTrainedModel
    preprocess: ImagePreprocessor

    def __init__(self, name_or_path: "str | os.PathLike"):
        super().__init__()
        name = os.fspath(name_or_path)
        if name == DIGITS:
            name = _digits_classifier()
        self.is_inception = name == INCEPTION or name.endswith((".pth", ".pt"))
        settings: dict[str, Any] = {}
        if self.is_inception:
            self.network = load_inception(None if name == INCEPTION else name)
        else:
            self.network = _load_vision_model(name)
            settings = processor_settings(name)
            self.preprocess = ImagePreprocessor(
                **{key.removeprefix("image_"): value for key, value in settings.items()}
            )
        self.name = os.path.basename(name.rstrip("/")) if os.path.exists(name) else name
        self.sha256 = network_sha256(self.network, settings)

    @property
    def fingerprint(self) -> dict[str, str]:
        """The extractor's name, and a hash of its weights and of its preprocessing."""
        return {"extractor": self.name, "extractor_sha256": self.sha256}

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> Features:
        """
        Extract the features of a batch.

        Args:
            images (`torch.Tensor` of shape (B, 3 or 1, H, W)): uint8.

        Returns:
            [`Features`] on the images' device.
        """
        if isinstance(self.network, InceptionV3):
            pooled, spatial, logits = self.network(images.float().expand(-1, 3, -1, -1))
            return Features(pooled, _flatten_feature_map(spatial), logits)
        images = images.float() / 127.5 - 1
        if self.network.config.to_dict().get("num_channels", 3) == 1:
            images = images.mean(1, keepdim=True)
        outputs = []  # of the body, without a classifier's head: the head's output does not include it
        handle = self.network.base_model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            output = self.network(self.preprocess(images))
        finally:
            handle.remove()
        body = outputs[0]
        states = body.last_hidden_state  # (B, C, h, w) or (B, tokens, C)
        is_map = states.ndim == 4
        pooled = getattr(body, "pooler_output", None)
        if pooled is None:
            pooled = states.mean((2, 3)) if is_map else states.mean(1)
        spatial = _flatten_feature_map(states) if is_map else None
        return Features(pooled.flatten(1), spatial, getattr(output, "logits", None))


def _load_vision_model(name_or_path: str) -> PreTrainedModel:
    """Load a model of transformers in eval mode, without gradients."""
    try:
        return load_network(name_or_path).eval().requires_grad_(False)
    except OSError as error:
        raise ValueError(
            f"Expected `extractor` to be {INCEPTION}, {DIGITS}, or a vision model's folder or Hub id, but got "
            f"{name_or_path!r}: {error}"
        ) from error


def _digits_classifier() -> str:
    """Return the folder of the digits' classifier in torch's cache, and train the classifier if it is not there."""
    from .digits import fit_classifier  # imported here, so that other extractors do not need scikit-learn

    folder = Path(torch.hub.get_dir(), "checkpoints", "diffusers_dmp_digits_classifier")
    if not folder.exists():
        with written_whole(folder) as unfinished:
            fit_classifier(unfinished)
    return str(folder)


def _flatten_feature_map(states: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) → (B, h·w·7), channels last, the order of the statistics that ADM's reference batches store."""
    return states[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def extract_features(extractor: FeatureExtractor, batches: Iterable[np.ndarray], device: Any = "cpu") -> Features:
    """
    Extract the features of many images, batch by batch.

    Args:
        extractor ([`FeatureExtractor`]): On `device`.
        batches (of `np.ndarray` of shape (n, H, W, C)): uint8.
        device: Where to compute.

    Returns:
        [`Features`] of all images, on the CPU.
    """
    device = torch.device(device)
    rows: list[torch.Tensor] = []  # all features of an image side by side: a batch is copied to the CPU at once
    # not in TF32, which is the default of convolutions on a GPU
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for batch in batches:
            images = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2)  # (n, C, H, W)
            if device.type == "cuda":
                images = images.pin_memory()
            features = extractor(images.to(device, non_blocking=True))
            kinds = {name: value for name, value in vars(features).items() if value is not None}
            if rows:
                rows[-1] = rows[-1].cpu()  # the last batch's, now that the GPU has this one to compute
            rows.append(torch.cat([*kinds.values()], dim=1))
    rows[-1] = rows[-1].cpu()
    widths = [value.shape[1] for value in kinds.values()]
    columns = zip(*[batch.split(widths, dim=1) for batch in rows])
    return Features(**{name: torch.cat(column) for name, column in zip(kinds, columns)})
