"""From the published checkpoints of one PPAP to guidance experts."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...guidance import GuidanceExperts
from .classifiers import classifier_network, is_deit, read_deit, read_resnet
from .midas import is_midas, midas_network, read_midas
from .published import Lora, Weights, check_lora, load_published


def convert_ppap(
    state_dicts: "Sequence[Weights]", config: dict[str, Any], network: nn.Module | None = None
) -> GuidanceExperts:
    """
    Convert the published checkpoints of PPAP, or of its baselines, which have no LoRA.

    Args:
        state_dicts (a list of E `dict[str, torch.Tensor]`): The experts' checkpoints, beginning with the one for the cleanest
            images.
        config (`dict`): `lora_alpha` (by default 8) of a convolution's LoRA; `num_train_timesteps` (1000); `image_size`, the
            size of the images that the experts were trained on (256, and 64 for MiDaS); `base_model_folder`, a folder to save
            the network in, without which the experts of a classifier cannot be saved. The entries that are used are removed.
        network (`nn.Module`, *optional*): MiDaS small, for its experts; it is changed in place. The network of a classifier is
            made of the checkpoints.

    Returns:
        [`GuidanceExperts`] with the noise that they were trained on. As in the published code, a classifier sees images in
        [-1, 1] without normalisation, a ResNet in their own size and DeiT in the size that it was trained for; MiDaS sees them
        normalised, in 256 x 256 pixels.

    Raises:
        ValueError: if a weight is missing or unknown, a frozen weight differs between experts or is not the network's, or
            `network` is given for a classifier, or not given for MiDaS.
    """
    first = state_dicts[0]
    midas = is_midas(first)
    if network is not None and not midas:
        raise ValueError("Expected no `network` for the experts of a ResNet or a DeiT, which hold it, but got one.")
    read = read_midas if midas else read_deit if is_deit(first) else read_resnet
    published = [read(each) for each in state_dicts]
    check_lora(state_dicts, published)
    if midas:
        base = midas_network(first, published, config, network)
    else:
        base = classifier_network(first, published[0], config)
    experts = GuidanceExperts(
        base.network,
        num_experts=len(published),
        num_train_timesteps=config.pop("num_train_timesteps", 1000),
        **_adapters(published[0].lora, base.scale) if published[0].lora else _whole_networks(len(published)),
        **base.settings,
    )
    load_published(experts, published, base)
    return experts


def _adapters(lora: Lora, scale: float) -> dict[str, Any]:
    """The arguments of [`GuidanceExperts`] for LoRA of these ranks."""
    ranks = {re.escape(name): len(lora_a) for name, (lora_a, _) in lora.items()}
    return {
        "target_modules": "|".join(ranks),
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items()},
        # PEFT divides α by the rank of the layer
        "alpha_pattern": {f"^{name}": scale * rank for name, rank in ranks.items()},
    }


def _whole_networks(num_experts: int) -> dict[str, Any]:
    """The arguments of [`GuidanceExperts`] for the paper's baselines, which have no LoRA."""
    return {"method": "finetune" if num_experts == 1 else "multi_experts"}
