"""Ask for classes of a classifier.

Legend: B batch, K classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ...models.class_names import find_class, label_list
from .base import GuidanceTarget, check_classes, check_images
from .predictions import LOGITS, check_network, read_prediction


class ClassTarget(GuidanceTarget):
    """
    Ask for classes of an image classification network.

    Args:
        labels (`int`, `str`, or a list, array or tensor of shape (B,) of either): One class for all images, or one for each
            image, by index or by name. Of a name with synonyms, "tench, Tinca tinca", one of them is enough.

    Raises:
        ValueError: from `prepare`, if the network is no classifier, a class is unknown (the message lists similar names), or
            several have the name.
    """

    def __init__(self, labels: "int | str | list[int] | list[str] | np.ndarray | torch.Tensor"):
        self.labels = labels

    def prepare(self, network_config: PreTrainedConfig) -> None:
        check_network(self, network_config, LOGITS)
        names, count = network_config.id2label, network_config.num_labels
        labels = [
            find_class(label, names, "labels") if isinstance(label, str) else label
            for label in label_list(self.labels, "labels")
        ]
        check_classes("labels", min(labels), count)
        check_classes("labels", max(labels), count)
        self.indices, self.highest = torch.tensor(labels), max(labels)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        log_probs = F.log_softmax(read_prediction(self, output, LOGITS), dim=-1)  # (B, K)
        check_classes("labels", self.highest, log_probs.shape[1])
        check_images("labels", len(self.indices), len(log_probs))
        self.indices = self.indices.to(log_probs.device)
        return log_probs.gather(1, self.indices.expand(len(log_probs))[:, None])[:, 0]
