"""Conversion of a plain DiT to a Remix-DiT, and of a Remix-DiT's experts to plain DiTs.
https://arxiv.org/abs/2412.05628

Legend: K bases, E experts.
"""

from typing import Any, Self

import torch
from diffusers import DiTTransformer2DModel

from ..saving.adapters import check_no_adapters
from .configuration import argument_names
from .dit.model import DiTModel
from .loading import check_weights, in_dtype
from .remix_layers import mix


class RemixConversionMixin(DiTModel):
    """Add the conversion from and to plain DiTs to [`RemixDiTModel`]."""

    @classmethod
    def from_dit(
        cls,
        model: "DiTModel | DiTTransformer2DModel",
        num_bases: int = 4,
        num_experts: int = 8,
        interval_edges: "list[float] | None" = None,
        **config: Any,
    ) -> Self:
        """
        Copy a pretrained DiT into every basis, so that every expert begins as this DiT.

        Args:
            model ([`DiTModel`] or Diffusers' [`DiTTransformer2DModel`]): For an original checkpoint, the result of
                [`convert_checkpoint`]. Diffusers' own DiT keeps its semantics (see [`DiTModel`]).
            num_bases (`int`): K.
            num_experts (`int`): E.
            interval_edges (`list[float]` of length E + 1, *optional*): See [`RemixDiTModel`].
            config: The sizes that the model is expected to have, or other arguments of [`DiTModel`].

        Returns:
            [`RemixDiTModel`]: In eval mode, with the dtype and device of `model`.

        Raises:
            ValueError: if `model` is no plain DiT, or a weight does not have the size that `config` says; the first such
                weight is named.
        """
        if isinstance(model, DiTTransformer2DModel):
            model = DiTModel.from_diffusers(model)
        if type(model) is not DiTModel:
            raise ValueError(f"Expected `model` to be a plain DiT, but got a {type(model).__name__}.")
        check_no_adapters(model, "make a Remix-DiT of it")
        config = _dit_config(model) | config
        weights = model.state_dict()
        with torch.device("meta"):
            check_weights(DiTModel(**config), weights, "model")
        remix: Any = cls(**config, num_bases=num_bases, num_experts=num_experts, interval_edges=interval_edges)
        for name in remix.basis_names():
            weights[name] = weights[name].expand(num_bases, *weights[name].shape)
        remix.load_state_dict(weights | {"mixing_logits": remix.mixing_logits})
        return in_dtype(remix, model.dtype).to(model.device).eval()

    @classmethod
    def from_diffusers(
        cls,
        stock_model_or_path: Any,
        num_bases: int = 4,
        num_experts: int = 8,
        interval_edges: "list[float] | None" = None,
        **kwargs: Any,
    ) -> Self:
        """Copy Diffusers' own DiT into every basis; see [`DiTModel.from_diffusers`] and [`~RemixDiTModel.from_dit`]."""
        return cls.from_dit(
            DiTModel.from_diffusers(stock_model_or_path, **kwargs), num_bases, num_experts, interval_edges
        )

    def to_diffusers(self, approximate: bool = False) -> DiTTransformer2DModel:
        """
        Refuse to export, as one stock model cannot mix; export the experts instead.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Expected a model that one stock model can express, but got a RemixDiTModel: export its experts with "
            "`bake_expert(i).to_diffusers()` or `to_diffusers_experts`."
        )

    def bake_expert(self: Any, expert: int) -> DiTModel:
        """
        Make a plain DiT with the weights of one expert.

        Args:
            expert (`int`): In [0, E).

        Returns:
            [`DiTModel`]: In eval mode, with this model's dtype and device.

        Raises:
            ValueError: if there is no such expert, or there are adapters (LoRA).
        """
        self._check_expert(expert)
        check_no_adapters(self, "bake an expert")
        coefficients = self.mixing_coefficients[expert : expert + 1].detach()
        weights = self.state_dict()
        del weights["mixing_logits"]
        for name in self.basis_names():
            weights[name] = mix(weights[name], coefficients).squeeze(0)
        model = DiTModel(**_dit_config(self))
        model.load_state_dict(weights)
        return in_dtype(model, self.dtype).to(self.device).eval()


def _dit_config(model: DiTModel) -> dict[str, Any]:
    """Read the arguments of [`DiTModel`] from the configuration of a model that may have more."""
    return {name: model.config[name] for name in argument_names(DiTModel)}
