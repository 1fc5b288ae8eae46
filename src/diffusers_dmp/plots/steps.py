"""The figure of who does what: which noise level each step of a sampling has, and which expert makes it."""

from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..diffusion.noise import is_flow_matching
from ..diffusion.timesteps import training_timesteps
from ..intervals import NoiseIntervals
from ..pipelines.expert_steps import experts_at, set_copy


def steps_figure(
    intervals: NoiseIntervals,
    scheduler: SchedulerMixin,
    num_inference_steps: int | None = None,
    *,
    timestep: int | None = None,
    **schedule: Any,
) -> Figure:
    """
    Plot the timestep of each step of a sampling, in the colour of the expert that makes it, on the experts' intervals.

    Args:
        intervals, scheduler, num_inference_steps, schedule: As in [`experts_per_step`].
        timestep (`int`, *optional*): A timestep to mark, in [0, T).

    Raises:
        ValueError: as [`experts_per_step`].
    """
    scheduler = set_copy(scheduler, num_inference_steps, **schedule)
    total = intervals.num_train_timesteps
    timesteps = training_timesteps(scheduler, total)
    experts = experts_at(intervals, timesteps)
    steps = range(1, len(timesteps) + 1)

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, timesteps, color="gray", linewidth=0.8)
    for expert, (low, high) in enumerate(zip(intervals.edges, intervals.edges[1:])):
        own = (experts == expert).nonzero().flatten()
        color = f"C{expert}"
        end = "≤" if high == total else "<"
        label = f"expert {expert}, {low:g} ≤ t {end} {high:g}: {len(own)} of {len(experts)} steps"
        axes.axhspan(low, high, color=color, alpha=0.15)
        axes.plot(own + 1, timesteps[own], "o", color=color, markersize=5, label=label)
    if timestep is not None:
        axes.axhline(timestep, color="tab:red", linewidth=2)
    axes.set_ylim(0, total * 1.02)
    axes.set_xlabel("step (call of the denoiser)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("timestep t (0: almost clean)")
    if is_flow_matching(scheduler):
        from_timesteps: Any = lambda t: t / total  # noqa: E731
        to_timesteps: Any = lambda sigma: sigma * total  # noqa: E731
        sigmas = axes.secondary_yaxis("right", functions=(from_timesteps, to_timesteps))
        sigmas.set_ylabel("σ = t/T")
    axes.set_title(f"The expert of each step of {type(scheduler).__name__}")
    figure.legend(loc="outside lower center")
    return figure
