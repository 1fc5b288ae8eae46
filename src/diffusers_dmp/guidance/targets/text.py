"""Ask for what a prompt says, by the similarity that CLIP or SigLIP see between it and an image.
https://arxiv.org/abs/2103.00020, https://arxiv.org/abs/2303.15343

Legend: B batch, N prompts to contrast with, D numbers of an embedding.
"""

import logging
import os

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ...models.text_image import embed_prompts
from .base import GuidanceTarget, check_images
from .predictions import EMBEDDINGS, check_network, read_prediction

logger = logging.getLogger(__name__)

_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "patch_size", "image_size")


class TextTarget(GuidanceTarget):
    """
    Ask a CLIP or SigLIP for images that fit a prompt.

    ```py
    experts = GuidanceExperts.from_base("openai/clip-vit-base-patch32", num_experts=1)
    target = TextTarget.from_pretrained("openai/clip-vit-base-patch32", "a photo of a zebra")
    ```

    With l = logit_scale·cos(image, prompt) + logit_bias, as `logits_per_image` of transformers,

        CLIP:    log p = l, which is log p(prompt | image) / p(prompt) up to a constant, or
                 log p = log softmax(l, l₁, …, l_N)₀, where there are prompts to contrast with: p(this prompt | one of them fits)
        SigLIP:  log p = log sigmoid(l) + Σ log sigmoid(-lᵢ): p(this prompt fits, and none of the others)

    Args:
        text_embeds (`torch.Tensor` of shape (B or 1, D) or (D,)): Embeddings of one prompt for all images, or of one for each
            image, of any length; see [`from_pretrained`].
        logit_scale (`float`): What the cosine is multiplied by: exp of the model's `logit_scale`, which is 100 for most CLIPs.
        logit_bias (`float`, *optional*): SigLIP's. With it, log p is SigLIP's; without it, CLIP's.
        negative_embeds (`torch.Tensor` of shape (N, D) or (D,), *optional*): Embeddings of prompts to contrast with, the same for
            all images.

    Raises:
        ValueError: if embeddings are of another shape, not finite or zero; from `prepare`, if the network is of another kind or
            not the image tower of the same model; from `log_likelihood`, if its embeddings have another length.
    """

    def __init__(
        self,
        text_embeds: torch.Tensor,
        logit_scale: float = 100.0,
        logit_bias: float | None = None,
        negative_embeds: torch.Tensor | None = None,
    ):
        self.text_embeds = _unit_vectors("text_embeds", text_embeds)
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        self.negative_embeds = None
        if negative_embeds is not None:
            self.negative_embeds = _unit_vectors("negative_embeds", negative_embeds)
            if self.negative_embeds.shape[1] != self.text_embeds.shape[1]:
                raise ValueError(
                    f"Expected `negative_embeds` to have {self.text_embeds.shape[1]} numbers each, as `text_embeds`, but got "
                    f"{self.negative_embeds.shape[1]}."
                )
        self.name: str | None = None
        self.image_config: PreTrainedConfig | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: "str | os.PathLike",
        prompt: "str | list[str]",
        negative_prompt: "str | list[str] | None" = None,
        tokenizer: "str | os.PathLike | None" = None,
        **hub_arguments,
    ) -> "TextTarget":
        """
        Embed prompts with the text encoder of a CLIP or SigLIP, which is loaded for this alone.

        Args:
            pretrained_model_name_or_path: The folder or Hub id of the model; the experts have to be made of the same.
            prompt (`str` or `list[str]` of length B): One prompt for all images, or one for each. What is longer than the model
                reads (77 tokens, SigLIP 64) is cut off, with a warning.
            negative_prompt (`str` or `list[str]` of length N, *optional*): Prompts to contrast with, the same for all images:
                "a photo of a horse".
            tokenizer (*optional*): The folder or Hub id of the tokenizer, where the model is published without one.
            hub_arguments: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, for the Hub.

        Raises:
            ValueError: if it is no CLIP or SigLIP, its tokenizer or a weight is missing, or prompts are no texts.
        """
        prompts = _texts("prompt", prompt)
        negatives = [] if negative_prompt is None else _texts("negative_prompt", negative_prompt)
        name = os.fspath(pretrained_model_name_or_path)
        tokenizer = None if tokenizer is None else os.fspath(tokenizer)
        embedded = embed_prompts(name, [*prompts, *negatives], tokenizer, **hub_arguments)
        positive, negative = embedded.embeds.split([len(prompts), len(negatives)])
        target = cls(positive, embedded.logit_scale, embedded.logit_bias, negative if negatives else None)
        target.name, target.image_config = name, embedded.image_config
        return target

    def prepare(self, network_config: PreTrainedConfig) -> None:
        check_network(self, network_config, EMBEDDINGS)
        if self.image_config is None or not network_config.model_type:  # embeddings, or a network, of unknown origin
            return
        for name in _ARCHITECTURE:
            expected, got = (getattr(config, name, None) for config in (self.image_config, network_config))
            if expected != got:
                raise ValueError(
                    f"Expected the network to be the image tower of {self.name!r}, of which the embeddings of the prompts are, with "
                    f"{name} {expected!r}, but got {got!r}."
                )
        network_name = network_config.name_or_path
        if network_name and _resolved(network_name) != _resolved(self.name):
            logger.warning(
                "The prompts are embedded by %r and the images by %r: they are comparable only if both are the same model.",
                self.name,
                network_name,
            )

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        images = F.normalize(read_prediction(self, output, EMBEDDINGS), dim=-1)  # (B, D)
        check_images("prompt", len(self.text_embeds), len(images))
        if images.shape[1] != self.text_embeds.shape[1]:
            raise ValueError(
                f"Expected the network's embeddings of images to have {self.text_embeds.shape[1]} numbers, as those of the prompts "
                f"do, but got {images.shape[1]}: both have to be of the same model."
            )
        self.text_embeds = self.text_embeds.to(images)
        logits = self._logits((images * self.text_embeds).sum(-1))  # (B,)
        if self.negative_embeds is None:
            return logits if self.logit_bias is None else F.logsigmoid(logits)
        self.negative_embeds = self.negative_embeds.to(images)
        others = self._logits(images @ self.negative_embeds.T)  # (B, N)
        if self.logit_bias is None:
            return logits - torch.cat([logits[:, None], others], dim=1).logsumexp(1)
        return F.logsigmoid(logits) + F.logsigmoid(-others).sum(1)

    def _logits(self, cosines: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * cosines + (self.logit_bias or 0)


def _unit_vectors(name: str, embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings (N, D) of length 1."""
    embeds = torch.as_tensor(embeds).detach()
    if embeds.ndim not in (1, 2) or len(embeds) == 0:
        raise ValueError(f"Expected `{name}` to have the shape (B, D) or (D,), but got {tuple(embeds.shape)}.")
    embeds = F.normalize(embeds.view(-1, embeds.shape[-1]).float(), dim=-1)
    # zeros stay zeros
    if not torch.allclose(embeds.norm(dim=-1), torch.ones((), device=embeds.device)):
        raise ValueError(f"Expected `{name}` to be finite and not zero, but got others.")
    return embeds


def _texts(name: str, texts: "str | list[str]") -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts or [])
    if not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"Expected `{name}` to be a text or a list of texts, but got {texts!r}.")
    return texts


def _resolved(name_or_path: "str | None") -> str:
    """A name that is the same for two paths to one folder."""
    name = str(name_or_path)
    return os.path.realpath(name) if os.path.exists(name) else name
