"""Save LoRA experts as one file for each adapter with a small JSON file beside, and make them of files of any origin.

Legend: E experts.
"""

import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download

from ..intervals import NoiseIntervals
from ..saving.lora_files import (
    LORA_CONFIG,
    OwnedNoise,
    check_writable,
    read_lora_config,
    read_lora_file,
    write_lora_file,
)
from ..saving.mixins import VERSION_KEY, dumped
from ..saving.sources import check_source
from ..saving.version import __version__
from ..saving.whole import written_whole
from .lora_loading import LoadedLoras, component_of
from .lora_targets import LoraTarget

if TYPE_CHECKING:
    from .lora_experts import LoraExperts

logger = logging.getLogger(__name__)


File = str | os.PathLike
Files = File | tuple[File, float] | list[File | tuple[File, float]] | None
# a mixin does not know the class that it is mixed into
_Experts: Any = object


class LoraFoldersMixin(_Experts):
    """Saving, and making from files, for [`LoraExperts`]."""

    _files: Mapping[str, Path] = {}  # the file of each adapter, which `attach` loads
    _loaded: Sequence[LoadedLoras] = ()

    @classmethod
    def from_files(cls, files: Sequence[Files], intervals: NoiseIntervals) -> "LoraExperts":
        """
        Make experts of LoRA files, which `attach` loads and `detach` takes out again.

        Attached to a pipeline, the files may have any layout that its `load_lora_weights` reads (Diffusers', kohya's, that of the
        Wan community), and of a pipeline with two transformers each file goes to the one that owns its noise. Adapters of text
        encoders are left out: they have no noise level.

        ```py
        experts = LoraExperts.from_files(["low.safetensors", "high.safetensors"], NoiseIntervals.from_sigmas([0.875]))
        experts.attach(pipe)
        ```

        Args:
            files (`list` of length E): For each interval, the least noise first: a safetensors file; a file and a weight; a list
                of these; or None.
            intervals ([`NoiseIntervals`]): Which of them acts at which noise level. A file whose metadata names another interval
                is warned about.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if there are not as many `files` as intervals, or a file is damaged or holds no LoRA.
        """
        names: dict[Path, str] = {}

        def named(entry: File | tuple[File, float]) -> tuple[str, float]:
            file, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
            path = Path(file)
            if path not in names:
                stem = re.sub(r"\W", "_", path.stem)  # a dot would be taken for a module of a module
                candidates = (stem if number == 1 else f"{stem}__{number}" for number in itertools.count(1))
                taken = set(names.values())
                names[path] = next(each for each in candidates if each not in taken)
            return names[path], weight

        adapters = [
            None if entry is None else [named(each) for each in (entry if isinstance(entry, list) else [entry])]
            for entry in ([files] if isinstance(files, (str, os.PathLike)) else files)
        ]
        return cls._with_files(adapters, intervals, {name: path for path, name in names.items()})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: File,
        revision: str | None = None,
        subfolder: str | None = None,
        **hub_arguments,
    ) -> "LoraExperts":
        """
        Load experts that [`save_pretrained`] wrote. `attach` puts them into a denoiser, and `detach` takes them out again.

        ```py
        LoraExperts.from_pretrained("user/high-and-low").attach(pipe)
        ```

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id.
            revision (`str`, *optional*): The branch, tag or commit of the repository.
            subfolder (`str`, *optional*): Where the files lie in the folder or repository.
            hub_arguments: `token`, `cache_dir`, `force_download` and `local_files_only`, for the Hub.

        Raises:
            ImportError: if a newer version of this package saved them.
            OSError: if a file is missing.
            ValueError: if a file is damaged.
        """
        check_source("pretrained_model_name_or_path", pretrained_model_name_or_path)
        folder = Path(pretrained_model_name_or_path)
        is_local = folder.is_dir()

        def fetch(names: list[str]) -> Path:
            patterns = [(Path(subfolder or "") / name).as_posix() for name in names]
            name = str(pretrained_model_name_or_path)
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub_arguments))

        folder = (folder if is_local else fetch([LORA_CONFIG])) / (subfolder or "")
        config = read_lora_config(folder)
        file_names = config["files"]
        if not is_local and file_names:
            fetch(list(file_names.values()))
        adapters = [[(each["adapter"], each["weight"]) for each in entry] for entry in config["experts"]]
        files = {name: folder / file for name, file in file_names.items()}
        return cls._with_files(adapters, NoiseIntervals(tuple(config["interval_edges"])), files)

    @classmethod
    def _with_files(
        cls, adapters: Sequence[Any], intervals: NoiseIntervals, files: Mapping[str, Path]
    ) -> "LoraExperts":
        experts: Any = cls(adapters, intervals)
        for name, path in files.items():
            said, used = read_lora_file(path).noise, experts.noise_of(name)
            if said is not None and not said.is_everything and not said.is_same(used):
                logger.warning("%s says that it is for the %s, but it is used for the %s.", path, said, used)
        experts._files = dict(files)
        return experts

    def noise_of(self, name: str, denoiser: str | None = None) -> OwnedNoise:
        """
        Return the noise levels that an adapter is used for.

        Args:
            name (`str`): The adapter.
            denoiser (`str`, *optional*): The class of the denoiser, to be noted.
        """
        found = [(expert, dict(entry)[name]) for expert, entry in enumerate(self.adapters) if name in dict(entry)]
        edges = self.intervals.edges
        intervals = tuple((float(edges[expert]), float(edges[expert + 1])) for expert, _ in found)
        return OwnedNoise(
            intervals, tuple(weight for _, weight in found), self.intervals.num_train_timesteps, denoiser
        )

    def save_pretrained(self, save_directory: File, names: Sequence[str] | None = None) -> None:
        """
        Save each adapter as a LoRA file in Diffusers' format, with its intervals in the metadata, and `lora_experts.json`.

        Every pipeline's `load_lora_weights(folder, weight_name="high.safetensors")` reads such a file. Other files in the folder
        stay.

        Args:
            save_directory: A folder, created if it does not exist.
            names (`list[str]`, *optional*): Save these adapters alone, where the files of the others come from elsewhere, such as
                from machines that train one expert each: `lora_experts.json` names all of them, and `from_pretrained` needs all.

        Raises:
            ValueError: if the experts are attached to nothing, have not these `names`, an adapter is no LoRA, or two denoisers have different adapters of
                one name.
        """
        if not self._attachments:
            raise ValueError(
                "Expected experts that are attached to a denoiser to save them, but got some that are not."
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"Expected `save_directory` to be a folder, but got the file {str(folder)!r}.")
        unknown = [name for name in names or () if name not in self.names]
        if unknown:
            raise ValueError(f"Expected `names` to be among {', '.join(self.names)}, but got {', '.join(unknown)}.")
        found = {name: self._saved_adapter(name) for name in (self.names if names is None else names)}
        files = _file_names(self.names)
        denoiser = self._attachments[0].denoiser
        config = {
            "_class_name": "LoraExperts",
            VERSION_KEY: __version__,
            "interval_edges": self.intervals.to_config(),
            "experts": [[{"adapter": name, "weight": weight} for name, weight in entry] for entry in self.adapters],
            "files": files,
            "denoiser": type(denoiser).__name__,
            "component": component_of(denoiser),
            "base_model_name_or_path": self._base_model(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LORA_CONFIG).unlink(missing_ok=True)  # while it is there, all of its files are
        for name, (tensors, settings) in found.items():
            noise = self.noise_of(name, type(denoiser).__name__)
            write_lora_file(folder / files[name], tensors, settings, component_of(denoiser), noise)
        with written_whole(folder / LORA_CONFIG) as unfinished:
            unfinished.write_text(dumped(config), encoding="utf-8")

    def _saved_adapter(self, name: str) -> tuple[dict[str, torch.Tensor], Any]:
        """The weights and the configuration of an adapter, wherever it is attached."""
        from peft import get_peft_model_state_dict

        found = [
            (get_peft_model_state_dict(each.denoiser, adapter_name=name), each.denoiser.peft_config[name])
            for each in self._attachments
            if name in each.switch.names
        ]
        if not found:
            raise ValueError(f"Expected the denoisers to have the adapter {name!r}, but none of them has it.")
        (tensors, settings), *others = found
        check_writable(name, tensors, settings)
        for other, _ in others:
            same = tensors.keys() == other.keys() and all(torch.equal(tensors[key], other[key]) for key in tensors)
            if not same:
                raise ValueError(
                    f"Expected the adapter {name!r} to be the same in both transformers, but got two; load them under two names."
                )
        return tensors, settings

    def _base_model(self) -> str | None:
        """The Hub id of the model that the adapters are for, if it is known."""
        pipeline = self._attachments[0].pipeline
        configs = [getattr(each, "config", {}) for each in (pipeline, self._attachments[0].denoiser)]
        names = [config.get("_name_or_path") for config in configs]
        return next((name for name in names if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name)), None)

    def _load_files(self, targets: Sequence[LoraTarget]) -> list[LoadedLoras]:
        """Load the files that each denoiser needs; after an error, none of them stays."""
        loaded: list[LoadedLoras] = []
        if not self._files:
            return loaded
        try:
            for target in targets:
                loaded.append(LoadedLoras(target.denoiser, target.pipeline))
                for name in target.names:
                    loaded[-1].load(self._files[name], name)
        except BaseException:
            remove_loras(loaded)
            raise
        return loaded


def remove_loras(loaded: Sequence[LoadedLoras]) -> None:
    """Take loaded files out of their denoisers."""
    for each in loaded:
        each.remove()


def _file_names(names: Sequence[str]) -> dict[str, str]:
    """A file name for each adapter: its own name, as far as every file system takes it."""
    found: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)
        taken = {each.lower() for each in found.values()}
        number = next(
            i for i in range(len(names) + 1) if f"{stem}{f'_{i}' if i else ''}.safetensors".lower() not in taken
        )
        found[name] = f"{stem}{f'_{number}' if number else ''}.safetensors"
    return found
