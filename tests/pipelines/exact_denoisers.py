"""Denoisers whose right answer is known: every pixel of the data is normally distributed, so that E[x0 | x_t] is a formula.

What a scheduler generates with them must have the data's mean and spread. `measure` says in words what each of Diffusers'
schedulers makes of them. `PYTHONPATH=tests python tests/pipelines/exact_denoisers.py` writes these words into
docs/schedulers.md.
"""

import importlib
import inspect
import pkgutil
import warnings
from pathlib import Path

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, schedulers
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from networks import linear_experts

from diffusers_dmp import ClassConditionalPipeline, ClassTarget, GuidedScheduler
from diffusers_dmp.diffusion.noise import alpha_sigma
from diffusers_dmp.diffusion.predictions import convert_prediction

SPREAD = 0.3
STEPS = 30
# first-order solvers are this far from the data in 30 steps, and come closer with more
MEAN_TOLERANCE, SPREAD_TOLERANCE = 0.08, 0.27
TABLE = Path(__file__).parents[2] / "docs" / "schedulers.md"
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
REASONS = {  # part of a message: the words of the table
    "also needs": "needs more than a prediction",
    "has no `step`": "has no `step`",
    "noise levels of its own": "other noise levels",
    "goes back": "from images to noise",
    "flow-matching": "another process",
}
DISTILLED = ("LCMScheduler", "FlowMatchLCMScheduler")


class ExactDenoiser(ModelMixin, ConfigMixin):
    """
    E[x0 | x_t] for x0 ~ N(mean, SPREAD²), as any kind of prediction, with an error like that of a trained network.

    With `distilled` it predicts where x_t comes from, as consistency models do, in the place of E[x0 | x_t].
    """

    @register_to_config
    def __init__(
        self,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        distilled: bool = False,
        rescale_betas_zero_snr: bool = False,
        error: float = 0.01,
        in_channels: int = 3,
        sample_size: int = 8,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # pipelines ask for a dtype
        scheduler = DDPMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=rescale_betas_zero_snr)
        alphas, sigmas = alpha_sigma(scheduler.alphas_cumprod.double())
        self.angles = torch.atan2(sigmas, alphas)
        self.mean = torch.full((1, in_channels, sample_size, sample_size), 0.5)
        self.mean[..., sample_size // 2 :] = -0.3  # the left half is brighter
        self.error = error * torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(0))
        self.calls: list[float] = []

    def forward(self, sample, timestep):
        self.calls.append(timestep[0].item())
        kind = self.config["prediction_type"]
        time = timestep.double().view(-1, 1, 1, 1)
        if kind == "flow_prediction":
            alpha, sigma = 1 - time / 1000, time / 1000
        else:
            low = time.floor().long().clamp(max=999)
            angle = torch.lerp(self.angles[low], self.angles[(low + 1).clamp(max=999)], time - low)
            alpha, sigma = angle.cos(), angle.sin()
        x_t, mean = sample.double(), self.mean.double()
        spread = (alpha**2 * SPREAD**2 + sigma**2).sqrt()  # of x_t
        slope = SPREAD / spread if self.config["distilled"] else alpha * SPREAD**2 / spread**2
        x0 = mean + slope * (x_t - alpha * mean)
        if kind == "flow_prediction":
            prediction = (x_t - alpha * x0) / sigma - x0
        else:
            prediction = convert_prediction(x0, x_t, alpha, sigma, "sample", kind)
        return UNet2DOutput(sample=(prediction + self.error).to(sample.dtype))


def pipeline_of(denoiser: ExactDenoiser, scheduler: SchedulerMixin | None = None) -> ClassConditionalPipeline:
    """A pipeline that was made with the noise schedule of the denoiser, and was then given another scheduler."""
    config = denoiser.config
    if config.prediction_type == "flow_prediction":
        first = FlowMatchEulerDiscreteScheduler()
    else:
        first = DDPMScheduler(
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            clip_sample=False,
        )
    pipeline = ClassConditionalPipeline(denoiser, first)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = first if scheduler is None else scheduler
    return pipeline


