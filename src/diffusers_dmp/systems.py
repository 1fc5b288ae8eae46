"""One record per system: its paper, its classes, and how it divides the noise levels.

Figures, the Space, diagnostics, folders, model cards, the command line and benchmarks read these records, so that a new
system is one record more. Classes and figures are named, not imported, and functions import what they need: the module itself
is read at once, without PyTorch and Diffusers.

Legend: E experts, K bases, L blocks, M prompts, T training timesteps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .saving.naming import EDGES_KEY

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from .intervals import NoiseIntervals

SMALL_CHANGE = 0.1  # of a prompt's weight over all timesteps, in equal shares


def denoisers_of(pipeline: "DiffusionPipeline") -> "list[ModelMixin]":
    """
    Return the denoisers of a pipeline, of this package or any of Diffusers'.

    Args:
        pipeline ([`DiffusionPipeline`]): With `denoisers`, or else a `transformer` or `unet`.

    Raises:
        ValueError: if it has none of them.
    """
    if hasattr(pipeline, "denoisers"):
        return pipeline.denoisers
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    if denoiser is None:
        raise ValueError(
            f"Expected a pipeline with a `transformer` or `unet`, but got a {type(pipeline).__name__} with "
            f"{', '.join(sorted(pipeline.components))}."
        )
    return [denoiser]


def _whole_denoiser(pipeline: "DiffusionPipeline", _: Any) -> "list[tuple[ModelMixin, str]]":
    return _with_prediction_types(pipeline, denoisers_of(pipeline)[:1])


def _with_prediction_types(pipeline: Any, models: "Iterable[ModelMixin]") -> "list[tuple[ModelMixin, str]]":
    from .diffusion.predictions import prediction_type_of

    return [(model, prediction_type_of(model, pipeline.scheduler)) for model in models]


@dataclass(frozen=True, kw_only=True)
class System:
    """
    What the rest of the package has to know about a system.

    The functions below take the pipeline and its part that divides the noise levels, as `find` returns it.

    Args:
        key (`str`): Its name in code, folders and tags, such as 'patch_diffusion'.
        title (`str`): Its name in texts, such as 'Patch Diffusion'.
        paper, paper_title (`str`): The arXiv id and the title.
        classes (`tuple[str, ...]`): The package's classes by which a saved folder is recognised.
        find (`Callable`): From a pipeline to its part that divides the noise levels, or None if it has none.
        sentence (`Callable`): From (pipeline, part, timestep) to a sentence about who is at work at this timestep.
        training_script (`str`, *optional*): The script in `training/`, without its suffix; None for a system that has none.
        figures (`str`, *optional*): The function of `plots.specialisation` that plots how the noise levels are divided.
        pictures (`tuple[str, ...]`): The names of the PNG files that a demo's report writes beside a pipeline.
        intervals (`Callable`, *optional*): From the part to its intervals, if it has experts.
        experts (`Callable`): From (pipeline, part) to its experts, each as a model for all timesteps, with its prediction
            type; by default the whole denoiser.
        derived_intervals (`Callable`, *optional*): From (E, T) to the intervals that version 0.1.0 of the class had, whose
            configurations do not hold the edges.
        short_name (`str`, *optional*): Its name for the Space and the benchmarks; `key` by default.
        is_guidance (`bool`): Whether its experts guide another model, and are saved without the network that they adapt.
        tags (`tuple[str, ...]`): Tags of its model card besides those of all systems.
        pipeline_tag (`str`, *optional*): The task in the metadata of its model card; None if it depends on the pipeline.
    """

    key: str
    title: str
    paper: str
    paper_title: str
    classes: tuple[str, ...]
    find: "Callable[[DiffusionPipeline], Any]"
    sentence: "Callable[[DiffusionPipeline, Any, int], str]"
    training_script: str | None = None
    figures: str | None = None
    pictures: tuple[str, ...] = ()
    intervals: "Callable[[Any], NoiseIntervals] | None" = None
    experts: "Callable[[DiffusionPipeline, Any], list[tuple[ModelMixin, str]]]" = _whole_denoiser
    derived_intervals: "Callable[[int, int], NoiseIntervals] | None" = None
    short_name: str = ""
    is_guidance: bool = False
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = "unconditional-image-generation"

    def __post_init__(self):
        object.__setattr__(self, "short_name", self.short_name or self.key)

    @property
    def card(self) -> str:
        """The template of its model card, in the folder of all cards."""
        return f"{self.key}/card.md"


def system_of_classes(class_names: Iterable[str | None]) -> System | None:
    """The system of a saved folder, from the names of its classes; None if no class belongs to a system."""
    class_names = set(class_names)
    return next((system for system in _by_precedence() if class_names & set(system.classes)), None)


def systems_in(pipeline: "DiffusionPipeline") -> "list[tuple[System, Any]]":
    """The systems of a pipeline with the part of it that divides the noise levels, the most specific system first."""
    found = [(system, system.find(pipeline)) for system in _by_precedence()]
    return [(system, part) for system, part in found if part is not None]


def responsibility(pipeline: "DiffusionPipeline", timestep: int) -> str:
    """
    Say in a sentence or two which part of a pipeline is at work at a timestep.

    Args:
        pipeline: Any pipeline with a `transformer` or `unet`, or a [`SNRSplitPipeline`]; for guidance experts with a
            [`GuidedScheduler`].
        timestep (`int`): In [0, T).
    """
    system, part = systems_in(pipeline)[0]
    return system.sentence(pipeline, part, timestep)


def saved_intervals(config: Mapping[str, Any]) -> "NoiseIntervals | None":
    """
    Read the intervals from a saved configuration.

    Args:
        config (`Mapping`): A model's or guidance experts' `config.json`, of this version or of 0.1.0.

    Returns:
        [`NoiseIntervals`], or None for a configuration without experts.
    """
    from .intervals import NoiseIntervals

    if config.get(EDGES_KEY):
        return NoiseIntervals(tuple(config[EDGES_KEY]))
    class_name = config.get("_class_name")  # a pipeline's is a pair of file and class
    system = system_of_classes([class_name]) if isinstance(class_name, str) else None
    if system is None or system.derived_intervals is None or not config.get("num_experts"):
        return None
    return system.derived_intervals(config["num_experts"], config["num_train_timesteps"])


def owned_timesteps(intervals: "NoiseIntervals", expert: int) -> str:
    """
    Say which timesteps an expert owns: 'below 250', 'from 250 to below 875' or 'from 875 on'.

    Args:
        intervals ([`NoiseIntervals`]): At least two.
        expert (`int`): Its index.
    """
    low, high = intervals.edges[expert], intervals.edges[expert + 1]
    if expert == 0:
        return f"below {high:g}"
    return f"from {low:g} on" if expert == intervals.num_experts - 1 else f"from {low:g} to below {high:g}"


def _by_precedence() -> "Iterator[System]":
    """The systems in the order in which they are looked for: what is attached to a model before the model itself."""
    return reversed(SYSTEMS.values())


def _is_a(instance: object, class_name: str) -> bool:
    """Whether an object is of a class, given by its name so that it need not be imported."""
    return any(base.__name__ == class_name for base in type(instance).__mro__)


def _denoiser(pipeline: "DiffusionPipeline", class_name: str) -> Any:
    """The pipeline's denoiser if it is of that class."""
    denoiser = denoisers_of(pipeline)[0]
    return denoiser if _is_a(denoiser, class_name) else None


