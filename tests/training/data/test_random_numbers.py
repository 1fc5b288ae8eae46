"""The random numbers of images: each image's own, whatever is sampled beside it, and few calls for many steps."""

from collections import Counter

import pytest
import torch
from conftest import randomised
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dmp import ClassConditionalPipeline, DiTModel
from diffusers_dmp.training.data.random_numbers import ImageNumbers, RandomNumbers, noise_settings
from diffusers_dmp.training.data.seeded_sampling import sample_seeded

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 1}
SIZES = [(1, 1, 4, 4), (1, 4, 4, 4), (1, 3, 2, 4, 4), (1, 3, 3, 3), (), (5,), (0, 3), (1, 2, 128, 128)]
DTYPES = [None, torch.float32, torch.float16, torch.bfloat16, torch.float64]


def randn(size, dtype):
    return lambda generator: torch.randn(size, generator=generator, dtype=dtype, device=torch.device("cpu"))


CALLS = st.one_of(
    st.builds(randn, st.sampled_from(SIZES), st.sampled_from(DTYPES)),
    st.sampled_from(
        [
            lambda generator: torch.randn(1, 1, 4, 4, generator=generator),
            lambda generator: torch.randn(size=(16,), generator=generator, layout=torch.strided),
            lambda generator: torch.rand(3, generator=generator),
            lambda generator: torch.randint(10, (3,), generator=generator),
            lambda generator: torch.empty(32).normal_(generator=generator),
            lambda generator: torch.randn(16, generator=generator, out=torch.empty(16)),
            lambda generator: torch.normal(0.0, 1.0, (16,), generator=generator),
        ]
    ),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(CALLS, st.integers(1, 20)), min_size=1, max_size=5), st.integers(0, 2**64 - 1))
def test_on_a_cpu_they_are_those_of_the_calls_one_by_one(calls, seed):
    """Whatever the calls are, and however they follow one another."""
    alone = torch.Generator().manual_seed(seed)
    expected = [call(alone) for call, times in calls for _ in range(times)]
    generator = torch.Generator().manual_seed(seed)
    with RandomNumbers([generator]):
        found = [call(generator) for call, times in calls for _ in range(times)]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, expected))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 3))
def test_they_do_not_depend_on_other_images(order, image):
    """Also where the images take turns in another order, or not at all."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    with RandomNumbers(generators):
        found = [torch.randn(16, generator=generators[each]) for each in order]
    own = [numbers for numbers, each in zip(found, order) if each == image]
    alone = torch.Generator().manual_seed(image)
    with RandomNumbers([alone]):
        assert all(torch.equal(torch.randn(16, generator=alone), numbers) for numbers in own)


class Launches(TorchDispatchMode):
    """Counts the operations that are computed."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **kwargs or {})

    @property
    def random(self) -> int:
        return sum(count for func, count in self.counts.items() if "randn" in str(func) or "normal" in str(func))


def test_fifty_steps_take_seven_calls_for_each_image():
    """Those of a deterministic sampler take one."""
    for steps, calls in [(1, 1), (2, 2), (3, 2), (4, 3), (51, 7)]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        with Launches() as launches, RandomNumbers(generators):
            for _ in range(steps):
                randn_tensor((3, 4, 8, 8), generator=generators)
        assert launches.random == 3 * calls


@pytest.mark.parametrize(("size", "calls"), [((1, 4, 32, 32), 7), ((1, 16, 32, 32), 14), ((1, 3, 256, 256), 51)])
def test_large_images_take_more_calls_than_memory(size, calls):
    numbers = ImageNumbers(torch.Generator().manual_seed(0))
    with Launches() as launches:
        for _ in range(51):
            numbers(torch.randn, (size,), {"generator": numbers.generator})
            assert sum(each.numel() for each in numbers._unused) <= 2**16
    assert launches.random == calls


# In pipelines


