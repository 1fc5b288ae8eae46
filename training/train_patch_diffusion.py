"""Train patchified UNets, one for each interval of signal-to-noise ratios (Patch Diffusion, https://arxiv.org/abs/2207.04316).

accelerate launch training/train_patch_diffusion.py --config training/presets/patch_digits.yaml [--any_field value]
"""

from dataclasses import dataclass

from diffusers_dmp import NoiseIntervals, PatchedUNet2DModel
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training.arguments import ExpertArguments, TrainingArguments, model_arguments, option
from diffusers_dmp.training.data.training_data import TrainingData, load_training_data
from diffusers_dmp.training.experts import ExpertTraining
from diffusers_dmp.training.objectives.from_arguments import make_objective, make_scheduler
from diffusers_dmp.training.parsing import run_entry_point
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.split import train_split
from diffusers_dmp.training.trainer import make_accelerator


@dataclass(kw_only=True)
class PatchDiffusionTrainingArguments(ExpertArguments, TrainingArguments):
    """One patchified UNet, or several that share the noise levels among them."""

    prediction_type: str = option("sample", "What the models predict: sample (x0), epsilon or v_prediction.")
    weighting: str = option("sqrt_snr", "Loss weighting: sqrt_snr, snr, snr+1, truncated_snr, p2, …")

    snr_boundaries: list[float] = option(
        [], "Descending signal-to-noise ratios between the experts; none for one model."
    )
    patch_size: int = option(4, "Side of the squares of pixels that become channels.")
    model_channels: int = option(128, "The width that is multiplied.")
    channel_multipliers: list[float] = option(
        [1, 1, 2, 2], "Multiplier of each level's width, the finest level first."
    )
    layers_per_block: int = option(2, "Residual blocks of each level.")
    attention_levels: list[int] = option([2, 3], "The levels that have attention, 0 being the finest.")
    attention_head_dim: int = option(64, "Channels per head.")
    dropout: float = option(0.0, "Dropout of the residual blocks.")
    class_dropout_prob: float = option(0.1, "How often a label is dropped, for classifier-free guidance.")

    def __post_init__(self):
        if self.objective != "ddpm":
            raise ValueError(
                "Expected `objective` to be ddpm for patch diffusion, whose models predict x0 or noise of a DDPM schedule, but "
                f"got {self.objective!r}."
            )
        super().__post_init__()
        self.check_expert(len(self.snr_boundaries) + 1)


def train_patch_diffusion(args: PatchDiffusionTrainingArguments) -> None:
    """Train one expert, or all of them in turn and put them together in one pipeline."""
    data = load_training_data(make_accelerator(args), args)
    in_latents = data.vae is not None
    intervals = NoiseIntervals.from_snr(args.snr_boundaries, make_scheduler(args, in_latents))

    def prepare(expert: int) -> ExpertTraining:
        model = new_unet(args, data, expert)
        recipe = TrainingRecipe(expert_intervals=intervals, expert=expert)
        return ExpertTraining(model=model, objective=make_objective(args, model, in_latents), recipe=recipe)

    train_split(args, data, intervals, args.snr_boundaries, prepare)


def new_unet(args: PatchDiffusionTrainingArguments, data: TrainingData, expert: int) -> PatchedUNet2DModel:
    """A new model, whose configuration says which interval of signal-to-noise ratios it is trained on."""
    config = model_arguments(PatchedUNet2DModel, args) | data.model_config(args)
    if data.label_names is None:
        config |= {"num_classes": None, "class_dropout_prob": 0.0}
    return PatchedUNet2DModel(**config, snr_interval=[None, *args.snr_boundaries, None][expert : expert + 2])


if __name__ == "__main__":
    run_entry_point(PatchDiffusionTrainingArguments, with_hub(train_patch_diffusion, along_the_way=False))
