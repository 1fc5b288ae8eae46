"""An off-the-shelf vision model that knows noisy images: one frozen network, one adapter per stretch of noise.
https://arxiv.org/abs/2212.05973

Legend: B batch, C channels, H and W height and width in pixels, E experts, T diffusion timesteps.
"""

import os
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import PushToHubMixin
from huggingface_hub import create_repo, snapshot_download
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..intervals import NoiseIntervals, group_by_expert
from ..models.vision import ImagePreprocessor, load_network, network_sha256, processor_settings
from ..saving.mixins import VersionedMixin, check_version
from .adapters import FullExperts, LoraExperts, lora_targets

METHODS = ("ppap", "multi_experts", "finetune")
WEIGHTS_NAME = "guidance_experts.safetensors"


class GuidanceExperts(VersionedMixin, nn.Module, ConfigMixin, PushToHubMixin):
    """
    E experts on noisy images, each for the timesteps [⌊e·T/E⌋, ⌊(e+1)·T/E⌋), made of one network for clean ones.

    ```py
    experts = GuidanceExperts.from_base("microsoft/resnet-50", num_experts=5)  # to be trained: training/train_ppap.py
    experts = GuidanceExperts.from_pretrained("outputs/ppap/experts")
    ```

    Untrained experts are the network itself.

    Args:
        network (`PreTrainedModel`): Of transformers, for image classification, depth estimation or segmentation. It becomes
            a part of this module, changed in place, in float32.
        image_mean, image_std (`list[float]`), image_size (`int` or `list[int]`, *optional*): See [`ImagePreprocessor`].
        num_experts (`int`): E.
        num_train_timesteps (`int`): T.
        method (`str`): 'ppap': LoRA, biases and normalisation layers of its own for each expert; 'multi_experts': a whole
            network each; 'finetune': one for all timesteps.
        rank (`int`), lora_alpha (`float`): γ and α; LoRA counts α/γ.
        target_modules (`str` or `list[str]`, *optional*): Which layers get LoRA, as PEFT reads it; the paper's by default.
        rank_pattern, alpha_pattern (`dict`, *optional*): Exceptions by layer, as PEFT reads them.
        adapt_head_bias (`bool`): Let a classifier's last bias be each expert's own as well, as the published code does for DeiT;
            the paper leaves the head as it is.
        base_model_name_or_path (`str`, *optional*): Where the network was loaded from.

    Raises:
        ValueError: if `method` is unknown, 'finetune' is to have several experts, or the network is of a family without a
            default for `target_modules`.
    """

    config_name = "config.json"

    def __init__(
        self,
        network: PreTrainedModel,
        image_mean: list[float],
        image_std: list[float],
        image_size: "int | list[int] | None" = None,
        num_experts: int = 5,
        num_train_timesteps: int = 1000,
        method: str = "ppap",
        rank: int = 16,
        lora_alpha: float = 8,
        target_modules: "str | list[str] | None" = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        adapt_head_bias: bool = False,
        base_model_name_or_path: str | None = None,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {', '.join(METHODS)}, but got {method!r}.")
        if method == "finetune" and num_experts != 1:
            raise ValueError(f"Expected `num_experts` to be 1 for the method 'finetune', but got {num_experts}.")
        if target_modules is None and method == "ppap":
            target_modules = lora_targets(network)
        network.float()
        self.intervals = NoiseIntervals.uniform(num_experts, num_train_timesteps)
        self.register_to_config(
            image_mean=image_mean,
            image_std=image_std,
            image_size=image_size,
            num_experts=num_experts,
            num_train_timesteps=num_train_timesteps,
            method=method,
            rank=rank,
            lora_alpha=lora_alpha,
            target_modules=target_modules,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            adapt_head_bias=adapt_head_bias,
            base_model_name_or_path=base_model_name_or_path or network.name_or_path,
            base_model_class=type(network).__name__,
            base_model_sha256=network_sha256(network),
        )
        self.preprocess = ImagePreprocessor(image_mean, image_std, image_size)
        if method == "ppap":
            self.experts = LoraExperts(
                network,
                num_experts,
                rank,
                lora_alpha,
                target_modules,
                rank_pattern,
                alpha_pattern,
                adapt_head_bias,
            )
        else:
            self.experts = FullExperts(network, num_experts)
        self.network_config = network.config
        self.eval()

    @classmethod
    def from_base(cls, pretrained_model_name_or_path: str, **kwargs) -> "GuidanceExperts":
        """
        Untrained experts.

        Args:
            pretrained_model_name_or_path (`str`): A transformers model's folder or Hub id.
            kwargs: The constructor's other arguments. What the image processor there says need not be given.

        Raises:
            ValueError: see [`GuidanceExperts`] and [`processor_settings`].
        """
        if not {"image_mean", "image_std", "image_size"} <= set(kwargs):
            kwargs = processor_settings(pretrained_model_name_or_path) | kwargs
        kwargs.setdefault("base_model_name_or_path", pretrained_model_name_or_path)
        return cls(load_network(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: "str | os.PathLike",
        base_model: "str | os.PathLike | None" = None,
        **kwargs,
    ) -> "GuidanceExperts":
        """
        Load what [`save_pretrained`] wrote.

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id.
            base_model (*optional*): Where the network is now, if not where it was.
            kwargs: `revision`, `token`, `cache_dir` and `local_files_only`, for the Hub.

        Raises:
            ValueError: if `base_model` is another model than the experts were made for, or tensors are missing, unknown or
                of another shape.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = [cls.config_name, WEIGHTS_NAME]
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **kwargs))
        saved = cls.load_config(folder)
        check_version(saved)
        config = {name: value for name, value in saved.items() if not name.startswith("_")}
        base_model_class, fingerprint = config.pop("base_model_class"), config.pop("base_model_sha256")
        base_model = str(base_model or config["base_model_name_or_path"])
        network = load_network(base_model)
        if (type(network).__name__, network_sha256(network)) != (base_model_class, fingerprint):
            raise ValueError(
                f"Expected `base_model` to be the {base_model_class} that the experts in {str(folder)!r} were made for "
                f"({config['base_model_name_or_path']!r}), but got a {type(network).__name__} with other weights in {base_model!r}."
            )
        experts = cls(network, **config)
        experts.load_expert_tensors(load_file(folder / WEIGHTS_NAME))
        return experts

    def save_pretrained(self, save_directory: "str | os.PathLike", push_to_hub: bool = False, **kwargs) -> None:
        """
        Write the configuration, and in `guidance_experts.safetensors` all that is the experts' own. The network itself is
        named only, by `base_model_name_or_path`.

        Args:
            save_directory: A folder, made if need be.
            push_to_hub (`bool`): Upload it as well; `repo_id`, `private`, `token` and `commit_message` say how.

        Raises:
            ValueError: if it is not known where the network was loaded from.
        """
        if not self.config.base_model_name_or_path:
            raise ValueError(
                "Expected `base_model_name_or_path` to be given for a network that was not loaded from anywhere, but got "
                "nothing: the experts are saved without it."
            )
        os.makedirs(save_directory, exist_ok=True)
        self.save_config(save_directory)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.expert_tensors().items()}
        save_file(tensors, os.path.join(save_directory, WEIGHTS_NAME), metadata={"format": "pt"})
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            message, private, token = (kwargs.pop(name, None) for name in ("commit_message", "private", "token"))
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            self._upload_folder(save_directory, repo_id, token=token, commit_message=message)

    def expert_tensors(self, expert: int | None = None) -> dict[str, torch.Tensor]:
        """What is one expert's own, by name; or all experts', each name with `expert_<e>.` before it."""
        if expert is not None:
            return self.experts.tensors(expert)
        return {
            f"expert_{each}.{name}": tensor
            for each in range(self.config.num_experts)
            for name, tensor in self.experts.tensors(each).items()
        }

    @torch.no_grad()
    def load_expert_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """
        Copy tensors in that [`expert_tensors`] named.

        Raises:
            ValueError: if one is missing, unknown or of another shape.
        """
        if self.config.method == "ppap":
            self.experts.activate(
                self.experts.active, merged=False
            )  # else the weights would keep the old adapter's part
        own = self.expert_tensors()
        for name in own.keys() ^ tensors.keys():
            raise ValueError(
                f"Expected the experts' tensors to be the {len(own)} of this network, but got "
                f"{'none' if name in own else 'one more'} by the name {name!r}."
            )
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"Expected {name!r} to have the shape {tuple(tensor.shape)}, but got {tuple(tensors[name].shape)}."
                )
            tensor.copy_(tensors[name])

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return next(self.parameters()).device

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor) -> ModelOutput:
        """
        Each image's own expert on it.

        Args:
            images (`torch.Tensor` of shape (B, C, H, W)): x_t, in [-1, 1] where it is clean.
            timesteps (`torch.Tensor` of shape (B,) or ()): On the CPU, or else it is waited for.

        Returns:
            `ModelOutput`: The network's own: `logits` or `predicted_depth`, in the images' order.
        """
        owners = self.intervals.index(timesteps.cpu()).expand(len(images)) if len(images) else timesteps.cpu().long()
        order, present, sizes = group_by_expert(owners)
        if len(present) == 1:
            return self.run_expert(present[0], images)
        groups = images[order.to(images.device)].split(sizes)
        outputs = [self.run_expert(expert, group, merged=False) for expert, group in zip(present, groups)]
        order = order.argsort().to(images.device)
        joined = {
            name: torch.cat([output[name] for output in outputs])[order]
            for name, value in outputs[0].items()
            if isinstance(value, torch.Tensor)
        }
        return type(outputs[0])(**joined)

    def run_expert(self, expert: int, images: torch.Tensor, merged: bool | None = None) -> ModelOutput:
        """
        One expert on all images.

        Args:
            expert (`int`): Which.
            images (`torch.Tensor` of shape (B, C, H, W)): As in [`forward`].
            merged (`bool`, *optional*): With its LoRA added to the weights; by default out of training.
        """
        network = self.experts.activate(expert, merged=not self.training if merged is None else merged)
        return network(self.preprocess(images))

    def requires_grad_of_expert(self, expert: int) -> dict[str, nn.Parameter]:
        """Let one expert be trained; its parameters by name. Of a classifier's head, PPAP trains
        its bias at most."""
        self.requires_grad_(False)
        parameters = {
            name: tensor for name, tensor in self.expert_tensors(expert).items() if isinstance(tensor, nn.Parameter)
        }
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters
