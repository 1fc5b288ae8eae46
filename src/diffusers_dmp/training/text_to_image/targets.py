"""Which modules of a denoiser get LoRA."""

import difflib
from collections.abc import Sequence

from torch import nn

# of the attention in Diffusers' denoisers: of the image, and of the text in those that attend to both at once (MM-DiT)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Conv3d)
MAX_SHOWN = 12


def lora_targets_of(denoiser: nn.Module, names: Sequence[str] = ()) -> list[str]:
    """
    Choose the modules of a denoiser that get LoRA, as PEFT's `target_modules` takes them.

    Args:
        denoiser (`nn.Module`): The denoiser.
        names (`Sequence[str]`): Names of modules, or ends of them after a dot; by default the projections of its attention.

    Raises:
        ValueError: if nothing in the denoiser has one of the names, or its attention has none of the usual names.
    """
    modules = [name for name, module in denoiser.named_modules() if isinstance(module, ADAPTABLE)]
    class_name = type(denoiser).__name__
    if not names:
        found = [name for name in ATTENTION if _matches(name, modules)]
        if not found:
            raise ValueError(
                f"Expected `target_modules` to be given for a {class_name}, whose attention has none of {', '.join(ATTENTION)}, but "
                f"got none; it has {', '.join(_endings(modules)[:MAX_SHOWN])}, …"
            )
        return found
    for name in names:
        if not _matches(name, modules):
            close = difflib.get_close_matches(name, _endings(modules), MAX_SHOWN, cutoff=0.5)
            usual = [each for each in ATTENTION if _matches(each, modules)] or _endings(modules)[:MAX_SHOWN]
            hint = f"close to it are {', '.join(close)}" if close else f"such are {', '.join(usual)}"
            raise ValueError(
                f"Expected `target_modules` to be names, or ends of names, of linear layers or convolutions of the {class_name}, but "
                f"got {name!r}; {hint}."
            )
    return list(names)


def _matches(name: str, modules: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _endings(modules: Sequence[str]) -> list[str]:
    """What one would write to mean a module in all blocks: what follows the last number of a list of blocks."""
    found: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
        # the number at the end, as in `to_out.0`, belongs to the name, and one of a `Sequential` as in `net.0.proj`, too
        lists = [
            index for index in numbers if parts[index - 1].endswith(("blocks", "layers", "attentions", "resnets"))
        ]
        begin = lists[-1] + 1 if lists else 0
        for start in range(begin, len(parts)):
            if not parts[start].isdigit():
                found.setdefault(".".join(parts[start:]))
    return list(found)