def _gated_prompts(pipeline: "DiffusionPipeline") -> Any:
    """The prompts of the pipeline's transformer if they depend on the timestep."""
    prompts = getattr(pipeline, "prompt_patch", None)
    return None if prompts is None or prompts.config.gate == "none" else prompts


def _owner(intervals: "NoiseIntervals", timestep: float) -> tuple[int, str]:
    """The expert that owns a timestep, and in words which timesteps it owns."""
    import torch

    owner = int(intervals.index(torch.tensor(timestep)))
    return owner, f"it owns the timesteps {intervals.edges[owner]:g} to {intervals.edges[owner + 1] - 1:g}"


def _dit_sentence(pipeline: Any, model: Any, timestep: int) -> str:
    return f"At timestep {timestep}, as at every other, the whole model denoises: none of its parts is specialised."


def _dtr_sentence(pipeline: Any, model: Any, timestep: int) -> str:
    channels = model.task_routing.masks()[timestep].nonzero().flatten()
    width = model.task_routing.dim
    return (
        f"At timestep {timestep} each block works on {len(channels)} of {width} channels, from {channels.min()} "
        f"to {channels.max()}."
    )


def _noise_experts(pipeline: Any) -> Any:
    """The pipeline's `DenoiserExperts`, or one made of the two transformers of Wan2.2."""
    experts = _denoiser(pipeline, "DenoiserExperts")
    if experts is not None or getattr(pipeline, "transformer_2", None) is None:
        return experts
    from .models.denoiser_experts import DenoiserExperts
    from .models.pipeline_experts import experts_in_pipeline

    return DenoiserExperts(*experts_in_pipeline(pipeline))


