"""Which channels are active at a timestep, and how the others bypass a block: Denoising Task Routing.
https://arxiv.org/abs/2310.07138

Legend: B batch, N tokens, D width, T training timesteps. In the paper's words, a task is to denoise at one timestep.
"""

import torch
from torch import nn


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
            progress = torch.arange(num_train_timesteps, dtype=torch.float64) / max(num_train_timesteps - 1, 1)
            starts = (progress**routing_alpha * (dim - self.num_active)).round().long()  # (T,)
            self.register_buffer("window_starts", starts, persistent=False)
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


def active_channels(hidden_states: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """
    Take what a block reads: its active channels, with zeros for the others.

    Args:
        hidden_states (`torch.Tensor`): x.
        active (`torch.Tensor`, broadcast to x): m, 1 for active channels.
    """
    # m ⊙ x
    return active * hidden_states


def with_inactive_channels(
    output: torch.Tensor, hidden_states: torch.Tensor, inactive: torch.Tensor, in_place: bool = False
) -> torch.Tensor:
    """
    Add the inactive channels, which bypass the block, to what it made of the active ones.

    Args:
        output (`torch.Tensor`): block(m ⊙ x).
        hidden_states (`torch.Tensor`): x, of the same shape.
        inactive (`torch.Tensor`, broadcast to x): 1 - m.
        in_place (`bool`): Change `output`. Only for blocks of which it is known that no gradient needs their output.
    """
    # out = block(m ⊙ x) + (1 - m) ⊙ x
    if in_place:
        return output.addcmul_(inactive, hidden_states)
    return torch.addcmul(output, inactive, hidden_states)
