"""Which channels are active at a timestep, and how the others bypass a block: Denoising Task Routing.
https://arxiv.org/abs/2310.07138

Legend: B batch, N tokens, D width, T training timesteps. In the paper's words, a task is to denoise at one timestep.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# The tokens' elements from which an accelerator takes longer than the CPU needs to launch its work: on an H100, a block of DiT-XL/2
# was launched in 0.4 ms and computed for as long from about 5 million. Below, only the number of launches counts.
MIN_ELEMENTS_BOUND_BY_MEMORY = 2**22


@dataclass(frozen=True)
class ChannelWindow:
    """
    The active channels of one timestep, in numbers: where a whole batch shares them, the others are slices.

    Args:
        start, stop (`int`): The first active channel, and the first one after them.
        dim (`int`): The width D.
    """

    start: int
    stop: int
    dim: int

    def inactive_of(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """
        Return the inactive channels before the window and after it, without what is empty.

        Args:
            hidden_states (`torch.Tensor` of shape (..., D)): x.

        Returns:
            `list[torch.Tensor]`: Up to two views of x.
        """
        slices = ((0, self.start), (self.stop, self.dim - self.stop))
        return [hidden_states.narrow(-1, first, length) for first, length in slices if length]

    def masks_for(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute the masks of the window.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)): x, of which dtype and device are used.

        Returns:
            Two `torch.Tensor` of shape (1, 1, D): m, 1 for active channels, and 1 - m.
        """
        active = hidden_states.new_zeros(1, 1, self.dim)
        active.narrow(-1, self.start, self.stop - self.start).fill_(1)
        return active, 1 - active


