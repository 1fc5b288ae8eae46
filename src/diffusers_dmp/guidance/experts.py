"""An off-the-shelf vision network that understands noisy images: one frozen network, one adapter per noise interval.
https://arxiv.org/abs/2212.05973

Legend: B batch, C channels, H and W height and width in pixels, E experts, T diffusion timesteps.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn
from transformers.utils import ModelOutput

from ..intervals import group_by_expert
from ..models.vision import ImagePreprocessor, network_sha256
from ..saving.mixins import VersionedMixin
from .adapters import ANY_HEAD, CLASSIFIER, AdapterExperts, AdapterSettings, NetworkExperts
from .bundle import ExpertsBundleMixin
from .lora_layers import lora_targets
from .noise_records import read_intervals, read_process
from .outputs import FUNCTION, check_output_kind, described_network, read_output

METHODS = ("ppap", "multi_experts", "finetune")


class GuidanceExperts(VersionedMixin, nn.Module, ExpertsBundleMixin):
    """
    E experts on noisy images, one for each noise interval, made of one network for clean images.

    ```py
    experts = GuidanceExperts.from_base("microsoft/resnet-50", num_experts=5)  # to be trained: training/train_ppap.py
    experts = GuidanceExperts.from_pretrained("outputs/ppap/experts")
    experts = GuidanceExperts(  # any other network
        torchvision.models.resnet18(weights="DEFAULT"), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], image_size=224,
        outputs="logits", target_modules=["conv1", "conv2"], base_model_name_or_path="torchvision resnet18",
    )
    ```

    Untrained experts compute what the network itself does.

    Args:
        network (`nn.Module`): A network of images (B, C, H, W): one of transformers for image classification, depth estimation
            or segmentation, the image tower of a CLIP or SigLIP, or any other, of which `outputs` says what it returns. It becomes
            a part of this module, changed in place, in float32.
        image_mean, image_std (`list[float]`), image_size (`int` or `list[int]`, *optional*): See [`ImagePreprocessor`].
        num_experts (`int`): E.
        num_train_timesteps (`int`): T.
        method (`str`): 'ppap': each expert owns LoRA, biases and normalisation layers; 'multi_experts': each expert is a whole
            network; 'finetune': one network for all timesteps.
        rank (`int`), lora_alpha (`float`): γ and α of LoRA, W + α/γ·B·A.
        target_modules (`str` or `list[str]`, *optional*): The layers that get LoRA, as PEFT reads it; by default the paper's,
            for networks of transformers.
        rank_pattern, alpha_pattern (`dict`, *optional*): Layers with another rank or α, as PEFT reads them.
        adapt_head_bias (`bool`): Let each expert own the bias of the classification head as well, as the published code does for
            DeiT. The paper leaves the head as it is.
        base_model_name_or_path (`str`, *optional*): The folder or Hub id that the network was loaded from; of a network that is
            not of transformers any name, such as "torch.hub intel-isl/MiDaS MiDaS_small", for those who load the experts.
        noise_schedule (`dict`, *optional*): The noise that the experts are trained on: `{"process": "flow_matching"}`, or the
            arguments of a [`DDPMScheduler`] with it, such as `{"beta_schedule": "linear", "beta_end": 0.02}`. A guided scheduler
            with other noise is matched to it by SNR. None if it is not known.
        sample_size (`list[int]` of length 2, *optional*): Height and width, in pixels, of the noisy images that the experts are
            trained on; others are refused. None if any will do.
        base_model_revision (`str`, *optional*): The branch, tag or commit of the Hub that the network was loaded from.
        interval_edges (`list[float]` of length E + 1, *optional*): In timesteps, ascending from 0 to T: expert e owns
            `interval_edges[e] <= t < interval_edges[e + 1]`. By default the intervals are of equal length,
            [⌊e·T/E⌋, ⌊(e+1)·T/E⌋).
        outputs (`str` or a function, *optional*): What the network returns, if it is not one of transformers: "logits", of shape
            (B, K) or (B, K, h, w); "depth", of shape (B, h, w) or (B, 1, h, w); or a function that takes what the network returns,
            and returns logits, a dict of tensors by name, or a `ModelOutput`. Functions are not saved.
        id2label (`dict[int, str]` or `list[str]`, *optional*): The names of the classes, if the network does not know them.

    Raises:
        ValueError: if `method` is unknown, 'finetune' is to have several experts, the network is of a family without a default
            for `target_modules`, `interval_edges` or `noise_schedule` do not fit the numbers of experts and timesteps, or
            `sample_size` is no height and width.
    """

    config: FrozenDict

    def __init__(
        self,
        network: nn.Module,
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
        interval_edges: list[float] | None = None,
        noise_schedule: dict[str, Any] | None = None,
        base_model_revision: str | None = None,
        sample_size: list[int] | None = None,
        outputs: "str | Callable[[Any], Any] | None" = None,
        id2label: "Mapping[int, str] | Sequence[str] | None" = None,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {', '.join(METHODS)}, but got {method!r}.")
        if method == "finetune" and num_experts != 1:
            raise ValueError(f"Expected `num_experts` to be 1 for the method 'finetune', but got {num_experts}.")
        if sample_size is not None and (isinstance(sample_size, int) or len(sample_size) != 2):
            raise ValueError(f"Expected `sample_size` to be height and width in pixels, but got {sample_size!r}.")
        check_output_kind(outputs)
        if target_modules is None and method == "ppap":
            target_modules = lora_targets(network)
        network.float()
        self.outputs = outputs
        self.network_config, names = described_network(network, id2label, outputs)
        self.intervals = read_intervals(interval_edges, num_experts, num_train_timesteps)
        self.process = read_process(noise_schedule, num_train_timesteps)
        self.register_to_config(  # type: ignore[operator]  # Diffusers has no types
            image_mean=image_mean,
            image_std=image_std,
            image_size=image_size,
            num_experts=num_experts,
            num_train_timesteps=num_train_timesteps,
            interval_edges=self.intervals.to_config(),
            method=method,
            rank=rank,
            lora_alpha=lora_alpha,
            target_modules=target_modules,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            adapt_head_bias=adapt_head_bias,
            noise_schedule=noise_schedule,
            base_model_name_or_path=base_model_name_or_path or getattr(network, "name_or_path", None),
            base_model_revision=base_model_revision,
            sample_size=sample_size,
            outputs=FUNCTION if callable(outputs) else outputs,
            id2label=names,
            base_model_class=type(network).__name__,
            base_model_sha256=network_sha256(network),
        )
        self.preprocess: nn.Module = ImagePreprocessor(image_mean, image_std, image_size)
        self.experts: AdapterExperts | NetworkExperts
        if method == "ppap":
            self.experts = AdapterExperts(network, num_experts, self._adapter_settings())
        else:
            self.experts = NetworkExperts(network, num_experts)
        self._is_checked = outputs is None
        self.eval()

    def _adapter_settings(self) -> AdapterSettings:
        """What the adapters have in common; which layers are the head depends on where the network is from."""
        config = self.config
        return AdapterSettings(
            config.rank,
            config.lora_alpha,
            config.target_modules,
            config.rank_pattern or {},
            config.alpha_pattern or {},
            config.adapt_head_bias,
            head=CLASSIFIER if config.outputs in (None, "depth") else ANY_HEAD,
            adapt_head_norms=config.outputs is not None,
        )

    def expert_tensors(self, expert: int | None = None) -> dict[str, torch.Tensor]:
        """
        The tensors that experts own: parameters and buffers, not copied.

        Args:
            expert (`int`, *optional*): Index of the expert; by default all experts.

        Returns:
            `dict[str, torch.Tensor]`: The tensors by name; those of all experts with the prefix `expert_<e>.`
        """
        self.experts.unmerge_active()  # otherwise the network's weights would keep the LoRA that is changed in place
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
        Copy the values of all experts' tensors from others of the same names and shapes.

        Args:
            tensors (`dict[str, torch.Tensor]`): By the names that [`expert_tensors`] gives to those of all experts.

        Raises:
            ValueError: if a tensor is missing, unknown or of another shape.
        """
        own = self.expert_tensors()
        for name in sorted(own.keys() ^ tensors.keys()):
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
        """The device of the experts."""
        return self._tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the experts compute in."""
        return self._tensor.dtype

    @property
    def _tensor(self) -> torch.Tensor:
        """Any tensor of the experts'; a network may have no parameters."""
        # asked for at every guided step: nothing more is looked at than needed
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((each for each in tensors if each.is_floating_point()), torch.zeros(()))

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor) -> ModelOutput:
        """
        Run each image through the expert that owns its timestep.

        Args:
            images (`torch.Tensor` of shape (B, C, H, W)): x_t, scaled so that clean pixels are in [-1, 1].
            timesteps (`torch.Tensor` of shape (B,) or ()): In [0, T]. Pass CPU timesteps to avoid a device sync.

        Returns:
            `ModelOutput`: The network's output, with `logits` or `predicted_depth`, in the order of the images.

        Raises:
            ValueError: if the network returned something else than `outputs` says.
        """
        timesteps = timesteps.cpu()
        if timesteps.is_floating_point():
            timesteps = timesteps.float()  # as schedulers and training have them: one on a boundary stays there
        owners = self.intervals.index(timesteps).expand(len(images)) if len(images) else timesteps.long()
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
        Run all images through one expert.

        Args:
            expert (`int`): Index of the expert.
            images (`torch.Tensor` of shape (B, C, H, W)): As in [`forward`].
            merged (`bool`, *optional*): Add the expert's LoRA to the weights first, so that it costs nothing; by default in eval
                mode only.
        """
        images = self.preprocess(images)
        if not self._is_checked:
            self._check_layers(images)
        network = self.experts.activate(expert, merged=not self.training if merged is None else merged)
        return read_output(network(images), self.outputs, len(images))

    def _check_layers(self, images: torch.Tensor) -> None:
        """Check once, with the first image, that a network which is not of transformers calls its adapted layers."""
        training = self.training
        self.eval()  # batches of one image have no statistics
        self.experts.check_called(images[:1])
        self.train(training)
        self._is_checked = True

    def requires_grad_of_expert(self, expert: int) -> dict[str, nn.Parameter]:
        """
        Make the parameters of one expert trainable and freeze everything else.

        Of a classifier's head, PPAP trains the bias at most.

        Returns:
            `dict[str, nn.Parameter]`: The trainable parameters by name.
        """
        self.requires_grad_(False)
        parameters = {
            name: tensor for name, tensor in self.expert_tensors(expert).items() if isinstance(tensor, nn.Parameter)
        }
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters
