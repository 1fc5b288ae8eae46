"""PPAP's published depth experts for DeepFloyd-IF: MiDaS small (https://github.com/isl-org/MiDaS) with LoRA.

LoRA is in the pointwise convolutions `conv_pw` of the encoder's blocks, in `layer*_rn`, and in all convolutions of the fusion
blocks, none of which has groups. The student was trained on noisy images of stage I, resized to what MiDaS expects.
"""

from typing import Any

from torch import nn

from ..renaming import NamedWeights, in_float32
from .published import PublishedExpert, PublishedNetwork, Weights, convolution_scale, read_convolutions

NETWORK_NAME = "torch.hub intel-isl/MiDaS MiDaS_small"
_SAMPLE_SIZE = 64  # of stage I


def is_midas(state_dict: Weights) -> bool:
    """Tell whether a checkpoint is that of a MiDaS network."""
    return any(key.startswith("midas.") for key in state_dict)


def read_midas(state_dict: Weights) -> PublishedExpert:
    """Read MiDaS small, under its own names."""
    weights = NamedWeights({key.removeprefix("midas."): tensor for key, tensor in in_float32(state_dict).items()})
    return PublishedExpert(*read_convolutions(weights))


def midas_network(
    state_dict: Weights, published: list[PublishedExpert], config: dict[str, Any], network: nn.Module | None
) -> PublishedNetwork:
    """
    Describe the network of MiDaS's experts.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The checkpoint of the first expert.
        published (`list[PublishedExpert]`): What was read from all of them.
        config (`dict`): See [`convert_ppap`]; the entries that are used are removed.
        network (`nn.Module`, *optional*): MiDaS small.

    Returns:
        [`PublishedNetwork`]: The network, and what the published code did with it.

    Raises:
        ValueError: if no network is given, or a checkpoint's weights have other names or shapes.
    """
    if network is None:
        raise ValueError(
            "Expected `network` to be MiDaS small, which these experts are made of and which has its code elsewhere, but got "
            'none. In Python: `network = torch.hub.load("intel-isl/MiDaS", "MiDaS_small")`, then `convert_checkpoint("ppap", '
            "state_dicts, network=network).save_pretrained(folder)`."
        )
    frozen = {name: tensor.detach().float() for name, tensor in network.state_dict().items()}
    for index, each in enumerate(published):
        for name in sorted(frozen.keys() ^ each.weights.keys()):
            problem = "misses" if name in frozen else "has one more:"
            raise ValueError(
                f"Expected `state_dict` to hold the weights of `network`, but that of expert {index} {problem} {name!r}."
            )
        for name, tensor in each.weights.items():
            if tensor.shape != frozen[name].shape:
                raise ValueError(
                    f"Expected {name!r} to have the shape {tuple(frozen[name].shape)}, as in `network`, but got "
                    f"{tuple(tensor.shape)} for expert {index}."
                )
    settings = {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_size": [256, 256],
        "outputs": "depth",
        "base_model_name_or_path": NETWORK_NAME,
        "sample_size": [config.pop("image_size", _SAMPLE_SIZE)] * 2,
        "noise_schedule": {"process": "diffusion", "beta_schedule": "squaredcos_cap_v2"},
    }
    return PublishedNetwork(network, frozen, settings, convolution_scale(state_dict, config), "that of `network`")
