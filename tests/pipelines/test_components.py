"""Components that are given to `from_pretrained` and `from_pipe` are used, on every class that these can be called on."""

import pytest
import torch
from conftest import randomised
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from small_pipelines import DIT, make_vae

from diffusers_dmp import ClassConditionalPipeline, DiTModel, DTRTransformer2DModel, PromptPatch, SNRSplitPipeline

NAMES = {str(index): f"class {index}, {index}" for index in range(10)}


def make_class_conditional() -> ClassConditionalPipeline:
    transformer = randomised(DiTModel(**DIT))
    patch = randomised(PromptPatch.for_transformer(transformer))
    return ClassConditionalPipeline(transformer, DDIMScheduler(), make_vae(), NAMES, prompt_patch=patch)


def make_split() -> SNRSplitPipeline:
    denoisers = [randomised(DiTModel(**DIT)), randomised(DTRTransformer2DModel(**DIT))]
    return SNRSplitPipeline(denoisers, DDIMScheduler(), [2.0], make_vae(), id2label=NAMES, guidance_scales=[1.0, 3.0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for make in (make_class_conditional, make_split):
        folder = folders[make] = tmp_path_factory.mktemp(make.__name__)
        make().save_pretrained(folder)
    return folders


def sample(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipeline([1, 2], **arguments).images


COMPONENTS = [
    (make_class_conditional, "vae", make_vae),
    (make_class_conditional, "vae", lambda: None),
    (make_class_conditional, "prompt_patch", lambda: PromptPatch.for_transformer(DiTModel(**DIT))),
    (make_class_conditional, "prompt_patch", lambda: None),
    (make_class_conditional, "scheduler", DDPMScheduler),
    (make_class_conditional, "transformer", lambda: DiTModel(**DIT)),
    (make_split, "vae", make_vae),
    (make_split, "vae", lambda: None),
    (make_split, "scheduler", DDPMScheduler),
    (make_split, "denoiser_0", lambda: DiTModel(**DIT)),
    (make_split, "denoiser_1", lambda: DiTModel(**DIT)),
]


@pytest.mark.parametrize("called_on", ["base class", "own class"])
@pytest.mark.parametrize("make, name, component", COMPONENTS)
def test_a_given_component_replaces_the_saved_one(folders, make, name, component, called_on):
    own_class = {make_class_conditional: ClassConditionalPipeline, make_split: SNRSplitPipeline}[make]
    given = component()
    loaded = (DiffusionPipeline if called_on == "base class" else own_class).from_pretrained(
        folders[make], **{name: given}
    )
    assert type(loaded) is own_class
    assert getattr(loaded, name) is given
    # all others come from the folder
    others = [each for each in make().components if each != name]
    assert all(getattr(loaded, each) is not None for each in others)


def test_other_numbers_of_denoisers(folders):
    third, settings = (
        DiTModel(**DIT),
        {"snr_boundaries": [4.0, 1.0], "guidance_scales": None, "prediction_types": None},
    )
    loaded = DiffusionPipeline.from_pretrained(folders[make_split], denoiser_2=third, **settings)
    assert loaded.num_denoisers == 3 and loaded.denoisers[2] is third
    settings["snr_boundaries"] = []
    loaded = DiffusionPipeline.from_pretrained(folders[make_split], denoiser_0=None, **settings)
    assert [type(each) for each in loaded.denoisers] == [DTRTransformer2DModel]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"denoiser_0": None}, "as many denoisers as `snr_boundaries` make intervals, 2, but got 1"),
        ({"scheduler": None}, "Expected a `scheduler`, .* but got None"),
        ({"denoisers": [DiTModel(**DIT)] * 2}, "`denoisers`, or `denoiser_0`, .* but got both"),
    ],
)
def test_refuses_components_that_do_not_fit(folders, arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained(folders[make_split], **arguments)


@pytest.mark.parametrize(
    "make, name, message",
    [
        (make_class_conditional, "denoiser_0", "components of a ClassConditionalPipeline, but got `denoiser_0`"),
        (make_split, "denoiser_99", "components of a SNRSplitPipeline, but got `denoiser_99`"),
        (make_split, "denoiser_7", "intervals, 2, but got 3: `denoiser_0`, `denoiser_1`, `denoiser_7`"),
    ],
)
def test_refuses_an_unknown_component_by_name(folders, make, name, message):
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained(folders[make], **{name: DiTModel(**DIT)})


@pytest.mark.parametrize("make", [make_class_conditional, make_split])
def test_from_pipe_shares_what_it_is_given(make, tmp_path):
    pipeline = make().to(torch.bfloat16)
    pipeline.vae.to(torch.float32)
    scheduler = DDPMScheduler()
    made = type(pipeline).from_pipe(pipeline, scheduler=scheduler)
    assert made.scheduler is scheduler
    assert all(made.components[name] is each for name, each in pipeline.components.items() if name != "scheduler")
    settings = ("id2label", "snr_boundaries", "guidance_scales", "prediction_types")
    assert [made.config.get(name) for name in settings] == [pipeline.config.get(name) for name in settings]
    assert (made.denoisers[0].dtype, made.vae.dtype) == (torch.bfloat16, torch.float32)  # neither is cast
    torch.testing.assert_close(sample(type(pipeline).from_pipe(pipeline)), sample(pipeline))

    made.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipeline) and loaded.config.id2label == NAMES
    assert type(pipeline).from_pipe(pipeline, dtype=torch.float32).denoisers[0].dtype == torch.float32