class ChannelRouting(nn.Module):
    """
    Decide which channels are active at a timestep: its mask m_t has n = ⌊D·β⌋ ones among D channels (DTR, section 4.1).

    With `routing="window"` the active channels are contiguous, and the window moves from the first channels (almost no
    noise) to the last (almost pure noise), so that near timesteps share most of their channels. Only the T first channels
    of the windows are stored. With `routing="random"`, the paper's baseline, any channels are active, and the table of
    masks is saved with the weights.

    Args:
        dim (`int`): The width D.
        sharing_ratio (`float`): The share β in (0, 1] of channels that are active.
        routing_alpha (`float`): α > 0. With larger values, the windows of timesteps with little noise lie closer together.
        num_train_timesteps (`int`): The number T of timesteps of the training noise schedule.
        routing (`str`): 'window' or 'random'.

    Raises:
        ValueError: for a value outside those ranges.
    """

    window_starts: torch.Tensor
    random_masks: torch.Tensor

    def __init__(
        self,
        dim: int,
        sharing_ratio: float,
        routing_alpha: float,
        num_train_timesteps: int,
        routing: str = "window",
    ):
        super().__init__()
        check_routing(sharing_ratio, routing_alpha)
        if int(dim * sharing_ratio) == 0:
            raise ValueError(f"Expected `sharing_ratio` to leave a channel of {dim}, but got {sharing_ratio}.")
        if routing not in ("window", "random"):
            raise ValueError(f"Expected `routing` to be 'window' or 'random', but got {routing!r}.")
        self.dim = dim
        self.num_active = int(dim * sharing_ratio)  # n
        self.num_train_timesteps = num_train_timesteps

        if routing == "window":
            # start(t) = round((t / (T - 1))^α · (D - n)), half to even
            timesteps = torch.arange(num_train_timesteps, dtype=torch.float64, device="cpu")
            progress = timesteps / max(num_train_timesteps - 1, 1)
            starts = (progress**routing_alpha * (dim - self.num_active)).round().long()  # (T,)
            self.register_buffer("window_starts", starts, persistent=False)
            self._starts = starts.tolist()  # the same, known without waiting for the buffer's device
        else:
            order = torch.rand(num_train_timesteps, dim, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
            self.register_buffer("random_masks", order < self.num_active)  # (T, D)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """
        Look up which channels are active.

        Args:
            timestep (`torch.Tensor` of shape (B,)): Integer or float, in [0, T].

        Returns:
            `torch.BoolTensor` of shape (B, D): True where a channel is active.
        """
        # the same as `NoiseIntervals.uniform(T, T).index(t)`: every timestep is an interval of its own
        task = timestep.long().clamp(max=self.num_train_timesteps - 1)
        if hasattr(self, "random_masks"):
            return self.random_masks[task]
        start = self.window_starts[task, None]  # (B, 1)
        channel = torch.arange(self.dim, device=start.device)
        return (channel >= start) & (channel < start + self.num_active)

    def window_at(self, timestep: float) -> ChannelWindow | None:
        """
        Look up which channels are active at one timestep.

        Args:
            timestep (`float`): In [0, T].

        Returns:
            [`ChannelWindow`], or None if the active channels are not contiguous.
        """
        if hasattr(self, "random_masks"):
            return None
        start = self._starts[min(int(timestep), self.num_train_timesteps - 1)]
        return ChannelWindow(start, start + self.num_active, self.dim)

    def masks(self) -> torch.Tensor:
        """
        Compute the masks of all timesteps.

        Returns:
            `torch.BoolTensor` of shape (T, D).
        """
        device = next(self.buffers()).device
        return self(torch.arange(self.num_train_timesteps, device=device))


def check_routing(sharing_ratio: float, routing_alpha: float) -> None:
    """
    Check the settings of a routing.

    Raises:
        ValueError: if `sharing_ratio` is outside (0, 1] or `routing_alpha` is not positive.
    """
    if not 0 < sharing_ratio <= 1:
        raise ValueError(f"Expected `sharing_ratio` to be in (0, 1], but got {sharing_ratio}.")
    if not routing_alpha > 0:
        raise ValueError(f"Expected `routing_alpha` to be positive, but got {routing_alpha}.")


def is_bound_by_memory(hidden_states: torch.Tensor) -> bool:
    """
    Tell whether fewer reads and writes of a tensor are worth more operations: on an accelerator that is behind the CPU.

    Args:
        hidden_states (`torch.Tensor`): The tokens.
    """
    return not hidden_states.is_cpu and hidden_states.numel() >= MIN_ELEMENTS_BOUND_BY_MEMORY


def split_channels(
    hidden_states: torch.Tensor, active: torch.Tensor, inactive: torch.Tensor
) -> tuple[torch.Tensor, "Bypass"]:
    """
    Split what a block is given into what it reads, its active channels, and what bypasses it.

    Args:
        hidden_states (`torch.Tensor`): x.
        active, inactive (`torch.Tensor`, broadcast to x): m, 1 for active channels, and 1 - m.

    Returns:
        m ⊙ x, and the [`Bypass`] that adds (1 - m) ⊙ x to what the block makes of it.
    """
    needs_gradient = torch.is_grad_enabled() and hidden_states.requires_grad
    # a compiler fuses the plain operations, also those of the backward pass
    if needs_gradient and not torch.compiler.is_compiling() and is_bound_by_memory(hidden_states):
        read, bypassing = _Split.apply(hidden_states, active)
        return read, Bypass(bypassing, inactive, is_split=True)
    # m ⊙ x
    return active * hidden_states, Bypass(hidden_states, inactive)


class Bypass:
    """The inactive channels on their way around a block; see [`split_channels`]."""

    def __init__(self, hidden_states: torch.Tensor, inactive: torch.Tensor, is_split: bool = False):
        self.hidden_states = hidden_states
        self.inactive = inactive
        self.is_split = is_split

    def join(self, output: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """
        Add the inactive channels to what the block made of the active ones.

        Args:
            output (`torch.Tensor`): block(m ⊙ x), of the shape of x.
            in_place (`bool`): Change `output`, where no gradient needs it. Only for blocks that return a tensor of their own.

        Returns:
            `torch.Tensor`: block(m ⊙ x) + (1 - m) ⊙ x.
        """
        # out = block(m ⊙ x) + (1 - m) ⊙ x
        if self.is_split:
            return _Join.apply(output, self.hidden_states, self.inactive)
        if in_place:
            return output.addcmul_(self.inactive, self.hidden_states)
        return torch.addcmul(output, self.inactive, self.hidden_states)


class _Split(torch.autograd.Function):
    """
    x → m ⊙ x and x, with the gradient of both, and of what [`_Join`] makes of the second, in one pass over memory.

    Autograd by itself multiplies by 1 - m, by m, and adds: 7 reads and writes of a tensor of x's size in place of 3. But it does
    not call Python, which takes longer where tensors are small.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return active * hidden_states, hidden_states.view_as(hidden_states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_read: torch.Tensor, grad_bypassing: torch.Tensor) -> tuple[torch.Tensor, None]:
        # ∂x = m ⊙ ∂read + (1 - m) ⊙ ∂out
        (active,) = ctx.saved_tensors
        return torch.where(active.bool(), grad_read, grad_bypassing), None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> tuple[torch.Tensor, torch.Tensor]:
        (active,) = ctx.saved_tensors
        return active * tangent, tangent.view_as(tangent)


class _Join(torch.autograd.Function):
    """Output and x → output + (1 - m) ⊙ x, with ∂out for the gradient of both: [`_Split`] takes its inactive channels only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: torch.Tensor, bypassing: torch.Tensor, inactive: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(output, inactive, bypassing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad_output, grad_output, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, bypassing_tangent: torch.Tensor, _: None) -> torch.Tensor:
        (inactive,) = ctx.saved_tensors
        return torch.addcmul(tangent, inactive, bypassing_tangent)
