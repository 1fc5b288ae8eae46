"""The random numbers of images that are sampled together: each image's are its own, and are taken for several steps at once.

Diffusers takes each image's numbers of each step with a call of `torch.randn` of its own: 50,000 for 1,000 images and 50 steps.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.overrides import TorchFunctionMode

from ...models.compiled_modules import has_compiled_parts

RANDOM = frozenset(
    {
        torch.bernoulli, torch.multinomial, torch.normal, torch.rand, torch.rand_like, torch.randint, torch.randint_like,
        torch.randn, torch.randn_like, torch.Tensor.normal_, torch.Tensor.uniform_,
    }
)  # fmt: skip
MAX_CALLS = 16  # whose numbers are taken at once
# Of an image at once. It bounds the memory; and a GPU has a thread for each of them, so that they do not depend on how many it has.
MAX_NUMBERS = 2**16
CPU_BLOCK = 16  # PyTorch fills tensors on the CPU in blocks of so many numbers, and the last block otherwise


class ImageNumbers:
    """
    The random numbers of one image: those of its generator, which gives those of 1, 2, 4, … up to 16 calls of `torch.randn` at once.

    They depend on the generator's seed and on the image's own calls alone. On a CPU they are those of the calls one by one, bit for
    bit: what is taken in vain, because another kind of call follows, is given back.

    Args:
        generator (`torch.Generator`): The image's.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self._kind: _Kind | None = None
        self._num_calls, self._num_used = 1, 0
        self._state = torch.empty(0)
        self._unused: list[torch.Tensor] = []  # the last is the next

    def __call__(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Answer a call of a function of PyTorch that has this generator among its keyword arguments."""
        kind = _kind_of(function, args, kwargs)
        if kind != self._kind:
            self._give_back()
            self._kind, self._num_calls = kind, 1
        if kind is None:
            return function(*args, **kwargs)
        if not self._unused:
            self._take(kind)
        self._num_used += 1
        return self._unused.pop()

    def _take(self, kind: "_Kind") -> None:
        """Take the numbers of twice as many calls as the last time: a deterministic sampler calls once."""
        if self._num_calls > 1:
            self._state = self.generator.get_state()
        self._unused, self._num_used = [*kind.numbers(self.generator, self._num_calls).unbind()[::-1]], 0
        self._num_calls = min(2 * self._num_calls, MAX_CALLS, MAX_NUMBERS // math.prod(kind.size))

    def _give_back(self) -> None:
        """Bring the generator into the state after the calls that there were."""
        if self._unused and self._kind is not None:
            self.generator.set_state(self._state)
            self._kind.numbers(self.generator, self._num_used)
            self._unused = []


@dataclass(frozen=True)
class _Kind:
    """What calls of `torch.randn` have in common whose numbers may be taken at once."""

    size: tuple[int, ...]
    dtype: torch.dtype | None
    device: "torch.device | str | None"

    def numbers(self, generator: torch.Generator, num_calls: int) -> torch.Tensor:
        """The numbers of some calls, along the first axis."""
        return torch.randn((num_calls, *self.size), generator=generator, dtype=self.dtype, device=self.device)


def _kind_of(function: Any, args: tuple, kwargs: dict[str, Any]) -> _Kind | None:
    """The kind of a call; None for one whose numbers may not be taken together with others'."""
    if function is not torch.randn or not {"generator", "dtype", "device", "layout", "size"}.issuperset(kwargs):
        return None
    size = kwargs.get("size", args)
    size = tuple(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
    number = math.prod(size)
    is_strided = kwargs.get("layout") in (None, torch.strided)
    if not is_strided or not 0 < number <= MAX_NUMBERS // 2:
        return None
    if kwargs["generator"].device.type == "cpu" and number % CPU_BLOCK:
        return None
    return _Kind(size, kwargs.get("dtype"), kwargs.get("device"))


class RandomNumbers(TorchFunctionMode):
    """
    A context in which calls with an image's generator get their numbers from [`ImageNumbers`].

    It also notes whether random numbers are taken from PyTorch's global generators. It watches calls and not the generators' states,
    which a kernel may advance without using the numbers.

    Python sees every operation in it, which takes some microseconds, and it is no part of what is compiled. So the passes of a
    network are watched only the first time, and those of a compiled one never.

    Args:
        generators (of `torch.Generator`): Of the images.
    """

    keeps_conditioning = True  # see `has_fixed_modulations`

    def __init__(self, generators: Sequence[torch.Generator]):
        super().__init__()
        self.global_ones_are_used = False
        self._images = {generator: ImageNumbers(generator) for generator in generators}
        self._known: set[nn.Module] = set()
        self._running: nn.Module | None = None  # the network that is not watched

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: "dict[str, Any] | None" = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator in self._images:
            return self._images[generator](func, args, kwargs)
        if generator is None and func in RANDOM:
            self.global_ones_are_used = True
        return func(*args, **kwargs)

    @contextmanager
    def leaving_out(self, networks: Sequence[nn.Module]) -> Iterator[None]:
        """Watch passes of networks only the first time, and those of compiled ones never."""
        self._known = {network for network in networks if has_compiled_parts(network)}
        with ExitStack() as hooks:
            for network in networks:
                for handle in (
                    network.register_forward_pre_hook(self._pause),
                    network.register_forward_hook(self._go_on, always_call=True),
                ):
                    hooks.callback(handle.remove)
            try:
                yield
            finally:
                self._watch_again()  # after a Ctrl-C in a network, for which no hook is called

    def _pause(self, network: nn.Module, args: Any) -> None:
        if self._running is None and network in self._known:
            self._running = network
            self.__exit__(None, None, None)

    def _go_on(self, network: nn.Module, args: Any, output: Any) -> None:
        self._known.add(network)
        if self._running is network:
            self._watch_again()

    def _watch_again(self) -> None:
        if self._running is not None:
            self._running = None
            self.__enter__()


@contextmanager
def own_random_numbers(
    pipeline: DiffusionPipeline, generators: Sequence[torch.Generator], seed: int
) -> Iterator[None]:
    """
    Give each image its own random numbers in a call of a pipeline with a list of generators.

    PyTorch's global generators are seeded for one image. Some schedulers take numbers from them, such as those of flow matching with
    `stochastic_sampling`. The state from before comes back.

    Args:
        pipeline: The pipeline.
        generators (of `torch.Generator`): Of the images.
        seed (`int`): For the global generators.

    Raises:
        ValueError: at the end, if numbers of the global generators were used for several images.
    """
    device = pipeline.device  # a property that takes a pipeline a millisecond to compute
    sources = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    kept = [source.get_rng_state() for source in sources]
    torch.manual_seed(seed)
    networks = [each for each in pipeline.components.values() if isinstance(each, nn.Module)]
    try:
        with RandomNumbers(generators) as numbers, numbers.leaving_out(networks):
            yield
    finally:
        for state, source in zip(kept, sources):
            source.set_rng_state(state)
    if numbers.global_ones_are_used and len(generators) > 1:
        raise ValueError(
            f"Expected the random numbers of each image to be its own, but got a {type(pipeline).__name__} whose scheduler or model "
            "takes them from PyTorch's global generator, for all images of a batch; `--batch_size 1` samples them one by one."
        )


def noise_settings(device: torch.device) -> dict[str, str]:
    """
    Say how the noise of images is made, where that decides its bits; for records of what images depend on.

    On a CPU they are the same whether numbers are taken at once or one by one, as they were before.

    Args:
        device (`torch.device`): Of the generators.
    """
    return {} if device.type == "cpu" else {"noise": "of several steps at once"}