def _experts_sentence(pipeline: Any, model: Any, timestep: float) -> str:
    import torch

    owner = int(model.intervals.index(torch.tensor(timestep)))
    return (
        f"At timestep {timestep:g} expert {owner} of {model.intervals.num_experts} denoises, a "
        f"{type(model.experts[owner]).__name__}; it owns the timesteps {owned_timesteps(model.intervals, owner)}."
    )


def _lora_experts(pipeline: Any) -> Any:
    """The `LoraExperts` that are attached to a pipeline's denoisers, or None."""
    denoisers: list[Any] = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2", "unet")]
    adapted = [denoiser for denoiser in denoisers if getattr(denoiser, "peft_config", None)]
    if not adapted:
        return None
    from .plugins.lora_experts import LoraExperts

    return next((found for found in (LoraExperts.attached_to(each) for each in adapted) if found is not None), None)


def _lora_sentence(pipeline: Any, experts: Any, timestep: float) -> str:
    import torch

    owner = int(experts.intervals.index(torch.tensor(timestep)))
    adapters = " and ".join(
        name if weight == 1 else f"{weight:g} times {name}" for name, weight in experts.adapters[owner]
    )
    return f"At timestep {timestep:g} {f'the LoRA {adapters} acts' if adapters else 'no LoRA acts'}."


def _remix_sentence(pipeline: Any, model: Any, timestep: int) -> str:
    expert, owns = _owner(model.intervals, timestep)
    shares = model.mixing_coefficients[expert].tolist()  # (K,)
    mixture = ", ".join(f"{share:.0%} of basis {basis}" for basis, share in enumerate(shares))
    return f"At timestep {timestep} expert {expert} denoises, mixed of {mixture}; {owns}."


def _dmp_sentence(pipeline: Any, prompts: Any, timestep: int) -> str:
    import torch

    # some timesteps are enough for gates, which are smooth functions of the timestep
    others = torch.linspace(0, pipeline.scheduler.config.num_train_timesteps - 1, 11).long()
    gates = prompts.gate_weights(torch.cat([torch.tensor([timestep]), others]))  # (S, L, M)
    num_prompts = gates.shape[2]
    shares = gates * num_prompts  # of an equal one
    block, prompt = divmod(int(shares[0].argmax()), num_prompts)
    change = float((shares.amax(0) - shares.amin(0)).max())
    how = "the weights hardly change, by at most" if change < SMALL_CHANGE else "some weights change by up to"
    return (
        f"At timestep {timestep} prompt {prompt} of {num_prompts} has the largest weight, in block {block}: "
        f"{float(shares[0].max()):.2f} times an equal share. Over all timesteps {how} {change:.2f} of an equal share."
    )


def _snr_split_sentence(pipeline: Any, _: Any, timestep: int) -> str:
    from .diffusion.noise import signal_to_noise_ratio

    denoiser, owns = _owner(pipeline.intervals(), timestep)
    snr = float(signal_to_noise_ratio(pipeline.scheduler.alphas_cumprod[timestep]))
    return f"At timestep {timestep} the signal-to-noise ratio is {snr:.3g}, and denoiser {denoiser} denoises; {owns}."


def _ppap_sentence(pipeline: Any, experts: Any, timestep: int) -> str:
    own_timestep = _timestep_of_experts(pipeline, experts, timestep)
    expert, owns = _owner(experts.intervals, timestep if own_timestep is None else own_timestep)
    where = "" if own_timestep is None else " of the noise that it was trained on"
    return f"At timestep {timestep} expert {expert} of {experts.intervals.num_experts} guides; {owns}{where}."


def _timestep_of_experts(pipeline: Any, experts: Any, timestep: int) -> float | None:
    """The timestep with the same noise in the process that guidance experts were trained on; None if it is the pipeline's."""
    import torch

    from .diffusion.process import NoiseProcess

    if experts.process is None or experts.process.is_process_of(pipeline.scheduler):
        return None
    levels = NoiseProcess(pipeline.scheduler).levels_at(torch.tensor(timestep))
    return float(experts.process.timestep_at(*levels))


