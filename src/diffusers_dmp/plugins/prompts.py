"""DMP: a few prompts and a gate that patch a frozen, converged transformer.
https://arxiv.org/abs/2405.17825

Legend: B batch, N image tokens, M prompts, D width, L the blocks that get prompts, counted by l.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..saving.mixins import StandaloneModelMixin
from ..saving.naming import PACKAGE
from .attachment import Attachment, patch_of, unwrapped
from .blocks import layout_of

MODES = ("add", "prepend")
GATES = ("linear", "none")
MIN_NOISE_STD = 0.01
CV_EPS = 1e-10


@dataclass
class PromptGates(BaseOutput):
    """
    Args:
        gates (`torch.Tensor` of shape (L, B, M)): How much of each prompt each block gets, for each sample; they sum to 1.
        importance_loss (`torch.Tensor` of shape (), *optional*): In training mode: how unevenly prompts are weighted.
        load_loss (`torch.Tensor` of shape (), *optional*): In training mode, if some prompts are left out: how unevenly
            they are chosen.
    """

    gates: torch.Tensor
    importance_loss: torch.Tensor | None = None
    load_loss: torch.Tensor | None = None


class PromptPatch(StandaloneModelMixin, ModelMixin, ConfigMixin):
    r"""
    Diffusion Model Patching (https://arxiv.org/abs/2405.17825): L x M prompts of width D, of which each block of a frozen
    transformer gets a mixture that depends on timestep and label.

    ```py
    patch = PromptPatch.from_pretrained("user/patch").attach(pipe.transformer)
    …
    patch.detach()  # leaves no trace
    ```

    Attaching freezes the transformer: its parameters want no gradients, unless they are told to again. While the patch
    itself is in training mode, which `transformer.train()` does not set, its gates are noisy and the transformer's output
    holds `importance_loss` and, for `topk` below 1, `load_loss` as well, for the trainer to weigh (published: 1 each). A
    copy of the transformer has a copy of the patch attached; a copy of the patch alone is attached to nothing. The patch
    need not be moved by hand: it goes where its transformer computes. A patched transformer serves one call at a time.

    Compiled transformers can be patched, too; attaching and detaching clear PyTorch's compilation caches, which would not
    notice. While sampling, gates are kept by timestep and label as long as the timesteps lie on the CPU (and labels do, or
    are the same tensor). Call `eval()` after changes that PyTorch does not count: of weights through `parameter.data`, or of
    adapters of the timestep's embedder.

    Args:
        hidden_size (`int`): D.
        num_prompts (`int`): M: for `mode="add"` the number of image tokens, each of which gets its own prompt.
        depth (`int`): L: the first L blocks get prompts.
        mode (`str`): 'add' to the image tokens, or 'prepend' to them as M more tokens, anew before each of the blocks.
            Prompts start at zero: added ones leave the output what it was, bit for bit; to prepended ones the image
            tokens attend from the start, so that the output is near the transformer's own at best.
        gate (`str`): 'linear', or 'none' for the paper's baseline, plain prompt tuning.
        topk (`float`): In (0, 1], the share of prompts that a gate keeps.
        base_model_name_or_path (`str`, *optional*): What the patch was trained on, for its readers.

    Raises:
        ValueError: if a number is not positive, `mode` or `gate` is unknown, `topk` outside (0, 1] or so small that it
            keeps no prompt.
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
    ):
        super().__init__()
        _check_config(self.config)
        self.prompts = nn.Parameter(torch.zeros(depth, num_prompts, hidden_size))  # P
        if gate == "linear":
            self.gate_proj = nn.Linear(hidden_size + 1, num_prompts)
            nn.init.zeros_(self.gate_proj.weight)
            nn.init.zeros_(self.gate_proj.bias)
            self.noise_weight = nn.Parameter(torch.zeros(hidden_size, num_prompts))
        self._attachment = None

    @classmethod
    def for_transformer(
        cls, transformer: nn.Module, num_prompts: int | None = None, depth: int | None = None, **config
    ) -> "PromptPatch":
        """
        A new patch that fits a transformer; [`~PromptPatch.attach`] it next.

        Args:
            transformer: Of a class that patches know; see [`register_layout`].
            num_prompts (`int`, *optional*): As many as image tokens by default.
            depth (`int`, *optional*): All blocks by default.
            config: Other arguments of the constructor.
        """
        transformer = unwrapped(transformer)
        layout = layout_of(transformer)
        return cls(
            hidden_size=layout.width(transformer),
            num_prompts=layout.num_tokens(transformer) if num_prompts is None else num_prompts,
            depth=len(transformer.get_submodule(layout.blocks)) if depth is None else depth,
            **config,
        )

    @staticmethod
    def attached_to(transformer: nn.Module) -> "PromptPatch | None":
        """The patch that a transformer has, if it has one."""
        return patch_of(transformer)

    @property
    def transformer(self) -> nn.Module | None:
        """What the patch is attached to."""
        return None if self._attachment is None else self._attachment.transformer

    def attach(self, transformer: nn.Module) -> "PromptPatch":
        """
        Patch a transformer, and freeze it.

        Returns:
            The patch itself.

        Raises:
            ValueError: if the transformer is of an unknown class, its width, blocks or tokens do not fit the patch, it
                cannot take extra tokens and the patch prepends some, or either is attached already.
        """
        if self._attachment is not None:
            raise ValueError(
                f"Expected the patch to be attached to nothing, but got one on a {type(self.transformer).__name__}; "
                "`detach()` it first."
            )
        self._attachment = Attachment(self, unwrapped(transformer))
        return self

    def detach(self) -> "PromptPatch":
        """
        Leave the transformer as it was, down to which of its parameters wanted gradients.

        Raises:
            ValueError: if the patch is attached to nothing.
        """
        if self._attachment is None:
            raise ValueError("Expected the patch to be attached to a transformer, but got one that is not.")
        attachment, self._attachment = self._attachment, None
        attachment.remove()
        return self

    def forward(self, conditioning: torch.Tensor) -> PromptGates:
        """
        The gates of all blocks. In training mode they are noisy, and come with the losses that balance them.

        Args:
            conditioning (`torch.Tensor` of shape (B, D)): Embedding of timestep and label; of prepended prompts, of the
                timestep alone.

        Raises:
            ValueError: if the patch has no gate.
        """
        if self.config.gate == "none":
            raise ValueError("Expected a patch with a `gate`, but got 'none'.")
        weight = self.gate_proj.weight  # (M, D + 1)
        conditioning = conditioning.to(weight.dtype)
        # logits_l = W·[c; l] + b = W_c·c + b + l·w
        logits = F.linear(conditioning, weight[:, :-1], self.gate_proj.bias).float()  # (B, M)
        block = torch.arange(self.config.depth, device=logits.device)[:, None, None]
        logits = logits + block * weight[:, -1].float()  # (L, B, M)
        if not self.training:
            return PromptGates(gates=self._softmax_of_top_k(logits)[0])

        # H = logits + ε·(softplus(c·W_noise) + 0.01)  (noisy top-k gating, https://arxiv.org/abs/1701.06538, equation 4)
        noise_std = F.softplus((conditioning @ self.noise_weight).float()) + MIN_NOISE_STD  # (B, M)
        noisy_logits = logits + torch.randn_like(logits) * noise_std
        gates, thresholds = self._softmax_of_top_k(noisy_logits)

        # importance = CV²(Σ_l g_l)
        importance_loss = _squared_coefficient_of_variation(gates.sum(0))
        load_loss = None
        if thresholds is not None:
            # P(m in top k) = Φ((logits - the k-th largest of the others' noisy logits) / std)  (equation 9)
            in_top_k = noisy_logits > thresholds[1]
            threshold = torch.where(in_top_k, thresholds[1], thresholds[0])
            load = torch.special.ndtr((logits - threshold) / noise_std).sum((0, 1))  # (M,)
            # Deviation from reference: CV², as the term is defined (equation 11), where the published code adds the sum
            load_loss = _squared_coefficient_of_variation(load)
        return PromptGates(gates=gates, importance_loss=importance_loss, load_loss=load_loss)

    def _softmax_of_top_k(self, logits: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Gates (L, B, M), zero but for the k largest; the k-th and the next largest logits (L, B, 1) if k < M."""
        k = _num_kept(self.config)
        if k == self.config.num_prompts:
            return logits.softmax(-1), None
        largest, prompts = logits.topk(k + 1)
        gates = torch.zeros_like(logits).scatter(-1, prompts[..., :k], largest[..., :k].softmax(-1))
        return gates, (largest[..., k - 1 : k], largest[..., k:])

    def insert(self, hidden_states: torch.Tensor, block: int, gates: torch.Tensor | None) -> torch.Tensor:
        """
        Give a block its prompts.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)): What the block would have got; with prompts of the block
                before it in front (B, M + N, D) if these are prepended.
            block (`int`): l, in [0, depth).
            gates (`torch.Tensor` of shape (L, B, M) or (L, 1, M), *optional*): None for a patch without a gate.

        Returns:
            `torch.Tensor` of shape (B, N, D), or (B, M + N, D).
        """
        prompts = self.prompts[block].to(hidden_states)[None]  # (1, M, D)
        weights = None if gates is None else gates[block].to(hidden_states)[..., None]  # (B, M, 1)
        if self.config.mode == "add":
            # x ← x + g_l ⊙ P_l
            return hidden_states + prompts if weights is None else torch.addcmul(hidden_states, weights, prompts)
        # x ← [g_l ⊙ P_l; x]
        prompts = prompts if weights is None else weights * prompts
        image_tokens = hidden_states if block == 0 else hidden_states[:, self.config.num_prompts :]
        return torch.cat([prompts.expand(len(hidden_states), -1, -1), image_tokens], dim=1)

    @torch.no_grad()
    def gate_weights(self, timesteps: torch.Tensor, **inputs) -> torch.Tensor:
        """
        The gates at some timesteps in the transformer that the patch is attached to, found by running it on blank images.

        Args:
            timesteps (`torch.Tensor` of shape (S,)): In steps.
            inputs: The other arguments of the transformer's `forward`, for one sample: `class_labels`, say.

        Returns:
            `torch.Tensor` of shape (S, L, M).

        Raises:
            ValueError: if the patch is attached to nothing, or has no gate.
        """
        if self._attachment is None or self.config.gate == "none":
            raise ValueError("Expected a patch with a gate that is attached to a transformer, but got another.")
        transformer, found = self.transformer, []
        config, device = transformer.config, transformer.device
        if device.type == "meta":  # the weights are offloaded, and come when they are called
            device = timesteps.device
        blank = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size).to(
            device, transformer.dtype
        )
        modes = {module: module.training for module in (*transformer.modules(), self)}
        handle = self.register_forward_hook(lambda patch, conditioning, output: found.append(output.gates[:, 0]))
        try:
            transformer.eval(), self.eval()
            with torch.compiler.set_stance("force_eager"):  # compiled code does not look at new hooks
                for timestep in timesteps.to(device):
                    self._attachment.kept.forget()  # or the patch would not be called
                    transformer(blank, timestep=timestep[None], **inputs)
        finally:
            handle.remove()
            for module, training in modes.items():
                module.training = training
        return torch.stack(found)

    def train(self, mode: bool = True) -> "PromptPatch":
        # between the modes, averaged weights come and go through `.data`, where PyTorch does not count
        if self._attachment is not None:
            self._attachment.kept.forget()
        return super().train(mode)

    def __getstate__(self) -> dict:
        # copied or pickled alone, a patch is attached to nothing; with its transformer, [`Attachment`] sees to it
        return self.__dict__ | {"_attachment": None}


def _num_kept(config) -> int:
    """k = ⌊topk·M⌋."""
    return int(config.topk * config.num_prompts)


def _squared_coefficient_of_variation(values: torch.Tensor) -> torch.Tensor:
    # CV² = Var / mean²
    return values.var() / (values.mean().square() + CV_EPS)


def _check_config(config) -> None:
    for name in ("hidden_size", "num_prompts", "depth"):
        if config[name] < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {config[name]}.")
    for name, valid in (("mode", MODES), ("gate", GATES)):
        if config[name] not in valid:
            raise ValueError(f"Expected `{name}` to be one of {', '.join(valid)}, but got {config[name]!r}.")
    if not 0 < config.topk <= 1 or _num_kept(config) == 0:
        raise ValueError(
            f"Expected `topk` to be in (0, 1] and to keep one of {config.num_prompts} prompts, but got {config.topk}."
        )
    if config.gate == "linear" and config.num_prompts == 1:
        raise ValueError("Expected `num_prompts` to be at least 2 for a gate to choose from, but got 1.")
