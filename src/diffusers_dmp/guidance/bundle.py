"""How guidance experts are loaded and saved: a configuration, and one safetensors file with the tensors that the experts own.

The network that they share is not copied: the configuration has its name and a checksum of its weights.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import PushToHubMixin
from huggingface_hub import create_repo, snapshot_download, upload_folder
from safetensors.torch import save_file
from torch import nn

from ..models.loading import HUB_ARGUMENTS
from ..models.vision import load_network, network_sha256, processor_settings
from ..saving.mixins import check_version
from ..saving.reading import read_json
from ..saving.sources import is_local
from ..saving.weight_files import read_safetensors
from .lora_layers import check_not_adapted
from .outputs import FUNCTION, OUTPUT_KINDS

if TYPE_CHECKING:
    from .experts import GuidanceExperts

WEIGHTS_NAME = "guidance_experts.safetensors"


class ExpertsBundleMixin(ConfigMixin, PushToHubMixin):
    """Loading and saving for [`GuidanceExperts`]."""

    config_name = "config.json"

    @classmethod
    def from_base(cls, pretrained_model_name_or_path: str, **kwargs) -> "GuidanceExperts":
        """
        Make untrained experts of a network.

        Args:
            pretrained_model_name_or_path (`str`): The folder or Hub id of a transformers model; of a CLIP or SigLIP, the
                image tower is taken.
            kwargs: The other arguments of [`GuidanceExperts`]. `image_mean`, `image_std` and `image_size` are by default those of
                the image processor in the same folder. And `revision` (which is saved), `token`, `cache_dir`, `force_download`
                and `local_files_only`, for the Hub.

        Raises:
            ValueError: see [`GuidanceExperts`] and [`processor_settings`].
        """
        hub_arguments = {name: kwargs.pop(name) for name in (*HUB_ARGUMENTS, "revision") if name in kwargs}
        if not {"image_mean", "image_std", "image_size"} <= set(kwargs):
            kwargs = processor_settings(pretrained_model_name_or_path, **hub_arguments) | kwargs
        kwargs.setdefault("base_model_name_or_path", pretrained_model_name_or_path)
        kwargs.setdefault("base_model_revision", hub_arguments.get("revision"))
        return cls(load_network(pretrained_model_name_or_path, **hub_arguments), **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: "str | os.PathLike",
        base_model: "str | os.PathLike | None" = None,
        revision: str | None = None,
        subfolder: str | None = None,
        network: nn.Module | None = None,
        outputs: "Callable[[Any], Any] | None" = None,
        **hub_arguments,
    ) -> "GuidanceExperts":
        """
        Load experts that [`save_pretrained`] wrote.

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id.
            base_model (*optional*): The folder or Hub id of the network, if it has moved since the experts were saved.
            revision (`str`, *optional*): The branch, tag or commit of the experts' repository. That of the network is saved.
            subfolder (`str`, *optional*): Where the experts lie in the folder or repository.
            network (`nn.Module`, *optional*): The network itself, as it was before experts were made of it: needed if it is not
                one of transformers. It is changed in place, as in [`GuidanceExperts`].
            outputs (*optional*): The function of the network's output that the experts were made with, if it was one.
            hub_arguments: `token`, `cache_dir`, `force_download` and `local_files_only`, for the Hub: for the experts and for
                their network.

        Raises:
            ValueError: if `base_model` or `network` is another model than the experts were made for, there is no such folder,
                `network` or `outputs` is needed, or tensors are missing, unknown or of another shape.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = [(Path(subfolder or "") / name).as_posix() for name in (cls.config_name, WEIGHTS_NAME)]
            name = str(pretrained_model_name_or_path)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub_arguments))
        folder = folder / (subfolder or "")
        saved = read_json(folder / cls.config_name)
        check_version(saved)
        config = {name: value for name, value in saved.items() if not name.startswith("_")}
        for name in ("base_model_class", "base_model_sha256", "base_model_name_or_path", "image_mean", "image_std"):
            if name not in config:
                raise ValueError(
                    f"Expected {str(folder / cls.config_name)!r} to be that of guidance experts, but {name!r} is missing."
                )
        if network is not None and base_model is not None:
            raise ValueError(f"Expected `network` or `base_model`, but got both: {base_model!r} as well.")
        _check_given(config, folder, network, outputs)
        base_model_class, fingerprint = config.pop("base_model_class"), config.pop("base_model_sha256")
        if outputs is not None:
            config["outputs"] = outputs
        given, place = "network", ""
        if network is None:
            base_revision = None if base_model else config.get("base_model_revision")
            base_model = str(base_model or config["base_model_name_or_path"])
            network = _load_base_model(base_model, folder, revision=base_revision, **hub_arguments)
            given, place = "base_model", f" in {base_model!r}"
        if (type(network).__name__, network_sha256(network.float())) != (base_model_class, fingerprint):
            raise ValueError(
                f"Expected `{given}` to be the {base_model_class} that the experts in {str(folder)!r} were made for "
                f"({config['base_model_name_or_path']!r}), but got a {type(network).__name__} with other weights{place}."
            )
        experts = cls(network, **config)
        tensors = read_safetensors(folder / WEIGHTS_NAME)
        try:
            experts.load_expert_tensors(tensors)
        except ValueError as error:
            raise ValueError(f"{folder / WEIGHTS_NAME}: {error}") from error
        return experts

    def save_pretrained(self, save_directory: "str | os.PathLike", push_to_hub: bool = False, **kwargs) -> None:
        """
        Save the configuration, and the tensors that the experts own in `guidance_experts.safetensors`.

        The network that they share is not saved: the configuration refers to it by `base_model_name_or_path`.

        Args:
            save_directory: A folder, created if it does not exist.
            push_to_hub (`bool`): Upload the folder to the Hub as well.
            kwargs: `repo_id`, `private`, `token` and `commit_message` of the upload.

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
            _upload(save_directory, **kwargs)


def needs_network(config: dict[str, Any]) -> bool:
    """
    Tell whether the network of saved experts has to be given, or else is loaded by its name.

    Args:
        config (`dict`): The experts' configuration.
    """
    return config.get("outputs") in OUTPUT_KINDS or not hasattr(transformers, config["base_model_class"])


def _check_given(
    config: dict[str, Any], folder: Path, network: nn.Module | None, outputs: "Callable[[Any], Any] | None"
) -> None:
    """Check that what the folder does not hold is given: a network that is not of transformers, and a function."""
    name, network_class, kind = config["base_model_name_or_path"], config["base_model_class"], config.get("outputs")
    needs_function = kind == FUNCTION
    if network is None and needs_network(config):
        function = ", outputs=…" if needs_function else ""
        raise ValueError(
            f"Expected `network` to be the {network_class} that the experts in {str(folder)!r} were made for ({name!r}), which "
            f"is no model of transformers, but got none: `from_pretrained(…, network={_expression(name)}{function})`."
        )
    if needs_function and not callable(outputs):
        raise ValueError(
            f"Expected `outputs` to be the function of the network's output that the experts in {str(folder)!r} were made with, "
            f"which is not saved, but got {outputs!r}."
        )
    if outputs is not None and not needs_function:
        raise ValueError(f"Expected no `outputs`, as {str(folder)!r} says it ({kind!r}), but got {outputs!r}.")
    if network is not None:
        check_not_adapted(network)


def _load_base_model(name: str, folder: Path, **hub_arguments: Any) -> nn.Module:
    """Load the network that the experts in a folder were made of, which may have moved since."""
    if is_local(name) and not Path(name).is_dir():
        raise ValueError(
            f"Expected the network that the experts in {str(folder)!r} were made of in {name!r}, but there is no such folder here: "
            "go to where they were trained, or say as `base_model` where it is now."
        )
    return load_network(name, **hub_arguments)


def _expression(name: str) -> str:
    """The line of Python that makes the network, where its name says it: "torch.hub intel-isl/MiDaS MiDaS_small"."""
    words = name.split()
    if len(words) == 3 and words[0] == "torch.hub":
        return f"torch.hub.load({words[1]!r}, {words[2]!r})"
    return "…"


def _upload(
    folder: "str | os.PathLike",
    repo_id: str | None = None,
    private: bool | None = None,
    token: "str | bool | None" = None,
    commit_message: str | None = None,
) -> None:
    """Upload a folder to a model repository of the Hub, by default one of the folder's name."""
    repo_id = create_repo(repo_id or Path(folder).name, exist_ok=True, private=private, token=token).repo_id
    message = commit_message or "Upload GuidanceExperts"
    upload_folder(repo_id=repo_id, folder_path=folder, token=token, commit_message=message)
