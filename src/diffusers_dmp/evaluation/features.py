"""What a network sees in images: features of them as a whole, of their places, and a classifier's verdict.

Legend: B batch, N images, H and W height and width, C channels, D features, S spatial features, K classes.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.vision import ImagePreprocessor, load_network, network_sha256, processor_settings
from ..saving.whole import written_whole
from .inception import load_inception

INCEPTION, DIGITS = "inception", "digits"  # extractors by name
SPATIAL_CHANNELS = 7  # of the features by place that sFID looks at (https://arxiv.org/abs/2103.03841)


@dataclass(frozen=True)
class Features:
    """
    Args:
        pooled (`torch.Tensor` of shape (N, D)): Of whole images.
        spatial (`torch.Tensor` of shape (N, S), *optional*): Of their places.
        logits (`torch.Tensor` of shape (N, K), *optional*): A classifier's.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class FeatureExtractor(nn.Module):
    """
    Features by Inception-2015 or by any vision model of transformers.

    Args:
        name_or_path (`str`): 'inception', which is downloaded where it is first asked for, or its file
            `pt_inception-2015-12-05-6726825d.pth`; 'digits', a classifier that is fitted on scikit-learn's digits where it is
            first asked for; or a transformers model's folder or Hub id.

    Raises:
        ValueError: if it is neither; see [`load_inception`] and [`processor_settings`].
    """

    def __init__(self, name_or_path: "str | os.PathLike"):
        super().__init__()
        name = os.fspath(name_or_path)
        if name == DIGITS:
            name = _digits_classifier()
        self.is_inception = name == INCEPTION or name.endswith((".pth", ".pt"))
        settings = {}
        if self.is_inception:
            self.network = load_inception(None if name == INCEPTION else name)
        else:
            try:
                self.network = load_network(name).eval().requires_grad_(False)
            except OSError as error:
                raise ValueError(
                    f"Expected `extractor` to be {INCEPTION}, {DIGITS}, or a vision model's folder or Hub id, but got {name!r}: "
                    f"{error}"
                ) from error
            settings = processor_settings(name)
            self.preprocess = ImagePreprocessor(
                **{key.removeprefix("image_"): value for key, value in settings.items()}
            )
        self.name = os.path.basename(name.rstrip("/")) if os.path.exists(name) else name
        self.sha256 = network_sha256(self.network, settings)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Name, and hash of the weights and of what is done to images before."""
        return {"extractor": self.name, "extractor_sha256": self.sha256}

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> Features:
        """
        Args:
            images (`torch.Tensor` of shape (B, 3 or 1, H, W)): uint8.
        """
        if self.is_inception:
            pooled, spatial, logits = self.network(images.float().expand(-1, 3, -1, -1))
            return Features(pooled, _places(spatial), logits)
        images = images.float() / 127.5 - 1
        if self.network.config.to_dict().get("num_channels", 3) == 1:
            images = images.mean(1, keepdim=True)
        found = []  # what the network's body makes, behind which a classifier's head has its verdict
        handle = self.network.base_model.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            output = self.network(self.preprocess(images))
        finally:
            handle.remove()
        body = found[0]
        states = body.last_hidden_state  # (B, C, h, w) or (B, tokens, C)
        has_places = states.ndim == 4
        pooled = getattr(body, "pooler_output", None)
        if pooled is None:
            pooled = states.mean((2, 3)) if has_places else states.mean(1)
        spatial = _places(states) if has_places else None
        return Features(pooled.flatten(1), spatial, getattr(output, "logits", None))


def _digits_classifier() -> str:
    """Its folder, where torch keeps what it downloads."""
    from .digits import fit_classifier  # scikit-learn is asked of nobody else

    folder = Path(torch.hub.get_dir(), "checkpoints", "diffusers_dmp_digits_classifier")
    if not folder.exists():
        with written_whole(folder) as unfinished:
            fit_classifier(unfinished)
    return str(folder)


def _places(states: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) → (B, h·w·7), place by place, as the stored statistics of ADM's reference batches have them."""
    return states[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def extract_features(extractor: FeatureExtractor, batches: Iterable[np.ndarray], device: Any = "cpu") -> Features:
    """
    Features of all images, on the CPU.

    Args:
        extractor ([`FeatureExtractor`]): On that device.
        batches (of `np.ndarray` of shape (n, H, W, C)): uint8.
        device: Where to compute.
    """
    parts = []
    # not in TF32, which is the default of convolutions on a GPU
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for batch in batches:
            features = extractor(torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(device))
            parts.append({name: value.cpu() for name, value in vars(features).items() if value is not None})

    def joined(name: str) -> torch.Tensor | None:
        return torch.cat([part[name] for part in parts]) if name in parts[0] else None

    return Features(joined("pooled"), joined("spatial"), joined("logits"))
