"""Where the transformers of each class have what prompts need: their conditioning and their image tokens.

Legend: B batch, N image tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..saving.naming import PACKAGE

# The functions below are no lambdas because transformers with prompts must be picklable.


def _output(embedder: nn.Module, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return output


def _second_output(embedder: nn.Module, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return output[1]


def _width(model: ModelMixin) -> int:
    return model.config.num_attention_heads * model.config.attention_head_dim


def _num_tokens(model: ModelMixin) -> int | None:
    if "sample_size" not in model.config:  # as in models of many sizes
        return None
    return (model.config.sample_size // model.config.patch_size) ** 2


def _stock_embedding(embedder: nn.Module, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    return embedder(inputs["timestep"], inputs["class_labels"], hidden_dtype=hidden_states.dtype)


def _stock_time_embedding(embedder: Any, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    return embedder.timestep_embedder(embedder.time_proj(inputs["timestep"]).to(hidden_states.dtype))


def _of_noisy_image(embedder: nn.Module, output: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    # where `zero_cond_t` is set, the embeddings of t = 0 follow, for the tokens of images that are given
    return output[: len(inputs["timestep"])]


def _of_noisiest_token(embedder: nn.Module, output: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    # Wan2.2 5B has an embedding for each token, (B, N, D); tokens of an image that is given have t = 0
    if output.ndim == 2:
        return output
    noisiest = inputs["timestep"].argmax(1)
    return output[torch.arange(len(output), device=output.device), noisiest.to(output.device)]


def _zimage_width(model: ModelMixin) -> int:
    return model.config.dim


def _zimage_embedding_width(model: Any) -> int:
    return model.t_embedder.mlp[-1].out_features


def _zimage_num_image_tokens(inputs: dict[str, Any]) -> int:
    images = inputs["x"]
    if isinstance(images[0], list):
        raise ValueError("Expected one image for each sample, but got lists of images, which prompts do not support.")
    patch, frames_of_patch = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
    found = set()
    for image in images:
        _, frames, height, width = image.shape
        found.add(frames // frames_of_patch * (height // patch) * (width // patch))
    if len(found) > 1:
        numbers = ", ".join(map(str, sorted(found)))
        raise ValueError(f"Expected images of the same number of tokens, but got {numbers}.")
    return found.pop()


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """
    Where to find the embedding that conditions the blocks: (B, D), or (1, D) where the whole batch shares it.

    Args:
        embedder (`str`): Dotted name of the module that computes the embedding.
        read (`Callable[[nn.Module, Any, dict], torch.Tensor]`): Returns the embedding, given the embedder, its output, and
            the arguments of the transformer's `forward` by name. By default, the embedding is the embedder's output.
        after (`str`, *optional*): For transformers whose blocks call the embedder themselves, which is too late: dotted
            name of a module that runs before the first block. `read` gets the output of that module instead.
        width (`Callable[[nn.Module], int]`, *optional*): Returns D of the embedding, where it differs from the blocks' width.
    """

    embedder: str
    read: Callable[[nn.Module, Any, dict[str, Any]], torch.Tensor] = _output
    after: str | None = None
    width: Callable[[Any], int] | None = None

    @property
    def observed(self) -> str:
        """The dotted name of the module whose output `read` gets."""
        return self.after or self.embedder


@dataclass(frozen=True, kw_only=True)
class TransformerLayout:
    """
    Where one class of transformers, and its subclasses, have what plugins need; see [`register_layout`].

    Args:
        blocks (`str`, *optional*): Dotted name of the `nn.ModuleList` of blocks, which a forward pass calls once each, in
            order. By default they are found, as for [`blocks_with_streams`].
        image_tokens (`str`, *optional*): The argument of a block's `forward` that takes the image tokens (B, N, D). By
            default it is found, too.
        conditioning ([`Conditioning`]): For the gates of added prompts, the embedding of timestep and label.
        time_conditioning ([`Conditioning`], *optional*): For the gates of prepended prompts, the embedding of the timestep
            alone. Leave it out if the blocks cannot take extra tokens (because of rotary embeddings, for example).
        depends_on (`tuple[str, ...]`): All arguments of the transformer's `forward` that decide the conditioning, the
            timestep first. Gates are cached by them while sampling.
        width (`Callable[[nn.Module], int]`): Returns the transformer's D.
        num_tokens (`Callable[[nn.Module], int | None]`): Returns the transformer's N at the image size that it was trained
            on, or None if its configuration does not say, so that prompts are made for any number.
        any_size (`bool`): Whether prompts may also be made for another number than `num_tokens`.
        num_image_tokens (`Callable[[dict], int]`, *optional*): For blocks that take the tokens of image and text in one
            sequence, the image first: returns N, given the arguments of the transformer's `forward` by name. By default,
            all tokens are the image's.
    """

    blocks: str | None = None
    image_tokens: str | None = None
    conditioning: Conditioning
    time_conditioning: Conditioning | None = None
    depends_on: tuple[str, ...]
    width: Callable[[Any], int] = _width
    num_tokens: Callable[[Any], int | None] = _num_tokens
    any_size: bool = False
    num_image_tokens: Callable[[dict[str, Any]], int] | None = None

    def conditioning_for(self, transformer: nn.Module, mode: str) -> Conditioning:
        """
        Return what the gates of prompts depend on.

        Args:
            transformer (`nn.Module`): The transformer.
            mode (`str`): 'add' or 'prepend'.

        Raises:
            ValueError: if prompts cannot be prepended.
        """
        conditioning = self.conditioning if mode == "add" else self.time_conditioning
        if conditioning is None:
            name = type(transformer).__name__
            raise ValueError(f"Expected a transformer that can take extra tokens to prepend to, but got a {name}.")
        return conditioning

    def conditioning_width(self, transformer: nn.Module, mode: str) -> int:
        """As [`~TransformerLayout.conditioning_for`], but the width of the embedding."""
        return (self.conditioning_for(transformer, mode).width or self.width)(transformer)


_PIXART_TIME = Conditioning(embedder="adaln_single", read=_second_output)
_STOCK_EMBEDDER: dict[str, Any] = {
    "embedder": "transformer_blocks.0.norm1.emb",
    "after": "pos_embed",
}  # each block has a copy of it

# By the names of classes; those of Diffusers are not imported, which takes seconds.
LAYOUTS: dict[str, TransformerLayout] = {
    f"{PACKAGE}.DiTModel": TransformerLayout(  # DTR and Remix-DiT as well
        conditioning=Conditioning(embedder="time_label_embed"),
        time_conditioning=Conditioning(embedder="time_label_embed.timestep_embedder"),
        depends_on=("timestep", "class_labels", "force_drop_ids"),
    ),
    "diffusers.DiTTransformer2DModel": TransformerLayout(
        conditioning=Conditioning(**_STOCK_EMBEDDER, read=_stock_embedding),
        time_conditioning=Conditioning(**_STOCK_EMBEDDER, read=_stock_time_embedding),
        depends_on=("timestep", "class_labels"),
    ),
    "diffusers.PixArtTransformer2DModel": TransformerLayout(  # it has a caption instead of a label, and attends to it
        conditioning=_PIXART_TIME,
        time_conditioning=_PIXART_TIME,
        depends_on=("timestep", "added_cond_kwargs"),
    ),
    "diffusers.SD3Transformer2DModel": TransformerLayout(
        conditioning=Conditioning(embedder="time_text_embed"),
        time_conditioning=Conditioning(embedder="time_text_embed.timestep_embedder"),
        depends_on=("timestep", "pooled_projections"),
        any_size=True,
    ),
    "diffusers.FluxTransformer2DModel": TransformerLayout(
        conditioning=Conditioning(embedder="time_text_embed"),
        depends_on=("timestep", "guidance", "pooled_projections"),
    ),
    "diffusers.QwenImageTransformer2DModel": TransformerLayout(
        conditioning=Conditioning(embedder="time_text_embed", read=_of_noisy_image),
        depends_on=("timestep", "additional_t_cond"),
    ),
    "diffusers.WanTransformer3DModel": TransformerLayout(
        conditioning=Conditioning(embedder="condition_embedder.time_embedder", read=_of_noisiest_token),
        depends_on=("timestep",),
    ),
    "diffusers.ZImageTransformer2DModel": TransformerLayout(
        conditioning=Conditioning(embedder="t_embedder", width=_zimage_embedding_width),
        depends_on=("t",),
        width=_zimage_width,
        num_image_tokens=_zimage_num_image_tokens,
    ),
}
