"""How many operations a denoiser starts: what an eager GPU waits for, wherever it computes faster than Python starts them.

Counted, not timed, and on a CPU: the operations that PyTorch dispatches, without views and without tensors that are not filled.
On a GPU most of them are one kernel each. The depth is the preset's; the width, on which the number does not depend, is the least.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .denoisers import (
    MAKERS,
    compute_gradients,
    in_training,
    make_denoiser,
    make_pipeline,
    sample,
    sampling_inputs,
    sizes_of,
    training_inputs,
)
from .timing import Settings

HEADER = (
    "| what | forward pass | forward and backward | sampling step | a sampling run besides |\n"
    "| --- | --- | --- | --- | --- |"
)
NARROW = {"num_attention_heads": 2, "attention_head_dim": 8}
FEW_STEPS, MORE_STEPS = 16, 32  # Remix-DiT needs all of its 8 experts in both
aten = torch.ops.aten
STARTS_NOTHING = {
    aten.detach.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten._local_scalar_dense.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._fused_sdp_choice.default,
}


class Launches(TorchDispatchMode):
    """
    A context that counts the operations in it.

    Attributes:
        count (`int`): Their number so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func in STARTS_NOTHING)
        return func(*args, **(kwargs or {}))


def count_launches(function: Callable[[], object]) -> int:
    """Count the operations of a call; before it, another one fills what is cached."""
    function()
    with Launches() as launches:
        function()
    return launches.count


@dataclass(frozen=True)
class Counts:
    """
    The operations of a system.

    Args:
        name (`str`): The system.
        forward (`int`), forward_and_backward (`int`): Of a forward pass without gradients, and of one in training.
        sampling_step (`float`), sampling_run (`float`): Of a step with guidance, and of a run besides its steps.
    """

    name: str
    forward: int
    forward_and_backward: int
    sampling_step: float
    sampling_run: float

    def row(self) -> str:
        """Return the counts as a row of the table that `HEADER` begins."""
        counts = f"{self.forward:,} | {self.forward_and_backward:,} | {self.sampling_step:,.0f}"
        return f"| {self.name} | {counts} | {self.sampling_run:,.0f} |"


def run(settings: Settings) -> Iterator[Counts]:
    """Count for each system, with the preset's depth."""
    for system in MAKERS:
        yield count_of(system, sizes_of(settings.preset))


def count_of(system: str, sizes: dict[str, int]) -> Counts:
    """Count the operations of a system."""
    cpu = torch.device("cpu")
    model = make_denoiser(system, sizes | NARROW, cpu)
    with torch.no_grad():
        forward = count_launches(partial(model, **sampling_inputs(model, 2, cpu, torch.float32)))
    pipeline = make_pipeline(system, model)
    few, more = (count_launches(partial(sample, pipeline, steps)) for steps in (FEW_STEPS, MORE_STEPS))
    per_step = (more - few) / (MORE_STEPS - FEW_STEPS)

    inputs = training_inputs(in_training(model), 2, cpu)
    training = count_launches(partial(compute_gradients, model, inputs))
    return Counts(system, forward, training, per_step, few - FEW_STEPS * per_step)