def generate(pipeline, steps: int = STEPS, batch_size: int = 8) -> torch.Tensor:
    """Samples (B, C, H, W), the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=batch_size, num_inference_steps=steps, generator=generator, output_type="latent").images


def problem(samples: torch.Tensor, denoiser: ExactDenoiser) -> str:
    """What is wrong with samples: their mean or spread; empty if they are right."""
    if not samples.isfinite().all():
        return "not finite"
    left, right = ((samples - denoiser.mean)[..., half].mean().item() for half in (slice(4), slice(4, 8)))
    spread = (samples - denoiser.mean).std().item() / SPREAD
    is_right = max(abs(left), abs(right)) < MEAN_TOLERANCE and abs(spread - 1) < SPREAD_TOLERANCE
    return "" if is_right else f"mean off by {left:.2f} and {right:.2f}, spread {spread:.2f} times the data's"


def measure(scheduler_class: type, denoiser: ExactDenoiser, **settings) -> str:
    """Say what a scheduler makes of a denoiser: 'right', 'refused: …' or 'wrong: …'."""
    first = pipeline_of(denoiser).scheduler
    try:
        pipeline = pipeline_of(denoiser, scheduler_class.from_config(first.config, **settings))
    except (TypeError, ValueError):
        return "cannot be made"
    denoiser.calls.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = problem(generate(pipeline), denoiser)
    except ValueError as error:
        reasons = [words for part, words in REASONS.items() if part in str(error)]
        if not str(error).startswith("Expected") or not reasons or denoiser.calls:
            raise
        return f"refused: {reasons[0]}"
    return f"wrong: {wrong}" if wrong else "right"


def measure_guided(scheduler_class: type, denoiser: ExactDenoiser, **settings) -> str:
    """Say what guidance by a linear classifier does: 'right' if it makes images brighter, and at scale 0 nothing."""
    pipeline = pipeline_of(denoiser)
    if scheduler_class.__name__ == "DPMSolverSDEScheduler":
        settings["noise_sampler_seed"] = 0  # it takes no generator
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **settings)
    without = generate(pipeline)
    brightness = torch.zeros(5, without[0].numel())
    brightness[0] = 0.05  # the logit of class 0 is the mean brightness, the other four are 0
    pipeline.scheduler = GuidedScheduler(pipeline.scheduler, linear_experts(brightness), ClassTarget(0), scale=0.0)
    if not torch.allclose(generate(pipeline), without, atol=1e-3, rtol=1e-3):
        return "wrong: other samples at scale 0"
    pipeline.scheduler.scale = 5.0
    brighter = (generate(pipeline) - without).mean().item()
    return "right" if 0.005 < brighter < 0.5 else f"wrong: brighter by {brighter:.3f}"


def scheduler_classes() -> dict[str, type]:
    """All schedulers of Diffusers that can be imported here, by name."""
    found = {}
    for module in pkgutil.walk_packages(schedulers.__path__, "diffusers.schedulers."):
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError:  # two of them need torchsde
            continue
        for name, member in members.items():
            is_scheduler = inspect.isclass(member) and issubclass(member, SchedulerMixin)
            if is_scheduler and member.__module__ == module.name and member is not SchedulerMixin:
                found[name] = member
    return dict(sorted(found.items()))


def flow_settings(scheduler_class: type) -> dict:
    """The settings with which a scheduler is a flow-matching one, if it has any."""
    has_flow_sigmas = "use_flow_sigmas" in inspect.signature(scheduler_class.__init__).parameters
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if has_flow_sigmas else {}


def row(name: str, scheduler_class: type) -> str:
    """A row of the table: for ε with a linear and a cosine schedule, for flow velocities, and under guidance of what fits."""
    distilled = name in DISTILLED
    words = [
        measure(scheduler_class, ExactDenoiser(beta_schedule, distilled=distilled))
        for beta_schedule in ("linear", "squaredcos_cap_v2")
    ]
    flow = flow_settings(scheduler_class)
    flow_denoiser = ExactDenoiser(prediction_type="flow_prediction", distilled=distilled)
    words.append(measure(scheduler_class, flow_denoiser, **flow))
    guided = []
    if "right" in words[:2]:
        guided.append(measure_guided(scheduler_class, ExactDenoiser("squaredcos_cap_v2", distilled=distilled)))
    if words[2] == "right":
        guided.append(measure_guided(scheduler_class, flow_denoiser, **flow))
    words.append(", ".join(dict.fromkeys(guided)) or "–")
    if distilled:
        words = [each.replace("right", "right if distilled") for each in words]
    return f"| `{name}` | {' | '.join(words)} |"


def main() -> None:
    """Write the table of docs/schedulers.md anew."""
    rows = [row(name, scheduler_class) for name, scheduler_class in scheduler_classes().items()]
    before = TABLE.read_text().split("| --- ")[0]
    TABLE.write_text(f"{before}| --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