@pytest.fixture
def noises(monkeypatch) -> list[torch.Tensor]:
    """The noises that DDPM adds, as they are added."""
    found: list[torch.Tensor] = []

    def noted(*args, **kwargs) -> torch.Tensor:
        found.append(randn_tensor(*args, **kwargs).clone())
        return found[-1]

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noted)
    return found


def own_pipeline() -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline(randomised(DiTModel(**TINY, num_classes=3)), DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_of_an_image_is_its_own_bit_for_bit(noises, dtype):
    """In batches of 1, 3 and 7 images, and in the parts of two processes."""
    pipeline = own_pipeline().to(dtype)
    by_image = []
    for parts in ([range(i, i + 1) for i in range(7)], [range(0, 3), range(3, 6), range(6, 7)], [range(7)],
                  [range(0, 5), range(5, 7)]):  # fmt: skip
        images: list[torch.Tensor] = []
        for indices in parts:
            noises.clear()
            sample_seeded(pipeline, 1, indices, class_labels=[0] * len(indices), num_inference_steps=6)
            images += torch.stack(noises).unbind(1)  # of all steps
        by_image.append(torch.stack(images))
    assert len(noises) == 5 and by_image[0].unique(dim=0).shape[0] == 7
    assert all(torch.equal(other, by_image[0]) for other in by_image)


def test_passes_of_a_network_are_watched_once(monkeypatch):
    """Python sees every operation that is watched."""
    pipeline, passes = own_pipeline(), []
    watch = RandomNumbers.__torch_function__

    def counted(self, func, *args, **kwargs):
        passes[-1] += 1
        return watch(self, func, *args, **kwargs)

    monkeypatch.setattr(RandomNumbers, "__torch_function__", counted)
    pipeline.transformer.register_forward_pre_hook(lambda *_: passes.append(0))
    passes.append(0)
    sample_seeded(pipeline, 0, [0, 1], class_labels=[0, 1], num_inference_steps=4)
    assert not pipeline.transformer._forward_hooks and len(passes) == 5
    first, *others = passes[1:]
    assert all(first > 2 * other for other in others), passes  # what is left is the scheduler's


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_network_that_fails_leaves_nothing_behind(monkeypatch, error):
    pipeline, calls, watched = own_pipeline(), [], []
    watch = RandomNumbers.__torch_function__
    monkeypatch.setattr(RandomNumbers, "__torch_function__", lambda *args: (watched.append(args), watch(*args))[1])

    def fail(*_):
        calls.append(len(calls))
        if len(calls) == 3:
            raise error("broken")

    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(error, match="broken"):
        sample_seeded(pipeline, 0, [0, 1], class_labels=[0, 1], num_inference_steps=4)
    assert not pipeline.transformer._forward_pre_hooks and not pipeline.transformer._forward_hooks
    number = len(watched)
    torch.randn(1)
    assert len(watched) == number > 0
    sample_seeded(pipeline, 0, [0, 1], class_labels=[0, 1], num_inference_steps=2)


def test_a_network_that_takes_global_numbers_is_refused():
    class Noisy(UNet2DModel):
        def forward(self, sample, *args, **kwargs):
            return super().forward(sample + torch.randn_like(sample), *args, **kwargs)

    unet = Noisy(8, block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="its own, but got a DDPMPipeline whose scheduler or model takes them from"):
        sample_seeded(pipeline, 0, [0, 1], batch_size=2, num_inference_steps=2)


def test_a_compiled_network_is_one_graph():
    """It would be cut into pieces and compiled again where Python watched its operations."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipeline = own_pipeline()
    pipeline.transformer.compile(backend=backend, fullgraph=True)
    for _ in range(2):
        sample_seeded(pipeline, 0, [0, 1], class_labels=[0, 1], num_inference_steps=3)
    assert len(graphs) == 1


def test_what_is_recorded():
    """Bits are as before on a CPU only."""
    assert noise_settings(torch.device("cpu")) == {}
    assert noise_settings(torch.device("cuda")) == {"noise": "of several steps at once"}
