"""Published sizes of DiT, and checks of its configuration.
https://arxiv.org/abs/2212.09748
"""

from collections.abc import Mapping
from typing import Any

from ..configuration import check_positive

# (layers, width, heads) of Table 1; in a preset's name, the number after the slash is the patch size
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PRESETS = {
    f"DiT-{size}/{patch_size}": {
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "patch_size": patch_size,
    }
    for size, (num_layers, width, num_heads) in DIT_SIZES.items()
    for patch_size in (2, 4, 8)
}
_POSITIVE = (
    "num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size", "num_classes",
    "num_train_timesteps",
)  # fmt: skip


def check_dit_config(config: Mapping[str, Any]) -> None:
    """
    Check the configuration of a DiT.

    Args:
        config (`Mapping[str, Any]`): The arguments of [`DiTModel`].

    Raises:
        ValueError: if a number is not positive, `class_dropout_prob` is not in [0, 1], `sample_size` is not divisible by
            `patch_size`, or the width is not divisible by 4.
    """
    check_positive(config, _POSITIVE)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if width % 4:
        raise ValueError(
            f"Expected the width, heads times `attention_head_dim`, to be divisible by 4, but got {width}."
        )
    if config["sample_size"] % config["patch_size"]:
        raise ValueError(
            f"Expected `sample_size` to be divisible by the `patch_size` {config['patch_size']}, "
            f"but got {config['sample_size']}."
        )
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(f"Expected `class_dropout_prob` to be in [0, 1], but got {config['class_dropout_prob']}.")