def _baked_experts(pipeline: Any, model: Any) -> "list[tuple[ModelMixin, str]]":
    from .diffusion.predictions import prediction_type_of

    prediction_type = prediction_type_of(model, pipeline.scheduler)
    return [(model.bake_expert(expert), prediction_type) for expert in range(model.intervals.num_experts)]


def _uniform_intervals(num_experts: int, num_train_timesteps: int, last_takes_rest: bool = False) -> "NoiseIntervals":
    from .intervals import NoiseIntervals

    return NoiseIntervals.uniform(num_experts, num_train_timesteps, last_takes_rest=last_takes_rest)


SYSTEMS: dict[str, System] = {
    system.key: system
    for system in (
        System(
            key="dit",
            title="DiT",
            paper="2212.09748",
            paper_title="Scalable Diffusion Models with Transformers",
            classes=("DiTModel",),
            training_script="train_dit",
            find=lambda pipeline: denoisers_of(pipeline)[0],
            sentence=_dit_sentence,
        ),
        System(
            key="dtr",
            title="DTR",
            paper="2310.07138",
            paper_title="Denoising Task Routing for Diffusion Models",
            classes=("DTRTransformer2DModel",),
            training_script="train_dtr",
            find=partial(_denoiser, class_name="DTRTransformer2DModel"),
            sentence=_dtr_sentence,
            figures="routing_figures",
            pictures=("routing",),
        ),
        System(
            key="remix",
            title="Remix-DiT",
            paper="2412.05628",
            paper_title="Remix-DiT: Mixing Diffusion Transformers for Multi-Expert Denoising",
            classes=("RemixDiTModel",),
            training_script="train_remix",
            find=partial(_denoiser, class_name="RemixDiTModel"),
            sentence=_remix_sentence,
            figures="mixing_figures",
            pictures=("mixing", "training_share"),
            intervals=lambda model: model.intervals,
            experts=_baked_experts,
            derived_intervals=partial(_uniform_intervals, last_takes_rest=True),
        ),
        System(
            key="experts",
            title="Noise experts",
            paper="2211.01324",
            paper_title="eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers",
            classes=("DenoiserExperts",),
            find=_noise_experts,
            sentence=_experts_sentence,
            figures="step_figures",
            pictures=("steps",),
            intervals=lambda model: model.intervals,
            experts=lambda pipeline, model: _with_prediction_types(pipeline, model.experts),
            pipeline_tag=None,
        ),
        System(
            key="lora_experts",
            title="LoRA experts",
            paper="2503.07416",
            paper_title=(
                "TimeStep Master: Asymmetrical Mixture of Timestep LoRA Experts for Versatile and Efficient Diffusion Models "
                "in Vision"
            ),
            classes=("LoraExperts",),
            find=_lora_experts,
            sentence=_lora_sentence,
            intervals=lambda experts: experts.intervals,
            tags=("lora",),
            pipeline_tag=None,
        ),
        System(
            key="patch_diffusion",
            title="Patch Diffusion",
            paper="2207.04316",
            paper_title="Improving Diffusion Model Efficiency Through Patching",
            classes=("SNRSplitPipeline", "PatchedUNet2DModel"),
            training_script="train_patch_diffusion",
            find=lambda pipeline: pipeline if _is_a(pipeline, "SNRSplitPipeline") else None,
            sentence=_snr_split_sentence,
            figures="snr_split_figures",
            pictures=("snr_split",),
            intervals=lambda pipeline: pipeline.intervals(),
            experts=lambda pipeline, _: list(zip(pipeline.denoisers, pipeline.config.prediction_types)),
            short_name="patch",
        ),
        System(
            key="dmp",
            title="DMP",
            paper="2405.17825",
            paper_title="Diffusion Model Patching via Mixture-of-Prompts",
            classes=("PromptPatch",),
            training_script="train_dmp",
            find=_gated_prompts,
            sentence=_dmp_sentence,
            figures="prompt_figures",
            pictures=("gates", "prompt_usage"),
        ),
        System(
            key="ppap",
            title="PPAP",
            paper="2212.05973",
            paper_title="Towards Practical Plug-and-Play Diffusion Models",
            classes=("GuidanceExperts",),
            training_script="train_ppap",
            find=lambda pipeline: getattr(getattr(pipeline, "scheduler", None), "experts", None),
            sentence=_ppap_sentence,
            figures="guidance_figures",
            pictures=("ddim25", "ddpm50"),
            intervals=lambda experts: experts.intervals,
            derived_intervals=_uniform_intervals,
            is_guidance=True,
            pipeline_tag=None,
        ),
    )
}