def test_from_and_to_a_stock_dit_pipeline():
    stock_transformer = randomised(DiTModel(**DIT, downscale_freq_shift=1.0)).to_diffusers()
    stock = DiTPipeline(stock_transformer, make_vae(), DDIMScheduler(), id2label=NAMES)
    ours = ClassConditionalPipeline.from_pipe(stock)
    assert ours.transformer is stock.transformer and ours.vae is stock.vae
    assert ours.get_label_ids(["class 3", "3"]) == [3, 3]
    assert sample(ours).isfinite().all()

    back = DiTPipeline.from_pipe(ours)
    assert back.transformer is stock.transformer
    assert back.get_label_ids(["class 3"]) == [3]
    own = make_class_conditional()
    own.prompt_patch.detach()
    exported = DiTPipeline.from_pipe(own, transformer=own.transformer.to_diffusers(approximate=True))
    assert exported.vae is own.vae and isinstance(exported.transformer, DiTTransformer2DModel)


def test_from_and_to_a_stock_ddpm_pipeline():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    stock = DDPMPipeline(randomised(unet), DDPMScheduler())
    ours = ClassConditionalPipeline.from_pipe(stock)
    assert ours.transformer is unet
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    ours.set_progress_bar_config(disable=True)
    images = ours(generator=torch.Generator().manual_seed(0), **arguments).images
    back = DDPMPipeline.from_pipe(ours, unet=ours.transformer)
    expected = back(generator=torch.Generator().manual_seed(0), **arguments).images
    torch.testing.assert_close(torch.tensor(images), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_from_pipe_between_one_denoiser_and_several():
    split = make_split()
    one = ClassConditionalPipeline.from_pipe(split, transformer=split.denoiser_1)
    assert one.transformer is split.denoiser_1 and one.config.id2label == NAMES
    with pytest.raises(ValueError, match="pipeline with transformer for a ClassConditionalPipeline.*denoiser_0"):
        ClassConditionalPipeline.from_pipe(split)
    with pytest.raises(ValueError, match="several denoisers, but got a ClassConditionalPipeline; .*from_pipelines"):
        SNRSplitPipeline.from_pipe(one)
    made = SNRSplitPipeline.from_pipe(split, denoisers=split.denoisers[::-1])
    assert made.denoisers == split.denoisers[::-1]


def test_from_pipe_cannot_leave_out_the_prompts_of_a_shared_transformer():
    pipeline = make_class_conditional()
    with pytest.raises(ValueError, match=r"`prompt_patch` to be the one that is attached.*`detach\(\)`"):
        ClassConditionalPipeline.from_pipe(pipeline, prompt_patch=None)


def test_code_in_a_repository_honours_components_as_well(folders, tmp_path):
    """As it is loaded where this package is not installed: the pipeline's class is in a file beside it."""
    make_split().save_pretrained(tmp_path, bundle_code=True)
    vae = make_vae()
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path / "pipeline.py"), vae=vae,
                                               trust_remote_code=True)  # fmt: skip
    assert type(loaded) is not SNRSplitPipeline and type(loaded).__name__ == "SNRSplitPipeline"
    assert loaded.vae is vae
