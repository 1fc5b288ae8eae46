"""The options that some methods of text-to-image training have and others do not."""

from dataclasses import dataclass

from ..arguments import BOUNDARIES, BoundaryArguments, option

EXPERT_SHARES = ("balanced", "density")
EXPERT_BATCHES = ("mixed", "one")


@dataclass(kw_only=True)
class IntervalArguments(BoundaryArguments):
    """The noise intervals of the experts, and how often each of them is trained."""

    expert: str = option(
        "all",
        "The expert to train: all of them in one run; or one, 0 for the least noise, 1, …, such as on a machine of its own. What "
        "each of them saves belongs into one folder.",
    )
    expert_shares: str = option(
        "balanced",
        "How often each expert is trained: balanced, all equally often, at noise levels from its own interval; or density, as "
        "often as the noise levels of its interval come.",
    )
    expert_batches: str = option(
        "mixed",
        "The samples of a step: mixed, of all experts; or one, those of one random expert in each process, which is faster.",
    )

    def check_intervals(self) -> None:
        """
        Check everything about the experts that is known without the pipeline.

        Raises:
            ValueError: if the intervals are not given in exactly one way, or an argument is unknown.
        """
        given = [*self.given_boundaries, *["num_experts"] * (self.num_experts is not None)]
        if len(given) != 1:
            ways = ", ".join(f"`{name}`" for name in (*BOUNDARIES, "num_experts"))
            raise ValueError(f"Expected exactly one of {ways} to be set, but got {' and '.join(given) or 'none'}.")
        if self.num_experts is not None and self.num_experts < 1:
            raise ValueError(f"Expected `num_experts` to be at least 1, but got {self.num_experts}.")
        self.expert = str(self.expert)  # a preset may have a number
        experts = ["all", *map(str, range(self.count_experts()))]
        known = {"expert": experts, "expert_shares": EXPERT_SHARES, "expert_batches": EXPERT_BATCHES}
        for name, valid in known.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"Expected `{name}` to be one of {', '.join(valid)}, but got {getattr(self, name)!r}."
                )
        if self.expert_shares == "density" and self.expert_batches == "one":
            raise ValueError(
                "Expected `expert_batches` to be mixed for the `expert_shares` density, with which each sample's noise level "
                "chooses its expert, but got 'one'."
            )

    @property
    def single_expert(self) -> int | None:
        """The one expert to train; None for all of them."""
        return None if self.expert == "all" else int(self.expert)


@dataclass(kw_only=True)
class LoraArguments:
    """The size and the place of LoRA."""

    rank: int = option(16, "Rank of the LoRA, or of each.")
    ranks: list[int] = option(
        [],
        "A rank for each expert instead, that for the least noise first: the noisy ones need less, such as 64 16 "
        "(T-LoRA, https://arxiv.org/abs/2507.05964).",
    )
    lora_alpha: float | None = option(None, "α: a LoRA is scaled by α / rank; by default the rank, for a scale of 1.")
    lora_dropout: float = option(0.0, "Probability with which an input of a LoRA is dropped in training.")
    target_modules: list[str] = option(
        [],
        "Names, or ends of names, of the modules of the denoiser that get LoRA, such as to_q to_k ff.net.0.proj; by default the "
        "projections of its attention.",
    )

    def expert_ranks(self, num_experts: int) -> list[int]:
        """The rank of each expert, that for the least noise first."""
        return self.ranks or [self.rank] * num_experts

    def check_lora(self, num_experts: int) -> None:
        """
        Check the numbers.

        Raises:
            ValueError: if there are not as many `ranks` as experts, or a number is out of range.
        """
        if self.ranks and len(self.ranks) != num_experts:
            raise ValueError(
                f"Expected `ranks` to have one number for each of {num_experts} experts, that for the least noise first, but got "
                f"{len(self.ranks)}: {' '.join(map(str, self.ranks))}."
            )
        for rank in self.expert_ranks(num_experts):
            if rank < 1:
                raise ValueError(f"Expected `{'ranks' if self.ranks else 'rank'}` to be at least 1, but got {rank}.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"Expected `lora_alpha` to be above 0, but got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"Expected `lora_dropout` to be in [0, 1), but got {self.lora_dropout}.")


@dataclass(kw_only=True)
class StreamingArguments:
    """How data are read that are larger than a disk."""

    streaming: bool = option(
        False,
        "Read `dataset` as a stream, from parquet files or tars of WebDataset, in a folder or on the Hub. The order then depends on "
        "the number of processes, with which the run has to be resumed.",
    )
    shuffle_buffer_size: int = option(
        1_000, "For streaming: the number of images that a process reads and shuffles together."
    )

    def check_streaming(self, num_workers: int | None) -> None:
        """
        Check the numbers.

        Raises:
            ValueError: if one is out of range, or has no effect.
        """
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"Expected `shuffle_buffer_size` to be at least 1, but got {self.shuffle_buffer_size}.")
        if self.shuffle_buffer_size != 1_000 and not self.streaming:
            raise ValueError(
                f"Expected `streaming` to be true where `shuffle_buffer_size` is set, but got {self.shuffle_buffer_size}."
            )
        if self.streaming and num_workers:
            raise ValueError(
                f"Expected `dataloader_num_workers` to be 0 with `streaming`, which reads in a thread, but got {num_workers}."
            )
