"""DMP: prompts and a gate that improve a frozen, converged transformer.
https://arxiv.org/abs/2405.17825

Legend: B batch, N image tokens, M prompts, D width, C width of the conditioning, L blocks that get prompts, counted by l.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..saving.adapters import check_component
from ..saving.mixins import StandaloneModelMixin
from ..saving.naming import PACKAGE
from .attachment import Attachment, patch_of
from .blocks import blocks_of, layout_of
from .gating import PromptGates, noisy_top_k_gates, top_k_gates

MODES = ("add", "prepend")
GATES = ("linear", "none")
MIN_NOISE_STD = 0.01


class PromptPatch(StandaloneModelMixin, ModelMixin, ConfigMixin):
    r"""
    Diffusion Model Patching (https://arxiv.org/abs/2405.17825): L x M prompts of width D. Each of L blocks of a frozen
    transformer gets a mixture of its M prompts, which depends on timestep and label.

    ```py
    patch = PromptPatch.from_pretrained("user/patch").attach(pipe.transformer)
    …
    patch.detach()  # restores the transformer
    ```

    Attaching freezes the transformer: its parameters require no gradients until they are set to again. In the prompts' own
    training mode, which `transformer.train()` does not change, the gates are noisy, and the transformer's output also
    holds `importance_loss` and, for `topk` below 1, `load_loss`, for the trainer to add (published weights: 1 each).

    A copy of the transformer has a copy of the prompts attached; a copy of the prompts alone is attached to nothing. The
    prompts move to the device on which their transformer computes. A transformer with prompts serves one call at a time.

    A transformer can be compiled before or after attaching. Attaching and detaching compile it again where necessary, and
    no other model. While sampling, gates are cached by timestep and label if the timesteps lie on the CPU (and the labels
    do, or are the same tensor), unless there are adapters (LoRA) in the timestep's embedder. Call `eval()` after changes of
    weights that PyTorch does not count: through `parameter.data`.

    Args:
        hidden_size (`int`): D, the width of the blocks.
        num_prompts (`int`): M. For `mode="add"` the number of image tokens, as each token gets its own prompt.
        depth (`int`): L. The first L blocks get prompts.
        mode (`str`): 'add' adds the prompts to the image tokens. 'prepend' puts them in front of the image tokens as M more
            tokens, and replaces them before each of the blocks. Prompts start at zero: added ones leave the output
            unchanged up to rounding. Prepended ones do change it a little, as the image tokens attend to them.
        gate (`str`): 'linear', or 'none' for the paper's baseline, plain prompt tuning.
        topk (`float`): The share of the prompts that a gate selects, in (0, 1].
        base_model_name_or_path (`str`, *optional*): The model that the prompts were trained on, for information.
        conditioning_size (`int`, *optional*): C, the width of the embedding that the gates depend on. By default D.

    Raises:
        ValueError: if a number is not positive, `mode` or `gate` is unknown, or `topk` is outside (0, 1] or so small that
            no prompt is selected.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        num_prompts: int,
        depth: int,
        mode: str = "add",
        gate: str = "linear",
        topk: float = 1.0,
        base_model_name_or_path: str | None = None,
        conditioning_size: int | None = None,
    ):
        super().__init__()
        _check_config(self.config)
        self.prompts = nn.Parameter(torch.zeros(depth, num_prompts, hidden_size))  # P
        if gate == "linear":
            width = hidden_size if conditioning_size is None else conditioning_size
            self.gate_proj = nn.Linear(width + 1, num_prompts)
            nn.init.zeros_(self.gate_proj.weight)
            nn.init.zeros_(self.gate_proj.bias)
            self.noise_weight = nn.Parameter(torch.zeros(width, num_prompts))
        self._attachment: Attachment | None = None

    @classmethod
    def for_transformer(
        cls,
        transformer: nn.Module,
        num_prompts: int | None = None,
        depth: int | None = None,
        mode: str = "add",
        **config,
    ) -> "PromptPatch":
        """
        Create new prompts that fit a transformer, and do not attach them yet.

        Args:
            transformer (`nn.Module`): A transformer of a registered class; see [`register_layout`].
            num_prompts (`int`, *optional*): M. By default the number of image tokens, if the transformer's configuration
                says it.
            depth (`int`, *optional*): L. By default the number of blocks.
            mode (`str`): 'add' or 'prepend'.
            config: Other arguments of the constructor.

        Returns:
            [`PromptPatch`]

        Raises:
            ValueError: if the class of the transformer is not registered, `num_prompts` is needed, or prompts are to be
                prepended to a transformer that cannot take extra tokens.
        """
        transformer = unwrap_module(transformer)
        layout = layout_of(transformer)
        num_prompts = layout.num_tokens(transformer) if num_prompts is None else num_prompts
        if num_prompts is None:
            raise ValueError(
                f"Expected `num_prompts` to be given for a {type(transformer).__name__}, as its configuration does not say how "
                'many tokens an image has, but got None. For mode="add" it is the number of tokens of an image or video of '
                "the size that the prompts are trained for; see docs/prompts.md."
            )
        width, conditioning_size = layout.width(transformer), layout.conditioning_width(transformer, mode)
        return cls(
            hidden_size=width,
            num_prompts=num_prompts,
            depth=len(blocks_of(transformer)) if depth is None else depth,
            mode=mode,
            conditioning_size=None if conditioning_size == width else conditioning_size,
            **config,
        )

    @staticmethod
    def attached_to(transformer: nn.Module) -> "PromptPatch | None":
        """Return the prompts that are attached to a transformer, or None."""
        return patch_of(transformer)

    @property
    def transformer(self) -> nn.Module | None:
        """The transformer that the prompts are attached to, or None."""
        return None if self._attachment is None else self._attachment.transformer

    def attach(self, transformer: nn.Module) -> "PromptPatch":
        """
        Attach the prompts to a transformer and freeze it.

        Args:
            transformer (`nn.Module`): The transformer, compiled or not.

        Returns:
            [`PromptPatch`]: the same object.

        Raises:
            ValueError: if the transformer's class is not registered, its width, embedding, blocks or tokens do not fit the prompts,
                the prompts are to be prepended and it cannot take extra tokens, it already has prompts or is wrapped by PEFT, or
                these are already attached.
        """
        if self._attachment is not None:
            raise ValueError(
                f"Expected the prompts to be attached to nothing, but got some on a {type(self.transformer).__name__}; "
                "`detach()` them first."
            )
        check_component("transformer", transformer)
        self._attachment = Attachment(self, unwrap_module(transformer))
        return self

    def detach(self) -> "PromptPatch":
        """
        Detach the prompts and restore the transformer, including which of its parameters require gradients.

        Returns:
            [`PromptPatch`]: the same object.

        Raises:
            ValueError: if the prompts are attached to nothing.
        """
        if self._attachment is None:
            raise ValueError("Expected the prompts to be attached to a transformer, but got some that are not.")
        attachment, self._attachment = self._attachment, None
        attachment.remove()
        return self

    def forward(self, conditioning: torch.Tensor) -> PromptGates:
        """
        Compute the gates of all blocks. In training mode they are noisy, and come with the losses that balance the prompts.

        Args:
            conditioning (`torch.Tensor` of shape (B, C)): The embedding of timestep and label; for prepended prompts, of
                the timestep alone.

        Returns:
            [`PromptGates`]

        Raises:
            ValueError: if the prompts have no gate.
        """
        if self.config.gate == "none":
            raise ValueError("Expected prompts with a `gate`, but got 'none'.")
        weight = self.gate_proj.weight  # (M, C + 1)
        conditioning = conditioning.to(weight.dtype)
        # logits_l = W·[c; l] + b = W_c·c + b + l·w
        logits = F.linear(conditioning, weight[:, :-1], self.gate_proj.bias).float()  # (B, M)
        block = torch.arange(self.config.depth, device=logits.device)[:, None, None]
        logits = logits + block * weight[:, -1].float()  # (L, B, M)
        if not self.training:
            return top_k_gates(logits, _num_selected(self.config))
        # std = softplus(c·W_noise) + 0.01
        noise_std = F.softplus((conditioning @ self.noise_weight).float()) + MIN_NOISE_STD  # (B, M)
        return noisy_top_k_gates(logits, noise_std, _num_selected(self.config))

    def insert(self, hidden_states: torch.Tensor, block: int, gates: torch.Tensor | None) -> torch.Tensor:
        """
        Insert the prompts of a block into its input.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)): The image tokens that the block gets. Where prompts are
                prepended, the prompts of the previous block stand in front of them: (B, M + N, D) for l > 0. Where they are
                added, others may follow: those of the text.
            block (`int`): l, in [0, L).
            gates (`torch.Tensor` of shape (L, B, M) or (L, 1, M), *optional*): None for prompts without a gate.

        Returns:
            `torch.Tensor` of shape (B, N, D), or (B, M + N, D) where prompts are prepended.
        """
        prompts = self.prompts[block].to(hidden_states)[None]  # (1, M, D)
        weights = None if gates is None else gates[block].to(hidden_states)[..., None]  # (B, M, 1)
        if self.config.mode == "add":
            # x ← x + g_l ⊙ P_l
            image_tokens = hidden_states[:, : self.config.num_prompts]
            added = image_tokens + prompts if weights is None else torch.addcmul(image_tokens, weights, prompts)
            others = hidden_states[:, self.config.num_prompts :]
            return torch.cat([added, others], dim=1) if others.shape[1] else added
        # x ← [g_l ⊙ P_l; x]
        prompts = prompts if weights is None else weights * prompts
        image_tokens = hidden_states if block == 0 else hidden_states[:, self.config.num_prompts :]
        return torch.cat([prompts.expand(len(hidden_states), -1, -1), image_tokens], dim=1)

    @torch.no_grad()
    def gate_weights(self, timesteps: torch.Tensor, **inputs) -> torch.Tensor:
        """
        Return the gates at some timesteps, found by running the transformer.

        Args:
            timesteps (`torch.Tensor` of shape (S,)): Training timesteps, whatever the transformer is told; of 1,000, where
                it is told a fraction of them.
            inputs: The other arguments of the transformer's `forward`, for one sample; for example `class_labels`. The image
                is blank, if it is left out and the transformer's configuration says its size.

        Returns:
            `torch.Tensor` of shape (S, L, M).

        Raises:
            ValueError: if the prompts are attached to nothing or have no gate, or the image is needed.
        """
        if self._attachment is None or self.config.gate == "none":
            raise ValueError("Expected prompts with a gate that are attached to a transformer, but got others.")
        return self._attachment.gates_at(timesteps, inputs)

    def train(self, mode: bool = True) -> "PromptPatch":
        # trainers swap averaged weights in and out through `.data`, which PyTorch does not count, and change the mode
        if self._attachment is not None:
            self._attachment.gate_cache.clear()
        return super().train(mode)

    def __getstate__(self) -> dict:
        # a copy of the prompts alone is attached to nothing; where the transformer is copied, `Attachment` attaches the copy
        return self.__dict__ | {"_attachment": None}


def _num_selected(config) -> int:
    # k = ⌊topk·M⌋
    return int(config.topk * config.num_prompts)


def _check_config(config) -> None:
    for name in ("hidden_size", "num_prompts", "depth"):
        if config[name] < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {config[name]}.")
    for name, valid in (("mode", MODES), ("gate", GATES)):
        if config[name] not in valid:
            raise ValueError(f"Expected `{name}` to be one of {', '.join(valid)}, but got {config[name]!r}.")
    if not 0 < config.topk <= 1 or _num_selected(config) == 0:
        raise ValueError(
            f"Expected `topk` to be in (0, 1] and to select one of {config.num_prompts} prompts, but got {config.topk}."
        )
    if config.gate == "linear" and config.num_prompts == 1:
        raise ValueError("Expected `num_prompts` to be at least 2 for a gate to choose from, but got 1.")
